"""How suspicious each user of a table of ratings is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embattle.data.ratings import Floats, Ints, Ratings
from embattle.errors import InputError


@dataclass(frozen=True)
class Detection:
    """How well suspects are the fakes.

    Attributes:
        precision: share of the suspects that are fake.
        recall: share of the fakes that are suspects.
        f1: twice their product over their sum; 0 where both are.
    """

    precision: float
    recall: float
    f1: float


def suspicion(ratings: Ratings) -> Floats:
    """Gives each user's rating deviation from mean agreement (RDMA).

    The mean, over the user's ratings, of how far the rating is from the item's mean, divided by the
    number of the item's ratings: fakes disagree, and rate what few others rate (Chirita, Nejdl and
    Zamfir, "Preventing shilling attacks in online recommender systems", WIDM 2005). Fakes by the
    `average` template agree with the others, and a few of them are hardly noticed.

    Args:
        ratings: explicit ones, of genuine and fake users.

    Returns:
        [user_count] float64, larger is more suspicious; 0 for users without ratings.

    Raises:
        InputError: if there are no ratings, or all are the same.
    """
    if not len(ratings) or ratings.values.min() == ratings.values.max():
        raise InputError(
            f"suspicion: ratings has {len(ratings)} values and no two that differ; it compares "
            "explicit ratings"
        )
    rated = np.maximum(ratings.popularity(), 1)
    means = np.bincount(ratings.items, ratings.values, ratings.item_count) / rated
    apart = np.abs(ratings.values - means[ratings.items]) / rated[ratings.items]
    events = np.bincount(ratings.users, minlength=ratings.user_count)
    found: Floats = np.bincount(ratings.users, apart, ratings.user_count) / np.maximum(events, 1)
    return found


def detection(suspicion: Floats, fakes: Ints, *, flagged: int) -> Detection:
    """Measures a detector that flags the most suspicious users.

    Args:
        suspicion: [user_count], larger is more suspicious; of equal ones the first are flagged.
        fakes: [F] int64 the numbers of the fake users.
        flagged: how many users are flagged.

    Returns:
        Precision, recall and F1.

    Raises:
        InputError: no fakes, numbers that are no users, or none or too many flagged.
    """
    count = len(suspicion)
    if not len(fakes) or fakes.min() < 0 or fakes.max() >= count:
        raise InputError(
            f"detection: fakes must be numbers of users in [0, {count}), one at least; got {fakes}"
        )
    if not 1 <= flagged <= count:
        raise InputError(f"detection: flagged must be in [1, {count}], got {flagged}")
    suspects = np.argsort(-suspicion, kind="stable")[:flagged]
    found = int(np.isin(suspects, fakes).sum())
    precision, recall = found / flagged, found / len(np.unique(fakes))
    both = precision + recall
    return Detection(precision, recall, 2 * precision * recall / both if both else 0.0)
