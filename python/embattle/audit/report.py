"""What the report says: from the facts of an audit to a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit import html

UNITS = {
    "token_norm": "in mean norms of a token embedding",
    "mean_norm": "in mean norms of a group",
    "absolute": "absolute",
}


def summary_rows(facts: dict[str, Any]) -> list[list[str]]:
    """The table standard against hardened: one row for no attack, and one for each attack."""
    rows = []
    for label in ("no attack", *_attacks(facts)):
        row = [label]
        for model in facts["models"].values():
            entry = model["clean"] if label == "no attack" else model["attacks"][label]
            row += [f"{entry[key]:.3f}" for key in ("accuracy", "f1", "auc")]
            row.append(f"{entry['success_rate']:.1%}" if "success_rate" in entry else "")
        rows.append(row)
    return rows


def threat_words(threat: Mapping[str, Any]) -> str:
    """The threat in a sentence.

    Args:
        threat: `norm`, `eps`, `unit` and `group`, as in the recipe's section.
    """
    who = "each text as a whole" if threat["group"] == "sample" else "each token on its own"
    ball = f"{threat['norm']} ball of eps {threat['eps']:g}"
    return f"{ball} ({UNITS[threat['unit']]}) around {who}"


def document(
    facts: dict[str, Any],
    *,
    settings: str,
    trained_against: str,
    curves: bytes,
    losses: bytes,
    samples: Sequence[Sequence[str]],
) -> str:
    """The whole page.

    Args:
        facts: what `metrics.json` holds.
        settings: the recipe, as text.
        trained_against: the attack that the hardened model was trained against, in words.
        curves: the picture of accuracy over eps, a PNG.
        losses: the picture of the training losses, a PNG.
        samples: rows of the table of examples: text, label, and four confidences, those of wrong
            predictions `html.Fallen`.

    Returns:
        HTML.
    """
    title = f"{facts['name']}: robustness report"
    lead = (
        f"A model trained as usual and one hardened under the same budget, on {facts['examples']} "
        f"{facts['part']} examples that neither has seen. Seed {facts['seed']}."
    )
    environment = [[name, str(value)] for name, value in facts["environment"].items()]
    sections = [
        html.heading(title, lead),
        _tiles(facts),
        _comparison(facts),
        html.section(
            "Accuracy over eps",
            html.picture(curves, "accuracy over eps, both models"),
            note="An example that falls to a smaller eps counts as fallen at every larger one.",
        ),
        _deeds(facts),
        _examples(facts, samples),
        _trust(facts, trained_against),
        html.section("Training", html.picture(losses, "training losses, both models")),
        html.section("Settings", html.source(settings)),
        html.section("Environment", html.table(["", ""], environment, text=[1])),
    ]
    return html.page(title, [part for part in sections if part])


def _attacks(facts: dict[str, Any]) -> list[str]:
    return list(next(iter(facts["models"].values()))["attacks"])


def _tiles(facts: dict[str, Any]) -> str:
    """The three figures at the head."""
    models, last = facts["models"], _attacks(facts)[-1]

    def pair(*keys: str) -> tuple[str, str]:
        shown = []
        for value in models.values():
            for key in keys:
                value = value[key]
            shown.append(f"{value:.1%}")
        return shown[0], shown[1]

    return html.tiles(
        [
            ("Accuracy without attack", *pair("clean", "accuracy")),
            (f"Accuracy under {last}", *pair("attacks", last, "accuracy")),
            (f"Flipped by {last}", *pair("attacks", last, "success_rate")),
        ]
    )


def _comparison(facts: dict[str, Any]) -> str:
    columns = ["accuracy", "F1", "AUC", "flipped"]
    return html.section(
        "Standard against hardened",
        html.table(
            ["", *columns, *columns],
            summary_rows(facts),
            groups=[("", 1), *((name, len(columns)) for name in facts["models"])],
        ),
        note=f"Attacks: {threat_words(facts['threat'])}. F1 is the mean over the classes. Flipped: "
        "share of the rightly classified examples that the attack turns.",
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
    norms = ", ".join(f"{models[name]['token_norm']:.3f} ({name})" for name in models)
    return html.section(
        "What each attack did",
        html.table(
            ["attack and model", "mean norm", "loss before", "loss under it", "flipped", "time"],
            rows,
        ),
        note="Mean norm: of the perturbations found, absolute. For comparison, the mean l2 norm of "
        f"a token embedding: {norms}.",
    )


def _examples(facts: dict[str, Any], samples: Sequence[Sequence[str]]) -> str:
    if not samples:
        return ""
    return html.section(
        "Examples",
        html.table(
            ["text", "label", "before", "under attack", "before", "under attack"],
            samples,
            groups=[("", 2), *((name, 2) for name in facts["models"])],
            text=[0],
        ),
        note=f"Confidence in the true label, before and under {_attacks(facts)[-1]}: the first "
        "examples that both models get right and that the attack turns on the standard one.",
    )


def _trust(facts: dict[str, Any], trained_against: str) -> str:
    """The honesty checks, and what they cannot show."""
    failed = sum(not check["passed"] for check in facts["checks"])
    total, count = len(facts["checks"]), facts["examples"]
    verdict = f"{failed} of {total} checks fail: do not trust the figures above."
    limits = (
        f"The hardened model was trained against {trained_against}; it is judged by "
        f"{', '.join(_attacks(facts))}, which see everything (weights, gradients, labels), and the "
        "worst outcome of each example counts. Still, an attack shows that an example can be "
        "fooled, never that it cannot: accuracies under attack are upper bounds. Moving embeddings "
        "is also more than rewriting a text allows. And this is one run with one seed: with "
        f"{count} examples, differences below {_margin(count):.1%} say nothing."
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
