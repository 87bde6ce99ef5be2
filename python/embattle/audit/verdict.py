"""What an audit comes to: one figure and a few sentences, said from its facts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embattle.audit.words import NONE, among, finite, in_percent, plural

#: The model that the others are compared with, where a run has it.
STANDARD = "standard"
WORST = "worst of all attacks"

# By the key of the first measure: what is counted, and how it is said of so many samples.
_KEPT = {
    "accuracy": "{count} of {base} {samples} right",
    "all_right": "{count} of {base} {samples} right in every label",
    "within": "{count} of {base} predictions close enough",
    "hit_rate": "the right item among the recommended ones for {count} of {base} {samples}",
}


# What a point of the first measure is a point of.
_POINTS = {"all_right": "wholly right answers", "within": "close predictions"}


@dataclass(frozen=True)
class Verdict:
    """The page's first words.

    Attributes:
        figure: the one figure.
        caption: what it is.
        sentence: what the audit says.
        tone: `good`, `bad`, or nothing.
    """

    figure: str
    caption: str
    sentence: str
    tone: str


def headline(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Key and title of the share of samples that are right."""
    key, title = facts["measures"][0]
    return key, title


def attacks(facts: Mapping[str, Any]) -> list[str]:
    """The labels of the attacks."""
    return list(next(iter(facts["models"].values()))["attacks"])


def baseline(facts: Mapping[str, Any]) -> str:
    """The model that the others are compared with: the standard one, or the first."""
    names = [str(name) for name in facts["models"]]
    return STANDARD if STANDARD in names else names[0]


def strongest(facts: Mapping[str, Any], model: str) -> tuple[str, Mapping[str, Any]]:
    """The label and the figures of what hurts a model most.

    Each sample's worst over all attacks where the audit has it, else the attack that leaves the
    fewest samples right.
    """
    found, key = facts["models"][model], headline(facts)[0]
    if found.get("worst"):
        return WORST, found["worst"]
    known = {label: finite(entry.get(key)) for label, entry in found["attacks"].items()}
    label = min(known, key=lambda name: math.inf if known[name] is None else known[name] or 0.0)
    return label, found["attacks"][label]


def robust(facts: Mapping[str, Any], model: str) -> float | None:
    """The share of samples that stays right under what hurts a model most."""
    return finite(strongest(facts, model)[1].get(headline(facts)[0]))


def clean(facts: Mapping[str, Any], model: str) -> float | None:
    """The share of samples that is right without an attack."""
    return finite(facts["models"][model]["clean"].get(headline(facts)[0]))


def best(facts: Mapping[str, Any]) -> str:
    """The model, other than the baseline, of which most stays right; the first of equal ones."""
    others = [str(name) for name in facts["models"] if name != baseline(facts)]
    return max(others or [baseline(facts)], key=lambda name: robust(facts, name) or 0.0)


def costs(facts: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """What each model's training cost.

    Returns:
        Model to `seconds`, `times` the baseline's, and `passes` through the model, relative to the
        baseline's; None where it is not known.
    """
    told, seconds = facts.get("cost") or {}, facts.get("train_seconds") or {}
    spent = {
        name: finite((told.get(name) or {}).get("seconds", seconds.get(name)))
        for name in facts["models"]
    }
    base = spent[baseline(facts)]
    return {
        name: {
            "seconds": spent[name],
            "times": (spent[name] or 0.0) / base if base and spent[name] is not None else None,
            "passes": finite((told.get(name) or {}).get("passes_relative")),
        }
        for name in facts["models"]
    }


def in_times(ratio: float) -> str:
    """A ratio of times or passes: what is near 1 is told apart from it."""
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}"


def failed(facts: Mapping[str, Any]) -> int:
    """How many checks on the attacks fail."""
    return sum(not check["passed"] for check in facts["checks"])


def clear(facts: Mapping[str, Any], first: str, second: str, under: str) -> bool:
    """Whether two models' shares differ by more than chance would have it.

    The audit's own comparison decides where there is one; else two standard errors of the
    difference, as if the models had been judged on different samples.

    Args:
        facts: the audit's.
        first, second: the models.
        under: `no attack`, or `worst` for what hurts each model most.
    """
    key = headline(facts)[0]
    for entry in facts.get("comparisons") or ():
        pair, measure = set(entry["models"]), entry.get("measure", key)
        if (pair, entry["attack"], measure) == ({first, second}, under, key):
            return bool(entry["significant"])
    value = clean if under == "no attack" else robust
    a, b = value(facts, first), value(facts, second)
    if a is None or b is None:
        return False
    return abs(a - b) > margin(a, b, facts["examples"])


def margin(first: float, second: float, count: int) -> float:
    """Two standard errors of the difference of two shares of `count` samples each."""
    spread = first * (1 - first) + second * (1 - second)
    return 2 * math.sqrt(spread / max(1, count))


def verdict(facts: Mapping[str, Any]) -> Verdict:
    """What the audit says of its models."""
    wrong, total = failed(facts), len(facts["checks"])
    others = [name for name in facts["models"] if name != baseline(facts)]
    model = best(facts)
    share = robust(facts, model)
    caption = _caption(facts, model)
    if share is None or (others and robust(facts, baseline(facts)) is None):
        sentence, tone = "The attacks gave no figure to judge the models by.", ""
    elif others:
        sentence, tone = _compared(facts, others, model)
    else:
        sentence, tone = _alone(facts, model), ""
    if wrong:
        fail = "fails" if wrong == 1 else "fail"
        sentence = (
            f"Do not trust these figures: {wrong} of {total} checks on the attacks {fail}, so the "
            f"models may be weaker than they look. Taken at face value: {sentence}"
        )
        tone = "bad"
    return Verdict(NONE if share is None else in_percent(share), caption, sentence, tone)


def _caption(facts: Mapping[str, Any], model: str) -> str:
    whose = "" if len(facts["models"]) == 1 else f", {model}"
    return f"{headline(facts)[1]} under {_attacker(facts).replace('The', 'the')}{whose}"


def _alone(facts: Mapping[str, Any], model: str) -> str:
    before, after = clean(facts, model), robust(facts, model)
    assert after is not None
    if before is None:
        return f"{_attacker(facts)} leaves {_kept(facts, [after])[0]}."
    (kept, _), counts = _kept(facts, [after, before]), _counts(facts, [after, before])[0]
    return f"{_attacker(facts)} leaves {kept}; without an attack it is {counts[1]}."


def _attacker(facts: Mapping[str, Any]) -> str:
    return "The strongest attack" if len(attacks(facts)) > 1 else "The attack"


def _compared(facts: Mapping[str, Any], others: Sequence[str], model: str) -> tuple[str, str]:
    """The sentences about the best of the other models beside the baseline, and their tone."""
    base = baseline(facts)
    shares = [robust(facts, model) or 0.0, robust(facts, base) or 0.0]
    kept, count = _kept(facts, shares)[0], _counts(facts, shares)[0][1]
    under = f"under {_attacker(facts).replace('The', 'the')}"
    plain = "the standard model" if base == STANDARD else f"“{base}”"
    hardened = others == ["hardened"] and base == STANDARD
    it = f"the best, “{model}”," if len(others) > 1 else "it"
    figures = f"{under} {it} keeps {kept}, {plain} {count}"
    if not clear(facts, model, base, "worst"):
        if hardened:
            start = "Hardening did not clearly help here"
        elif len(others) > 1:
            start = f"No model is clearly more robust than {plain}"
        else:
            start = f"“{model}” is not clearly more robust than {plain}"
        said, tone = f"{start}: {figures}; such a difference may be chance.", ""
    elif shares[0] < shares[1]:
        if hardened:
            start = "Hardening made things worse here"
        elif len(others) > 1:
            start = f"All other models are less robust than {plain}"
        else:
            start = f"“{model}” is less robust than {plain}"
        said, tone = f"{start}: {figures}.", "bad"
    else:
        if hardened:
            said = f"Hardening keeps {kept} {under}; without it, {count}."
        elif len(others) > 1:
            said = (
                f"Of {len(others)} models beside {plain}, “{model}” holds best: {under} it keeps "
                f"{kept}, {plain} {count}."
            )
        else:
            said = f"“{model}” keeps {kept} {under}, {plain} {count}."
        tone = "good"
    return f"{said} {_cost(facts, model)}".strip(), tone


def _kept(facts: Mapping[str, Any], shares: Sequence[float]) -> list[str]:
    """What stays right of how many, for each share."""
    counts, base = _counts(facts, shares)
    key, title = headline(facts)
    samples = plural(facts["words"]["sample"])
    if key not in _KEPT:
        return [f"{count} of {base} {samples} ({title})" for count in counts]
    return [_KEPT[key].format(count=count, base=base, samples=samples) for count in counts]


def _counts(facts: Mapping[str, Any], shares: Sequence[float]) -> tuple[list[str], str]:
    return among(shares, facts["examples"])


def _cost(facts: Mapping[str, Any], model: str) -> str:
    """What the model costs in accuracy and time, beside the baseline."""
    parts = [_lost(facts, model)]
    times = costs(facts)[model]["times"]
    if times is not None:
        if abs(times - 1) < 0.05:
            parts.append("no more training time")
        else:
            parts.append(f"{in_times(times)} times the training time")
    said = [part for part in parts if part]
    return f"It costs {' and '.join(said)}." if said else ""


def _lost(facts: Mapping[str, Any], model: str) -> str:
    """What the model loses without an attack, in points."""
    base = baseline(facts)
    before, after = clean(facts, base), clean(facts, model)
    if before is None or after is None:
        return ""
    key, title = headline(facts)
    points, title = 100 * (before - after), _POINTS.get(key, title)
    chance = "" if clear(facts, model, base, "no attack") else " (which may be chance)"
    if abs(points) < 0.05:
        return f"no {title} without an attack"
    if points < 0:
        return f"no {title} without an attack (it gains {-points:.1f} points)"
    unit = "point" if f"{points:.1f}" == "1.0" else "points"
    return f"{points:.1f} {unit} of {title} without an attack{chance}"
