"""Dates and times as they stand in files, as seconds since 1970."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_TIME = (
    r"(?:(?:[T ]|, )(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))?"
    r"(?::(?P<second>\d{2})(?P<part>[.,]\d+)?)?"
    r"(?: ?(?P<half>[AaPp])\.?[Mm]\.?)?(?: ?(?P<zone>Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?))?)?"
)
_DATES = [
    re.compile(found + _TIME)
    for found in (
        r"(?P<year>\d{4})(?P<mark>[-/.])(?P<month>\d{1,2})(?P=mark)(?P<day>\d{1,2})",  # 2020-01-31
        r"(?P<one>\d{1,2})(?P<mark>[-/.])(?P<two>\d{1,2})(?P=mark)(?P<year>\d{4}|\d{2})",  # 1/31/20
        r"(?P<word>[A-Za-z]{3,9})\.? (?P<day>\d{1,2}),? (?P<year>\d{4})",  # May 3, 2020
        r"(?P<day>\d{1,2})(?P<mark>[ -])(?P<word>[A-Za-z]{3,9})\.?(?P=mark)(?P<year>\d{4}|\d{2})",
        r"(?P<month>\d{1,2}) (?P<day>\d{1,2}), (?P<year>\d{4})",  # 05 3, 2020
        r"(?P<year>\d{4})-(?P<month>\d{2})(?=$)",  # 2020-01: its first day
    )
]
_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july", "august", "september"),
    *("october", "november", "december"),
)
_START = datetime(1970, 1, 1, tzinfo=timezone.utc)
_NAIVE_START = _START.replace(tzinfo=None)
# What three numbers may begin with; with the year only where that has two digits.
_DAY_FIRST, _MONTH_FIRST, _YEAR_FIRST = range(3)


def is_date(cell: str) -> bool:
    """Whether a cell is written as a date, with or without a time."""
    return any(map(math.isfinite, _readings(cell.strip())))


class Moments:
    """A column of dates, a block of cells at a time.

    Whether 3/4/2020 is in March or in April is told by the column's other dates.
    """

    def __init__(self) -> None:
        self._blocks: list[Floats] = []

    def add(self, cells: Sequence[Any]) -> None:
        """Take further cells: texts, or Python's own dates.

        Raises:
            ValueError: one is no date.
        """
        found = np.array([_readings(cell) for cell in cells], dtype=np.float64).reshape(-1, 3)
        wrong = np.flatnonzero(np.isnan(found).all(1))
        if len(wrong):
            raise ValueError(f"{str(cells[wrong[0]])!r} is neither")
        self._blocks.append(found)

    def seconds(self) -> Floats:
        """The moments of all cells, [N] seconds since 1970; a time without a zone is UTC.

        Raises:
            ValueError: nothing tells which number is the day, or some dates have it first and
                others the month; or years of two digits seem to be first.
        """
        found = np.concatenate([np.empty((0, 3)), *self._blocks])
        possible = np.isfinite(found).all(0)
        days, years = found[:, _DAY_FIRST], found[:, _YEAR_FIRST]
        if possible[_YEAR_FIRST] and not possible[:_YEAR_FIRST].any():
            return years
        # Of what are years there are fewer different ones than of what are days.
        if possible[_YEAR_FIRST] and possible[_DAY_FIRST] and (days != years).any():
            several = [len(np.unique(x.astype("M8[s]").astype("M8[Y]"))) for x in (days, years)]
            if several[1] < several[0]:
                raise ValueError(
                    "the dates seem to begin with years of two digits, and may begin with days; "
                    "write 2020-01-31 for the last day of January 2020"
                )
        possible = possible[:_YEAR_FIRST]
        if not possible.any():
            raise ValueError("some dates have the day first and others the month; write all alike")
        if possible.all() and (found[:, _DAY_FIRST] != found[:, _MONTH_FIRST]).any():
            raise ValueError(
                "each date has two numbers up to 12, so that nothing tells the day from the month; "
                "write 2020-01-31 for the last day of January 2020"
            )
        return found[:, _DAY_FIRST if possible[_DAY_FIRST] else _MONTH_FIRST]


def _readings(cell: Any) -> tuple[float, float, float]:
    """Seconds since 1970 with day, month or year first; NaN where there is no such date."""
    text = cell.isoformat() if isinstance(cell, date) else str(cell).strip()
    with suppress(ValueError):
        moment = _seconds(datetime.fromisoformat(text))  # the fastest, for what it knows
        return moment, moment, moment
    for pattern in _DATES:
        found = pattern.fullmatch(text)
        if found is not None:
            given = found.groupdict()
            if "one" not in given:
                moment = _moment(given, given.get("month"), given.get("day", "1"))
                return moment, moment, moment
            first = _moment(given, given["two"], given["one"])
            # With points between, the day is first everywhere.
            other = first if given["mark"] == "." else _moment(given, given["one"], given["two"])
            turned = math.nan
            if given["mark"] != "." and len(given["one"] or "") == len(given["year"] or "") == 2:
                turned = _moment({**given, "year": given["one"]}, given["two"], given["year"])
            return first, other, turned
    return math.nan, math.nan, math.nan


def _moment(given: dict[str, str | None], month: str | None, day: str | None) -> float:
    """What was found in a cell as seconds since 1970; NaN where there is no such moment."""
    year, hour = int(given["year"] or 0), int(given["hour"] or 0)
    if len(given["year"] or "") == 2:
        year += 1900 if year > 68 else 2000  # as POSIX reads them
    if given["half"]:
        if not 1 <= hour <= 12:
            return math.nan
        hour = hour % 12 + 12 * (given["half"] in "Pp")
    if month is None:
        word = (given["word"] or "").lower()
        named = [name for name in _MONTHS if name.startswith(word) or word == "sept" == name[:4]]
        month = str(_MONTHS.index(named[0]) + 1) if named else "0"
    shift = timedelta()
    zone = given["zone"] or ""
    if zone[:1] in ("+", "-"):
        digits = zone[1:].replace(":", "").ljust(4, "0")
        shift = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        shift = -shift if zone[0] == "-" else shift
    try:
        moment = datetime(
            *(year, int(month), int(day or 0), hour),
            *(int(given["minute"] or 0), int(given["second"] or 0)),
            tzinfo=timezone.utc,
        )
    except ValueError:
        return math.nan
    part = float("0" + (given["part"] or ".0").replace(",", "."))
    return _seconds(moment - shift) + part


def _seconds(moment: datetime) -> float:
    return (moment - (_NAIVE_START if moment.tzinfo is None else _START)).total_seconds()
