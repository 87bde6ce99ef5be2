"""The command line, `embattle`: its commands, their arguments, and errors as one line.

Only typer is imported here; every command imports what it needs itself, so that `--help` works
without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
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
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model of a run, such as runs/NAME/hardened.")
]
Encoding = Annotated[str | None, typer.Option("--encoding", help="Of a text file, such as cp1252.")]
Delimiter = Annotated[
    str | None, typer.Option("--delimiter", help="Of a CSV file: one character, or 'tab'.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class OnBadRow(str, Enum):
    """What `predict` does with a row that it cannot use."""

    fail = "fail"
    skip = "skip"


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
def init(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A table, or a folder in the layout of MIND.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The recipe to write [default: NAME.yaml].")
    ] = None,
    debug: Debug = False,
) -> None:
    """Look at a file and write a commented recipe for it, ready to train."""
    with _plain_errors(debug):
        from embattle.jobs.init import init as run

        run(path, out)


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


@app.command()
def predict(
    model: Model,
    table: Annotated[Path, typer.Argument(help="A CSV, Parquet or JSON-lines file.")],
    out: Annotated[
        Path, typer.Option("--out", help="The predictions: NAME.csv, NAME.parquet or NAME.jsonl.")
    ],
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="COLUMN", help="Repeat a column; may be repeated."),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", help="Items to recommend [default: the recipe's].")
    ] = None,
    on_bad_row: Annotated[
        OnBadRow, typer.Option("--on-bad-row", help="Leave bad rows out and list them, or stop.")
    ] = OnBadRow.fail,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows that the model is given at once.")
    ] = 256,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where it was stopped; start where nothing is.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Predict for each row of a file, of any size."""
    with _plain_errors(debug):
        from embattle.jobs.predict import predict as run

        run(
            model,
            table,
            out,
            keep=keep or (),
            top=top,
            on_bad_row=on_bad_row.value,
            batch_size=batch_size,
            encoding=encoding,
            delimiter=delimiter,
            resume=resume,
            overwrite=overwrite,
            trust=trust,
        )


@app.command()
def poison(
    ratings: Annotated[Path, typer.Argument(metavar="RATINGS", help="A table of ratings.")],
    out: Annotated[Path, typer.Option("--out", help="The poisoned copy, a new CSV file.")],
    targets: Annotated[
        str, typer.Option("--targets", metavar="ITEMS", help="What is pushed, with commas.")
    ],
    kind: Annotated[
        str, typer.Option("--kind", help="random, average, bandwagon, segment or love_hate.")
    ] = "bandwagon",
    count: Annotated[int | None, typer.Option("--count", min=1, help="Fake users.")] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="The same, per genuine user; 0.01 if not given.")
    ] = None,
    filler: Annotated[
        int | None,
        typer.Option("--filler", min=0, help="Items to hide among; as many as usual if not given."),
    ] = None,
    nuke: Annotated[bool, typer.Option("--nuke", help="Rate the targets worst.")] = False,
    popular: Annotated[
        int | None, typer.Option("--popular", min=1, help="Items of a bandwagon; 10 if not given.")
    ] = None,
    segment: Annotated[
        str, typer.Option("--segment", metavar="ITEMS", help="What the segment likes, with commas.")
    ] = "",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides all draws.")] = 0,
    user: Annotated[
        str | None, typer.Option("--user", metavar="COLUMN", help="Guessed if no column is named.")
    ] = None,
    item: Annotated[str | None, typer.Option("--item", metavar="COLUMN")] = None,
    rating: Annotated[str | None, typer.Option("--rating", metavar="COLUMN")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="COLUMN")] = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    debug: Debug = False,
) -> None:
    """Write a copy of a table of ratings with fake users in it, to train and audit on."""
    with _plain_errors(debug):
        from embattle.jobs.poison import Plan, names_in
        from embattle.jobs.poison import poison as run

        plan = Plan(
            kind,
            names_in(targets),
            accounts=count,
            share=share,
            fillers=filler,
            nuke=nuke,
            popular=popular,
            segment=names_in(segment),
            seed=seed,
        )
        columns = (user, item, rating, time)
        run(ratings, out, plan, columns=columns, encoding=encoding, delimiter=delimiter)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    rows: Annotated[
        Path | None,
        typer.Option("--rows", help="A file to compare outputs on [default: the recipe's data]."),
    ] = None,
    require: Annotated[
        str, typer.Option("--require", help="What must be written: program, onnx, or program,onnx.")
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export that is in the folder.")
    ] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Write a model for other programs: safetensors, a torch.export program, ONNX."""
    with _plain_errors(debug):
        from embattle.jobs.export import export as run

        names = [name.strip() for name in require.split(",") if name.strip()]
        run(model, out, rows=rows, require=names, overwrite=overwrite, trust=trust)


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
    encoding: Encoding = None,
    delimiter: Delimiter = None,
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


@app.command("recbole")
def audit_recbole(
    config: Annotated[list[Path], typer.Argument(help="RecBole's configuration, YAML files.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The run's folder [default: runs/MODEL-DATASET].")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="RecBole's model, if no file names it.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="RecBole's data set, if no file names it.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Weights to begin with, as safetensors.")
    ] = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Attack the checkpoint alone; train nothing.")
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
    debug: Debug = False,
) -> None:
    """Harden and audit a model of RecBole's, in an environment that has it (make recbole)."""
    with _plain_errors(debug):
        from embattle.jobs import recbole

        recipe = recbole.recipe_for(
            config, model=model, dataset=dataset, checkpoint=checkpoint, changes=changes or ()
        )
        folder = out or Path("runs") / recipe.name
        if as_is:
            recbole.attack_checkpoint(recipe, folder)
        else:
            recbole.harden_and_audit(recipe, folder, resume=resume, overwrite=overwrite)


@app.command()
def doctor() -> None:
    """Show what is installed and how it was built, and what is wrong, if anything."""
    from embattle.jobs.doctor import examine

    report = examine()
    print("\n".join(report.lines()))
    if report.problems:
        raise typer.Exit(1)
