"""Rankers of items for users by their vectors: MF-BPR and LightGCN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.data.negatives import NegativeSampler
from embattle.errors import InputError
from embattle.models.interactions import Interactions
from embattle.models.lightgcn import LightGCN
from embattle.models.mf import MF
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.ratings import RatingsTask

# isort: split
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator


class RankerRecipe(Section):
    """A model of vectors for users and items.

    Attributes:
        kind: `mf` (BPR-MF) or `lightgcn`.
        dim: width of the vectors.
        layers: how often LightGCN passes vectors on; null takes 3.
        std: standard deviation of the first vectors.
        l2: weight of half the squared norm of the vectors that a triplet uses, part of its loss.
    """

    kind: Literal["mf", "lightgcn"] = "mf"
    dim: PositiveInt = 64
    layers: PositiveInt | None = Field(default=None)
    std: PositiveFloat = 0.1
    l2: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _layers_of_a_graph(self) -> RankerRecipe:
        if self.kind == "mf" and self.layers is not None:
            raise ValueError("mf has no layers: leave layers out, or choose kind: lightgcn")
        return self


class ItemRanking(RatingsTask):
    """Trains on triplets of a user, an item she met and one she did not; ranks all items.

    The attacker moves rows of both tables, each within a ball of its own, in training and audit
    alike, as adversarial personalised ranking does (He et al., SIGIR 2018): samples of a batch
    share what is moved.
    """

    Model: ClassVar[type[Section]] = RankerRecipe
    vector: ClassVar[str] = "row"
    calls_model: ClassVar[bool] = False

    model_options: RankerRecipe
    graph: Interactions

    def read(self, account: Account) -> None:
        """Read the ratings; a sample is a pair of a user and an item."""
        super().read(account)
        self.parts = {
            name: np.stack([held.users, held.items], axis=1) for name, held in self.held.items()
        }
        self.graph = Interactions.of(self.held["train"])
        self._negatives = NegativeSampler(
            self.held["train"].users,
            self.held["train"].items,
            user_count=len(self.users),
            item_count=len(self.items),
            seed=self.seed,
        )
        self._met = {name: Interactions.of(self.met_before(name)) for name in self.parts}

    def build(self) -> nn.Module:
        """Vectors drawn at random; LightGCN's graph is the training part."""
        options = self.model_options
        if options.kind == "mf":
            return MF(len(self.users), len(self.items), dim=options.dim, std=options.std)
        layers = 3 if options.layers is None else options.layers
        return LightGCN(self.graph, dim=options.dim, layers=layers, std=options.std)

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Pairs of the training part and negatives; of other parts users and what they met."""
        users, items = torch.from_numpy(self.parts[part])[rows].T
        if part == "train":
            drawn = torch.from_numpy(self._negatives.draw(users, 1, seed)).squeeze(1)
            return Batch({"users": users, "positive": items, "negative": drawn}, items)
        return Batch({"users": users, "seen": self._met[part].mask(users)}, items)

    def columns_read(self) -> list[str]:
        """Give the column of users."""
        return [self.data_options.user]

    def keys(self) -> list[str]:
        """Give the column of users."""
        return [self.data_options.user]

    def for_scoring(self, model: nn.Module) -> nn.Module:
        """LightGCN passes vectors on once, and not for each batch."""
        return model.for_scoring() if isinstance(model, LightGCN) else model

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Users by their names; what they met in training is not recommended."""
        column = self.data_options.user
        users = torch.tensor(self.numbers(self.cells(rows, column), "users", column))
        return Batch({"users": users, "seen": self.graph.mask(users)}, self.labels_of(rows))

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """BPR losses of triplets; of users the scores of all items, -inf for those met."""
        ranker = cast("MF | LightGCN", model)
        if "negative" in batch.inputs:
            triplets = tuple(batch.inputs[name] for name in ("users", "positive", "negative"))
            losses = ranker.losses(*triplets)
            if self.model_options.l2:
                losses = losses + self.model_options.l2 * ranker.penalty(*triplets)
            return Evaluation(losses)
        return self.ranked(ranker.scores(batch.inputs["users"]), batch)

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """The rows of both tables, wherever the model reads them.

        Raises:
            InputError: a group other than `token`.
        """
        if group != "token":
            raise InputError(
                "threat.group: rows of tables have a ball each; write threat: {group: token}"
            )
        ranker = cast("MF | LightGCN", model)
        return [Site.weight(ranker.user), Site.weight(ranker.item)]

    def sample_sites(self, model: nn.Module, group: Group) -> list[Site]:
        """The rows that each triplet looks up, with a ball for each; LightGCN reads whole tables.

        Raises:
            InputError: a group other than `token`.
        """
        sites = self.sites(model, group)
        if not isinstance(model, MF):
            return sites
        return [Site(table, group="token") for table in (model.user, model.item)]

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the rows of both tables, which all samples share."""
        tables = (("user", self.users), ("item", self.items))
        return [[[f"{what} {name}" for name in names]] for what, names in tables]

    def facts(self) -> dict[str, Any]:
        """Give names, and the pairs that were trained on: a graph is made of them."""
        pairs = [self.graph.users.tolist(), self.graph.items.tolist()]
        return {**super().facts(), "users": self.users, "items": self.items, "pairs": pairs}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over names and pairs."""
        super().restore(facts)
        self.users, self.items = list(facts["users"]), list(facts["items"])
        users, items = (torch.tensor(numbers, dtype=torch.int64) for numbers in facts["pairs"])
        self.graph = Interactions(users, items, len(self.users), len(self.items))
