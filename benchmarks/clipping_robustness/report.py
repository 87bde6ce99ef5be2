"""The results as a Markdown page and a picture."""

from __future__ import annotations

import io
import math
import statistics
from typing import Any

from embattle.errors import need

UNITS = {"none": "none", "sample": "per sample", "user": "per user"}
COLOURS = {"none": "#334155", "sample": "#1d4ed8", "user": "#c2410c"}


def markdown(record: dict[str, Any]) -> str:
    """The page: a table for each task."""
    about = record["about"]
    lines = [
        "# What clipping buys",
        "",
        f"{about['date']}, {about['seeds']} seeds, mean ± standard deviation; "
        f"`{about['command']}` ({about['seconds']:.0f} s, {about['threads']} thread, torch "
        f"{about['torch']}).",
        "",
        "`max_norm` is given over the median norm of the plain model's units. Learning rate, "
        "epochs and strength were chosen on clean validation data; bold: the smallest `max_norm` "
        f"whose clean validation figure is at most {100 * about['tolerance']:g}% worse than "
        "without clipping.",
    ]
    for task in record["tasks"]:
        lines += ["", f"## {task['name']}", "", task["about"], ""]
        lines += [f"- {name}: {what}" for name, what in task["attacks"].items()]
        lines += ["", *table(task)]
    return "\n".join(lines) + "\n"


def table(task: dict[str, Any]) -> list[str]:
    """One line for each arm."""
    figures = task["arms"][0]["figures"]
    columns = [(attack, figure) for attack in task["attacks"] for figure in figures[attack]]
    heads = [f"{figure}, {'no attack' if a == 'none' else a}" for a, figure in columns]
    lines = [
        "| clipping | max_norm | rate, epochs | " + " | ".join(heads) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for arm in task["arms"]:
        share = "-" if math.isinf(arm["share"]) else f"{arm['share']:g} x median"
        name = UNITS[arm["unit"]]
        cells = [f"{_mean(arm, c):.3f} ± {_spread(arm, c):.3f}" for c in columns]
        head = f"**{name}**" if arm["chosen"] else name
        lines.append(
            f"| {head} | {share} | {arm['rate']:g}, {arm['epochs']} | " + " | ".join(cells) + " |"
        )
    return lines


def figure(record: dict[str, Any]) -> bytes:
    """A PNG: for each task and attack, the harm over the clean quality, one point for each arm."""
    panels = [
        (task, attack) for task in record["tasks"] for attack in task["attacks"] if attack != "none"
    ]
    rows = -(-len(panels) // 3)
    size = (10.8, 3.6 * rows)
    canvas = need("matplotlib.figure", "test").Figure(figsize=size, layout="constrained")
    for place, (task, attack) in enumerate(panels, 1):
        axes = canvas.add_subplot(rows, 3, place)
        quality = task["quality"]
        harm = next((f for f in task["arms"][0]["figures"][attack] if f != quality), quality)
        for unit, colour in COLOURS.items():
            arms = [arm for arm in task["arms"] if arm["unit"] == unit]
            if not arms:
                continue
            x, y = ("none", quality), (attack, harm)
            axes.errorbar(
                [_mean(arm, x) for arm in arms],
                [_mean(arm, y) for arm in arms],
                xerr=[_spread(arm, x) for arm in arms],
                yerr=[_spread(arm, y) for arm in arms],
                color=colour,
                marker="o",
                linewidth=1,
                capsize=2,
                label=UNITS[unit],
            )
            for arm in arms:
                if not math.isinf(arm["share"]):
                    axes.annotate(
                        f"{arm['share']:g}",
                        (_mean(arm, x), _mean(arm, y)),
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=8,
                        color=colour,
                    )
        axes.set_title(f"{task['name']}: {attack}", fontsize=10)
        axes.set_xlabel(f"{quality}, no attack", fontsize=9)
        axes.set_ylabel(f"{harm} under attack", fontsize=9)
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def _mean(arm: dict[str, Any], column: tuple[str, str]) -> float:
    return statistics.fmean(arm["figures"][column[0]][column[1]])


def _spread(arm: dict[str, Any], column: tuple[str, str]) -> float:
    values = arm["figures"][column[0]][column[1]]
    return statistics.stdev(values) if len(values) > 1 else 0.0
