"""Words and numbers of a report: how figures, counts and the threat are written."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: What stands where there is no figure.
NONE = "\N{EN DASH}"


# Control characters but for line ends and tabs, and marks that turn the direction of all that
# follows; those that join emoji are not among them.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)


def escape(text: str) -> str:
    """Plain text as HTML, for an attribute as well; hidden characters are shown by their codes."""
    lines = str(text).replace("\r\n", "\n").replace("\r", "\n")
    shown = _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), lines)
    return html.escape(shown)


def finite(value: Any) -> float | None:
    """The figure, or None where there is none: absent, NaN, infinite, or no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3) -> str:
    """A figure with so many digits after the point, or a dash."""
    found = finite(value)
    return NONE if found is None else f"{found:.{digits}f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share in percent, or a dash."""
    found = finite(value)
    return NONE if found is None else f"{found:.{digits}%}"


def brief(value: Any) -> str:
    """A figure in a few characters, or any other value as text."""
    found = finite(value)
    return str(value) if found is None else f"{found:.4g}"


def in_percent(share: float) -> str:
    """A share in whole percent, but never none or all where it is neither."""
    rounded = percent(share, 0)
    if rounded == "0%" and share > 0:
        return "<1%"
    return ">99%" if rounded == "100%" and share < 1 else rounded


def duration(seconds: Any) -> str:
    """Seconds as a reader says them."""
    found = finite(seconds)
    if found is None:
        return NONE
    if found < 100:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(word: str) -> str:
    """The plural of what a task calls its samples."""
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def among(shares: Sequence[float], count: int) -> tuple[list[str], str]:
    """Shares as counts, and of how many: of all if there are few, else of 100 or 1,000.

    Args:
        shares: between 0 and 1. Shares that differ are told apart where 1,000 is fine enough.
        count: how many examples they are of.
    """
    if count <= 100:
        return [f"{share * count:.0f}" for share in shares], f"{count}"
    for base in (100, 1000):
        if base > count:
            break
        said = [_counted(share, base) for share in shares]
        if len(set(said)) == len(set(shares)):
            return said, f"{base:,}"
    return [_counted(share, 100) for share in shares], "100"


def _counted(share: float, base: int) -> str:
    """Rounded, but never to none or to all where it is neither."""
    rounded = round(share * base)
    if rounded == 0 and share > 0:
        return "fewer than 1"
    if rounded == base and share < 1:
        return f"more than {base - 1:,}"
    return f"{rounded:,}"


def unit_words(facts: Mapping[str, Any]) -> str:
    """What eps counts in."""
    vector = facts["words"]["vector"]
    unit = str(facts["threat"]["unit"])
    said = {
        "token_norm": f"in mean norms of a {vector} embedding",
        "mean_norm": "in mean norms of a group",
    }
    return said.get(unit, unit)


def threat_words(facts: Mapping[str, Any]) -> str:
    """The threat in a sentence."""
    threat, words = facts["threat"], facts["words"]
    whole = threat["group"] == "sample"
    who = f"each {words['sample']} as a whole" if whole else f"each {words['vector']} on its own"
    ball = f"{threat['norm']} ball of eps {threat['eps']:g}"
    return f"{ball} ({unit_words(facts)}) around {who}"
