"""What tasks on ratings share: who met what and when, from a table, by leave-one-out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.data.keyed import plain_name
from embattle.data.labels import is_blank
from embattle.data.ratings import Ratings, hold_out_latest, read_named_ratings, together
from embattle.data.recipe import Events
from embattle.errors import InputError
from embattle.perturb.evaluation import Evaluation
from embattle.sections import Section
from embattle.tasks.base import Task
from embattle.tasks.kinds import Ranking

# isort: split
from pydantic import PositiveInt


class RatingsRecipe(Events):
    """Which table of ratings (see `Events`), and which of its columns.

    Each user's last item is the test part, the one before it the validation part, the rest the
    training part; all that was rated counts as liked.

    Attributes:
        user, item, rating, time: the names of its columns; later times are larger. A table of
            events without ratings has `rating: null`.
        users: use the first so many users; null uses all.
        k: how many items are recommended.
    """

    user: str = "user_id"
    item: str = "item_id"
    rating: str | None = "rating"
    time: str = "timestamp"
    users: PositiveInt | None = None
    k: PositiveInt = 10


class RatingsTask(Task):
    """Recommends k items to a user, of which the one held out should be one.

    Attributes:
        users, items: the names of users and items by number, as text.
        held: the ratings of each part.
    """

    Data: ClassVar[type[Section]] = RatingsRecipe
    sample: ClassVar[str] = "user"

    data_options: RatingsRecipe
    kind: Ranking
    users: list[str]
    items: list[str]
    held: dict[str, Ratings]

    def read(self, account: Account) -> None:
        """Read the table and hold the last two items of each user out."""
        options = self.data_options
        columns = (options.user, options.item, options.rating, options.time)
        ratings, self.users, self.items = read_named_ratings(
            options.table(), columns, account=account, **options.reading
        )
        count = options.users
        if count is not None and count < ratings.user_count:
            few = ratings.take(ratings.users < count)
            ratings = Ratings(few.users, few.items, few.values, few.times, count, few.item_count)
            self.users = self.users[:count]
        self.kind = Ranking(options.k)
        rest, test = hold_out_latest(ratings)
        if not len(test):
            raise InputError(
                f"{options.table()}: no user has met two different items ({options.user!r}, "
                f"{options.item!r}), so that none can be held out; give longer histories"
            )
        train, validation = hold_out_latest(rest)
        self.held = {"train": train, "validation": validation, "test": test}
        account.note(
            "ratings",
            f"{len(ratings):,} by {ratings.user_count:,} users of {ratings.item_count:,} items",
        )
        if ratings.item_count <= options.k:
            raise InputError(
                f"data.k: {options.k} of {ratings.item_count} items cannot be a choice; lower it"
            )
        met = self.met_before("test")
        distinct = np.unique(np.stack([met.users, met.items], 1), axis=0)[:, 0]
        left = ratings.item_count - np.bincount(distinct, minlength=ratings.user_count)
        sure = int((left[test.users] <= options.k).sum())
        if sure:
            account.warn(
                f"{sure:,} of {len(test):,} test users have met all but {options.k} items or fewer "
                "(data.k): whatever a model says of them is right"
            )

    def met_before(self, part: str) -> Ratings:
        """What the users had rated before a part was: it is not recommended again."""
        train = self.held["train"]
        return together(train, self.held["validation"]) if part == "test" else train

    def show(self, part: str, row: int) -> str:
        """Show the user and what was held out."""
        held = self.held[part]
        return f"user {self.users[held.users[row]]}: {self.items[held.items[row]]}"

    def ranked(self, scores: torch.Tensor, batch: Batch) -> Evaluation:
        """Give scores `[B, items]`, -inf for what was met, and losses where there are labels."""
        scores = scores.masked_fill(batch.inputs["seen"], -torch.inf)
        known = batch.labels
        return Evaluation(None if known is None else self.kind.losses(scores, known), scores)

    def describe(self, outputs: torch.Tensor) -> list[dict[str, Any]]:
        """Give the kind's columns, the items by their names."""
        found = self.kind.describe(outputs)
        return [row | {"prediction": [self.items[i] for i in row["prediction"]]} for row in found]

    def numbers(self, names: Iterable[Any], what: str, column: str) -> list[int]:
        """The numbers of users or items.

        Args:
            names: as they stand in the table.
            what: `users` or `items`.
            column: where they stand, for errors.

        Raises:
            InputError: one was not in the table that was trained on.
        """
        known = {plain_name(name): i for i, name in enumerate(getattr(self, what))}
        found = []
        for name in map(plain_name, names):
            if name not in known:
                raise InputError(
                    f"column {column!r}: the model knows no {name!r}; it knows the "
                    f"{len(known):,} {what} it was trained on"
                )
            found.append(known[name])
        return found

    def cells(self, rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
        """The cells of a column that every row must have.

        Raises:
            InputError: one has none.
        """
        for number, row in enumerate(rows, start=1):
            if is_blank(row.get(column)):
                where = f" in row {number}" if len(rows) > 1 else ""
                raise InputError(f"column {column!r} is empty{where}; fill it in")
        return [row[column] for row in rows]

    def labels_of(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        """The items in the item column, if every row has one."""
        column = self.data_options.item
        if any(is_blank(row.get(column)) for row in rows):
            return None
        return torch.tensor(self.numbers([row[column] for row in rows], "items", column))
