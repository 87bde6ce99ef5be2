"""Fake users that are optimised: what they gain, what profiles hold, and that they come again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embattle.data.profile_request import Fakes, request
from embattle.data.profiles import inject
from embattle.data.ratings import Ratings, read_named_ratings
from embattle.data.suspicion import detection
from embattle.errors import InputError
from embattle.models import Interactions
from embattle.models.exposure import exposure, ndcg_change
from embattle.models.ranking import evaluate
from embattle.poisoning.crowd import Crowd, Profiles
from embattle.poisoning.factors import Factors
from embattle.poisoning.profiles import OPTIMISED, make_fakes, rounds

USERS, ITEMS, TARGET, FILLERS, ACCOUNTS = 150, 80, 70, 8, 8


def planted(seed: int) -> Ratings:
    """Users who rate 12 items each: popular ones, of their taste of rank 3; the target is rare."""
    draw = np.random.default_rng(seed)
    taste = draw.normal(size=(USERS, 3)) @ draw.normal(size=(3, ITEMS))
    liked = taste - 1.8 * np.log(np.arange(1, ITEMS + 1)) + draw.gumbel(size=taste.shape)
    liked[:, TARGET] -= 50
    items = np.argsort(-liked, axis=1)[:, :12]
    items[:2, -1] = TARGET
    users = np.repeat(np.arange(USERS), 12)
    values = np.clip(np.rint(3 + taste[users, items.ravel()]), 1, 5)
    return Ratings(users, items.ravel(), values, np.arange(len(users)) + 0.0, USERS, ITEMS)


def fakes_of(ratings: Ratings, kind: str, **options: Any) -> Fakes:
    options = {"accounts": ACCOUNTS, "fillers": FILLERS, **options}
    if kind in OPTIMISED:
        options = {"steps": 6 if kind == "deep" else 12, **options}
    return make_fakes(ratings, [TARGET], kind=kind, **options)


def scores_after(ratings: Ratings, fakes: Fakes, *, explicit: bool) -> torch.Tensor:
    """Scores of the genuine users by ridge regressions in turn, written anew in numpy, float64."""
    both = inject(ratings, fakes.ratings)
    values, weights = np.zeros((2, both.user_count, ITEMS))
    values[both.users, both.items] = both.values - 3 if explicit else 1.0
    weights[both.users, both.items] = 1.0
    weights = np.maximum(weights, 0.0 if explicit else 0.05)
    items = np.random.default_rng(7).normal(size=(ITEMS, 8))

    def solved(weights: np.ndarray, values: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                np.linalg.solve((fixed.T * w) @ fixed + 0.5 * np.eye(8), (fixed.T * w) @ v)
                for w, v in zip(weights, values, strict=True)
            ]
        )

    for _ in range(10):
        users = solved(weights, values, items)
        items = solved(weights.T, values.T, users)
    return torch.from_numpy(users[:USERS] @ items.T)


def hit_rate(ratings: Ratings, fakes: Fakes, *, explicit: bool = False) -> float:
    scores = scores_after(ratings, fakes, explicit=explicit)
    seen = Interactions.of(ratings)
    targets, users = torch.tensor([TARGET]), torch.arange(USERS)
    return exposure(lambda some: scores[some], targets, users, seen, k=15).means()["hit_rate"]


@pytest.mark.parametrize("kind", OPTIMISED)
def test_optimised_fakes_push_more_than_random_ones(kind: str) -> None:
    gains = []
    for seed in range(3):
        ratings = planted(seed)
        plain = hit_rate(ratings, fakes_of(ratings, "random", seed=seed))
        optimised = fakes_of(ratings, kind, seed=seed, feedback="implicit")
        gains.append(hit_rate(ratings, optimised) - plain)
    # Random fakes reach 0.10 here, optimised ones 0.18 to 0.29.
    assert min(gains) > 0
    assert np.mean(gains) > 0.05


@pytest.mark.parametrize("kind", ["gradient", "learned"])
def test_of_explicit_feedback_a_surrogate_that_was_not_attacked_is_deceived_too(kind: str) -> None:
    lower = []
    for seed in range(3):
        ratings = planted(seed)
        found = []
        for one in (kind, "random"):
            fakes = fakes_of(ratings, one, seed=seed)
            wanted = request(
                "test",
                ratings,
                fakes.targets,
                selected=fakes.selected,
                accounts=ACCOUNTS,
                share=None,
                fillers=FILLERS,
                nuke=False,
                repeats=1,
                seed=0,
            )
            crowd = Crowd.of(wanted, explicit=True)
            events = fakes.ratings
            shape = (ACCOUNTS, ITEMS)
            presence, values = torch.zeros(shape), torch.zeros(shape)
            cells = (events.users - USERS, events.items)
            presence[cells] = 1.0
            span = np.ptp(wanted.scale)
            values[cells] = torch.from_numpy((events.values - ratings.values.mean()) / span).float()
            other = Factors(crowd, torch.Generator().manual_seed(100 + seed))
            found.append(float(crowd.loss(other.fit(Profiles(presence, values)))))
        lower.append(found[1] - found[0])
    assert np.mean(lower) > 0.05


@pytest.mark.parametrize("kind", OPTIMISED)
def test_profiles_are_as_asked(kind: str) -> None:
    ratings = planted(0)
    for nuke in (False, True):
        for feedback in ("explicit", "implicit"):
            fakes = fakes_of(ratings, kind, nuke=nuke, feedback=feedback, steps=2)
            rated = not (nuke and feedback == "implicit")
            items = fakes.ratings.items.reshape(ACCOUNTS, FILLERS + rated)
            values = fakes.ratings.values.reshape(items.shape)
            assert set(np.unique(values)) <= {1.0, 2.0, 3.0, 4.0, 5.0}
            assert all(len(set(row)) == len(row) for row in items.tolist())
            assert (items == TARGET).sum(1).tolist() == [int(rated)] * ACCOUNTS
            if rated:
                assert (values[items == TARGET] == (ratings.values.min() if nuke else 5)).all()
            assert fakes.fillers == FILLERS
            assert (fakes.users == np.arange(USERS, USERS + ACCOUNTS)).all()
            again = fakes_of(ratings, kind, nuke=nuke, feedback=feedback, steps=2)
            assert (fakes.ratings.items == again.ratings.items).all()
            assert (fakes.ratings.values == again.ratings.values).all()
    other = fakes_of(ratings, kind, steps=2, seed=1)
    assert (other.ratings.items != fakes_of(ratings, kind, steps=2).ratings.items).any()


@pytest.mark.parametrize("kind", ["gradient", "unrolled"])
def test_a_nuke_by_implicit_feedback_demotes_what_it_does_not_touch(kind: str) -> None:
    before, after = [], []
    for seed in range(3):
        ratings = planted(seed)
        target = int(np.argsort(-ratings.popularity())[6])
        seen, users = Interactions.of(ratings), torch.arange(USERS)
        for found, options in (
            (before, {"kind": "random", "accounts": 0}),
            (
                after,
                {
                    "kind": kind,
                    "nuke": True,
                    "feedback": "implicit",
                    "steps": 10,
                    "accounts": 25,
                },
            ),
        ):
            fakes = make_fakes(ratings, [target], fillers=FILLERS, seed=seed, **options)
            scores = scores_after(ratings, fakes, explicit=False)
            gained = exposure(
                lambda some, scores=scores: scores[some], torch.tensor([target]), users, seen, k=8
            )
            found.append(gained.means()["hit_rate"])
    # What it leaves out falls behind what the fakes have.
    assert np.mean(after) < np.mean(before) - 0.05


def test_all_ratings_alike_are_implicit_and_no_fillers_are_no_optimisation() -> None:
    ratings = planted(0)
    ones = Ratings(ratings.users, ratings.items, np.ones(len(ratings)), ratings.times, USERS, ITEMS)
    assert set(fakes_of(ones, "gradient", steps=1).ratings.values) == {1.0}
    assert len(fakes_of(ratings, "gradient", fillers=0).ratings) == ACCOUNTS
    assert len(fakes_of(ratings, "deep", accounts=0).ratings) == 0
    with pytest.raises(InputError, match="feedback='explicit', but all ratings are 1"):
        fakes_of(ones, "gradient", feedback="explicit")


def test_progress_is_told_to_the_end() -> None:
    for kind in OPTIMISED:
        told: list[int] = []
        fakes_of(planted(0), kind, steps=3, tick=lambda done, loss, told=told: told.append(done))
        assert told == sorted(told)
        assert told[-1] == rounds(kind, 3)
    assert rounds("bandwagon") == 0


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("gradiant", {}, "no kind is called 'gradiant'; did you mean 'gradient'"),
        ("random", {"steps": 3}, "steps=3 is for the optimised kinds"),
        ("random", {"feedback": "implicit"}, "feedback='implicit' is for the optimised kinds"),
        ("gradient", {"popular": 3}, "popular=3 is for a template, not for 'gradient'"),
        ("gradient", {"segment": [3]}, r"segment=\[3\] is for a template"),
        ("gradient", {"feedback": "implict"}, "feedback='implict'; did you mean 'implicit'"),
        ("gradient", {"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ("gradient", {"fillers": 99}, "fillers=99, but there are 79 items"),
        ("gradient", {"accounts": 350_000}, "optimised accounts of 80 items need a surrogate"),
    ],
)
def test_wrong_arguments_are_named(kind: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fakes_of(planted(0), kind, **options)


def test_a_sample_of_the_users_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from embattle.poisoning import crowd

    monkeypatch.setattr(crowd, "CELLS", ITEMS * (60 + ACCOUNTS))
    fakes = fakes_of(planted(0), "gradient", steps=1)
    assert len(fakes.users) == ACCOUNTS
    assert fakes.ratings.user_count == USERS + ACCOUNTS


def test_detection_by_hand() -> None:
    told = detection(np.array([0.1, 0.9, 0.5, 0.7]), np.array([1, 2]), flagged=3)
    assert (told.precision, told.recall) == pytest.approx((2 / 3, 1.0))
    assert told.f1 == pytest.approx(0.8)
    assert detection(np.array([0.1, 0.9]), np.array([0]), flagged=1).f1 == 0
    with pytest.raises(InputError, match=r"flagged must be in \[1, 2\], got 3"):
        detection(np.array([0.1, 0.9]), np.array([0]), flagged=3)
    with pytest.raises(InputError, match="fakes must be numbers of users"):
        detection(np.array([0.1, 0.9]), np.array([2]), flagged=1)


def test_delta_ndcg_and_reciprocal_ranks_over_all_items_by_hand() -> None:
    before = torch.tensor([[3.0, 2, 1], [1, 2, 3]])
    after = torch.tensor([[2.0, 3, 1], [1, 2, 3]])
    held = Interactions(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 3)
    found = ndcg_change(lambda u: before[u], lambda u: after[u], held, k=3)
    second, third = 1 / np.log2(3), 1 / np.log2(4)
    assert found.before == pytest.approx((1 + third) / 2)
    assert found.after == pytest.approx((second + third) / 2)
    assert found.delta == pytest.approx((second - 1) / 2)
    # With k the number of items the reciprocal rank is that of the full ranking.
    assert evaluate(lambda u: after[u], held, k=3).mrr.tolist() == pytest.approx([1 / 2, 1 / 3])


def test_the_command_makes_optimised_fakes(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("pyarrow")
    from tiny_job import invoke

    ratings, path = planted(0), tmp_path / "ratings.csv"
    rows = zip(ratings.users.tolist(), ratings.items.tolist(), ratings.values, strict=True)
    path.write_text("user_id,item_id,rating\n" + "".join(f"{u},{i},{v:g}\n" for u, i, v in rows))
    more = ("--kind", "gradient", "--feedback", "implicit", "--steps", "2", "--count", "3")
    out = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for one in out:
        status, told = invoke("poison", path, "--out", one, "--targets", TARGET, *more)
        assert status == 0, told
    assert "making gradient fakes" in told
    assert out[0].read_bytes() == out[1].read_bytes()
    facts = json.loads((tmp_path / "one.csv.manifest.json").read_text())
    assert (facts["kind"], facts["feedback"], facts["steps"]) == ("gradient", "implicit", 2)
    after, users, _ = read_named_ratings(out[0], ("user_id", "item_id", "rating"))
    assert len(after) == len(ratings) + facts["fake_rows"]
    assert users[-3:] == facts["fake_users"] == ["150", "151", "152"]
    status, told = invoke(
        "poison", path, "--out", tmp_path / "x.csv", "--targets", TARGET, "--text", "a"
    )
    assert (status, "--text is not for --kind bandwagon" in told) == (2, True)
