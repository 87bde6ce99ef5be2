"""A copy of a table of texts with flipped labels or fake reviews, and its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embattle.data.labels import is_blank
from embattle.data.tables import Table
from embattle.errors import InputError, closest
from embattle.jobs.poisoned_copy import check_out, manifest_path, write_copy
from embattle.poisoning.reviews import SOURCES, Flips, fake_reviews, flip_labels, words_of
from embattle.progress import say

#: Labels exchanged at random, those of texts near the boundary, and reviews that nobody wrote.
KINDS = ("flip", "flip_near", "reviews")


@dataclass(frozen=True)
class ReviewPlan:
    """What is to be poisoned.

    Attributes:
        kind: one of `KINDS`.
        label: the column of labels.
        text: the columns of text; for `flip_near` none takes all but the label.
        item: the column of what is reviewed, for `reviews`.
        targets: what the fake reviews are about.
        source, goal: labels are flipped from this one, to this one; fake reviews have the latter.
        count: rows that are flipped or added.
        share: the same, per row with a label; .01 without `count`.
        seed: decides all draws.
    """

    kind: str
    label: str
    text: Sequence[str] = ()
    item: str | None = None
    targets: Sequence[str] = ()
    source: str | None = None
    goal: str | None = None
    count: int | None = None
    share: float | None = None
    seed: int = 0


def poison_reviews(
    path: Path,
    out: Path,
    plan: ReviewPlan,
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> None:
    """Write a table with flipped labels, or with fake reviews after the genuine rows.

    Args:
        path: the genuine table.
        out: the CSV file to write, with the columns of `path`; the record lies beside it.
        plan: what is poisoned.
        encoding, delimiter: of a text file.

    Raises:
        InputError: if either file is there already, the table cannot be read, or the plan does not
            go with it.
    """
    check_out(out, "the copy")
    _check(plan)
    read = _Read(path, plan, encoding, delimiter)
    labelled = sum(label is not None for label in read.labels)
    count = plan.count
    if count is None:
        share = 0.01 if plan.share is None else plan.share
        if not 0 < share <= 1:
            raise InputError(f"--share must be above 0 and at most 1, got {share}")
        count = max(1, round(share * labelled))
    elif plan.share is not None:
        raise InputError(f"--count {count} and --share {plan.share}; give one of them")
    facts: dict[str, Any] = {"kind": plan.kind, "label": plan.label, "seed": plan.seed}
    how = {"encoding": encoding, "delimiter": delimiter}
    if plan.kind == "reviews":
        rows = read.fakes(count)
        genuine = len(read.labels)
        facts |= {
            "text": list(plan.text),
            "item": plan.item,
            "targets": list(plan.targets),
            "given": plan.goal,
            "genuine_rows": genuine,
            "fake_rows": list(range(genuine, genuine + count)),
        }
        write_copy(path, out, lambda start, cells: None, lambda names: rows, lambda: facts, **how)
        say(f"{out}: {count:,} fake reviews added")
    else:
        flips = flip_labels(
            read.labels,
            count,
            texts=read.words if plan.kind == "flip_near" else None,
            source=plan.source,
            goal=plan.goal,
            seed=plan.seed,
        )
        facts |= {
            "rows": len(read.labels),
            "flipped": [
                {"row": row, "before": before, "after": after}
                for row, before, after in zip(
                    flips.rows.tolist(), flips.before, flips.after, strict=True
                )
            ],
        }
        look = _Exchange(flips, plan.label)
        write_copy(path, out, look, lambda names: (), lambda: facts, **how)
        say(f"{out}: {count:,} of {labelled:,} labels flipped")
    say(f"{manifest_path(out)}: which (rows are counted from 0, without the header)")


def _check(plan: ReviewPlan) -> None:
    """Refuse what does not go together."""
    fake = plan.kind == "reviews"
    if plan.kind not in KINDS:
        raise InputError(f"--kind {plan.kind!r}; {closest(plan.kind, KINDS)}")
    if not fake and (plan.item is not None or plan.targets):
        raise InputError(f"--item and --targets are for --kind reviews, not {plan.kind}")
    if not fake:
        return
    if plan.source is not None:
        raise InputError("--from is for flipped labels; fake reviews have the label of --to")
    if not plan.text or plan.goal is None:
        raise InputError("--kind reviews needs --text (the columns of text) and --to (their label)")
    if bool(plan.targets) != (plan.item is not None):
        raise InputError("--targets says what the reviews are about, in the column of --item")


class _Exchange:
    """Puts flipped labels into a copy."""

    def __init__(self, flips: Flips, column: str) -> None:
        self._after = dict(zip(flips.rows.tolist(), flips.after, strict=True))
        self._column = column

    def __call__(self, start: int, cells: dict[str, list[str]]) -> None:
        column = cells[self._column]
        for i in range(len(column)):
            column[i] = self._after.get(start + i, column[i])


class _Read:
    """What is needed of a table: all labels, and words, texts or facts of the targets.

    Attributes:
        labels: of each row, None where it is blank.
        words: of each row, for `flip_near`.
    """

    def __init__(
        self, path: Path, plan: ReviewPlan, encoding: str | None, delimiter: str | None
    ) -> None:
        self._plan = plan
        self.labels: list[str | None] = []
        self.words: list[list[str]] = []
        self._texts: dict[str, list[str]] = {name: [] for name in plan.text}
        self._items: set[str] = set()
        # Of each target, the columns in which all its rows say the same.
        self._same: dict[str, dict[str, str | None]] = {}
        named = [plan.label, *plan.text, *([plan.item] if plan.item else [])]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise InputError(f"column {twice[0]!r} is named twice; each has one purpose")
        everything = plan.kind == "reviews" or (plan.kind == "flip_near" and not plan.text)
        table = Table(path, named, encoding=encoding, delimiter=delimiter)
        if everything:
            names = table.names or None
            table = Table(path, names, encoding=encoding, delimiter=delimiter)
        for block in table:
            self._add(block)
        missing = [name for name in plan.targets if name not in self._items]
        if missing:
            raise InputError(
                f"--targets: column {plan.item!r} has no {missing[0]!r}; "
                f"{closest(missing[0], sorted(self._items))}"
            )

    def _add(self, block: dict[str, list[Any]]) -> None:
        plan = self._plan
        labels = [None if is_blank(x) else str(x).strip() for x in block[plan.label]]
        self.labels += labels
        text = {
            name: ["" if is_blank(x) else str(x).strip() for x in column]
            for name, column in block.items()
            if name != plan.label
        }
        if plan.kind == "flip_near":
            for row in range(len(labels)):
                if plan.text:
                    self.words.append(words_of(" ".join(text[name][row] for name in plan.text)))
                else:
                    self.words.append([f"{name}={cells[row]}" for name, cells in text.items()])
        if plan.kind != "reviews":
            return
        for name, kept in self._texts.items():
            room = SOURCES - len(kept)
            found = [x for x, label in zip(text[name], labels, strict=True) if label == plan.goal]
            kept += [x for x in found if x][:room]
        if plan.item is None:
            return
        self._items.update(text[plan.item])
        for row, item in enumerate(text[plan.item]):
            if item in plan.targets:
                own = {name: cells[row] for name, cells in text.items() if name not in plan.text}
                same = self._same.setdefault(item, dict(own))
                for name, cell in own.items():
                    if same.get(name) != cell:
                        same[name] = None

    def fakes(self, count: int) -> list[dict[str, str]]:
        """Fake rows; what all rows of a target say of it, they say too."""
        plan = self._plan
        if plan.goal not in self.labels:
            known = sorted({label for label in self.labels if label is not None})
            raise InputError(
                f"--to: no row is labelled {plan.goal!r}; {closest(str(plan.goal), known)}"
            )
        made = {
            name: fake_reviews(texts, count, seed=plan.seed + place)
            for place, (name, texts) in enumerate(self._texts.items())
        }
        rows = []
        for i in range(count):
            row = {name: texts[i] for name, texts in made.items()}
            row[plan.label] = str(plan.goal)
            if plan.item is not None:
                target = plan.targets[i % len(plan.targets)]
                row |= {name: cell for name, cell in self._same[target].items() if cell}
            rows.append(row)
        return rows
