"""Margins of criteria, which strong attacks ascend: above 0 where the goal is reached.

Many goals have several alternatives, of which one is enough: any wrong class, at any place; any
label out of several; too high or too low. `Margins` has one for each alternative.
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
    Outrank,
    Promote,
    Target,
)
from embattle.criteria.base import required_outputs
from embattle.perturb.evaluation import Evaluation

_FAR = math.inf


class Margins(Criterion):
    """The margin of each alternative, `[B, K]`: above 0 where it reaches the goal.

    -inf is an alternative that does not count. The objective is the largest margin, divided by its
    magnitude at the clean point, so that gradients do not depend on the size of the logits.

    Args:
        goal: the criterion.
        clean: the clean evaluation.

    Attributes:
        count: how many alternatives there may be.
    """

    per_sample: ClassVar[tuple[str, ...]] = ("scale", "possible")

    def __init__(self, goal: Criterion, clean: Evaluation) -> None:
        self.goal = goal
        self.count = self.alternatives(clean)
        self.possible = (self.per_alternative(clean).detach() > -_FAR).any(1)
        self.scale = torch.ones(clean.batch, device=clean.device)
        far = self.largest(clean).detach().abs()
        self.scale = torch.where(far > 0, far, torch.ones_like(far))

    def per_alternative(self, now: Evaluation) -> Tensor:
        """Compute the margins, `[B, K]`, with a graph."""
        raise NotImplementedError

    def logits(self, now: Evaluation) -> Tensor:
        """Return the outputs, in float32 at least."""
        outputs = required_outputs(type(self.goal).__name__, now)
        return losses.wide(outputs)

    def alternatives(self, clean: Evaluation) -> int:
        """Count the alternatives."""
        return self.per_alternative(clean).shape[1]

    def largest(self, now: Evaluation) -> Tensor:
        """Return the largest margin, `[B]`: above 0 where the goal is reached."""
        return self.where_possible(self.per_alternative(now).amax(1))

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the largest margin, divided by `scale`."""
        return self.where_possible((self.per_alternative(now) / self.scale.unsqueeze(1)).amax(1))

    def where_possible(self, values: Tensor) -> Tensor:
        """Put 0 where a sample has no alternative: no label of it counts."""
        return torch.where(self.possible, values, torch.zeros_like(values))


class _ClassMargins(Margins):
    """To another class, at any place that counts: its logit minus the label's."""

    goal: Misclassify

    def __init__(self, goal: Criterion, clean: Evaluation) -> None:
        self.logs = _are_probabilities(required_outputs("Misclassify", clean))
        super().__init__(goal, clean)

    def logits(self, now: Evaluation) -> Tensor:
        outputs = super().logits(now)
        return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log() if self.logs else outputs

    def per_alternative(self, now: Evaluation) -> Tensor:
        outputs = losses.two_sided(self.logits(now))
        labels, kept = self.goal.labels, self.goal.labels != self.goal.ignore_index
        index = torch.where(kept, labels, torch.zeros_like(labels)).unsqueeze(-1)
        # A class that is ruled out (-inf) is none; a label that is ruled out is far behind.
        closed = (outputs == -_FAR).scatter(-1, index, True) | ~kept.unsqueeze(-1)
        own = outputs.gather(-1, index).clamp(min=torch.finfo(outputs.dtype).min / 4)
        return (outputs - own).masked_fill(closed, -_FAR).flatten(1)

    def alternatives(self, clean: Evaluation) -> int:
        # The label's own class is none.
        classes = losses.classes(required_outputs("Misclassify", clean))
        return super().alternatives(clean) // classes * (classes - 1)


class _LabelMargins(Margins):
    """To the wrong side of the threshold, for any label that counts."""

    goal: MultiLabel

    def per_alternative(self, now: Evaluation) -> Tensor:
        labels, threshold = self.goal.labels, self.goal.threshold
        beyond = self.logits(now) - math.log(threshold / (1 - threshold))
        wrong = torch.where(labels == 1, -beyond, beyond)
        wrong = wrong.masked_fill(labels == self.goal.ignore_index, -_FAR)
        return wrong.unsqueeze(-1).flatten(1)


class _ValueMargins(Margins):
    """Too high, or too low."""

    goal: Deviate

    def per_alternative(self, now: Evaluation) -> Tensor:
        off = (self.logits(now) - self.goal.targets).unsqueeze(-1).flatten(1)
        by = self.goal.by
        if isinstance(by, Tensor):
            by = by.unsqueeze(1)
        return torch.cat([off - by, -off - by], dim=1)


class _GoalMargin(Margins):
    """One margin alone: the lead of an item, or the smallest lead of a class over all places."""

    def per_alternative(self, now: Evaluation) -> Tensor:
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
        return lead.unsqueeze(-1).flatten(1).amin(1, keepdim=True)


class SmoothMargin(Criterion):
    """A smooth maximum of the margins, which does not jump from one alternative to the other."""

    def __init__(self, margins: Margins) -> None:
        self.margins = margins

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the log-sum-exp of the margins, at a fifth of the clean margin."""
        margins = self.margins
        softness = 0.2 * margins.scale
        values = margins.per_alternative(now)
        values = torch.where(margins.possible.unsqueeze(1), values, torch.zeros_like(values))
        return (values / softness.unsqueeze(1)).logsumexp(1) * softness


class SingleMargin(Criterion):
    """Ascend one of the margins of each sample, the `index`-th, int64 `[B]`."""

    per_sample: ClassVar[tuple[str, ...]] = ("index",)

    def __init__(self, margins: Margins, index: Tensor) -> None:
        self.margins, self.index = margins, index

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return this margin, divided by the scale."""
        found = self.margins.per_alternative(now).gather(1, self.index.unsqueeze(1)).squeeze(1)
        return self.margins.where_possible(found / self.margins.scale)


class TemperedCrossEntropy(Criterion):
    """The cross-entropy at a higher temperature where it is saturated at the clean point.

    Where the softmax of the clean logits rounds to one, the cross-entropy has no gradient, or a
    wrong one; there the logits are divided so that the largest margin is -10.
    """

    per_sample: ClassVar[tuple[str, ...]] = ("temperature",)

    def __init__(self, margins: Margins, clean: Evaluation) -> None:
        self.goal, self.margins = margins.goal, margins
        gap = -margins.largest(clean).detach()
        rounds = -math.log(torch.finfo(gap.dtype).eps)
        self.temperature = torch.where(gap > rounds, gap / 10, torch.ones_like(gap))

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the cross-entropy of the tempered logits."""
        goal, outputs = self.goal, self.margins.logits(now)
        outputs = outputs / self.temperature.reshape(-1, *[1] * (outputs.dim() - 1))
        if isinstance(goal, MultiLabel):
            kept, positive = goal.labels != goal.ignore_index, goal.labels == 1
            entropies = -F.logsigmoid(torch.where(positive, outputs, -outputs))
            return losses.per_counted(entropies, kept)
        assert isinstance(goal, Misclassify)
        return losses.cross_entropy(outputs, goal.labels, ignore_index=goal.ignore_index)


class Switch(Criterion):
    """Ascend another objective for some of the samples, `switched` (bool `[B]`)."""

    per_sample: ClassVar[tuple[str, ...]] = ("switched",)

    def __init__(self, first: Criterion, other: Criterion, switched: Tensor) -> None:
        self.first, self.other, self.switched = first, other, switched

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the first objective, or the other."""
        first, other = self.first.objective(now, clean), self.other.objective(now, clean)
        return torch.where(self.switched, other, first)


def margins_of(goal: Criterion, clean: Evaluation) -> Margins | None:
    """Return the margins of a goal; None for a criterion that has none.

    A user's own criterion has none: its objective need not be 0 where the goal is reached.
    """
    kind = type(goal)
    if kind is Diverge and goal.reached(clean, clean) is not None:
        predicted = losses.predict(required_outputs("Diverge", clean))
        return _ClassMargins(Misclassify(predicted, ignore_index=-1), clean)
    if isinstance(goal, Outrank) and kind is Outrank:
        # The margin is that of the k-th place, which decides whether the goal is reached.
        return _GoalMargin(Demote(goal.items, goal.k), clean)
    kinds: dict[type[Criterion], type[Margins]] = {
        Misclassify: _ClassMargins,
        MultiLabel: _LabelMargins,
        Deviate: _ValueMargins,
        Promote: _GoalMargin,
        Demote: _GoalMargin,
        Target: _GoalMargin,
    }
    return kinds[kind](goal, clean) if kind in kinds else None


def _are_probabilities(outputs: Tensor) -> bool:
    """Return whether outputs are probabilities, whose softmax would be nearly flat.

    As logits their gradients vanish where the model is confident; their logarithms' do not.
    """
    if outputs.dim() < 2 or outputs.shape[-1] < 2 or not outputs.numel():
        return False
    sums = outputs.sum(-1)
    return bool((outputs >= 0).all() & torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all())
