"""Commands about files of data: `data list|fetch|inspect`, and `poison`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embattle.cli.common import Changes, Debug, Delimiter, Encoding, Trust, app, plain_errors
from embattle.errors import InputError

data_app = typer.Typer(
    help="Look at files, and fetch the data sets that have names.", no_args_is_help=True
)
app.add_typer(data_app, name="data")


@data_app.command("list")
def list_data(debug: Debug = False) -> None:
    """List the data sets that have names, their licences, and which are here already."""
    with plain_errors(debug):
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
    with plain_errors(debug):
        from embattle.data.sources import find

        print(find(name).path())


@data_app.command("inspect")
def inspect_data(
    path: Annotated[Path, typer.Argument(help="A table, or a recipe (.yaml).")],
    full: Annotated[
        bool, typer.Option("--full", help="Apply the recipe's 'full' section.")
    ] = False,
    changes: Changes = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Say what is read of a file or by a recipe, what is dropped and why, without training."""
    with plain_errors(debug):
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
    with plain_errors(debug):
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
