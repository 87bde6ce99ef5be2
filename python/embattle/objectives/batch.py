"""One batch inside an objective: what the forms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from embattle.attacks.base import Attack
from embattle.attacks.box import ChosenBound
from embattle.attacks.first_pass import FirstPass, Iterate, run_first_pass
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.criteria import Criterion, Misclassify
from embattle.criteria.base import ascended
from embattle.errors import InputError
from embattle.objectives.agreement import nearest_agreement
from embattle.objectives.masking import Agreement, Masking, Outcome
from embattle.objectives.precomputed import attach_gradients, next_number, reached
from embattle.objectives.rows import Key
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.perturbed_sites import Lookups
from embattle.perturb.strength import OfChosen

# Indices of a batch's samples in the data, `[B]`; or how many they are.
Samples: TypeAlias = "Sequence[int] | Tensor | int | None"


@dataclass
class Batch:
    """An attacked batch, the attack on it, and the factors of this step.

    Attributes:
        attacked: the batch's sites, loss function and perturbations.
        attack: the attack.
        criterion: what the attack is for, and what accuracy is; None: the losses alone count.
        scale: factor on the attack's strengths.
        lam: weight of the adversarial part.
        early: whether clean gradients are computed early (see `AdversarialObjective`).
        masking: the policy, if any.
        samples: the indices of the batch's samples in the data, for forms that keep something of a
            sample; or how many there are.
        step: the number of the step, from 0.
        reuse: the first pass was a training pass, whose look-ups the later ones can reuse.
        frozen: the deltas are found: `ascend` leaves them as they are.
        part: the chosen samples, int64 `[n]`, and their batch, for forms that attack a part.
        old: outputs of the averaged model, found once for all calls of a form on this batch.
        metrics: what the forms report, detached.
    """

    attacked: AttackedBatch
    attack: Attack
    criterion: Criterion | None
    scale: float
    lam: float
    early: bool
    masking: Masking | None = None
    samples: Samples = None
    step: int = 0
    reuse: bool = False
    frozen: bool = False
    part: tuple[Tensor, Batch] | None = None
    old: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """The class of each sample, for forms that need it.

        Raises:
            ValueError: the criterion has none.
        """
        labels = getattr(self.criterion, "labels", None)
        if not isinstance(self.criterion, Misclassify) or labels is None:
            raise ValueError(
                "this form needs classes: objective(loss_fn, criterion=Misclassify(labels)); got "
                f"{self.criterion!r}"
            )
        return self.criterion.labels

    @property
    def counted_labels(self) -> Tensor:
        """Where `labels` are not the criterion's `ignore_index`, bool."""
        assert isinstance(self.criterion, Misclassify)
        return self.labels != self.criterion.ignore_index

    def losses(self, evaluation: Evaluation) -> Tensor:
        """Return the losses, `[B]`, for forms that train on them.

        Raises:
            ValueError: there are none.
        """
        if evaluation.losses is None:
            raise ValueError("this form needs losses: let loss_fn return Evaluation(losses, ...)")
        return evaluation.losses

    def outputs(self, evaluation: Evaluation) -> Tensor:
        """Return the outputs, `[B, ...]`, for forms that need them.

        Raises:
            ValueError: there are none.
        """
        if evaluation.outputs is None:
            raise ValueError(
                "this form needs outputs: let loss_fn return Evaluation(losses, outputs)"
            )
        return evaluation.outputs

    def clean(self) -> Evaluation:
        """Run the clean training pass, with its graph."""
        self.attacked.save_random_state()
        evaluation = self.attacked.run()
        self._check(evaluation)
        self.report("clean", evaluation)
        return evaluation

    def clean_and_first_step(
        self, *, unlabelled: bool = False
    ) -> tuple[Tensor, Evaluation, FirstPass | None]:
        """Run the clean training pass, and share it with the first ascent step if that is right.

        Args:
            unlabelled: there need be no losses: the mean is then zero.

        Returns:
            The mean clean loss, to be backpropagated; the detached evaluation; and what the attack
            can take from it.
        """
        attacked, attack = self.attacked, self.attack
        usable = self.early and torch.is_grad_enabled() and not self.frozen
        goal = attack.goal(self.criterion)
        shared = usable and attack.starts_at_zero and attack.steps > 0 and attack.mode != "eval"
        # A plain look-up's outputs are the attack's too, wherever it starts.
        known = shared or (usable and attacked.plain and not attacked.compile)
        if not usable:
            evaluation = self.clean()
            if unlabelled and evaluation.outputs is not None and evaluation.losses is None:
                return evaluation.outputs.new_zeros(()), evaluation.detach(), None
            return self.losses(evaluation).mean(), evaluation.detach(), None
        attacked.save_random_state()
        before = next_number()
        if known:
            recorded = attacked.record(attach=True)
            evaluation, values = recorded.evaluation, attacked.perturbed.values()
        else:
            evaluation, values = attacked.run(), None
        self._check(evaluation)
        self.report("clean", evaluation)
        clean = evaluation.detach()
        if unlabelled and evaluation.losses is None:
            return clean.outputs.new_zeros(()), clean, None  # type: ignore[union-attr]
        losses = self.losses(evaluation)
        ascent = ascended(goal, evaluation, clean) if shared else losses
        # Another objective than the losses needs a backward pass of its own, and so do gradients
        # through float16, in which those of confident samples vanish without a factor.
        shared = shared and ascent is losses and not attacked.through_half
        mean = losses.mean()
        places = values or []
        graph = reached(mean)
        params = [p for p in graph.leaves if not any(p is place for place in places)]
        if values is not None:
            attacked.check_graph(losses, places)
        wanted = [*places, *params]
        # What was made before the pass, outside of the loss function, is in later passes, too.
        shares = graph.oldest < before
        grads = (
            torch.autograd.grad(mean, wanted, retain_graph=shares, allow_unused=True)
            if wanted
            else ()
        )
        first_pass, sources = None, []
        if values is not None:
            if shared:
                # The mean's gradient is 1/B of each sample's own.
                scale = 1 if attack.uses_direction_alone else clean.batch
                first = attacked.rescale_at_outputs(grads[: len(places)], scale)
                first_pass = FirstPass(clean, start=Iterate(clean, losses.detach(), first))
            sources = attacked.perturbed.sources()
            self.reuse = True
        loss = attach_gradients(mean.detach(), [*sources, *params], grads)
        return loss, clean, first_pass

    def ascend(
        self,
        first_pass: FirstPass | None = None,
        *,
        toward: Criterion | None = None,
        clean: Evaluation | None = None,
    ) -> Evaluation | None:
        """Find the deltas; the perturbations of `attacked` hold them afterwards.

        Args:
            first_pass: what the first pass gave, where it was run already.
            toward: what the attack is for, if not the criterion.
            clean: the clean evaluation, for what is measured from there.

        Returns:
            The clean evaluation, if a pass has shown it.

        Raises:
            ValueError: a divergence from the clean outputs cannot be ascended from zero.
        """
        if self.frozen:
            return None
        attacked, attack = self.attacked, self.attack
        goal = attack.checked_goal(self.criterion if toward is None else toward)
        before = attacked.same_random
        attacked.same_random = before or attack.compares
        with attacked.attacking(attack.own_generator) as generator:
            if goal.needs_clean or attack.compares:
                clean = self._clean_of_attack(clean)
            if not self.reuse:
                first_pass = run_first_pass(
                    attack, attacked, goal, generator, self.scale, clean=False
                )
            first_pass = first_pass or FirstPass()
            if first_pass.clean is None:
                first_pass.clean = clean
            attack.search(attacked, goal, first_pass, generator, self.scale)
        if not before:
            attacked.same_random = False
            attacked.clear_random_state()
        return first_pass.clean

    def _clean_of_attack(self, clean: Evaluation | None) -> Evaluation:
        """Return the clean evaluation in the mode of the attack's passes, detached."""
        attacked, attack = self.attacked, self.attack
        same = attack.mode == "same" or (attack.mode == "as_is" and not attack.compares)
        if clean is not None and same:
            return clean.detach()
        attacked.clear()
        with torch.no_grad():
            return attacked.run(first=True).detach()

    def choose(self, rows: Tensor) -> Batch:
        """Return the batch of some of the samples, int64 `[n]` ascending, to be attacked alone."""
        size, attack = self.size, self.attack
        changed: dict[str, Any] = {}
        for name in ("eps", "step_size", "xi", "std"):
            value = self._of_chosen(getattr(attack, name, None), rows)
            if value is not None:
                changed[name] = value
        for kind, name in ((GaussianStart, "std"), (BoxStart, "size")):
            if isinstance(attack.random_start, kind):
                value = self._of_chosen(getattr(attack.random_start, name), rows)
                if value is not None:
                    changed["random_start"] = kind(value)
        for name in ("lower", "upper"):
            bound = getattr(attack, name)
            if isinstance(bound, Tensor) and bound.dim():
                changed[name] = ChosenBound(bound, size, rows)
        return Batch(
            self.attacked.part(rows),
            replace(attack, **changed) if changed else attack,
            None if self.criterion is None else self.criterion.select(rows),
            self.scale,
            self.lam,
            self.early,
            self.masking,
            step=self.step,
        )

    def _of_chosen(self, value: Any, rows: Tensor) -> OfChosen | None:
        """Return the chosen samples' part of strengths per group; None where it is one for all."""
        if not isinstance(value, Tensor) or value.numel() == 1:
            return None
        if any(site.scope == "row" and site.rows == "batch" for site in self.attacked.sites):
            raise InputError(
                f"{len(value)} strengths, one for each row that a batch reads: which of them are "
                "those of the chosen samples' rows is not known; use Site(..., scope='row', "
                "rows='table') and a strength for each row of the table, or form='mixed'"
            )
        return OfChosen(value, self.size, rows)

    @property
    def size(self) -> int:
        """How many samples the batch has, before a pass shows it.

        Raises:
            ValueError: nothing that was given says so.
        """
        if isinstance(self.samples, int):
            return self.samples
        if self.samples is not None:
            return len(self.samples)
        names = () if self.criterion is None else self.criterion.per_sample
        for name in names:
            value = getattr(self.criterion, name)
            if isinstance(value, Tensor) and value.dim():
                return len(value)
        raise ValueError(
            "how many samples the batch has is not known: objective(loss_fn, samples=...), their "
            "indices in the data or their number"
        )

    def perturbed(self) -> Evaluation:
        """Run the training pass under the deltas, with its graph."""
        lookups: Lookups = "attached" if self.reuse else "fresh"
        with self.attacked.perturbed.applied(lookups=lookups, compile=self.attacked.compile):
            evaluation = self.attacked.run()
        self.report("adversarial", evaluation)
        return evaluation

    def _check(self, evaluation: Evaluation) -> None:
        if self.criterion is not None:
            self.criterion.check(evaluation)

    def weights(
        self, adversarial: Evaluation, clean: Evaluation | None, rows: Tensor | None = None
    ) -> Tensor | None:
        """Return the masking policy's weights, `[B]`; None where all samples take part.

        Args:
            adversarial: the samples under attack.
            clean: without; None if that is not known.
            rows: int64 `[n]`, which samples of the batch these evaluations are of; None: all.
        """
        if self.masking is None:
            return None
        attacked = self.attacked
        norms = None
        if not attacked.perturbed.coupled:
            norms = sample_norms(attacked)
        agreement = nearest_agreement(attacked)
        if rows is not None:
            norms = None if norms is None else norms[rows]
            agreement = None if agreement is None else partial(_rows_of, agreement, rows)
        kept = self.masking(
            Outcome(
                losses=self.losses(adversarial).detach(),
                clean_losses=None if clean is None else self.losses(clean).detach(),
                outputs=None if adversarial.outputs is None else adversarial.outputs.detach(),
                norms=norms,
                agreement=agreement,
            )
        )
        self.metrics["masked"] = (~kept).sum()
        return kept.to(self.losses(adversarial).dtype)

    def mean(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Average over the batch; a masked sample adds nothing, not even a NaN."""
        if weights is None:
            return values.mean()
        return torch.where(weights > 0, values, torch.zeros_like(values)).mean()

    def report(self, name: str, evaluation: Evaluation, rows: Key | None = None) -> None:
        """Record the mean loss and, if the criterion has one, the accuracy of a pass.

        Args:
            name: "clean" or "adversarial".
            evaluation: of the pass.
            rows: the samples that count; by default all.
        """
        evaluation, criterion = evaluation.detach(), self.criterion
        if rows is not None:
            evaluation = evaluation.select(rows)
            criterion = None if criterion is None else criterion.select(rows)
        if evaluation.losses is not None:
            self.metrics[f"{name}_loss"] = evaluation.losses.mean()
        if criterion is not None and evaluation.outputs is not None:
            accuracy = criterion.accuracy(evaluation)
            if accuracy is not None:
                key = "robust_accuracy" if name == "adversarial" else f"{name}_accuracy"
                self.metrics[key] = accuracy


def sample_norms(attacked: AttackedBatch) -> Tensor:
    """Compute the l2 norm of each sample's whole perturbation, `[B]`."""
    total: Tensor | None = None
    for perturbation in attacked.perturbations:
        squared = perturbation.norms("l2").double().square()
        if squared.numel() != perturbation.samples:
            squared = squared.reshape(perturbation.samples, -1).sum(1)
        total = squared if total is None else total + squared
    assert total is not None
    return total.sqrt()


def _rows_of(agreement: Agreement, rows: Tensor) -> Tensor:
    return agreement()[rows]
