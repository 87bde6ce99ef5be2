"""How easily a model is fooled: attacks, scores, checks on the attacks, and a report.

    from embattle.audit import audit_model
    found = audit_model(model, batches, site, eps=0.3)
    print(found.summary())
    found.save("runs/mine")

`evaluate` runs single attacks. `embattle audit RUN` does all of it for a run of `embattle train`.
"""

from __future__ import annotations

from embattle.audit.evaluation import evaluate, predict, sweep
from embattle.audit.honesty import Check
from embattle.audit.measure import Measurement, measure
from embattle.audit.outcomes import Attacked, success_rate, worst_of
from embattle.audit.own import Audit, audit_model, audit_models
from embattle.audit.smallest import Smallest, smallest

__all__ = [
    "Attacked",
    "Audit",
    "Check",
    "Measurement",
    "Smallest",
    "audit_model",
    "audit_models",
    "evaluate",
    "measure",
    "predict",
    "smallest",
    "success_rate",
    "sweep",
    "worst_of",
]
