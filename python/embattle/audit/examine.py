"""How every audit examines a model: under each attack of a table, and over eps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from embattle.attacks import FMN, Attack, AutoAttack
from embattle.attacks.minimum import NoSmallestError
from embattle.audit.evaluation import Sites, Tick, evaluate, sweep
from embattle.audit.measure import measure
from embattle.audit.outcomes import Attacked, success_rate, worst_of
from embattle.audit.smallest import smallest, standing
from embattle.audit.victim import Victim
from embattle.data.batch import Batch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import as_sites
from embattle.perturb.strength import Strength, scaled
from embattle.tasks.evaluator import Evaluator
from embattle.tasks.kinds import Kind

Norm: TypeAlias = Literal["l2", "linf", "l1"]
Unit: TypeAlias = Literal["token_norm", "mean_norm", "absolute"]

#: Points of a curve that costs nothing.
POINTS = 24


@dataclass(frozen=True)
class Curve:
    """How it is found what stands at every eps.

    Attributes:
        search: the label of a search for each sample's smallest perturbation, and the search, which
            tells the whole curve. None: `balls` are run.
        eps: where that curve is told, in the threat's unit.
        balls: a label, and the attack at each multiple of the threat's eps; None in place of an
            attack where those of the table tell enough. They are run where nothing is searched, or
            samples have no smallest perturbation of their own; if None, there is then no curve.
    """

    search: tuple[str, FMN] | None = None
    eps: Sequence[float] = ()
    balls: tuple[str, Mapping[float, Attack | None]] | None = None


class Examination:
    """One model, and what is found of it. It is run without attack at once.

    Args:
        model: the model.
        batches: the samples, with labels.
        sites: where the model is attacked.
        evaluator: runs the model, and says what is right.
        norm, eps: the threat's ball.
        unit: what eps counts in, see `embattle.audit.audit_model`.
        go_on: attack what has fallen, too, where no measure of the kind asks for it.

    Raises:
        ValueError: outputs and labels do not fit, or samples have no label.

    Attributes:
        unit: what an eps of 1 is, for attacks to be made of.
        victim: the model, and what attacks achieved.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        sites: Sites,
        *,
        evaluator: Evaluator,
        norm: Norm,
        eps: float,
        unit: Unit,
        go_on: bool = False,
    ) -> None:
        # Where measures depend on how wrong samples are, those that are wrong are attacked too.
        self._all = evaluator.kind.graded or go_on
        self.batches, self.evaluator, self.eps = batches, evaluator, eps
        to = None if unit == "absolute" else unit
        size = measure(model, batches, sites, to=to, norm=norm, evaluator=evaluator)
        self.labels, self.vector_norm = labels_of(batches), size.vector_norm
        self.unit: Strength = 1.0 if to is None else size.unit
        _check_labels(evaluator.kind, size.outputs, self.labels)
        right = evaluator.kind.right(size.outputs, self.labels)
        ball = scaled(self.unit, eps)
        self.victim = Victim(model, list(as_sites(sites)), size.outputs, right, norm, ball)
        # What turned samples in which multiple of the threat's ball.
        self._found: list[tuple[float, Attacked]] = []

    def run(
        self,
        table: Mapping[str, tuple[Attack, float]],
        curve: Curve,
        tick: Tick = lambda: None,
    ) -> dict[str, Any]:
        """Attack, and give the model's facts.

        Attacks with figures of their own come first, each on all samples. Then the search of the
        curve, and the ensembles, which leave alone what has fallen if nothing depends on how wrong
        samples are: their figures are those of all attacks.

        Args:
            table: by label, each attack, and in which multiple of the threat's eps it moves.
            curve: how the curve is found.
            tick: called after each batch of each attack.
        """
        victim = self.victim
        ensembles = [label for label, (made, _) in table.items() if isinstance(made, AutoAttack)]
        order = sorted(table, key=ensembles.__contains__)
        victim.attacks = {label: table[label][0] for label in order if table[label][1] == 1.0}
        for label in order[: len(order) - len(ensembles)]:
            self._attack(label, *table[label], tick)
        scales = sorted({1.0, *(scale for _, scale in table.values())})
        radii = None if curve.search is None else self._search(curve.search[1], scales, tick)
        for label in ensembles:
            self._attack(label, *table[label], tick)
        if curve.search is not None and radii is not None:
            points = self._joined(curve.search[0], radii, curve.eps)
        elif curve.balls is not None:
            points = self._swept(*curve.balls, tick if curve.search is None else lambda: None)
        else:
            points = None
        victim.worst = self._worst(1.0)
        return {
            "clean": self.evaluator.kind.scores(victim.clean, self.labels),
            "attacks": {label: self._row(under) for label, under in victim.attacked.items()},
            "worst": self._row(victim.worst),
            **({} if points is None else {"sweep": points}),
            "vector_norm": self.vector_norm,
        }

    def _attack(self, label: str, attack: Attack, scale: float, tick: Tick) -> None:
        """Run an attack of the table: an ensemble on what stands, another one for its own row."""
        victim, kind = self.victim, self.evaluator.kind
        whole = isinstance(attack, AutoAttack)
        known = self._worst(scale) if whole else victim.unattacked
        under = evaluate(
            victim.model,
            self.batches,
            victim.sites,
            {label: attack},
            evaluator=self.evaluator,
            known=None if self._all else known,
            leave=not self._all,
            tick=tick,
        )[label]
        if whole:
            under = replace(
                worst_of(kind, self.labels, [known, under]),
                # What had fallen before was not turned here.
                steps=torch.where(known.right, under.steps, 0),
                seconds=under.seconds,
                by=tuple(
                    by if stood else "" for by, stood in zip(under.by, known.right, strict=True)
                ),
            )
        victim.attacked[label] = under
        self._found.append((scale, under))

    def _search(self, attack: FMN, scales: Sequence[float], tick: Tick) -> Tensor | None:
        """The smallest radius at which each sample falls; None where they have none of their own.

        What is found in the balls of the table's attacks counts there.
        """
        victim = self.victim
        try:
            found = smallest(
                victim.model,
                self.batches,
                victim.sites,
                attack,
                known=victim.unattacked,
                radius=self.eps,
                evaluator=self.evaluator,
                tick=tick,
            )
        except NoSmallestError:
            return None
        self._found += [(scale, found.within(scale * self.eps)) for scale in scales]
        self._found.append((1.0, found.edge))
        return found.radii

    def _joined(self, label: str, radii: Tensor, eps: Sequence[float]) -> dict[str, Any]:
        """The curve: from the smallest perturbations, and from what fixed balls turned."""
        for scale, under in self._found:
            radii = torch.where(under.right, radii, radii.clamp(max=scale * self.eps))
        self.victim.radii = radii / self.eps if self.eps else radii
        return {
            "attack": label,
            "kind": "minimum_norm",
            "eps": list(eps),
            self.evaluator.kind.measures[0][0]: standing(radii, eps),
        }

    def _swept(
        self, label: str, balls: Mapping[float, Attack | None], tick: Tick
    ) -> dict[str, Any]:
        """The curve: an attack at each eps on the samples that stand."""
        victim, scales = self.victim, sorted(balls)
        known = [[~under.right for at, under in self._found if at <= scale] for scale in scales]
        shares = sweep(
            victim.model,
            self.batches,
            victim.sites,
            [balls[scale] for scale in scales],
            fallen=[torch.stack(found).any(0) if found else None for found in known],
            evaluator=self.evaluator,
            tick=tick,
        )
        return {
            "attack": label,
            "kind": "sweep",
            "eps": [0.0, *(scale * self.eps for scale in scales)],
            self.evaluator.kind.measures[0][0]: [float(victim.right.double().mean()), *shares],
        }

    def _worst(self, scale: float) -> Attacked:
        """Each sample's worst so far in a ball: over all attacks in it, and in smaller ones."""
        found = [under for at, under in self._found if at <= scale]
        return worst_of(self.evaluator.kind, self.labels, [self.victim.unattacked, *found])

    def _row(self, under: Attacked) -> dict[str, Any]:
        """What is said of an outcome."""
        return {
            **self.evaluator.kind.scores(under.outputs, self.labels),
            "success_rate": success_rate(self.victim.right, under.right),
            "perturbation_norm": under.norm,
            "seconds": round(under.seconds, 2),
        }


def note_of(kind: Kind, *, go_on: bool = False) -> str:
    """What is said of a kind's measures under attack."""
    if kind.graded or go_on:
        return kind.note
    return (
        f"{kind.note} Samples leave an attack as they fall: what depends on how wrong they are "
        "(AUC, loss, calibration) is that of each one's first success, and flatters the model."
    )


def _check_labels(kind: Kind, outputs: Tensor, labels: Tensor) -> None:
    """Check that the kind's goal can be judged on all samples.

    Raises:
        ValueError: outputs and labels do not fit, or samples have no label that counts.
    """
    goal, at = kind.criterion(labels), Evaluation(kind.losses(outputs, labels), outputs)
    goal.check(at)
    counted = goal.counted(at)
    if counted is not None and not bool(counted.all()):
        raise ValueError(
            f"audit: {int((~counted).sum())} of {len(labels)} samples have no label that counts "
            f"({labels[~counted][0].tolist()}), and are neither right nor wrong; leave them out, "
            "as with batch.take(torch.nonzero(batch.labels != -100).flatten())"
        )


def labels_of(batches: Sequence[Batch]) -> Tensor:
    """The labels of batches, [N, ...], on the CPU."""
    return torch.cat([batch.known_labels().cpu() for batch in batches])
