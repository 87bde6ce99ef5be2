"""Attacks that a person can read: whole words exchanged, and what the model says of both texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import pairwise

import torch
from torch import Tensor, nn

from embattle.attacks import TokenSwap
from embattle.data.batch import Batch
from embattle.models.pretrained import read
from embattle.models.words import Words
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site
from embattle.tasks.evaluator import Evaluator

Span = tuple[int, int]


@dataclass(frozen=True)
class Swapped:
    """A text before and after, as printed; both were tokenised again and given to the model.

    Attributes:
        row: the sample's place in the batch.
        before, after: the texts.
        before_marks, after_marks: where words were exchanged, as places in the texts (start, end).
        before_output, after_output: what the model gives for the printed texts.
    """

    row: int
    before: str
    after: str
    before_marks: list[Span]
    after_marks: list[Span]
    before_output: Tensor
    after_output: Tensor


def content_words(
    words: Words, tokens: Sequence[Tensor], vocabulary: int, *, most: float = 0.1
) -> Tensor:
    """Find the words of some texts that may be exchanged, as tokens that are words of their own.

    A word has letters alone, three at least, and is read back as the same token. It stands in the
    texts, so that no odd word comes in, but not in many of them: what many texts share are words
    such as `the` and `not`, without which a text cannot be read or says the opposite. What stands
    beside an apostrophe is part of a contraction (`wouldn ' t`, `wouldn 't`), and no word.

    Args:
        words: brings the tokenizer.
        tokens: the texts, `[B, T]` each.
        vocabulary: how many rows the table of tokens has.
        most: share of the texts that have a word, at most.

    Returns:
        Bool `[vocabulary]`.
    """
    count = torch.zeros(vocabulary, dtype=torch.int64)
    texts = [torch.unique(text) for one in tokens for text in one.cpu()]
    for text in texts:
        count[text] += 1
    found = torch.nonzero((count > 0) & (count <= max(1.0, most * len(texts)))).flatten()
    shown = words.shown(found[None])[0]
    parts = _in_contractions(words, tokens)
    known = [
        (token, name)
        for token, name in zip(found.tolist(), shown, strict=True)
        if name.isalpha() and len(name) >= 3 and token not in parts
    ]
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    for space in (" ", ""):
        # SentencePiece may put the space before a word itself, and a second one would be a token.
        some = known if space else [one for one in known if _begins(words, one[0])]
        if some:
            texts_of = [space + name for _, name in some]
            ids = words.tokenizer(texts_of, add_special_tokens=False)["input_ids"]
            same = zip(some, ids, strict=True)
            allowed[[token for (token, _), one in same if list(one) == [token]]] = True
    return allowed


def _begins(words: Words, token: int) -> bool:
    """Whether a token of SentencePiece begins a word."""
    return str(words.tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")


def _in_contractions(words: Words, tokens: Sequence[Tensor]) -> set[int]:
    """The tokens before one that begins with an apostrophe, or after one that ends with one."""
    known = torch.unique(torch.cat([one.cpu().flatten() for one in tokens]))
    names = words.shown(known[None])[0]
    begins, ends = (
        known[torch.tensor([has(name, ("'", "\u2019")) for name in names], dtype=torch.bool)]
        for has in (str.startswith, str.endswith)
    )
    found: set[int] = set()
    for one in tokens:
        text = one.cpu()
        found |= set(text[:, :-1][torch.isin(text[:, 1:], begins)].tolist())
        found |= set(text[:, 1:][torch.isin(text[:, :-1], ends)].tolist())
    return found


def swapped(
    model: nn.Module,
    batch: Batch,
    words: Words,
    evaluator: Evaluator,
    *,
    allowed: Tensor,
    swaps: int = 3,
    tries: int = 8,
    similarity: float | None = 0.4,
) -> list[Swapped]:
    """Exchange words until the model errs, and evaluate it on the texts that are printed.

    `TokenSwap` finds the exchanges. Only whole words are exchanged, for whole words. A text is left
    out where it cannot be printed so that it is read back as the same tokens, or nothing was found
    that makes the loss larger.

    Args:
        model: in evaluation mode.
        batch: the samples, with labels.
        words: where their texts are.
        evaluator: runs the model and knows what is right.
        allowed: bool `[V]`, the tokens that are words, see `content_words`.
        swaps, tries, similarity: of `TokenSwap`. Without a least similarity words of the opposite
            sense come in.

    Returns:
        The texts in the order of the batch.
    """
    texts = words.texts(batch.inputs[words.ids])
    again, _ = _encoded(words, batch, texts)
    rows = [b for b in range(len(batch)) if _same(words, batch, again, b)]
    if not rows:
        return []
    chosen = torch.tensor(rows, device=batch.inputs[words.ids].device)
    batch, texts = take(batch, chosen), [texts[b] for b in rows]
    again, spans = _encoded(words, batch, texts)
    tokens = again.inputs[words.ids]
    width = tokens.shape[1]
    movable = again.inputs[words.mask].bool() & _whole(tokens, allowed, texts, spans)
    if batch.movable is not None:
        # The same tokens stand at the same places, and padding follows them.
        movable &= batch.movable[:, :width]
    with torch.no_grad():
        evaluator.evaluate(model, again)  # what a model keeps of other texts is known from here on

    def loss_of(ids: Tensor) -> Callable[[], Evaluation]:
        changed = replace(again, inputs={**again.inputs, words.ids: ids})
        return lambda: evaluator.evaluate(model, changed)

    attack = TokenSwap(swaps=swaps, tries=tries, allowed=allowed, similarity=similarity)
    with Site(words.embedding) as site:
        result = attack.run(
            loss_of, site, tokens, mask=movable, criterion=evaluator.criterion(batch)
        )
    changed = words.texts(result.tokens)
    printed, changed_spans = _encoded(words, batch, changed)
    with torch.no_grad():
        outputs = [evaluator.evaluate(model, one).outputs for one in (again, printed)]
    if outputs[0] is None or outputs[1] is None:
        raise ValueError("swapped: the evaluator must give outputs: Evaluation(losses, outputs)")
    found = []
    for i in torch.nonzero(result.swapped.any(1)).flatten().tolist():
        old, new = _ids(words, again, i), _ids(words, printed, i)
        marks = _marks(old, new, spans[i], changed_spans[i])
        found.append(
            Swapped(rows[i], texts[i], changed[i], *marks, outputs[0][i].cpu(), outputs[1][i].cpu())
        )
    return found


def _encoded(words: Words, batch: Batch, texts: list[str]) -> tuple[Batch, list[list[Span]]]:
    """The batch with these texts, and where in them each token stands (empty: not known)."""
    fast = bool(words.tokenizer.is_fast)
    found = read(
        words.tokenizer,
        texts,
        truncation=True,
        max_length=words.max_tokens,
        padding=True,
        return_offsets_mapping=fast,
    ).convert_to_tensors("pt")
    device = batch.inputs[words.ids].device
    new = {
        words.ids: found["input_ids"].to(device),
        words.mask: found["attention_mask"].to(device),
    }
    spans = [[(int(a), int(b)) for a, b in row] for row in found["offset_mapping"]] if fast else []
    made = Batch({**batch.inputs, **new}, batch.labels)
    return made, spans or [[] for _ in texts]


def _ids(words: Words, batch: Batch, row: int) -> list[int]:
    """A text's tokens, without padding."""
    there = batch.inputs[words.mask][row].bool()
    ids: list[int] = batch.inputs[words.ids][row][there].tolist()
    return ids


def _same(words: Words, one: Batch, other: Batch, row: int) -> bool:
    return _ids(words, one, row) == _ids(words, other, row)


def take(batch: Batch, rows: Tensor) -> Batch:
    """Give the samples at `rows` (int64 `[n]`), as wide as in the batch."""
    return Batch(
        {name: x[rows] for name, x in batch.inputs.items()},
        None if batch.labels is None else batch.labels[rows],
        None if batch.movable is None else batch.movable[rows],
    )


def _whole(tokens: Tensor, allowed: Tensor, texts: list[str], spans: list[list[Span]]) -> Tensor:
    """Where a token is a whole word: a word itself, whose last letter no other token's follows."""
    found = allowed.to(tokens.device)[tokens]
    for b, (text, row) in enumerate(zip(texts, spans, strict=True)):
        for t, ((_, end), (start, other)) in enumerate(pairwise(row)):
            if start == end < other and text[start].isalnum():
                found[b, t] = False
    return found


def _marks(
    old: list[int], new: list[int], old_spans: list[Span], new_spans: list[Span]
) -> tuple[list[Span], list[Span]]:
    """Where two texts differ, in places of each."""
    if not old_spans or not new_spans:
        return [], []
    if len(old) == len(new):  # as it is, unless the new text is divided otherwise
        places = [(i, i + 1, i, i + 1) for i in range(len(old)) if old[i] != new[i]]
    else:
        codes = SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
        places = [place for tag, *place in codes if tag != "equal"]  # type: ignore[misc]
    before = [span for a1, a2, _, _ in places for span in old_spans[a1:a2]]
    after = [span for _, _, b1, b2 in places for span in new_spans[b1:b2]]
    return before, after
