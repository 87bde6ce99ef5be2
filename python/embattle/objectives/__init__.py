"""Robust objectives."""

from embattle.objectives.base import FORMS, AdversarialObjective
from embattle.objectives.batch import Batch

__all__ = ["FORMS", "AdversarialObjective", "Batch"]
