"""An audit's facts as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embattle.audit.report import summary_rows
from embattle.audit.scores import CLEAN, WORST
from embattle.audit.words import threat_words


def summary_lines(facts: dict[str, Any]) -> list[str]:
    """Tables of the models, how they compare, and the checks that fail.

    Args:
        facts: what `metrics.json` holds.
    """
    seed = "" if facts["seed"] is None else f", seed {facts['seed']}"
    part = f" {facts['part']}" if facts["part"] else ""
    lines = [
        f"{facts['name']}{seed}, {facts['examples']}{part} examples",
        f"attacks: {threat_words(facts)}",
    ]
    titles = [*(title for _, title in facts["measures"]), "flipped"]
    widths = [max(7, len(title) + 2) for title in titles]
    columns = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    names = list(facts["models"])
    # Two models stand side by side.
    for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
        rows = summary_rows(facts, pair)
        first = max(len(row[0]) for row in rows)
        lines += ["", " " * first + "".join(f"{name:^{len(columns)}}" for name in pair).rstrip()]
        lines.append(" " * first + columns * len(pair))
        for row in rows:
            every = zip(row[1:], widths * len(pair), strict=True)
            cells = "".join(f"{cell:>{width}}" for cell, width in every)
            lines.append(f"{row[0]:<{first}}{cells}".rstrip())
    lines += ["", *_worst(facts), *_differences(facts["comparisons"], facts["measures"][0])]
    for check in facts["checks"]:
        if not check["passed"]:
            lines.append(f"check fails: {check['name']} ({check['detail']})")
    held = sum(check["passed"] for check in facts["checks"])
    lines.append(f"checks on the attacks: {held} of {len(facts['checks'])} hold")
    return lines


def figure(entry: Mapping[str, Any], key: str) -> str:
    """A measure with its interval, if it has one."""
    value, interval = entry.get(key), entry.get("intervals", {}).get(key)
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if interval is None else " [{:.3f}, {:.3f}]".format(*interval))


def _worst(facts: dict[str, Any]) -> list[str]:
    """What is left of each model when the worst attack on each sample counts."""
    key, title = facts["measures"][0]
    return [
        f"{name}: {title} {figure(model['clean'], key)} without attack, "
        f"{figure(model['worst'], key)} under the worst attack on each {facts['words']['sample']}"
        for name, model in facts["models"].items()
    ]


def _differences(comparisons: Sequence[Mapping[str, Any]], headline: Sequence[str]) -> list[str]:
    """How pairs of models differ in the headline, without attack and under the worst."""
    key, title = headline
    lines = []
    for one in comparisons:
        if one["measure"] != key or one["attack"] not in (CLEAN, WORST):
            continue
        lines.append(difference_words(one, title))
    return lines


def difference_words(comparison: Mapping[str, Any], title: str) -> str:
    """One comparison of two models in a line.

    Args:
        comparison: an entry of `comparisons`.
        title: the measure's.
    """
    first, second = comparison["models"]
    interval, gain = comparison["interval"], comparison["difference"]
    about = "" if interval is None else " [{:+.3f}, {:+.3f}]".format(*interval)
    sure = "" if comparison["significant"] else ", which may be chance"
    return (
        f"{second} against {first}, {comparison['attack']}: {title} {gain:+.3f}{about}, p "
        f"{comparison['p_corrected']:.2g} ({comparison['test']}, {comparison['correction']}){sure}"
    )
