"""The section on attacks that change what rows of a table say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit import html, sections, verdict
from embattle.audit.html import Cell
from embattle.audit.words import NONE, brief, finite, number, percent, plural

Facts = Mapping[str, Any]


def section(facts: Facts) -> str:
    """Figures, how models compare, which columns were changed, and rows before and after."""
    found = {name: entry.get("columns") or {} for name, entry in facts["models"].items()}
    labels = list(dict.fromkeys(label for under in found.values() for label in under))
    if not labels:
        return ""
    key = verdict.headline(facts)[0]
    compared = [
        entry
        for entry in facts.get("comparisons") or ()
        if entry["attack"] in labels and entry["measure"] == key
    ]
    parts = [_figures(facts, found)]
    if compared:
        parts += [
            html.paragraph("Second model less the first."),
            sections.compared(facts, compared),
        ]
    for label in labels:
        under = {name: entry[label] for name, entry in found.items() if label in entry}
        parts += [html.subheading(label), _changed(facts, label, under)]
        for name, entry in under.items():
            rows = _rows(entry.get("examples") or ())
            if rows:
                head = ["changed", "true label", "before", "under attack"]
                shown = html.table(head, rows, text=[0, 1, 2, 3], caption=f"{label}: {name}")
                parts.append(html.box(f"Rows before and after: {name}", shown))
    samples = plural(facts["words"]["sample"])
    return html.section(
        "Changed columns",
        *parts,
        note=f"An attacker who changes what the {samples} say, within a budget of columns, not "
        "their embeddings. This is in no ball of the threat: it counts neither in the worst of all "
        "attacks nor in the curve nor in the checks on this page.",
    )


def _figures(facts: Facts, found: Mapping[str, Mapping[str, Any]]) -> str:
    titles = [title for _, title in sections.measured(facts)]
    rows = []
    for place, (model, under) in enumerate(found.items()):
        for label, entry in {sections.CLEAN: facts["models"][model]["clean"], **under}.items():
            cells = sections.figures(facts, entry)
            rows.append([label, Cell(model, model=place), *cells, sections.spent(entry)])
    head = ["attack", "model", *titles, "flipped", "time"]
    return html.table(head, rows, sort=True, text=[1], caption="figures where columns are changed")


def _changed(facts: Facts, label: str, under: Mapping[str, Mapping[str, Any]]) -> str:
    """How often each column was exchanged, and how far numbers were moved."""
    places = {name: place for place, name in enumerate(facts["models"])}
    rows = []
    for kind, shown in (("swapped", percent), ("noise", number)):
        names = dict.fromkeys(c for entry in under.values() for c in entry.get(kind) or {})
        for column in names:
            row: list[str] = [column]
            for entry in under.values():
                value = finite((entry.get(kind) or {}).get(column))
                unit = " sd" if kind == "noise" and value is not None else ""
                row.append(Cell(f"{shown(value)}{unit}", value=value))
            # A column of numbers that the attack leaves alone says nothing.
            if kind == "swapped" or any(
                finite((entry.get("noise") or {}).get(column)) for entry in under.values()
            ):
                rows.append(row)
    head = ["column", *(Cell(name, model=places[name]) for name in under)]
    told = "In how many rows each column was exchanged"
    moved = any((entry.get("noise") or {}) for entry in under.values())
    told += "; how far numbers were moved, in standard deviations (sd), on average" * moved
    return html.paragraph(f"{told}.") + html.table(
        head, rows, sort=True, caption=f"{label}: columns changed"
    )


def _rows(examples: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for one in examples:
        said = [
            f"{column}: {before} → {one['after'].get(column, NONE)}"
            for column, before in one["before"].items()
        ]
        said += [
            f"{column} {moved:+.2f} sd"
            for column, value in (one.get("noise") or {}).items()
            if (moved := finite(value))
        ]
        before, after = map(brief, one["predictions"])
        rows.append(["; ".join(said), brief(one["label"]), before, html.Fallen(after)])
    return rows
