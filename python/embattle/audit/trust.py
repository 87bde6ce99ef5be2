"""All honesty checks of the models of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from embattle.attacks import PGD, Attack, AutoAttack
from embattle.audit.evaluation import evaluate
from embattle.audit.honesty import (
    Check,
    chance,
    converged_check,
    eps_check,
    gradient_checks,
    gradient_free_check,
    order_checks,
    perturbations,
    random_check,
    transfer_check,
    unbounded_check,
)
from embattle.audit.probes import is_random, probe_gradients
from embattle.audit.victim import Victim
from embattle.data.batch import Batch
from embattle.perturb.strength import Strength, scaled
from embattle.tasks.evaluator import Evaluator

#: Samples on which the checks that need further attacks are made.
CHECKED = 100
# How much larger the ball is in which an attack must be no weaker.
_LARGER = 2.0
# Multiples of eps that bound nothing.
_FAR = (10.0, 100.0, 1000.0)


def check_victims(
    victims: Mapping[str, Victim],
    batches: Sequence[Batch],
    *,
    evaluator: Evaluator,
    measure: str = "accuracy",
    seed: int = 0,
) -> list[Check]:
    """Checks the attacks on all models.

    Args:
        victims: the models by name, after their attacks.
        batches: the first of the samples that were attacked: further attacks are made on them.
        evaluator: see `embattle.audit.evaluate`.
        measure: what the share of samples that are right is called.
        seed: of the further attacks.
    """
    checks: list[Check] = []
    generator = torch.Generator().manual_seed(seed)
    moved: dict[str, list[list[Tensor]]] = {}
    if len(victims) > 1:
        for name, victim in victims.items():
            attack = _steps(victim.norm, victim.eps, 3, generator, keep="last")
            found = perturbations(victim.model, victim.sites, batches, attack, evaluator=evaluator)
            moved[name] = found
    for name, victim in victims.items():
        checks += _of_one(name, victim, batches, evaluator, measure, generator)
        right = victim.attacked_right()[: sum(map(len, batches))]
        for origin, deltas in moved.items():
            if origin != name:
                other = victims[origin]
                checks.append(
                    transfer_check(
                        name,
                        (victim.model, victim.sites),
                        (other.model, other.sites),
                        batches,
                        _steps(victim.norm, victim.eps, 1, generator),
                        origin=origin,
                        right=right,
                        deltas=deltas,
                        evaluator=evaluator,
                    )
                )
    return checks


def _of_one(
    name: str,
    victim: Victim,
    batches: Sequence[Batch],
    evaluator: Evaluator,
    measure: str,
    generator: torch.Generator,
) -> list[Check]:
    """The checks of one model that need no other."""
    attacked, count = victim.attacked, sum(map(len, batches))
    whole = [label for label, attack in victim.attacks.items() if isinstance(attack, AutoAttack)]
    own = [label for label in victim.attacks if label not in whole]
    noise = [label for label in own if victim.attacks[label].steps == 0]
    gradient = [label for label in own if label not in noise]
    shares = {label: float(under.right.double().mean()) for label, under in attacked.items()}
    checks = order_checks(
        name,
        shares,
        noise=noise,
        gradient=gradient,
        measure=measure,
        slack=chance(len(victim.right)),
    )
    # A single step may well go too far in a larger ball.
    for label in [label for label in gradient if victim.attacks[label].steps > 1][-1:]:
        attack = victim.attacks[label]
        larger = evaluate(
            victim.model,
            batches,
            victim.sites,
            {label: _resized(attack, _LARGER)},
            evaluator=evaluator,
            known=victim.unattacked.first(count),
            leave=True,
        )[label].right
        inside = attacked[label].right[:count]
        checks.append(eps_check(name, label, inside, larger, _LARGER))
    for label in whole:
        checks.append(gradient_free_check(name, label, attacked[label]))
    for label in (whole or gradient)[-1:]:
        found = converged_check(name, label, attacked[label])
        checks += [] if found is None else [found]
    far = [_steps(victim.norm, scaled(victim.eps, factor), 20, generator) for factor in _FAR]
    checks.append(
        unbounded_check(
            name,
            victim.model,
            batches,
            victim.sites,
            far,
            turned=victim.turned()[:count],
            evaluator=evaluator,
        )
    )
    probe = probe_gradients(
        victim.model,
        batches,
        victim.sites,
        norm=victim.norm,
        eps=victim.eps,
        evaluator=evaluator,
    )
    checks += gradient_checks(name, probe, victim.right[:count])
    checks.append(random_check(name, is_random(victim.model, batches, evaluator)))
    return checks


def _steps(
    norm: str,
    eps: Strength,
    steps: int,
    generator: torch.Generator,
    keep: Literal["last", "best"] = "best",
) -> Attack:
    """Plain steps of half the radius at most."""
    step = scaled(eps, max(0.1, min(0.5, 2.5 / steps)))
    made: Attack = PGD(
        norm=norm,  # type: ignore[arg-type]
        eps=eps,
        step_size=step,
        steps=steps,
        keep=keep,
        generator=generator,
    )
    return made


def _resized(attack: Attack, factor: float) -> Attack:
    """The same attack in a larger ball."""
    lengths = {"eps": scaled(attack.eps, factor)}
    step = getattr(attack, "step_size", None)
    if step is not None:
        lengths["step_size"] = scaled(step, factor)
    return replace(attack, **lengths)  # type: ignore[arg-type]
