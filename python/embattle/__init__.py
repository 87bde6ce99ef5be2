"""Hardening recommenders built on embeddings: fused attack ops, adversarial training, audit.

Importing the package registers ``torch.ops.embattle.*``. Everything else is imported when first
used, so that ``import embattle`` costs little beyond torch itself.
"""

from __future__ import annotations

import importlib
import os as _os
import sys as _sys
from typing import TYPE_CHECKING


def _is_the_command() -> bool:
    """Whether Python was started for `embattle ...` or `python -m embattle ...`."""
    if _sys.argv[:1] == ["-m"]:
        words = _sys.orig_argv
        return "embattle" in words[words.index("-m") + 1 :][:1] if "-m" in words else False
    return _os.path.basename(_sys.argv[0] if _sys.argv else "") == "embattle"


if _is_the_command():
    # Read once, when torch loads OpenMP. Threads that spin while they wait take the cores from each
    # other as soon as anything else runs on the machine.
    _os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch as _torch  # noqa: E402  (the native library needs torch's libraries loaded)


def _only_asks() -> bool:
    """Whether this is `embattle doctor` or `--help`, which must work without the library."""
    words = _sys.orig_argv
    named = any(_os.path.basename(word) == "embattle" for word in words[:-1])
    return named and words[-1] in ("doctor", "--help", "-h")


__version__ = "unknown"
try:
    from embattle import _C

    __version__ = str(_C.build_info()["version"])
except ImportError as error:
    if not _only_asks():
        raise ImportError(
            f"embattle's native library cannot be loaded with torch {_torch.__version__} "
            f"({error}). Build it against the torch that is installed: "
            "pip install --no-build-isolation ."
        ) from error

if TYPE_CHECKING:
    from embattle import certify as certify
    from embattle import clipping as clipping
    from embattle import losses as losses
    from embattle import ops as ops
    from embattle.attacks import APGD as APGD
    from embattle.attacks import FGM as FGM
    from embattle.attacks import FGSM as FGSM
    from embattle.attacks import FMN as FMN
    from embattle.attacks import MIFGSM as MIFGSM
    from embattle.attacks import MSAP as MSAP
    from embattle.attacks import PGD as PGD
    from embattle.attacks import VAT as VAT
    from embattle.attacks import Attack as Attack
    from embattle.attacks import AttackResult as AttackResult
    from embattle.attacks import AttackWarning as AttackWarning
    from embattle.attacks import AutoAttack as AutoAttack
    from embattle.attacks import BoxStart as BoxStart
    from embattle.attacks import CategorySwap as CategorySwap
    from embattle.attacks import GaussianNoise as GaussianNoise
    from embattle.attacks import GaussianStart as GaussianStart
    from embattle.attacks import NEFTune as NEFTune
    from embattle.attacks import SMARTStep as SMARTStep
    from embattle.attacks import Square as Square
    from embattle.attacks import TokenSwap as TokenSwap
    from embattle.attacks import UniformNoise as UniformNoise
    from embattle.clipping import ClipResult as ClipResult
    from embattle.clipping import PerSampleClipper as PerSampleClipper
    from embattle.clipping import RowSelection as RowSelection
    from embattle.criteria import Criterion as Criterion
    from embattle.criteria import Demote as Demote
    from embattle.criteria import Deviate as Deviate
    from embattle.criteria import Diverge as Diverge
    from embattle.criteria import MaximizeLoss as MaximizeLoss
    from embattle.criteria import Misclassify as Misclassify
    from embattle.criteria import MultiLabel as MultiLabel
    from embattle.criteria import Outrank as Outrank
    from embattle.criteria import Promote as Promote
    from embattle.criteria import Target as Target
    from embattle.data.staggered_batches import StaggeredBatches as StaggeredBatches
    from embattle.objectives import AWP as AWP
    from embattle.objectives import R3F as R3F
    from embattle.objectives import AdversarialObjective as AdversarialObjective
    from embattle.objectives import Alp as Alp
    from embattle.objectives import Bregman as Bregman
    from embattle.objectives import FreeAT as FreeAT
    from embattle.objectives import Mart as Mart
    from embattle.objectives import Partial as Partial
    from embattle.objectives import Smart as Smart
    from embattle.objectives import StaggeredReplays as StaggeredReplays
    from embattle.objectives import Trades as Trades
    from embattle.objectives import Vat as Vat
    from embattle.objectives import masking as masking
    from embattle.objectives import schedules as schedules
    from embattle.objectives.monitor import Monitor as Monitor
    from embattle.objectives.monitor import RobustTrainingWarning as RobustTrainingWarning
    from embattle.ops import reference as reference
    from embattle.perturb.evaluation import Evaluation as Evaluation
    from embattle.perturb.site import Site as Site
    from embattle.perturb.strength import PerDim as PerDim
    from embattle.perturb.strength import Relative as Relative

# Public name -> the module that defines it.
_EXPORTS: dict[str, str] = {
    "APGD": "attacks",
    "AWP": "objectives",
    "AdversarialObjective": "objectives",
    "Alp": "objectives",
    "Attack": "attacks",
    "AttackResult": "attacks",
    "AttackWarning": "attacks",
    "AutoAttack": "attacks",
    "BoxStart": "attacks",
    "Bregman": "objectives",
    "ClipResult": "clipping",
    "Criterion": "criteria",
    "Demote": "criteria",
    "Deviate": "criteria",
    "Diverge": "criteria",
    "Evaluation": "perturb.evaluation",
    "FGM": "attacks",
    "FGSM": "attacks",
    "FMN": "attacks",
    "FreeAT": "objectives",
    "GaussianNoise": "attacks",
    "GaussianStart": "attacks",
    "MIFGSM": "attacks",
    "MSAP": "attacks",
    "Mart": "objectives",
    "MaximizeLoss": "criteria",
    "Misclassify": "criteria",
    "Monitor": "objectives.monitor",
    "MultiLabel": "criteria",
    "NEFTune": "attacks",
    "Outrank": "criteria",
    "PGD": "attacks",
    "Partial": "objectives",
    "PerDim": "perturb.strength",
    "PerSampleClipper": "clipping",
    "Promote": "criteria",
    "R3F": "objectives",
    "Relative": "perturb.strength",
    "RobustTrainingWarning": "objectives.monitor",
    "RowSelection": "clipping",
    "SMARTStep": "attacks",
    "Site": "perturb.site",
    "Smart": "objectives",
    "Square": "attacks",
    "StaggeredBatches": "data.staggered_batches",
    "StaggeredReplays": "objectives",
    "Target": "criteria",
    "CategorySwap": "attacks",
    "TokenSwap": "attacks",
    "Trades": "objectives",
    "UniformNoise": "attacks",
    "VAT": "attacks",
    "Vat": "objectives",
}
# Public name of a module -> the module.
_MODULES: dict[str, str] = {
    "certify": "certify",
    "clipping": "clipping",
    "losses": "losses",
    "masking": "objectives.masking",
    "ops": "ops",
    "reference": "ops.reference",
    "schedules": "objectives.schedules",
}

__all__ = ["__version__", *_MODULES, *_EXPORTS]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"embattle.{_MODULES[name]}")
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"embattle.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'embattle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
