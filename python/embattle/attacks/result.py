"""The result of an attack."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from embattle.criteria import Criterion
from embattle.criteria.base import reached
from embattle.perturb.evaluation import Evaluation, LossFn, call
from embattle.perturb.perturbation import Perturbation, total
from embattle.perturb.perturbed_sites import PerturbedSites


class AttackWarning(UserWarning):
    """A sign that an attack is weaker than it looks, or not what was meant."""


class AttackResult:
    """The perturbations that an attack found for one batch, and what they were evaluated to.

    Losses, predictions and success are those of `deltas`, evaluated with the batch as a whole, from
    the same random numbers as without perturbation: dropout is never counted as success. A result
    can be pickled and copied; it then holds neither the model nor a graph.

    Attributes:
        deltas: one tensor for each perturbed output, samples first (scope "row": `[distinct rows,
            dim]`; a parameter: its shape).
        steps: gradient steps made for each sample, int64 `[B]`.
        shared: whether samples share deltas.
    """

    def __init__(
        self,
        perturbed: PerturbedSites,
        goal: Criterion,
        norm: Any,
        steps: Tensor | int,
        clean: Evaluation | None,
        now: Evaluation | None,
        batch: int = 0,
    ) -> None:
        perturbed.release()
        self._steps, self._batch = steps, batch
        self.shared = perturbed.coupled
        self._norm, self._perturbed = norm, perturbed
        self._deltas: list[Tensor] = []
        self._clean, self._now = clean, now
        self._numbers: dict[str, Any] = {}
        if clean is None or now is None:
            return
        self._numbers = {
            "clean_reached": reached(goal, clean, clean),
            "reached": reached(goal, now, clean),
            "counted": goal.counted(now),
            "clean_accuracy": goal.accuracy(clean),
            "robust_accuracy": goal.accuracy(now),
        }
        for name, one in (("clean_predictions", clean), ("predictions", now)):
            self._numbers[name] = None if one.outputs is None else goal.predict(one.outputs)

    # --- what was found --------------------------------------------------------------------------

    @property
    def steps(self) -> Tensor:
        """Gradient steps made for each sample, int64 `[B]`."""
        if isinstance(self._steps, int):  # as many for each
            self._steps = torch.full((self._batch,), self._steps, device=self.deltas[0].device)
        return self._steps

    @property
    def deltas(self) -> list[Tensor]:
        """One tensor for each perturbed output."""
        if self._perturbed is None:
            return self._deltas
        return [p.delta for p in self._perturbed.perturbations]

    @property
    def perturbations(self) -> list[Perturbation]:
        """The deltas with the embeddings they are added to, their groups and masks.

        None of a result that was pickled.
        """
        return [] if self._perturbed is None else self._perturbed.perturbations

    @property
    def delta(self) -> Tensor:
        """The only delta.

        Raises:
            ValueError: there are several.
        """
        if len(self.deltas) != 1:
            raise ValueError(f"delta: there are {len(self.deltas)}, one for each call; see deltas")
        return self.deltas[0]

    @property
    def norms(self) -> list[Tensor]:
        """The norms of each delta's groups, `[groups]` each, in the attack's norm.

        Where the model computes in float16 or bfloat16, these are the norms of what the embeddings
        really moved by, after rounding; they can exceed eps, or be zero.
        """
        if self._perturbed is None:
            return list(self._numbers["norms"])
        return [p.norms(self._norm) for p in self._perturbed.perturbations]

    @property
    def nonfinite(self) -> Tensor:
        """How many groups ever had a gradient with a NaN or Inf (a 0-d int64 tensor)."""
        return self._count("nonfinite")

    @property
    def zero_gradient(self) -> Tensor:
        """How many groups that could move never had a gradient other than zero (0-d, int64).

        Such groups were not attacked: the model may look robust there only because its gradients
        vanish (saturated logits, a loss that rounds to zero). Try `ascend="margin"` or another
        attack on them.
        """
        return self._count("zero_gradient")

    def _count(self, name: str, done: Tensor | None = None) -> Tensor:
        if self._perturbed is None:
            return self._numbers[name]
        if name == "nonfinite":
            counts = [p.nonfinite.count_nonzero() for p in self._perturbed.perturbations]
        else:
            counts = [p.count_without_gradient(done) for p in self._perturbed.perturbations]
        return total(counts)

    # --- what it was evaluated to ----------------------------------------------------------------

    @property
    def clean_losses(self) -> Tensor | None:
        """Losses without perturbation, `[B]`; None if the loss function gave outputs alone."""
        return self._evaluated(self._clean).losses

    @property
    def losses(self) -> Tensor | None:
        """Losses under `deltas`, `[B]`."""
        return self._evaluated(self._now).losses

    @property
    def clean_outputs(self) -> Tensor | None:
        """Outputs without perturbation, `[B, ...]`; None if the loss function gave losses alone."""
        return self._evaluated(self._clean).outputs

    @property
    def outputs(self) -> Tensor | None:
        """Outputs under `deltas`."""
        return self._evaluated(self._now).outputs

    @property
    def clean_predictions(self) -> Tensor | None:
        """Predictions without perturbation; None without outputs, or a criterion that has none."""
        return self._number("clean_predictions")

    @property
    def predictions(self) -> Tensor | None:
        """Predictions under `deltas`."""
        return self._number("predictions")

    @property
    def clean_reached(self) -> Tensor | None:
        """Bool `[B]`: where the criterion's goal holds without perturbation."""
        return self._number("clean_reached")

    @property
    def reached(self) -> Tensor | None:
        """Bool `[B]`: where the goal holds under `deltas`; None: the criterion has none."""
        return self._number("reached")

    @property
    def success(self) -> Tensor | None:
        """Bool `[B]`: the goal holds under `deltas`, and did not hold without."""
        before, now = self.clean_reached, self.reached
        return None if before is None or now is None else now & ~before

    @property
    def clean_accuracy(self) -> Tensor | None:
        """Share of right answers without perturbation, over labels that count; 0-d."""
        return self._number("clean_accuracy")

    @property
    def robust_accuracy(self) -> Tensor | None:
        """Share of right answers under `deltas`; without labels, of samples short of the goal.

        0-d; None if the criterion has neither.
        """
        accuracy = self._number("robust_accuracy")
        if accuracy is not None or self.reached is None:
            return accuracy
        robust = ~self.reached
        counted = self._number("counted")
        if counted is None:
            return robust.double().mean()
        return (robust & counted).sum().double() / counted.sum()

    def _evaluated(self, one: Evaluation | None) -> Evaluation:
        if one is None:
            raise RuntimeError(
                "this attack was run with evaluate=False: only its deltas are known. Run it with "
                "evaluate=True, or evaluate them: result.evaluate(loss_fn)"
            )
        return one

    def _number(self, name: str) -> Tensor | None:
        self._evaluated(self._now)
        found: Tensor | None = self._numbers[name]
        return found

    # --- using it --------------------------------------------------------------------------------

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Perturb the model inside the block: its forward passes then see the deltas.

        The deltas are constants there: gradients reach the model's weights, as training needs it.
        They belong to the attacked batch and to this thread: the model refuses other inputs inside
        the block, and another thread's passes are not perturbed. Blocks can be nested; of the same
        site the innermost counts.

        Raises:
            RuntimeError: another batch was run, or part of a pass; or the result is a copy that was
                pickled, which knows no model.
        """
        if self._perturbed is None:
            raise RuntimeError("this result was pickled, and knows no model to perturb any more")
        with self._perturbed.applied():
            yield

    def evaluate(self, loss_fn: LossFn) -> Evaluation:
        """Evaluate the deltas: run `loss_fn` on the perturbed model, without gradients."""
        with self.applied(), torch.no_grad():
            return call(loss_fn)

    def warn(self) -> AttackResult:
        """Warn of what makes the attack weaker than it looks; this waits for the device."""
        zero = int(self._count("zero_gradient", self._numbers["reached"]))
        if zero:
            groups = sum(p.groups for p in self._perturbed.perturbations)
            warnings.warn(
                f"{zero} of {groups} groups had no gradient other than zero, and were not "
                "attacked: the model looks robust there without being tested. Saturated logits? "
                "Ascend the margin: Misclassify(labels, ascend='margin'), or run AutoAttack",
                AttackWarning,
                stacklevel=3,
            )
        warn_of_rounding(self._perturbed, self._norm)
        return self

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(delta.shape)) for delta in self.deltas)
        return f"AttackResult(deltas {shapes})"

    # --- copies ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        numbers = self._numbers | {
            "norms": self.norms,
            "nonfinite": self.nonfinite,
            "zero_gradient": self.zero_gradient,
        }
        return vars(self) | {"_perturbed": None, "_deltas": self.deltas, "_numbers": numbers}

    def __deepcopy__(self, memo: dict[int, Any]) -> AttackResult:
        other = object.__new__(type(self))
        vars(other).update({name: deepcopy(value, memo) for name, value in vars(self).items()})
        return other


def warn_of_rounding(perturbed: PerturbedSites, norm: Any) -> None:
    """Warn of perturbations that the model's dtype rounds away; this waits for the device."""
    for perturbation in perturbed.perturbations:
        if perturbation.base.dtype == perturbation.delta.dtype or not perturbation.delta.numel():
            continue
        exact = perturbation.unrounded_norms(norm)
        off = int(((perturbation.norms(norm) - exact).abs() > 0.1 * exact).sum())
        if off:
            warnings.warn(
                f"the model computes in {str(perturbation.base.dtype)[6:]}, which rounds the "
                f"perturbations of {off} groups to a norm more than 10 % off (see result.norms): "
                "eps is too small for this dtype; attack the model in float32",
                AttackWarning,
                stacklevel=4,
            )
