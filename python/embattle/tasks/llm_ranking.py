"""Whether a user will like a title, asked of a language model that reads what she liked before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from embattle.data.account import COUNTED, Account
from embattle.data.batch import Batch
from embattle.data.divide import pairs
from embattle.data.keyed import Keyed
from embattle.data.labels import is_blank
from embattle.data.questions import Questions, ask, plain_title
from embattle.data.ratings import Ratings, read_named_ratings
from embattle.data.recipe import Events, Limits, Place
from embattle.data.splits import PARTS
from embattle.errors import InputError, need
from embattle.files import save_tensors
from embattle.models.llm import LanguageRecommender, build
from embattle.models.words import Words
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.kinds import BinaryClassification

# isort: split
from pydantic import Field, PositiveFloat, PositiveInt


class Titles(Place):
    """The table of titles, with one row for each item.

    Attributes:
        key: its column of items, as they are named in the ratings.
        title: its column of titles.
        plain: write titles as they are said, `The Usual Suspects` for `Usual Suspects, The (1995)`.
    """

    key: str = "item_id"
    title: str = "title"
    plain: bool = True


class LikesRecipe(Events):
    """Which table of ratings (see `Events`), which of its columns, and where the titles are.

    Attributes:
        user, item, rating, time: the names of its columns; later times are larger.
        titles: the table of titles.
        at_least: from this value on a rating is a like.
        history: how many of the latest likes are told at most.
        limits: the most questions of each part; half of them are about likes.
    """

    user: str = "user_id"
    item: str = "item_id"
    rating: str = "rating"
    time: str = "timestamp"
    titles: Titles
    at_least: float = 4.0
    history: PositiveInt = 8
    limits: Limits = Limits()


class LLMRecipe(Section):
    """A causal language model, its adapters, and its prompt.

    Attributes:
        pretrained: the bundled `smollm2-135m-instruct`, a local folder, a GGUF file or a folder
            with one, or a Hugging Face model name.
        layers: use the first so many layers; null uses all.
        rank: of the low-rank adapters.
        alpha: the adapters' product is scaled by alpha / rank.
        prompt: the question, with `{liked}` where the titles go, and `{title}`. The answer is read
            at its last token: where that belongs to the title, few layers know it as well as many.
        answers: what stands for no and for yes; of each, the first token.
        max_tokens: in longer prompts the oldest likes are left out.
    """

    pretrained: str = "smollm2-135m-instruct"
    layers: PositiveInt | None = None
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    prompt: str = "She liked {liked}. Yes or no, will she like {title}"
    answers: tuple[str, str] = (" no", " yes")
    max_tokens: int = Field(default=96, ge=8)


class LLMRanking(Task):
    """Predicts yes or no; the attacker moves the embeddings of the titles' tokens.

    Asked about many titles, the model ranks them by its lead of yes over no. Only the adapters and
    the answers' rows are saved: the pretrained model is read again where it came from.
    """

    Data: ClassVar[type[Section]] = LikesRecipe
    Model: ClassVar[type[Section]] = LLMRecipe
    sample: ClassVar[str] = "question"
    vector: ClassVar[str] = "token"
    list_columns: ClassVar[tuple[str, ...]] = ("history",)
    varying: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")

    data_options: LikesRecipe
    model_options: LLMRecipe
    kind: BinaryClassification
    ratings: Ratings
    titles: list[str]
    questions: dict[str, Questions]

    def read(self, account: Account) -> None:
        """Read ratings and titles; divide the likes and put an unknown item beside each.

        `questions` has users and items by number, `titles` the items' titles, and a part's samples
        are mappings as `encode` takes them.
        """
        options = self.data_options
        columns = (options.user, options.item, options.rating, options.time)
        ratings, users, items = read_named_ratings(
            options.table(), columns, account=account, **options.reading
        )
        self.ratings = _asked(ratings, users, account)
        self.titles = _titles(options.titles, items, account)
        self.questions = ask(
            self.ratings,
            at_least=options.at_least,
            length=options.history,
            limits={name: getattr(options.limits, name) for name in PARTS},
            seed=self.seed,
        )
        self.kind = BinaryClassification(("no", "yes"))
        self.parts = {name: self._rows(part) for name, part in self.questions.items()}
        likes = int((self.ratings.values >= options.at_least).sum())
        account.note(
            "ratings",
            f"{len(self.ratings):,} by {self.ratings.user_count:,} users of "
            f"{self.ratings.item_count:,} items; {likes:,} likes",
        )
        account.note("questions", *(f"{name} {len(part):,}" for name, part in self.parts.items()))

    def columns_read(self) -> list[str]:
        """Give the columns of the likes and of the title in question."""
        return ["history", "title"]

    def encode(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Prompts of rows with `history`, titles in the order of time, and `title`; maybe `liked`.

        A history in a file is one text, its titles divided by `;`. `liked` is `yes` or `no`.
        """
        if any(is_blank(row.get("title")) for row in rows):
            raise InputError("column 'title' is empty in a row; fill it in")
        said = plain_title if self.data_options.titles.plain else str  # as in training
        histories = [[said(title) for title in _history(row.get("history"))] for row in rows]
        prompts = cast(LanguageRecommender, model).prompts
        made = prompts.encode(histories, [said(str(row["title"]).strip()) for row in rows])
        labels = None
        if all(row.get("liked") is not None for row in rows):
            unknown = [row["liked"] for row in rows if row["liked"] not in self.kind.classes]
            if unknown:
                raise InputError(f"column 'liked' must be yes or no, got {unknown[0]!r}")
            labels = torch.tensor([self.kind.classes.index(row["liked"]) for row in rows])
        inputs = {"input_ids": made.tokens, "attention_mask": made.attention}
        return Batch(inputs, labels, made.of_liked | made.of_title)

    def lengths(self, model: nn.Module, part: str) -> list[int]:
        """Count the tokens of each prompt."""
        prompts = cast(LanguageRecommender, model).prompts
        return [prompts.length(row["history"], row["title"]) for row in self.parts[part]]

    def show(self, part: str, row: int) -> str:
        """Show the title, and those that were liked."""
        found = self.parts[part][row]
        return f"{found['title']}; liked: {', '.join(found['history'])}"

    def note_encoding(self, account: Account, model: nn.Module | None = None) -> None:
        """Note in how many prompts likes are left out, once there is a model."""
        if model is None:
            return
        prompts = cast(LanguageRecommender, model).prompts
        rows = [row for part in self.parts.values() for row in part][:COUNTED]
        cut = sum(
            len(prompts.fit(row["history"], row["title"])[0]) < len(row["history"]) for row in rows
        )
        account.note(
            "read by the model",
            f"{self.model_options.max_tokens} tokens of a prompt at most; {cut:,} of {len(rows):,} "
            "tell fewer likes",
        )

    def build(self) -> LanguageRecommender:
        """The pretrained model, or its first layers, with adapters that change nothing yet."""
        return build(**self.model_options.model_dump())

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """The token embeddings; `mask` lets those of titles move alone."""
        return [Site(cast(LanguageRecommender, model).embedding, group=group)]

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the prompts' tokens."""
        return [self.words(model).names(batch)]

    def words(self, model: nn.Module) -> Words:
        """Give the prompts, in which titles alone may change."""
        prompts = cast(LanguageRecommender, model).prompts
        return Words(
            prompts.tokenizer,
            cast(LanguageRecommender, model).embedding,
            "input_ids",
            "attention_mask",
            prompts.max_tokens,
        )

    def save_weights(self, model: nn.Module, path: Path) -> None:
        """Write what was trained, and a hash of what was not."""
        made, safetensors = cast(LanguageRecommender, model), need("safetensors.torch")
        tensors = {name: x.detach().cpu().contiguous() for name, x in made.trained().items()}
        base = {"base": made.base_hash()}
        save_tensors(path, lambda part: safetensors.save_file(tensors, part, metadata=base))

    def load_weights(self, model: nn.Module, path: Path) -> None:
        """Put what was trained into the pretrained model, if it is the same one."""
        made, safetensors = cast(LanguageRecommender, model), need("safetensors")
        with safetensors.safe_open(str(path), framework="pt") as stream:
            base = (stream.metadata() or {}).get("base")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if base != made.base_hash():
            raise ValueError(
                f"{self.model_options.pretrained!r} is no longer the model that was trained on"
            )
        made.set_trained(tensors)

    def _rows(self, part: Questions) -> list[dict[str, Any]]:
        return [
            {
                "history": [self.titles[i] for i in history if i >= 0],
                "title": self.titles[item],
                "liked": "yes" if liked else "no",
            }
            for history, item, liked in zip(
                part.history.tolist(), part.items.tolist(), part.liked.tolist(), strict=True
            )
        ]


def _asked(ratings: Ratings, users: Sequence[str], account: Account) -> Ratings:
    """The ratings of users who have not rated everything: of others there is nothing to ask."""
    known = np.unique(pairs(ratings.users, ratings.items), return_index=True)[1]
    rated = np.bincount(ratings.users[known], minlength=ratings.user_count)
    full = np.flatnonzero(rated == ratings.item_count)
    if not len(full):
        return ratings
    said = f"users have rated all {ratings.item_count:,} items, such as {users[full[0]]!r}"
    if len(full) == ratings.user_count:
        raise InputError(f"all {said}: there is nothing to ask of them; give more items")
    account.note("dropped", f"{len(full):,} {said}: there is nothing to ask of them")
    return ratings.take(~np.isin(ratings.users, full))


def _titles(options: Titles, items: Sequence[str], account: Account) -> list[str]:
    """The title of each item, by number."""
    path = options.table()
    table = Keyed(path, options.key, [options.title], account, **options.written)
    rows = [table.row(name) for name in items]
    cells = [None if row is None else table.columns[options.title][row] for row in rows]
    untitled = [name for name, cell in zip(items, cells, strict=True) if is_blank(cell)]
    if untitled:
        raise InputError(
            f"data.titles: {path} has no title of {options.key} {untitled[0]!r}, which was rated; "
            f"{len(untitled)} of {len(items)} items lack one"
        )
    titles = [str(cell).strip() for cell in cells]
    return [plain_title(title) for title in titles] if options.plain else titles


def _history(cell: Any) -> list[str]:
    """The titles of a history: a list, or one text."""
    if is_blank(cell):
        return []
    titles = cell.split(";") if isinstance(cell, str) else cell
    return [str(title).strip() for title in titles if not is_blank(title)]
