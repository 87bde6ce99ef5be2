"""One batch inside an objective: what the forms share."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embattle.attacks.base import Attack
from embattle.attacks.judge import DIVERGENCES, Ascend, Judge
from embattle.perturb.blocks import Block
from embattle.objectives.carry import carry, leaves
from embattle.masking import Masking, Outcome
from embattle.perturb.stage import Evaluation, Lookups, Stage


@dataclass
class Batch:
    """A stage, the attack on it, and the factors of this step.

    Attributes:
        stage: the batch's sites and loss function.
        attack: the attack.
        judge: knows the labels.
        scale: factor on the attack's strengths.
        lam: weight of the adversarial part.
        early: whether gradients that are known already are carried (see `AdversarialObjective`).
        masking: the policy, if any.
        reuse: the opening pass was a training pass, whose lookups the later ones can take over.
        frozen: the deltas are found: `ascend` leaves them as they are.
        metrics: what the forms report, detached.
    """

    stage: Stage
    attack: Attack
    judge: Judge
    scale: float
    lam: float
    early: bool
    masking: Masking | None = None
    reuse: bool = False
    frozen: bool = False
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """The labels, for forms that need them."""
        if self.judge.labels is None:
            raise ValueError("this form needs labels: objective(loss_fn, labels=...)")
        return self.judge.labels

    def outputs(self, evaluation: Evaluation) -> Tensor:
        """The outputs, for forms that need them."""
        if evaluation.outputs is None:
            raise ValueError("this form needs outputs: let loss_fn return (losses, logits)")
        return evaluation.outputs

    def clean(self) -> Evaluation:
        """Make the clean training pass, with its graph."""
        self.stage.remember_random_state()
        evaluation = self.stage.run(self.stage.quick_loss_fn)
        self.report("clean", evaluation)
        return evaluation

    def clean_and_first(self) -> tuple[Tensor, Evaluation, tuple[Evaluation, list[Tensor]] | None]:
        """Make the clean training pass, and share it with the first ascent step if that is right.

        Returns:
            The mean clean loss, to be backpropagated; the detached evaluation; and evaluation and
            gradients at zero if the attack can start from them.
        """
        usable = self.early and torch.is_grad_enabled() and not self.frozen
        shared = usable and self.attack.starts_at_zero and self.attack.steps > 0
        shared = shared and self.attack.mode != "eval" and self.attack.ascend == "loss"
        # A plain lookup's outputs are the attack's too, wherever it starts.
        known = shared or (usable and self.stage.plain and not self.stage.compile)
        if not usable:
            evaluation = self.clean()
            return evaluation.losses.mean(), evaluation.detach(), None
        self.stage.remember_random_state()
        if known:
            opening = self.stage.open(attach=True)
            evaluation, values = opening.evaluation, self.stage.values()
        else:
            evaluation, values = self.stage.run(self.stage.quick_loss_fn), None
        self.report("clean", evaluation)
        mean = evaluation.losses.mean()
        places = values or []
        params = [p for p in leaves(mean) if not any(p is place for place in places)]
        grads = torch.autograd.grad(mean, [*places, *params], allow_unused=True)
        first, sources = None, []
        if values is not None:
            if shared:
                first = (evaluation.detach(), self.stage.gather(grads[: len(places)]))
            sources = self.stage.sources()
            self.reuse = True
        loss = carry(mean.detach(), [*sources, *params], grads)
        return loss, evaluation.detach(), first

    def ascend(
        self,
        first: tuple[Evaluation, list[Tensor]] | None = None,
        *,
        ascend: Ascend | None = None,
        clean: Evaluation | None = None,
    ) -> None:
        """Find the deltas; the stage's blocks hold them afterwards.

        Args:
            first: evaluation and gradients at zero, where the stage is open already.
            ascend: what is made large, if not what the attack says.
            clean: the clean evaluation, for what is measured from there.

        Raises:
            ValueError: a divergence from the clean outputs cannot be ascended from zero.
        """
        if self.frozen:
            return
        stage, attack = self.stage, self.attack
        if ascend is not None and ascend != attack.ascend:
            attack = copy(attack)
            attack.ascend = ascend
        if clean is not None:
            self.judge.clean = self.outputs(clean).detach()
        if attack.ascend in DIVERGENCES and attack.starts_at_zero and attack.steps:
            raise ValueError(
                f"the {attack.ascend} from the clean outputs has no gradient at zero: give "
                f"{type(attack).__name__} a random_start, such as GaussianStart(0.001)"
            )
        with stage.attacking(attack.own_generator) as generator:
            if self.reuse:
                attack.climb(
                    stage, first=first, generator=generator, scale=self.scale, judge=self.judge
                )
                return
            states: list[dict[str, Any]] = []

            def start(block: Block) -> None:
                states.append(attack.begin(block, self.scale))
                attack.start(block, states[-1], generator)

            drawn = None if generator is None else generator.get_state()
            opening = stage.open(start=start)
            if generator is not None and drawn is not None and not opening.perturbed:
                generator.set_state(drawn)  # climb draws the starts that attack.run would
            attack.climb(
                stage,
                opened=(opening.evaluation, states) if opening.perturbed else None,
                generator=generator,
                scale=self.scale,
                judge=self.judge,
            )

    def perturbed(self) -> Evaluation:
        """Make the training pass under the deltas, with its graph."""
        lookups: Lookups = "attached" if self.reuse else "fresh"
        with self.stage.applied(lookups=lookups):
            evaluation = self.stage.evaluate(grad=torch.is_grad_enabled(), lookups=lookups)
        self.report("adversarial", evaluation)
        return evaluation

    def weights(self, adversarial: Evaluation, clean: Evaluation | None) -> Tensor | None:
        """Ask the masking policy; give weights `[B]`, or None where all samples take part."""
        if self.masking is None:
            return None
        stage = self.stage
        norms = None
        if not any(block.coupled for block in stage.blocks):
            norms = sample_norms(stage)
        kept = self.masking(
            Outcome(
                losses=adversarial.losses.detach(),
                clean_losses=None if clean is None else clean.losses.detach(),
                outputs=None if adversarial.outputs is None else adversarial.outputs.detach(),
                norms=norms,
                agreement=stage.agreement(),
            )
        )
        self.metrics["masked"] = (~kept).sum()
        return kept.to(adversarial.losses.dtype)

    def mean(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Average over the batch; a masked sample adds nothing, not even a NaN."""
        if weights is None:
            return values.mean()
        return torch.where(weights > 0, values, torch.zeros_like(values)).mean()

    def report(self, name: str, evaluation: Evaluation) -> None:
        """Note the mean loss and, with labels, the accuracy of a pass."""
        self.metrics[f"{name}_loss"] = evaluation.losses.detach().mean()
        predicted = self.judge.predict(evaluation.detach())
        labels = self.judge.labels
        if predicted is not None and labels is not None and predicted.shape == labels.shape:
            key = "robust_accuracy" if name == "adversarial" else f"{name}_accuracy"
            self.metrics[key] = (predicted == labels).float().mean()


def sample_norms(stage: Stage) -> Tensor:
    """The l2 norm of each sample's whole perturbation, `[B]`."""
    total: Tensor | None = None
    for block in stage.blocks:
        squared = block.norms("l2").double().square()
        if squared.numel() != block.samples:
            squared = squared.reshape(block.samples, -1).sum(1)
        total = squared if total is None else total + squared
    assert total is not None
    return total.sqrt()
