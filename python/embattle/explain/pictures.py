"""Pictures as SVG, drawn from the numbers of explanations; everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif"'
_MONO = 'font-family="ui-monospace, Menlo, Consolas, monospace"'
_INK, _SOFT, _LINE = "#0f172a", "#475569", "#e2e8f0"
_UP, _DOWN = (194, 65, 12), (29, 78, 216)  # what raised the loss, and what held it down
# Low to high losses.
_HEAT = ((239, 246, 255), (147, 197, 253), (253, 186, 116), (234, 88, 12), (124, 45, 18))
# Longest name in a picture, and longest line of words, in characters.
_NAME, _WIDE = 28, 88


def bars(title: str, entries: Sequence[Mapping[str, Any]], *, most: int = 16) -> str:
    """Draw shares as bars.

    Args:
        title: above them.
        entries: with `name` and `share`.
        most: how many are drawn, the first ones.
    """
    shown = list(entries)[:most]
    left, wide, row = 220, 380, 22
    largest = max((abs(float(one["share"])) for one in shown), default=0.0) or 1.0
    parts = [_text(0, 18, title, size=15, weight=600)]
    for i, one in enumerate(shown):
        share, y = float(one["share"]), 34 + row * i
        length = wide * abs(share) / largest
        parts.append(_text(left - 8, y + 14, cut(one["name"]), anchor="end"))
        parts.append(_rect(left, y + 2, length, row - 6, _colour(_UP if share >= 0 else _DOWN)))
        parts.append(_text(left + length + 6, y + 14, f"{share:.1%}", fill=_SOFT))
    return _svg(700, 34 + row * max(1, len(shown)) + 6, parts, title)


def word_heat(title: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Draw the parts of a sample one after the other, the darker the larger their shares.

    Args:
        title: above them.
        entries: with `name` and `share`, in their order.
    """
    step, row = 8.4, 28
    largest = max((abs(float(one["share"])) for one in entries), default=0.0) or 1.0
    parts = [_text(0, 18, cut(title, _WIDE), size=14, weight=600)]
    x, y = 0.0, 34.0
    for one in entries:
        name, share = cut(one["name"]), float(one["share"])
        width = step * len(name) + 10
        if x and x + width > step * _WIDE:
            x, y = 0.0, y + row
        strength = abs(share) / largest
        box = _mix((255, 255, 255), _UP if share >= 0 else _DOWN, 0.75 * strength)
        ink = "#ffffff" if strength > 0.7 else _INK
        parts.append(
            f"<g><title>{safe(name)}: {share:.1%}</title>"
            + _rect(x, y, width - 2, row - 6, box)
            + _text(x + 4, y + 15, name, size=13, fill=ink, font=_MONO, length=step * len(name))
            + "</g>"
        )
        x += width
    return _svg(step * _WIDE + 12, y + row, parts, title)


def heat_map(title: str, landscape: Mapping[str, Any]) -> str:
    """Draw a loss landscape, the clean point and the edge of the ball.

    Args:
        title: above it.
        landscape: with `x`, `y`, `z` (rows of y) and `edge`, as `Landscape` has them.
    """
    x: list[float] = landscape["x"]
    y: list[float] = landscape["y"]
    z: list[list[float]] = landscape["z"]
    size, left, top = 360.0, 56.0, 34.0
    wide, high = size / len(x), size / len(y)
    low, most = min(map(min, z)), max(map(max, z))
    spread = (most - low) or 1.0

    def across(value: float) -> float:
        return left + (value - x[0]) / (x[-1] - x[0]) * (size - wide) + wide / 2

    def down(value: float) -> float:
        return top + size - ((value - y[0]) / (y[-1] - y[0]) * (size - high) + high / 2)

    parts = [_text(0, 18, title, size=15, weight=600)]
    for i, line in enumerate(z):
        for j, value in enumerate(line):
            place = left + j * wide, top + size - (i + 1) * high
            # A little larger than its place, so that no seams show.
            parts.append(_rect(*place, wide + 0.4, high + 0.4, _heat((value - low) / spread)))
    corners = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in landscape.get("edge", ()))
    if corners:
        parts.append(
            f'<polygon points="{corners}" fill="none" stroke="{_INK}" stroke-width="1.5" '
            'stroke-dasharray="5 4"/>'
        )
    for a, name in ((0.0, "clean"), (1.0, "attack")):
        parts.append(f'<circle cx="{across(a):.1f}" cy="{down(0):.1f}" r="4" fill="{_INK}"/>')
        parts.append(_text(across(a) + 7, down(0) - 6, name, size=12, weight=600))
    for value in (x[0], 0.0, x[-1]):
        parts.append(_text(across(value), top + size + 18, f"{value:g}", anchor="middle"))
    for value in (y[0], 0.0, y[-1]):
        parts.append(_text(left - 8, down(value) + 4, f"{value:g}", anchor="end"))
    parts.append(
        _text(left + size / 2, top + size + 36, "along the attack", anchor="middle", fill=_SOFT)
    )
    parts.append(
        f'<g transform="translate(14 {top + size / 2}) rotate(-90)">'
        + _text(0, 0, f"{landscape.get('second', 'random')} direction", anchor="middle", fill=_SOFT)
        + "</g>"
    )
    bar = left + size + 24
    for k in range(60):
        parts.append(_rect(bar, top + size * (59 - k) / 60, 14, size / 60 + 0.4, _heat(k / 59)))
    for value, at in ((most, top + 10), (low, top + size)):
        parts.append(_text(bar + 20, at, f"loss {value:.3g}"))
    return _svg(left + size + 130, top + size + 46, parts, title)


def cut(text: object, most: int = _NAME) -> str:
    """Give a text in one line, not longer than so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" {_FONT} font-size="13">'
        f"<title>{safe(title)}</title>" + "".join(parts) + "</svg>\n"
    )


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
        f'fill="{fill}"/>'
    )


def _text(
    x: float,
    y: float,
    text: object,
    *,
    size: int = 13,
    weight: int = 400,
    anchor: str = "start",
    fill: str = _INK,
    font: str = "",
    length: float | None = None,
) -> str:
    fitted = f' textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"' if length else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
        f"{bold} {font}{fitted}>{safe(text)}</text>"
    )


def safe(text: object) -> str:
    """Escape a text, without the characters that XML does not have."""
    kept = "".join(c for c in str(text) if c.isprintable() or c == " ")
    return escape(kept.encode("utf-8", "ignore").decode())


def _colour(rgb: Sequence[float]) -> str:
    return "#" + "".join(f"{round(c):02x}" for c in rgb)


def _mix(one: Sequence[float], two: Sequence[float], share: float) -> str:
    return _colour([a + (b - a) * share for a, b in zip(one, two, strict=True)])


def _heat(share: float) -> str:
    place = max(0.0, min(1.0, share)) * (len(_HEAT) - 1)
    k = min(int(place), len(_HEAT) - 2)
    return _mix(_HEAT[k], _HEAT[k + 1], place - k)
