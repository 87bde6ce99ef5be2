"""Fake profiles by template or optimised, by one interface.

The optimised kinds know all genuine events, and attack a surrogate that they train on them:

| kind | how the fillers are found | like |
|---|---|---|
| gradient | implicit gradient through alternating least squares | Li et al., NIPS 2016 |
| unrolled | gradient through the last steps of training | RevAdv, Tang et al., RecSys 2020 |
| deep | what a poisoned neural model predicts that fakes like | Huang et al., NDSS 2021 |
| learned | generator against discriminator and surrogate | AUSH, Leg-UP (Lin et al.) |

They are our own, after these papers, and no copies of the authors' programs. Each can push and
nuke, by explicit and by implicit feedback. Of implicit feedback nobody can say that an item is bad:
the profiles of a nuke leave the targets out, and are filled with what will stand before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from embattle.data.profile_request import Fakes, request, target_items, whole
from embattle.data.profiles import TEMPLATES, fake_profiles
from embattle.data.ratings import Ints, Ratings
from embattle.errors import InputError, closest
from embattle.poisoning.ascent import by_gradient, by_unrolling
from embattle.poisoning.crowd import Crowd, Tick
from embattle.poisoning.deep import ROUNDS, by_deep_model
from embattle.poisoning.learned import by_generator

_METHODS = {
    "gradient": by_gradient,
    "unrolled": by_unrolling,
    "deep": by_deep_model,
    "learned": by_generator,
}
#: The kinds that are optimised, and all kinds.
OPTIMISED = tuple(_METHODS)
KINDS = (*TEMPLATES, *OPTIMISED)
#: What a recommender learns from: ratings, or who met what.
FEEDBACK = ("explicit", "implicit")
STEPS = 30

_WHO = "make_fakes"


def rounds(kind: str, steps: int | None = None) -> int:
    """How often `make_fakes` calls `tick`, counted from 1; 0 for a template."""
    if kind not in OPTIMISED:
        return 0
    return ROUNDS if kind == "deep" else STEPS if steps is None else steps


def make_fakes(
    ratings: Ratings,
    targets: Sequence[int] | Ints,
    *,
    kind: str,
    accounts: int | None = None,
    share: float | None = None,
    fillers: int | None = None,
    nuke: bool = False,
    popular: int | None = None,
    segment: Sequence[int] | Ints = (),
    repeats: int = 1,
    feedback: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    tick: Tick = lambda done, loss: None,
) -> Fakes:
    """Make fake accounts.

    Args:
        ratings: the genuine events.
        targets: [T] items to push, or to nuke.
        kind: one of `KINDS`.
        accounts, share, fillers, nuke, popular, segment, repeats: see
            `embattle.data.profiles.fake_profiles`; `popular` and `segment` are for templates.
        feedback: of an optimised kind, what the victim is thought to learn from: one of `FEEDBACK`;
            None: explicit where ratings differ. By implicit feedback alone fillers are rated
            around their items' means, and a nuke leaves its targets out.
        steps: of an optimised kind, steps of its optimisation (of `deep`, five times as many small
            ones in each round); None takes `STEPS`.
        seed: decides the draws: the same seed gives the same fakes on the same machine.
        tick: called after each step of an optimised kind (of `deep`, each round) with how many were
            made and the attacker's loss.

    Returns:
        The fake events.

    Raises:
        InputError: an argument that is out of range or does not go with the kind; too few items, or
            too many for a surrogate.
    """
    if kind not in KINDS:
        raise InputError(f"{_WHO}: no kind is called {kind!r}; {closest(kind, KINDS)}")
    if kind in TEMPLATES:
        for name, given in (("feedback", feedback), ("steps", steps)):
            if given is not None:
                raise InputError(
                    f"{_WHO}: {name}={given!r} is for the optimised kinds "
                    f"({', '.join(OPTIMISED)}), not {kind!r}"
                )
        return fake_profiles(
            ratings,
            targets,
            template=kind,
            accounts=accounts,
            share=share,
            fillers=fillers,
            nuke=nuke,
            popular=popular,
            segment=segment,
            repeats=repeats,
            seed=seed,
        )
    if popular is not None or len(segment):
        said = f"popular={popular}" if popular is not None else f"segment={list(segment)}"
        raise InputError(f"{_WHO}: {said} is for a template, not for {kind!r}")
    if feedback is not None and feedback not in FEEDBACK:
        raise InputError(f"{_WHO}: feedback={feedback!r}; {closest(feedback, FEEDBACK)}")
    aims = target_items(_WHO, ratings, targets)
    differ = bool((ratings.values != ratings.values[0]).any())
    explicit = differ if feedback is None else feedback == "explicit"
    if explicit and not differ:
        raise InputError(
            f"{_WHO}: feedback='explicit', but all ratings are {ratings.values[0]:g}; say implicit"
        )
    wanted = request(
        _WHO,
        ratings,
        aims,
        selected=np.empty(0, dtype=np.int64),
        accounts=accounts,
        share=share,
        fillers=fillers,
        nuke=nuke,
        repeats=repeats,
        seed=seed,
        rated=explicit or not nuke,
    )
    many = whole(_WHO, "steps", STEPS if steps is None else steps, 1)
    empty = np.empty((wanted.accounts, 0))
    if not wanted.accounts or not wanted.fillers:
        return wanted.fakes(empty.astype(np.int64), empty)
    crowd = Crowd.of(wanted, explicit=explicit)
    generator = torch.Generator().manual_seed(int(wanted.draw.integers(2**31)))
    with torch.enable_grad():
        found = _METHODS[kind](crowd, many, generator, tick)
    chosen = found.items.numpy()
    if explicit:
        place = torch.searchsorted(crowd.scale, found.values.contiguous()).numpy()
        values = wanted.scale[place]
    else:
        values = wanted.drawn_values(chosen, by_item=True)
    return wanted.fakes(chosen, values)
