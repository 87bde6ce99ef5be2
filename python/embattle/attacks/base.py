"""The one loop of all gradient attacks; an attack adds its start and its step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from embattle import ops
from embattle.attacks.best import Best, better
from embattle.attacks.judge import ASCENDS, Ascend, Judge, Predict
from embattle.attacks.leaving import climb_leaving
from embattle.attacks.result import AttackResult
from embattle.attacks.starts import BoxStart, GaussianStart
from embattle.perturb.blocks import Block
from embattle.perturb.guard import MODES, Mode
from embattle.perturb.site import Site
from embattle.perturb.stage import Evaluation, LossFn, Masks, Stage
from embattle.perturb.strength import Strength, resolve, words

Norm: TypeAlias = Literal["l2", "linf", "l1"] | float

_NORMS = {"l1": "l1", "l2": "l2", "linf": "linf", 1: "l1", 2: "l2", math.inf: "linf"}


@dataclass(kw_only=True, repr=False)
class Attack:
    """What all attacks share: a ball, a number of steps, and how the model is treated.

    Args:
        norm: of the ball and of the steepest ascent: "l2", "linf", "l1" (or 2, inf, 1).
        eps: radius of the ball: a number, one value per group, `Relative` or `PerDim`; inf: none.
        steps: gradient steps, each one forward pass and one backward pass to the delta alone.
        random_start: start uniformly in the ball instead of at zero; or a `GaussianStart` or
            `BoxStart`.
        restarts: how often to start anew; the worst try of each sample counts.
        keep: "last" takes the last iterate, "best" the iterate with the largest loss (a fooled
            sample outranks one that is not), at the price of one more forward pass.
        ascend: what is made large. "loss": what the loss function returns. From its outputs:
            "kl", "symmetric_kl", "squared_distance": how far they are from the clean outputs
            (TRADES, VAT, SMART; these have no gradient at zero: start at random); "dlr", "margin":
            see `embattle.losses` (these need labels).
        stop_when_fooled: samples that are fooled leave the batch, and cost nothing in later steps.
            The loss function is then called with the rows that remain (an int64 tensor), and
            labels are needed. Waits for the device at every step.
        mode: the model in the attack's passes. "as_is": as it is, each pass draws its own dropout
            masks. "same": as it is, all passes have the same random numbers, so the same dropout
            masks (drawn only once on a CPU). "eval": in eval mode (the site must know its model).
            Running statistics of batch norms never change during an attack, and the global random
            state is put back.
        generator: source of the attack's own random numbers; torch's CPU generator by default,
            which then advances by one draw per run.
        compile: `torch.compile` the loss function, model and all (give the model uncompiled). The
            pass that opens the attack, which shows where the embeddings are, is compiled in parts:
            up to them, and from there. The site must know its model.
    """

    norm: Norm = "l2"
    eps: Strength
    steps: int = 1
    random_start: bool | GaussianStart | BoxStart = False
    restarts: int = 1
    keep: Literal["last", "best"] = "last"
    ascend: Ascend = "loss"
    stop_when_fooled: bool = False
    mode: Mode = "as_is"
    generator: torch.Generator | None = field(default=None, compare=False)
    compile: bool = False

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
        if self.ascend not in ASCENDS:
            raise ValueError(
                f"{name}: ascend must be one of {', '.join(ASCENDS)}; got {self.ascend!r}"
            )
        if self.keep not in ("last", "best"):
            raise ValueError(f"{name}: keep must be 'last' or 'best', got {self.keep!r}")
        if self.mode not in MODES:
            raise ValueError(f"{name}: mode must be one of {', '.join(MODES)}; got {self.mode!r}")

    def __repr__(self) -> str:
        parts = [f"{self.norm} ball of radius {words(self.eps)}", *self._words()]
        if self.random_start:
            given = self.random_start
            parts.append("random start" if isinstance(given, bool) else str(given))
        if self.ascend != "loss":
            parts.append(f"ascending the {self.ascend}")
        if self.restarts > 1:
            parts.append(f"worst of {self.restarts} restarts")
        if self.keep == "best":
            parts.append("best iterate")
        if self.stop_when_fooled:
            parts.append("until fooled")
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
        like = block.delta.detach()
        if isinstance(self.random_start, (GaussianStart, BoxStart)):
            start = self.random_start.draw(
                like,
                block.base,
                eps=state["eps"],
                norm=self.norm,
                geometry=block.geometry,
                generator=generator,
            )
        elif self.random_start:
            start = ops.random_start(
                like, eps=state["eps"], norm=self.norm, generator=generator, **block.geometry
            )
        else:
            start = torch.zeros_like(like)
        block.set(start)

    def step(
        self, block: Block, grad: Tensor, state: dict[str, Any], number: int, values: Tensor
    ) -> None:
        """Make step `number`: `values` `[B]` and `grad` belong to the block's current delta."""
        raise NotImplementedError(f"{type(self).__name__} makes no gradient steps")

    def with_steps(self, share: float) -> Attack:
        """Give the attack with `share` of its steps, rounded up; one at least."""
        steps = min(self.steps, 1) if share <= 0 else math.ceil(round(share * self.steps, 9))
        return self if steps == self.steps else replace(self, steps=steps)

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
        stage = Stage(
            loss_fn,
            sites,
            mask=mask,
            offsets=offsets,
            joint=joint,
            mode=self.mode,
            compile=self.compile,
        )
        judge = Judge(labels, predictions)
        if self.stop_when_fooled:
            stage.by_rows(labels)
        with stage.attacking(self.own_generator) as generator:
            shared = self.starts_at_zero and self.steps > 0
            clean = stage.open(attach=shared).evaluation
            judge.clean = None if clean.outputs is None else clean.outputs.detach()
            first = None
            if shared and (places := stage.values()) is not None:
                total = judge.values(clean, self.ascend).sum()
                grads = torch.autograd.grad(total, places, allow_unused=True)
                first = (clean.detach(), stage.gather(grads))
            clean = clean.detach()
            if self.stop_when_fooled:
                found, steps = climb_leaving(
                    self, stage, clean, first=first, generator=generator, scale=scale, judge=judge
                )
            else:
                best = self.climb(
                    stage, first=first, generator=generator, scale=scale, judge=judge, final=True
                )
                assert best is not None
                found = best
                steps = torch.full_like(clean.losses, self.steps * self.restarts).long()
        stage.forget_masks()
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

    def climb(
        self,
        stage: Stage,
        *,
        first: tuple[Evaluation, list[Tensor]] | None = None,
        opened: tuple[Evaluation, list[dict[str, Any]]] | None = None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
        judge: Judge,
        final: bool = False,
    ) -> Evaluation | None:
        """Run the attack's steps on an opened stage, whose blocks then hold the deltas.

        Args:
            stage: opened, and attacking.
            first: evaluation and gradients at the first start, if they are known already.
            opened: an evaluation at the first start with its graph, and the blocks' states.
            generator: of the attack's random numbers.
            scale: factor on the strengths.
            judge: knows the labels and the clean outputs.
            final: evaluate the deltas that are returned.

        Returns:
            Evaluation of the final deltas (None unless asked for).
        """
        track = self.keep == "best" or self.restarts > 1
        best: Best | None = None
        last: Evaluation | None = None
        for restart in range(self.restarts):
            known = restart == 0
            if known and opened is not None:
                states = opened[1]
            else:
                states = [self.begin(block, scale) for block in stage.blocks]
                for block, state in zip(stage.blocks, states, strict=True):
                    self.start(block, state, generator)
            for number in range(self.steps):
                known = known and number == 0
                at, grads = self.look(
                    stage, judge, first=first if known else None, opened=opened if known else None
                )
                values = self.values_of(stage, judge, at)
                if self.keep == "best":
                    best = better(stage, best, values, at, judge)
                for block, grad, state in zip(stage.blocks, grads, states, strict=True):
                    self.step(block, grad, state, number, values)
            if track or final:
                last = stage.evaluate(grad=False, lookups="detached").detach()
                if track:
                    values = self.values_of(stage, judge, last)
                    best = better(stage, best, values, last, judge)
        if best is not None:
            for block, delta in zip(stage.blocks, best.deltas, strict=True):
                block.set(delta)
            last = best.evaluation
        return last

    def look(
        self,
        stage: Stage,
        judge: Judge,
        *,
        first: tuple[Evaluation, list[Tensor]] | None = None,
        opened: tuple[Evaluation, list[dict[str, Any]]] | None = None,
    ) -> tuple[Evaluation, list[Tensor]]:
        """Evaluate the current deltas, with the gradients there; both detached."""
        if first is not None:
            return first
        at = opened[0] if opened is not None else stage.evaluate(grad=True, lookups="detached")
        grads = stage.gradients(judge.values(at, self.ascend))
        return at.detach(), grads

    def values_of(self, stage: Stage, judge: Judge, at: Evaluation) -> Tensor:
        """What counts for each sample, `[B]`: where samples share a delta, the batch's sum."""
        values = judge.values(at, self.ascend)
        if any(block.coupled for block in stage.blocks):
            return values.sum().expand_as(values)
        return values

    def _resolve(self, value: Strength, block: Block, scale: float) -> float | Tensor:
        return resolve(value, block.base, norm=self.norm, geometry=block.geometry, scale=scale)
