"""An attacker who changes what a row says: values of categories, and numbers a little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.attacks import PGD, CategorySwap
from embattle.attacks.swap_search import SwapResult
from embattle.data.batch import Batch
from embattle.errors import InputError, closest
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site
from embattle.tasks.evaluator import Evaluator


@dataclass(frozen=True)
class Columns:
    """The inputs of a batch that are columns of a table.

    Attributes:
        values: the name of the input `[B, fields]` of numbered values.
        names: the columns of categories.
        sizes: how many values each has.
        tables: where all of them are looked up, one after the other.
        unknown: the number that stands in each column for a value that is not known; None: none.
        numbers: the name of the input `[B, numbers]`, "" where there is none.
        number_names: the columns of numbers.
        number_place: the module that returns them as `[B, numbers, 1]`.
        show: gives a value's text, of a column by place and a value by number.
    """

    values: str
    names: Sequence[str]
    sizes: Sequence[int]
    tables: Sequence[nn.Embedding]
    unknown: int | None = 0
    numbers: str = ""
    number_names: Sequence[str] = ()
    number_place: nn.Module | None = None
    show: Callable[[int, int], str] = lambda column, value: str(value)

    def allowed(self) -> Tensor:
        """Bool [rows of the tables], the values that are known."""
        allowed = torch.ones(sum(self.sizes), dtype=torch.bool)
        if self.unknown is not None:
            starts = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
            allowed[starts + self.unknown] = False
        return allowed


@dataclass(frozen=True)
class ColumnResult:
    """Rows as the attacker left them; outputs are those of the model on them.

    Attributes:
        batch: with the changed values and numbers.
        swapped: bool `[B, fields]`.
        moved: `[B, numbers]`, by how much, in standard deviations of the column.
        clean, now: the evaluations before and after.
    """

    batch: Batch
    swapped: Tensor
    moved: Tensor
    clean: Evaluation
    now: Evaluation


@dataclass(kw_only=True)
class ColumnAttack:
    """Noise on numbers within a ball, then exchanges of categories within a budget of columns.

    The noise is found by `PGD` and the exchanges by `CategorySwap`, on the numbers as they are
    then. Values that the training part does not have never come in.

    Args:
        swaps: most categories exchanged in a row; 0: none.
        tries: exchanges evaluated exactly in each round.
        immutable: columns, of categories or numbers, that stay as they are.
        eps: radius of the noise, in standard deviations of the columns; 0: none.
        norm: of the noise: "linf" bounds each number, "l2" all of a row together.
        steps: gradient steps of the noise.
    """

    swaps: int = 1
    tries: int = 16
    immutable: tuple[str, ...] = ()
    eps: float = 0.0
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10

    def __post_init__(self) -> None:
        who = "ColumnAttack"
        self.swaps = checks.integer(who, "swaps", self.swaps, 0)
        self.tries = checks.integer(who, "tries", self.tries, 1)
        self.eps = checks.real(who, "eps", self.eps, 0)
        self.steps = checks.integer(who, "steps", self.steps, 1)
        checks.one_of(who, "norm", self.norm, ("linf", "l2"))
        if not self.swaps and not self.eps:
            raise ValueError(f"{who}: swaps and eps are both 0, which changes nothing; raise one")

    @property
    def label(self) -> str:
        """A short name, such as `Swap-2, noise 0.5`."""
        parts = [f"Swap-{self.swaps}"] if self.swaps else []
        parts += [f"noise {self.norm} {self.eps:g}"] if self.eps else []
        return ", ".join(parts) + (f", not {', '.join(self.immutable)}" if self.immutable else "")

    def check(self, columns: Columns) -> None:
        """Check that the attack can be made on these columns.

        Raises:
            InputError: an immutable column that is not there, noise without columns of numbers, or
                nothing that may change.
        """
        known = [*columns.names, *columns.number_names]
        for name in self.immutable:
            if name not in known:
                raise InputError(f"immutable: no column {name!r}; {closest(name, known)}")
        open_ = [name for name in columns.names if name not in self.immutable]
        numbers = [name for name in columns.number_names if name not in self.immutable]
        if self.swaps and not open_:
            raise InputError("swaps: all columns of categories are immutable; set swaps: 0")
        if self.eps and not numbers:
            raise InputError(
                "eps: noise needs a column of numbers that is not immutable, and the model reads "
                "none as numbers; set eps: 0"
            )

    def run(
        self, model: nn.Module, batch: Batch, columns: Columns, evaluator: Evaluator | None = None
    ) -> ColumnResult:
        """Change the rows of a batch so that the model errs.

        Args:
            model: in evaluation mode.
            batch: with labels.
            columns: what of it are columns.
            evaluator: runs the model, and says what is right.

        Raises:
            InputError: see `check`.
        """
        self.check(columns)
        evaluator = evaluator or Evaluator()
        criterion = evaluator.criterion(batch)
        with torch.no_grad():
            clean = evaluator.evaluate(model, batch).detach()
        now, moved = clean, torch.zeros(len(batch), len(columns.number_names))
        if self.eps:
            assert columns.number_place is not None
            still = [name in self.immutable for name in columns.number_names]
            numbers = batch.inputs[columns.numbers]
            mask = ~torch.tensor(still, device=numbers.device).expand(numbers.shape)
            noise = PGD(
                norm=self.norm,
                eps=self.eps,
                step_size=self.eps * min(1.0, 2.5 / self.steps),
                steps=self.steps,
                keep="best",
            ).run(
                lambda: evaluator.evaluate(model, batch),
                Site(columns.number_place, group="sample"),
                criterion=criterion,
                mask=mask,
            )
            moved = noise.delta.detach().squeeze(2)
            batch = _with(batch, columns.numbers, numbers + moved)
            with torch.no_grad():
                now = evaluator.evaluate(model, batch).detach()
        values = batch.inputs[columns.values]
        swapped = torch.zeros_like(values, dtype=torch.bool)
        if self.swaps:
            found = self._swap(model, batch, columns, evaluator)
            batch, swapped, now = (
                _with(batch, columns.values, found.tokens),
                found.swapped,
                found.now,
            )
        return ColumnResult(batch, swapped, moved, clean, now)

    def _swap(
        self, model: nn.Module, batch: Batch, columns: Columns, evaluator: Evaluator
    ) -> SwapResult:
        frozen = [i for i, name in enumerate(columns.names) if name in self.immutable]
        attack = CategorySwap(
            swaps=self.swaps,
            tries=self.tries,
            frozen=frozen,
            allowed=columns.allowed(),
            go_on=evaluator.kind.graded,
        )
        return attack.run(
            lambda values: lambda: evaluator.evaluate(model, _with(batch, columns.values, values)),
            [Site(table) for table in columns.tables],
            batch.inputs[columns.values],
            sizes=columns.sizes,
            criterion=evaluator.criterion(batch),
        )


def _with(batch: Batch, name: str, value: Tensor) -> Batch:
    """The batch with another input."""
    return Batch({**batch.inputs, name: value}, batch.labels, batch.movable)
