"""Certificates: what no attack can do, proven and not only tried. See docs/certificates.md.

| of | against | function |
|---|---|---|
| a ranker's order | vectors moved in l2 balls | `certified_ranks`, `worst_margin` |
| an FM's or a linear model's class | values of fields swapped | `worst_swaps`, `swap_bounds` |
| a smoothed classifier's class | embeddings moved in an l2 ball | `certified_radii` |
"""

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
from embattle.certify.swaps import Swaps, swap_bounds, worst_swaps

__all__ = [
    "ABSTAIN",
    "Balls",
    "Radii",
    "Ranker",
    "Ranks",
    "Smoothed",
    "Swaps",
    "attacked_ranks",
    "certified_radii",
    "certified_ranks",
    "lower_confidence",
    "smoothed_predictions",
    "swap_bounds",
    "upper_confidence",
    "worst_margin",
    "worst_swaps",
]
