"""The methods that `pareto.py` sets beside each other, and the recipes that they are tried on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from embattle.jobs import recipe as recipes
from embattle.jobs.recipe import STANDARD, Recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ATTACKS = (
    "[{kind: fgm}, {kind: pgd, steps: 20, random_start: true, restarts: 2}, "
    "{kind: ensemble, steps: 20, queries: 50}]"
)
#: For an encoder, whose passes take a hundred times as long.
SHORTER = "[{kind: pgd, steps: 10, random_start: true}, {kind: ensemble, steps: 10, queries: 20}]"
#: Kind -> recipe, what is changed in it, and the measure of the figures. Methods with a weight of
#: the adversarial part have the recipe's. In "ranking" staggered and partial perturb what a triplet
#: looks up, and the others rows of the tables, as the audit does.
KINDS: dict[str, tuple[str, list[str], str]] = {
    "reviews": ("womens_reviews", [f"audit.attacks={SHORTER}"], "accuracy"),
    # Less than one pass over the texts.
    "short": ("womens_reviews", [f"audit.attacks={SHORTER}", "train.steps=200"], "accuracy"),
    # All six layers of the encoder.
    "deep": ("womens_reviews", [f"audit.attacks={SHORTER}", "model.layers=null"], "accuracy"),
    "clicks": ("films_ctr", [], "auc"),
    "income": ("adult_income", [], "auc"),
    "sequences": ("films_sequential", [], "ndcg"),
    "ranking": ("films_ranking", ["variants.hardened.lam=8.0"], "ndcg"),
    "language": ("llm_movies", [f"audit.attacks={SHORTER}"], "auc"),
}
#: What the variants "tuned" have beside their method, by kind and objective: steps for which plain
#: training's time has room, as `--time` finds it; and what was chosen on the validation part of
#: other seeds: a rate, a ball, the share of the steps in which it grows (`ramp`), a weight of what
#: is perturbed (`lam`).
TUNED: dict[str, dict[str, dict[str, float]]] = {
    "reviews": {"staggered": {"rate": 1.5, "scale": 1.2}},
    "deep": {
        "staggered": {"rate": 1.5, "scale": 1.2},
        "partial": {"duration": 0.75, "rate": 1.3, "scale": 1.5, "ramp": 0.1},
    },
    "clicks": {"staggered": {"duration": 0.78, "rate": 1.5}},
    "income": {"staggered": {"duration": 0.72, "rate": 2.0}},
    "ranking": {
        "staggered": {"duration": 0.61, "rate": 1.5},
        "half of every fourth batch": {"duration": 0.82, "rate": 2.0, "scale": 4.0, "lam": 2.0},
    },
    "language": {
        "partial": {"duration": 0.86, "scale": 2.0, "ramp": 0.1},
        "every fourth batch": {"duration": 0.95, "scale": 4.0, "ramp": 0.1},
    },
}
GOAL = "mixed PGD-3"
#: Objectives without a weight of the adversarial part.
UNWEIGHTED = ("adversarial", "free")


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        passes: of a step, to those of a plain one: forward, backward to embeddings and backward to
            weights count a third each.
        variant: what the recipe says of it.
        visits: the batch is cut to a multiple of these.
        tuned: what it has of `TUNED`.
        of: for which objective that was chosen.
    """

    passes: float
    variant: str
    visits: int = 1
    tuned: tuple[str, ...] = ()
    of: str = "staggered"


METHODS = {
    GOAL: Method(4, "{attack: {kind: pgd, steps: 3, random_start: true}}"),
    "mixed FGM": Method(2, "{attack: {kind: fgm}}"),
    "FGM alone": Method(5 / 3, "{objective: adversarial, attack: {kind: fgm}}"),
    "FreeLB-3": Method(3, "{objective: free, attack: {kind: pgd, steps: 3, random_start: true}}"),
    "TRADES PGD-3": Method(4, "{objective: trades, attack: {kind: pgd, steps: 3}}"),
    "SMART": Method(8 / 3, "{objective: smart, attack: {kind: pgd, steps: 1, random_start: true}}"),
    # The paper's: 1e-3 of the raw gradient, which is next to nothing beside the threat's ball.
    "SMART, its own step": Method(8 / 3, "{objective: smart, attack: {kind: smart, steps: 1}}"),
    "Free-2": Method(1, "{objective: freeat, replays: 2, attack: {kind: fgm}}"),
    "half by FGM": Method(4 / 3, "{objective: partial, share: 0.5, attack: {kind: fgm}}"),
    "quarter by FGM": Method(7 / 6, "{objective: partial, share: 0.25, attack: {kind: fgm}}"),
    "eighth by FGM": Method(13 / 12, "{objective: partial, share: 0.125, attack: {kind: fgm}}"),
    "quarter of every fourth batch": Method(
        25 / 24, "{objective: partial, share: 0.25, every: 4, attack: {kind: fgm}}"
    ),
    "half of every fourth batch": Method(
        13 / 12, "{objective: partial, share: 0.5, every: 4, attack: {kind: fgm}}"
    ),
    "quarter by loss": Method(
        7 / 6, "{objective: partial, share: 0.25, choose: loss, attack: {kind: fgm}}"
    ),
    "staggered, 2 visits": Method(
        1, "{objective: staggered, visits: 2, attack: {kind: fgm}}", visits=2
    ),
    "staggered, 3 visits": Method(
        1, "{objective: staggered, visits: 3, attack: {kind: pgd, steps: 2}}", visits=3
    ),
    "staggered, 4 visits": Method(
        1, "{objective: staggered, visits: 4, attack: {kind: pgd, steps: 3}}", visits=4
    ),
}
METHODS["staggered, 2 visits, tuned"] = replace(
    METHODS["staggered, 2 visits"], tuned=("duration", "rate", "scale")
)
METHODS["staggered, 3 visits, tuned"] = replace(
    METHODS["staggered, 3 visits"], tuned=("duration", "rate")
)
METHODS["half by FGM, tuned"] = replace(
    METHODS["half by FGM"], tuned=("duration", "rate", "scale"), of="partial"
)
METHODS["eighth by FGM, tuned"] = replace(
    METHODS["eighth by FGM"], tuned=("duration", "scale"), of="partial"
)
METHODS["quarter of every fourth batch, tuned"] = replace(
    METHODS["quarter of every fourth batch"], tuned=("duration", "scale"), of="every fourth batch"
)
METHODS["half of every fourth batch, tuned"] = replace(
    METHODS["half of every fourth batch"],
    tuned=("duration", "rate", "scale"),
    of="half of every fourth batch",
)
METHODS[f"{GOAL}, at that rate"] = replace(METHODS[GOAL], tuned=("rate",))


def recipe_of(kind: str, method: str, seed: int) -> tuple[Recipe, str]:
    """The recipe of a kind with a method as one of its variants, and the variant's name."""
    name, changes, _ = KINDS[kind]
    path = RECIPES / f"{name}.yaml"
    changes = [
        f"audit.attacks={ATTACKS}",
        *changes,
        f"seed={seed}",
        "audit.sweep=[1.0]",
        "audit.sweep_attack={kind: pgd, steps: 1}",
        "audit.explain=null",
    ]
    if method == STANDARD:
        return recipes.load(path, changes=changes), STANDARD
    chosen = METHODS[method]
    plain = recipes.load(path, changes=changes)
    size = plain.train.batch_size // chosen.visits * chosen.visits
    hardened = plain.variants["hardened"].model_dump(exclude_unset=True)
    tuned = TUNED[kind][chosen.of] if chosen.tuned else {}
    share = tuned.get("ramp", hardened.get("eps_schedule", {}).get("share", 0.3))
    variant = chosen.variant[:-1] + f", eps_schedule: {{share: {share}}}}}"
    for key in chosen.tuned:
        variant = f"{variant[:-1]}, {key}: {tuned.get(key, 1.0)}}}"
    lam = tuned.get("lam", hardened.get("lam", 1.0))
    if lam != 1 and not any(f"objective: {name}" in variant for name in UNWEIGHTED):
        variant = variant[:-1] + f", lam: {lam}}}"
    changes += [f"train.batch_size={size}", f"variants={{tried: {variant}}}"]
    return recipes.load(path, changes=changes), "tried"
