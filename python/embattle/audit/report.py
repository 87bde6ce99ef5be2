"""What the report says: from the facts of an audit (`metrics.json`) to a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit import columns, evidence, html, provenance, sections, verdict
from embattle.audit.figures import losses_over_steps
from embattle.audit.words import number, percent


def summary_rows(facts: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """The table of some models: one row for no attack, and one for each attack."""
    rows = []
    for label in (sections.CLEAN, *verdict.attacks(facts)):
        row = [label]
        for name in names:
            entry = sections.conditions(facts, name)[label]
            row += [number(entry[key]) for key, _ in facts["measures"]]
            row.append(percent(entry["success_rate"]) if "success_rate" in entry else "")
        rows.append(row)
    return rows


def document(
    facts: Mapping[str, Any],
    *,
    settings: str = "",
    histories: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    samples: Sequence[Sequence[str]] = (),
) -> str:
    """The whole page. What the facts do not have is left out.

    Args:
        facts: what `metrics.json` holds.
        settings: the recipe, as text.
        histories: model to the figures of each training step.
        samples: examples: sample, label, and each model's two outputs, those of wrong predictions
            `html.Fallen`.

    Returns:
        HTML.
    """
    title, models = str(facts["name"]), facts["models"]
    several = f"{len(models)} models" if len(models) > 1 else "A model"
    lead = f"{several} on {sections.counted(facts)}."
    if facts.get("part"):  # of what was trained elsewhere nothing is known
        budget = ", trained under the same budget," if len(models) > 1 else ""
        lead = f"{several}{budget} on {sections.counted(facts)} that training has not seen."
    losses = losses_over_steps(histories) if histories else None
    parts = [
        html.heading(title, lead, above="Robustness report"),
        sections.first(facts),
        sections.matrix(facts),
        sections.over_eps(facts),
        columns.section(facts),
        evidence.certificates(facts),
        sections.classes(facts),
        evidence.examples(facts, samples),
        evidence.explanations(facts),
        sections.every_figure(facts),
        provenance.trust(facts),
        provenance.training(facts, losses),
        provenance.data(facts),
        provenance.origin(facts, settings),
    ]
    parts[:2] = ["\n".join(parts[:2])]
    return html.page(f"{title}: robustness report", [part for part in parts if part], contents=True)
