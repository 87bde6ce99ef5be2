"""Sections that show rather than count: proofs beside attacks, examples, and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit import html, verdict
from embattle.audit.figures import Chart, Line, colour
from embattle.audit.html import Cell
from embattle.audit.pictures import bars, heat_map
from embattle.audit.words import NONE, brief, duration, escape, finite, percent, plural

Facts = Mapping[str, Any]

# Of what carried a perturbation, so many are shown.
MOST = 12


def certificates(facts: Facts) -> str:
    """What is proven beside what attacks reached, over eps; one chart for each kind of proof."""
    kinds: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for model, found in facts["models"].items():
        for entry in found.get("certificates") or ():
            kinds.setdefault((entry["kind"], entry["title"]), {})[model] = entry
    parts = []
    for (_, title), entries in kinds.items():
        chart = _proofs(facts, title, entries)
        notes = dict.fromkeys(str(e["note"]) for e in entries.values() if e.get("note"))
        spent = ", ".join(
            f"{model} {duration(entry['seconds'])}"
            for model, entry in entries.items()
            if finite(entry.get("seconds")) is not None
        )
        said = " ".join([*notes, f"Computed in: {spent}." if spent else ""]).strip()
        parts += [html.subheading(title), html.paragraph(said) if said else "", chart.html()]
        parts.append(_proven(entries))
    if not parts:
        return ""
    return html.section(
        "What is proven",
        *parts,
        note="An attack shows what can be turned, a proof what cannot: the truth lies between the "
        "certified share and the attacked one.",
    )


def _proofs(facts: Facts, title: str, entries: Mapping[str, Mapping[str, Any]]) -> Chart:
    lines, models = [], list(facts["models"])
    for model, entry in entries.items():
        place, eps = models.index(model), entry["eps"]
        lines.append(Line(f"{model}, certified", eps, entry["certified"], place))
        if entry.get("attacked"):
            lines.append(Line(f"{model}, attacked", eps, entry["attacked"], place, dashed=True))
    some = next(iter(entries.values()))
    return Chart(
        title=title,
        lines=lines,
        x_title=f"eps ({some['unit']})" if some.get("unit") else "eps",
        y_title=str(some.get("measure") or verdict.headline(facts)[1]),
        said="The share that is certified for each model, and dashed the share that attacks left.",
    )


def _proven(entries: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for model, entry in entries.items():
        attacked = entry.get("attacked") or [None] * len(entry["eps"])
        for eps, proven, left in zip(entry["eps"], entry["certified"], attacked, strict=False):
            rows.append(
                [
                    model,
                    Cell(f"{eps:.4g}", value=eps),
                    Cell(percent(proven), value=finite(proven)),
                    Cell(percent(left), value=finite(left)),
                ]
            )
    head = ["model", "eps", "certified", "under attack"]
    table = html.table(head, rows, sort=True, caption="certified and attacked shares")
    return html.box("The certificates' figures", table)


def examples(facts: Facts, samples: Sequence[Sequence[str]]) -> str:
    """Samples that the attack turns, each with every model's outputs before and after.

    Args:
        facts: the audit's.
        samples: sample, label, and each model's two outputs; those of wrong predictions `Fallen`.
    """
    if not samples:
        return ""
    made = []
    for text, label, *outputs in samples:
        rows = "".join(
            f'<div><dt class="m{colour(i)}" dir="auto">{escape(model)}</dt>'
            f"<dd>{_outcome(outputs[2 * i])} → {_outcome(outputs[2 * i + 1])}</dd></div>"
            for i, model in enumerate(facts["models"])
        )
        made.append(
            f'<article class="card"><p class="label" dir="auto">'
            f"{escape(_true(facts, label))}</p>{html.clipped(text)}"
            f'<dl class="outcomes">{rows}</dl></article>'
        )
    read = [line for line in facts.get("reading") or () if line.startswith("read by the model")]
    cut = f" Read by the model: {' '.join(read[0].split()[4:])}." if read else ""
    return html.section(
        "Examples",
        f'<div class="cards">{"".join(made)}</div>',
        note=f"{facts['shown'].capitalize()}, before and under {verdict.attacks(facts)[-1]}; what "
        "is wrong is marked ✗. The first examples that all models get right and that the attack "
        f"turns on {verdict.baseline(facts)}.{cut}",
    )


def _outcome(text: str) -> str:
    wrong = isinstance(text, Cell) and text.kind == "fell"
    return f'<span class="fell">✗ {escape(text)}</span>' if wrong else escape(text)


def _true(facts: Facts, label: str) -> str:
    return f"{facts['label']}: {label}" if facts.get("label") else f"true label: {label}"


def explanations(facts: Facts) -> str:
    """What carried the perturbations, where they lie in samples, swaps, and the loss around one."""
    found, word = [], facts["words"]["vector"]
    for place, (model, entry) in enumerate(facts["models"].items()):
        told = entry.get("explanations") or {}
        charts = [_carried(told.get("carried") or (), word, place)]
        charts.append(_landscape(told.get("landscape") or {}))
        shown = [
            f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "",
            _heats(told.get("samples") or ()),
            _swaps(told.get("swaps") or (), word),
        ]
        if any(shown):
            found.append((model, place, "\n".join(part for part in shown if part)))
    if not found:
        return ""
    parts = [
        html.box(model, shown)
        if len(found) > 2
        else f'<h3 class="m{colour(place)}" dir="auto">{escape(model)}</h3>\n{shown}'
        for model, place, shown in found
    ]
    return html.section(
        "How the attack works",
        *parts,
        note=f"Which {plural(word)} carry the perturbation, and where: the stronger the colour, "
        "the larger the share.",
    )


def _carried(entries: Sequence[Mapping[str, Any]], word: str, place: int) -> str:
    known = [(str(entry["name"]), finite(entry.get("share"))) for entry in entries]
    rows = [(name, share) for name, share in known if share is not None][:MOST]
    return bars(rows, f"{plural(word)} that carry most", place) if rows else ""


def _heats(samples: Sequence[Mapping[str, Any]]) -> str:
    cards = []
    for sample in samples:
        pieces = sample.get("parts")
        label = sample.get("label")
        titled = "" if label is None else f'<p class="label">{escape(f"true label: {label}")}</p>'
        before, after = (
            brief(sample[key]) if key in sample else NONE for key in ("before", "after")
        )
        cards.append(
            f'<article class="card">{titled}'
            + (_heat(pieces) if pieces else html.clipped(str(sample.get("text", ""))))
            + '<dl class="outcomes"><div><dt>before → under attack</dt>'
            f"<dd>{escape(before)} → {escape(after)}</dd></div></dl></article>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _heat(pieces: Sequence[Mapping[str, Any]]) -> str:
    """Parts of a sample, coloured in five steps by their share beside the largest."""
    shares = [abs(finite(piece.get("share")) or 0.0) for piece in pieces]
    top = max(shares) or 1.0
    said = "".join(
        f'<span class="h{min(4, int(5 * share / top))}" title="{percent(share)}">'
        f"{escape(str(piece['name']))}</span> "
        for piece, share in zip(pieces, shares, strict=True)
    )
    return f'<p class="heats" dir="auto">{said}</p>'


def _swaps(swaps: Sequence[Mapping[str, Any]], word: str) -> str:
    rows = []
    for swap in swaps:
        first, second = swap["predictions"]
        rows.append(
            [
                str(swap["before"]),
                str(swap["after"]),
                str(swap["label"]),
                brief(first),
                brief(second),
            ]
        )
    if not rows:
        return ""
    head = ["before", "after", "label", "predicted before", "predicted after"]
    return html.paragraph(f"Real {plural(word)} near the attack's perturbed ones:") + html.table(
        head, rows, text=[0, 1], caption="swaps"
    )


def _landscape(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    return heat_map(
        found["x"],
        found["y"],
        found["z"],
        title="Loss around one example",
        x_title="along the attack's direction",
        y_title="a random direction",
    )
