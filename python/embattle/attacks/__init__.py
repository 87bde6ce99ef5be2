"""Attacks in embedding space: one loop, small hooks, keyword-only arguments."""

from embattle.attacks.auto import AutoAttack, EnsembleResult
from embattle.attacks.base import Attack
from embattle.attacks.categories import CategorySwap
from embattle.attacks.direction import VAT, SMARTStep
from embattle.attacks.gradient import FGM, FGSM, MSAP, PGD
from embattle.attacks.minimum import FMN, MinimumNormResult
from embattle.attacks.momentum import APGD, MIFGSM
from embattle.attacks.noise import GaussianNoise, NEFTune, UniformNoise
from embattle.attacks.result import AttackResult, AttackWarning
from embattle.attacks.square import Square
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.attacks.swap_search import SwapResult
from embattle.attacks.tokens import TokenSwap

__all__ = [
    "APGD",
    "FGM",
    "FGSM",
    "FMN",
    "MIFGSM",
    "MSAP",
    "PGD",
    "VAT",
    "Attack",
    "AttackResult",
    "AttackWarning",
    "AutoAttack",
    "BoxStart",
    "CategorySwap",
    "EnsembleResult",
    "GaussianNoise",
    "GaussianStart",
    "MinimumNormResult",
    "NEFTune",
    "SMARTStep",
    "Square",
    "SwapResult",
    "TokenSwap",
    "UniformNoise",
]
