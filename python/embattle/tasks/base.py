"""The one protocol between a model with its data and the jobs."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.errors import need
from embattle.files import broken, require_finite, save_tensors, write_text
from embattle.models.words import Words
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.columns import Columns
from embattle.tasks.evaluator import Evaluator
from embattle.tasks.kinds import Kind, from_json

# Values that are the same where their texts are.
_PLAIN = (str, bytes, int, float, complex, date, np.generic)


class Task(Evaluator, ABC):
    """A model with its data, as training, audit and prediction see it.

    A task of your own defines `read`, `build` and `encode`; all else has a default. It is named in
    a recipe by its place, `task: my_file.py:MyTask`, and its options are the recipe's sections
    `data` and `model`, checked field by field.

    Attributes:
        Data, Model: the classes of the recipe's sections `data` and `model`.
        sample, vector: what a sample and one of its embeddings are called, for the report.
        calls_model: whether `evaluate` computes losses by calling the model itself, `model(...)`,
            not methods of it. Mixed precision and several processes need that.
        list_columns: columns of a file that `encode` also takes as lists of texts and numbers.
        varying: inputs of batches [B, T, ...] whose T differs from batch to batch.
        data_options, model_options: those sections.
        seed: the recipe's; decides the division of the data and the first weights.
        kind: what is predicted; `read` sets it, unless the class does.
        parts: `train`, `validation` and `test`, each with a length; `read` sets them.
    """

    Data: ClassVar[type[Section]] = Section
    Model: ClassVar[type[Section]] = Section
    sample: ClassVar[str] = "sample"
    vector: ClassVar[str] = "vector"
    calls_model: ClassVar[bool] = True
    list_columns: ClassVar[tuple[str, ...]] = ()
    varying: ClassVar[tuple[str, ...]] = ()

    kind: Kind
    parts: Mapping[str, Any]

    def __init__(self, data: Any, model: Any, seed: int = 0) -> None:
        self.data_options, self.model_options, self.seed = data, model, seed

    # --- the data --------------------------------------------------------------------------------

    @abstractmethod
    def read(self, account: Account) -> None:
        """Read the data, divide it by `seed`, and set `parts` (and `kind`).

        Args:
            account: is told what was read, dropped and found, as far as the reading gets.

        Raises:
            InputError: the data cannot be had or used; the message says what to do.
        """

    @abstractmethod
    def encode(self, model: nn.Module, rows: Sequence[Any]) -> Batch:
        """Make a batch of rows: of a part, or of a file as mappings from column to cell.

        Args:
            model: brings what belongs to it, such as a tokenizer.
            rows: B of them. Where the label is missing the batch has no labels.

        Raises:
            ValueError, TypeError, LookupError or ArithmeticError: a row cannot be used.
        """

    def columns_read(self) -> list[str] | None:
        """Give the columns of a file that `encode` reads, but for the label; None: any."""
        return None

    def keys(self) -> list[str]:
        """Give those of them that name what a row is about, such as a user."""
        return []

    def unknown(self, rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
        """Count for each column the values that say nothing to the model, as it never met them.

        Args:
            rows: of a file, which `encode` takes.
        """
        return Counter()

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Give some samples of a part.

        Args:
            model: see `encode`.
            part: one of `parts`.
            rows: their places in the part, [B] int64.
            seed: of what is drawn for the batch, such as negatives: the same seed, the same batch.
        """
        found = self.parts[part]
        return self.encode(model, [found[i] for i in rows.tolist()])

    def batches(self, model: nn.Module, part: str, size: int) -> list[Batch]:
        """Give all samples of a part in order, at most `size` in a batch."""
        every = torch.split(torch.arange(len(self.parts[part])), size)
        return [self.batch(model, part, rows, seed=self.seed) for rows in every]

    def lengths(self, model: nn.Module, part: str) -> Sequence[int] | None:
        """Give the length of each sample of a part; None where all are of one length."""
        return None

    def show(self, part: str, row: int) -> str:
        """Show a sample of a part to a reader."""
        return str(self.parts[part][row])

    def counts(self) -> dict[str, Any]:
        """Give how many samples each part has, as JSON."""
        return {name: len(part) for name, part in self.parts.items()}

    def fingerprint(self) -> str:
        """Give a hash that changes with any sample and its place."""
        digest = hashlib.sha256()
        _feed(digest, dict(self.parts))
        return digest.hexdigest()

    def part_fingerprint(self, part: str) -> str:
        """Give a hash of one part: outcomes of two models on the same samples can be paired.

        Of a part that only `fingerprint` of the task itself understands it is that of all data.
        """
        digest = hashlib.sha256()
        try:
            _feed(digest, self.parts[part])
        except TypeError:
            digest = hashlib.sha256(f"{part} {self.fingerprint()}".encode())
        return digest.hexdigest()

    def note_encoding(self, account: Account, model: nn.Module | None = None) -> None:
        """Tell the account what a model reads of the data, such as how many texts are cut.

        Args:
            account: is told.
            model: None where there is none yet: only the account is wanted.
        """
        return

    # --- the model -------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the model with its first weights; torch's random numbers are seeded.

        Raises:
            InputError: it cannot be had.
        """

    def for_scoring(self, model: nn.Module) -> nn.Module:
        """Give a model for `evaluate` with the outputs of a trained one, whose weights stay as they
        are: what is the same for all samples may be computed once. By default it is that one.
        """
        return model

    def describe(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Give the columns of a prediction for each sample of outputs [B, ...].

        Cells are texts, numbers, truth values, or lists of these.
        """
        return self.kind.describe(outputs)

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """Give where the model is attacked, by default at its input embeddings.

        Args:
            model: the model, not wrapped.
            group: what has a ball of its own, of the recipe's `threat`.
        """
        return [Site.embeddings(model, group=group)]

    def sample_sites(self, model: nn.Module, group: Group) -> list[Site]:
        """Give where staggered replays and partial batches perturb each sample by itself.

        By default that is at `sites`. A task whose samples share what is attacked there, such as
        rows of tables, gives the look-ups of a batch instead.
        """
        return self.sites(model, group)

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the vectors that are attacked, for explanations: tokens, fields, items.

        Returns:
            For each perturbed output a list for each sample with a name for each of its vectors; or
            a single list that all samples share, such as the rows of a table. Outputs that are left
            out have numbers for names, as all have by default.
        """
        return []

    def words(self, model: nn.Module) -> Words | None:
        """Give where the model reads texts that an attacker may move; None: it reads none."""
        return None

    def swappable(self, model: nn.Module) -> Columns | None:
        """Give the columns of categories and numbers that `ColumnAttack` may change, if any."""
        return None

    def facts(self) -> dict[str, Any]:
        """Give what `read` found that the model depends on, as JSON, for `restore`."""
        return {"kind": self.kind.to_json()}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over what `facts` gave, in place of reading the data.

        Raises:
            Any exception: they are no such facts.
        """
        self.kind = from_json(facts["kind"])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write weights and facts; `load` needs nothing else."""
        write_text(folder / "task.json", json.dumps(self.facts(), indent=2) + "\n")
        self.save_weights(model, folder / "model.safetensors")

    def save_weights(self, model: nn.Module, path: Path) -> None:
        """Write a safetensors file of the weights, all of them unless `build` brings some."""
        safetensors = need("safetensors.torch")
        save_tensors(path, lambda part: safetensors.save_model(model, part))

    def load_weights(self, model: nn.Module, path: Path) -> None:
        """Put what `save_weights` wrote into a model that was just built.

        Raises:
            Any exception: they are not of this model.
        """
        need("safetensors.torch").load_model(model, str(path))

    def load(self, folder: Path) -> nn.Module:
        """Read back what `save` wrote, in evaluation mode.

        Raises:
            InputError: the folder holds no such model, or one for other data than was read.
        """
        try:
            facts = json.loads((folder / "task.json").read_text(encoding="utf-8"))
            known = self.facts() if hasattr(self, "parts") else None
            if known is not None and json.loads(json.dumps(known)) != facts:
                raise ValueError("task.json does not belong to the data")
            self.restore(facts)
            model = self.build()
            self.load_weights(model, folder / "model.safetensors")
            require_finite(model)
        except Exception as error:
            # The files may have been changed in any way.
            raise broken(folder, error) from error
        return model.eval()


def _feed(digest: Any, value: Any) -> None:
    """Feed a value to a hash: arrays, tensors, texts, numbers, and what is made of these."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {field.name: getattr(value, field.name) for field in fields(value)})
    elif isinstance(value, Mapping):
        digest.update(b"{")
        for key, item in value.items():
            _feed(digest, str(key))
            _feed(digest, item)
    elif value is None or isinstance(value, _PLAIN):
        text = repr(value).encode()
        digest.update(f"{len(text)}:".encode() + text)
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        digest.update(f"[{len(value)}".encode())
        for i in range(len(value)):
            _feed(digest, value[i])
    else:
        raise TypeError(
            f"the fingerprint of the data knows nothing of a {type(value).__name__}: make parts of "
            "lists, arrays and plain values, or define the task's fingerprint()"
        )
