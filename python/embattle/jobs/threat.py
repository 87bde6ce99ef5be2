"""From recipes to attacks: the same threat for training and for the audit."""

from __future__ import annotations

from typing import Any

import torch

from embattle.attacks import Attack, BoxStart, GaussianStart
from embattle.jobs.attack_recipe import AttackRecipe, ThreatRecipe
from embattle.perturb.strength import Relative, Strength, scaled

# The attacks whose best iterate may be kept: the others keep it anyway, or have no other.
_ITERATED = ("pgd", "msap", "mifgsm", "smart")
_OWN = frozenset(("kind", "start"))


def make_attack(
    recipe: AttackRecipe,
    threat: ThreatRecipe,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    best: bool = False,
    unit: Strength | None = None,
) -> Attack:
    """Builds the attack of a recipe within its threat.

    Args:
        recipe: which attack.
        threat: norm, radius and its unit.
        generator: source of random starts.
        scale: factor on the radius.
        best: whether an attack of many steps keeps its best iterate instead of the last.
        unit: the threat's unit, where it was measured; otherwise it is that of each batch.

    Returns:
        The attack.

    Raises:
        ValueError: the attack is not one of the threat's norm.
    """

    def strength(share: float) -> Strength:
        return strength_of(threat, share * scale * threat.eps, unit)

    options: dict[str, Any] = {
        name: getattr(recipe, name) for name in type(recipe).model_fields if name not in _OWN
    }
    if recipe.kind == "pgd":
        options["step_size"] = recipe.step_share
    for name in recipe.lengths:
        if options[name] is not None:
            options[name] = strength(options[name])
    if recipe.start is not None:
        start = {"gaussian": GaussianStart, "box": BoxStart}[recipe.start.kind]
        size = threat.eps * scale * recipe.start.size
        options["random_start"] = start(strength_of(threat, size))
    if best and recipe.kind in _ITERATED:
        options["keep"] = "best"
    if recipe.kind == "minimum_norm":
        options |= {"norm": threat.norm, "unit": strength_of(threat, 1.0, unit)}
        options = {k: v for k, v in options.items() if k not in ("random_start", "restarts")}
    elif recipe.kind == "ensemble":
        options |= {"norm": threat.norm, "eps": strength(1.0)}
        del options["random_start"]
    elif recipe.kind != "neftune":  # its alpha is its radius
        options |= {"norm": threat.norm, "eps": strength(1.0)}
    made: Attack = recipe.made(**options, generator=generator)
    return made


def strength_of(threat: ThreatRecipe, value: float, unit: Strength | None = None) -> Strength:
    """A number of the threat's units.

    Args:
        threat: the threat.
        value: how many.
        unit: the unit, where it was measured.
    """
    if threat.unit == "absolute":
        return value
    return Relative(value, to=threat.unit) if unit is None else scaled(unit, value)


def check_attack(key: str, recipe: AttackRecipe, threat: ThreatRecipe) -> None:
    """Checks that an attack is one of the threat's norm.

    Args:
        key: the attack's place in the recipe.
        recipe: the attack.
        threat: the threat.

    Raises:
        ValueError: it is not.
    """
    if recipe.kind == "fgsm" and threat.norm != "linf":
        raise ValueError(
            f"{key}: kind fgsm steps in the linf norm, threat.norm is {threat.norm}: use fgm"
        )
    try:
        make_attack(recipe, threat, torch.Generator())
    except ValueError as error:
        raise ValueError(f"{key}: {error}; threat.norm is {threat.norm}") from error
