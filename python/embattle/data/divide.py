"""Divisions of any rows into training, validation and test parts, as functions on arrays.

Each gives one part number per row: `TRAIN`, `VALIDATION`, `TEST`, or `LEFT_OUT` for a row that
belongs to no part because it would leak from one into another. Rows with the same group (copies of
one text, the events of one user with one item) are never in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embattle.errors import InputError

TRAIN, VALIDATION, TEST, LEFT_OUT = 0, 1, 2, -1

Parts = NDArray[np.int8]


def pairs(users: ArrayLike, items: ArrayLike) -> NDArray[np.int64]:
    """Numbers user-item pairs, for `groups`: equal pairs get equal numbers.

    Args:
        users: [N] whole numbers from 0.
        items: [N] whole numbers from 0.

    Returns:
        [N] int64.

    Raises:
        InputError: if the arrays differ in length or have negative numbers.
    """
    u, i = whole("pairs", users=users, items=items)
    return np.unique(u * (i.max(initial=0) + 1) + i, return_inverse=True)[1].reshape(-1)


def random_parts(
    count: int, fractions: Sequence[float], seed: int, groups: ArrayLike | None = None
) -> Parts:
    """Divides rows at random; the parts have the wanted shares as exactly as whole groups allow.

    Args:
        count: rows.
        fractions: shares of train, validation and test; they sum to 1.
        seed: decides the division.
        groups: [count] whatever must stay together; None lets every row stand alone.

    Returns:
        [count] int8 part numbers.

    Raises:
        InputError: about the fractions or the groups.
    """
    return stratified_parts(np.zeros(count, dtype=np.int64), fractions, seed, groups)


def stratified_parts(
    labels: ArrayLike, fractions: Sequence[float], seed: int, groups: ArrayLike | None = None
) -> Parts:
    """Divides rows at random so that each class has the same shares in every part.

    A class of k groups puts round(k * share) of them into a part, but at least one into training
    and, if it has more, one into the test part.

    Args:
        labels: [N] classes. A group counts for the class of its first row.
        fractions: shares of train, validation and test; they sum to 1.
        seed: decides the division.
        groups: [N] whatever must stay together; None lets every row stand alone.

    Returns:
        [N] int8 part numbers.

    Raises:
        InputError: about the fractions or the groups.
    """
    shares = _fractions(fractions)
    classes = np.unique(np.asarray(labels).reshape(-1), return_inverse=True)[1].reshape(-1)
    count = len(classes)
    first, member = _groups(groups, count)
    classes = classes[first]
    # In each class, the groups stand in random order; its first ones are the test part.
    mixed = np.random.default_rng(seed).permutation(len(first))
    order = mixed[np.argsort(classes[mixed], kind="stable")]
    sizes = np.bincount(classes)
    rank = np.arange(len(first)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size = sizes[classes[order]]
    test = np.where(size > 1, np.maximum(np.rint(size * shares[2]), shares[2] > 0), 0)
    validation = np.minimum(np.rint(size * shares[1]), np.maximum(size - test - 1, 0))
    test = np.minimum(test, np.maximum(size - 1, 0)) if shares[0] > 0 else size - validation
    part = np.empty(len(first), dtype=np.int8)
    part[order] = np.where(rank < test, TEST, np.where(rank < test + validation, VALIDATION, TRAIN))
    divided: Parts = part[member]
    return divided


def leave_one_out(
    users: ArrayLike,
    items: ArrayLike,
    times: ArrayLike,
    *,
    validation: bool = True,
    strict: bool = False,
) -> Parts:
    """Takes the latest event of each user as test, and the one before as validation.

    Of events at the same time, the one with the largest item number counts as the later. Earlier
    events of a held-out user-item pair are left out, so that a model never trains on what it is
    tested on. A user keeps at least one event for training: one with two different items gives a
    test event alone, one with a single item gives none.

    Args:
        users: [N] whole numbers from 0.
        items: [N] whole numbers from 0.
        times: [N] finite numbers; larger is later.
        validation: whether to hold out an event for validation, too.
        strict: leave out also the user's other events at the times of what is held out, so that
            every training event is earlier than validation, and validation earlier than test. A
            user whose events are all at one time is then left out wholly.

    Returns:
        [N] int8 part numbers.

    Raises:
        InputError: if the arrays do not fit each other or a time is not finite.
    """
    u, i = whole("leave_one_out", users=users, items=items)
    t = _times("leave_one_out", times, len(u))
    part = np.zeros(len(u), dtype=np.int8)
    if not len(u):
        return part
    pair = pairs(u, i)
    order = np.lexsort((i, t, u))
    # The last event of each pair stands for the pair; the pairs of a user are in order of time.
    latest = np.zeros(pair.max() + 1, dtype=np.int64)
    latest[pair[order]] = np.arange(len(order))
    stands = np.sort(latest)
    owner = u[order[stands]]
    sizes = np.bincount(owner)
    ends = np.cumsum(sizes)[owner]
    from_last = ends - 1 - np.arange(len(stands))
    different = sizes[owner]
    test = stands[(from_last == 0) & (different > 1)]
    held = [(test, TEST)]
    if validation:
        held.append((stands[(from_last == 1) & (different > 2)], VALIDATION))
    for positions, number in held:
        rows = order[positions]
        part[np.isin(pair, pair[rows])] = LEFT_OUT
        part[rows] = number
    if strict:
        _leave_ties_out(u, t, part)
    return part


def _leave_ties_out(users: NDArray[np.int64], times: NDArray[np.float64], part: Parts) -> None:
    """Leaves out what is not earlier than the user's validation or test event."""
    count = int(users.max()) + 1
    limit = np.full(count, np.inf)
    test = part == TEST
    limit[users[test]] = times[test]
    part[(part == VALIDATION) & (times >= limit[users])] = LEFT_OUT
    checked = part == VALIDATION
    limit[users[checked]] = times[checked]
    part[(part == TRAIN) & (times >= limit[users])] = LEFT_OUT
    trained = np.zeros(count, dtype=bool)
    trained[users[part == TRAIN]] = True
    part[~trained[users]] = LEFT_OUT


def time_parts(
    times: ArrayLike, fractions: Sequence[float], groups: ArrayLike | None = None
) -> Parts:
    """Divides rows by two moments: training before the first, test from the second on.

    Rows at one time are never divided: a moment is moved to the nearest change of time that leaves
    no part empty. A row whose group has a row in an earlier part is left out.

    Args:
        times: [N] finite numbers; larger is later.
        fractions: shares of train, validation and test; they sum to 1.
        groups: [N] what must not be in two parts, such as `pairs(users, items)`.

    Returns:
        [N] int8 part numbers.

    Raises:
        InputError: about the arguments, or if there are fewer times than parts.
    """
    shares = _fractions(fractions)
    t = _times("time_parts", times, None)
    known, size = np.unique(t, return_counts=True)
    train, validation, test = (int(share > 0) for share in shares)
    if len(known) < train + validation + test:
        raise InputError(
            f"time_parts: a part would be empty: {len(t)} rows have {len(known)} different times, "
            "and rows at one time are not divided; change the fractions or divide otherwise"
        )
    before = np.concatenate([[0], np.cumsum(size)])

    def nearest(wanted: float, low: int, high: int) -> int:
        return low + int(np.abs(before[low : high + 1] - wanted * len(t)).argmin())

    first_cut = nearest(shares[0], train, len(known) - validation - test)
    second_cut = nearest(shares[0] + shares[1], first_cut + validation, len(known) - test)
    of_time = np.zeros(len(known), dtype=np.int8)
    of_time[first_cut:] = VALIDATION
    of_time[second_cut:] = TEST
    part = of_time[np.searchsorted(known, t)]
    if groups is not None:
        first, member = _groups(groups, len(t))
        earliest = np.full(len(first), TEST, dtype=np.int8)
        np.minimum.at(earliest, member, part)
        part[part > earliest[member]] = LEFT_OUT
    return part


def _fractions(fractions: Sequence[float]) -> NDArray[np.float64]:
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise InputError(
            "fractions must be three numbers >= 0 that sum to 1 (train, validation, test), got "
            f"{list(fractions)}"
        )
    return shares


def _groups(groups: ArrayLike | None, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The first row of each group, and the group of each row; groups in order of appearance."""
    if groups is None:
        return np.arange(count), np.arange(count)
    found = np.asarray(groups).reshape(-1)
    if len(found) != count:
        raise InputError(f"groups must have one entry per row: got {len(found)} for {count} rows")
    _, first, member = np.unique(found, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[member.reshape(-1)]


def whole(op: str, **arrays: ArrayLike) -> list[NDArray[np.int64]]:
    """Checks arrays of one length that hold whole numbers from 0; `op` is for the message."""
    found = []
    for name, given in arrays.items():
        array = np.asarray(given)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(
                f"{op}: {name} must be one row of whole numbers, got {array.dtype} of shape "
                f"{array.shape}; number them first"
            )
        if array.size and int(array.min()) < 0:
            raise InputError(f"{op}: {name} must be >= 0, got {array.min()}")
        found.append(array.astype(np.int64))
    if len({len(array) for array in found}) > 1:
        lengths = ", ".join(f"{len(a)} {n}" for n, a in zip(arrays, found, strict=True))
        raise InputError(f"{op}: the arrays must have one length, got {lengths}")
    return found


def _times(op: str, times: ArrayLike, count: int | None) -> NDArray[np.float64]:
    found = np.asarray(times, dtype=np.float64)
    if found.ndim != 1 or (count is not None and len(found) != count):
        wanted = "one row" if count is None else f"{count} numbers"
        raise InputError(f"{op}: times must be {wanted}, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise InputError(f"{op}: times must be finite; leave rows without a time out")
    return found
