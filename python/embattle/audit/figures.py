"""Pictures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from embattle.errors import need

#: Of the models, in their order; they begin again where there are more models.
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#334155")


def colour(number: int) -> str:
    """The colour of a model, by its place among the models."""
    return COLOURS[number % len(COLOURS)]


def accuracy_over_eps(
    curves: Mapping[str, Sequence[float]],
    eps: Sequence[float],
    *,
    trained: float,
    chance: float | None,
    unit: str,
    attack: str,
    measure: str = "accuracy",
) -> bytes:
    """Accuracy of each model, or what corresponds, over the attack's radius.

    Args:
        curves: model to accuracies, one for each value of `eps`.
        eps: the radii, growing, the first being 0.
        trained: the radius of the threat.
        chance: accuracy of always naming the most frequent class; None: not shown.
        unit: what eps counts in, for the axis.
        attack: the attack's name, for the title.
        measure: what the accuracies are called.

    Returns:
        A PNG.
    """
    figure, axes = _canvas(7.2, 4.2)
    axes.axvline(trained, color="#64748b", linewidth=1, linestyle="--")
    axes.text(trained, 1.01, " threat", color="#475569", fontsize=9, va="bottom", ha="center")
    if chance is not None:
        axes.axhline(chance, color="#cbd5e1", linewidth=1)
        where = {"ha": "right", "va": "bottom"}
        axes.text(eps[-1], chance, "most frequent class", color="#94a3b8", fontsize=8, **where)
    for number, (name, values) in enumerate(curves.items()):
        axes.plot(
            eps,
            values,
            marker="o",
            markersize=5,
            linewidth=2.2,
            label=name,
            color=colour(number),
        )
    if len(curves) == 2:
        axes.fill_between(eps, *curves.values(), alpha=0.08, color=colour(1), linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, eps[-1])
    axes.set_xlabel(f"eps ({unit})")
    axes.set_ylabel(f"{measure} under {attack}")
    axes.legend(frameon=False, loc="best")
    return _png(figure)


def losses_over_steps(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """The smoothed training losses of each model.

    Args:
        histories: model to the figures of each step: `loss`, and `robust_loss` where there is one.

    Returns:
        A PNG.
    """
    figure, axes = _canvas(7.2, 3.2)
    for number, (name, history) in enumerate(histories.items()):
        for key, style in (("loss", "-"), ("robust_loss", ":")):
            values = [row[key] for row in history if key in row]
            if values:
                label = name if key == "loss" else f"{name}, under attack"
                axes.plot(
                    range(1, len(values) + 1),
                    _smooth(values),
                    style,
                    color=colour(number),
                    linewidth=1.8,
                    label=label,
                )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (smoothed)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over a tenth of the steps, of what came before."""
    width = max(1, len(values) // 10)
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    figure = need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#94a3b8")
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#475569", labelsize=9)
    return figure, axes


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return stream.getvalue()
