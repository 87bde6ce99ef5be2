"""Small pictures of a report, as SVG: bars beside figures, and heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from embattle.audit.figures import colour, stretched
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
    """A figure of names with a bar each, the longest of full length.

    Args:
        entries: names and shares; those below 0 have a pale bar.
        title: what it shows.
        model: the place of the model whose colour it has.
    """
    top = max((abs(share) for _, share in entries), default=0.0) or 1.0
    rows = "".join(
        f'<div><dt dir="auto">{escape(name)}</dt><dd><svg class="meter" aria-hidden="true">'
        f'<rect class="{"plain" if share < 0 else f"m{colour(model)}"} full" '
        f'width="{100 * abs(share) / top:.1f}%" height="100%"/></svg>'
        f"<span>{percent(share)}</span></dd></div>"
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
    note: str,
    x_title: str,
    edge: Sequence[Sequence[float]] = (),
    marks: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> str:
    """Values over a plane, the stronger the colour the higher.

    Args:
        x, y: the columns' and the rows' places, growing and evenly spaced, W and H of them.
        z: the values, [H][W].
        title, note, x_title: what is said over and under it.
        edge: corners (x, y) of a shape that is drawn as a broken line.
        marks: places that are marked, by name.
    """
    known = [value for row in z for value in map(finite, row) if value is not None]
    if not known or len(x) < 2 or len(y) < 2:
        return ""
    low, high = min(known), max(known)
    wide, tall = 100 / len(x), 100 / len(y)

    def across(place: float) -> float:
        return wide / 2 + (place - x[0]) / (x[-1] - x[0]) * (100 - wide)

    def down(place: float) -> float:
        return 100 - tall / 2 - (place - y[0]) / (y[-1] - y[0]) * (100 - tall)

    parts = []
    for i, row in enumerate(z):
        for j, value in enumerate(map(finite, row)):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.0
            parts.append(
                f'<rect class="heat" x="{wide * j:.2f}%" y="{100 - tall * (i + 1):.2f}%" '
                f'width="{wide:.2f}%" height="{tall:.2f}%" '
                f'fill-opacity="{0.04 + 0.96 * share:.3f}"><title>{value:.4g}</title></rect>'
            )
    if edge:
        corners = " L".join(f"{10 * across(a):.1f} {10 * down(b):.1f}" for a, b in edge)
        shape = f'<path class="edge" d="M{corners} Z" vector-effect="non-scaling-stroke"/>'
        parts.append(stretched(shape))
    for name, (a, b) in marks.items():
        at = f'{across(a):.2f}%" {{}}y="{down(b):.2f}%"'
        parts.append(f'<circle class="here" cx="{at.format("c")} r="4"/>')
        parts.append(f'<text class="named" x="{at.format("")} dx="8" dy="-6">{escape(name)}</text>')
    for place, side in ((x[0], "start"), (x[-1], "end")):
        at = "0" if side == "start" else "100%"
        parts.append(
            f'<text class="tick" x="{at}" y="100%" dy="20" text-anchor="{side}">{place:.3g}</text>'
        )
    parts.append(
        f'<text class="tick" x="50%" y="100%" dy="20" text-anchor="middle">{escape(x_title)}</text>'
    )
    for place, at in ((y[0], "100%"), (y[-1], "12")):
        parts.append(f'<text class="tick" x="-8" y="{at}" text-anchor="end">{place:.3g}</text>')
    return (
        f'<figure class="chart map"><figcaption>{escape(title)}</figcaption>'
        f'<p class="soft">{escape(note)} From {low:.3g} (faint) to {high:.3g} (strong).</p>'
        f'<div class="plot"><svg role="img" aria-label="{escape(title)}" width="100%" '
        f'height="100%"><title>{escape(title)}</title>{"".join(parts)}</svg></div></figure>'
    )
