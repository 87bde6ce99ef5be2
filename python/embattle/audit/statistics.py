"""How sure a figure is, and whether two models differ: intervals, paired and corrected tests."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from embattle.errors import need
from embattle.tasks.kinds.weighted import Measure

CONFIDENCE = 0.95
#: How often the samples are drawn anew for an interval, and outputs exchanged for a test.
DRAWS = 2000

# Weights of so many samples, over all draws, are held at once.
_HELD = 1 << 22

Key = TypeVar("Key", bound=Hashable)
Interval = tuple[float, float]


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a share (Wilson, JASA 22, 1927).

    Unlike a bootstrap's it does not shrink to a point where all samples, or none, are successes.

    Raises:
        ValueError: there are no samples, or more successes than samples.
    """
    found = need("scipy.stats").binomtest(successes, count)
    low, high = found.proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def bootstrap(
    measures: Mapping[Key, Measure], count: int, *, draws: int = DRAWS, seed: int = 0
) -> dict[Key, Tensor]:
    """Measures of samples that are drawn anew, as many as there are, with replacement.

    All measures see the same draws, so that the difference of two of them is a paired one (Efron
    and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13).

    Args:
        measures: of the same `count` samples.
        count: N.
        draws: R.
        seed: decides the draws.

    Returns:
        By key [R] float64; NaN where a measure is not defined on a draw.
    """
    found: dict[Key, list[Tensor]] = {key: [] for key in measures}
    generator = torch.Generator().manual_seed(seed)
    for some in _blocks(draws, count):
        places = torch.randint(count, (some, count), generator=generator, device="cpu")
        weights = torch.zeros(some, count, dtype=torch.float64, device="cpu")
        weights.scatter_add_(1, places, torch.ones_like(weights))
        for key, measure in measures.items():
            found[key].append(measure(weights))
    return {key: torch.cat(parts) for key, parts in found.items()}


def percentile_interval(drawn: Tensor, confidence: float = CONFIDENCE) -> Interval | None:
    """The interval between two quantiles of a bootstrap's draws, [R].

    Returns:
        None where the measure is not defined on more than a tenth of the draws.
    """
    defined = drawn[drawn.isfinite()]
    if len(defined) < 0.9 * len(drawn):
        return None
    tail = (1 - confidence) / 2
    low, high = defined.quantile(torch.tensor([tail, 1 - tail]).to(defined)).tolist()
    return low, high


def mcnemar(first: Tensor, second: Tensor) -> float:
    """The exact test of whether two models are right on equally many of the same samples.

    Only samples on which one of them is right count: without a difference each is as likely to be
    either's (McNemar, Psychometrika 12, 1947; exact: Dietterich, Neural Computation 10, 1998).

    Args:
        first, second: whether each sample is right, bool [N].

    Returns:
        The two-sided p-value.
    """
    gained = int((second & ~first).sum())
    lost = int((first & ~second).sum())
    if gained + lost == 0:
        return 1.0
    return float(need("scipy.stats").binomtest(min(gained, lost), gained + lost).pvalue)


def permutation_tests(
    joined: Mapping[Key, Measure], count: int, *, draws: int = DRAWS, seed: int = 0
) -> dict[Key, tuple[float, float]]:
    """Paired tests of two models by exchanging their outputs on samples at random.

    Without a difference it does not matter whose output is whose. The p-value counts the observed
    order among the draws, so that it is never 0 (Phipson and Smyth, Statistical Applications in
    Genetics and Molecular Biology 9, 2010).

    Args:
        joined: measures of 2 N samples each: the first model's N, then the second's.
        count: N.
        draws: how often outputs are exchanged.
        seed: decides where.

    Returns:
        By key, the second model's measure less the first one's, and the two-sided p-value; both
        NaN where the measure is not defined.
    """
    generator = torch.Generator().manual_seed(seed)
    as_is = torch.zeros(1, count, dtype=torch.float64, device="cpu")
    observed = {key: _difference(measure, as_is).item() for key, measure in joined.items()}
    beyond = dict.fromkeys(joined, 0)
    for some in _blocks(draws, 2 * count):
        exchanged = torch.randint(2, (some, count), generator=generator, device="cpu").double()
        for key, measure in joined.items():
            # Sums in another order may differ in the last digits.
            least = abs(observed[key]) * (1 - 1e-9) - 1e-12
            beyond[key] += int((_difference(measure, exchanged).abs() >= least).sum())
    return {
        key: (value, (1 + beyond[key]) / (1 + draws) if math.isfinite(value) else math.nan)
        for key, value in observed.items()
    }


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for being one of several (Holm, Scandinavian Journal of Statistics, 1979).

    The chance that any true hypothesis is rejected at a level is at most that level, whatever
    depends on what.

    Args:
        values: the family's p-values; NaN for tests that could not be made, which do not count.

    Returns:
        The corrected ones, in the same order.
    """
    made = sorted((value, place) for place, value in enumerate(values) if not math.isnan(value))
    found = list(values)
    largest = 0.0
    for rank, (value, place) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * value))
        found[place] = largest
    return found


def _difference(measure: Measure, exchanged: Tensor) -> Tensor:
    """The second model's measure less the first's, [R], where `exchanged` [R, N] is not 0."""
    kept = 1 - exchanged
    first = measure(torch.cat([kept, exchanged], dim=1))
    return measure(torch.cat([exchanged, kept], dim=1)) - first


def _blocks(draws: int, width: int) -> Iterator[int]:
    """Parts of the draws whose weights are held at once."""
    most = max(1, _HELD // max(1, width))
    for start in range(0, draws, most):
        yield min(most, draws - start)
