"""Matrix factorisation with texts: its scores, what is kept of texts, and what is attacked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import embattle as eb
import made_tables
import yaml
from embattle.attacks import PGD
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.models import MF
from embattle.models.encoder import TextEncoder
from embattle.models.hybrid import HybridMF
from embattle.models.pretrained import load_encoder
from embattle.tasks import Account, Task
from tiny_job import invoke, make_encoder
from torch import Tensor

RECIPE = Path(__file__).parents[1] / "recipes" / "films_hybrid.yaml"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables in the columns of MovieLens 100K, an encoder, and a recipe for them."""
    folder = tmp_path_factory.mktemp("films")
    made_tables.film_ratings(folder / "ratings.csv")
    made_tables.films(folder / "films.csv")
    make_encoder(folder / "encoder")
    raw = yaml.safe_load(RECIPE.read_text())
    del raw["data"]["source"], raw["data"]["items"]["source"]
    raw["data"] |= {"path": str(folder / "ratings.csv"), "k": 3}
    raw["data"]["items"]["path"] = str(folder / "films.csv")
    raw["model"] |= {"pretrained": str(folder / "encoder"), "dim": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder


def made(films: Path, *changes: str) -> Any:
    task: Task = recipes.load(films / "recipe.yaml", changes=changes).make_task()
    task.read(Account())
    return task


def encoder(films: Path) -> TextEncoder:
    return TextEncoder(
        *load_encoder(str(films / "encoder"), None, 0.0), pooling="mean", max_tokens=12
    )


TEXTS = ["love the dress", "poor size", "", "the colour is great and soft"]


def hybrid(films: Path, **options: Any) -> HybridMF:
    torch.manual_seed(0)
    return HybridMF(5, encoder(films), TEXTS, dim=4, std=0.5, **options)


def test_scores_are_those_of_the_equation(films: Path) -> None:
    model = hybrid(films)
    e = [model.texts.encoder.pooled(**model.texts.encoder.tokenize([t]).inputs) for t in TEXTS]
    vectors = model.item.weight + model.projection(torch.cat(e))
    users = torch.tensor([3, 0])
    wanted = model.user(users) @ vectors.T + model.bias
    torch.testing.assert_close(model.scores(users), wanted)
    items = torch.tensor([1, 3])
    torch.testing.assert_close(model(users, items), wanted.gather(1, items[:, None])[:, 0])
    other = torch.tensor([0, 2])
    gap = wanted.gather(1, items[:, None]) - wanted.gather(1, other[:, None])
    losses = model.losses(users, items, other)
    torch.testing.assert_close(losses, torch.nn.functional.softplus(-gap[:, 0]))
    text = model.projection(torch.cat(e))
    more = (text[items].square().sum(1) + text[other].square().sum(1)) / 2
    torch.testing.assert_close(
        model.penalty(users, items, other), MF.penalty(model, users, items, other) + more
    )


def test_a_text_that_is_not_rewritten_changes_nothing(films: Path) -> None:
    model, users, items = hybrid(films), torch.tensor([3, 0]), torch.tensor([1, 3])
    same = model.texts.tokens(items.tolist()).inputs
    torch.testing.assert_close(
        model.scores_where_rewritten(users, items, **same), model.scores(users)
    )
    other = model.texts.tokens([3, 1]).inputs
    changed = model.scores_where_rewritten(users, items, **other) != model.scores(users)
    assert changed.nonzero().tolist() == [[0, 1], [1, 3]]
    negative = torch.tensor([0, 2])
    torch.testing.assert_close(
        model.losses(users, items, negative, **same), model.losses(users, items, negative)
    )


def test_a_frozen_text_is_encoded_once_and_a_trained_one_after_each_change(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    tokenize = TextEncoder.tokenize
    monkeypatch.setattr(
        TextEncoder,
        "tokenize",
        lambda self, texts: seen.append(len(texts)) or tokenize(self, texts),
    )
    users, items = torch.tensor([3, 0]), torch.tensor([1, 1])
    frozen = hybrid(films).train()
    frozen(users, items).sum().backward()
    assert seen == [1]  # the one text that was asked for
    frozen.scores(users)
    frozen.eval().scores(users)
    assert seen == [1, 3]
    assert not frozen.texts.encoder.training
    assert all(weight.grad is None for weight in frozen.texts.encoder.parameters())

    seen.clear()
    trained = hybrid(films, trained=True).train()
    before = trained.eval().scores(users).detach()
    trained.train()(users, items).sum().backward()
    weight = trained.texts.encoder.embedding.weight
    assert weight.grad is not None
    with torch.no_grad():
        weight += 1.0 + torch.arange(len(weight))[:, None]
    after = trained.eval().scores(users)
    assert seen == [4, 1, 4]
    assert not torch.allclose(before, after)


@torch.no_grad()
def shift(model: HybridMF) -> None:
    """Trains, as it were: writes a weight of the encoder."""
    weight = model.texts.encoder.embedding.weight
    weight += 1.0 + torch.arange(len(weight))[:, None]


@torch.no_grad()
def encoded(model: HybridMF) -> Tensor:
    encoder = model.texts.encoder
    return torch.cat([encoder.pooled(**encoder.tokenize([text]).inputs) for text in TEXTS])


def assign(model: HybridMF) -> HybridMF:
    weights = {name: weight * 2 for name, weight in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model


def exchange(model: HybridMF) -> HybridMF:
    weights = list(model.texts.encoder.parameters())
    vector = torch.nn.utils.parameters_to_vector(weights).detach()
    torch.nn.utils.vector_to_parameters(vector * 2, weights)
    return model


def write_data(model: HybridMF) -> HybridMF:
    for weight in model.texts.encoder.parameters():
        weight.data.mul_(2)
    return model


def replicate(model: HybridMF) -> HybridMF:
    """Gives what nn.DataParallel runs: a copy with plain tensors in place of parameters."""
    model = copy.deepcopy(model)
    for module in model.texts.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, weight.detach() * 2)
    return model


def test_an_attack_does_not_put_back_vectors_of_earlier_weights(films: Path) -> None:
    model = hybrid(films, trained=True).eval()
    model.texts.every()
    shift(model)
    users, criterion = torch.tensor([3, 0]), eb.Outrank(torch.tensor([1, 2]), 2)
    PGD(eps=0.1, steps=2).run(
        lambda: eb.Evaluation(outputs=model.scores(users)),
        [eb.Site.weight(table, model=model) for table in (model.user, model.item)],
        criterion=criterion,
    )
    torch.testing.assert_close(model.texts.every(), encoded(model))


@pytest.mark.parametrize(
    "change", [copy.deepcopy, assign, exchange, HybridMF.double, write_data, replicate]
)
def test_vectors_are_those_of_the_weights_that_are_there(
    films: Path, change: Callable[[HybridMF], HybridMF]
) -> None:
    """A copy counts the writes to its weights from 0 again, as do weights that take their place."""
    model = copy.deepcopy(hybrid(films, trained=True)).eval()
    model.texts.every()
    if change is copy.deepcopy:
        shift(model)
    changed = change(model)
    torch.testing.assert_close(changed.texts.every(), encoded(changed))


@pytest.mark.parametrize("fused", [False, True])
def test_vectors_after_a_step_are_those_of_the_new_weights(films: Path, fused: bool) -> None:
    """A fused optimizer counts no writes, and may write but few numbers."""
    model = hybrid(films, trained=True)
    model.texts.encoder.requires_grad_(False).embedding.requires_grad_(True)
    optimizer = torch.optim.Adam(model.texts.encoder.embedding.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        model.eval().texts.every()
        model.train().texts(torch.tensor([0, 3])).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(model.eval().texts.every(), encoded(model))


def test_reading_texts_leaves_the_modes_of_the_encoder_s_parts(films: Path) -> None:
    model = hybrid(films, trained=True).train()
    model.texts.encoder.embedding.eval()
    modes = [module.training for module in model.modules()]
    model.texts.every()
    assert [module.training for module in model.modules()] == modes


def test_gradients_of_a_function_of_the_weights(films: Path) -> None:
    model = hybrid(films).eval()
    users, weights = torch.tensor([3, 0]), dict(model.named_parameters())
    found = torch.func.grad(
        lambda own: torch.func.functional_call(model, own, (users, users)).sum()
    )(weights)
    model(users, users).sum().backward()
    torch.testing.assert_close(found["projection.weight"], model.projection.weight.grad)


def test_texts_that_were_first_read_in_inference_mode_can_be_trained_on(films: Path) -> None:
    model = hybrid(films)
    with torch.inference_mode():
        model.texts(torch.tensor([1]))
    model.scores(torch.tensor([0])).sum().backward()
    assert model.projection.weight.grad is not None
    torch.testing.assert_close(model.texts.every(), encoded(model))


def test_what_an_attacker_of_texts_may_move(films: Path) -> None:
    task = made(films, "model.attacked=texts")
    model = task.build().eval()
    batch = task.batch(model, "test", torch.arange(24))
    result = PGD(eps=20.0, steps=5).run(
        lambda: task.evaluate(model, batch),
        task.sites(model, "sample"),
        criterion=task.criterion(batch),
        mask=task.mask(batch),
    )
    clean = task.evaluate(model, batch).outputs
    assert result.losses.mean() > result.clean_losses.mean()
    # The item that is held out is scored otherwise, and nothing else.
    moved = (result.outputs != clean).nonzero()
    assert (moved[:, 1] == batch.labels[moved[:, 0]]).all()
    assert len(moved) > 12
    (delta,) = result.deltas
    assert delta[~batch.movable].eq(0).all()
    train = task.batch(model, "train", torch.arange(6))
    found = PGD(eps=20.0, steps=2).run(
        lambda: task.evaluate(model, train), task.sites(model, "token"), mask=task.mask(train)
    )
    assert (found.losses > found.clean_losses).all()
    assert found.deltas[0].shape[:2] == train.movable.shape


def test_rows_are_attacked_as_those_of_other_rankers(films: Path) -> None:
    task = made(films)
    model = task.build().eval()
    batch = task.batch(model, "test", torch.arange(24))
    assert set(batch.inputs) == {"users", "seen"}
    result = PGD(eps=1.0, steps=3).run(
        lambda: task.evaluate(model, batch), task.sites(model, "token")
    )
    assert result.losses.mean() > result.clean_losses.mean()
    with pytest.raises(InputError, match="group: token"):
        task.sites(model, "sample")


@pytest.mark.parametrize("more", ["attacked=texts", "train_encoder=true"])
def test_the_whole_job(films: Path, tmp_path: Path, more: str) -> None:
    changes = [
        f"model.{more}",
        "train.steps=4",
        "train.batch_size=16",
        "variants.hardened.eps_schedule={share: 0}",
    ]
    changes += ["audit.attacks=[{kind: pgd, steps: 2}]", "audit.sweep=[1]"]
    words = [word for change in changes for word in ("--set", change)]
    run = tmp_path / "run"
    status, said = invoke("train", films / "recipe.yaml", "--out", run, *words)
    assert status == 0, said
    assert "texts of items" in said
    status, said = invoke("audit", run)
    assert status == 0, said
    # What is saved needs neither the data nor the pretrained model.
    task = recipes.load(
        films / "recipe.yaml", changes=["model.pretrained=absent", *changes[:1]]
    ).make_task()
    model = task.load(run / "hardened")
    assert len(task.texts) == 30
    outputs = task.evaluate(model, task.encode(model, [{"user_id": "3"}])).outputs
    assert outputs.shape == (1, 30)


def test_texts_of_items_are_joined_and_looked_up(films: Path, tmp_path: Path) -> None:
    task = made(films)
    assert task.texts[4] == f"{made_tables.mood(5)} Comedy"  # the sixth of the genres
    path = tmp_path / "items.csv"
    path.write_text("movie_id,movie_title\n1,first\n3,\n99,other\n1.0,first\n")  # said again
    account = Account()
    changes = [f"data.items.path={path}", "data.items.flags=[]"]
    task = recipes.load(films / "recipe.yaml", changes=changes).make_task()
    task.read(account)
    assert task.texts[:3] == ["first", "", ""]
    assert any("1 of 30 items" in line for line in account.lines())
    assert any("29 items have no text" in warning for warning in account.warnings)
    for text, message in (
        (
            "movie_id,movie_title\n1,a\n1,b\n",
            "names '1' twice, with different values of 'movie_title'",
        ),
        ("movie_id,movie_title\nx,a\n", "no text for any of the 30 items"),
        ("movie_id,title\nx,a\n", "no column 'movie_title'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            made(films, *changes)
