"""Fake users by template: profiles, the poisoned table, who looks suspicious, what targets gain."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embattle.data.profiles import TEMPLATES, Fakes, fake_profiles, inject
from embattle.data.ratings import Ratings, read_named_ratings
from embattle.data.suspicion import suspicion
from embattle.errors import InputError
from embattle.files import sha256
from embattle.models import Interactions
from embattle.models.exposure import exposure, prediction_shift

USERS, ITEMS, TARGET = 400, 120, 7


def crowd(seed: int = 0) -> Ratings:
    """Users who rate popular items more often, near the mean of each, from 1 to 5."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, ITEMS + 1) ** 0.8
    rated = [draw.choice(ITEMS, 20, replace=False, p=weights / weights.sum()) for _ in range(USERS)]
    items = np.concatenate(rated)
    taste = draw.uniform(2.5, 4.5, ITEMS)
    values = np.clip(np.rint(draw.normal(taste[items], 0.6)), 1, 5)
    times = 1000.0 + np.arange(len(items))
    return Ratings(np.repeat(np.arange(USERS), 20), items, values, times, USERS, ITEMS)


@pytest.fixture(scope="module")
def genuine() -> Ratings:
    return crowd()


def made(genuine: Ratings, template: str, **options: Any) -> Fakes:
    options = {"accounts": 30, "fillers": 12} | options
    if template == "segment":
        options = {"segment": [3, 5]} | options
    if template == "bandwagon":
        options = {"popular": 4} | options
    return fake_profiles(genuine, options.pop("targets", [TARGET]), template=template, **options)


def profiles(fakes: Fakes) -> tuple[np.ndarray, np.ndarray]:
    """[fakes, length] items and values."""
    shape = (len(fakes.users), -1)
    return fakes.ratings.items.reshape(shape), fakes.ratings.values.reshape(shape)


@pytest.mark.parametrize("nuke", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_profile_has_targets_selected_items_and_other_fillers(
    genuine: Ratings, template: str, nuke: bool
) -> None:
    fakes = made(genuine, template, targets=[TARGET, 90], nuke=nuke)
    items, values = profiles(fakes)
    head = 2 + len(fakes.selected)
    assert items.shape == (30, head + 12)
    assert (items[:, :2] == [TARGET, 90]).all()
    assert (values[:, :2] == (1 if nuke else 5)).all()
    assert (items[:, 2:head] == fakes.selected).all()
    assert (values[:, 2:head] == 5).all()
    assert not np.isin(items[:, head:], items[0, :head]).any()
    assert all(len(set(row)) == len(row) for row in items.tolist())
    assert len({tuple(sorted(row)) for row in items.tolist()}) > 25
    assert set(np.unique(values)) <= {1, 2, 3, 4, 5}
    assert (fakes.users == np.arange(USERS, USERS + 30)).all()
    assert (fakes.ratings.times == genuine.times[fakes.times_of]).all()
    fillers = values[:, head:]
    if template == "segment":
        assert (fillers == 1).all()
    elif template == "love_hate":
        assert (fillers == (5 if nuke else 1)).all()
    else:
        assert len(np.unique(fillers)) > 2


def test_selected_items_are_the_most_rated_or_those_that_are_named(genuine: Ratings) -> None:
    count = genuine.popularity()
    best = int(count.argmax())
    assert best not in made(genuine, "bandwagon", targets=[best]).selected
    selected = made(genuine, "bandwagon").selected
    rest = np.setdiff1d(np.arange(ITEMS), [*selected, TARGET])
    assert len(selected) == 4
    assert count[selected].min() >= count[rest].max()
    assert made(genuine, "segment").selected.tolist() == [3, 5]
    assert made(genuine, "random").selected.tolist() == []


def test_fillers_are_drawn_from_all_ratings_or_from_those_of_the_item() -> None:
    # Item 0 is always rated 1, item 1 always 5; item 2 is the target, and nobody rated item 3.
    items = np.repeat([0, 1, 2], [50, 50, 1])
    values = np.repeat([1.0, 5.0, 3.0], [50, 50, 1])
    ratings = Ratings(np.arange(101), items, values, np.zeros(101), 101, 4)
    items, values = profiles(
        fake_profiles(ratings, [2], template="average", accounts=2000, fillers=3)
    )
    assert (values[items == 0] == 1).all()
    assert (values[items == 1] == 5).all()
    assert 2.9 < values[items == 3].mean() < 3.1  # of all ratings: N(3, 2), to 1, 3 or 5
    items, values = profiles(
        fake_profiles(ratings, [2], template="random", accounts=2000, fillers=3)
    )
    shares = [(values[items == 0] == step).mean() for step in (1, 3, 5)]
    # Below 2, in [2, 4] and above 4 of N(3, 1.99).
    assert shares == pytest.approx([0.308, 0.384, 0.308], abs=0.03)


def test_ratings_are_the_nearest_of_the_scale() -> None:
    values = np.array([0.5, 3.5, 4.0, 5.0])
    ratings = Ratings(np.arange(4), np.arange(4), values, np.zeros(4), 4, 30)
    found = made(ratings, "random", accounts=300).ratings.values
    assert set(found) == {0.5, 3.5, 4.0, 5.0}


def test_fillers_are_uniform(genuine: Ratings) -> None:
    items, _ = profiles(made(genuine, "random", accounts=4000, fillers=60))
    share = np.bincount(items[:, 1:].ravel(), minlength=ITEMS) / 4000
    assert share[TARGET] == 0
    assert np.delete(share, TARGET) == pytest.approx(np.full(ITEMS - 1, 60 / 119), abs=0.04)
    everything, _ = profiles(made(genuine, "random", accounts=3, fillers=ITEMS - 1))
    assert (np.sort(everything) == np.arange(ITEMS)).all()


def test_the_seed_decides_all(genuine: Ratings) -> None:
    one, two, other = (made(genuine, "average", seed=seed) for seed in (1, 1, 2))
    for name in ("users", "items", "values", "times"):
        assert (getattr(one.ratings, name) == getattr(two.ratings, name)).all()
    assert (one.ratings.items != other.ratings.items).any()
    assert (one.times_of != other.times_of).any()


def test_how_many_fakes_and_how_long_their_profiles_are(genuine: Ratings) -> None:
    assert len(fake_profiles(genuine, [1], template="random").users) == 4  # 1% of 400
    assert len(fake_profiles(genuine, [1], template="random", share=0.1).users) == 40
    assert len(fake_profiles(genuine, [1], template="random", share=1e-6).users) == 1
    # Genuine profiles have 20 items.
    fakes = fake_profiles(genuine, [1, 2], template="segment", segment=[3, 4, 5], accounts=1)
    assert len(fakes.ratings) == 20
    assert fakes.fillers == 15


def test_of_implicit_feedback_the_items_alone_are_drawn(genuine: Ratings) -> None:
    ones = Ratings(genuine.users, genuine.items, np.ones(len(genuine)), genuine.times, USERS, ITEMS)
    for template in TEMPLATES:
        assert set(made(ones, template).ratings.values) == {1.0}
    with pytest.raises(InputError, match="nuke=True, but all ratings are 1"):
        made(ones, "random", nuke=True)


def test_targets_come_back_and_accounts_may_be_none(genuine: Ratings) -> None:
    items, values = profiles(made(genuine, "random", targets=[TARGET, 8], repeats=2))
    assert (items[:, :4] == [TARGET, TARGET, 8, 8]).all()
    assert (values[:, :4] == 5).all()
    none = made(genuine, "random", accounts=0)
    assert len(none.users) == len(none.ratings) == 0
    assert len(inject(genuine, none.ratings)) == len(genuine)


def test_the_events_of_both(genuine: Ratings) -> None:
    fakes = made(genuine, "random")
    both = inject(genuine, fakes.ratings)
    assert both.user_count == USERS + 30
    assert len(both) == len(genuine) + 30 * 13
    assert (both.take(both.users < USERS).items == genuine.items).all()
    assert both.popularity()[TARGET] == genuine.popularity()[TARGET] + 30
    other = Ratings(*[np.zeros(1, dtype=int)] * 2, np.ones(1), np.ones(1), 1, 20)
    with pytest.raises(InputError, match="know 120 items and the ratings 20"):
        inject(other, fakes.ratings)


@pytest.mark.parametrize(
    ("template", "options", "says"),
    [
        ("bandwaggon", {}, "no template is called 'bandwaggon'; did you mean 'bandwagon'"),
        ("random", {"targets": []}, "targets is empty"),
        ("random", {"targets": [120]}, r"targets must be in \[0, 120\), got 120"),
        ("random", {"targets": [-1]}, "got -1"),
        ("random", {"targets": [1.5]}, r"targets must be whole numbers.*1\.5"),
        ("random", {"targets": [4, 4]}, r"targets has an item twice: \[4, 4\]"),
        ("random", {"accounts": -1}, "accounts must be a whole number >= 0, got -1"),
        ("random", {"share": 0.1}, "accounts=30 and share=0.1; give one"),
        ("random", {"accounts": None, "share": 0.0}, "share must be above 0, got 0"),
        ("random", {"fillers": -1}, "fillers must be a whole number >= 0, got -1"),
        ("random", {"fillers": 120}, "fillers=120, but there are 119 items"),
        ("random", {"repeats": 0}, "repeats must be a whole number >= 1, got 0"),
        ("random", {"popular": 3}, "popular=3 is for template 'bandwagon', not 'random'"),
        ("random", {"segment": [1]}, r"segment \(1 items\) is for template 'segment'"),
        ("segment", {"segment": []}, "segment is empty"),
        ("segment", {"segment": [TARGET]}, r"segment has targets in it: \[7\]"),
        ("bandwagon", {"popular": 120}, "popular=120, but there are 119 items"),
    ],
)
def test_wrong_arguments_are_named(
    genuine: Ratings, template: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        made(genuine, template, **options)


def test_suspicion_by_hand() -> None:
    # Item 0: 1, 5, mean 3; item 1: 4, 4, 1, mean 3; user 3 has no ratings.
    users, items = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1])
    values = np.array([1.0, 4, 5, 4, 1])
    found = suspicion(Ratings(users, items, values, np.zeros(5), 4, 3))
    assert found == pytest.approx([(2 / 2 + 1 / 3) / 2, (2 / 2 + 1 / 3) / 2, 2 / 3, 0])
    with pytest.raises(InputError, match="5 values and no two that differ"):
        suspicion(Ratings(users, items, np.ones(5), np.zeros(5), 4, 3))


def test_fakes_are_the_most_suspicious(genuine: Ratings) -> None:
    precision, recall = {}, {}
    for template in TEMPLATES:
        fakes = made(genuine, template, accounts=20)
        order = np.argsort(-suspicion(inject(genuine, fakes.ratings)), kind="stable")
        precision[template] = np.isin(order[:10], fakes.users).mean()
        recall[template] = np.isin(fakes.users, order[:40]).mean()
    assert min(precision["segment"], precision["love_hate"]) == 1
    assert min(recall["segment"], recall["love_hate"]) == 1
    # By chance these are 0.05 and 0.1.
    assert min(precision["random"], precision["bandwagon"]) >= 0.7
    assert min(recall["random"], recall["bandwagon"]) >= 0.7
    assert recall["average"] < recall["random"]


@pytest.fixture
def targeted() -> tuple[torch.Tensor, Interactions]:
    """Scores of 5 items by 4 users, and what these have seen."""
    scores = torch.tensor([[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5], [5, 1, 4, 3, 2], [0, 0, 9, 0, 0]])
    users, items = torch.tensor([[0, 0], [1, 3], [2, 2]]).T
    return scores, Interactions(users, items, 4, 5)


def test_exposure_by_hand(targeted: tuple[torch.Tensor, Interactions]) -> None:
    scores, seen = targeted
    genuine = torch.tensor([0, 1, 2])  # user 3 is fake
    found = exposure(lambda some: scores[some], torch.tensor([2, 1]), genuine, seen, k=2)
    # Target 2: after 1 for user 0 (who has seen 0), after 4 for user 1; user 2 has seen it.
    # Target 1: first for user 0, third for user 1, last for user 2.
    second = 1 / np.log2(3)
    assert found.users.tolist() == [2, 3]
    assert found.hit_rate.tolist() == pytest.approx([1, 1 / 3])
    assert found.ndcg.tolist() == pytest.approx([second, 1 / 3])
    assert found.means() == pytest.approx({"hit_rate": 2 / 3, "ndcg": (second + 1 / 3) / 2})
    parts = exposure(
        lambda some: scores[some], torch.tensor([2, 1]), genuine, seen, k=2, batch_size=1
    )
    assert torch.equal(parts.ndcg, found.ndcg)


def test_prediction_shift_by_hand(targeted: tuple[torch.Tensor, Interactions]) -> None:
    scores, seen = targeted
    moved = scores.clone()
    moved[:, 2] += torch.tensor([1.0, 2, 100, 1000])
    shift = prediction_shift(
        lambda some: scores[some],
        lambda some: moved[some],
        torch.tensor([2, 1]),
        torch.tensor([0, 1, 2]),
        seen,
    )
    assert shift.tolist() == [1.5, 0]


def test_targets_and_users_that_cannot_be_measured(
    targeted: tuple[torch.Tensor, Interactions],
) -> None:
    scores, seen = targeted

    def measured(targets: list[float], users: list[int]) -> object:
        return exposure(
            lambda some: scores[some], torch.tensor(targets), torch.tensor(users), seen, k=2
        )

    with pytest.raises(ValueError, match=r"targets must lie in \[0, 5\); got 5"):
        measured([5], [0])
    with pytest.raises(ValueError, match=r"users must lie in \[0, 4\); got -1"):
        measured([1], [-1])
    with pytest.raises(ValueError, match="targets must be integers of shape"):
        measured([1.5], [0])
    with pytest.raises(ValueError, match="all users have seen target 2"):
        measured([1, 2], [2])
    with pytest.raises(ValueError, match=r"exposure: scores must be \[1, 5\]"):
        exposure(lambda some: scores, torch.tensor([1]), torch.tensor([0]), seen)


HEADER = ["who", "film", "note", "stars", "when"]


def table(path: Path, delimiter: str = ",") -> Path:
    """12 users rate 5 of 15 films each, with halves and dates as they are written there."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(HEADER)
        for user in range(12):
            for step in range(5):
                film, stars = (user * 5 + step * 4) % 15, ("4.0", "2.50", "5.0")[(user + step) % 3]
                day = f"2020-01-{1 + step:02d} 10:00:00"
                writer.writerow([f"u{user}", f'f"{film}, x', "a,\nb", stars, day])
    return path


def command(path: Path, out: Path, *more: str) -> tuple[int, str]:
    pytest.importorskip("typer")
    pytest.importorskip("pyarrow")
    from tiny_job import invoke

    columns = ("--user", "who", "--item", "film", "--rating", "stars", "--time", "when")
    targets = ("--targets", '"f""3, x","f""4, x"')
    return invoke("poison", path, "--out", out, *targets, *columns, *more)


def test_the_command_writes_a_copy_and_says_what_is_fake(tmp_path: Path) -> None:
    path, out = table(tmp_path / "in.csv", ";"), tmp_path / "new" / "out.csv"
    status, told = command(path, out, "--share", "0.25", "--filler", "4", "--popular", "2")
    assert status == 0, told
    with path.open(newline="") as file:
        before = list(csv.reader(file, delimiter=";"))
    with out.open(newline="") as file:
        after = list(csv.reader(file))
    assert after[: len(before)] == before
    fakes = after[len(before) :]
    assert len(fakes) == 3 * (2 + 2 + 4)
    assert {row[0] for row in fakes} == {"fake_1", "fake_2", "fake_3"}
    assert all(row[3] == "5.0" for row in fakes if row[1] in ('f"3, x', 'f"4, x'))
    assert {row[2] for row in fakes} == {""}
    for column in (1, 3, 4):
        assert {row[column] for row in fakes} <= {row[column] for row in before[1:]}

    facts = json.loads((out.parent / "out.csv.manifest.json").read_text())
    assert facts["fake_users"] == ["fake_1", "fake_2", "fake_3"]
    assert facts["source"] == {"file": "in.csv", "sha256": sha256(path)}
    assert facts["poisoned"] == {"file": "out.csv", "sha256": sha256(out)}
    assert facts["targets"] == ['f"3, x', 'f"4, x']
    assert (facts["kind"], facts["goal"], facts["seed"]) == ("bandwagon", "push", 0)
    assert (facts["genuine_rows"], facts["fake_rows"]) == (60, 24)
    ratings, users, _ = read_named_ratings(out, ("who", "film", "stars", "when"))
    assert len(ratings) == 84
    assert len(users) == 15
    assert str(tmp_path) not in json.dumps(facts)


def test_the_command_gives_the_same_bytes_again_and_overwrites_nothing(tmp_path: Path) -> None:
    path = table(tmp_path / "in.csv")
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    for out in (one, two):
        assert command(path, out, "--kind", "average", "--seed", "3")[0] == 0
    assert one.read_bytes() == two.read_bytes()
    status, told = command(path, one)
    assert (status, "one.csv is there already" in told) == (2, True)
    one.unlink()
    status, told = command(path, one)
    assert (status, "one.csv.manifest.json is there already" in told) == (2, True)
    assert not one.exists()
    assert command(path, path)[0] == 2


def test_fakes_of_numbered_users_have_the_next_numbers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from embattle.jobs.poison import Plan, poison

    lines = [{"user_id": u, "item_id": i, "kind": "x"} for u in (3, 40) for i in range(6)]
    path = tmp_path / "likes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    poison(path, tmp_path / "out.csv", Plan("love_hate", ["2"], accounts=2, fillers=1))
    after = (tmp_path / "out.csv").read_text().splitlines()
    assert after[:2] == ["user_id,item_id,kind", "3,0,x"]
    assert [line.split(",")[0] for line in after[13:]] == ["41", "41", "42", "42"]
    assert after[13] == "41,2,"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--targets", "f9"), "--targets: no item 'f9' is rated"),
        (("--kind", "segment", "--segment", "f9"), "--segment: no item 'f9' is rated"),
        (("--kind", "rondom"), "did you mean 'random'"),
        (("--filler", "99"), "fillers=99"),
        (("--targets", '"f""3, x","f""3, x"'), "is there twice; name it once"),
        (("--kind", "segment", "--segment", '"f""3, x"'), "is among --targets too"),
        (("--item", ""), "name the columns of both"),
        (("--out", "out.parquet"), "name a .csv file"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    status, told = command(table(tmp_path / "in.csv"), tmp_path / "out.csv", *more)
    assert status == 2, told
    assert says in told
    assert [file.name for file in tmp_path.iterdir()] == ["in.csv"]
