"""Whether a reader clicks on a piece of news, in the layout of MIND."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.data.divide import time_parts
from embattle.data.labels import is_blank
from embattle.data.mind import Impression, read_impressions, read_news
from embattle.data.recipe import Limits, Remedy, check_fractions
from embattle.data.splits import PARTS
from embattle.errors import InputError
from embattle.models.news import NewsClicks
from embattle.models.recipe import EncoderRecipe
from embattle.models.words import Words
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.encoded import EncodedTexts
from embattle.tasks.kinds import BinaryClassification

# isort: split
from pydantic import Field, PositiveFloat, PositiveInt, model_validator


class NewsData(Section):
    """A folder in the layout of MIND, divided by the time of the impressions.

    Attributes:
        path: the folder, with `news.tsv` and `behaviors.tsv`.
        text: what is read of news: `title`, `abstract`, `category`, `subcategory`.
        history: the latest so many news that a reader clicked on before are looked at.
        unclicked: for each candidate that was clicked so many of its impression's others are
            drawn, in every part.
        ragged_rows: what happens to lines with too few or too many cells.
        fractions: shares of train, validation and test.
        limits: the most samples of each part.
    """

    path: str
    text: list[str] = Field(default=["title"], min_length=1)
    history: PositiveInt = 20
    unclicked: PositiveInt = 1
    ragged_rows: Remedy = "refuse"
    fractions: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.8, 0.1, 0.1)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _consistent(self) -> NewsData:
        check_fractions(self.fractions)
        return self


class NewsRecipe(EncoderRecipe):
    """An encoder of news under a projection.

    Attributes:
        dim: width of the vectors.
        train_encoder: whether the encoder is trained; otherwise histories are encoded once.
    """

    max_tokens: int = Field(default=32, ge=3)
    dim: PositiveInt = 64
    train_encoder: bool = True


@dataclass(frozen=True)
class Rows:
    """A part.

    Attributes:
        history: [N, L] int64 numbers of news, -1 where there are no more.
        candidate: [N] int64, the news shown.
        label: [N] int64, 1 where it was clicked.
    """

    history: Tensor
    candidate: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)


class ClicksOnNews(EncodedTexts):
    """Predicts a click on a candidate; the attacker rewrites the candidate's text."""

    Data: ClassVar[type[Section]] = NewsData
    Model: ClassVar[type[Section]] = NewsRecipe
    sample: ClassVar[str] = "candidate"
    vector: ClassVar[str] = "token"
    varying: ClassVar[tuple[str, ...]] = ("text_ids", "text_mask")

    data_options: NewsData
    model_options: NewsRecipe
    names: list[str]
    parts: Mapping[str, Rows]

    def read(self, account: Account) -> None:
        """Read news and impressions, divide these by time, and draw what was not clicked."""
        options = self.data_options
        folder, drop = Path(options.path).expanduser(), options.ragged_rows == "drop"
        self.names, self.texts = read_news(folder, options.text, account, drop_ragged=drop)
        impressions = read_impressions(folder, self.names, account, drop_ragged=drop)
        part_of = time_parts([one.time for one in impressions], options.fractions)
        self.kind = BinaryClassification(("not clicked", "clicked"))
        self.parts = {}
        for k, name in enumerate(PARTS):
            draw = np.random.default_rng([self.seed, k])
            order = draw.permutation(np.flatnonzero(part_of == k))
            limit = getattr(options.limits, name)
            self.parts[name] = self._part([impressions[i] for i in order], draw, limit)
            account.note(
                f"{name} part", f"{len(order):,} impressions, {len(self.parts[name]):,} rows"
            )

    def _part(
        self, impressions: Sequence[Impression], draw: np.random.Generator, limit: int | None
    ) -> Rows:
        """The samples of impressions, at most `limit`."""
        histories: list[np.ndarray[Any, Any]] = []
        candidates: list[int] = []
        labels: list[int] = []
        for one in impressions:
            if limit is not None and len(labels) >= limit:
                break
            clicked, rest = one.candidates[one.clicked], one.candidates[~one.clicked]
            count = min(len(rest), self.data_options.unclicked * len(clicked))
            drawn = draw.choice(rest, count, replace=False)
            candidates += [*clicked, *drawn]
            labels += [1] * len(clicked) + [0] * count
            histories += [one.history] * (len(clicked) + count)
        history = self._padded(histories[:limit])
        return Rows(
            history,
            torch.tensor(np.array(candidates[:limit], dtype=np.int64)),
            torch.tensor(labels[:limit]),
        )

    def _padded(self, histories: Sequence[Sequence[int] | np.ndarray[Any, Any]]) -> Tensor:
        length = self.data_options.history
        found = torch.full((len(histories), length), -1)
        for row, history in enumerate(histories):
            latest = torch.as_tensor(np.asarray(history[-length:], dtype=np.int64))
            found[row, : len(latest)] = latest
        return found

    def build(self) -> NewsClicks:
        """A pretrained encoder under a new projection."""
        options = self.model_options
        return NewsClicks(
            self.text_encoder(), self.texts, dim=options.dim, trained=options.train_encoder
        )

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """Some samples of a part."""
        found = self.parts[part]
        words = cast(NewsClicks, model).texts.tokens(found.candidate[rows].tolist())
        inputs = {"history": found.history[rows], **words.inputs}
        return Batch(inputs, found.label[rows], words.movable)

    def columns_read(self) -> list[str]:
        """Give the columns of the history and of the candidate."""
        return ["history", "news"]

    def for_scoring(self, model: nn.Module) -> nn.Module:
        """The news of histories are encoded once, all of them."""
        cast(NewsClicks, model).texts.settle()
        return model

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows of a file: `history`, names with spaces between, `news`, a name, and `clicked`.

        Raises:
            InputError: a name that the model does not know.
        """
        number = {name: i for i, name in enumerate(self.names)}

        def numbers(cell: Any, column: str) -> list[int]:
            names = [] if is_blank(cell) else str(cell).split()
            for name in names:
                if name not in number:
                    raise InputError(
                        f"column {column!r}: the model knows no news {name!r}; it knows the "
                        f"{len(number):,} it was trained with"
                    )
            return [number[name] for name in names]

        shown = [numbers(row.get("news"), "news") for row in rows]
        for place, found in enumerate(shown, 1):
            if len(found) != 1:
                where = f" in row {place}" if len(rows) > 1 else ""
                raise InputError(f"column 'news' names no single news{where}; name one")
        words = cast(NewsClicks, model).texts.tokens([found[0] for found in shown])
        history = self._padded([numbers(row.get("history"), "history") for row in rows])
        marks = [str(row.get("clicked")) for row in rows]
        known = all(mark in ("0", "1") for mark in marks)
        labels = torch.tensor([int(mark) for mark in marks]) if known else None
        return Batch({"history": history, **words.inputs}, labels, words.movable)

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """The words of the candidates."""
        return [Site(cast(NewsClicks, model).texts.words, group=group)]

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the candidates' tokens."""
        return [self.words(model).names(batch)]

    def words(self, model: nn.Module) -> Words:
        """Give the candidates' texts."""
        return cast(NewsClicks, model).texts.encoder.words("text_ids", "text_mask")

    def show(self, part: str, row: int) -> str:
        """Show the candidate."""
        return self.texts[int(self.parts[part].candidate[row])]

    def facts(self) -> dict[str, Any]:
        """Give the names of the news too."""
        return {**super().facts(), "names": self.names}

    def restore(self, facts: dict[str, Any]) -> None:
        """Take over the names of the news too."""
        super().restore(facts)
        self.names = list(facts["names"])
