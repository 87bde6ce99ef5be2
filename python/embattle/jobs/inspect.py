"""What a job would read, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embattle import data
from embattle.data.account import COUNTED, Account
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.models.pretrained import count_longer, load_tokenizer
from embattle.progress import say


def inspect_recipe(path: Path, *, full: bool, changes: Sequence[str]) -> None:
    """Prints what a job of this recipe would read, also as far as it gets before an error.

    Raises:
        InputError: what the job would say.
    """
    recipe = recipes.load(path, full=full, changes=changes)
    account = Account()
    try:
        splits = data.load(recipe.data, recipe.seed, account)
        texts = [text for part in splits.parts.values() for text in part.texts]
        try:
            tokenizer = load_tokenizer(recipe.model.pretrained)
        except InputError as error:
            account.note("read by the model", f"not known: {error}")
        else:
            account.note_cut(
                count_longer(tokenizer, texts[:COUNTED], recipe.model.max_tokens),
                len(texts),
                recipe.model.max_tokens,
            )
    finally:
        for line in account.lines():
            say(line)
