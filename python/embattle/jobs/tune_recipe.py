"""The section `tune` of a recipe: what is tried, and what it may cost."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from embattle.sections import Section


class DimensionRecipe(Section):
    """The values of one key: some choices, or a range.

    Attributes:
        choices: the values; a mapping replaces the whole section of that key. A recipe may write
            the list alone.
        low, high: the ends of a range, which belong to it; two whole numbers are a range of whole
            numbers.
        log: whether the range is searched by ratios.
    """

    choices: list[Any] = Field(default=[])
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @model_validator(mode="before")
    @classmethod
    def _list_alone(cls, given: Any) -> Any:
        return {"choices": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _one_of_both(self) -> DimensionRecipe:
        ends = (self.low, self.high)
        if bool(self.choices) == (ends != (None, None)) or (None in ends and not self.choices):
            raise ValueError("give a list of choices, or low and high")
        if self.low is not None and self.high is not None:
            if self.low > self.high:
                raise ValueError(f"low: {self.low} is above high: {self.high}")
            if self.log and self.low <= 0:
                raise ValueError("log: the range must be above 0")
        return self

    @property
    def ends(self) -> list[Any]:
        """All choices, or both ends."""
        return list(self.choices) if self.choices else [self.low, self.high]

    def suggest(self, trial: Any, key: str) -> Any:
        """Has Optuna propose a value."""
        if self.choices:
            return self.decode(
                trial.suggest_categorical(key, [json.dumps(x) for x in self.choices])
            )
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        propose = trial.suggest_int if whole else trial.suggest_float
        return propose(key, self.low, self.high, log=self.log)

    def decode(self, value: Any) -> Any:
        """The value that Optuna's stands for: it keeps choices as text."""
        return json.loads(value) if self.choices else value


class LossRecipe(Section):
    """What the variant may lose beside the standard model, on the validation part.

    Attributes:
        measure: one of the task's measures that is a share, such as `accuracy` or `ndcg`.
        points: hundredths of it.
    """

    measure: str
    points: float = Field(ge=0)


class TuneRecipe(Section):
    """What `embattle tune` does: the options of a variant with the best robust validation.

    Attributes:
        variant: whose options.
        space: values to try, by the options' dotted keys inside of the variant.
        at_most_lost: a bound on what it may lose; null: none.
        pruner: which trials are stopped early: `median` those below the median of the others at the
            same step, `halving` by successive halving.
    """

    variant: str = "hardened"
    space: dict[str, DimensionRecipe] = Field(min_length=1)
    at_most_lost: LossRecipe | None = None
    pruner: Literal["median", "halving", "none"] = "median"
