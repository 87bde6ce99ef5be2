"""Attacks on columns in a recipe, and what the audit says of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from embattle.audit.evaluation import examined
from embattle.audit.examine import labels_of
from embattle.audit.outcomes import Attacked
from embattle.audit.summary import figure
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.sections import Section, unlike
from embattle.tasks.base import Task
from embattle.tasks.columns import ColumnAttack, ColumnResult, Columns

# Rows of a model that are shown before and after.
SHOWN = 8


class ColumnRecipe(Section):
    """One attack on what rows of a table say; see `embattle.tasks.columns.ColumnAttack`.

    Attributes:
        swaps: most categories exchanged in a row.
        tries: exchanges that are evaluated for each of them.
        immutable: columns that stay as they are.
        eps: radius of noise on numbers, in standard deviations of the columns.
        norm: of the noise.
        steps: gradient steps of the noise.
    """

    swaps: NonNegativeInt = 1
    tries: PositiveInt = 16
    immutable: list[str] = Field(default=[])
    eps: NonNegativeFloat = 0.0
    norm: Literal["linf", "l2"] = "linf"
    steps: PositiveInt = 10

    @model_validator(mode="after")
    def _changes_something(self) -> ColumnRecipe:
        self.make()
        return self

    def make(self) -> ColumnAttack:
        """The attack."""
        return ColumnAttack(**{**self.model_dump(), "immutable": tuple(self.immutable)})


def labelled(recipes: Sequence[ColumnRecipe]) -> dict[str, ColumnRecipe]:
    """The attacks by labels of which no two are alike."""
    return dict(zip(unlike([one.make().label for one in recipes]), recipes, strict=True))


def check_columns(recipes: Sequence[ColumnRecipe], task: Task, model: nn.Module) -> None:
    """Check that a task has the columns that are to be attacked.

    Raises:
        InputError: naming the key.
    """
    columns = task.swappable(model) if recipes else None
    if recipes and columns is None:
        raise InputError(
            "audit.columns: the task has no columns of categories or numbers for an attacker to "
            "change; leave audit.columns out"
        )
    for place, one in enumerate(recipes):
        assert columns is not None
        try:
            one.make().check(columns)
        except InputError as error:
            raise InputError(f"audit.columns.{place}.{error}") from error


def examine_columns(
    recipes: Sequence[ColumnRecipe],
    task: Task,
    model: nn.Module,
    batches: Sequence[Batch],
    clean: Tensor,
) -> tuple[dict[str, Attacked], dict[str, Any]]:
    """Attack the columns of all samples.

    Args:
        recipes: the attacks.
        task: runs the model.
        model: the model.
        batches: the samples, with labels.
        clean: the model's outputs on them, [N, ...].

    Returns:
        By label, what each attack achieved; and what `columns` of a model's facts says of it
        beside the scores: how often each column was exchanged, the mean absolute noise of each
        column of numbers, seconds, and some rows before and after.
    """
    outcomes: dict[str, Attacked] = {}
    facts: dict[str, Any] = {}
    columns = task.swappable(model) if recipes else None
    if columns is None:
        return outcomes, facts
    labels, device = labels_of(batches), next(model.parameters()).device
    right = task.kind.right(clean, labels)
    for label, one in labelled(recipes).items():
        attack, began = one.make(), time.monotonic()
        with examined(model):
            results = [attack.run(model, b.to(device), columns, task) for b in batches]
        outputs = torch.cat([_outputs(result) for result in results])
        stays = task.kind.right(outputs, labels)
        outcomes[label] = Attacked.clean(outputs, stays)
        swapped = torch.cat([result.swapped.cpu() for result in results])
        moved = torch.cat([result.moved.cpu() for result in results])
        facts[label] = {
            "swapped": dict(zip(columns.names, swapped.double().mean(0).tolist(), strict=True)),
            "noise": dict(
                zip(columns.number_names, moved.abs().double().mean(0).tolist(), strict=True)
            ),
            "seconds": round(time.monotonic() - began, 2),
            "examples": _examples(task, columns, batches, results, clean, right & ~stays),
        }
    return outcomes, facts


def column_lines(task: Task, models: dict[str, Any]) -> list[str]:
    """What the audit prints of the attacks on columns."""
    key, title = task.kind.titled()[0]
    return [
        f"{name}: {title} {figure(entry, key)} under {label}, which turns "
        f"{entry['success_rate']:.1%} "
        "of what was right"
        for name, model in models.items()
        for label, entry in model.get("columns", {}).items()
    ]


def _outputs(result: ColumnResult) -> Tensor:
    assert result.now.outputs is not None
    return result.now.outputs.cpu()


def _examples(
    task: Task,
    columns: Columns,
    batches: Sequence[Batch],
    results: Sequence[ColumnResult],
    clean: Tensor,
    turned: Tensor,
) -> list[dict[str, Any]]:
    """The first rows that were turned: what was changed, and both predictions."""
    before = torch.cat([batch.inputs[columns.values] for batch in batches])
    after = torch.cat([result.batch.inputs[columns.values].cpu() for result in results])
    moved = torch.cat([result.moved.cpu() for result in results])
    outputs = torch.cat([_outputs(result) for result in results])
    labels = labels_of(batches)
    shown = []
    for row in turned.nonzero().flatten()[:SHOWN].tolist():
        changed = (before[row] != after[row]).nonzero().flatten().tolist()
        shown.append(
            {
                "before": {columns.names[i]: columns.show(i, int(before[row, i])) for i in changed},
                "after": {columns.names[i]: columns.show(i, int(after[row, i])) for i in changed},
                "noise": dict(zip(columns.number_names, moved[row].tolist(), strict=True)),
                "label": task.kind.show_label(labels[row]),
                "predictions": [
                    task.kind.show(found[row], labels[row]) for found in (clean, outputs)
                ],
            }
        )
    return shown
