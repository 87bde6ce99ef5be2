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
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Ratings, or texts with labels.")],
    out: Annotated[Path, typer.Option("--out", help="The poisoned copy, a new CSV file.")],
    targets: Annotated[
        str, typer.Option("--targets", metavar="ITEMS", help="What is pushed, with commas.")
    ] = "",
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="Fake users: random, average, bandwagon, segment, love_hate, or optimised: "
            "gradient, unrolled, deep, learned. Labels and texts: flip, flip_near, reviews.",
        ),
    ] = "bandwagon",
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Fake users, or rows of texts.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--share", help="The same, per genuine user or row; 0.01 if not given."),
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
    feedback: Annotated[
        str | None,
        typer.Option(
            "--feedback", help="What optimised fakes aim at: explicit or implicit; else guessed."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Steps of their optimisation; 30 if not given."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides all draws.")] = 0,
    user: Annotated[
        str | None, typer.Option("--user", metavar="COLUMN", help="Guessed if no column is named.")
    ] = None,
    item: Annotated[str | None, typer.Option("--item", metavar="COLUMN")] = None,
    rating: Annotated[str | None, typer.Option("--rating", metavar="COLUMN")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="COLUMN")] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="COLUMNS", help="Columns of text, with commas.")
    ] = "",
    label: Annotated[
        str | None, typer.Option("--label", metavar="COLUMN", help="The column of labels.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="LABEL", help="Flip labels of this class alone.")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option("--to", metavar="LABEL", help="What they become; what fake reviews say."),
    ] = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    debug: Debug = False,
) -> None:
    """Write a copy of a table with fake users, flipped labels or fake reviews in it."""
    with plain_errors(debug):
        from embattle.jobs.poison import Plan, names_in
        from embattle.jobs.poison import poison as run
        from embattle.jobs.poison_reviews import KINDS, ReviewPlan, poison_reviews

        of_users = {
            "--filler": filler,
            "--nuke": nuke or None,
            "--popular": popular,
            "--segment": segment or None,
            "--feedback": feedback,
            "--steps": steps,
            "--user": user,
            "--rating": rating,
            "--time": time,
        }
        of_texts = {"--text": text or None, "--label": label, "--from": source, "--to": goal}
        for option, given in (of_users if kind in KINDS else of_texts).items():
            if given is not None:
                raise InputError(f"{option} is not for --kind {kind}; see embattle poison --help")
        if kind in KINDS:
            if label is None:
                raise InputError(f"--kind {kind} needs --label, the column of labels")
            reviews = ReviewPlan(
                kind,
                label,
                text=names_in(text),
                item=item,
                targets=names_in(targets),
                source=source,
                goal=goal,
                count=count,
                share=share,
                seed=seed,
            )
            poison_reviews(table, out, reviews, encoding=encoding, delimiter=delimiter)
            return
        plan = Plan(
            kind,
            names_in(targets),
            accounts=count,
            share=share,
            fillers=filler,
            nuke=nuke,
            popular=popular,
            segment=names_in(segment),
            feedback=feedback,
            steps=steps,
            seed=seed,
        )
        columns = (user, item, rating, time)
        run(table, out, plan, columns=columns, encoding=encoding, delimiter=delimiter)
