"""The account of a reading: what was read, what was left out and why, and what looks wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Tokens are counted in at most so many texts.
COUNTED = 10_000


@dataclass
class Account:
    """Facts in the order in which they were found, and warnings.

    Attributes:
        facts: name and value; the name of a further line of the same fact is empty.
        warnings: sentences.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, name: str, *lines: str) -> None:
        """Adds a fact of one or more lines."""
        for i, line in enumerate(lines):
            self.facts.append(("" if i else name, line))

    def note_cut(self, cut: int, texts: int, tokens: int) -> None:
        """Notes how many texts are longer than a model reads.

        Args:
            cut: of the first `COUNTED` texts.
            texts: how many there are.
            tokens: that the model reads of each.
        """
        counted = min(texts, COUNTED)
        among = f"the {texts:,}" if counted == texts else f"the first {counted:,}"
        line = f"{tokens} tokens of a text at most; {cut:,} of {among} texts are cut"
        self.note("read by the model", line)
        if cut * 2 > counted:
            self.warn(
                f"more than half of the texts are cut at {tokens} tokens: raise model.max_tokens, "
                "or put the column that says most first in data.text"
            )

    def warn(self, sentence: str) -> None:
        """Adds a warning."""
        self.warnings.append(sentence)

    def lines(self) -> list[str]:
        """The account as text, safe for a terminal."""
        width = max((len(name) for name, _ in self.facts), default=0)
        shown = [f"{name:<{width}}  {value}" for name, value in self.facts]
        return [printable(line) for line in [*shown, *(f"warning: {w}" for w in self.warnings)]]


def printable(text: str) -> str:
    """The text with control characters shown: terminal escapes, breaks, marks of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: str, most: int = 40) -> str:
    """The text in quotes, cut to a length."""
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def listed(items: Sequence[str], most: int = 8) -> str:
    """The items with commas; only the first, and how many more, of a long list."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
