"""Small pictures of a report, as SVG: bars beside figures, and heat maps."""

from __future__ import annotations

from collections.abc import Sequence

from embattle.audit.figures import colour
from embattle.audit.words import escape, finite, percent


def meter(share: float, model: int | None = None) -> str:
    """A bar for a share between 0 and 1; the text beside it says what it shows."""
    kind = "plain" if model is None else f"m{colour(model)}"
    return (
        '<svg class="meter" aria-hidden="true"><rect class="track" width="100%" height="100%"/>'
        f'<rect class="{kind} full" width="{100 * min(1.0, max(0.0, share)):.1f}%" height="100%"/>'
        "</svg>"
    )


def bars(entries: Sequence[tuple[str, float]], title: str, model: int = 0) -> str:
    """A figure of names with a bar each, the longest of full length; the values are shares."""
    top = max((abs(share) for _, share in entries), default=0.0) or 1.0
    rows = "".join(
        f'<div><dt dir="auto">{escape(name)}</dt><dd><svg class="meter" aria-hidden="true">'
        f'<rect class="m{colour(model)} full" width="{100 * abs(share) / top:.1f}%" '
        f'height="100%"/></svg><span>{percent(share)}</span></dd></div>'
        for name, share in entries
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<dl class="bars">{rows}</dl></figure>'
    )


def heat_map(
    x: Sequence[float],
    y: Sequence[float],
    z: Sequence[Sequence[float | None]],
    *,
    title: str,
    x_title: str,
    y_title: str,
) -> str:
    """Values over a plane, the stronger the colour the higher; the place (0, 0) is marked.

    Args:
        x, y: the columns' and the rows' places, growing, W and H of them.
        z: the values, [H][W].
        title, x_title, y_title: what is said.
    """
    known = [value for row in z for value in map(finite, row) if value is not None]
    if not known or len(x) < 2 or len(y) < 2:
        return ""
    low, high = min(known), max(known)
    wide, tall = 100 / len(x), 100 / len(y)
    cells = []
    for i, row in enumerate(z):
        for j, value in enumerate(map(finite, row)):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.0
            cells.append(
                f'<rect class="heat" x="{wide * j:.2f}%" y="{100 - tall * (i + 1):.2f}%" '
                f'width="{wide:.2f}%" height="{tall:.2f}%" '
                f'fill-opacity="{0.04 + 0.96 * share:.3f}"><title>{value:.4g}</title></rect>'
            )
    centre = _centre(x, wide), 100 - _centre(y, tall)
    marks = [
        f'<circle class="here" cx="{centre[0]:.2f}%" cy="{centre[1]:.2f}%" r="5"/>',
        f'<text class="tick" x="0" y="100%" dy="20">{x[0]:.3g}</text>',
        f'<text class="tick" x="100%" y="100%" dy="20" text-anchor="end">{x[-1]:.3g}</text>',
        '<text class="tick" x="50%" y="100%" dy="20" '
        f'text-anchor="middle">{escape(x_title)}</text>',
        f'<text class="tick" x="-8" y="100%" text-anchor="end">{y[0]:.3g}</text>',
        f'<text class="tick" x="-8" y="0" dy="10" text-anchor="end">{y[-1]:.3g}</text>',
    ]
    return (
        f'<figure class="chart map"><figcaption>{escape(title)}</figcaption>'
        f'<p class="soft">Up: {escape(y_title)}. {low:.3g} (faint) to {high:.3g} (strong)</p>'
        '<div class="plot">'
        f'<svg role="img" aria-label="{escape(title)}" width="100%" height="100%">'
        f"<title>{escape(title)}</title>{''.join([*cells, *marks])}</svg></div></figure>"
    )


def _centre(places: Sequence[float], width: float) -> float:
    """Where 0 lies on an axis of cells, in percent."""
    for i in range(len(places) - 1):
        if places[i] <= 0 <= places[i + 1]:
            share = -places[i] / ((places[i + 1] - places[i]) or 1.0)
            return width * (i + 0.5 + share)
    return width / 2
