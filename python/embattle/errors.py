"""Errors that a user can mend, told apart from faults of the program."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import ModuleType


class InputError(ValueError):
    """Something the user gave is wrong; the message names the culprit and the remedy.

    The command line prints it as one line and leaves with status 2; `--debug` shows the traceback.
    """


class Interrupted(Exception):
    """A run was stopped on request and can be continued; the message says how."""


@contextmanager
def options_named() -> Iterator[None]:
    """Name the options of a command where readers name a recipe's keys of the section `data`."""
    try:
        yield
    except InputError as error:
        said = str(error)
        for name in ("encoding", "delimiter"):
            said = said.replace(f"data.{name}", f"--{name}")
        raise InputError(said) from error


def closest(word: str, known: Iterable[str]) -> str:
    """Says which known word was probably meant, and which there are.

    Args:
        word: what the user wrote.
        known: the words that would have been understood.

    Returns:
        A clause such as ``did you mean 'steps'? (known: batch_size, steps)``.
    """
    words = sorted(known)
    near = get_close_matches(word, words, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(words) - 30} more" if len(words) > 30 else ""
    return f"{guess}(known: {', '.join(words[:30])}{more})"


def first_line(error: Exception) -> str:
    """The first line of what an error says, or what kind it is."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def need(module: str, extra: str = "jobs") -> ModuleType:
    """Imports an optional dependency, or says how to install it.

    Args:
        module: the module's dotted name.
        extra: the extra of this package that brings it.

    Returns:
        The module.

    Raises:
        InputError: if the module, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name or module} is not installed and this needs it: "
            f"pip install 'embattle[{extra}]'"
        ) from error


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
