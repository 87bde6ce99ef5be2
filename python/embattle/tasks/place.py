"""Where a table is: the section `data` of recipes for ratings and clicks begins with it."""

from __future__ import annotations

from pathlib import Path

from embattle.data.sources import find
from embattle.sections import Section  # pydantic is optional: this says so where it is missing

# isort: split
from pydantic import model_validator


class Place(Section):
    """A table: a data set that `embattle.data.sources` knows, or a file of one's own.

    Attributes:
        source: the name of a data set; or
        path: a CSV, Parquet or JSON-lines file.
    """

    source: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_table(self) -> Place:
        if (self.source is None) == (self.path is None):
            raise ValueError("give either source (a known data set) or path (a file), not both")
        return self

    def table(self) -> Path:
        """The file, fetched where needed."""
        if self.source is not None:
            return find(self.source).path()
        assert self.path is not None
        return Path(self.path).expanduser()
