"""Certificates in a recipe: the section `audit.certify`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from embattle.sections import Section

Chance = Annotated[float, Field(gt=0, lt=1)]


class SmoothingRecipe(Section):
    """Randomised smoothing.

    Attributes:
        samples: the first so many are certified.
        noise: deviation of the noise, in multiples of the threat's eps: models that were not
            trained under noise stand little of it.
        choosing, copies: noisy copies of a sample by which its class is chosen and certified.
        alpha: the chance that a sample's certificate is wrong.
    """

    samples: PositiveInt = 50
    noise: PositiveFloat = 0.25
    choosing: PositiveInt = 50
    copies: PositiveInt = 500
    alpha: Chance = 0.001


class FakesRecipe(Section):
    """An ensemble of MF models under fake users, of what the recipe's users met before.

    Attributes:
        submodels: how many are trained.
        size: users in each.
        each: items that each recommends to its users.
        fakes: numbers of fake users.
        dim, steps: width and training steps of a submodel.
        alpha: the chance that any certificate of all users is wrong.
    """

    submodels: PositiveInt = 400
    size: PositiveInt = 200
    each: PositiveInt = 1
    fakes: list[PositiveInt] = Field(default=[1, 2, 5], min_length=1)
    dim: Annotated[int, Field(ge=2)] = 32
    steps: PositiveInt = 400
    alpha: Chance = 0.001


class CertifyRecipe(Section):
    """How it is proven what can be.

    Attributes:
        smoothing: of classifiers of texts and fields.
        fakes: of recommenders from ratings; null: no such ensemble is trained.
    """

    smoothing: SmoothingRecipe = SmoothingRecipe()
    fakes: FakesRecipe | None = None
