"""HTML building blocks: a page that needs no other file, with everything from outside escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from embattle.audit.figures import colour

_STYLE = """
:root { --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --bad: #c2410c; --good: #1d4ed8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 30px; letter-spacing: -0.02em; }
h2 { margin: 44px 0 10px; font-size: 20px; }
p { margin: 8px 0; } .soft { color: var(--soft); } small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px; margin: 26px 0 8px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.tile b { display: block; font-size: 15px; font-weight: 600; color: var(--soft); }
.tile div { display: flex; justify-content: space-between; align-items: baseline; }
.tile span { font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; font-size: 14px; color: var(--soft); }
th.group { text-align: center; border-bottom: 0; padding-bottom: 0; font-size: 15px; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; } td.text { text-align: left; max-width: 420px; }
td.fell { color: var(--bad); font-weight: 600; }
figure { margin: 12px 0; background: #fff; border: 1px solid var(--line); border-radius: 12px;
  padding: 12px; }
img { display: block; width: 100%; height: auto; }
ul { padding-left: 22px; } li { margin: 4px 0; }
.mark { display: inline-block; min-width: 54px; font-weight: 600; }
.pass { color: #15803d; } .fail { color: #b91c1c; }
pre { background: #0f172a; color: #e2e8f0; border-radius: 12px; padding: 16px 18px; font-size: 13px;
  overflow-x: auto; }
@media (max-width: 640px) { .tiles { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } }
"""


# Nothing is loaded from anywhere, and no script runs.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


class Fallen(str):
    """A cell's text that is marked: the attack turned this prediction."""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML page from sections that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body><main>\n" + "\n".join(sections) + "\n</main></body>\n</html>\n"
    )


def heading(title: str, lead: str) -> str:
    """The page's title and a sentence under it."""
    return f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>'


def section(title: str, *parts: str, note: str = "") -> str:
    """A titled section; `parts` are HTML already, `note` is plain text."""
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<h2>{escape(title)}</h2>\n{said}" + "\n".join(parts)


def tiles(entries: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """Tiles with a name, and a figure for each model."""
    cells = "".join(
        f'<div class="tile"><b>{escape(name)}</b>'
        + "".join(
            f'<div style="color:{colour(i)}"><small>{escape(model)}</small>'
            f"<span>{escape(figure)}</span></div>"
            for i, (model, figure) in enumerate(figures.items())
        )
        + "</div>"
        for name, figures in entries
    )
    return f'<div class="tiles">{cells}</div>'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    groups: Sequence[tuple[str, int]] = (),
    text: Sequence[int] = (),
) -> str:
    """A table of plain strings.

    Args:
        head: the columns' names.
        rows: the cells; those that are `Fallen` are marked.
        groups: names of models above the columns, each with the number of columns it spans; ""
            is none.
        text: the columns that are set as running text.
    """
    models = [name for name, _ in groups if name]
    over = "".join(
        f'<th colspan="{span}" class="group"{_coloured(name, models)}>{escape(name)}</th>'
        for name, span in groups
    )
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(_cell(cell, i in text) for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    above = f"<tr>{over}</tr>" if groups else ""
    return (
        f'<div class="scroll"><table><thead>{above}<tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _coloured(name: str, models: Sequence[str]) -> str:
    return f' style="color:{colour(models.index(name))}"' if name else ""


def _cell(cell: str, text: bool) -> str:
    kinds = [name for name, on in (("text", text), ("fell", isinstance(cell, Fallen))) if on]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{kind}>{escape(cell)}</td>"


def picture(png: bytes, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode()
    said = escape(caption)
    return f'<figure><img alt="{said}" src="data:image/png;base64,{data}"></figure>'


def checks(entries: Sequence[Mapping[str, Any]]) -> str:
    """The checks on the attacks, each with its verdict and figures."""
    items = "".join(
        f'<li><span class="mark {"pass" if entry["passed"] else "fail"}">'
        f"{'holds' if entry['passed'] else 'FAILS'}</span>{escape(entry['name'])} "
        f"<small>({escape(entry['detail'])})</small></li>"
        for entry in entries
    )
    return f'<ul style="list-style:none;padding-left:0">{items}</ul>'


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def source(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text)}</pre>"
