"""Recommenders that the jobs can train and audit.

A ranker has `scores`, which gives `[B, items]` for users (or, of SASRec, sequences) `[B, ...]`, and
`losses`, one for each sample, `[B]`. A model of click-through rates gives logits `[B]`, and has
`losses` too. `ranking.evaluate` ranks all items.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embattle.models.deepfm import DeepFM as DeepFM
    from embattle.models.dlrm import DLRM as DLRM
    from embattle.models.fm import FM as FM
    from embattle.models.hybrid import HybridMF as HybridMF
    from embattle.models.interactions import Interactions as Interactions
    from embattle.models.lightgcn import LightGCN as LightGCN
    from embattle.models.mf import MF as MF
    from embattle.models.news import NewsClicks as NewsClicks
    from embattle.models.sasrec import SASRec as SASRec
    from embattle.models.text import TextClassifier as TextClassifier
    from embattle.models.text import build as build
    from embattle.models.text import load as load

# Public name -> the module that defines it.
_EXPORTS = {
    "DLRM": "dlrm",
    "FM": "fm",
    "MF": "mf",
    "DeepFM": "deepfm",
    "HybridMF": "hybrid",
    "Interactions": "interactions",
    "LightGCN": "lightgcn",
    "NewsClicks": "news",
    "SASRec": "sasrec",
    "TextClassifier": "text",
    "build": "text",
    "load": "text",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    """Imports lazily: the models bring torch and transformers."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"embattle.models.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
