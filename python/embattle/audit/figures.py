"""Charts of a report, as SVG that is written here.

Places within a chart are percentages of its plot, so that it fits any width without its words
shrinking; colours are classes, so that the page's style decides about them (`page.css`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from embattle.audit.words import escape, finite, percent

#: So many colours there are for models; they begin again where there are more models.
COLOURS = 8

# The colours of `page.css` by day, for a file of its own.
_STYLE = """
svg { font: 13px system-ui, sans-serif; fill: #0f172a; }
.paper { fill: #fff; } .grid { stroke: #e2e8f0; } .axis { stroke: #94a3b8; }
.tick, .said { fill: #475569; } .guide { stroke: #64748b; stroke-dasharray: 4 4; }
.line { fill: none; stroke-width: 2.4; } .dashed { stroke-dasharray: 6 4; }
.band { opacity: .14; } .hit { fill: transparent; }
"""
_HEX = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#334155")


def colour(number: int) -> int:
    """The colour of a model, by its place among the models."""
    return number % COLOURS


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend.
        x, y: its points; those without a finite figure are left out.
        model: the place of the model whose colour it has.
        dashed: whether it is dashed.
        low, high: the ends of an interval around each point.
        points: whether the points are marked, each with its figures on hover.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    model: int
    dashed: bool = False
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    points: bool = True

    def known(self) -> list[tuple[float, float]]:
        """The points that there are."""
        pairs = ((finite(x), finite(y)) for x, y in zip(self.x, self.y, strict=False))
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    def ends(self) -> list[tuple[float, float, float]]:
        """Where an interval is known: x, its lower and its upper end."""
        every = zip(self.x, self.low, self.high, strict=False)
        found = (tuple(finite(value) for value in values) for values in every)
        return [(x, a, b) for x, a, b in found if None not in (x, a, b)]  # type: ignore[misc]


@dataclass(frozen=True)
class Chart:
    """Lines over an axis.

    Attributes:
        title: what it shows.
        lines: the lines.
        x_title, y_title: the axes' names.
        shares: whether y is a share, from 0 to 1, written in percent.
        x_mark: a place on the x axis with its name: a vertical guide.
        y_mark: a height with its name: a horizontal guide.
        said: what it shows, in sentences, for those who hear the page.
    """

    title: str
    lines: Sequence[Line]
    x_title: str
    y_title: str
    shares: bool = True
    x_mark: tuple[float, str] | None = None
    y_mark: tuple[float, str] | None = None
    said: str = ""

    @property
    def empty(self) -> bool:
        """Whether no line has a point."""
        return not any(line.known() for line in self.lines)

    def html(self) -> str:
        """A figure of a page, with its legend and, folded away, its numbers."""
        if self.empty:
            return ""
        keys = "".join(
            f'<li>{_key(line)}<span dir="auto">{escape(line.name)}</span></li>'
            for line in self.lines
            if line.known()
        )
        return (
            f'<figure class="chart"><figcaption>{escape(self.y_title)}</figcaption>'
            f'<ul class="legend">{keys}</ul><div class="plot">'
            f'<svg role="img" aria-label="{escape(self.title)}" width="100%" height="100%">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.said)}</desc>"
            f"{self._inside()}</svg></div></figure>"
        )

    def file(self) -> str:
        """A whole SVG file, 760 wide."""
        style = _STYLE + "".join(
            f".line.m{i} {{ stroke: {code}; }} .band.m{i}, .dot.m{i} {{ fill: {code}; }}\n"
            for i, code in enumerate(_HEX)
        )
        shown = [line for line in self.lines if line.known()]
        rows = "".join(
            f'<svg x="{64 + 230 * (i % 3)}" y="{64 + 22 * (i // 3)}" width="28" height="16">'
            f"{_stroke(line)}</svg>"
            f'<text x="{98 + 230 * (i % 3)}" y="{76 + 22 * (i // 3)}">'
            f"{escape(_short(line.name, 26))}</text>"
            for i, line in enumerate(shown)
        )
        top = 90 + 22 * math.ceil(len(shown) / 3)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{top + 320}" '
            f'viewBox="0 0 760 {top + 320}" role="img"><title>{escape(self.title)}</title>'
            f"<desc>{escape(self.said)}</desc><style>{style}</style>"
            '<rect class="paper" width="100%" height="100%"/>'
            f'<text x="64" y="28" font-size="15">{escape(_short(self.title))}</text>'
            f'<text class="tick" x="64" y="48">{escape(_short(self.y_title))}</text>{rows}'
            f'<svg x="64" y="{top}" width="664" height="270" overflow="visible">'
            f"{'' if self.empty else self._inside()}</svg></svg>\n"
        )

    def _inside(self) -> str:
        every = [point for line in self.lines for point in line.known()]
        ends = [end for line in self.lines for _, *pair in line.ends() for end in pair]
        xs = [x for x, _ in every]
        ys = [*(y for _, y in every), *ends, *([self.y_mark[0]] if self.y_mark else [])]
        x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
        y_ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if self.shares else ticks(min(0.0, *ys), max(ys))
        y_low, y_high = y_ticks[0], y_ticks[-1]

        def across(x: float) -> float:
            return 100 * (x - x_low) / (x_high - x_low)

        def down(y: float) -> float:
            return 100 * (y_high - min(max(y, y_low), y_high)) / (y_high - y_low)

        return "".join(
            [
                *self._axes(across, down, ticks(x_low, x_high, inside=True), y_ticks),
                *self._guides(across, down, (x_low, x_high)),
                *(_band(line, across, down) for line in self.lines),
                *(_path(line, across, down) for line in self.lines),
                *(part for line in self.lines for part in self._points(line, across, down)),
            ]
        )

    def _axes(
        self, across: _Place, down: _Place, x_ticks: Sequence[float], y_ticks: Sequence[float]
    ) -> Iterator[str]:
        for y in y_ticks:
            at = f"{down(y):.2f}%"
            kind = "axis" if y == y_ticks[0] else "grid"
            said = percent(y, 0) if self.shares else f"{y:g}"
            yield f'<line class="{kind}" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
            yield f'<text class="tick" x="-10" y="{at}" dy="4" text-anchor="end">{said}</text>'
        for x in x_ticks:
            yield (
                f'<text class="tick" x="{across(x):.2f}%" y="100%" dy="20" '
                f'text-anchor="middle">{x:g}</text>'
            )
        yield (
            '<text class="tick" x="50%" y="100%" dy="42" '
            f'text-anchor="middle">{escape(_short(self.x_title))}</text>'
        )

    def _guides(self, across: _Place, down: _Place, ends: tuple[float, float]) -> Iterator[str]:
        if self.x_mark and ends[0] <= self.x_mark[0] <= ends[1]:
            at = across(self.x_mark[0])
            side = "start" if at < 12 else "end" if at > 88 else "middle"
            yield f'<line class="guide" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>'
            yield (
                f'<text class="said" x="{at:.2f}%" y="-8" text-anchor="{side}">'
                f"{escape(_short(self.x_mark[1], 40))}</text>"
            )
        if self.y_mark:
            height = f"{down(self.y_mark[0]):.2f}%"
            yield f'<line class="guide" x1="0" x2="100%" y1="{height}" y2="{height}"/>'
            yield (
                f'<text class="said" x="100%" y="{height}" dy="-5" text-anchor="end">'
                f"{escape(_short(self.y_mark[1], 40))}</text>"
            )

    def _points(self, line: Line, across: _Place, down: _Place) -> Iterator[str]:
        ends = {x: (low, high) for x, low, high in line.ends()}
        for x, y in line.known() if line.points else ():
            at = f'cx="{across(x):.2f}%" cy="{down(y):.2f}%"'
            value = percent(y) if self.shares else f"{y:.3g}"
            if x in ends:
                low, high = (percent(e) if self.shares else f"{e:.3g}" for e in ends[x])
                value += f" ({low} to {high})"
            said = escape(f"{line.name}: {value} at {x:.3g}")
            yield f'<circle class="dot m{colour(line.model)}" {at} r="3.6"/>'
            yield f'<circle class="hit" {at} r="12"><title>{said}</title></circle>'


_Place = Callable[[float], float]


def _band(line: Line, across: _Place, down: _Place) -> str:
    ends = line.ends()
    if len(ends) < 2:
        return ""
    upper = [f"{10 * across(x):.1f} {10 * down(high):.1f}" for x, _, high in ends]
    lower = [f"{10 * across(x):.1f} {10 * down(low):.1f}" for x, low, _ in reversed(ends)]
    shape = f'<path class="band m{colour(line.model)}" d="M{" L".join([*upper, *lower])} Z"/>'
    return stretched(shape)


def _path(line: Line, across: _Place, down: _Place) -> str:
    points = " L".join(f"{10 * across(x):.1f} {10 * down(y):.1f}" for x, y in line.known())
    if not points:
        return ""
    return stretched(
        f'<path class="{_class(line)}" d="M{points}" vector-effect="non-scaling-stroke"/>'
    )


def _class(line: Line) -> str:
    """Models beyond the last colour are dashed too, in another way."""
    again = " again" if line.model >= COLOURS else ""
    return f"line m{colour(line.model)}{' dashed' if line.dashed else ''}{again}"


def stretched(shape: str) -> str:
    """Shapes on a square of 1000, drawn over the whole plot; their strokes keep their width."""
    return (
        '<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'overflow="visible">{shape}</svg>'
    )


def _key(line: Line) -> str:
    return f'<svg class="key" aria-hidden="true" width="28" height="16">{_stroke(line)}</svg>'


def _stroke(line: Line) -> str:
    return f'<path class="{_class(line)}" d="M2 8 H26"/>'


def _short(text: str, most: int = 60) -> str:
    """Words in a drawing do not wrap."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def ticks(low: float, high: float, *, inside: bool = False) -> list[float]:
    """Four to seven round numbers that span two, or with `inside` lie between them."""
    if not high > low:
        high = low + 1.0
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(s for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9) if inside else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if inside else math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a tenth of the values, of what came before."""
    width = max(1, len(values) // 10)
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]


def losses_over_steps(
    histories: Mapping[str, Sequence[Mapping[str, float]]], most: int = 300
) -> Chart:
    """The smoothed training losses of each model.

    Args:
        histories: model to the figures of each step: `loss`, and `robust_loss` where there is one.
        most: so many points of a line are drawn.
    """
    lines = []
    for number, (name, history) in enumerate(histories.items()):
        for key, dashed in (("loss", False), ("robust_loss", True)):
            rows = [(i, finite(row.get(key))) for i, row in enumerate(history, 1)]
            found = [(i, value) for i, value in rows if value is not None]
            values = smoothed([value for _, value in found])
            every = max(1, math.ceil(len(found) / most))
            chosen = range((len(found) - 1) % every, len(found), every) if found else range(0)
            label = f"{name}, under attack" if dashed else name
            steps = [found[i][0] for i in chosen]
            lines.append(
                Line(label, steps, [values[i] for i in chosen], number, dashed, points=False)
            )
    return Chart(
        title="Training losses",
        lines=[line for line in lines if line.known()],
        x_title="step",
        y_title="training loss (smoothed)",
        shares=False,
        said="The loss of each model over the steps of its training; dashed: on attacked examples.",
    )
