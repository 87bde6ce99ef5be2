"""Schedules in a recipe: those of `embattle.objectives.schedules`, in shares of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat

from embattle.jobs.choices import PlainOption, choice, section_of
from embattle.objectives import schedules

Share = Annotated[float, Field(ge=0, le=1)]


class ScheduleRecipe(PlainOption):
    """A schedule of `embattle.objectives.schedules`."""

    def make(self, steps: int = 1) -> schedules.Schedule:
        """The schedule of a training of so many steps."""
        made: schedules.Schedule = super().make()
        return made


class WarmUpRecipe(ScheduleRecipe):
    """Linear growth from `start` to 1.

    Attributes:
        share: share of the training's steps in which the factor grows.
        start: factor at the first step.
        delay: share of the steps before the growth.
    """

    kind: Literal["warm_up"] = "warm_up"
    share: Share = 0.3
    start: NonNegativeFloat = 0.0
    delay: Share = 0.0

    def make(self, steps: int = 1) -> schedules.Schedule:
        """The schedule of a training of so many steps."""
        return schedules.WarmUp(round(self.share * steps), self.start, round(self.delay * steps))


class CosineRecipe(ScheduleRecipe):
    """Half a cosine from `start` to `end`.

    Attributes:
        share: share of the training's steps that it takes; `end` is kept from there on.
        start, end: the factors.
    """

    kind: Literal["cosine"] = "cosine"
    share: Share = 1.0
    start: NonNegativeFloat = 0.0
    end: NonNegativeFloat = 1.0

    def make(self, steps: int = 1) -> schedules.Schedule:
        """The schedule of a training of so many steps."""
        return schedules.Cosine(max(1, round(self.share * steps)), self.start, self.end)


_SCHEDULES: dict[str, type[Any]] = {
    "warm_up": WarmUpRecipe,
    "cosine": CosineRecipe,
    "constant": section_of(ScheduleRecipe, "constant", schedules.Constant),
}
_ADAPTIVE = section_of(ScheduleRecipe, "adaptive", schedules.Adaptive)

if TYPE_CHECKING:
    ScheduleChoice = ScheduleRecipe
    EpsScheduleChoice = ScheduleRecipe
else:
    ScheduleChoice = choice(_SCHEDULES, "kind", "warm_up")
    EpsScheduleChoice = choice({**_SCHEDULES, "adaptive": _ADAPTIVE}, "kind", "warm_up")


def constant() -> ScheduleRecipe:
    """The schedule that changes nothing."""
    made: ScheduleRecipe = _SCHEDULES["constant"]()
    return made
