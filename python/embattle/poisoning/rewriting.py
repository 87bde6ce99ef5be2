"""An item's text, rewritten so that the item is recommended more, or less.

The seller of an item may write what she likes about it, and a recommender that reads texts believes
her. Words of the text are exchanged by `TokenSwap`, as text that a person can read, and the gain is
the recommender's own. After ATR (Zhang et al., "Adversarial Text Rewriting for Text-aware
Recommender Systems", CIKM 2024), which has a language model rewrite texts; here words are exchanged
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from embattle import checks
from embattle.attacks import TokenSwap
from embattle.criteria import Demote, Promote
from embattle.models.hybrid import HybridMF
from embattle.models.llm import LanguageRecommender
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Site


class Reader(Protocol):
    """A recommender that reads the text of an item, asked for U users.

    Attributes:
        text: of the item.
        embedding: of the tokens; called once in `scores`.
        tokenizer: of the recommender.
    """

    text: str
    embedding: nn.Embedding
    tokenizer: Any

    def __len__(self) -> int:
        """How many users there are."""
        ...

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens `[U, T]`, and bool `[U, T]`: those of the item's text."""
        ...

    def scores(self, tokens: Tensor) -> Tensor:
        """The item's scores `[U]` with other tokens, with a graph."""
        ...

    def scores_of(self, text: str, users: slice) -> Tensor:
        """The item's scores for some users with another text."""
        ...


class HybridReader:
    """How `HybridMF` scores an item for users by its text.

    Args:
        model: in evaluation mode.
        users: [U] int64.
        item: number of the item, whose text is not empty.
    """

    def __init__(self, model: HybridMF, users: Tensor, item: int) -> None:
        self.model, self.users = model, users
        self.items = torch.full_like(users, item)
        self.text = model.texts.texts[item]
        encoder = model.texts.encoder
        embedding = encoder.embedding
        if not isinstance(embedding, nn.Embedding):
            kind = type(embedding).__name__
            raise TypeError(f"HybridReader: the encoder's tokens are looked up in a {kind}")
        self.embedding, self.tokenizer = embedding, encoder.tokenizer
        batch = model.texts.tokens([item]).to(users.device)
        self._ids = batch.inputs["text_ids"].expand(len(users), -1).contiguous()
        self._mask = batch.inputs["text_mask"].expand(len(users), -1).contiguous()
        assert batch.movable is not None
        self._movable = batch.movable.expand(len(users), -1)

    def __len__(self) -> int:
        return len(self.users)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The item's tokens, once for each user."""
        return self._ids, self._movable

    def scores(self, tokens: Tensor) -> Tensor:
        """Scores with a text for each user."""
        text = self.model.texts.rewritten(tokens, self._mask)
        return self.model.scored_with(self.users, self.items, text)

    def scores_of(self, text: str, users: slice) -> Tensor:
        """Scores with one text."""
        inputs = self.model.texts.encoder.tokenize([text]).to(self.users.device).inputs
        with torch.no_grad():
            vector = self.model.texts.rewritten(inputs["input_ids"], inputs["attention_mask"])
            some = self.users[users]
            return self.model.scored_with(some, self.items[users], vector.expand(len(some), -1))


class PromptReader:
    """How a language model that is asked about a title scores it: its lead of yes over no.

    Args:
        model: in evaluation mode.
        histories: of each user, the titles that she liked.
        title: that is asked about.
    """

    def __init__(
        self, model: LanguageRecommender, histories: Sequence[Sequence[str]], title: str
    ) -> None:
        self.model, self.histories, self.text = model, histories, title
        self.embedding, self.tokenizer = model.embedding, model.prompts.tokenizer
        self._made = model.prompts.encode(histories, [title] * len(histories))

    def __len__(self) -> int:
        return len(self.histories)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The prompts, and where the title is in them."""
        device = self.embedding.weight.device
        return self._made.tokens.to(device), self._made.of_title.to(device)

    def scores(self, tokens: Tensor) -> Tensor:
        """Leads of prompts."""
        return self._leads(tokens, self._made.attention)

    def scores_of(self, text: str, users: slice) -> Tensor:
        """Leads with another title."""
        histories = self.histories[users]
        made = self.model.prompts.encode(histories, [text] * len(histories))
        with torch.no_grad():
            return self._leads(made.tokens, made.attention)

    def _leads(self, tokens: Tensor, attention: Tensor) -> Tensor:
        device = self.embedding.weight.device
        answers: Tensor = self.model(tokens.to(device), attention.to(device))
        return answers.diff(dim=1).squeeze(1)


@dataclass(frozen=True)
class Rewritten:
    """An item's text before and after, and the share of users who have the item among the best k.

    Attributes:
        before: the text.
        own: the text that each user is shown, if each is shown one of her own.
        one: the text that all are shown, if they are shown the same.
        clean, with_own: shares of all users, with the text and with their own ones.
        clean_second, with_one: shares of the second half of the users, with the text and with the
            one for all, which was chosen on the first half.
        passes: forward passes of all users that the search made.
    """

    before: str
    own: list[str]
    one: str
    clean: float
    with_own: float
    clean_second: float
    with_one: float
    passes: int


def rewrite_text(
    reader: Reader,
    others: Tensor,
    *,
    k: int = 10,
    swaps: int = 2,
    tries: int = 6,
    allowed: Tensor | None = None,
    similarity: float | None = None,
    demote: bool = False,
) -> Rewritten:
    """Exchange words of an item's text so that it is among users' best k items, or no longer.

    Args:
        reader: a `HybridReader`, a `PromptReader`, or one of your own.
        others: [U, C] the scores of the items that it stands beside, -inf for what a user has met.
        k: length of a list of recommendations.
        swaps: most tokens exchanged.
        tries, allowed, similarity: see `TokenSwap`; `whole_words` gives words that a person knows.
        demote: push the item out of the lists.

    Returns:
        Texts and shares.

    Raises:
        ValueError: fewer than two users, or scores that are not theirs.
    """
    k = checks.integer("rewrite_text", "k", k, 1)
    count = len(reader)
    if count < 2:
        raise ValueError(
            f"rewrite_text: needs two users at least, to choose a text on one half; got {count}"
        )
    if others.dim() != 2 or len(others) != count or others.shape[1] < k:
        raise ValueError(
            f"rewrite_text: others must be [{count}, {k} or more], scores of other items for each "
            f"user; got {tuple(others.shape)}"
        )
    tokens, movable = reader.tokens()

    def loss_of(some: Tensor) -> Callable[[], Evaluation]:
        def loss_fn() -> Evaluation:
            own = reader.scores(some)[:, None]
            return Evaluation(outputs=torch.cat([own, others.to(own)], dim=1))

        return loss_fn

    attack = TokenSwap(swaps=swaps, tries=tries, allowed=allowed, similarity=similarity)
    criterion = Demote(0, k=k) if demote else Promote(0, k=k)
    found = attack.run(loss_of, Site(reader.embedding), tokens, mask=movable, criterion=criterion)
    texts = [
        # What was not exchanged is as it was written.
        str(reader.tokenizer.decode(row[where])).strip() if bool(swapped.any()) else reader.text
        for row, where, swapped in zip(found.tokens, movable, found.swapped, strict=True)
    ]
    assert found.clean.outputs is not None
    assert found.now.outputs is not None
    before, after = (
        _within(scores[:, 0], scores[:, 1:], k)
        for scores in (found.clean.outputs, found.now.outputs)
    )
    half = count // 2
    first, second = slice(half), slice(half, None)

    def share(text: str, users: slice) -> float:
        scores = reader.scores_of(text, users)
        return float(_within(scores, others[users].to(scores), k).double().mean())

    known = sorted({reader.text, *texts[:half]})
    shares = [share(text, first) for text in known]
    wanted = min(shares) if demote else max(shares)
    one = known[shares.index(wanted)]
    return Rewritten(
        before=reader.text,
        own=texts,
        one=one,
        clean=float(before.double().mean()),
        with_own=float(after.double().mean()),
        clean_second=float(before[second].double().mean()),
        with_one=share(one, second),
        passes=found.passes,
    )


def whole_words(tokenizer: Any, count: int, *, least: int = 4) -> Tensor:
    """The tokens that are words of letters, bool [count].

    Args:
        tokenizer: a transformers one.
        count: rows of the table of tokens.
        least: letters of a word.
    """
    # A table may have rows beyond the vocabulary, which have no name.
    names = [name or "" for name in tokenizer.convert_ids_to_tokens(list(range(count)))]
    # Where a mark says that a word begins, pieces of words have none.
    marked = any(name[:1] in _MARKS for name in names)
    words = [
        name[1:] if marked and name[:1] in _MARKS else "" if marked else name for name in names
    ]
    return torch.tensor([word.isalpha() and len(word) >= least for word in words])


# Before a word, of byte-level BPE and of SentencePiece.
_MARKS = ("\u0120", "\u2581")


def _within(scores: Tensor, others: Tensor, k: int) -> Tensor:
    """Whether scores [U] are among the best k beside others [U, C]."""
    return (others >= scores[:, None]).sum(1) < k
