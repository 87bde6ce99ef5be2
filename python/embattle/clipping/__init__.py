"""Per-sample gradient clipping at the price of ordinary training."""

from __future__ import annotations

from embattle.clipping.clipper import ClipResult, PerSampleClipper
from embattle.clipping.noise import RowSelection

__all__ = ["ClipResult", "PerSampleClipper", "RowSelection"]
