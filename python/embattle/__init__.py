"""Hardening recommenders built on embeddings: fused attack ops, adversarial training, audit.

Importing the package registers ``torch.ops.embattle.*``. Everything else is imported when first
used, so that ``import embattle`` costs little beyond torch itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch as _torch  # the native library needs torch's libraries loaded

try:
    from embattle import _C
except ImportError as error:
    raise ImportError(
        f"embattle's native library cannot be loaded with torch {_torch.__version__} ({error}). "
        "Build it against the torch that is installed: pip install --no-build-isolation ."
    ) from error

if TYPE_CHECKING:
    from embattle import losses as losses
    from embattle import masking as masking
    from embattle import ops as ops
    from embattle import schedules as schedules
    from embattle.attacks import FGM as FGM
    from embattle.attacks import FGSM as FGSM
    from embattle.attacks import PGD as PGD
    from embattle.attacks import AttackResult as AttackResult
    from embattle.attacks import GaussianNoise as GaussianNoise
    from embattle.attacks import NEFTune as NEFTune
    from embattle.attacks import UniformNoise as UniformNoise
    from embattle.objectives import AdversarialObjective as AdversarialObjective
    from embattle.perturb import Site as Site
    from embattle.strength import PerDim as PerDim
    from embattle.strength import Relative as Relative

__version__: str = str(_C.build_info()["version"])

# Public name -> the module that defines it.
_EXPORTS: dict[str, str] = {
    "AdversarialObjective": "objectives",
    "AttackResult": "attacks",
    "FGM": "attacks",
    "FGSM": "attacks",
    "GaussianNoise": "attacks",
    "NEFTune": "attacks",
    "PGD": "attacks",
    "PerDim": "strength",
    "Relative": "strength",
    "Site": "perturb",
    "UniformNoise": "attacks",
}
_SUBMODULES = ("losses", "masking", "ops", "reference", "schedules")

__all__ = ["__version__", *_SUBMODULES, *_EXPORTS]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"embattle.{name}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"embattle.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'embattle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
