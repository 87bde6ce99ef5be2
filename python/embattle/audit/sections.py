"""The sections of a report, each from the facts that it needs; one without facts is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit import html, verdict
from embattle.audit.figures import Chart, Line
from embattle.audit.html import Cell
from embattle.audit.words import (
    NONE,
    duration,
    finite,
    in_percent,
    number,
    percent,
    plural,
    threat_words,
    unit_words,
)

Facts = Mapping[str, Any]
CLEAN = "no attack"

# Longer tables of details are folded away.
MOST = 16
# So many comparisons are shown, folded away.
ALL = 300


def conditions(facts: Facts, model: str) -> dict[str, Mapping[str, Any]]:
    """What a model was judged under, with its figures: no attack, each attack, the worst."""
    found = facts["models"][model]
    every = {CLEAN: found["clean"], **found["attacks"]}
    return {**every, verdict.WORST: found["worst"]} if found.get("worst") else every


def interval(entry: Mapping[str, Any], key: str, *, share: bool = True) -> str:
    """A figure's interval, or nothing."""
    low, high = map(finite, (entry.get("intervals") or {}).get(key) or (None, None))
    if low is None or high is None:
        return ""
    digits = f"{low:.1%} to {high:.1%}" if share else f"{low:.3f} to {high:.3f}"
    return digits.replace("%", "", 1)


def counted(facts: Facts) -> str:
    """How many samples of which part there are, in words."""
    part = f"{facts['part']} " if facts.get("part") else ""
    return f"{facts['examples']:,} {part}{plural(facts['words']['sample'])}"


def first(facts: Facts) -> str:
    """The verdict, what it rests on, and the tiles."""
    said = verdict.verdict(facts)
    wrong, total = verdict.failed(facts), len(facts["checks"])
    badges = [("", counted(facts))]
    if total:
        told = f"{wrong} of {total} checks fail" if wrong else f"all {total} checks hold"
        badges.append(("bad" if wrong else "good", told))
    if facts.get("seed") is not None:
        badges.append(("", f"seed {facts['seed']}"))
    if finite(facts.get("audit_seconds")) is not None:
        badges.append(("", f"audit {duration(facts['audit_seconds'])}"))
    return html.headline(
        said.figure, said.caption, said.sentence, tone=said.tone, more=html.badges(badges)
    ) + _tiles(facts)


def _tiles(facts: Facts) -> str:
    key, name = verdict.headline(facts)
    models, samples = facts["models"], plural(facts["words"]["sample"])
    hurt = {model: verdict.strongest(facts, model) for model in models}
    labels = {label for label, _ in hurt.values()}
    one = labels.pop() if len(labels) == 1 else "the strongest attack"
    by = "all attacks together" if one == verdict.WORST else one
    under = f"the {one}" if one == verdict.WORST else one
    entries = [
        (
            f"{name.capitalize()} without attack",
            {m: percent(models[m]["clean"].get(key)) for m in models},
        ),
        (
            f"{name.capitalize()} under {under}",
            {m: percent(e.get(key)) for m, (_, e) in hurt.items()},
        ),
        (f"Flipped by {by}", {m: percent(e.get("success_rate")) for m, (_, e) in hurt.items()}),
    ]
    legends = [
        f"Of the {samples} as they are. Higher is better.",
        f"Of the {samples}, each moved within eps {facts['threat']['eps']:g}. Higher is better.",
        f"Of the {samples} that are right without attack, those that are wrong under it. "
        "Lower is better.",
    ]
    notes = [
        {m: interval(models[m]["clean"], key) for m in models},
        {m: interval(e, key) for m, (_, e) in hurt.items()},
        {m: interval(e, "success_rate") for m, (_, e) in hurt.items()},
    ]
    return html.tiles(entries, legends=legends, notes=notes)


def matrix(facts: Facts) -> str:
    """The headline measure: conditions in rows, models in columns."""
    key, name = verdict.headline(facts)
    models = list(facts["models"])
    rows = []
    every = {label: None for model in models for label in conditions(facts, model)}
    for label in every:
        row: list[str] = [label]
        for model in models:
            entry = conditions(facts, model).get(label, {})
            value = finite(entry.get(key))
            row.append(Cell(percent(value), value=value, note=interval(entry, key)))
        rows.append(row)
    head = ["attack", *(Cell(model, model=i) for i, model in enumerate(models))]
    some = any(interval(e, key) for m in models for e in conditions(facts, m).values())
    below = " Small print: the 95% interval." if some else ""
    return html.section(
        "Model against model",
        html.table(head, rows, sort=True, caption=f"{name} of each model under each attack"),
        _comparisons(facts),
        note=f"The share of the {plural(facts['words']['sample'])} that are right ({name}). "
        f"Attacks: {threat_words(facts)}.{below}",
    )


def _comparisons(facts: Facts) -> str:
    """Which models differ: the headline without attack and under the worst; folded, all."""
    every = list(facts.get("comparisons") or ())
    if not every:
        return ""
    key = verdict.headline(facts)[0]
    first = [e for e in every if e["measure"] == key and e["attack"] in (CLEAN, "worst")]
    with_base = [e for e in every if verdict.baseline(facts) in e["models"]]
    rest, cut = (every, "") if len(every) <= ALL else (with_base[:ALL], " (the rest: metrics.json)")
    tests, corrections = (
        ", ".join(dict.fromkeys(str(entry[name]) for entry in every if entry.get(name)))
        for name in ("test", "correction")
    )
    how = f" Tests: {tests}; corrected for their number by {corrections}." if tests else ""
    parts = [html.subheading("Are the differences more than chance?")]
    parts.append(html.paragraph(f"Second model less the first.{how}"))
    parts.append(compared(facts, first[:MOST]) if first else "")
    if len(first) < len(every) or len(first) > MOST:
        parts.append(html.box(f"{len(rest):,} comparisons{cut}", compared(facts, rest)))
    return "".join(parts)


def compared(facts: Facts, entries: Sequence[Mapping[str, Any]]) -> str:
    """A table of comparisons of two models each."""
    titles = dict(facts["measures"])
    rows = []
    for entry in entries:
        one, other = entry["models"]
        gain, sure = finite(entry.get("difference")), bool(entry["significant"])
        ends = {"intervals": {"difference": entry.get("interval")}}
        rows.append(
            [
                f"{one}, {other}",
                verdict.WORST if entry["attack"] == "worst" else entry["attack"],
                titles.get(entry["measure"], entry["measure"]),
                Cell(
                    NONE if gain is None else f"{gain:+.3f}",
                    value=gain,
                    note=interval(ends, "difference", share=False),
                ),
                _chance(entry.get("p")),
                _chance(entry.get("p_corrected")),
                Cell("clear" if sure else "may be chance", kind="sure" if sure else ""),
            ]
        )
    head = ["models", "under", "measure", "difference", "p", "p, corrected", "which is"]
    return html.table(head, rows, sort=True, caption="comparisons of models", text=[1, 2])


def _chance(value: Any) -> Cell:
    """A p-value, never written as none."""
    found = finite(value)
    small = found is not None and found < 0.0001
    return Cell("below 0.0001" if small else number(found, 4), value=found)


def curve(facts: Facts) -> Chart:
    """The headline measure over eps, all models."""
    key, name = verdict.headline(facts)
    lines, kinds = [], []
    for i, (model, found) in enumerate(facts["models"].items()):
        swept = found.get("sweep")
        if not swept or key not in swept:
            continue
        ends = (swept.get("intervals") or {}).get(key) or []
        low, high = [pair[0] for pair in ends], [pair[1] for pair in ends]
        marked = len(swept["eps"]) <= 30
        lines.append(Line(model, swept["eps"], swept[key], i, low=low, high=high, points=marked))
        kinds.append(str(swept.get("attack")))
    said = "; ".join(
        f"{line.name}: " + ", ".join(f"{in_percent(y)} at eps {x:g}" for x, y in line.known()[:12])
        for line in lines
    )
    chance = finite(facts.get("chance"))
    return Chart(
        title=f"{name.capitalize()} over eps",
        lines=lines,
        x_title=f"eps ({unit_words(facts)})",
        y_title=f"{name} under {', '.join(dict.fromkeys(kinds))}",
        x_mark=(facts["threat"]["eps"], "the threat's eps"),
        y_mark=None if chance is None else (chance, "most frequent class"),
        said=said,
    )


def over_eps(facts: Facts) -> str:
    """The curve with its numbers."""
    chart = curve(facts)
    if chart.empty:
        return ""
    smallest = any(
        (found.get("sweep") or {}).get("kind") == "minimum_norm"
        for found in facts["models"].values()
    )
    how = (
        "Of each example the smallest perturbation that turns it was looked for; it is wrong at "
        "every larger eps."
        if smallest
        else "An example that falls to a smaller eps counts as fallen at every larger one; so "
        "does, from the threat's eps on, what an attack of the table turned."
    )
    return html.section(
        chart.title, chart.html(), _numbers(chart, "eps"), note=f"{how} {_medians(facts)}".strip()
    )


def _medians(facts: Facts) -> str:
    """Half of the samples that are right fall below which eps, where that was looked for."""
    found = {
        model: finite((entry.get("sweep") or {}).get("median_eps"))
        for model, entry in facts["models"].items()
    }
    known = ", ".join(f"{value:.3g} ({name})" for name, value in found.items() if value is not None)
    return f"Half of those that were turned fell within eps {known}." if known else ""


def _numbers(chart: Chart, x: str) -> str:
    """A chart's points as a table, folded away."""
    places = sorted({place for line in chart.lines for place, _ in line.known()})
    if not places or len(places) > 60:
        return ""
    rows = []
    for place in places:
        row: list[str] = [Cell(f"{place:g}", value=place)]
        for line in chart.lines:
            value = dict(line.known()).get(place)
            row.append(Cell(percent(value), value=value))
        rows.append(row)
    head = [x, *(line.name for line in chart.lines)]
    return html.box("The curve's figures", html.table(head, rows, sort=True, caption=chart.title))


def measured(facts: Facts) -> list[tuple[str, str]]:
    """Keys and titles of the measures of a long table, the loss among them."""
    measures = [(key, title) for key, title in facts["measures"]]
    return measures if "loss" in dict(measures) else [*measures, ("loss", "loss")]


def figures(facts: Facts, entry: Mapping[str, Any]) -> list[str]:
    """The cells of those measures, and of the share that is flipped, with their intervals."""
    row: list[str] = []
    for key, _ in measured(facts):
        note = interval(entry, key, share=False)
        row.append(Cell(number(entry.get(key)), value=finite(entry.get(key)), note=note))
    rate = finite(entry.get("success_rate"))
    return [*row, Cell(percent(rate), value=rate, note=interval(entry, "success_rate"))]


def spent(entry: Mapping[str, Any]) -> Cell:
    """The cell of the seconds that it took."""
    seconds = finite(entry.get("seconds"))
    return Cell(NONE if seconds is None else f"{seconds:.1f} s", value=seconds)


def every_figure(facts: Facts) -> str:
    """All measures of all models under everything, in one long table."""
    calibrated = any(
        e.get("calibration") for m in facts["models"] for e in conditions(facts, m).values()
    )
    head = ["attack", "model", *(title for _, title in measured(facts)), "flipped"]
    head += ["ECE", "Brier"] * calibrated + ["mean norm", "time"]
    rows = []
    for i, model in enumerate(facts["models"]):
        for label, entry in conditions(facts, model).items():
            row = [label, Cell(model, model=i), *figures(facts, entry)]
            for key in ("ece", "brier") if calibrated else ():
                value = finite((entry.get("calibration") or {}).get(key))
                row.append(Cell(number(value), value=value))
            norm = entry.get("perturbation_norm")
            row.append(Cell(number(norm), value=finite(norm)))
            rows.append([*row, spent(entry)])
    models = facts["models"]
    norms = ", ".join(
        f"{number(found['vector_norm'])} ({name})"
        for name, found in models.items()
        if "vector_norm" in found
    )
    beside = (
        f" For comparison, the mean l2 norm of a {facts['words']['vector']} embedding: {norms}."
        if norms
        else ""
    )
    table = html.table(head, rows, sort=True, caption="all measures of all models", text=[1])
    return html.section(
        "Every attack, every measure",
        table if len(rows) <= MOST else html.box(f"All {len(rows)} rows", table),
        note=f"{facts.get('note') or ''} Flipped: share of the examples that are right and that "
        f"the attack turns. Mean norm: of the perturbations found, absolute.{beside}".strip(),
    )


def classes(facts: Facts) -> str:
    """Recall and the like of each class, without and under attack."""
    rows = []
    for i, model in enumerate(facts["models"]):
        before = facts["models"][model]["clean"].get("per_class") or {}
        hurt = verdict.strongest(facts, model)[1]
        after = hurt.get("per_class") or {}
        for name, found in before.items():
            under = after.get(name) or {}
            count = finite(found.get("count"))
            row: list[str] = [class_name(facts, name), Cell(model, model=i)]
            row.append(Cell(NONE if count is None else f"{count:,.0f}", value=count))
            for source, key in (
                *((found, "recall"), (under, "recall"), (found, "precision")),
                *((under, "precision"), (found, "f1"), (under, "f1")),
            ):
                value = finite(source.get(key))
                row.append(Cell(percent(value), value=value))
            rows.append(row)
    if not rows:
        return ""
    measures = ("recall", "precision", "F1")
    head = ["class", "model", "count", *(x for m in measures for x in (m, f"{m}, attacked"))]
    return html.section(
        "Class by class",
        html.table(head, rows, sort=True, caption="figures of each class", text=[1]),
        note="Attacked: under what hurts the model most. A class that is rarely found says more "
        "than a mean over classes: recall is the share of its examples that the model finds.",
    )


def class_name(facts: Facts, name: str) -> str:
    """A class with its column before it where its name alone says nothing, such as `1`."""
    column = facts.get("label")
    bare = name.strip().lower() in ("true", "false", "yes", "no", "y", "n") or _numeric(name)
    return f"{column}:\N{NO-BREAK SPACE}{name}" if column and bare else name


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
