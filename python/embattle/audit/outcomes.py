"""What attacks achieved on samples, and the worst of several attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.losses import wide
from embattle.tasks.kinds import Kind


@dataclass(frozen=True)
class Attacked:
    """What an attack achieved.

    Attributes:
        outputs: each sample's worst, [N, ...], on the CPU.
        right: whether a sample is still right under the attack, bool [N], on the CPU.
        norms: mean norm of the perturbation that gave each sample's outputs (the attack's norm; of
            the groups that may be moved), [N]; 0 where none did.
        steps: gradient steps made for each sample, int64 [N]. Where samples leave as they fall,
            this says after how many each fell.
        seconds: time it took.
        by: what turned each sample, where an attack is several; "" if nothing did.
    """

    outputs: Tensor
    right: Tensor
    norms: Tensor
    steps: Tensor
    seconds: float = 0.0
    by: tuple[str, ...] = ()

    @property
    def norm(self) -> float:
        """Mean norm of the perturbations that were found; 0 if there are none."""
        moved = self.norms > 0
        return float(self.norms[moved].mean()) if bool(moved.any()) else 0.0

    def first(self, count: int) -> Attacked:
        """The outcome of the first samples."""
        return Attacked(
            self.outputs[:count],
            self.right[:count],
            self.norms[:count],
            self.steps[:count],
            by=self.by[:count],
        )

    @staticmethod
    def clean(outputs: Tensor, right: Tensor) -> Attacked:
        """No attack: outputs [N, ...], and where they are right, bool [N]."""
        norms = torch.zeros_like(right, dtype=torch.float32)
        return Attacked(outputs, right, norms, torch.zeros_like(right, dtype=torch.int64))

    @staticmethod
    def joined(parts: Sequence[Attacked], seconds: float) -> Attacked:
        """The outcomes of several batches, one after the other."""
        outputs, right, norms, steps = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("outputs", "right", "norms", "steps")
        )
        by = tuple(name for part in parts for name in part.by)
        return Attacked(outputs, right, norms, steps, seconds, by)


def worst_of(kind: Kind, labels: Tensor, outcomes: Sequence[Attacked]) -> Attacked:
    """Each sample's worst outcome: a wrong one first, then by the kind's `badness`.

    Args:
        kind: what is predicted.
        labels: [N, ...].
        outcomes: of the same samples, one at least.
    """
    worst = outcomes[0]
    badness = kind.badness(wide(worst.outputs), labels)
    for other in outcomes[1:]:
        found = kind.badness(wide(other.outputs), labels)
        same = worst.right == other.right
        wins = torch.where(same, found > badness, worst.right)
        badness = torch.where(wins, found, badness)
        rows = wins.reshape(-1, *[1] * (worst.outputs.dim() - 1))
        worst = Attacked(
            torch.where(rows, other.outputs, worst.outputs),
            worst.right & other.right,
            torch.where(wins, other.norms, worst.norms),
            worst.steps + other.steps,
            worst.seconds + other.seconds,
        )
    return worst


def success_rate(clean: Tensor, attacked: Tensor) -> float:
    """Share of the samples that are right, bool [N], which an attack turns; 0 if none was right."""
    return int((clean & ~attacked).sum()) / max(1, int(clean.sum()))
