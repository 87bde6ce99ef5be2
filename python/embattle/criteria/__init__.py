"""What an attack is for: what it ascends, when its goal is reached, and which iterate is better."""

from embattle.criteria.base import Criterion, MaximizeLoss, ascended, reached
from embattle.criteria.classes import Misclassify, MultiLabel, Target
from embattle.criteria.ranking import Demote, Outrank, Promote
from embattle.criteria.values import Deviate, Diverge

__all__ = [
    "Criterion",
    "Demote",
    "Deviate",
    "Diverge",
    "MaximizeLoss",
    "Misclassify",
    "MultiLabel",
    "Outrank",
    "Promote",
    "Target",
    "ascended",
    "reached",
]
