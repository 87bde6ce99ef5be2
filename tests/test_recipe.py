"""Recipes: what is accepted, what is refused and how, and that they survive being written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from embattle.errors import InputError
from embattle.jobs import recipe as recipes

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TEXTS = next(path for path in SHIPPED if path.stem == "womens_reviews")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_survives_being_written(path: Path, tmp_path: Path) -> None:
    recipe = recipes.load(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert recipes.load(copy) == recipe
    assert recipes.differences(recipe, recipes.load(path, full=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.stepz=1", "unknown key train.stepz; did you mean 'steps'"),
        ("tran.steps=1", "unknown key tran; did you mean 'train'"),
        (
            "audit.attacks=[{kind: pgd, stps: 3}]",
            "audit.attacks.0.stps in pgd; did you mean 'steps'",
        ),
        ("data.limits.trian=1", "data.limits.trian; did you mean 'train'"),
        ("threat.eps=-0.5", r"threat.eps: .*greater than or equal to 0 \(given: -0.5\)"),
        ("threat.eps=.nan", "threat.eps"),
        ("variants.hardened.attack.kind=fgsm", "use fgm"),
        ("audit.attacks=[{kind: pgd, restarts: 2}]", "restarts need random_start"),
        ("data.fractions=[0.5, 0.4, 0.4]", "sum to 1"),
        ("data.path=a.csv", "not both"),
        ("train.steps", "write --set section.key=value"),
        ("train.steps=[", "not YAML"),
        ("name=../elsewhere", "name"),
        ("audit.sweep=[]", "audit.sweep"),
        ("audit.strengths=[2]", "1 among them"),
        ("audit.strengths=[1, 2, 2]", "none twice"),
        ("audit.attacks=[{kind: minimum_norm}]", "audit.attacks.0.kind: 'minimum_norm'"),
        ("audit.sweep_attack={kind: ensemble}", "audit.sweep_attack.kind: 'ensemble'"),
        ("variants.hardened.attack={kind: ensemble}", "'ensemble'"),
        ("train={steps: 1, steps: 2}", "not YAML"),
        ("data.label=Title", "'Title' is among the text columns"),
    ],
)
def test_a_bad_change_is_named(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipes.load(TEXTS, changes=[change])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line"),
        ("just words", "no recipe"),
        ("name: x\ndata: {source: y}\nname: z", "line 3: the key 'name' is there twice"),
        ("name: x\ndata: {text: [a], label: b, label: c}", "the key 'label' is there twice"),
        ("[" * 5000, "bad.yaml"),
        ("name: x\n", "data is missing"),
        ("name: x\ndata: {source: y, text: [a], label: b}\nfull: {train: {stepz: 1}}", "stepz"),
        ("!!python/object/apply:os.system [ls]", "correct the YAML"),
    ],
)
def test_a_bad_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        recipes.load(path)
    assert "bad.yaml" in str(error.value)


def test_changes_come_last_and_full_is_applied() -> None:
    recipe = recipes.load(TEXTS, full=True, changes=["train.steps=7", "model.layers=3"])
    assert (recipe.train.steps, recipe.model.layers) == (7, 3)
    assert recipe.data.limits.train is None
    assert recipe.full == {}


def test_a_merged_mapping_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: x\ndata: {source: y, text: [a], label: b}\n"
        "variants: {hardened: {attack: &one {kind: pgd, steps: 1}}}\n"
        "audit: {attacks: [{<<: *one, steps: 7}]}\n"
    )
    assert recipes.load(path).audit.attacks[0].steps == 7
