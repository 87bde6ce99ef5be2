"""What the report says: from the facts of an audit (`metrics.json`) to a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit import html


def unit_words(facts: Mapping[str, Any]) -> str:
    """What eps counts in."""
    vector = facts["words"]["vector"]
    return {
        "token_norm": f"in mean norms of a {vector} embedding",
        "mean_norm": "in mean norms of a group",
        "absolute": "absolute",
    }[facts["threat"]["unit"]]


def summary_rows(facts: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    """The table of some models: one row for no attack, and one for each attack."""
    rows = []
    for label in ("no attack", *_attacks(facts)):
        row = [label]
        for model in (facts["models"][name] for name in names):
            entry = model["clean"] if label == "no attack" else model["attacks"][label]
            row += [f"{entry[key]:.3f}" for key, _ in facts["measures"]]
            row.append(f"{entry['success_rate']:.1%}" if "success_rate" in entry else "")
        rows.append(row)
    return rows


def threat_words(facts: Mapping[str, Any]) -> str:
    """The threat in a sentence."""
    threat, words = facts["threat"], facts["words"]
    whole = threat["group"] == "sample"
    who = f"each {words['sample']} as a whole" if whole else f"each {words['vector']} on its own"
    ball = f"{threat['norm']} ball of eps {threat['eps']:g}"
    return f"{ball} ({unit_words(facts)}) around {who}"


def document(
    facts: dict[str, Any],
    *,
    settings: str,
    curves: bytes,
    losses: bytes,
    samples: Sequence[Sequence[str]],
) -> str:
    """The whole page.

    Args:
        facts: what `metrics.json` holds.
        settings: the recipe, as text.
        curves: the picture of accuracy over eps, a PNG.
        losses: the picture of the training losses, a PNG.
        samples: rows of the table of examples: sample, label, and each model's two outputs, those
            of wrong predictions `html.Fallen`.

    Returns:
        HTML.
    """
    title = f"{facts['name']}: robustness report"
    lead = (
        f"{len(facts['models'])} models, trained under the same budget, on {facts['examples']} "
        f"{facts['part']} examples that none of them has seen. Seed {facts['seed']}."
    )
    environment = [[name, str(value)] for name, value in facts["environment"].items()]
    sections = [
        html.heading(title, lead),
        _tiles(facts),
        _comparison(facts),
        html.section(
            f"{_headline(facts).capitalize()} over eps",
            html.picture(curves, f"{_headline(facts)} over eps, all models"),
            note="An example that falls to a smaller eps counts as fallen at every larger one; so "
            "does, from the threat's eps on, what an attack of the table turned.",
        ),
        _deeds(facts),
        _examples(facts, samples),
        _trust(facts),
        html.section("Training", html.picture(losses, "training losses, all models")),
        html.section("Settings", html.source(settings)),
        html.section("Environment", html.table(["", ""], environment, text=[1])),
    ]
    return html.page(title, [part for part in sections if part])


def _headline(facts: dict[str, Any]) -> str:
    """What the share of samples that are right is called."""
    title: str = facts["measures"][0][1]
    return title


def _attacks(facts: dict[str, Any]) -> list[str]:
    return list(next(iter(facts["models"].values()))["attacks"])


def _tiles(facts: dict[str, Any]) -> str:
    """The three figures at the head."""
    models, last = facts["models"], _attacks(facts)[-1]
    key, name = facts["measures"][0]

    def share(*keys: str) -> dict[str, str]:
        shown = {}
        for model, value in models.items():
            for key in keys:
                value = value[key]
            shown[model] = f"{value:.1%}"
        return shown

    return html.tiles(
        [
            (f"{name.capitalize()} without attack", share("clean", key)),
            (f"{name.capitalize()} under {last}", share("attacks", last, key)),
            (f"Flipped by {last}", share("attacks", last, "success_rate")),
        ]
    )


def _comparison(facts: dict[str, Any]) -> str:
    columns = [*(title for _, title in facts["measures"]), "flipped"]
    return html.section(
        "Model against model",
        html.table(
            ["", *columns * len(facts["models"])],
            summary_rows(facts, list(facts["models"])),
            groups=[("", 1), *((name, len(columns)) for name in facts["models"])],
        ),
        note=f"Attacks: {threat_words(facts)}. {facts['note']} Flipped: share of the examples that "
        "are right and that the attack turns.",
    )


def _deeds(facts: dict[str, Any]) -> str:
    """What each attack did."""
    models = facts["models"]
    rows = []
    for label in _attacks(facts):
        for name in models:
            entry = models[name]["attacks"][label]
            rows.append(
                [
                    f"{label}, {name}",
                    f"{entry['perturbation_norm']:.3f}",
                    f"{models[name]['clean']['loss']:.3f}",
                    f"{entry['loss']:.3f}",
                    f"{entry['success_rate']:.1%}",
                    f"{entry['seconds']:.1f} s",
                ]
            )
    norms = ", ".join(f"{models[name]['vector_norm']:.3f} ({name})" for name in models)
    return html.section(
        "What each attack did",
        html.table(
            ["attack and model", "mean norm", "loss before", "loss under it", "flipped", "time"],
            rows,
        ),
        note="Mean norm: of the perturbations found, absolute. For comparison, the mean l2 norm of "
        f"a {facts['words']['vector']} embedding: {norms}.",
    )


def _examples(facts: dict[str, Any], samples: Sequence[Sequence[str]]) -> str:
    if not samples:
        return ""
    return html.section(
        "Examples",
        html.table(
            [
                facts["words"]["sample"],
                "label",
                *["before", "under attack"] * len(facts["models"]),
            ],
            samples,
            groups=[("", 2), *((name, 2) for name in facts["models"])],
            text=[0],
        ),
        note=f"{facts['shown'].capitalize()}, before and under {_attacks(facts)[-1]}: the first "
        "examples that all models get right and that the attack turns on the standard one.",
    )


def _trust(facts: dict[str, Any]) -> str:
    """The honesty checks, and what they cannot show."""
    failed = sum(not check["passed"] for check in facts["checks"])
    total, count = len(facts["checks"]), facts["examples"]
    verdict = f"{failed} of {total} checks fail: do not trust the figures above."
    trained = "; ".join(f"{name}: {words}" for name, words in facts["variants"].items())
    limits = (
        f"What the models were trained on: {trained}. They are judged by "
        f"{', '.join(_attacks(facts))}, which see everything (weights, gradients, labels), and the "
        "worst outcome of each example counts. Still, an attack shows that an example can be "
        f"fooled, never that it cannot: {_headline(facts)} under attack is an upper bound. Moving "
        f"embeddings is also more than changing a {facts['words']['sample']} allows. And this is "
        f"one run with one seed: with {count} examples, differences below {_margin(count):.1%} say "
        "nothing."
    )
    return html.section(
        "How far to trust this",
        html.checks(facts["checks"]),
        html.paragraph(limits),
        note=verdict if failed else f"All {total} checks on the attacks hold.",
    )


def _margin(count: int) -> float:
    """Two standard errors of the difference of two accuracies near 0.8 on `count` examples."""
    return 2 * math.sqrt(2 * 0.8 * 0.2 / count)
