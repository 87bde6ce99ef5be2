"""The one loss protocol: what a loss function returns, wherever the package takes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """The losses and outputs of one pass of a model over a batch.

    Args:
        losses: one loss per sample, `[B]`; None where there are no labels to have a loss from.
        outputs: the model's outputs, samples first: logits `[B, C]`, scores, values.

    Raises:
        TypeError: not tensors, losses that are no floating-point numbers, or neither is given.
        ValueError: losses that are not `[B]`, or outputs of another number of samples.
    """

    losses: Tensor | None = None
    outputs: Tensor | None = None

    def __post_init__(self) -> None:
        losses, outputs = self.losses, self.outputs
        if losses is None and outputs is None:
            raise TypeError("Evaluation: give losses [B], outputs [B, ...], or both")
        if losses is not None:
            if not isinstance(losses, Tensor) or not losses.is_floating_point():
                raise TypeError(f"Evaluation: losses must be floating point, got {_kind(losses)}")
            if losses.dim() != 1:
                raise ValueError(
                    "Evaluation: losses must hold one loss per sample, a tensor [B]; got shape "
                    f"{tuple(losses.shape)}. Use reduction='none' and average over all other dims"
                )
        if outputs is None:
            return
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Evaluation: outputs must be a tensor, got {_kind(outputs)}; give the one that "
                "the criterion is about, such as its logits"
            )
        if outputs.dim() < 1 or (losses is not None and outputs.shape[0] != losses.shape[0]):
            count = "no samples" if losses is None else f"losses {tuple(losses.shape)}"
            raise ValueError(
                f"Evaluation: outputs must have the samples in dim 0; got {tuple(outputs.shape)} "
                f"beside {count}"
            )

    @property
    def batch(self) -> int:
        """The number of samples."""
        return int((self.outputs if self.losses is None else self.losses).shape[0])  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return (self.outputs if self.losses is None else self.losses).device  # type: ignore[union-attr]

    def detach(self) -> Evaluation:
        """Return both, detached from the graph."""
        losses, outputs = self.losses, self.outputs
        return _made(
            None if losses is None else losses.detach(),
            None if outputs is None else outputs.detach(),
        )

    def select(self, rows: Tensor | slice) -> Evaluation:
        """Return some of the samples: `rows` is int64 `[n]`, bool `[B]`, or a slice."""
        losses, outputs = self.losses, self.outputs
        return _made(
            None if losses is None else losses[rows], None if outputs is None else outputs[rows]
        )

    def where(self, rows: Tensor, other: Evaluation) -> Evaluation:
        """Return the samples from here where `rows` (bool `[B]`) is True, else those of `other`."""

        def join(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            if one is None or two is None:
                return None
            return torch.where(rows.reshape(-1, *[1] * (one.dim() - 1)), one, two)

        return Evaluation(join(self.losses, other.losses), join(self.outputs, other.outputs))


LossFn: TypeAlias = Callable[[], "Tensor | Evaluation"]


def call(loss_fn: LossFn) -> Evaluation:
    """Run a loss function: it takes nothing, and returns losses `[B]` or an `Evaluation`.

    Raises:
        TypeError: it returned something else.
        ValueError: not one loss per sample.
    """
    got = loss_fn()
    if isinstance(got, Evaluation):
        return got
    if type(got) is Tensor and got.dim() == 1 and got.is_floating_point():
        return _made(got, None)
    if isinstance(got, Tensor):
        return Evaluation(got)
    hint = ""
    if isinstance(got, tuple):
        hint = "; write embattle.Evaluation(losses, outputs) for both"
    raise TypeError(
        "loss_fn must return losses [B], or an embattle.Evaluation of losses and outputs; got "
        f"{_kind(got)}{hint}"
    )


def _made(losses: Tensor | None, outputs: Tensor | None) -> Evaluation:
    # Nothing is checked again: the attack's loop makes many of these.
    made = object.__new__(Evaluation)
    held = made.__dict__
    held["losses"], held["outputs"] = losses, outputs
    return made


def _kind(value: object) -> str:
    of = f" of {value.dtype}" if isinstance(value, Tensor) else ""
    return type(value).__name__ + of
