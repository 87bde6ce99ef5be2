"""The section `train` of a recipe: the budget, and how a model's weights are chosen."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embattle.jobs.attack_recipe import AttackChoice, attack_recipe
from embattle.sections import Section


class ValidationRecipe(Section):
    """Looks at the validation part while a model trains.

    Attributes:
        every: steps between two looks; the last step is looked at too.
        attack: the attack of a look, at the threat's eps; the same for all variants.
        choose: whose weights are taken: those of the look with the best first measure under attack
            (`robust`; of a plain model, without it), without attack (`clean`), or the last ones.
        patience: looks without a better one after which the training ends; null: never.
        samples: how many samples of the part are looked at, from its beginning; null: all.
    """

    every: PositiveInt
    attack: AttackChoice = attack_recipe(kind="pgd", steps=5)
    choose: Literal["robust", "clean", "last"] = "robust"
    patience: PositiveInt | None = None
    samples: PositiveInt | None = None

    @model_validator(mode="after")
    def _patience_for_something(self) -> ValidationRecipe:
        if self.patience is not None and self.choose == "last":
            raise ValueError(
                "patience waits for a better look, and choose: last knows none; use robust or clean"
            )
        return self


class TrainRecipe(Section):
    """The budget, the same for all variants.

    Attributes:
        steps: optimiser steps.
        batch_size: examples per step, over all processes.
        batches: `random`, or `by_length`: of samples of similar length, so that little is padding
            (for tasks whose samples have lengths, such as texts).
        learning_rate: AdamW's, reached after the warm-up and decayed linearly to 0.
        warmup: share of the steps in which the rate grows.
        weight_decay: AdamW's.
        max_grad_norm: bound on the norm of the whole gradient; null does not clip.
        precision: mixed precision, as Accelerate knows it.
        accumulate: passes that a step's examples are divided among, for less memory.
        checkpoint_every: steps between checkpoints; 0 writes one on interruption only.
        trackers: where the figures of every step go besides `run.json`: `tensorboard` (into the
            run's folder `trackers`), `wandb` (Weights & Biases).
        validation: the choice of the weights, and early stopping; null: the last weights.
    """

    steps: PositiveInt = 300
    batch_size: PositiveInt = 16
    batches: Literal["random", "by_length"] = "random"
    learning_rate: PositiveFloat = 1e-4
    warmup: float = Field(default=0.1, ge=0, le=1)
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat | None = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: PositiveInt = 1
    checkpoint_every: NonNegativeInt = 0
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[])
    validation: ValidationRecipe | None = None
