"""RecBole's models as tasks: losses, scores and gradients are its own, attacks reach them.

`make recbole` runs these in an environment that has RecBole.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import embattle as eb
import numpy as np
import pytest
import torch
from embattle.audit.evaluation import examined, predict, run_attack
from embattle.errors import InputError
from embattle.integrations import recbole_data
from recbole_cases import (
    CONTEXT,
    GENERAL,
    SEQUENTIAL,
    group_of,
    its_scores,
    mean_of,
    own_trainer,
    step_down,
    task_of,
    total_of,
    values_of,
    write_atomic_files,
)
from torch import nn

needs_recbole = pytest.mark.skipif(
    importlib.util.find_spec("recbole") is None, reason="RecBole is not here; make recbole"
)
MODELS = [*GENERAL, *CONTEXT, *SEQUENTIAL]
#: Lengths of steps of which one must lower a loss: some models begin at tiny weights.
SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
#: Models whose scores end in a sigmoid, which is left out here: it makes ties.
SQUASHED = ("DMF", "NeuMF", "NNCF")
#: Our measures of ranks, and RecBole's.
RANKED = {"hit_rate": "hit@10", "ndcg": "ndcg@10", "mrr": "mrr@10"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("atomic")
    write_atomic_files(made)
    return made


@needs_recbole
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained_attacked_and_scored(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = task_of(name, folder)
    model = task.build().train()
    batch = task.batch(model, "train", torch.arange(8), seed=1)

    # Losses: one for each sample; their mean and its gradient are RecBole's.
    with recbole_data.seeded(5):
        losses = task.evaluate(model, batch).losses
    assert losses is not None
    assert losses.shape == (len(batch),)
    total = total_of(model, batch)
    torch.testing.assert_close(losses.mean(), total)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (
        torch.autograd.grad(x, weights, allow_unused=True) for x in (losses.mean(), total)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    # A short step down the gradient lowers the loss.
    model.eval()
    before = mean_of(task, model, batch)
    gradients = torch.autograd.grad(before, weights, allow_unused=True)
    length = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert length > 0
    assert any(step_down(task, model, batch, gradients, s / length) < before for s in SIZES)

    # Scores are those that RecBole's evaluation judges.
    trainer, loader = own_trainer(task, model)
    test = task.batches(model, "test", 20)
    outputs, labels = predict(model, test, task), torch.cat([b.known_labels() for b in test])
    if name not in SQUASHED:
        measured, scores = trainer.evaluate(loader, False), task.kind.scores(outputs, labels)
        for mine, its in ({"auc": "auc", "loss": "logloss"} if name in CONTEXT else RANKED).items():
            assert scores[mine] == pytest.approx(float(measured[its]), abs=2e-6), mine
    if name not in CONTEXT:
        users = torch.cat([b.inputs["user_id"] for b in test])
        found = {int(u): row for rows in its_scores(trainer, loader) for u, row in rows}
        expected = torch.stack([found[int(user)] for user in users])
        outputs = outputs.sigmoid() if name in SQUASHED else outputs
        outputs = outputs.masked_fill(expected.isneginf() & (outputs == 0), -torch.inf)
        torch.testing.assert_close(outputs, expected)

    # An attack moves what it may, and the losses of what is tested grow.
    few = task.batch(model, "test", torch.arange(6))
    attack = eb.PGD(eps=0.1, steps=5, keep="best")
    with examined(model):
        result = run_attack(model, few, task.sites(model, group_of(task)), attack, evaluator=task)
    assert result.losses is not None
    assert result.clean_losses is not None
    assert bool((result.losses > result.clean_losses).all())
    norms = torch.cat(result.norms)
    assert 0 < float(norms.max()) <= 0.1 * (1 + 1e-5)


@needs_recbole
def test_a_graph_models_kept_vectors_hide_no_attack(folder: Path) -> None:
    task = task_of("LightGCN", folder)
    model = task.build().eval()
    batch = task.batch(model, "test", torch.arange(5))
    clean = task.evaluate(model, batch).outputs
    sites = task.sites(model, "token")
    result = run_attack(model, batch, sites, eb.PGD(eps=1.0, steps=2), evaluator=task)
    with result.applied():
        moved = task.evaluate(model, batch).outputs
    again = task.evaluate(model, batch).outputs
    assert clean is not None
    assert moved is not None
    assert not torch.equal(moved, clean)
    assert again is not None
    assert torch.equal(again, clean)
    assert model.restore_user_e is None


@needs_recbole
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ItemKNN", "not trained by gradients"),
        ("CFKG", "knowledge graph"),
        ("KD_DAGFM", "as code"),
        ("LDiffRec", "pickles"),
        ("bpr", "attribute"),
        ("Nothing", "spells them"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(
    name: str, reason: str, folder: Path
) -> None:
    with pytest.raises(InputError, match=f"RecBole.*{name}.*{reason}|RecBole.*{reason}.*{name}"):
        task_of(name, folder)


@needs_recbole
@pytest.mark.parametrize("name", ["ENMF", "SimpleX", "LINE", "ConvNCF"])
def test_a_loss_that_is_no_mean_over_samples_is_refused(name: str, folder: Path) -> None:
    task = task_of(name, folder)
    model = task.build()
    batch = task.batch(model, "train", torch.arange(10))
    with pytest.raises(InputError, match=f"RecBole's {name} is not served: its loss has 0 known"):
        task.evaluate(model, batch)


@needs_recbole
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, found: 2 * found, "weight 2"),
        (lambda model, found: found + model.loss(found[None], found[None]), "has 2 known"),
    ],
)
def test_a_criterion_is_not_attributed_wrongly(change: Any, reason: str, folder: Path) -> None:
    task = task_of("BPR", folder)
    model: Any = task.build()
    own = model.calculate_loss
    model.calculate_loss = lambda interaction: change(model, own(interaction))
    with pytest.raises(InputError, match=reason):
        task.evaluate(model, task.batch(model, "train", torch.arange(4)))


@needs_recbole
def test_batches_come_of_the_seed_and_nothing_else_is_touched(folder: Path) -> None:
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    before = random.getstate(), torch.get_rng_state()
    argv = list(sys.argv)
    task = task_of("BPR", folder)
    model = task.build()
    rows = torch.arange(50)
    first, again, other = (task.batch(model, "train", rows, seed=s).inputs for s in (1, 1, 2))
    assert torch.equal(first["neg_item_id"], again["neg_item_id"])
    assert not torch.equal(first["neg_item_id"], other["neg_item_id"])
    assert torch.equal(first["item_id"], other["item_id"])
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    assert sys.argv == argv


@needs_recbole
def test_the_fingerprint_knows_data_and_limits(folder: Path, tmp_path: Path) -> None:
    whole = task_of("BPR", folder).fingerprint()
    assert task_of("BPR", folder).fingerprint() == whole
    few = task_of("BPR", folder, limits={"test": 7})
    assert few.counts()["test"] == 7
    assert few.fingerprint() != whole
    write_atomic_files(tmp_path)
    file = tmp_path / "tiny" / "tiny.inter"
    text = file.read_text()
    file.write_text(text.replace("u0\t", "u1\t", 1))
    assert task_of("BPR", tmp_path).fingerprint() != whole


@needs_recbole
def test_users_of_a_file_are_ranked_for(folder: Path) -> None:
    task = task_of("BPR", folder)
    model = task.build().eval()
    batch = task.encode(model, [{"user_id": "u3"}, {"user_id": "u7"}])
    scores = task.evaluate(model, batch).outputs
    assert scores is not None
    assert bool(scores[:, 0].isneginf().all())
    assert int(scores.isneginf().sum()) == 2 * (1 + 11)  # padding, and what they met before
    with pytest.raises(InputError, match="user_id"):
        task.encode(model, [{"user_id": "nobody"}])


@needs_recbole
def test_a_file_of_recboles_runs_nothing(folder: Path, tmp_path: Path) -> None:
    code = f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()"
    arguments = sys.argv
    sys.argv = [*arguments, f"--epochs={code}"]
    try:
        task_of("BPR", folder, overrides={"user_inter_num_interval": "[0,inf)", "learner": code})
    finally:
        sys.argv = arguments
    for key in ("dataset_save_path", "dataloaders_save_path"):
        with pytest.raises(InputError, match=f"{key} names a pickle"):
            task_of("BPR", folder, overrides={key: str(tmp_path / "data.pth")})
    checkpoint = tmp_path / "BPR.pth"
    torch.save({"state_dict": {}, "config": Touches(tmp_path / "ran")}, checkpoint)
    with pytest.raises(InputError, match=r"without running code.*save_file"):
        task_of("BPR", folder, checkpoint=str(checkpoint)).build()
    (tmp_path / "c.yaml").write_text(f"model: !!python/object/apply:eval [{code!r}]\n")
    with pytest.raises(InputError, match="plain YAML"):
        recbole_data.merged([str(tmp_path / "c.yaml")], {})
    assert not (tmp_path / "ran").exists()


class Touches:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_pickle_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touches(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_numbers_are_read_as_recbole_reads_them(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: BPR\ndataset: tiny\nlearning_rate: 1e-3\ntopk: 5\n")
    (tmp_path / "two.yaml").write_text("topk: [10]\n")
    files = [str(tmp_path / name) for name in ("one.yaml", "two.yaml")]
    found = recbole_data.merged(files, {"dataset": "other"})
    assert found == {"model": "BPR", "dataset": "other", "learning_rate": 1e-3, "topk": [10]}
    with pytest.raises(InputError, match="names no dataset"):
        recbole_data.merged([], {"model": "BPR"})
    with pytest.raises(InputError, match=r"cannot read.*three"):
        recbole_data.merged([str(tmp_path / "three.yaml")], {})


@needs_recbole
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("DeepFM", {"threshold": None}, "LABEL_FIELD"),
        ("DeepFM", {"train_neg_sample_args": {"distribution": "uniform"}}, "negatives|label"),
        ("BPR", {"eval_args": {"split": {"RS": [0.8, 0.2]}}}, "2 parts"),
        ("BPR", {"train_neg_sample_args": {"dynamic": True, "distribution": "uniform"}}, "dynamic"),
        ("BPR", {"data_path": "nowhere"}, "no folder"),
        ("BPR", {"topk": 0}, "topk"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    name: str, change: dict[str, Any], reason: str, folder: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        task_of(name, folder, overrides=change)


@needs_recbole
def test_places_of_an_attack_are_named_or_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"'nothing' is no module; there are: .*item_embedding"):
        task_of("BPR", folder, sites=["nothing"]).sites(task_of("BPR", folder).build(), "token")
    task = task_of("BPR", folder, sites=["item_embedding"])
    assert len(task.sites(task.build(), "token")) == 1
    with pytest.raises(InputError, match="group: token"):
        task.sites(task.build(), "sample")
    task = task_of("DMF", folder, sites=[])
    with pytest.raises(InputError, match=r"model\.sites"):
        task.sites(task.build(), "token")


QUICK = [
    "train.steps=4",
    "train.batch_size=32",
    "data.limits.test=12",
    "audit.attacks=[{kind: fgm}]",
    "audit.sweep=[1.0]",
]


@needs_recbole
@pytest.mark.parametrize("name", ["LightGCN", "DeepFM", "SASRec"])
def test_one_command_hardens_and_audits(name: str, folder: Path, tmp_path: Path) -> None:
    from tiny_job import invoke

    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(values_of(name, folder)))
    out, options = tmp_path / "run", [word for change in QUICK for word in ("--set", change)]
    status, said = invoke("recbole", config, "--out", out, *options)
    assert status == 0, said
    assert (out / "report.html").is_file()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == "recbole"
    assert metrics["examples"] == 12

    # The weights of the run are a checkpoint that can be attacked as it is.
    weights = out / "standard" / "model.safetensors"
    options += ["--checkpoint", str(weights), "--as-is", "--out", str(tmp_path / "alone")]
    status, said = invoke("recbole", config, *options)
    assert status == 0, said
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    standard = metrics["models"]["standard"]
    clean = alone["results"]["no attack"]
    assert "loss" in clean
    assert clean == pytest.approx({key: standard["clean"][key] for key in clean})
    # In the run's audit samples whose ranks are wrong are left alone.
    key = "loss" if name == "DeepFM" else "hit_rate"
    found, audited = alone["results"]["FGM"][key], standard["attacks"]["FGM"][key]
    if name == "LightGCN":  # rows that all samples share then serve the others alone
        assert audited <= found
    else:
        assert found == pytest.approx(audited, rel=1e-4)
    status, said = invoke("recbole", config, *options)
    assert status == 2, said
    assert "there already" in said


@needs_recbole
def test_a_checkpoint_begins_the_training_and_must_fit(folder: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = task_of("BPR", folder).build()
    nn.init.constant_(model.user_embedding.weight, 0.25)  # type: ignore[arg-type, union-attr]
    safetensors.save_file(model.state_dict(), tmp_path / "own.safetensors")
    loaded = task_of("BPR", folder, checkpoint=str(tmp_path / "own.safetensors")).build()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(InputError, match="does not fit NeuMF"):
        task_of("NeuMF", folder, checkpoint=str(tmp_path / "own.safetensors")).build()
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        task_of("BPR", folder, checkpoint=str(tmp_path / "none.safetensors")).build()


@pytest.mark.skipif(importlib.util.find_spec("recbole") is not None, reason="RecBole is here")
def test_without_recbole_the_command_says_what_to_do(tmp_path: Path) -> None:
    from tiny_job import invoke

    (tmp_path / "c.yaml").write_text("model: BPR\ndataset: tiny\n")
    status, said = invoke("recbole", tmp_path / "c.yaml")
    assert status == 2, said
    assert "make recbole" in said
