"""How easily a model is fooled: attacks, scores, checks on the attacks, and a report.

    from embattle.audit import evaluate
    results = evaluate(model, batches, site, {"PGD-20": PGD(norm="l2", eps=1.0, steps=20)})

`embattle audit RUN_DIR` does all of it for a run of `embattle train`.
"""

from __future__ import annotations

from embattle.audit.evaluation import evaluate, predict, sweep
from embattle.audit.honesty import Check
from embattle.audit.measure import Measurement, measure
from embattle.audit.outcomes import Attacked, success_rate, worst_of
from embattle.audit.smallest import Smallest, smallest

__all__ = [
    "Attacked",
    "Check",
    "Measurement",
    "Smallest",
    "evaluate",
    "measure",
    "predict",
    "smallest",
    "success_rate",
    "sweep",
    "worst_of",
]
