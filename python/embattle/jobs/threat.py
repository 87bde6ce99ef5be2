"""From recipes to attacks: the same threat for training and for the audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embattle.attacks import FGM, FGSM, PGD, Attack, UniformNoise
from embattle.jobs.recipe import AttackRecipe, Recipe, ThreatRecipe
from embattle.objectives import AdversarialObjective
from embattle.objectives.schedules import WarmUp
from embattle.perturb.attacked_batch import Masks
from embattle.perturb.evaluation import LossFn
from embattle.perturb.site import Site
from embattle.perturb.strength import Relative


def make_attack(
    recipe: AttackRecipe,
    threat: ThreatRecipe,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    best: bool = False,
) -> Attack:
    """Builds the attack of a recipe within its threat.

    Args:
        recipe: which attack.
        threat: norm, radius and its unit.
        generator: source of random starts.
        scale: factor on the radius.
        best: whether `pgd` keeps its best iterate instead of the last.

    Returns:
        The attack.
    """

    def strength(share: float) -> float | Relative:
        value = threat.eps * scale * share
        return value if threat.unit == "absolute" else Relative(value, to=threat.unit)

    common: dict[str, Any] = {
        "norm": threat.norm,
        "eps": strength(1.0),
        "restarts": recipe.restarts,
        "generator": generator,
    }
    if recipe.kind == "noise":
        return UniformNoise(**common)
    if recipe.kind == "pgd":
        return PGD(
            **common,
            steps=recipe.steps,
            step_size=strength(recipe.step_share),
            random_start=recipe.random_start,
            keep="best" if best else "last",
        )
    return (FGSM if recipe.kind == "fgsm" else FGM)(**common, random_start=recipe.random_start)


class Hardening:
    """The loss of the hardened run: clean + lam * adversarial, with eps warming up.

    Args:
        recipe: the job.
        sites: what is perturbed.
        generator: source of random starts.
        share_clean_pass: let the attack start from the clean pass's gradient; not possible with
            several processes, or with a float16 gradient scaler.
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: Sequence[Site],
        generator: torch.Generator,
        *,
        share_clean_pass: bool,
    ) -> None:
        self.eps = recipe.threat.eps
        self.objective = AdversarialObjective(
            make_attack(recipe.harden.attack, recipe.threat, generator),
            sites,
            lam=recipe.harden.lam,
            eps_schedule=WarmUp(round(recipe.harden.warmup * recipe.train.steps)),
            early_backward=share_clean_pass,
        )

    def step(self, loss_fn: LossFn, mask: Masks, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss to differentiate at a step, and the figures to show.

        Args:
            loss_fn: runs the model on the batch and gives its evaluation.
            mask: what may move.
            step: number of the step, from 0; the warm-up depends on it alone.
        """
        self.objective.step = step
        loss, metrics = self.objective(loss_fn, mask=mask)
        figures = {
            "loss": float(metrics["clean_loss"]),
            "robust_loss": float(metrics.get("adversarial_loss", metrics["clean_loss"])),
            "eps": self.eps * float(metrics["eps_scale"]),
        }
        return loss, figures
