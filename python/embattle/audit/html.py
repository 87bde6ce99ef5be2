"""HTML building blocks: a page that needs no other file, with everything from outside escaped.

Style and script are inside the page, and named by their hashes in its policy: nothing else applies
or runs, and nothing is loaded. Without the script the page is as complete; with it tables can be
sorted and terms are explained where they stand.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from embattle.audit.figures import colour
from embattle.audit.pictures import meter
from embattle.audit.tables import Cell as Cell
from embattle.audit.tables import Fallen as Fallen
from embattle.audit.tables import small
from embattle.audit.tables import table as table
from embattle.audit.terms import glossary, prose
from embattle.audit.words import escape

# Keeps the place of small print, so that tiles stay in step.
NOTHING = "\N{NO-BREAK SPACE}"


def page(title: str, sections: Sequence[str], *, contents: bool = False) -> str:
    """A whole HTML page from sections that are HTML already.

    Args:
        title: the page's title.
        sections: one after the other; the first holds the heading.
        contents: whether links to the titled sections stand below the first.

    Returns:
        HTML, with a section at its end that explains the terms that occur.
    """
    body = "\n".join(sections)
    parts = [sections[0] if sections else "", *sections[1:], glossary(body)]
    if contents:
        parts.insert(1, _contents("\n".join(parts)))
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        '<body><main dir="ltr">\n' + "\n".join(part for part in parts if part) + "\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


_TITLED = re.compile(r'<section id="([\w-]+)">\n<h2>([^<]*)</h2>')


def _contents(body: str) -> str:
    links = "".join(f'<a href="#{slug}">{name}</a>' for slug, name in _TITLED.findall(body))
    return f'<nav aria-label="Contents">{links}</nav>'


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def heading(title: str, lead: str, *, above: str = "") -> str:
    """The page's title and a sentence under it; `above` is said in small print over it."""
    over = f'<p class="above">{escape(above)}</p>\n' if above else ""
    return (
        f'<header>{over}<h1 dir="auto">{escape(title)}</h1>\n'
        f'<p class="soft">{escape(lead)}</p></header>'
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A titled section; `parts` are HTML already, `note` is plain text."""
    said = f'<p class="soft">{prose(note)}</p>\n' if note else ""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    return (
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{said}' + "\n".join(parts) + "</section>"
    )


def headline(figure: str, caption: str, sentence: str, *, tone: str = "", more: str = "") -> str:
    """What the page has to say: one figure and a sentence.

    Args:
        figure: the one figure.
        caption: what it is.
        sentence: the verdict.
        tone: `good`, `bad` or nothing.
        more: HTML below.
    """
    kind = f" {tone}" if tone in ("good", "bad") else ""
    return (
        f'<div class="headline{kind}"><p class="figure"><b>{escape(figure)}</b>'
        f"<span>{prose(caption)}</span></p>"
        f'<div><p class="verdict" dir="auto">{escape(sentence)}</p>{more}</div></div>'
    )


def badges(entries: Sequence[tuple[str, str]]) -> str:
    """Short facts in a row: each a tone (`good`, `bad` or nothing) and its text."""
    return (
        '<ul class="badges">'
        + "".join(f'<li class="{escape(tone)}">{escape(text)}</li>' for tone, text in entries)
        + "</ul>"
    )


def tiles(
    entries: Sequence[tuple[str, Mapping[str, str]]],
    *,
    legends: Sequence[str] = (),
    notes: Sequence[Mapping[str, str]] = (),
) -> str:
    """Tiles with a name, and a figure for each model.

    Args:
        entries: name of the tile, and model to figure. A figure in percent has a bar.
        legends: what each tile shows, in a sentence.
        notes: for each tile, model to what is said below its figure, such as an interval.
    """
    made, noted = [], any(any(below.values()) for below in notes)
    for number, (name, figures) in enumerate(entries):
        legend = legends[number] if number < len(legends) else ""
        below = notes[number] if number < len(notes) else {}
        said = f"<small>{prose(legend)}</small>" if legend else ""
        rows = "".join(
            f'<div><dt class="m{colour(i)}" dir="auto">{escape(model)}</dt>'
            f"<dd><b>{escape(figure)}</b>{small(below.get(model) or NOTHING * noted)}"
            f"{_meter(figure, i)}</dd></div>"
            for i, (model, figure) in enumerate(figures.items())
        )
        made.append(
            f'<div class="tile"><div><h3>{prose(name)}</h3>{said}</div><dl>{rows}</dl></div>'
        )
    return f'<div class="tiles">{"".join(made)}</div>'


def _meter(figure: str, model: int) -> str:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", figure)
    return meter(float(found[1]) / 100, model) if found else ""


def checks(entries: Sequence[Mapping[str, Any]]) -> str:
    """The checks on the attacks, each with its verdict, figures and reason."""
    return (
        '<ul class="checks">'
        + "".join(
            f'<li><span class="mark {"pass" if entry["passed"] else "fail"}">'
            f"{'holds' if entry['passed'] else 'FAILS'}</span>"
            f'<div dir="auto">{escape(entry["name"])} <small>({escape(entry["detail"])})</small>'
            f"{_reason(entry)}</div></li>"
            for entry in entries
        )
        + "</ul>"
    )


def _reason(entry: Mapping[str, Any]) -> str:
    return f'<p class="soft">{escape(entry["reason"])}</p>' if entry.get("reason") else ""


def box(summary: str, *parts: str) -> str:
    """Parts that are HTML already, folded away under a summary; in print they are shown."""
    return (
        f'<details class="box"><summary>{escape(summary)}</summary>'
        + "\n".join(parts)
        + "</details>"
    )


def clipped(text: str, most: int = 220) -> str:
    """Running text whose rest is folded away."""
    if len(text) <= most:
        return f'<p class="words" dir="auto">{escape(text)}</p>'
    cut = text.rfind(" ", most // 2, most)
    cut = most if cut < 0 else cut
    return (
        f'<details class="more"><summary dir="auto"><span class="words">{escape(text[:cut])}</span>'
        f'<span class="dots">… more</span></summary><p class="words" dir="auto">'
        f"{escape(text[cut:])}</p></details>"
    )


def subheading(text: str) -> str:
    """A title within a section."""
    return f'<h3 dir="auto">{escape(text)}</h3>'


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f'<p dir="auto">{prose(text)}</p>'


def source(text: str) -> str:
    """Preformatted text."""
    return f'<pre tabindex="0">{escape(text)}</pre>'
