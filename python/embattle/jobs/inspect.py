"""What a job would read, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embattle.data.account import Account
from embattle.jobs import recipe as recipes
from embattle.jobs.train import read
from embattle.progress import say


def inspect_recipe(
    path: Path, *, full: bool, changes: Sequence[str] = (), trust: bool = False
) -> None:
    """Prints what a job of this recipe would read, also as far as it gets before an error.

    Raises:
        InputError: what the job would say.
    """
    task = recipes.load(path, full=full, changes=changes, trust=trust).make_task()
    account = Account()
    try:
        read(task, account)
        task.note_encoding(account)
    finally:
        for line in account.lines():
            say(line)
