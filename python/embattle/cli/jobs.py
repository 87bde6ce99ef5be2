"""Commands of jobs: `init`, `train`, `audit`, `report`, `tune`, `recbole`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embattle.cli.common import (
    Changes,
    Debug,
    Delimiter,
    Encoding,
    Full,
    Overwrite,
    Resume,
    Trust,
    app,
    plain_errors,
)


@app.command()
def init(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A table, or a folder in the layout of MIND.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The recipe to write [default: NAME.yaml].")
    ] = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    debug: Debug = False,
) -> None:
    """Look at a file and write a commented recipe for it, ready to train."""
    with plain_errors(debug):
        from embattle.jobs.init import init as run

        run(path, out, encoding=encoding, delimiter=delimiter)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The run's folder [default: runs/NAME].")
    ] = None,
    full: Full = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    changes: Changes = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Train a standard model and the recipe's variants under the same budget."""
    with plain_errors(debug):
        from embattle.jobs import recipe as recipes

        chosen = recipes.load(recipe, full=full, changes=changes or (), trust=trust)

        from embattle.jobs.train import train as run

        run(chosen, out or Path("runs") / chosen.name, resume=resume, overwrite=overwrite)


@app.command()
def audit(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders that `embattle train` wrote, or models in them, such as "
            "runs/NAME/hardened.",
        ),
    ],
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under",
            metavar="MEASURE=VALUE",
            help="Leave with status 1 if a hardened model (or MODEL: in front) has less, such as "
            "robust_accuracy=0.6; may be repeated.",
        ),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="Prove, too, what no attack can do to the models.")
    ] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Attack all models of runs and write each run's report."""
    with plain_errors(debug):
        from embattle.jobs import audit as job
        from embattle.jobs import bounds

        wanted = bounds.parse(fail_under or ())
        failed = job.audit_all(runs, bounds=wanted, trust=trust, certify=certify)
        if failed:
            for line in failed:
                print(f"failed: {line}")
            raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs that `embattle audit` has examined."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Also write the comparison: NAME.html or NAME.json."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    debug: Debug = False,
) -> None:
    """Compare audited runs: what each model reaches, what it cost, and which differ."""
    with plain_errors(debug):
        from embattle.jobs.report import report as run

        run(runs, out, overwrite=overwrite)


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="The recipe, with a section 'tune'.")],
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Trials in the end, earlier ones included.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The study's folder [default: runs/NAME-tune].")
    ] = None,
    full: Full = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the study; start one where none is.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is in the folder.")
    ] = False,
    changes: Changes = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Find a variant's most robust options at a bounded loss, and write the recipe with them."""
    with plain_errors(debug):
        from embattle.jobs import recipe as recipes

        chosen = recipes.load(recipe, full=full, changes=changes or (), trust=trust)

        from embattle.jobs.tune import tune as run

        out = out or Path("runs") / f"{chosen.name}-tune"
        run(chosen, out, trials=trials, resume=resume, overwrite=overwrite)


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
    resume: Resume = False,
    overwrite: Overwrite = False,
    changes: Changes = None,
    debug: Debug = False,
) -> None:
    """Harden and audit a model of RecBole's, in an environment that has it (make recbole)."""
    with plain_errors(debug):
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
