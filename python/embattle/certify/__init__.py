"""Certificates: what no attack can do, proven and not only tried. See docs/certificates.md.

| of | against | function |
|---|---|---|
| a ranker's order | vectors moved in l2 balls | `certified_ranks`, `worst_margin` |
| an FM's or a linear model's class | values of fields swapped | `worst_swaps`, `swap_bounds` |
| a smoothed classifier's class | embeddings moved in an l2 ball | `certified_radii` |
| bagged MF's recommendations | fake users in training | `certified_overlap` |
"""

from embattle.certify.bagging import (
    Votes,
    certified_overlap,
    clean_share,
    collect_votes,
    mean_share,
)
from embattle.certify.margins import Balls, worst_margin
from embattle.certify.ranks import Ranker, Ranks, attacked_ranks, certified_ranks
from embattle.certify.smoothing import (
    ABSTAIN,
    Radii,
    Smoothed,
    certified_radii,
    lower_confidence,
    smoothed_predictions,
    upper_confidence,
)
from embattle.certify.submodels import Submodels, SubmodelSettings, train_submodels
from embattle.certify.swaps import Swaps, swap_bounds, worst_swaps

__all__ = [
    "ABSTAIN",
    "Balls",
    "Radii",
    "Ranker",
    "Ranks",
    "Smoothed",
    "SubmodelSettings",
    "Submodels",
    "Swaps",
    "Votes",
    "attacked_ranks",
    "certified_overlap",
    "certified_radii",
    "certified_ranks",
    "clean_share",
    "collect_votes",
    "lower_confidence",
    "mean_share",
    "smoothed_predictions",
    "swap_bounds",
    "train_submodels",
    "upper_confidence",
    "worst_margin",
    "worst_swaps",
]
