"""Warn of the known ways in which adversarial training fails."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from embattle.attacks import FGSM, PGD
from embattle.criteria import Criterion
from embattle.perturb.attacked_batch import Masks
from embattle.perturb.evaluation import LossFn
from embattle.perturb.site import Site


class RobustTrainingWarning(UserWarning):
    """A sign that the training is failing, or that its robustness is not what it seems."""


@dataclass(kw_only=True)
class Monitor:
    """Check the metrics of an objective, the tables, and a held-out batch.

    Call `check_tables` and `check_held` every few hundred steps, `update` with each step's metrics.
    Each finding is a `RobustTrainingWarning`, given once until it goes away, and is returned.

    Args:
        sites: the sites of the training; their tables are watched.
        collapse: warn when a table's mean row norm falls below this share of its first value
            (APR at a large eps drives embeddings to zero).
        inflation: warn when it grows above this multiple: at a fixed eps that alone buys
            robustness; report eps relative to the norms.
        drop: catastrophic overfitting (Wong et al., ICLR 2020): warn when the held batch's accuracy
            under PGD has fallen by this much from its best while that under FGSM has not fallen.
        vanishing: warn when the attack gains, over the last `window` steps, less than this share of
            the clean loss although eps is not zero.
        window: steps that are averaged.
    """

    sites: Site | Sequence[Site]
    collapse: float = 0.2
    inflation: float = 2.0
    drop: float = 0.2
    vanishing: float = 1e-3
    window: int = 50
    _first: list[float] = field(default_factory=list, init=False, repr=False)
    _gains: deque[Tensor] = field(default_factory=deque, init=False, repr=False)
    _best_pgd: float = field(default=-math.inf, init=False, repr=False)
    _fgsm_then: float = field(default=0.0, init=False, repr=False)
    _warned: set[str] = field(default_factory=set, init=False, repr=False)

    def update(self, metrics: dict[str, Tensor]) -> list[str]:
        """Collect a step's metrics; every `window` steps check the attack's gain.

        Returns:
            The findings, as text.
        """
        if "clean_loss" not in metrics or "adversarial_loss" not in metrics:
            return []
        if float(metrics["eps_scale"]) == 0:
            return []
        clean = metrics["clean_loss"]
        self._gains.append((metrics["adversarial_loss"] - clean) / clean.abs().clamp(min=1e-12))
        if len(self._gains) < self.window:
            return []
        gain = float(torch.stack(list(self._gains)).mean())
        self._gains.clear()
        return self._warn_once(
            "vanishing",
            gain < self.vanishing,
            f"the attack gains {gain:.2g} of the clean loss: its gradients vanish (a saturated or "
            "obfuscated model), or eps is too small to matter",
        )

    @torch.no_grad()
    def check_tables(self) -> list[str]:
        """Compare the tables' mean row norms with those at the first call."""
        sites = [self.sites] if isinstance(self.sites, Site) else list(self.sites)
        weights = [getattr(site.module, "weight", None) for site in sites]
        tables = [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
        if not tables:
            return []
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
                f"{sites[number]!r}: the mean row norm fell from {before:.3g} to {now:.3g}: the "
                "embeddings collapse; use a smaller or relative eps, or a warm-up",
            )
            found += self._warn_once(
                f"inflation {number}",
                ratio > self.inflation,
                f"{sites[number]!r}: the mean row norm grew from {before:.3g} to {now:.3g}: at a "
                "fixed eps that alone looks like robustness; use Relative(...)",
            )
        return found

    def check_held(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion,
        eps: float,
        steps: int = 10,
        mask: Masks = None,
    ) -> list[str]:
        """Attack a held-out batch with FGSM and PGD in the same linf ball, and compare with before.

        Args:
            loss_fn: of the held batch.
            criterion: with labels, such as `Misclassify(labels)`.
            eps: radius of the linf ball.
            steps: of PGD.
            mask: as for `Attack.run`.
        """
        accuracies = []
        for attack in (FGSM(eps=eps), PGD(eps=eps, norm="linf", steps=steps, keep="best")):
            result = attack.run(loss_fn, self.sites, criterion=criterion, mask=mask)
            if result.robust_accuracy is None:
                raise ValueError(
                    f"Monitor: check_held needs an accuracy, which {criterion!r} lacks"
                )
            accuracies.append(float(result.robust_accuracy))
        fgsm, pgd = accuracies
        if pgd >= self._best_pgd:
            self._best_pgd, self._fgsm_then = pgd, fgsm
        return self._warn_once(
            "overfitting",
            self._best_pgd - pgd > self.drop and fgsm >= self._fgsm_then,
            f"catastrophic overfitting: on the held batch PGD accuracy fell from "
            f"{self._best_pgd:.2f} to {pgd:.2f} while FGSM accuracy went from "
            f"{self._fgsm_then:.2f} to {fgsm:.2f}; use more steps or a random start",
        )

    def _warn_once(self, key: str, failing: bool, text: str) -> list[str]:
        if not failing:
            self._warned.discard(key)
            return []
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, RobustTrainingWarning, stacklevel=3)
        return [text]
