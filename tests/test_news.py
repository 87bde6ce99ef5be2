"""News in the layout of MIND: what is read, what is dropped or refused, and the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import made_tables
from embattle.attacks import PGD
from embattle.data.divide import time_parts
from embattle.data.mind import is_mind, read_impressions, read_news
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.tasks import Account
from tiny_job import invoke, make_encoder

RECIPE = Path(__file__).parents[1] / "recipes" / "news_mind.yaml"
NEWS = "\tsports\tgolf\t{}\t{}\thttps://a.b\t[]\t[]\n"
SHOWN = "{}\tU1\t11/15/2019 9:55:12 AM\t{}\t{}\n"


@pytest.fixture(scope="module")
def mind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_tables.news(tmp_path_factory.mktemp("mind"))
    make_encoder(folder / "encoder")
    return folder


def made(mind: Path, *changes: str) -> Any:
    changes = (f"data.path={mind}", f"model.pretrained={mind / 'encoder'}", *changes)
    task = recipes.load(RECIPE, changes=[*changes, "model.layers=1", "model.dim=8"]).make_task()
    task.read(Account())
    return task


def write(folder: Path, news: list[str], behaviors: list[str]) -> Path:
    (folder / "news.tsv").write_text("".join(news), encoding="utf-8")
    (folder / "behaviors.tsv").write_text("".join(behaviors), encoding="utf-8")
    return folder


def test_odd_rows_are_counted(tmp_path: Path) -> None:
    news = [
        "N1" + NEWS.format('He said "no', "An abstract"),
        "N2" + NEWS.format("No abstract", ""),
        "N3" + NEWS.format("", ""),
        "N1" + NEWS.format('He said "no', "An abstract"),
        "\n",
        "N4" + NEWS.format("Windows' line ends", "x").replace("\n", "\r\n"),
    ]
    behaviors = [
        SHOWN.format(1, "N2 N9 N1", "N1-0 N2-1 N3-0"),
        SHOWN.format(2, "", "N4-1 N1-0 N2-0"),
        SHOWN.format(3, "N1", "N1-1 N2-1"),
        SHOWN.format(4, "N1", "N1-0 N9-1"),
    ]
    account = Account()
    write(tmp_path, news, behaviors)
    assert is_mind(tmp_path)
    names, texts = read_news(tmp_path, ["title", "abstract"], account)
    assert names == ["N1", "N2", "N4"]
    assert texts == ['He said "no An abstract', "No abstract", "Windows' line ends x"]
    found = read_impressions(tmp_path, names, account)
    assert [one.history.tolist() for one in found] == [[1, 0], []]
    assert [one.candidates.tolist() for one in found] == [[0, 1], [2, 0, 1]]
    assert [one.clicked.tolist() for one in found] == [[False, True], [True, False, False]]
    told = "\n".join(account.lines())
    for line in (
        "1 news without text",
        "2 of 4",
        "no history   1 impressions",
        "1 unknown news in histories",
        "2 unknown news among those shown",
        "2 impressions in which all or nothing was clicked",
    ):
        assert line in told


GOOD_NEWS = ["N1" + NEWS.format("a", ""), "N2" + NEWS.format("b", "")]


@pytest.mark.parametrize(
    ("news", "behaviors", "message"),
    [
        (["N1\tsports\n"], [], r"news.tsv, line 1: 2 cells between tabs, and the layout has 8"),
        (["N1" + NEWS.format("", "x")], [], "no news with a text in title"),
        ([*GOOD_NEWS, "N1" + NEWS.format("c", "")], [], "line 3: the news 'N1' is there before"),
        (GOOD_NEWS, [SHOWN.format(1, "", "N1 N2")], "line 1: 'N1' does not say whether it was"),
        (GOOD_NEWS, [SHOWN.format(1, "", "N1-1 N2")], "line 1: 'N2' does not say"),
        (GOOD_NEWS, [SHOWN.format(1, "", "N7-1 N8-0")], "no impression of known news"),
        (GOOD_NEWS, ["1\tU1\tyesterday\t\tN1-1 N2-0\n"], "line 1: 'yesterday' is no time"),
        (GOOD_NEWS, ["1\tU1\n"], r"behaviors.tsv, line 1: 2 cells"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(
    news: list[str], behaviors: list[str], message: str, tmp_path: Path
) -> None:
    write(tmp_path, news, behaviors)
    with pytest.raises(InputError, match=message):
        read_impressions(tmp_path, read_news(tmp_path, ["title"], Account())[0], Account())


def test_odd_lines_may_be_dropped_and_files_must_be_there(tmp_path: Path) -> None:
    account = Account()
    write(tmp_path, ["N0\n", *GOOD_NEWS], ["1\n", SHOWN.format(1, "", "N1-1 N2-0")])
    names, _ = read_news(tmp_path, ["title"], account, drop_ragged=True)
    assert len(read_impressions(tmp_path, names, account, drop_ragged=True)) == 1
    dropped = [value for name, value in account.facts if name == "dropped"]
    assert dropped == ["1 lines with too few or too many cells"] * 2
    with pytest.raises(InputError, match="no column 'titel'; did you mean 'title'"):
        read_news(tmp_path, ["titel"], account)
    (tmp_path / "news.tsv").write_bytes(b"N1\t\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_news(tmp_path, ["title"], account)
    (tmp_path / "news.tsv").unlink()
    assert not is_mind(tmp_path)
    with pytest.raises(InputError, match=r"check data\.path"):
        read_news(tmp_path, ["title"], account)


def test_parts_follow_each_other_in_time_and_have_clicks_and_others(mind: Path) -> None:
    task = made(mind, "data.unclicked=1", "data.fractions=[0.5, 0.25, 0.25]")
    every = read_impressions(mind, task.names, Account())
    part_of = time_parts([one.time for one in every], (0.5, 0.25, 0.25))
    for number, part in enumerate(task.parts.values()):
        share = [one for one, own in zip(every, part_of, strict=True) if own == number]
        clicks = [int(one.clicked.sum()) for one in share]
        rest = [len(one.clicked) - n for one, n in zip(share, clicks, strict=True)]
        assert int(part.label.sum()) == sum(clicks)
        assert len(part) == sum(clicks) + sum(map(min, clicks, rest))
        yes, no = part.candidate[part.label == 1], part.candidate[part.label == 0]
        assert set(yes.tolist()) == {int(n) for one in share for n in one.candidates[one.clicked]}
        assert set(no.tolist()) <= {int(n) for one in share for n in one.candidates[~one.clicked]}
    few = made(mind, "data.limits={train: 10, test: 7}", "data.history=2")
    assert [len(few.parts[name]) for name in ("train", "test")] == [10, 7]
    assert few.parts["train"].history.shape == (10, 2)
    assert made(mind).fingerprint() == made(mind).fingerprint() != few.fingerprint()


def test_a_reader_is_the_mean_of_her_history(mind: Path) -> None:
    task = made(mind)
    torch.manual_seed(0)
    model = task.build().eval()
    with torch.no_grad():
        model.shared.normal_()
    batch = task.batch(model, "train", torch.arange(20))
    vectors = model.projection(model.texts.every())
    part = task.parts["train"]
    lengths = set()
    for row, logit in enumerate(model(**batch.inputs).tolist()):
        read = [n for n in part.history[row].tolist() if n >= 0]
        lengths.add(len(read))
        reader = model.shared + (vectors[read].mean(0) if read else 0)
        wanted = reader @ vectors[part.candidate[row]] / 8**0.5 + model.bias
        assert logit == pytest.approx(wanted.item(), abs=1e-5)
    assert {0, 3} <= lengths
    assert task.show("train", 4) == task.texts[int(part.candidate[4])]


def test_only_the_candidates_words_are_attacked(mind: Path) -> None:
    task = made(mind)
    model = task.build().eval()
    batch = task.batch(model, "train", torch.arange(16))
    with torch.no_grad():
        model.shared.fill_(1.0)
    result = PGD(eps=5.0, steps=4).run(
        lambda: task.evaluate(model, batch),
        task.sites(model, "sample"),
        criterion=task.criterion(batch),
        mask=task.mask(batch),
    )
    (delta,) = result.deltas
    assert delta.shape[:2] == batch.inputs["text_ids"].shape
    assert delta[~batch.movable].eq(0).all()
    assert (result.losses > result.clean_losses).all()


def test_rows_of_a_file_are_those_of_a_part(mind: Path, tmp_path: Path) -> None:
    status, said = invoke(
        *("train", RECIPE, "--out", tmp_path / "run", "--set", f"data.path={mind}"),
        *("--set", f"model.pretrained={mind / 'encoder'}", "--set", "model.layers=1"),
        *("--set", "train.steps=3", "--set", "model.train_encoder=false"),
    )
    assert status == 0, said
    assert "impressions" in said
    assert "of the 30 texts are cut" in said
    known = made(mind, "model.dim=64")
    task = recipes.load(RECIPE).make_task()
    model = task.load(tmp_path / "run" / "standard")
    part = known.parts["test"]
    rows = [
        {
            "history": " ".join(known.names[n] for n in part.history[row].tolist() if n >= 0),
            "news": known.names[int(part.candidate[row])],
            "clicked": int(part.label[row]),
        }
        for row in range(6)
    ]
    batch, same = task.encode(model, rows), known.batch(model, "test", torch.arange(6))
    assert torch.equal(batch.inputs["text_ids"], same.inputs["text_ids"])
    assert torch.equal(batch.inputs["history"], same.inputs["history"])
    assert torch.equal(batch.labels, same.labels)
    assert task.encode(model, [{"news": "N1"}]).labels is None
    for row, message in (
        ({"news": "N99"}, "column 'news': the model knows no news 'N99'"),
        ({"history": "N1"}, "no single news; name one"),
        ({"news": "N1", "history": "N1 X"}, "column 'history': the model knows no news 'X'"),
    ):
        with pytest.raises(InputError, match=message):
            task.encode(model, [row])
    with pytest.raises(InputError, match="no single news in row 2; name one"):
        task.encode(model, [{"news": "N1"}, {"news": "N1 N2"}])
