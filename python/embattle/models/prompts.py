"""Prompts that list what a user liked and ask about one more title, as tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embattle.errors import InputError
from embattle.models.pretrained import padded_right, quiet, read


class Prompted(NamedTuple):
    """B prompts, padded on the right to T tokens.

    Attributes:
        tokens: int64 [B, T].
        attention: int64 [B, T], 1 at tokens, 0 at padding.
        of_liked: bool [B, T], the tokens of the titles that were liked.
        of_title: bool [B, T], the tokens of the title that is asked about.
    """

    tokens: Tensor
    attention: Tensor
    of_liked: Tensor
    of_title: Tensor


class Prompts:
    """Makes prompts from a template, in which `{liked}` and then `{title}` are replaced.

    Titles are tokenized each by itself, so that their tokens are known in the prompt and no word of
    the template shares one. Where not all fits, the titles liked longest ago are left out. Control
    tokens may be written in the template; in a title they are letters.

    Args:
        tokenizer: a language model's.
        template: the text around the titles, which follow each other with commas.
        max_tokens: longest prompt.

    Raises:
        InputError: the template is no such, or leaves no room for titles.
    """

    def __init__(self, tokenizer: Any, template: str, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = padded_right(tokenizer), max_tokens
        self._known: dict[str, list[int]] = {}
        found = re.fullmatch(
            r"([^{}]*?)( ?)\{liked\}([^{}]*?)( ?)\{title\}([^{}]*)", template, re.DOTALL
        )
        if found is None or not found[1]:
            raise InputError(
                f"model.prompt: {template!r} must begin with a word, and have {{liked}} and then "
                "{title}, each once"
            )
        before, self._before_liked, between, self._before_title, after = found.groups()
        with quiet():
            # What belongs at the beginning of every text comes with the first words; what belongs
            # at its end (T5, some embedding models) would end the prompt in its middle.
            first = self.tokenizer(before, return_special_tokens_mask=True)
            ends = len(first["input_ids"])
            while ends and first["special_tokens_mask"][ends - 1]:
                ends -= 1
            self._before = list(first["input_ids"][:ends])
            self._between, self._after, self._comma = (
                list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
                for text in (between, after, ",")
            )
        fixed = len(self._before) + len(self._between) + len(self._after)
        self._room = max_tokens - fixed
        if self._room < 2:
            raise InputError(
                f"model.max_tokens: the prompt has {fixed} tokens without titles, which leaves "
                f"none of {max_tokens}; raise max_tokens or shorten model.prompt"
            )

    def fit(self, liked: Sequence[str], title: str) -> tuple[list[list[int]], list[int]]:
        """The tokens of the titles that fit: of those liked, oldest first, and of the title."""
        asked = self._tokens(self._before_title + title)[: self._room]
        room = self._room - len(asked)
        kept: list[list[int]] = []
        for i in reversed(range(len(liked))):
            lead = " " if i else self._before_liked
            tokens = self._tokens(lead + liked[i])
            room -= len(tokens) + len(self._comma) * bool(kept)
            if room < 0:
                break
            kept.append(tokens)
        return kept[::-1], asked

    def length(self, liked: Sequence[str], title: str) -> int:
        """How many tokens the prompt has."""
        kept, asked = self.fit(liked, title)
        commas = len(self._comma) * max(0, len(kept) - 1)
        return self.max_tokens - self._room + sum(map(len, kept)) + commas + len(asked)

    def encode(self, liked: Sequence[Sequence[str]], titles: Sequence[str]) -> Prompted:
        """Make a batch of prompts.

        Args:
            liked: of each prompt the titles that were liked, oldest first.
            titles: of each prompt the title that is asked about.
        """
        rows = [self._parts(*self.fit(*row)) for row in zip(liked, titles, strict=True)]
        width = max((sum(len(part) for part, _ in row) for row in rows), default=0)
        padding = int(self.tokenizer.pad_token_id)
        tokens = torch.full((len(rows), width), padding, dtype=torch.int64)
        kinds = torch.full((len(rows), width), -1)
        for i, row in enumerate(rows):
            ids = [token for part, _ in row for token in part]
            tokens[i, : len(ids)] = torch.tensor(ids)
            kinds[i, : len(ids)] = torch.tensor([kind for part, kind in row for _ in part])
        return Prompted(tokens, (kinds >= 0).long(), kinds == 1, kinds == 2)

    def _parts(self, kept: list[list[int]], asked: list[int]) -> list[tuple[list[int], int]]:
        """The prompt's tokens in pieces: 1 for a liked title, 2 for the one asked about, else 0."""
        parts = [(self._before, 0)]
        for i, tokens in enumerate(kept):
            parts += [(self._comma, 0)] * bool(i) + [(tokens, 1)]
        return [*parts, (self._between, 0), (asked, 2), (self._after, 0)]

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            with quiet():
                found = read(self.tokenizer, [text], add_special_tokens=False)["input_ids"]
            self._known[text] = list(found[0])
        return self._known[text]
