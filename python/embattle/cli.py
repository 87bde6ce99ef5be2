"""The command line: `embattle train`, `audit`, `tune`, `data` and `doctor`.

Only typer is imported here; every command imports what it needs itself, so that `--help` works
without it.
"""

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

data_app = typer.Typer(
    help="Look at files, and fetch the data sets that have names.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-task", help="Run the code that the recipe names as its task. Read it before."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def _plain_errors(debug: bool) -> Iterator[None]:
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


def _version(asked: bool) -> None:
    if asked:
        from embattle.jobs.doctor import version_of

        print(f"embattle {version_of('embattle') or '(not installed as a package)'}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Attack, harden and audit recommenders built on embeddings."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The run's folder [default: runs/NAME].")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Apply the recipe's 'full' section: the whole data set.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; start where none is.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; may be repeated."),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Train a standard model and the recipe's variants under the same budget."""
    with _plain_errors(debug):
        from embattle.jobs import recipe as recipes

        chosen = recipes.load(recipe, full=full, changes=changes or (), trust=trust)

        from embattle.jobs.train import train as run

        run(chosen, out or Path("runs") / chosen.name, resume=resume, overwrite=overwrite)


@app.command()
def audit(
    run_dir: Annotated[Path, typer.Argument(help="A folder that `embattle train` wrote.")],
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Attack all models of a run and write the report."""
    with _plain_errors(debug):
        from embattle.jobs.audit import audit as run

        run(run_dir, trust=trust)


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="The recipe, with a section 'tune'.")],
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Trials in the end, earlier ones included.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The study's folder [default: runs/NAME-tune].")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Apply the recipe's 'full' section: the whole data set.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the study; start one where none is.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the folder.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; may be repeated."),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Find a variant's most robust options at a bounded loss, and write the recipe with them."""
    with _plain_errors(debug):
        from embattle.jobs import recipe as recipes

        chosen = recipes.load(recipe, full=full, changes=changes or (), trust=trust)

        from embattle.jobs.tune import tune as run

        out = out or Path("runs") / f"{chosen.name}-tune"
        run(chosen, out, trials=trials, resume=resume, overwrite=overwrite)


@data_app.command("list")
def list_data(debug: Debug = False) -> None:
    """List the data sets that have names, their licences, and which are here already."""
    with _plain_errors(debug):
        from embattle.data.sources import SOURCES

        width = max(map(len, SOURCES))
        for name, source in SOURCES.items():
            here = "here" if source.is_here() else "not fetched"
            print(f"{name:<{width}}  {here:<11}  {source.about}")
            print(f"{'':<{width}}  {'':<11}  licence: {source.licence}")


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(help="A name that `embattle data list` shows.")],
    debug: Debug = False,
) -> None:
    """Fetch a data set, check its hash, and print the path of its table."""
    with _plain_errors(debug):
        from embattle.data.sources import find

        print(find(name).path())


@data_app.command("inspect")
def inspect_data(
    path: Annotated[Path, typer.Argument(help="A table, or a recipe (.yaml).")],
    full: Annotated[
        bool, typer.Option("--full", help="Apply the recipe's 'full' section.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe; may be repeated."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Of a text file, such as cp1252.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="Of a CSV file: one character, or 'tab'.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Say what is read of a file or by a recipe, what is dropped and why, without training."""
    with _plain_errors(debug):
        if path.suffix.lower() in (".yaml", ".yml"):
            if encoding or delimiter:
                raise InputError(
                    "--encoding and --delimiter are for tables; a recipe says data.encoding and "
                    "data.delimiter (--set)"
                )
            from embattle.jobs.inspect import inspect_recipe

            inspect_recipe(path, full=full, changes=changes or (), trust=trust)
        else:
            if full or changes or trust:
                raise InputError(
                    "--full, --set and --trust-task are for recipes; give a .yaml file"
                )
            from embattle.data.inspect import inspect_file

            inspect_file(path, encoding=encoding, delimiter=delimiter)


@app.command()
def doctor() -> None:
    """Show what is installed and how it was built, and what is wrong, if anything."""
    from embattle.jobs.doctor import examine

    report = examine()
    print("\n".join(report.lines()))
    if report.problems:
        raise typer.Exit(1)
