"""RecBole's models and data sets as a task: trained here or loaded, attacked, hardened, audited.

A recipe says `task: recbole` and names RecBole's configuration files; `embattle recbole` makes such
a recipe of one. RecBole needs an environment of its own (`make recbole`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.data.recipe import Limits
from embattle.errors import InputError
from embattle.integrations import recbole_data, recbole_model
from embattle.integrations.recbole_data import Prepared, library, seeded
from embattle.models.interactions import Interactions
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.kinds import BinaryClassification, Ranking

# isort: split
from pydantic import Field, PositiveInt

# The input that says which items are not ranked; no field of RecBole's is called so.
RULED_OUT = "(ruled out)"


class RecBoleData(Section):
    """RecBole's configuration.

    Attributes:
        config: its YAML files, later ones over earlier ones.
        dataset: the data set, if the files do not name it.
        overrides: further keys of RecBole's, over those of the files.
        limits: use so many samples of a part, drawn by the recipe's seed.
        k: how many items are recommended; null takes the first of RecBole's `topk`.
    """

    config: list[str] = Field(default=[])
    dataset: str | None = None
    overrides: dict[str, Any] = Field(default={})
    limits: Limits = Limits()
    k: PositiveInt | None = None


class RecBoleModel(Section):
    """The model.

    Attributes:
        name: RecBole's name of the model, if the files do not give it.
        checkpoint: its weights to begin with, as safetensors; null draws first weights.
        sites: names of the modules where it is attacked; empty takes its embeddings.
    """

    name: str | None = None
    checkpoint: str | None = None
    sites: list[str] = Field(default=[])


@dataclass(frozen=True)
class Part:
    """The samples of a part: places in RecBole's data set."""

    dataset: Any
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


class RecBoleTask(Task):
    """One of RecBole's models on one of its data sets.

    A context-aware model predicts labels. A general or sequential one ranks all items for each held
    out interaction, those met before ruled out where RecBole's evaluation rules them out; the hit
    rate is the share of interactions whose item is among the k best.

    A general model is attacked at the rows of its embedding tables, which the samples of a batch
    share; a context-aware one at the vectors of a sample's fields, a sequential one at those of its
    history.
    """

    Data: ClassVar[type[Section]] = RecBoleData
    Model: ClassVar[type[Section]] = RecBoleModel
    sample: ClassVar[str] = "interaction"
    vector: ClassVar[str] = "row"
    calls_model: ClassVar[bool] = False

    data_options: RecBoleData
    model_options: RecBoleModel
    prepared: Prepared
    _trained = False

    # --- the data --------------------------------------------------------------------------------

    def read(self, account: Account) -> None:
        """Have RecBole read and divide the data, by the seed of its configuration."""
        options = self.data_options
        named = {"dataset": options.dataset, "model": self.model_options.name}
        changes = options.overrides | {key: name for key, name in named.items() if name is not None}
        self.values = recbole_data.merged(options.config, changes)
        self.prepared = recbole_data.prepare(self.values)
        config, family = self.prepared.config, self.prepared.family
        if family == "context":
            self._require_labels()
            self.kind = BinaryClassification(("0", "1"))
        else:
            self.kind = Ranking(options.k or config["topk"][0])
            self._met = {name: self._met_before(name) for name in ("validation", "test")}
        draw = torch.Generator().manual_seed(self.seed)
        parts = {}
        for name, dataset in self.prepared.datasets.items():
            count = self.prepared.loader.sample_size if name == "train" else len(dataset)
            rows = torch.arange(count)
            limit = getattr(options.limits, name)
            if limit is not None and limit < count:
                rows = torch.randperm(count, generator=draw)[:limit].sort().values
            parts[name] = Part(dataset, rows)
        self.parts = parts
        train = self.prepared.datasets["train"]
        account.note("model", f"{config['model']}, one of RecBole's {family} ones")
        account.note(
            "data set",
            f"{config['dataset']}: {train.user_num - 1:,} users, {train.item_num - 1:,} items",
        )
        shown = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
        account.note("samples", shown)

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Training samples as RecBole's loader makes them; of other parts one for each row."""
        found = self.parts[part]
        places = found.rows[rows].tolist()
        if part == "train":
            with seeded(seed):
                return self._labelled(self.prepared.loader.collate_fn(places))
        interaction = found.dataset[places]
        if self.prepared.family == "context":
            return self._labelled(interaction)
        config = self.prepared.config
        users, items = interaction[config["USER_ID_FIELD"]], interaction[config["ITEM_ID_FIELD"]]
        return Batch({**interaction.interaction, RULED_OUT: self._ruled_out(users, part)}, items)

    def encode(self, model: nn.Module, rows: Sequence[Any]) -> Batch:
        """Rows as mappings from RecBole's fields to cells, for general models: users.

        Raises:
            InputError: the model is of another family, or a row names no known user.
        """
        if self.prepared.family != "general":
            raise InputError(
                f"rows of a file cannot be given to a {self.prepared.family} model of RecBole's; "
                "put them into its data set's test part"
            )
        field, dataset = self.prepared.config["USER_ID_FIELD"], self.prepared.datasets["train"]
        try:
            users = torch.tensor([int(dataset.token2id(field, str(row[field]))) for row in rows])
        except (KeyError, ValueError) as error:
            raise InputError(
                f"each row needs a user of the training part as {field} ({error})"
            ) from error
        return Batch({field: users, RULED_OUT: self._ruled_out(users, "test")})

    def show(self, part: str, row: int) -> str:
        """Show user and item by their names."""
        found, config = self.parts[part], self.prepared.config
        interaction = found.dataset[[int(found.rows[row])]]
        fields = (config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])
        names = [found.dataset.id2token(f, int(interaction[f][0])) for f in fields]
        return f"user {names[0]}, item {names[1]}"

    def fingerprint(self) -> str:
        """Hash all columns of all parts, and which samples are used."""
        parts = "".join(self.part_fingerprint(name) for name in self.parts)
        return hashlib.sha256(parts.encode()).hexdigest()

    def part_fingerprint(self, part: str) -> str:
        """The same of one part."""
        chosen = self.parts[part]
        digest = hashlib.sha256(f"{part}{chosen.rows.tolist()}".encode())
        for features in (
            chosen.dataset.inter_feat,
            chosen.dataset.user_feat,
            chosen.dataset.item_feat,
        ):
            for field in [] if features is None else sorted(features.columns):
                column = features[field].contiguous()
                digest.update(f"{field}{column.dtype}{tuple(column.shape)}".encode())
                digest.update(column.numpy().tobytes())
        return digest.hexdigest()

    # --- the model -------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """Make the model; its weights are the checkpoint's, or drawn by the seed."""
        config = self.prepared.config
        kind = library("recbole.utils").get_model(config["model"])
        with seeded(self.seed), recbole_data.quiet():
            model: nn.Module = kind(config, self.prepared.datasets["train"])
        if self.model_options.checkpoint is not None and not self._trained:
            recbole_model.load_weights(model, Path(self.model_options.checkpoint))
        return model

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Losses and logits of labels; losses of training samples; scores of all items."""
        inputs = dict(batch.inputs)
        ruled_out = inputs.pop(RULED_OUT, None)
        interaction = library("recbole.data.interaction").Interaction(inputs)
        if ruled_out is None:
            losses, found = recbole_model.losses_of(model, interaction)
            if self.prepared.family != "context":
                return Evaluation(losses)
            return Evaluation(losses, found.reshape(len(batch)))
        items = self.prepared.datasets["train"].get_item_feature().to(ruled_out.device)
        scores = recbole_model.scores_of(model, interaction, items)
        scores = scores.masked_fill(ruled_out, -torch.inf)
        known = batch.labels
        return Evaluation(None if known is None else self.kind.losses(scores, known), scores)

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """The embeddings that the family is attacked at, or the modules that the recipe names.

        Raises:
            InputError: the group does not fit, or there are no such modules.
        """
        found = self._modules(model)
        if self.prepared.family == "general":
            if group != "token":
                raise InputError(
                    "threat.group: rows of tables have a ball each; write threat: {group: token}"
                )
            return [Site.weight(module) for module in found]
        return [Site(found, group=group, model=model)]

    def facts(self) -> dict[str, Any]:
        """Give the kind and RecBole's configuration."""
        return {**super().facts(), "config": json.loads(json.dumps(self.values, default=str))}

    def restore(self, facts: dict[str, Any]) -> None:
        """Read the data, which the model is made for; its weights will be those that were saved."""
        if not hasattr(self, "parts"):
            self.read(Account())
        self._trained = True

    # --- steps -----------------------------------------------------------------------------------

    def _labelled(self, interaction: Any) -> Batch:
        """A batch of RecBole's, with labels if it is a context-aware model's."""
        labels = None
        if self.prepared.family == "context":
            labels = interaction[self.prepared.config["LABEL_FIELD"]].long()
        return Batch(dict(interaction.interaction), labels)

    def _require_labels(self) -> None:
        """Raise InputError if the interactions have no label of two values."""
        field, name = self.prepared.config["LABEL_FIELD"], self.prepared.config["model"]
        features = self.prepared.datasets["test"].inter_feat
        if field not in features or not {0.0, 1.0} >= set(features[field].unique().tolist()):
            raise InputError(
                f"RecBole's {name} is audited on labels 0 and 1, and the interactions have none; "
                f"name the field (LABEL_FIELD), or say what counts as liked: "
                "threshold: {rating: 4}"
            )
        if self.prepared.config["train_neg_sample_args"]["distribution"] != "none":
            raise InputError(
                f"RecBole's {name} has labels and would draw negatives besides; "
                "set train_neg_sample_args: null"
            )

    def _met_before(self, part: str) -> Interactions:
        """What RecBole does not rank again: what was met in earlier parts, and not in this one."""
        config, datasets = self.prepared.config, self.prepared.datasets
        fields = (config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])
        count = datasets["train"].item_num
        keys = {
            name: found.inter_feat[fields[0]] * count + found.inter_feat[fields[1]]
            for name, found in datasets.items()
        }
        earlier = [keys["train"], keys["validation"]][: 1 if part == "validation" else 2]
        met = torch.cat(earlier)
        met = met[~torch.isin(met, keys[part])]
        if config["repeatable"]:
            met = met[:0]
        return Interactions(met // count, met % count, datasets["train"].user_num, count)

    def _ruled_out(self, users: Tensor, part: str) -> Tensor:
        """What is not ranked for users, [B, N]: what they met, and the item that is padding."""
        mask = self._met[part].mask(users)
        mask[:, 0] = True
        return mask

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that are attacked."""
        there = dict(model.named_modules())
        names = self.model_options.sites
        for name in names:
            if name not in there:
                known = ", ".join(key for key in there if key)
                raise InputError(f"model.sites: {name!r} is no module; there are: {known}")
        tables = {name: m for name, m in there.items() if isinstance(m, nn.Embedding)}
        if self.prepared.family == "context":
            # Tables of width 1 hold the weights of the linear part.
            tables = {name: m for name, m in tables.items() if m.embedding_dim > 1}
        elif self.prepared.family == "sequential":
            items = self.prepared.datasets["train"].item_num
            tables = {name: m for name, m in tables.items() if 0 <= m.num_embeddings - items <= 1}
        found = [there[name] for name in names or tables]
        if not found:
            raise InputError(
                f"RecBole's {type(model).__name__} has no table of embeddings; name the modules "
                "where it is attacked: model.sites"
            )
        return found
