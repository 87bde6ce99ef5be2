"""Robust objectives: one call per batch gives the loss to backpropagate, and metrics."""

from embattle.objectives.awp import AWP
from embattle.objectives.base import FORMS, AdversarialObjective, Form
from embattle.objectives.batch import Batch
from embattle.objectives.bregman import Bregman
from embattle.objectives.consistency import R3F, Alp, Mart, Smart, Trades, Vat
from embattle.objectives.free import FreeAT, free
from embattle.objectives.mixed import adversarial, apr, mixed
from embattle.objectives.partial import Partial
from embattle.objectives.parts import Parts
from embattle.objectives.staggered import StaggeredReplays

__all__ = [
    "AWP",
    "FORMS",
    "R3F",
    "AdversarialObjective",
    "Alp",
    "Batch",
    "Bregman",
    "Form",
    "FreeAT",
    "Mart",
    "Partial",
    "Parts",
    "Smart",
    "StaggeredReplays",
    "Trades",
    "Vat",
    "adversarial",
    "apr",
    "free",
    "mixed",
]
