"""How easily a model is fooled: attacks, scores, checks on the attacks, and a report.

    from embattle.audit import evaluate
    results = evaluate(model, batches, site, {"PGD-20": PGD(norm="l2", eps=1.0, steps=20)})

`embattle audit RUN_DIR` does all of it for a run of `embattle train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embattle.audit.evaluation import Attacked, evaluate, predict, sweep
    from embattle.audit.honesty import Check
    from embattle.audit.metrics import Scores, score, success_rate

__all__ = ["Attacked", "Check", "Scores", "evaluate", "predict", "score", "success_rate", "sweep"]

_HOMES = {
    "Attacked": "evaluation",
    "Check": "honesty",
    "Scores": "metrics",
    "evaluate": "evaluation",
    "predict": "evaluation",
    "score": "metrics",
    "success_rate": "metrics",
    "sweep": "evaluation",
}


def __getattr__(name: str) -> object:
    """Imports lazily: scores need torchmetrics, the rest only torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"embattle.audit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
