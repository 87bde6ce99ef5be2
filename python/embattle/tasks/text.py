"""Classes of texts: any transformer encoder under a new head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from embattle import data
from embattle.data.account import COUNTED, Account
from embattle.data.batch import Batch
from embattle.data.labels import is_blank
from embattle.data.recipe import DataRecipe
from embattle.data.splits import Splits
from embattle.errors import InputError
from embattle.files import broken
from embattle.models.pretrained import count_longer, load_tokenizer
from embattle.models.recipe import ModelRecipe
from embattle.models.text import TextClassifier, build, load
from embattle.models.words import Words
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.kinds import Classification


class TextClassification(Task):
    """Predicts a column of classes from columns of text."""

    Data: ClassVar[type[Section]] = DataRecipe
    Model: ClassVar[type[Section]] = ModelRecipe
    sample: ClassVar[str] = "text"
    vector: ClassVar[str] = "token"
    varying: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    data_options: DataRecipe
    model_options: ModelRecipe
    kind: Classification
    splits: Splits

    def read(self, account: Account) -> None:
        """Read the table, clean and divide it; see `embattle.data.load`."""
        self.splits = data.load(self.data_options, self.seed, account)
        self.parts = self.splits.parts
        self.kind = Classification(tuple(self.splits.classes))

    def columns_read(self) -> list[str]:
        """Give the text columns."""
        return self.data_options.text

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tokenize rows of a file: the text columns joined, and the label column if it is there.

        Raises:
            InputError: a row has no text, or a label that the model does not know.
        """
        options = self.data_options
        missing = set(options.missing)
        texts = []
        for row in rows:
            cells = [row.get(name) for name in options.text]
            shown = [str(cell).strip() for cell in cells if not is_blank(cell, missing)]
            texts.append(" ".join(shown))
        if not all(texts):
            columns = ", ".join(map(repr, options.text))
            raise InputError(f"there is no text in {columns}; give one in each row")
        labels = options.labels({n: [row.get(n) for row in rows] for n in options.label_columns})
        if any(label is None for label in labels):
            batch = self._tokenize(model, texts, [0] * len(texts))
            return Batch(batch.inputs, None, batch.movable)
        names = [str(label) for label in labels]
        unknown = sorted(set(names) - set(self.kind.classes))
        if unknown:
            raise InputError(
                f"column {options.label_name!r}: the model knows no class {unknown[0]!r}; it knows "
                f"{', '.join(map(repr, self.kind.classes))}"
            )
        number = {name: i for i, name in enumerate(self.kind.classes)}
        return self._tokenize(model, texts, [number[name] for name in names])

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Tokenize some texts of a part."""
        chosen = self.splits.parts[part].take(rows.tolist())
        return self._tokenize(model, chosen.texts, chosen.labels)

    def lengths(self, model: nn.Module, part: str) -> list[int]:
        """Count the tokens that the model reads of each text."""
        return cast(TextClassifier, model).lengths(self.splits.parts[part].texts)

    def show(self, part: str, row: int) -> str:
        """Show the text."""
        return self.splits.parts[part].texts[row]

    def counts(self) -> dict[str, Any]:
        """Give the examples of each class in each part."""
        return self.splits.counts()

    def note_encoding(self, account: Account, model: nn.Module | None = None) -> None:
        """Note how many texts are cut; without a model its tokenizer is loaded."""
        texts = [text for part in self.splits.parts.values() for text in part.texts]
        tokens = self.model_options.max_tokens
        if model is not None:
            cut = cast(TextClassifier, model).count_cut(texts[:COUNTED])
        else:
            try:
                tokenizer = load_tokenizer(self.model_options.pretrained)
            except InputError as error:
                account.note("read by the model", f"not known: {error}")
                return
            cut = count_longer(tokenizer, texts[:COUNTED], tokens)
        account.note_cut(cut, len(texts), tokens)

    def build(self) -> TextClassifier:
        """A pretrained encoder under a head with new weights."""
        return build(self.model_options, self.kind.classes, self.seed)

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """The token embeddings."""
        return [Site(cast(TextClassifier, model).embedding, group=group)]

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the tokens."""
        return [self.words(model).names(batch)]

    def words(self, model: nn.Module) -> Words:
        """Give the texts."""
        return cast(TextClassifier, model).words("input_ids", "attention_mask")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write weights, configuration, tokenizer and the names of the classes."""
        cast(TextClassifier, model).save(folder)

    def load(self, folder: Path) -> TextClassifier:
        """Read back what `save` wrote, in evaluation mode."""
        model = load(folder)
        if hasattr(self, "splits") and model.classes != self.kind.classes:
            shown = [", ".join(classes) for classes in (model.classes, self.kind.classes)]
            reason = f"its classes are {shown[0]}, and those of the data {shown[1]}"
            raise broken(folder, ValueError(reason))
        self.kind = Classification(model.classes)
        return model

    @staticmethod
    def _tokenize(model: nn.Module, texts: Sequence[str], labels: Sequence[int]) -> Batch:
        return cast(TextClassifier, model).encode(texts, labels)
