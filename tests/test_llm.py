"""The language model that is asked what a user will like: questions, prompts, and the job."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import tiny_models
from embattle.attacks import PGD
from embattle.attacks.tokens import TokenSwap
from embattle.criteria import Promote
from embattle.data.questions import ask, plain_title
from embattle.data.ratings import Ratings
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.perturb.evaluation import Evaluation
from embattle.tasks import Account, LLMRanking
from tiny_job import invoke

RECIPES = Path(__file__).parent.parent / "recipes"
COLOURS = ["Red", "Blue", "Green", "White", "Black"]
THINGS = ["House", "River", "Night", "Horse"]
TITLES = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
PROMPT = "She liked {liked}. Will she like {title}?"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings and titles of 20 films, and a Llama that knows their words."""
    place = tmp_path_factory.mktemp("films")
    draw = np.random.default_rng(0)
    with (place / "ratings.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "movie_id", "rating", "timestamp"])
        for user in range(12):
            for number, film in enumerate(draw.permutation(20)[:10]):
                rows.writerow([user, film, 5 if film % 5 < 3 else 2, number])
    with (place / "films.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["movie_id", "movie_title"])
        rows.writerows([film, f"{title} ({1950 + film})"] for film, title in enumerate(TITLES))
    asking = "She liked . Will she like ? yes no ,"
    tiny_models.save_llama(place / "llama", [*COLOURS, *THINGS, *asking.split(" ")], layers=3)
    return place


def recipe_for(films: Path, tmp_path: Path, **model: Any) -> Path:
    """The recipe for films, with the small tables and model, and a few steps."""
    raw = yaml.safe_load((RECIPES / "llm_movies.yaml").read_text())
    del raw["data"]["source"], raw["data"]["titles"]["source"]
    raw["data"]["path"] = str(films / "ratings.csv")
    raw["data"]["titles"]["path"] = str(films / "films.csv")
    raw["data"] |= {"history": 3, "limits": {"train": 60}}
    raw["model"] |= {
        "pretrained": str(films / "llama"), "layers": 2, "rank": 2, "max_tokens": 24,
        "prompt": PROMPT, **model,
    }  # fmt: skip
    raw["train"] |= {"steps": 6, "batch_size": 8}
    raw["audit"] |= {"sweep": [1.0], "attacks": [{"kind": "pgd", "steps": 3}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def made(films: Path, tmp_path: Path, *changes: str, **model: Any) -> Any:
    task = recipes.load(recipe_for(films, tmp_path, **model), changes=changes).make_task()
    task.read(Account())
    return task


def test_likes_are_divided_by_time_and_set_beside_what_was_never_met() -> None:
    likes = [(0, 3, 1), (0, 1, 2), (0, 4, 3), (0, 0, 4), (1, 2, 1), (1, 5, 2), (1, 6, 3)]
    events = np.array([*((u, i, 5, t) for u, i, t in likes), (0, 2, 1, 9), (1, 0, 3, 0)])
    users, items, values, times = events.T
    ratings = Ratings(users, items, values.astype(float), times.astype(float), 2, 9)
    parts = ask(ratings, at_least=4, length=2, limits={}, seed=1)
    asked = {
        name: sorted(
            (int(p.users[i]), int(p.items[i]), p.history[i].tolist()) for i in range(0, len(p), 2)
        )
        for name, p in parts.items()
    }
    assert asked == {
        "train": [(0, 1, [-1, 3])],
        "validation": [(0, 4, [3, 1]), (1, 5, [-1, 2])],
        "test": [(0, 0, [1, 4]), (1, 6, [2, 5])],
    }
    met = {user: set(items[users == user].tolist()) for user in (0, 1)}
    for part in parts.values():
        assert part.liked.tolist() == [True, False] * (len(part) // 2)
        assert (part.users[::2] == part.users[1::2]).all()
        assert (part.history[::2] == part.history[1::2]).all()
        for user, item in zip(part.users[1::2].tolist(), part.items[1::2].tolist(), strict=True):
            assert item not in met[user]
    few = ask(ratings, at_least=4, length=2, limits={"test": 2, "validation": 1}, seed=1)
    assert [len(few[name]) for name in ("train", "validation", "test")] == [2, 2, 2]
    with pytest.raises(InputError, match=r"data\.at_least: no user has three ratings"):
        ask(ratings, at_least=6, length=2, limits={}, seed=1)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects"),
        ("City of Lost Children, The (Cité des enfants perdus, La) (1995)",
         "The City of Lost Children"),
        ("Shanghai Triad (Yao a yao yao dao waipo qiao) (1995) ", "Shanghai Triad"),
        ("Toy Story", "Toy Story"),
        ("Love (and Hate)", "Love (and Hate)"),
        ("(1995)", "(1995)"),
    ],
)  # fmt: skip
def test_titles_as_they_are_said(written: str, said: str) -> None:
    assert plain_title(written) == said


def test_prompts_tell_which_tokens_are_titles(films: Path, tmp_path: Path) -> None:
    model = made(films, tmp_path).build()
    prompts = model.prompts
    name = prompts.tokenizer.convert_ids_to_tokens
    liked = [["Red House", "Blue River", "Black Horse"], []]
    found = prompts.encode(liked, ["White Night", "Red Night"])
    first = "She liked Red House , Blue River , Black Horse . Will she like White Night ?"
    assert name(found.tokens[0].tolist()) == first.split(" ")
    assert name(found.tokens[0][found.of_title[0]].tolist()) == ["White", "Night"]
    shown = name(found.tokens[0][found.of_liked[0]].tolist())
    assert shown == ["Red", "House", "Blue", "River", "Black", "Horse"]
    assert name(found.tokens[1][found.attention[1] == 1].tolist()) == (
        ["She", "liked", ".", "Will", "she", "like", "Red", "Night", "?"]
    )
    assert not found.of_liked[1].any()
    assert prompts.length(liked[0], "White Night") == 17
    # 24 tokens have room for five titles of two tokens; of more, the oldest are left out.
    full = prompts.encode([[*TITLES[:9]]], ["White Night"])
    assert full.tokens.shape == (1, prompts.length(TITLES[:9], "White Night")) == (1, 23)
    assert name(full.tokens[0].tolist())[2:4] == TITLES[4].split()
    long = prompts.encode([["Red House"]], ["Red " * 40])
    assert long.tokens.shape == (1, 24)
    assert not long.of_liked.any()


def test_control_tokens_are_those_of_the_template_alone(films: Path) -> None:
    from embattle.models.prompts import Prompts
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(films / "llama")
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[EOS] $A [EOS]", special_tokens=[("[EOS]", end)]
    )
    prompts = Prompts(tokenizer, "She liked {liked}.[EOS] Will she like {title}?", 40)
    tokens = prompts.encode([["Red [EOS] House"]], ["White Night [EOS]"]).tokens[0]
    shown = " ".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))
    letters = "[UNK] [UNK] [UNK]"  # "[", "EOS" and "]"
    assert shown == (
        f"[EOS] She liked Red {letters} House . [EOS] Will she like White Night {letters} ?"
    )


def test_only_yes_and_no_are_computed_and_titles_alone_move(films: Path, tmp_path: Path) -> None:
    task = made(films, tmp_path, layers=None)
    model = task.build().eval()
    batch = task.batch(model, "test", torch.arange(8))
    ids, attention = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    whole = tiny_models.transformers.LlamaForCausalLM.from_pretrained(films / "llama").eval()
    answers = model.prompts.tokenizer.convert_tokens_to_ids(["no", "yes"])
    for i in range(8):
        with torch.no_grad():
            all_of_them = whole(ids[i : i + 1, : int(attention[i].sum())]).logits[0, -1]
        torch.testing.assert_close(model(**batch.inputs)[i], all_of_them[answers])
    assert batch.labels.tolist() == [1, 0] * 4
    mask = task.mask(batch)
    words = set(model.prompts.tokenizer.convert_ids_to_tokens(ids[mask].tolist()))
    assert words <= {*COLOURS, *THINGS}
    result = PGD(eps=2.0, steps=3).run(
        lambda: task.evaluate(model, batch),
        task.sites(model, "sample"),
        criterion=task.criterion(batch),
        mask=mask,
    )
    assert result.losses.mean() > result.clean_losses.mean()
    (delta,) = result.deltas
    assert (delta.norm(dim=-1) > 0)[mask].any()
    assert not delta[~mask].any()


def another(films: Path, tmp_path: Path, kind: str, **sizes: Any) -> tuple[Any, Any]:
    """A causal model of another kind, with biases if it has any, and the recipe's task on it."""
    torch.manual_seed(0)
    tokenizer = tiny_models.transformers.AutoTokenizer.from_pretrained(films / "llama")
    class_ = getattr(tiny_models.transformers, f"{kind}ForCausalLM")
    whole = class_(class_.config_class(vocab_size=len(tokenizer), **sizes)).eval()
    if whole.lm_head.bias is not None:
        torch.nn.init.normal_(whole.lm_head.bias)
    for part in (whole, tokenizer):
        part.save_pretrained(tmp_path / kind)
    return whole, made(films, tmp_path, pretrained=str(tmp_path / kind), layers=None)


def test_a_head_with_biases_keeps_those_of_the_answers(films: Path, tmp_path: Path) -> None:
    whole, task = another(films, tmp_path, "GPTJ", n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = task.build().eval()
    batch = task.batch(model, "test", torch.arange(4))
    last = batch.inputs["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits = whole(**batch.inputs).logits[torch.arange(4), last]
    answers = model.prompts.tokenizer.convert_tokens_to_ids(["no", "yes"])
    torch.testing.assert_close(model(**batch.inputs), logits[:, answers])
    torch.nn.init.normal_(model.answers.bias)
    task.save(model, tmp_path / "saved")
    assert torch.equal(task.load(tmp_path / "saved").answers.bias, model.answers.bias)


def test_a_model_that_cannot_be_adapted_is_refused(films: Path, tmp_path: Path) -> None:
    _, task = another(films, tmp_path, "Mamba", hidden_size=16, num_hidden_layers=1, state_size=2)
    with pytest.raises(InputError, match=r"peft has no adapters for a mamba: .*out_proj"):
        task.build()


def test_adapters_and_answers_alone_are_trained_and_saved(films: Path, tmp_path: Path) -> None:
    task = made(films, tmp_path)
    model = task.build()
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora" in n} | {"answers.weight"}
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in trained:
                weight += 0.1 * torch.randn(weight.shape, generator=draw)
    place = tmp_path / "saved"
    task.save(model.eval(), place)
    held = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert (place / "model.safetensors").stat().st_size < 4 * held + 10_000
    batch = task.batch(model, "test", torch.arange(6))
    fresh = recipes.load(tmp_path / "recipe.yaml").make_task()
    again = fresh.load(place)
    assert torch.equal(again(**batch.inputs), model(**batch.inputs))
    # What is asked in words of one's own, without the data.
    row = task.parts["test"][0]
    text = {"history": "; ".join(row["history"]), "title": row["title"]}
    mine = fresh.encode(again, [text])
    assert mine.labels is None
    torch.testing.assert_close(again(**mine.inputs), model(**task.encode(model, [row]).inputs))
    for change in ("model.layers=1", "model.rank=1"):
        other = recipes.load(tmp_path / "recipe.yaml", changes=[change]).make_task()
        with pytest.raises(InputError, match="does not hold a trained model"):
            other.load(place)


def test_adapters_of_another_pretrained_model_are_refused(films: Path, tmp_path: Path) -> None:
    task = made(films, tmp_path)
    model = task.build()
    task.save(model, tmp_path / "saved")
    with torch.no_grad():
        model.embedding.weight[3, 4] += 1
    copy = tmp_path / "other"
    whole = tiny_models.transformers.LlamaForCausalLM.from_pretrained(films / "llama")
    whole.get_input_embeddings().weight.data[3, 4] += 1
    whole.save_pretrained(copy)
    model.prompts.tokenizer.save_pretrained(copy)
    other = made(films, tmp_path, pretrained=str(copy))
    with pytest.raises(InputError, match="is no longer the model that was trained on"):
        other.load(tmp_path / "saved")


def test_a_job_trains_and_audits_and_the_study_reads_it(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = tmp_path / "run", recipe_for(films, tmp_path)
    status, said = invoke("train", recipe, "--out", run)
    assert status == 0, said
    assert "tell fewer likes" in said
    status, said = invoke("audit", run)
    assert status == 0, said
    facts = json.loads((run / "metrics.json").read_text())
    for model in facts["models"].values():
        assert model["attacks"]["PGD-3"]["loss"] > model["clean"]["loss"]
    history = json.loads((run / "run.json").read_text())["variants"]["hardened"]["history"]
    assert history[-1]["robust_loss"] > history[-1]["loss"]
    monkeypatch.syspath_prepend(str(RECIPES.with_name("benchmarks")))
    import llm_movies

    small = ["--users", "8", "--candidates", "12", "--attacked", "6", "--targets", "2"]
    monkeypatch.setattr("sys.argv", ["", str(run), *small, "--out", str(tmp_path / "study.json")])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    llm_movies.main()
    study = json.loads((tmp_path / "study.json").read_text())
    assert list(study["ranking"])[:2] == ["standard", "hardened"]
    for figures in study["ranking"].values():
        assert all(0 <= value <= 1 for value in figures.values())
    for films_ in study["rewritten"].values():
        assert [0 <= film["clean"] <= film["own titles"] <= 1 for film in films_] == [True, True]
    assert "| hardened | mean |" in (tmp_path / "study.md").read_text()


def test_a_title_is_promoted_by_exchanged_tokens(films: Path, tmp_path: Path) -> None:
    task = made(films, tmp_path, layers=None)
    model = task.build().eval()
    batch = task.batch(model, "test", torch.arange(8))
    prompts = model.prompts.encode([r["history"] for r in task.parts["test"][:8]], TITLES[:8])
    with torch.no_grad():
        bar = model(prompts.tokens, prompts.attention).diff(dim=1)

    def loss_of(tokens: torch.Tensor) -> Any:
        def loss_fn() -> Evaluation:
            lead = model(tokens, prompts.attention).diff(dim=1)
            return Evaluation(outputs=torch.cat([lead, bar + 0.01], dim=1))

        return loss_fn

    torch.manual_seed(0)
    result = TokenSwap(swaps=3, tries=8).run(
        loss_of,
        task.sites(model, "sample")[0],
        prompts.tokens,
        mask=prompts.of_title,
        criterion=Promote(0, k=1),
    )
    assert result.success.any()
    assert result.swapped.any()
    assert not (result.swapped & ~prompts.of_title).any()
    assert len(batch) == 8


def test_the_recipe_names_its_task_and_full_uses_all_layers() -> None:
    plain, full = (recipes.load(RECIPES / "llm_movies.yaml", full=x) for x in (False, True))
    assert plain.task_class is full.task_class is LLMRanking
    assert plain.model.layers == 4  # type: ignore[attr-defined]
    assert full.model.layers is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.prompt='Will she like {title}?'", r"must begin with a word, and have {liked}"),
        ("model.prompt='{liked}, then {title}?'", r"must begin with a word"),
        ("model.prompt='She {x} liked {liked}. And {title}?'", r"must begin with a word"),
        ("model.max_tokens=8", "the prompt has 7 tokens without titles"),
        ("model.answers=[' yes', ' yes']", "do not begin with two different tokens"),
        ("data.titles.title=name", "has no column 'name'"),
        ("data.at_least=9", "no user has three ratings of at least 9"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    change: str, message: str, films: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        made(films, tmp_path, change).build()


def test_rows_of_a_file_that_say_too_little_are_refused(films: Path, tmp_path: Path) -> None:
    task = made(films, tmp_path)
    model = task.build()
    with pytest.raises(InputError, match="column 'title' is empty"):
        task.encode(model, [{"history": "Red House", "title": ""}])
    with pytest.raises(InputError, match="must be yes or no, got 'maybe'"):
        task.encode(model, [{"title": "Red House", "liked": "maybe"}])
    lacking = films / "films.csv"
    few = tmp_path / "few.csv"
    few.write_text("\n".join(lacking.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match="has no title of movie_id '19', which was rated; 1 of"):
        made(films, tmp_path, f"data.titles.path={few}")
    few.write_text(lacking.read_text() + "19,Another Horse\n,\n")
    with pytest.raises(InputError, match="'19' twice, with different values of 'movie_title'"):
        made(films, tmp_path, f"data.titles.path={few}")


def test_of_who_rated_everything_nothing_is_asked(films: Path, tmp_path: Path) -> None:
    rows = (films / "ratings.csv").read_text()
    every = "".join(f"amy,{film},5,{film}\n" for film in range(20))
    table = tmp_path / "ratings.csv"
    table.write_text(rows + every)
    task, account = (
        recipes.load(recipe_for(films, tmp_path), changes=[f"data.path={table}"]).make_task(),
        Account(),
    )
    task.read(account)
    assert "1 users have rated all 20 items, such as 'amy'" in "\n".join(account.lines())
    assert task.counts() == made(films, tmp_path).counts()
    table.write_text(rows.splitlines()[0] + "\n" + every)
    with pytest.raises(InputError, match="all users have rated all 20 items, such as 'amy'"):
        made(films, tmp_path, f"data.path={table}")


def test_titles_of_a_file_are_said_as_in_training(films: Path, tmp_path: Path) -> None:
    task = made(films, tmp_path)
    model = task.build()
    asked = [
        {"history": "Red House, The (1950); ;White Night", "title": "Night, The (1960)"},
        {"history": "The Red House;White Night", "title": "The Night"},
    ]
    one, two = (task.encode(model, [row]).inputs["input_ids"] for row in asked)
    assert torch.equal(one, two)
