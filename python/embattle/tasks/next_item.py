"""What a user meets next, from what she met: SASRec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.models.interactions import Interactions
from embattle.models.sasrec import SASRec
from embattle.models.sequences import histories, windows
from embattle.perturb.evaluation import Evaluation
from embattle.sections import Section
from embattle.tasks.ratings import RatingsTask

# isort: split
from pydantic import Field, PositiveInt, model_validator


class SequentialRecipe(Section):
    """Self-attention over a user's history.

    Attributes:
        length: items that are looked at.
        dim: width of the vectors, a multiple of `heads`.
        blocks, heads: of self-attention.
        dropout: everywhere.
    """

    length: PositiveInt = 50
    dim: PositiveInt = 64
    blocks: PositiveInt = 2
    heads: PositiveInt = 1
    dropout: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> SequentialRecipe:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} cannot be divided among {self.heads} heads")
        return self


class NextItem(RatingsTask):
    """Trains on stretches of histories; ranks all items to come after a user's history.

    A training sample is a stretch, its loss the mean over its places.
    """

    Model: ClassVar[type[Section]] = SequentialRecipe
    vector: ClassVar[str] = "history"
    list_columns: ClassVar[tuple[str, ...]] = ("history",)
    varying: ClassVar[tuple[str, ...]] = ("sequences",)
    calls_model: ClassVar[bool] = False

    model_options: SequentialRecipe

    def read(self, account: Account) -> None:
        """Read the ratings in the order of time."""
        super().read(account)
        length = self.model_options.length
        self.parts = {"train": torch.stack(windows(self.held["train"], length), dim=1)}
        if not len(self.parts["train"]):
            raise InputError(
                f"{self.data_options.table()}: no user has met two items beside those held out, "
                "and next_item learns from items that follow one another; give longer histories, "
                "or choose task: item_ranking"
            )
        self._met: dict[str, Interactions] = {}
        for name in ("validation", "test"):
            before, held = self.met_before(name), self.held[name]
            users = torch.from_numpy(held.users)
            columns = [users[:, None], torch.from_numpy(held.items)[:, None]]
            self.parts[name] = torch.cat([*columns, histories(before, length)[users]], dim=1)
            self._met[name] = Interactions.of(before)

    def build(self) -> SASRec:
        """Vectors and weights drawn at random."""
        return SASRec(len(self.items), **self.model_options.model_dump())

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Stretches and what came next at each place; of other parts histories and what was met."""
        found = self.parts[part][rows]
        if part == "train":
            sequences, targets = found[:, 0], found[:, 1]
            last = (targets != len(self.items)).sum(1, keepdim=True) - 1
            inputs = {"sequences": sequences, "targets": targets}
            return self._movable(inputs, targets.gather(1, last).squeeze(1))
        users, labels, sequences = found[:, 0], found[:, 1], found[:, 2:]
        return self._movable({"sequences": sequences, "seen": self._met[part].mask(users)}, labels)

    def columns_read(self) -> list[str]:
        """Give the column of histories."""
        return ["history"]

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Histories in the column `history`, of which nothing is recommended again.

        A history is items' names, oldest first: a list, or a text with spaces between.
        """
        length, padding = self.model_options.length, len(self.items)
        cells = self.cells(rows, "history")
        names = [cell.split() if isinstance(cell, str) else list(cell) for cell in cells]
        if not all(names):
            raise InputError("column 'history' holds an empty list; give one item at least")
        seen = torch.zeros(len(rows), padding, dtype=torch.bool)
        sequences = torch.full((len(rows), length), padding)
        numbers = self.numbers(chain.from_iterable(names), "items", "history")
        known = torch.tensor(numbers, dtype=torch.int64)
        for number, items in enumerate(torch.split(known, [len(history) for history in names])):
            seen[number, items] = True
            latest = items[-length:]
            sequences[number, : len(latest)] = latest
        return self._movable({"sequences": sequences, "seen": seen}, self.labels_of(rows))

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Losses over all places of a stretch; of histories the scores of all items."""
        sequences = batch.inputs["sequences"]
        sasrec = cast(SASRec, model)
        if "targets" in batch.inputs:
            return Evaluation(sasrec.losses(sequences, batch.inputs["targets"]))
        return self.ranked(sasrec.scores(sequences), batch)

    def show(self, part: str, row: int) -> str:
        """Show the last items met, and the next."""
        found = self.parts[part][row]
        sequence = found[0] if part == "train" else found[2:]
        met = [self.items[i] for i in sequence.tolist() if i < len(self.items)]
        return f"... {', '.join(met[-5:])}" + (
            "" if part == "train" else f"; {self.items[found[1]]}"
        )

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the items met."""
        names = [*self.items, "(padding)"]
        return [[[names[i] for i in met] for met in batch.inputs["sequences"].tolist()]]

    def facts(self) -> dict[str, Any]:
        """Give the names of the items."""
        return {**super().facts(), "items": self.items}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over the names of the items."""
        super().restore(facts)
        self.items = list(facts["items"])

    def _movable(self, inputs: dict[str, Tensor], labels: Tensor | None) -> Batch:
        return Batch(inputs, labels, inputs["sequences"] != len(self.items))
