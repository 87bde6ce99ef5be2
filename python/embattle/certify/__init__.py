"""Certificates: what no attack can do, proven and not only tried. See docs/certificates.md.

| of | against | function |
|---|---|---|
| a ranker's order | vectors moved in l2 balls | `certified_ranks`, `worst_margin` |
| an FM's or a linear model's class | values of fields swapped | `worst_swaps`, `swap_bounds` |
"""

from embattle.certify.margins import Balls, worst_margin
from embattle.certify.ranks import Ranker, Ranks, attacked_ranks, certified_ranks
from embattle.certify.swaps import Swaps, swap_bounds, worst_swaps

__all__ = [
    "Balls",
    "Ranker",
    "Ranks",
    "Swaps",
    "attacked_ranks",
    "certified_ranks",
    "swap_bounds",
    "worst_margin",
    "worst_swaps",
]
