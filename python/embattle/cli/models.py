"""Commands about trained models: `predict`, `export` and `explain`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from embattle.cli.common import Debug, Delimiter, Encoding, Model, Trust, app, plain_errors


class OnBadRow(str, Enum):
    """What `predict` does with a row that it cannot use."""

    fail = "fail"
    skip = "skip"


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
    with plain_errors(debug):
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
    with plain_errors(debug):
        from embattle.jobs.export import export as run

        names = [name.strip() for name in require.split(",") if name.strip()]
        run(model, out, rows=rows, require=names, overwrite=overwrite, trust=trust)


@app.command()
def explain(
    run_dir: Annotated[Path, typer.Argument(help="A folder that `embattle train` wrote.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The name of one model [default: all].")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Samples to explain [default: the recipe's]."),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Show which tokens, fields or items an attack used, and words that turn the model."""
    with plain_errors(debug):
        from embattle.jobs.explain import explain as run

        run(run_dir, model=model, samples=samples, trust=trust)
