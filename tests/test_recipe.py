"""Recipes: what is accepted, what is refused and how, and that they survive being written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        ("variants.hardened.attack=pgd", r"attack: write a mapping, {kind: \.\.\.} \(given: 'pgd'"),
        ("variants.hardened=null", r"hardened: write a mapping, {objective: \.\.\.} \(given: None"),
        ("variants.hardened.masking={}", r"masking\.kind is missing; add it"),
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


KINDS = """
name: x
data: {source: y, text: [a], label: b}
variants:
  hardened:
    objective: partial
    attack: {kind: pgd, steps: 3, step_size: 0.5}
    eps_schedule: {share: 0.1, start: 0.5}
    masking: {kind: loss_quantile, quantile: 0.9}
    every: 4
    scale: 4.0
"""


def hardened(tmp_path: Path, full: str, *changes: str) -> dict[str, Any]:
    """What the variant says after the section `full` and some `--set`."""
    path = tmp_path / "kinds.yaml"
    path.write_text(KINDS + (f"full: {{variants: {{hardened: {full}}}}}" if full else ""))
    recipe = recipes.load(path, full=bool(full), changes=changes)
    return recipe.variants["hardened"].model_dump(exclude_unset=True)


def test_a_section_of_another_kind_begins_anew(tmp_path: Path) -> None:
    before = hardened(tmp_path, "")
    assert hardened(tmp_path, "{objective: partial, every: 2}") == before | {"every": 2}
    assert hardened(tmp_path, "{objective: apr, lam: 8}") == {"objective": "apr", "lam": 8}
    assert hardened(tmp_path, "{objective: mixed}") == {"objective": "mixed"}
    for key, value in (
        ("attack", {"kind": "apgd", "momentum": 0.5}),
        ("eps_schedule", {"kind": "cosine", "end": 0.5}),
        ("masking", {"kind": "confidence", "highest": 0.5}),
    ):
        assert hardened(tmp_path, f"{{{key}: {value}}}") == before | {key: value}
    # What is meant where none is named is no other.
    for key, value in (("attack", "{kind: pgd}"), ("eps_schedule", "{kind: warm_up}")):
        kept = dict(hardened(tmp_path, f"{{{key}: {value}}}")[key])
        assert kept | before[key] == kept
    bare = "{hardened: {lam: 3.0}}"
    path = tmp_path / "bare.yaml"
    path.write_text(f"{KINDS.split('variants')[0]}variants: {bare}")
    same = recipes.load(path, changes=["variants.hardened.objective=mixed"])
    assert same.variants["hardened"].lam == 3.0


def test_it_is_said_what_a_section_of_another_kind_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hardened(tmp_path, "", "variants.hardened.lam=3.0")
    assert not capsys.readouterr().out
    hardened(tmp_path, "", "variants.hardened.objective=trades", "variants.hardened.lam=3.0")
    said, gone = capsys.readouterr().out.strip().split(", without ")
    assert said == "--set: variants.hardened begins anew as trades"
    assert set(gone.split(", ")) == {repr(key) for key in before.keys() - {"objective", "lam"}}


def test_changes_of_one_variant_may_come_in_any_order(tmp_path: Path) -> None:
    changes = ["variants.hardened.lam=3.0", "variants.hardened.objective=trades"]
    for some in (changes, changes[::-1]):
        assert hardened(tmp_path, "", *some) == {"objective": "trades", "lam": 3.0}
    steps = ["variants.hardened.attack.momentum=0.5", "variants.hardened.attack.kind=apgd"]
    one, other = (hardened(tmp_path, "", *some) for some in (steps, steps[::-1]))
    assert one == other
    assert one["attack"] == {"kind": "apgd", "momentum": 0.5}
    with pytest.raises(InputError, match=r"unknown key variants\.hardened\.every in trades"):
        hardened(tmp_path, "", "variants.hardened.every=2", changes[1])


def test_a_model_of_another_kind_keeps_its_keys() -> None:
    films = next(path for path in SHIPPED if path.stem == "films_ranking")
    recipe = recipes.load(films, changes=["model.dim=16", "model.kind=lightgcn"])
    assert (recipe.model.dim, recipe.model.l2) == (16, 0.02)
