"""What strong attacks ascend on the way to a criterion's goal.

Many goals can be reached in several ways, of which one is enough: any wrong class, at any place;
any label out of several; too high or too low. `Ways` says how far each of them is.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from embattle import losses
from embattle.criteria import (
    Criterion,
    Demote,
    Deviate,
    Diverge,
    Misclassify,
    MultiLabel,
    Promote,
    Target,
)
from embattle.criteria.base import needed
from embattle.perturb.evaluation import Evaluation

_FAR = math.inf


class Ways(Criterion):
    """How far the ways to a goal are, `[B, K]`: above 0 where the goal is reached that way.

    -inf is a way that is closed. The objective is the nearest way, in units of its distance at the
    clean point, so that logits of any size give gradients of an ordinary one.

    Args:
        goal: the criterion.
        clean: the clean evaluation.

    Attributes:
        count: how many ways there may be.
    """

    per_sample: ClassVar[tuple[str, ...]] = ("scale", "open")

    def __init__(self, goal: Criterion, clean: Evaluation) -> None:
        self.goal = goal
        self.count = self.ways(clean)
        self.open = (self.distances(clean).detach() > -_FAR).any(1)
        self.scale = torch.ones(clean.batch, device=clean.device)
        far = self.signed(clean).detach().abs()
        self.scale = torch.where(far > 0, far, torch.ones_like(far))

    def distances(self, now: Evaluation) -> Tensor:
        """Give the signed distances, `[B, K]`."""
        raise NotImplementedError

    def logits(self, now: Evaluation) -> Tensor:
        """Give the outputs, in float32 at least."""
        outputs = needed(type(self.goal).__name__, now)
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def ways(self, clean: Evaluation) -> int:
        """Count the ways."""
        return self.distances(clean).shape[1]

    def signed(self, now: Evaluation) -> Tensor:
        """Give the nearest way, `[B]`: above 0 where the goal is reached."""
        return self.where_open(self.distances(now).amax(1))

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Give the nearest way, in units of `scale`."""
        return self.where_open((self.distances(now) / self.scale.unsqueeze(1)).amax(1))

    def where_open(self, values: Tensor) -> Tensor:
        """Put 0 where a sample has no way at all: no label of it counts."""
        return torch.where(self.open, values, torch.zeros_like(values))


class _Classes(Ways):
    """To another class, at any place that counts."""

    goal: Misclassify

    def __init__(self, goal: Criterion, clean: Evaluation) -> None:
        self.logs = _are_probabilities(needed("Misclassify", clean))
        super().__init__(goal, clean)

    def logits(self, now: Evaluation) -> Tensor:
        outputs = super().logits(now)
        return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log() if self.logs else outputs

    def distances(self, now: Evaluation) -> Tensor:
        outputs = losses.two_sided(self.logits(now))
        labels, kept = self.goal.labels, self.goal.labels != self.goal.ignore_index
        index = torch.where(kept, labels, torch.zeros_like(labels)).unsqueeze(-1)
        # A class that is ruled out (-inf) is no way; a label that is ruled out is far behind.
        closed = (outputs == -_FAR).scatter(-1, index, True) | ~kept.unsqueeze(-1)
        own = outputs.gather(-1, index).clamp(min=torch.finfo(outputs.dtype).min / 4)
        return (outputs - own).masked_fill(closed, -_FAR).flatten(1)

    def ways(self, clean: Evaluation) -> int:
        # The label's own class is none.
        classes = losses.classes(needed("Misclassify", clean))
        return super().ways(clean) // classes * (classes - 1)


class _Labels(Ways):
    """To the wrong side of the threshold, for any label that counts."""

    goal: MultiLabel

    def distances(self, now: Evaluation) -> Tensor:
        labels, threshold = self.goal.labels, self.goal.threshold
        beyond = self.logits(now) - math.log(threshold / (1 - threshold))
        wrong = torch.where(labels == 1, -beyond, beyond)
        wrong = wrong.masked_fill(labels == self.goal.ignore_index, -_FAR)
        return wrong.reshape(now.batch, -1)


class _Values(Ways):
    """Too high, or too low."""

    goal: Deviate

    def distances(self, now: Evaluation) -> Tensor:
        off = (self.logits(now) - self.goal.targets).reshape(now.batch, -1)
        by = self.goal.by
        if isinstance(by, Tensor):
            by = by.unsqueeze(1)
        return torch.cat([off - by, -off - by], dim=1)


class _Only(Ways):
    """One way alone: the lead of an item, or the margins of a class at all places."""

    def distances(self, now: Evaluation) -> Tensor:
        if not isinstance(self.goal, Target):
            return self.goal.objective(now, None).unsqueeze(1)
        outputs = losses.two_sided(self.logits(now))
        classes = self.goal.classes
        if isinstance(classes, int):
            classes = torch.full(outputs.shape[:-1], classes, device=outputs.device)
        kept = classes != self.goal.ignore_index
        index = torch.where(kept, classes, torch.zeros_like(classes)).unsqueeze(-1)
        lead = outputs.gather(-1, index).squeeze(-1) - outputs.scatter(-1, index, -_FAR).amax(-1)
        lead = lead.masked_fill(~kept, _FAR)
        return lead.reshape(now.batch, -1).amin(1, keepdim=True)


class Soft(Criterion):
    """A smooth maximum of the ways, which does not jump from one to the other."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Give the log-sum-exp of the distances, in units of a fifth of the clean distance."""
        ways = self.ways
        softness = 0.2 * ways.scale
        distances = ways.distances(now)
        distances = torch.where(ways.open.unsqueeze(1), distances, torch.zeros_like(distances))
        return (distances / softness.unsqueeze(1)).logsumexp(1) * softness


class Way(Criterion):
    """Ascend one of the ways of each sample."""

    per_sample: ClassVar[tuple[str, ...]] = ("index",)

    def __init__(self, ways: Ways, index: Tensor) -> None:
        self.ways, self.index = ways, index

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Give the distance of this way."""
        found = self.ways.distances(now).gather(1, self.index.unsqueeze(1)).squeeze(1)
        return self.ways.where_open(found / self.ways.scale)


class Entropy(Criterion):
    """The cross-entropy of logits, cooled where it is saturated at the clean point.

    Where the softmax of the clean logits rounds to one, the cross-entropy has no gradient, or a
    wrong one; there the logits are divided so that the nearest way is 10 away.
    """

    per_sample: ClassVar[tuple[str, ...]] = ("heat",)

    def __init__(self, ways: Ways, clean: Evaluation) -> None:
        self.goal, self.ways = ways.goal, ways
        gap = -ways.signed(clean).detach()
        rounds = -math.log(torch.finfo(gap.dtype).eps)
        self.heat = torch.where(gap > rounds, gap / 10, torch.ones_like(gap))

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Give the cross-entropy."""
        goal, outputs = self.goal, self.ways.logits(now)
        outputs = outputs / self.heat.reshape(-1, *[1] * (outputs.dim() - 1))
        if isinstance(goal, MultiLabel):
            kept, positive = goal.labels != goal.ignore_index, goal.labels == 1
            entropies = -F.logsigmoid(torch.where(positive, outputs, -outputs))
            return losses.per_counted(entropies, kept)
        assert isinstance(goal, Misclassify)
        return losses.cross_entropy(outputs, goal.labels, ignore_index=goal.ignore_index)


class Switch(Criterion):
    """Ascend another objective for some of the samples."""

    per_sample: ClassVar[tuple[str, ...]] = ("switched",)

    def __init__(self, first: Criterion, other: Criterion, switched: Tensor) -> None:
        self.first, self.other, self.switched = first, other, switched

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Give the first objective, or the other."""
        first, other = self.first.objective(now, clean), self.other.objective(now, clean)
        return torch.where(self.switched, other, first)


def ways_to(goal: Criterion, clean: Evaluation) -> Ways | None:
    """Give the ways to a goal, where it is known how far they are.

    A user's own criterion has none: its objective need not be 0 where the goal is reached.
    """
    kind = type(goal)
    if kind is Diverge and goal.reached(clean, clean) is not None:
        predicted = losses.predict(needed("Diverge", clean))
        return _Classes(Misclassify(predicted), clean)
    made: dict[type[Criterion], type[Ways]] = {
        Misclassify: _Classes,
        MultiLabel: _Labels,
        Deviate: _Values,
        Promote: _Only,
        Demote: _Only,
        Target: _Only,
    }
    return made[kind](goal, clean) if kind in made else None


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs are not the logits that they should be: their softmax would be nearly flat.

    As logits their gradients vanish where the model is confident; their logarithms' do not.
    """
    if outputs.dim() < 2 or outputs.shape[-1] < 2 or not outputs.numel():
        return False
    sums = outputs.sum(-1)
    return bool((outputs >= 0).all() & torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all())
