"""What all commands share: the application, options, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from embattle.errors import InputError, Interrupted

app = typer.Typer(
    name="embattle",
    help="Attack, harden and audit recommenders built on embeddings.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-task", help="Run the code that the recipe names as its task. Read it before."
    ),
]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model of a run, such as runs/NAME/hardened.")
]
Encoding = Annotated[str | None, typer.Option("--encoding", help="Of a text file, such as cp1252.")]
Delimiter = Annotated[
    str | None, typer.Option("--delimiter", help="Of a CSV file: one character, or 'tab'.")
]
Full = Annotated[
    bool, typer.Option("--full", help="Apply the recipe's 'full' section: the whole data set.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; may be repeated."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run; start where none is.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turns mistakes of the user into one line and status 2, an interruption into status 130."""
    try:
        yield
    except InputError as error:
        if debug:
            raise
        _print_error(str(error))
        raise typer.Exit(2) from error
    except BrokenPipeError:
        raise  # whoever reads the output has gone: typer ends quietly
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}; check the disk and the permissions")
        raise typer.Exit(2) from error
    except Interrupted as stop:
        print(str(stop), file=sys.stderr)
        raise typer.Exit(130) from stop
    except KeyboardInterrupt as stop:
        if debug:
            raise
        print("stopped; nothing half-written was left behind", file=sys.stderr)
        raise typer.Exit(130) from stop


def _print_error(message: str) -> None:
    """Prints a message as one line in which nothing can steer the terminal."""
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"error: {shown}", file=sys.stderr)
