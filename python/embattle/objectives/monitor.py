"""Warn of the known ways in which adversarial training fails."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from embattle import checks
from embattle.attacks import FGSM, PGD, Attack
from embattle.criteria import Criterion
from embattle.perturb.attacked_batch import Masks
from embattle.perturb.evaluation import LossFn
from embattle.perturb.site import Site


class RobustTrainingWarning(UserWarning):
    """A sign that the training is failing, or that its robustness is not what it seems."""


@dataclass(kw_only=True)
class Monitor:
    """Check the metrics of an objective, the tables, and batches that are attacked afresh.

    Call `update` with each step's metrics; it costs nothing. Call the other checks every few
    hundred steps, as `due` says: `check_held` and `check_training` each make one attack of the
    training's and one by PGD, about `steps + 4` forward and `steps + 1` backward passes of the
    batch that you give. A small one is enough: a quarter of a training batch every 200 steps costs
    about 2 % with 10 steps. Model and random numbers are left as they were. Each
    finding is a `RobustTrainingWarning`, given once until it goes away, and is returned.

    Args:
        sites: the sites of the training; their tables are watched.
        collapse: warn when a table's mean row norm falls below this share of its first value
            (APR at a large eps drives embeddings to zero).
        inflation: warn when it grows above this multiple: at a fixed eps that alone buys
            robustness; report eps relative to the norms.
        drop: catastrophic overfitting (Wong et al., ICLR 2020): warn when the held batch's accuracy
            under PGD has fallen by this much from its best while that under the training's attack
            has not fallen.
        gap: warn when PGD costs the batch this much accuracy, where the training's attack costs
            less than a third of that (catastrophic overfitting, too); and when the training's
            perturbations cost less than an attack that is made afresh by this much.
        leak: label leakage (Kurakin et al., ICLR 2017): warn when the perturbed losses of the last
            `window` steps are below the clean ones by this share.
        vanishing: warn when the attack gains, over the last `window` steps, less than this share of
            the clean loss although eps is not zero.
        window: steps that are averaged.
        every: steps between checks that `due` asks for.

    Raises:
        TypeError, ValueError: a bound that is no number, or negative; steps below 1.
    """

    sites: Site | Sequence[Site]
    collapse: float = 0.2
    inflation: float = 2.0
    drop: float = 0.2
    gap: float = 0.3
    leak: float = 0.02
    vanishing: float = 1e-3
    window: int = 50
    every: int = 200
    _first: list[float] = field(default_factory=list, init=False, repr=False)
    _gains: deque[Tensor] = field(default_factory=deque, init=False, repr=False)
    _best_pgd: float = field(default=-math.inf, init=False, repr=False)
    _one_then: float = field(default=0.0, init=False, repr=False)
    _warned: set[str] = field(default_factory=set, init=False, repr=False)
    _stood: deque[Tensor] = field(default_factory=deque, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("collapse", "inflation", "drop", "gap", "leak", "vanishing"):
            setattr(self, name, checks.real("Monitor", name, getattr(self, name), 0))
        for name in ("window", "every"):
            setattr(self, name, checks.integer("Monitor", name, getattr(self, name), 1))

    @property
    def due(self) -> bool:
        """Whether it is time for `check_tables`, `check_held` and `check_training`."""
        return self._steps % self.every == 0

    def update(self, metrics: dict[str, Tensor]) -> list[str]:
        """Collect a step's metrics; every `window` steps compare perturbed losses with clean ones.

        Where a form perturbs a part of a batch they are of other samples, and a small gain says
        nothing; staggered replays have trained on the perturbed samples a step before, too, so that
        `check_training` alone tells of label leakage there.

        Returns:
            The findings, as text.
        """
        self._steps += 1
        if "robust_accuracy" in metrics and float(metrics["eps_scale"]) > 0:
            self._stood.append(metrics["robust_accuracy"])
            if len(self._stood) > self.window:
                self._stood.popleft()
        if "clean_loss" not in metrics or "adversarial_loss" not in metrics:
            return []
        if float(metrics["eps_scale"]) == 0:
            return []
        clean = metrics["clean_loss"]
        self._gains.append((metrics["adversarial_loss"] - clean) / clean.abs().clamp(min=1e-12))
        if len(self._gains) < self.window:
            return []
        gains = torch.stack(list(self._gains)).double()
        gain = float(gains.mean())
        # Four standard errors: where clean and perturbed samples are others, chance is large.
        sure = gain < -4 * float(gains.std(correction=0)) / math.sqrt(len(gains))
        leaks = gain < -self.leak and sure and "replayed" not in metrics
        same = "replayed" not in metrics and "perturbed" not in metrics
        self._gains.clear()
        return self._warn_once(
            "leak",
            leaks,
            f"label leakage: the perturbed losses are {-gain:.1%} below the clean ones, over "
            f"{self.window} steps: the perturbations give the labels away instead of hiding them, "
            "or the model has learned to see that there is one. Find them afresh (carry none from "
            "epoch to epoch), start at random, make more or smaller steps; and measure with an "
            "attack of several steps",
        ) + self._warn_once(
            "vanishing",
            gain < self.vanishing and same and not leaks,
            f"the attack gains {gain:.2g} of the clean loss: its gradients vanish (a saturated or "
            "obfuscated model), or eps is too small to matter",
        )

    @torch.no_grad()
    def check_tables(self) -> list[str]:
        """Compare the tables' mean row norms with those at the first call."""
        sites = [self.sites] if isinstance(self.sites, Site) else list(self.sites)
        # A site may look several tables up, and several sites one.
        tables = {
            table: f"{site!r}, its table {tuple(table.shape)}"
            if len(site.modules) > 1
            else f"{site!r}"
            for site in sites
            for table in _tables(site)
        }
        if not tables:
            return []
        names = list(tables.values())
        norms = torch.stack([table.norm(dim=1).mean().float() for table in tables]).tolist()
        if not self._first:
            self._first = norms
            return []
        found: list[str] = []
        for number, (now, before) in enumerate(zip(norms, self._first, strict=True)):
            ratio = now / max(before, 1e-30)
            found += self._warn_once(
                f"collapse {number}",
                ratio < self.collapse,
                f"{names[number]}: the mean row norm fell from {before:.3g} to {now:.3g}: the "
                "embeddings collapse; use a smaller or relative eps, or a warm-up",
            )
            found += self._warn_once(
                f"inflation {number}",
                ratio > self.inflation,
                f"{names[number]}: the mean row norm grew from {before:.3g} to {now:.3g}: at a "
                "fixed eps that alone looks like robustness; use Relative(...)",
            )
        return found

    def check_held(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion,
        eps: float | None = None,
        attack: Attack | None = None,
        steps: int = 10,
        mask: Masks = None,
    ) -> list[str]:
        """Attack a held-out batch as the training does and by PGD in the same ball.

        Args:
            loss_fn: of the held batch.
            criterion: with labels, such as `Misclassify(labels)`.
            eps: radius of an linf ball, where the training's attack is FGSM.
            attack: the training's attack, in place of `eps`.
            steps: of PGD.
            mask: as for `Attack.run`.

        Raises:
            ValueError: neither `eps` nor `attack`, or both; or there is no accuracy.
        """
        clean, one, pgd = self._attacked(loss_fn, criterion, eps, attack, steps, mask)
        if pgd >= self._best_pgd:
            self._best_pgd, self._one_then = pgd, one
        fell = self._best_pgd - pgd > self.drop and one >= self._one_then
        blind = clean - pgd > self.gap and clean - one < (clean - pgd) / 3
        how = (
            f"from {self._best_pgd:.2f} to {pgd:.2f} while that under the training's attack went "
            f"from {self._one_then:.2f} to {one:.2f}"
            if fell
            else f"to {pgd:.2f} of {clean:.2f} while the training's attack leaves {one:.2f}"
        )
        return self._warn_once(
            "overfitting",
            fell or blind,
            f"catastrophic overfitting: on the held batch PGD accuracy fell {how}; use more steps "
            "or a random start, or a smaller eps",
        )

    def check_training(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion,
        eps: float | None = None,
        attack: Attack | None = None,
        steps: int = 10,
        mask: Masks = None,
    ) -> list[str]:
        """Attack a batch of training samples afresh, and compare with the training's own figures.

        These are the robust accuracies that `update` has collected. They are too good where the
        training's perturbations are old, or give the labels away: forms that keep deltas are to be
        watched for it.

        Args:
            loss_fn: of training samples.
            criterion, eps, attack, steps, mask: as for `check_held`.
        """
        clean, one, pgd = self._attacked(loss_fn, criterion, eps, attack, steps, mask)
        if not self._stood:
            return []
        told = float(torch.stack(list(self._stood)).float().nanmean())
        return self._warn_once(
            "stale",
            told - one > self.gap and told - pgd > self.gap,
            f"label leakage: the training's perturbations leave {told:.2f} of the samples right, "
            f"and the same attack made afresh {one:.2f} (PGD {pgd:.2f}, without {clean:.2f}): the "
            "training's perturbations are old, or give the labels away; find them afresh, or keep "
            "them for fewer visits",
        )

    def _attacked(
        self,
        loss_fn: LossFn,
        criterion: Criterion,
        eps: float | None,
        attack: Attack | None,
        steps: int,
        mask: Masks,
    ) -> tuple[float, float, float]:
        """Return the accuracies without attack, under the training's, and under PGD."""
        if (eps is None) == (attack is None):
            raise ValueError("Monitor: give either eps, of FGSM's linf ball, or the attack")
        if attack is None:
            assert eps is not None
            attack = FGSM(eps=eps)
        own = torch.Generator(device="cpu").manual_seed(0)  # the training's goes on as it would
        attack = replace(attack, stop_when_fooled=False, generator=own)
        pgd = PGD(eps=attack.eps, norm=attack.norm, steps=steps, keep="best", mode=attack.mode)
        found = []
        for one in (attack, pgd):
            result = one.run(loss_fn, self.sites, criterion=criterion, mask=mask)
            if result.robust_accuracy is None or result.clean_accuracy is None:
                raise ValueError(f"Monitor: needs an accuracy, which {criterion!r} lacks")
            found.append(float(result.robust_accuracy))
        return float(result.clean_accuracy), *found  # type: ignore[arg-type, return-value]

    def _warn_once(self, key: str, failing: bool, text: str) -> list[str]:
        if not failing:
            self._warned.discard(key)
            return []
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, RobustTrainingWarning, stacklevel=3)
        return [text]


def _tables(site: Site) -> list[Tensor]:
    """Return the tables that a site perturbs, or whose look-ups it does."""
    own = site.table
    weights = [getattr(m, "weight", None) for m in site.modules] if own is None else [own]
    return [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
