"""Sections on what the figures are worth and where they come from: checks, training, data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from embattle.audit import html, verdict
from embattle.audit.figures import Chart
from embattle.audit.html import Cell
from embattle.audit.sections import class_name
from embattle.audit.words import NONE, brief, duration, finite, plural

Facts = Mapping[str, Any]

# More checks that hold than these are folded away.
MOST = 12


def trust(facts: Facts) -> str:
    """The honesty checks, and what they cannot show."""
    wrong, total = verdict.failed(facts), len(facts["checks"])
    failing = [check for check in facts["checks"] if not check["passed"]]
    holding = [check for check in facts["checks"] if check["passed"]]
    name = verdict.headline(facts)[1]
    attacks = ", ".join(verdict.attacks(facts))
    count = facts["examples"]
    least = verdict.margin(0.8, 0.8, count)
    # Where the audit compared the models itself, its tests say more than a rule of thumb.
    chance = (
        ""
        if facts.get("comparisons")
        else f": with {count:,} examples, differences below {least:.1%} say nothing"
    )
    limits = (
        f"The models are judged by {attacks}, which see everything (weights, gradients, labels), "
        "and the worst outcome of each example counts. Still, an attack shows that an example can "
        f"be fooled, never that it cannot: {name} under attack is an upper bound. Moving "
        f"embeddings is also more than changing a {facts['words']['sample']} allows. And this is "
        f"one run with one seed{chance}."
    )
    many = len(holding) > MOST
    if wrong:
        said = f"{wrong} of {total} checks fail: do not trust the figures above."
    elif total:
        said = f"All {total} checks on the attacks hold."
    else:
        said = "No check was made on the attacks."
    return html.section(
        "How far to trust this",
        html.checks(failing) if wrong else "",
        html.box(f"The {total - wrong} checks that hold", html.checks(holding)) if many else "",
        html.checks(holding) if holding and not many else "",
        html.paragraph(limits),
        note=said,
    )


def training(facts: Facts, losses: Chart | None) -> str:
    """What training cost, and the losses."""
    spent = verdict.costs(facts)
    rows = []
    for i, (model, cost) in enumerate(spent.items()):
        times, passes = cost["times"], cost["passes"]
        words = (facts.get("variants") or {}).get(model, "")
        rows.append(
            [
                Cell(model, model=i),
                words,
                Cell(duration(cost["seconds"]), value=cost["seconds"]),
                Cell(NONE if times is None else f"{verdict.in_times(times)} x", value=times),
                Cell(NONE if passes is None else f"{verdict.in_times(passes)} x", value=passes),
            ]
        )
    head = ["model", "trained on", "time", "time, relative", "passes, relative"]
    if not any(cost["passes"] is not None for cost in spent.values()):
        head, rows = head[:-1], [row[:-1] for row in rows]
    known = any(cost["seconds"] is not None for cost in spent.values()) or facts.get("variants")
    table = html.table(head, rows, sort=True, caption="cost of training", text=[1])
    chart = "" if losses is None else losses.html()
    if not known and not chart:
        return ""
    return html.section(
        "Training",
        table if known else "",
        chart,
        note=f"Relative: beside {verdict.baseline(facts)}." if known else "",
    )


def data(facts: Facts) -> str:
    """What was read and dropped, and how many examples of what each part has."""
    parts = [_counts(facts)]
    lines = facts.get("reading") or ()
    if lines:
        parts.append(html.box("What was read, line by line", html.source("\n".join(lines))))
    known = {k: v for k, v in (facts.get("facts") or {}).items() if k != "kind"}
    if known:
        rows = [[name, _shown(value)] for name, value in known.items()]
        table = html.table(["", ""], rows, text=[1], caption="facts")
        parts.append(html.box("What the models depend on", table))
    shown = [part for part in parts if part]
    warned = [line for line in lines if line.startswith("warning: ")]
    if not shown:
        return ""
    return html.section("What the models read", *map(html.paragraph, warned), *shown)


def _counts(facts: Facts) -> str:
    """Examples by part; where a task tells them by class, those too."""
    kind = (facts.get("facts") or {}).get("kind") or {}
    names = [class_name(facts, str(name)) for name in kind.get("classes") or ()]
    divided: dict[str, dict[str, Any]] = {}
    for part, found in (facts.get("counts") or {}).items():
        if isinstance(found, Mapping):
            divided[part] = {str(name): value for name, value in found.items()}
        elif isinstance(found, list):
            called = (
                names if len(names) == len(found) else [f"class {i}" for i in range(len(found))]
            )
            divided[part] = dict(zip(called, found, strict=True))
        else:
            divided[part] = {"": found}
    columns = list(dict.fromkeys(name for found in divided.values() for name in found if name))
    rows = []
    for part, found in divided.items():
        total = sum(value for value in map(finite, found.values()) if value is not None)
        rows.append([part, *(_count(found.get(name)) for name in columns), _count(total)])
    if not rows:
        return ""
    head = ["part", *columns, plural(facts["words"]["sample"])]
    return html.table(head, rows, sort=True, caption="counts of examples")


def _count(value: Any) -> Cell:
    found = finite(value)
    return Cell(
        "" if value is None else brief(value) if found is None else f"{found:,.0f}", value=found
    )


def _shown(value: Any, most: int = 2000) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    elif isinstance(value, list):
        text = ", ".join(_shown(item) for item in value)
    else:
        text = brief(value)
    return text if len(text) <= most else f"{text[:most]}…"


def origin(facts: Facts, settings: str) -> str:
    """Command, fingerprint, settings and environment, folded away."""
    rows = [[name, str(value)] for name, value in (facts.get("environment") or {}).items()]
    for name in ("fingerprint", "schema"):
        if facts.get(name) is not None:
            rows.append([name, str(facts[name])])
    parts = []
    if facts.get("command"):
        parts.append(html.box("Command", html.source(shlex.join(map(str, facts["command"])))))
    if settings:
        parts.append(html.box("Settings: the recipe with every value", html.source(settings)))
    if rows:
        table = html.table(["", ""], rows, text=[1], caption="environment")
        parts.append(html.box("Environment and fingerprint", table))
    return html.section("How it was made", *parts) if parts else ""
