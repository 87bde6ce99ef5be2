"""Attacks in embedding space: one loop, small hooks, keyword-only arguments."""

from embattle.attacks.base import Attack
from embattle.attacks.gradient import FGM, FGSM, PGD
from embattle.attacks.noise import GaussianNoise, NEFTune, UniformNoise
from embattle.attacks.result import AttackResult

__all__ = [
    "FGM",
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "GaussianNoise",
    "NEFTune",
    "UniformNoise",
]
