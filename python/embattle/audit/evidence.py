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
#: Whose certificates are those of no model of the run; no model can be called so.
ENSEMBLE = "ensemble of MF"


def certificates(facts: Facts) -> str:
    """What is proven beside what attacks reached, over eps; one chart for each kind of proof."""
    kinds: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for model, found in {**facts["models"], ENSEMBLE: facts}.items():
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
    lines, models = [], [*facts["models"], ENSEMBLE]
    for model, entry in entries.items():
        place, eps = models.index(model), entry["eps"]
        lines.append(Line(f"{model}, certified", eps, entry["certified"], place))
        if entry.get("attacked"):
            lines.append(Line(f"{model}, attacked", eps, entry["attacked"], place, dashed=True))
    some = next(iter(entries.values()))
    key, title_of_first = verdict.headline(facts)
    measure = str(some.get("measure") or key)
    return Chart(
        title=title,
        lines=lines,
        x_title=f"eps ({some['unit']})" if some.get("unit") else "eps",
        y_title=title_of_first if measure == key else measure,
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
    shown = str(facts.get("shown") or "output")
    cut = f" Read by the model: {' '.join(read[0].split()[4:])}." if read else ""
    return html.section(
        "Examples",
        f'<div class="cards">{"".join(made)}</div>',
        note=f"{shown.capitalize()}, before and under {verdict.attacks(facts)[-1]}; what is wrong "
        "is marked ✗. The first examples that all models get right and that the attack turns on "
        f"{verdict.baseline(facts)}.{cut}",
    )


def _outcome(text: str) -> str:
    wrong = isinstance(text, Cell) and text.kind == "fell"
    return f'<span class="fell">✗ {escape(text)}</span>' if wrong else escape(text)


def _true(facts: Facts, label: str) -> str:
    return f"{facts['label']}: {label}" if facts.get("label") else f"true label: {label}"


def explanations(facts: Facts) -> str:
    """What carried the perturbations, where it lies in samples, swaps, and the loss around."""
    found, word = [], facts["words"]["vector"]
    for place, (model, entry) in enumerate(facts["models"].items()):
        told = entry.get("explanations") or {}
        charts = [_carried(told, word, place), _landscape(told.get("landscape") or {})]
        shown = [
            f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "",
            _heats(told.get("samples") or ()),
            _swaps(told.get("swaps") or ()),
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
        note=f"Which {plural(word)} carry the rise of the loss that an attack makes, and where: "
        "the stronger the colour, the larger the share. What held the loss down has a share below "
        "0, and is underlined.",
    )


def _carried(told: Mapping[str, Any], word: str, place: int) -> str:
    known = [(str(e["name"]), finite(e.get("share"))) for e in told.get("carried") or ()]
    rows = [(name, share) for name, share in known if share is not None][:MOST]
    by = f", under {told['attack']}" if told.get("attack") else ""
    over = f", mean of {told['averaged']}" if told.get("averaged") else ""
    return bars(rows, f"{plural(word)} that carry most{by}{over}", place) if rows else ""


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
    shares = [finite(piece.get("share")) or 0.0 for piece in pieces]
    top = max(map(abs, shares), default=0.0) or 1.0
    said = "".join(
        f'<span class="{"held" if share < 0 else f"h{min(4, int(5 * share / top))}"}" '
        f'title="{percent(share)}">{escape(str(piece["name"]))}</span> '
        for piece, share in zip(pieces, shares, strict=True)
    )
    return f'<p class="heats" dir="auto">{said}</p>'


def _swaps(swaps: Sequence[Mapping[str, Any]]) -> str:
    """Texts before and after real words were exchanged, with what is predicted of each."""
    cards = []
    for swap in swaps:
        outcomes = [
            f"{brief(prediction)} ({shown})" if shown else brief(prediction)
            for prediction, shown in zip(
                swap["predictions"], swap.get("shown") or ("", ""), strict=False
            )
        ]
        label = escape(f"true label: {swap['label']}")
        right = swap.get("right") or (True, True)
        told = [
            f'<span class="fell">✗ {escape(text)}</span>' if not good else escape(text)
            for text, good in zip(outcomes, right, strict=False)
        ]
        cards.append(
            f'<article class="card"><p class="label">{label}</p>'
            f'<p class="words" dir="auto">{_marked(swap, "before")}</p>'
            f'<p class="words after" dir="auto">{_marked(swap, "after")}</p>'
            f'<dl class="outcomes"><div><dt>prediction</dt><dd>{" → ".join(told)}</dd></div></dl>'
            "</article>"
        )
    if not cards:
        return ""
    return (
        html.subheading("Exchanged words")
        + html.paragraph(
            "Real words in place of perturbed ones. Read them: a word may change what a text says, "
            "and its label with it."
        )
        + f'<div class="cards">{"".join(cards)}</div>'
    )


def _marked(swap: Mapping[str, Any], which: str) -> str:
    """One of a swap's texts, with the exchanged words marked where it is known which."""
    text, made, end = str(swap[which]), [], 0
    for start, stop in sorted(map(tuple, swap.get(f"{which}_marks") or ())):
        if end <= start < stop <= len(text):
            made += [escape(text[end:start]), f"<mark>{escape(text[start:stop])}</mark>"]
            end = stop
    return "".join([*made, escape(text[end:])])


def _landscape(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    marks = {"clean": (0.0, 0.0)}
    if found.get("edge"):
        marks["attack"] = (1.0, 0.0)
    inside = " Inside the broken line is what the attacker may do." if found.get("edge") else ""
    return heat_map(
        found["x"],
        found["y"],
        found["z"],
        title="The loss around",
        note=f"Up: a {found.get('second', 'random')} direction.{inside}",
        x_title="along the attack",
        edge=found.get("edge") or (),
        marks=marks,
    )
