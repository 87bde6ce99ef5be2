"""News and who clicked on them, in the layout of MIND: `news.tsv` and `behaviors.tsv`.

The layout is that of Wu et al., "MIND: A Large-scale Dataset for News Recommendation", ACL 2020:
lines of cells between tabs, without a header line and without quoting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embattle.data.account import Account, short
from embattle.errors import InputError, closest

NEWS, BEHAVIORS = "news.tsv", "behaviors.tsv"
NEWS_COLUMNS = (
    *("id", "category", "subcategory", "title", "abstract", "url"),
    *("title_entities", "abstract_entities"),
)
_BEHAVIOR_COLUMNS = ("impression", "user", "time", "history", "candidates")
_TIME = "%m/%d/%Y %I:%M:%S %p"


@dataclass(frozen=True)
class Impression:
    """News that were shown to a user at once.

    Attributes:
        time: seconds; larger is later.
        history: the numbers of the news that she had clicked on before, oldest first, int64.
        candidates: the numbers of the news shown, int64.
        clicked: on which of them she clicked, bool.
    """

    time: float
    history: NDArray[np.int64]
    candidates: NDArray[np.int64]
    clicked: NDArray[np.bool_]


def is_mind(path: Path) -> bool:
    """Whether a path is a folder with the two files."""
    return all((path / name).is_file() for name in (NEWS, BEHAVIORS))


def read_news(
    folder: Path, columns: Sequence[str], account: Account, *, drop_ragged: bool = False
) -> tuple[list[str], list[str]]:
    """Read the names and texts of news; those without any text are left out.

    Args:
        folder: holds `news.tsv`.
        columns: what makes a text, of `NEWS_COLUMNS`, joined by a space.
        account: is told what was read and left out.
        drop_ragged: leave lines out that have too few or too many cells, instead of refusing them.

    Raises:
        InputError: the file cannot be read, has no news with a text, or names one twice with
            different texts.
    """
    unknown = [name for name in columns if name not in NEWS_COLUMNS]
    if unknown:
        raise InputError(
            f"data.text: no column {unknown[0]!r}; {closest(unknown[0], NEWS_COLUMNS)}"
        )
    path, odd = folder / NEWS, Counter[str]()
    places = [NEWS_COLUMNS.index(name) for name in columns]
    texts: dict[str, str] = {}
    for line, cells in _lines(path, len(NEWS_COLUMNS), odd, drop_ragged):
        text = " ".join(filter(None, (cells[place].strip() for place in places)))
        if not text:
            odd["news without text"] += 1
            continue
        if texts.setdefault(cells[0], text) != text:
            raise InputError(
                f"{path}, line {line}: the news {short(cells[0])} is there before, with another "
                "text; leave one out"
            )
    if not texts:
        raise InputError(f"{path} has no news with a text in {', '.join(columns)}")
    account.note("news", f"{path}: {len(texts):,}")
    _note_dropped(account, odd)
    return list(texts), list(texts.values())


def read_impressions(
    folder: Path, names: Sequence[str], account: Account, *, drop_ragged: bool = False
) -> list[Impression]:
    """Read the impressions in which something was clicked, and something was not.

    News that `names` does not have are left out of histories and candidates, and counted.

    Args:
        folder: holds `behaviors.tsv`.
        names: those of the news, by number.
        account: is told what was read and left out.
        drop_ragged: see `read_news`.

    Raises:
        InputError: the file cannot be read, an impression does not say what was clicked, a time is
            none, or no impression is left.
    """
    path, odd = folder / BEHAVIORS, Counter[str]()
    number = {name: i for i, name in enumerate(names)}
    found: list[Impression] = []
    total = without = 0
    for line, (_, _, time, history, shown) in _lines(
        path, len(_BEHAVIOR_COLUMNS), odd, drop_ragged
    ):
        total += 1
        before = history.split()
        read = [number[name] for name in before if name in number]
        odd["unknown news in histories"] += len(before) - len(read)
        candidates, clicked = [], []
        for one in shown.split():
            name, _, mark = one.rpartition("-")
            if mark not in ("0", "1") or not name:
                raise InputError(
                    f"{path}, line {line}: {short(one)} does not say whether it was clicked; write "
                    "N123-1 or N123-0 (the test part of MIND has no clicks)"
                )
            if name not in number:
                odd["unknown news among those shown"] += 1
                continue
            candidates.append(number[name])
            clicked.append(mark == "1")
        if len(set(clicked)) < 2:
            odd["impressions in which all or nothing was clicked"] += 1
            continue
        without += not read
        found.append(
            Impression(
                _seconds(path, line, time),
                np.array(read, dtype=np.int64),
                np.array(candidates, dtype=np.int64),
                np.array(clicked),
            )
        )
    if not found:
        raise InputError(
            f"{path} has no impression of known news in which something was clicked and something "
            f"was not; is {NEWS} of the same set?"
        )
    account.note("impressions", f"{path}: {len(found):,} of {total:,}")
    if without:
        account.note("no history", f"{without:,} impressions")
    _note_dropped(account, odd)
    return found


def _lines(
    path: Path, width: int, odd: Counter[str], drop_ragged: bool
) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                cells = line.rstrip("\r\n").split("\t")
                if not line.strip():
                    continue
                if len(cells) == width:
                    yield number, cells
                elif drop_ragged:
                    odd["lines with too few or too many cells"] += 1
                else:
                    raise InputError(
                        f"{path}, line {number}: {len(cells)} cells between tabs, and the layout "
                        f"has {width}; repair it, or set data.ragged_rows: drop"
                    )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check data.path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8; convert it") from error


def _seconds(path: Path, line: int, time: str) -> float:
    try:
        return datetime.strptime(time.strip(), _TIME).replace(tzinfo=timezone.utc).timestamp()
    except ValueError as error:
        raise InputError(
            f"{path}, line {line}: {short(time)} is no time such as 11/15/2019 9:55:12 AM"
        ) from error


def _note_dropped(account: Account, odd: Counter[str]) -> None:
    for what, count in odd.items():
        if count:
            account.note("dropped", f"{count:,} {what}")
