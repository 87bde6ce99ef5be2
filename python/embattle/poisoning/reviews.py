"""Labels that are flipped, and reviews that nobody wrote."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embattle.data.account import listed
from embattle.data.ratings import Floats, Ints
from embattle.errors import InputError, closest

# The linear model that says which texts are near its boundary: hashed words, epochs of Adam.
BUCKETS, EPOCHS, BATCH, RATE, DECAY = 2**16, 4, 256, 0.02, 1e-4
# Texts of which fake ones are made, at most.
SOURCES = 20_000

_WORD = re.compile(r"\w+")
# The end of a sentence, and what follows it.
_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Flips:
    """Labels that are exchanged.

    Attributes:
        rows: [N] int64 ascending, which.
        before, after: their labels.
    """

    rows: Ints
    before: list[str]
    after: list[str]


def flip_labels(
    labels: Sequence[str | None],
    count: int,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    source: str | None = None,
    goal: str | None = None,
    seed: int = 0,
) -> Flips:
    """Exchange labels at random, or those whose texts are nearest the boundary of two classes.

    Args:
        labels: [N] None where there is none: that row stays.
        count: how many are exchanged.
        texts: of each row its words, see `words_of`. With them the rows are those with the smallest
            margin, for or against, between their class and the one they get, by a linear model of
            the words that was not trained on them. Without them the rows are drawn.
        source: exchange labels of this class alone.
        goal: what they become; None: of a drawn row any other class is drawn, of one near the
            boundary the nearest other one.
        seed: decides the draws.

    Returns:
        The exchanges.

    Raises:
        InputError: a label that does not occur, fewer than two classes or fewer rows than asked.
    """
    classes = sorted({label for label in labels if label is not None})
    if len(classes) < 2:
        raise InputError(
            f"flip_labels: the labels are of {len(classes)} classes ({listed(classes)}); two are "
            "needed, to exchange them"
        )
    for name, given in (("source", source), ("goal", goal)):
        if given is not None and given not in classes:
            raise InputError(
                f"flip_labels: {name}: no row is labelled {given!r}; {closest(given, classes)}"
            )
    if source is not None and source == goal:
        raise InputError(f"flip_labels: source and goal are both {goal!r}; name two classes")
    number = {label: i for i, label in enumerate(classes)}
    known = np.array([-1 if label is None else number[label] for label in labels])
    open_ = known >= 0 if source is None else known == number[source]
    if goal is not None:
        open_ &= known != number[goal]
    rows = np.flatnonzero(open_)
    if not 0 <= count <= len(rows):
        raise InputError(
            f"flip_labels: count={count}, but {len(rows)} labels can be exchanged; ask for fewer"
        )
    draw = np.random.default_rng(seed)
    if texts is None:
        chosen = np.sort(draw.choice(rows, count, replace=False))
        other = draw.integers(0, len(classes) - 1, count)
        became = other + (other >= known[chosen])
    else:
        margins = _margins(texts, known, len(classes), seed)
        if goal is not None:
            apart, other = margins[:, number[goal]], np.full(len(known), number[goal])
        else:
            other = margins.argmin(1)
            apart = margins.min(1)
        nearest = rows[np.argsort(np.abs(apart[rows]), kind="stable")[:count]]
        chosen = np.sort(nearest)
        became = other[chosen]
    if goal is not None:
        became = np.full(count, number[goal])
    return Flips(
        chosen.astype(np.int64),
        [classes[i] for i in known[chosen]],
        [classes[i] for i in became],
    )


def words_of(text: str) -> list[str]:
    """The words of a text, and pairs of neighbours."""
    words = _WORD.findall(text.lower())
    return words + [f"{one} {two}" for one, two in pairwise(words)]


def fake_reviews(genuine: Sequence[str], count: int, *, seed: int = 0) -> list[str]:
    """Texts made of the sentences of genuine ones, each from another text.

    A fake has as many sentences as a genuine text that is drawn for it, two at least, and is no
    genuine text.

    Args:
        genuine: what they are made of, such as the positive reviews.
        count: how many.
        seed: decides the draws.

    Raises:
        InputError: there are too few sentences.
    """
    sentences = [list(_sentences(text)) for text in genuine]
    sentences = [parts for parts in sentences if parts]
    known = {text.strip() for text in genuine}
    if len(sentences) < 3:
        raise InputError(
            f"fake_reviews: {len(sentences)} genuine texts to make fakes of; give three at least"
        )
    draw = np.random.default_rng(seed)
    found: list[str] = []
    for _ in range(20 * count + 1):
        if len(found) == count:
            return found
        length = max(2, len(sentences[draw.integers(len(sentences))]))
        length = min(length, len(sentences))
        parts = draw.choice(len(sentences), length, replace=False)
        text = " ".join(sentences[i][draw.integers(len(sentences[i]))] for i in parts)
        if text not in known:
            known.add(text)
            found.append(text)
    raise InputError(
        f"fake_reviews: of {len(sentences)} genuine texts {len(found)} fakes could be made that "
        f"differ, not {count}; ask for fewer"
    )


def _sentences(text: str) -> Iterator[str]:
    for part in _END.split(text.strip()):
        if part:
            yield part if part[-1] in ".!?" else f"{part}."


def _margins(texts: Sequence[Sequence[str]], known: Ints, classes: int, seed: int) -> Floats:
    """[N, classes] by how much a text's own class is ahead of each other one; inf of itself.

    Two linear models are trained, each on half of the rows, and asked about the other half.
    """
    rows = np.flatnonzero(known >= 0)
    rows = np.random.default_rng(seed).permutation(rows)
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    logits = np.zeros((len(known), classes))
    for one, other in (halves, halves[::-1]):
        logits[other] = _linear(texts, known, classes, one, other, seed)
    own = np.take_along_axis(logits, known.clip(0)[:, None], 1)
    margins: Floats = own - logits
    np.put_along_axis(margins, known.clip(0)[:, None], np.inf, 1)
    return margins


def _linear(
    texts: Sequence[Sequence[str]], known: Ints, classes: int, train: Ints, asked: Ints, seed: int
) -> Floats:
    """Logits of some rows by softmax regression on the others' hashed words."""
    table = torch.zeros(BUCKETS, classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([table, bias], lr=RATE)

    def logits(some: Ints) -> Tensor:
        hashed = [[zlib.crc32(word.encode()) % BUCKETS for word in texts[i]] for i in some]
        lengths = torch.tensor([0, *(len(words) for words in hashed)])
        flat = torch.tensor([word for words in hashed for word in words], dtype=torch.int64)
        summed = F.embedding_bag(flat, table, lengths.cumsum(0)[:-1], mode="sum")
        return summed / lengths[1:, None].clamp(min=1).sqrt() + bias

    draw = np.random.default_rng(seed)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            order = draw.permutation(train)
            for start in range(0, len(order), BATCH):
                some = order[start : start + BATCH]
                loss = F.cross_entropy(logits(some), torch.from_numpy(known[some]))
                loss = loss + DECAY * table.square().sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    with torch.no_grad():
        parts = [logits(asked[i : i + BATCH]) for i in range(0, len(asked), BATCH)]
    found: Floats = torch.cat(parts).double().numpy() if parts else np.zeros((0, classes))
    return found
