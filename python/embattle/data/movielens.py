"""MovieLens 100K: its ratings, and what is known of its users and films."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embattle.data.ratings import Ratings, read_ratings
from embattle.data.sources import find
from embattle.data.tables import read_columns

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
# Ages are grouped as GroupLens groups them in MovieLens 1M.
_AGES = (18, 25, 35, 45, 50, 56)


@dataclass(frozen=True)
class Context:
    """What is known of N ratings beside their values.

    Attributes:
        values: [N, fields] int64: user, film, age group, gender, occupation, and the 19 genres.
        sizes: how many values each field has.
        dense: [N, 2] float32: the user's age and the film's year, with mean 0 and variance 1 over
            users and films.
    """

    values: NDArray[np.int64]
    sizes: list[int]
    dense: NDArray[np.float32]


def ratings() -> Ratings:
    """The 100,000 ratings in the file's order; users and films are numbered as there, from 0.

    Raises:
        InputError: if the file cannot be had.
    """
    columns = ("user_id", "movie_id", "rating", "timestamp")
    return read_ratings(find("movielens_100k").path(), columns)


def context(of: Ratings) -> Context:
    """What is known of the users and films of these ratings.

    Raises:
        InputError: if the files cannot be had.
    """
    users = read_columns(
        find("movielens_100k_users").path(), ("user_id", "age", "gender", "occupation")
    )
    films = read_columns(find("movielens_100k_items").path(), ("movie_id", "release_date", *GENRES))
    by_user, by_film = (
        np.argsort(np.asarray(column, dtype=np.int64))
        for column in (users["user_id"], films["movie_id"])
    )
    age = np.asarray(users["age"], dtype=np.float64)[by_user]
    years = np.array([int(date[-4:]) if date else -1 for date in films["release_date"]])[by_film]
    year = np.where(years < 0, np.median(years[years >= 0]), years).astype(np.float64)
    of_user = [
        np.searchsorted(_AGES, age, side="right"),
        *(_numbered(users[name])[by_user] for name in ("gender", "occupation")),
    ]
    of_film = [np.asarray(films[name], dtype=np.int64)[by_film] for name in GENRES]
    fields = [of.users, of.items]
    fields += [column[of.users] for column in of_user] + [column[of.items] for column in of_film]
    sizes = [of.user_count, of.item_count]
    sizes += [int(column.max()) + 1 for column in of_user] + [2] * len(GENRES)
    dense = np.stack([_standard(age)[of.users], _standard(year)[of.items]], axis=1)
    return Context(np.stack(fields, axis=1), sizes, dense.astype(np.float32))


def _numbered(column: Sequence[object]) -> NDArray[np.int64]:
    return np.unique(np.asarray(column), return_inverse=True)[1].astype(np.int64)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    standard: NDArray[np.float64] = (values - values.mean()) / values.std()
    return standard
