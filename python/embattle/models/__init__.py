"""Recommenders that the jobs can train and audit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embattle.models.text import TextClassifier, build, load

__all__ = ["TextClassifier", "build", "load"]


def __getattr__(name: str) -> object:
    """Imports lazily: the models bring torch and transformers."""
    if name in __all__:
        from embattle.models import text

        return getattr(text, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
