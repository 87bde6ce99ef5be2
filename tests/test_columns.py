"""Exchanged categories and noise on numbers: against brute force, budgets, what is immutable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import embattle as eb
import pytest
import torch
from embattle.data.batch import Batch
from embattle.errors import InputError
from embattle.models.deepfm import DeepFM
from embattle.models.dlrm import DLRM
from embattle.perturb.evaluation import Evaluation
from embattle.tasks.columns import ColumnAttack, ColumnResult, Columns
from embattle.tasks.evaluator import Evaluator
from embattle.tasks.kinds import BinaryClassification
from torch import Tensor, nn

SIZES = [4, 6, 3]
EVALUATOR = Evaluator(BinaryClassification(("no", "yes")))


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = DeepFM(SIZES, dim=5) if kind == "deepfm" else DLRM(SIZES, 2, dim=5)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model.requires_grad_(False).eval()


def rows(kind: str, count: int = 12) -> Batch:
    draw = torch.Generator().manual_seed(1)
    values = [torch.randint(1, size, (count,), generator=draw) for size in SIZES]
    inputs = {"values": torch.stack(values, 1)}
    if kind == "dlrm":
        inputs["dense"] = torch.randn(count, 2, generator=draw)
    return Batch(inputs, torch.randint(0, 2, (count,), generator=draw))


def columns(kind: str, model: Any) -> Columns:
    if kind == "deepfm":
        return Columns("values", "abc", SIZES, [model.embedding, model.first])
    return Columns(
        "values",
        "abc",
        SIZES,
        [model.embedding],
        numbers="dense",
        number_names="xy",
        number_place=model.numbers,
    )


def losses(model: nn.Module, batch: Batch, values: Tensor | None = None) -> Tensor:
    inputs = batch.inputs if values is None else {**batch.inputs, "values": values}
    found = EVALUATOR.evaluate(model, Batch(inputs, batch.labels)).losses
    assert found is not None
    return found


def swap(kind: str, model: Any, batch: Batch, **options: Any) -> Any:
    tables = columns(kind, model).tables
    return eb.CategorySwap(**options).run(
        lambda values: lambda: losses(model, batch, values),
        [eb.Site(table) for table in tables],
        batch.inputs["values"],
        sizes=SIZES,
    )


@pytest.mark.parametrize("kind", ["deepfm", "dlrm"])
def test_one_exchange_is_the_best_that_there_is(kind: str) -> None:
    model, batch = made(kind), rows(kind)
    values = batch.inputs["values"]
    best = losses(model, batch)
    for field, size in enumerate(SIZES):
        for value in range(size):
            trial = values.clone()
            trial[:, field] = value
            best = torch.maximum(best, losses(model, batch, trial))
    found = swap(kind, model, batch, tries=None)
    assert torch.allclose(found.losses, best)
    assert int(found.swapped.sum(1).max()) == 1
    assert torch.allclose(losses(model, batch, found.tokens), found.losses)
    few = swap(kind, model, batch, tries=3)
    assert bool((few.losses <= found.losses + 1e-6).all())
    assert bool((few.losses >= losses(model, batch)).all())
    three = swap(kind, model, batch, swaps=3, tries=None)
    assert bool((three.losses >= found.losses - 1e-6).all())
    assert int(three.swapped.sum(1).max()) > 1


def test_gains_of_all_tables_order_the_tries() -> None:
    """Where the model is linear in the tables, one try is enough."""
    model = made("deepfm")
    model.embedding.weight.data.zero_()  # type: ignore[union-attr,operator]
    batch = rows("deepfm")
    one, every = (swap("deepfm", model, batch, tries=tries) for tries in (1, None))
    assert torch.allclose(one.losses, every.losses)


def test_what_is_frozen_or_not_allowed_stays_out() -> None:
    model, batch = made("deepfm"), rows("deepfm")
    values = batch.inputs["values"]
    allowed = torch.tensor([0] + [1] * 3 + [0] + [1] * 5 + [0] + [1] * 2).bool()
    found = swap("deepfm", model, batch, swaps=3, tries=None, frozen=[1], allowed=allowed)
    assert torch.equal(found.tokens[:, 1], values[:, 1])
    assert bool((found.tokens > 0).all())
    assert bool(found.swapped[:, [0, 2]].any())


class _Spy(Evaluator):
    """Keeps each row's largest loss of all that is evaluated."""

    largest = torch.full((12,), -torch.inf)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        at = super().evaluate(model, batch)
        assert at.losses is not None
        self.largest = torch.maximum(self.largest, at.losses.detach())
        return at


@pytest.mark.parametrize("kind", ["deepfm", "dlrm"])
def test_rows_that_are_turned_are_attacked_on(kind: str) -> None:
    """So that AUC and log loss are of each row at its worst."""
    model, batch = made(kind), rows(kind)
    spy = _Spy(BinaryClassification(("no", "yes")))
    options: dict[str, Any] = {"swaps": 3, "tries": 4, "eps": 0.5 if kind == "dlrm" else 0.0}
    found = ColumnAttack(**options).run(model, batch, columns(kind, model), spy)
    assert found.now.losses is not None
    assert torch.allclose(found.now.losses, spy.largest)
    wrong = ~spy.kind.right(found.clean.outputs, batch.labels)  # type: ignore[arg-type]
    assert bool((found.now.losses > found.clean.losses)[wrong].any())  # type: ignore[operator]


def attacked(kind: str, model: nn.Module, batch: Batch, **options: Any) -> ColumnResult:
    return ColumnAttack(**options).run(model, batch, columns(kind, model), EVALUATOR)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_stays_in_its_ball_and_off_immutable_columns(norm: Any) -> None:
    model, batch = made("dlrm"), rows("dlrm")
    found = attacked("dlrm", model, batch, swaps=0, eps=0.5, norm=norm)
    size = found.moved.abs().amax(1) if norm == "linf" else found.moved.norm(dim=1)
    assert float(size.max()) <= 0.5 + 1e-6
    assert torch.allclose(losses(model, found.batch), found.now.losses)
    assert bool((found.now.losses >= found.clean.losses).all())
    assert bool((found.now.losses > found.clean.losses).any())
    assert torch.equal(found.batch.inputs["values"], batch.inputs["values"])
    both = attacked("dlrm", model, batch, swaps=2, eps=0.5, norm=norm, immutable=("x", "b"))
    assert torch.equal(both.batch.inputs["dense"][:, 0], batch.inputs["dense"][:, 0])
    assert torch.equal(both.batch.inputs["values"][:, 1], batch.inputs["values"][:, 1])
    assert bool((both.batch.inputs["values"] > 0).all())
    assert torch.allclose(losses(model, both.batch), both.now.losses)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("deepfm", {"immutable": ("d",)}, "immutable: no column 'd'"),
        ("deepfm", {"immutable": ("a", "b", "c")}, "all columns of categories are immutable"),
        ("deepfm", {"eps": 0.1}, "eps: noise needs a column of numbers"),
        ("dlrm", {"eps": 0.1, "immutable": ("x", "y")}, "eps: noise needs a column of numbers"),
    ],
)
def test_attacks_that_do_not_go_with_the_columns(
    kind: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        attacked(kind, made(kind), rows(kind), **options)


def test_wrong_arguments_are_named() -> None:
    model, batch = made("deepfm"), rows("deepfm")
    with pytest.raises(ValueError, match="swaps and eps are both 0"):
        ColumnAttack(swaps=0)
    with pytest.raises(ValueError, match="swaps must be at least 1"):
        eb.CategorySwap(swaps=0)
    with pytest.raises(TypeError, match="allowed must be a tensor of dtype bool"):
        eb.CategorySwap(allowed=torch.ones(3))
    with pytest.raises(ValueError, match=r"allowed has shape \(3,\) for 13 values"):
        swap("deepfm", model, batch, allowed=torch.ones(3).bool())
    with pytest.raises(ValueError, match=r"frozen must be columns in \[0, 3\), got 3"):
        swap("deepfm", model, batch, frozen=[3])

    def run(values: Tensor, sizes: list[int], site: Any = None) -> None:
        eb.CategorySwap().run(
            lambda v: lambda: losses(model, batch, v),
            site or eb.Site(model.embedding),
            values,
            sizes=sizes,
        )

    values = batch.inputs["values"]
    with pytest.raises(ValueError, match="sizes add up to 14 for a table of 13 rows"):
        run(values, [4, 6, 4])
    with pytest.raises(ValueError, match=r"column 0 has the values \[0, 4\), got 9"):
        run(values.index_fill(1, torch.tensor([0]), 9), SIZES)
    with pytest.raises(ValueError, match=r"values must be integers \[B, 3\]"):
        run(values[:, :2], SIZES)
    with pytest.raises(TypeError, match=r"needs sites on nn\.Embedding, got Sequential"):
        run(values, SIZES, eb.Site(model.deep))


def test_the_audit_attacks_columns(tmp_path: Path) -> None:
    for name in ("accelerate", "matplotlib", "pyarrow", "pydantic", "scipy", "typer"):
        pytest.importorskip(name)
    import yaml
    from embattle.audit.schema import Metrics
    from embattle.audit.scores import read_outcomes
    from embattle.audit.statistics import mcnemar, wilson
    from test_tabular import RECIPE, write
    from tiny_job import invoke

    raw = yaml.safe_load(RECIPE.read_text())
    del raw["data"]["source"], raw["full"]
    raw["data"] |= {"path": str(write(tmp_path / "rows.csv")), "limits": {}}
    raw["model"] = {"dim": 4, "hidden": [8]}
    raw["train"] = {"steps": 40, "batch_size": 64, "learning_rate": 0.02}
    raw["variants"]["hardened"]["attack"]["steps"] = 1
    raw["audit"] = {
        "attacks": [{"kind": "pgd", "steps": 2}],
        "sweep": [1.0],
        "columns": [{"swaps": 2, "tries": 4, "immutable": ["age"]}],
    }
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(raw))
    status, told = invoke("train", recipe, "--out", run)
    assert status == 0, told
    status, told = invoke("audit", run, "--fail-under", "Swap-2, not agge.accuracy=0.1")
    assert status == 2, told
    assert "did you mean 'Swap-2, not age.accuracy'" in told
    status, told = invoke("audit", run, "--fail-under", "Swap-2, not age.accuracy=1")
    assert status == 1, told
    assert "failed: hardened: Swap-2, not age.accuracy" in told
    assert "standard: accuracy" in told
    facts = json.loads((run / "metrics.json").read_text())
    models = facts["models"]
    Metrics.model_validate(facts)
    _, right = read_outcomes(run / "outcomes.safetensors")
    for name, model in models.items():
        (label, entry), *none = model["columns"].items()
        assert not none
        assert label == "Swap-2, not age"
        good = int(right[name][label].sum())
        assert entry["accuracy"] == pytest.approx(good / facts["examples"])
        assert entry["intervals"]["accuracy"] == pytest.approx(wilson(good, facts["examples"]))
        assert set(entry["intervals"]) >= {"auc", "success_rate"}
        assert list(model["attacks"]) == ["PGD-2"]
        assert entry["accuracy"] <= model["clean"]["accuracy"]
        assert entry["swapped"]["age"] == 0
        assert 0 < sum(entry["swapped"].values()) <= 2
    (one,) = (
        one
        for one in facts["comparisons"]
        if one["attack"] == label and one["measure"] == "accuracy"
    )
    pair = (right[name][label] for name in ("standard", "hardened"))
    assert one["p"] == pytest.approx(mcnemar(*pair))
    page = (run / "report.html").read_text()
    assert "Changed columns" in page
    assert "Rows before and after: standard" in page
    standard = next(iter(models["standard"]["columns"].values()))
    assert standard["success_rate"] > 0
    example = standard["examples"][0]
    assert 1 <= len(example["before"]) <= 2
    assert list(example["before"]) == list(example["after"])
    assert example["before"] != example["after"]

    raw["audit"]["columns"][0]["immutable"] = ["agge"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(raw))
    status, told = invoke("audit", run)
    assert status == 2, told
    assert "audit.columns.0.immutable: no column 'agge'; did you mean 'age'" in told
