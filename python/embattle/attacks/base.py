"""The one loop of all gradient attacks; an attack adds its start and its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from embattle import losses as losses_module
from embattle import ops
from embattle.attacks.result import AttackResult
from embattle.blocks import Block
from embattle.guard import MODES, Mode
from embattle.perturb import Site
from embattle.stage import Evaluation, LossFn, Masks, Stage
from embattle.strength import Strength, resolve, words

Norm: TypeAlias = Literal["l2", "linf", "l1"] | float
Predict: TypeAlias = Callable[[Tensor], Tensor]

_NORMS = {"l1": "l1", "l2": "l2", "linf": "linf", 1: "l1", 2: "l2", math.inf: "linf"}


@dataclass
class Best:
    """The worst-case deltas so far: per sample, or per batch where samples share a delta."""

    evaluation: Evaluation
    fooled: Tensor | None
    deltas: list[Tensor]


@dataclass(kw_only=True, repr=False)
class Attack:
    """What all attacks share: a ball, a number of steps, and how the model is treated.

    Args:
        norm: of the ball and of the steepest ascent: "l2", "linf", "l1" (or 2, inf, 1).
        eps: radius of the ball: a number, one value per group, `Relative` or `PerDim`; inf: none.
        steps: gradient steps, each one forward pass and one backward pass to the delta alone.
        random_start: start uniformly in the ball instead of at zero.
        restarts: how often to start anew; the worst try of each sample counts.
        keep: "last" takes the last iterate, "best" the iterate with the largest loss (a fooled
            sample outranks one that is not), at the price of one more forward pass.
        mode: the model in the attack's passes. "as_is": as it is, each pass draws its own dropout
            masks. "same": as it is, all passes draw the same random numbers, so the same dropout
            masks. "eval": in eval mode (the site must know its model). Running statistics of
            batch norms never change during an attack, and the global random state is put back.
        generator: source of the attack's own random numbers; torch's CPU generator by default,
            which then advances by one draw per run.
    """

    norm: Norm = "l2"
    eps: Strength
    steps: int = 1
    random_start: bool = False
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    mode: Mode = "as_is"
    generator: torch.Generator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        key = self.norm.lower() if isinstance(self.norm, str) else self.norm
        if key not in _NORMS:
            raise ValueError(
                f"{name}: norm must be 'l2', 'linf' or 'l1' (or 2, inf, 1); got {self.norm!r}"
            )
        self.norm = _NORMS[key]  # type: ignore[assignment]
        if isinstance(self.eps, (int, float)) and not self.eps >= 0:
            raise ValueError(f"{name}: eps must be at least 0, got {self.eps}")
        if self.steps < 0:
            raise ValueError(f"{name}: steps must be at least 0, got {self.steps}")
        if self.restarts < 1:
            raise ValueError(f"{name}: restarts must be at least 1, got {self.restarts}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{name}: restarts={self.restarts} needs random_start=True")
        if self.keep not in ("last", "best"):
            raise ValueError(f"{name}: keep must be 'last' or 'best', got {self.keep!r}")
        if self.mode not in MODES:
            raise ValueError(f"{name}: mode must be one of {', '.join(MODES)}; got {self.mode!r}")

    def __repr__(self) -> str:
        parts = [f"{self.norm} ball of radius {words(self.eps)}", *self._words()]
        if self.random_start:
            parts.append("random start")
        if self.restarts > 1:
            parts.append(f"worst of {self.restarts} restarts")
        if self.keep == "best":
            parts.append("best iterate")
        if self.mode != "as_is":
            parts.append({"same": "same dropout masks", "eval": "eval mode"}[self.mode])
        return f"{type(self).__name__}({', '.join(parts)})"

    def _words(self) -> list[str]:
        return [f"{self.steps} step" + ("s" if self.steps != 1 else "")]

    # --- what an attack may change ---------------------------------------------------------------

    def begin(self, block: Block, scale: float) -> dict[str, Any]:
        """Work out what the steps on a block need; the dict is theirs to keep between steps."""
        return {"eps": self._resolve(self.eps, block, scale)}

    def start(self, block: Block, state: dict[str, Any], generator: torch.Generator | None) -> None:
        """Set the delta that the steps start from."""
        if self.random_start:
            block.set(
                ops.random_start(
                    block.delta.detach(),
                    eps=state["eps"],
                    norm=self.norm,
                    generator=generator,
                    **block.geometry,
                )
            )
        else:
            block.set(torch.zeros_like(block.delta))

    def step(
        self, block: Block, grad: Tensor, state: dict[str, Any], number: int, losses: Tensor
    ) -> None:
        """Make one step: `losses` and `grad` belong to the block's current delta."""
        raise NotImplementedError(f"{type(self).__name__} makes no gradient steps")

    def objective(self, evaluation: Evaluation, labels: Tensor | None) -> Tensor:
        """Give the per-sample values that are ascended, `[B]`."""
        return evaluation.losses

    # --- the loop --------------------------------------------------------------------------------

    def run(
        self,
        loss_fn: LossFn,
        sites: Site | Sequence[Site],
        *,
        mask: Masks = None,
        offsets: Tensor | None = None,
        labels: Tensor | None = None,
        predictions: Predict | None = None,
        joint: bool = False,
        scale: float = 1.0,
    ) -> AttackResult:
        """Find the perturbation of one batch that makes its losses large.

        Args:
            loss_fn: runs the model on the batch. Returns one loss per sample, `[B]`, or a pair of
                the losses and the model's outputs (logits), from which predictions are made.
            sites: where to perturb.
            mask: bool, shape of the embeddings without their last dim: True where a vector may
                move. One for all sites, or a sequence with one (or None) for each.
            offsets: int64 `[B + 1]`, bounds of the samples in packed rows.
            labels: the true classes, `[B]`: then `success` counts only what was right before.
            predictions: from outputs to predictions `[B]`; the largest logit (or the sign of a
                single one) by default.
            joint: one ball around all outputs of a sample together, not one each.
            scale: factor on eps and step size, as a schedule gives it.

        Returns:
            The result; the model is as it was.
        """
        stage = Stage(loss_fn, sites, mask=mask, offsets=offsets, joint=joint, mode=self.mode)
        judge = Judge(labels, predictions)
        with stage.attacking(self.own_generator) as generator:
            shared = self.starts_at_zero and self.steps > 0
            opening = stage.open(attach=shared)
            clean = opening.evaluation
            first = None
            if shared and (values := stage.values(opening.calls)) is not None:
                grads = torch.autograd.grad(
                    self.objective(clean, labels).sum(), values, allow_unused=True
                )
                first = (clean.detach(), stage.gather(grads))
            clean = clean.detach()
            found, steps = self.climb(
                stage, first=first, generator=generator, scale=scale, judge=judge, final=True
            )
            assert found is not None
        for block in stage.blocks:
            block.delta = block.delta.detach()
        return AttackResult(
            deltas=[block.delta for block in stage.blocks],
            clean_losses=clean.losses,
            losses=found.losses,
            clean_predictions=judge.predict(clean),
            predictions=judge.predict(found),
            success=judge.success(clean, found),
            steps=steps,
            norm=self.norm,
            stage=stage,
        )

    @property
    def starts_at_zero(self) -> bool:
        """Whether the first step's gradient is the one at the unperturbed embeddings."""
        return not self.random_start

    def own_generator(self) -> torch.Generator | None:
        """Seed a generator for one run, so that the global one can be put back."""
        if self.starts_at_zero and not self.draws:
            return None
        seed = torch.randint(
            2**62,
            (),
            generator=self.generator,
            device="cpu" if self.generator is None else self.generator.device,
        )
        return torch.Generator().manual_seed(int(seed))

    # Whether the attack draws numbers although it starts at zero.
    draws: ClassVar[bool] = False
    # Whether it ascends the loss function's own losses, so that a training pass can be shared.
    ascends_losses: ClassVar[bool] = True

    def climb(
        self,
        stage: Stage,
        *,
        first: tuple[Evaluation, list[Tensor]] | None = None,
        opened: tuple[Evaluation, list[dict[str, Any]]] | None = None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
        judge: Judge | None = None,
        final: bool = False,
    ) -> tuple[Evaluation | None, Tensor]:
        """Run the attack's steps on an opened stage, whose blocks then hold the deltas.

        Args:
            stage: opened, and attacking.
            first: evaluation and gradients at the first start, if they are known already.
            opened: an evaluation at the first start with its graph, and the blocks' states.
            generator: of the attack's random numbers.
            scale: factor on the strengths.
            judge: knows the labels.
            final: evaluate the deltas that are returned.

        Returns:
            Evaluation of the final deltas (None unless asked for), and the steps made, `[B]`.
        """
        judge = Judge(None, None) if judge is None else judge
        track = self.keep == "best" or self.restarts > 1
        best: Best | None = None
        last: Evaluation | None = None
        for restart in range(self.restarts):
            if restart == 0 and opened is not None:
                states = opened[1]
            else:
                states = [self.begin(block, scale) for block in stage.blocks]
                for block, state in zip(stage.blocks, states, strict=True):
                    self.start(block, state, generator)
            for number in range(self.steps):
                if number == 0 and restart == 0 and first is not None:
                    at, grads = first
                else:
                    if number == 0 and restart == 0 and opened is not None:
                        at = opened[0]
                    else:
                        at = stage.evaluate(grad=True)
                    grads = stage.gradients(self.objective(at, judge.labels))
                    at = at.detach()
                if self.keep == "best":
                    best = self._better(stage, best, at, judge)
                values = self.objective(at, judge.labels)
                for block, grad, state in zip(stage.blocks, grads, states, strict=True):
                    self.step(block, grad, state, number, values)
            if track or final:
                last = stage.evaluate(grad=False).detach()
                if track:
                    best = self._better(stage, best, last, judge)
        if best is not None:
            for block, delta in zip(stage.blocks, best.deltas, strict=True):
                block.set(delta)
            last = best.evaluation
        batch = stage.batch
        steps = torch.full((batch,), self.steps * self.restarts, dtype=torch.int64)
        return last, steps.to(stage.blocks[0].base.device)

    def _better(self, stage: Stage, best: Best | None, now: Evaluation, judge: Judge) -> Best:
        fooled = judge.fooled(now)
        if best is None:
            return Best(now, fooled, [block.delta.detach().clone() for block in stage.blocks])
        coupled = any(block.coupled for block in stage.blocks)
        old, new = best.evaluation.losses, now.losses
        if coupled:
            wins = (new.sum() > old.sum()).expand_as(new)
        else:
            wins = new > old
            if fooled is not None and best.fooled is not None:
                wins = torch.where(fooled == best.fooled, wins, fooled)
        if fooled is not None and best.fooled is not None:
            fooled = torch.where(wins, fooled, best.fooled)
        outputs = now.outputs
        if outputs is not None and best.evaluation.outputs is not None:
            shaped = wins.reshape(-1, *[1] * (outputs.dim() - 1))
            outputs = torch.where(shaped, outputs, best.evaluation.outputs)
        return Best(
            Evaluation(torch.where(wins, new, old), outputs),
            fooled,
            [
                torch.where(block.per_row(wins), block.delta.detach(), delta)
                for block, delta in zip(stage.blocks, best.deltas, strict=True)
            ],
        )

    def _resolve(self, value: Strength, block: Block, scale: float) -> float | Tensor:
        return resolve(value, block.base, norm=self.norm, geometry=block.geometry, scale=scale)


class Judge:
    """Knows the labels, and how outputs become predictions."""

    def __init__(self, labels: Tensor | None, predictions: Predict | None) -> None:
        self.labels = labels
        self._predict = losses_module.predict if predictions is None else predictions

    def predict(self, evaluation: Evaluation) -> Tensor | None:
        """Give the predictions, or None if the loss function returned no outputs."""
        return None if evaluation.outputs is None else self._predict(evaluation.outputs)

    def fooled(self, evaluation: Evaluation) -> Tensor | None:
        """Give bool `[B]`: wrong now. None without labels or outputs."""
        predicted = self.predict(evaluation)
        if predicted is None or self.labels is None:
            return None
        return _any_per_sample(predicted != self.labels)

    def success(self, clean: Evaluation, now: Evaluation) -> Tensor | None:
        """Give bool `[B]`: the attack flipped the prediction (of what was right, given labels)."""
        before, after = self.predict(clean), self.predict(now)
        if before is None or after is None:
            return None
        if self.labels is None:
            return _any_per_sample(before != after)
        right = ~_any_per_sample(before != self.labels)
        return right & _any_per_sample(after != self.labels)


def _any_per_sample(wrong: Tensor) -> Tensor:
    return wrong if wrong.dim() == 1 else wrong.flatten(1).any(1)
