"""Certificates: what no attack can do, proven and not only tried.

| of | against | function |
|---|---|---|
| a ranker's order | vectors moved in l2 balls | `certified_ranks`, `worst_margin` |
"""

from embattle.certify.margins import Balls, worst_margin
from embattle.certify.ranks import Ranker, Ranks, attacked_ranks, certified_ranks

__all__ = [
    "Balls",
    "Ranker",
    "Ranks",
    "attacked_ranks",
    "certified_ranks",
    "worst_margin",
]
