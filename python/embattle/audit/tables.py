"""Tables of a report: sortable, with a sticky first column, and cards on narrow screens."""

from __future__ import annotations

from collections.abc import Sequence

from embattle.audit.figures import colour
from embattle.audit.terms import term
from embattle.audit.words import NONE, escape, finite


class Cell(str):
    """A table's cell with more than its text.

    Attributes:
        value: what the column is sorted by, in place of the text.
        note: said below in small print, such as an interval.
        kind: how it is marked: `fell`, `good`, `bad`, or nothing.
        model: the place of the model whose colour it has.
    """

    value: float | None
    note: str
    kind: str
    model: int | None

    def __new__(
        cls,
        text: str,
        *,
        value: float | None = None,
        note: str = "",
        kind: str = "",
        model: int | None = None,
    ) -> Cell:
        made = super().__new__(cls, text)
        made.value, made.note, made.kind, made.model = value, note, kind, model
        return made


class Fallen(Cell):
    """A cell's text that is marked: the attack turned this prediction."""

    def __new__(cls, text: str) -> Fallen:
        made = super().__new__(cls, text, kind="fell")
        assert isinstance(made, Fallen)
        return made


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    groups: Sequence[tuple[str, int]] = (),
    text: Sequence[int] = (),
    sort: bool = False,
    caption: str = "",
) -> str:
    """A table of plain strings, which on a narrow screen becomes a card for each row.

    Args:
        head: the columns' names; known terms are explained.
        rows: the cells, plain or `Cell`; those that are `Fallen` are marked.
        groups: names of models above the columns, each with the number of columns it spans; ""
            is none.
        text: the columns that are set as running text.
        sort: whether it can be sorted by a column.
        caption: what it shows, for those who hear the page.
    """
    models = [name for name, _ in groups if name]
    over = "".join(
        f'<th role="columnheader" colspan="{span}" class="group{_model_of(name, models)}" '
        f'dir="auto">{escape(name)}</th>'
        for name, span in groups
    )
    top = "".join(
        f'<th role="columnheader" scope="col"{_head_kind(cell, i in text)}>{term(cell)}</th>'
        for i, cell in enumerate(head)
    )
    labels = _labels(head, groups)
    body = "".join(
        '<tr role="row">'
        + "".join(_cell(cell, i, labels, i in text) for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    above = f'<tr role="row">{over}</tr>' if groups else ""
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    name = escape(caption or "table")
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">'
        f'<table role="table"{" data-sort" if sort else ""}>{said}'
        f'<thead role="rowgroup">{above}<tr role="row">{top}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></div>'
    )


def _labels(head: Sequence[str], groups: Sequence[tuple[str, int]]) -> list[str]:
    """What is said before each cell where there are no columns: model and name."""
    spans = [name for name, span in groups for _ in range(span)]
    spans += [""] * (len(head) - len(spans))
    return [f"{group}: {name}" if group else name for group, name in zip(spans, head, strict=False)]


def _model_of(name: str, models: Sequence[str]) -> str:
    return f" m{colour(models.index(name))}" if name else ""


def _head_kind(cell: str, text: bool) -> str:
    kinds = ["text"] if text else []
    if isinstance(cell, Cell) and cell.model is not None:
        kinds.append(f"m{colour(cell.model)}")
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _cell(cell: str, place: int, labels: Sequence[str], text: bool) -> str:
    made = cell if isinstance(cell, Cell) else Cell(cell)
    kinds = [made.kind] if made.kind else []
    kinds += ["text"] if text else []
    kinds += ["long"] if text and len(cell) > 40 else []
    kinds += ["none"] if cell in ("", NONE) else []
    kinds += [f"m{colour(made.model)}"] if made.model is not None else []
    kind = f' class="{escape(" ".join(kinds))}"' if kinds else ""
    label = labels[place] if place < len(labels) else ""
    named = f' data-label="{escape(label)}"' if label else ""
    value = "" if finite(made.value) is None else f' data-value="{made.value!r}"'
    shown = term(cell) if place == 0 and not text else escape(cell)
    inside = f"{shown}{small(made.note)}"
    if place == 0:
        return f'<th role="rowheader" scope="row"{kind}{value} dir="auto">{inside}</th>'
    return f'<td role="cell"{kind}{named}{value} dir="auto">{inside}</td>'


def small(text: str) -> str:
    """Small print after a figure; nothing for nothing."""
    return f" <small>{escape(text)}</small>" if text else ""
