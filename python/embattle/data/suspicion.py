"""How suspicious each user of a table of ratings is."""

from __future__ import annotations

import numpy as np

from embattle.data.ratings import Floats, Ratings
from embattle.errors import InputError


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
