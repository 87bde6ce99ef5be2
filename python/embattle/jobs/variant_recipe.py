"""A variant in a recipe: what one of the job's models is trained on.

Objectives, masking and schedules are those of `embattle.objectives`, with their options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from embattle.jobs.attack_recipe import NOISES, AttackChoice, attack_recipe
from embattle.jobs.choices import PlainOption, choice, section_of
from embattle.jobs.schedule_recipe import (
    EpsScheduleChoice,
    ScheduleChoice,
    Share,
    WarmUpRecipe,
    constant,
)
from embattle.objectives import masking
from embattle.objectives.consistency import Divergence
from embattle.objectives.partial import Choose
from embattle.sections import Section

ShareOfBatch = Annotated[float, Field(gt=0, le=1)]

# --- masking --------------------------------------------------------------------------------------

_MASKING = {
    kind: section_of(PlainOption, kind, made)
    for kind, made in {
        "loss_quantile": masking.LossQuantile,
        "loss_bound": masking.LossBound,
        "loss_ratio": masking.LossRatio,
        "norm_bound": masking.NormBound,
        "confidence": masking.Confidence,
        "nearest_agreement": masking.NearestAgreement,
    }.items()
}

if TYPE_CHECKING:
    MaskingChoice = PlainOption
else:
    MaskingChoice = choice(_MASKING, "kind")

# --- objectives -----------------------------------------------------------------------------------


class ClippingRecipe(Section):
    """Per-sample clipping: no sample's gradient (clean and adversarial together) is longer.

    Attributes:
        max_norm, mode, gamma, noise_multiplier: see `embattle.PerSampleClipper`.
    """

    max_norm: NonNegativeFloat = 1.0
    mode: Literal["flat", "per_layer", "automatic"] = "flat"
    gamma: PositiveFloat = 0.01
    noise_multiplier: NonNegativeFloat = 0.0


class VariantRecipe(Section):
    """What all variants have.

    Attributes:
        objective: what is trained on; one of `OBJECTIVES`.
        duration: share of `train.steps` that it is trained for. Where a step takes longer than a
            plain one, as an attack's own work does on a small model, less than 1 makes the times
            equal. The decay of the learning rate and the schedules are over these steps.
        rate: factor on `train.learning_rate`. Who meets fewer samples, more often, may need more.
    """

    objective: str
    duration: float = Field(default=1.0, gt=0, le=1)
    rate: PositiveFloat = 1.0

    @property
    def words(self) -> str:
        """What it is trained on, in a few words."""
        return self.objective


class PlainVariant(VariantRecipe):
    """The loss, without an attacker.

    Attributes:
        clipping: per-sample clipping.
    """

    objective: Literal["plain"] = "plain"
    clipping: ClippingRecipe | None = None


class AttackedVariant(VariantRecipe):
    """What all objectives with an attack have.

    Attributes:
        attack: the attack trained against.
        scale: its strength, in multiples of the threat's eps.
        eps_schedule: factor on that strength over the steps.
        steps_schedule: share of the attack's steps that is made.
    """

    attack: AttackChoice = attack_recipe(kind="pgd", steps=1)
    scale: PositiveFloat = 1.0
    eps_schedule: EpsScheduleChoice = WarmUpRecipe()
    steps_schedule: ScheduleChoice = constant()

    @property
    def words(self) -> str:
        """The objective and its attack."""
        return f"{self.objective} against {self.attack.label}"

    @property
    def needs_accuracy(self) -> bool:
        """Whether its steps are told how many samples stand, or which class is right."""
        return self.eps_schedule.kind == "adaptive" or self.of_classes

    @property
    def of_classes(self) -> bool:
        """Whether it compares what it is told with classes."""
        return self.objective in ("mart", "r3f")


class AWPRecipe(Section):
    """Adversarial weight perturbation around an objective.

    Attributes:
        gamma: relative size of the perturbation.
        delay: steps before it sets in.
    """

    gamma: PositiveFloat = 0.01
    delay: int = Field(default=0, ge=0)


class MaskedVariant(AttackedVariant):
    """An objective with an adversarial part of each sample.

    Attributes:
        masking: leaves samples out of that part.
        awp: perturbs the weights too.
    """

    masking: MaskingChoice | None = None
    awp: AWPRecipe | None = None


class WeightedVariant(MaskedVariant):
    """An objective whose adversarial part is weighted.

    Attributes:
        lam: the weight.
        lam_schedule: factor on it over the steps.
    """

    lam: NonNegativeFloat = 1.0
    lam_schedule: ScheduleChoice = constant()


class _Clipped(MaskedVariant):
    clipping: ClippingRecipe | None = None

    @model_validator(mode="after")
    def _one_backward_pass(self) -> _Clipped:
        if self.clipping is not None and self.awp is not None:
            raise ValueError(
                "clipping and awp exclude each other: the perturbed weights' gradients are not "
                "those of single samples; leave one out"
            )
        return self


class MixedVariant(WeightedVariant, _Clipped):
    """Clean plus weighted adversarial loss.

    Attributes:
        clipping: per-sample clipping.
    """

    objective: Literal["mixed", "apr"] = "mixed"


class AdversarialVariant(_Clipped):
    """The adversarial loss alone.

    Attributes:
        clipping: per-sample clipping.
    """

    objective: Literal["adversarial"] = "adversarial"

    @model_validator(mode="after")
    def _no_clean_pass(self) -> AdversarialVariant:
        _refuse_loss_ratio(self)
        return self


class PairedVariant(WeightedVariant):
    """Losses that compare clean and perturbed outputs: `mart`, `alp`."""

    objective: Literal["mart", "alp"]


class NoiseVariant(WeightedVariant):
    """R3F: outputs under noise stay close."""

    objective: Literal["r3f"] = "r3f"
    attack: AttackChoice = attack_recipe(kind="noise")

    @model_validator(mode="after")
    def _noise(self) -> NoiseVariant:
        if self.attack.kind not in NOISES:
            raise ValueError(
                f"objective r3f takes noise, not attack {self.attack.kind}: write attack: "
                "{kind: noise}"
            )
        return self


class DivergingVariant(WeightedVariant):
    """A divergence from the clean outputs, which the attack ascends: `trades`, `vat`.

    Attributes:
        divergence: `kl` and `symmetric_kl` are of classes, `squared_distance` of any outputs.
    """

    objective: Literal["trades", "vat"]
    attack: AttackChoice = attack_recipe(kind="pgd", random_start=True)
    divergence: Divergence = "kl"

    @model_validator(mode="after")
    def _gradient_at_the_start(self) -> DivergingVariant:
        if not self.attack.starts_at_random:
            raise ValueError(
                f"objective {self.objective} ascends a divergence, which has no gradient where "
                "nothing is perturbed: write attack.random_start: true"
            )
        return self


class BregmanRecipe(Section):
    """SMART's proximal term.

    Attributes:
        weight, momentum: see `embattle.objectives.Bregman`.
    """

    weight: NonNegativeFloat = 1.0
    momentum: float = Field(default=0.99, ge=0, lt=1)


class SmartVariant(DivergingVariant):
    """SMART: a symmetric divergence, and a proximal term.

    Attributes:
        bregman: the proximal term, if any.
    """

    objective: Literal["smart"] = "smart"  # type: ignore[assignment]
    divergence: Divergence = "symmetric_kl"
    bregman: BregmanRecipe | None = None


class FreeVariant(AttackedVariant):
    """FreeLB: the ascent's passes are the training's."""

    objective: Literal["free"] = "free"

    @model_validator(mode="after")
    def _plain_attack(self) -> FreeVariant:
        _check_shared_passes(self)
        return self


class FreeATVariant(AttackedVariant):
    """Free adversarial training: each batch is used several times, the delta lives on.

    Attributes:
        replays: optimiser steps on each batch.
    """

    objective: Literal["freeat"] = "freeat"
    attack: AttackChoice = attack_recipe(kind="fgm")
    replays: PositiveInt = 4

    @model_validator(mode="after")
    def _plain_attack(self) -> FreeATVariant:
        _check_shared_passes(self)
        return self


class StaggeredVariant(AttackedVariant):
    """Staggered replays: training's own gradients move the deltas, and no pass is added.

    Attributes:
        attack: its steps; one that reaches the border of the ball for two visits.
        visits: how often a sample comes in a row; the steps stay as many, and so the cost.
        share: of the new samples of a batch, how many come again.
        lam: weight of a replayed sample beside a new one.
        lam_schedule: factor on it over the steps.
        masking: leaves replayed samples out of the update.
        clipping: per-sample clipping.
    """

    objective: Literal["staggered"] = "staggered"
    attack: AttackChoice = attack_recipe(kind="fgm")
    visits: PositiveInt = 2
    share: ShareOfBatch = 1.0
    lam: NonNegativeFloat = 1.0
    lam_schedule: ScheduleChoice = constant()
    masking: MaskingChoice | None = None
    clipping: ClippingRecipe | None = None

    @model_validator(mode="after")
    def _plain_attack(self) -> StaggeredVariant:
        _check_shared_passes(self)
        _refuse_loss_ratio(self)
        return self


class PartialVariant(WeightedVariant, _Clipped):
    """Partial batches: a share of each batch is attacked and perturbed, within one training pass.

    Attributes:
        attack: of the chosen samples.
        share: of the samples of a batch.
        choose: which: at random, those of the largest loss, or those nearest to the border between
            right and wrong, as of their last batch.
        delay: share of the steps that are plain training, at first.
        share_schedule: factor on `share` over the steps.
        every: every so many-th pass attacks, and the others are plain training.
    """

    objective: Literal["partial"] = "partial"
    attack: AttackChoice = attack_recipe(kind="fgm")
    share: ShareOfBatch = 0.5
    choose: Choose = "random"
    delay: Share = 0.0
    share_schedule: ScheduleChoice = constant()
    every: int = Field(default=1, ge=1)

    @property
    def of_classes(self) -> bool:
        """Whether it compares what it is told with classes."""
        return self.choose == "margin"


def _refuse_loss_ratio(variant: AttackedVariant) -> None:
    if getattr(getattr(variant, "masking", None), "kind", None) == "loss_ratio":
        raise ValueError(
            f"masking loss_ratio compares with clean losses, which objective {variant.objective} "
            "does not compute; use loss_quantile, or objective mixed"
        )


def _check_shared_passes(variant: AttackedVariant) -> None:
    attack = variant.attack
    if attack.kind not in ("fgsm", "fgm", "pgd", "msap", "mifgsm"):
        raise ValueError(
            f"objective {variant.objective} trains in the passes of an attack by gradient steps on "
            f"the loss, not of {attack.kind}: use pgd"
        )
    if attack.restarts > 1 or getattr(attack, "mode", None) == "eval":
        raise ValueError(
            f"objective {variant.objective} trains in the attack's passes: restarts and mode: eval "
            "do not go with it; leave them out"
        )


#: The sections of all variants by `objective`.
OBJECTIVES: dict[str, type[VariantRecipe]] = {
    "plain": PlainVariant,
    "mixed": MixedVariant,
    "apr": MixedVariant,
    "adversarial": AdversarialVariant,
    "mart": PairedVariant,
    "alp": PairedVariant,
    "trades": DivergingVariant,
    "vat": DivergingVariant,
    "smart": SmartVariant,
    "r3f": NoiseVariant,
    "free": FreeVariant,
    "freeat": FreeATVariant,
    "staggered": StaggeredVariant,
    "partial": PartialVariant,
}

#: What `hardened` is trained on where a recipe names no variants.
HARDENED: VariantRecipe = MixedVariant()

if TYPE_CHECKING:
    VariantChoice = VariantRecipe
else:
    VariantChoice = choice(OBJECTIVES, "objective", "mixed")
