"""The command line, `embattle`: its commands, their arguments, and errors as one line.

Only typer is imported here; every command imports what it needs itself, so that `--help` works
without it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from embattle.cli import jobs, models, tables
from embattle.cli.common import app

__all__ = ["app", "jobs", "models", "tables"]


def _version(asked: bool) -> None:
    if asked:
        from embattle.errors import version_of

        print(f"embattle {version_of('embattle') or '(not installed as a package)'}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Attack, harden and audit recommenders built on embeddings."""
