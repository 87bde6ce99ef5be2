"""What is known of a model before any attack: its outputs, and how large its embeddings are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embattle import ops
from embattle.audit.evaluation import Sites, device_of, examined, needed
from embattle.data.batch import Batch
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.perturbation import Perturbation, Place
from embattle.perturb.strength import Measured, Relative, To, group_sizes, resolve
from embattle.tasks.evaluator import Evaluator


@dataclass(frozen=True)
class Measurement:
    """A model without attack.

    Attributes:
        outputs: [N, ...], on the CPU.
        unit: what an eps of 1 is, absolute, at each place that is perturbed.
        vector_norm: mean l2 norm of the embeddings that may move.
    """

    outputs: Tensor
    unit: Measured
    vector_norm: float


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    *,
    to: To | None,
    norm: str = "l2",
    evaluator: Evaluator | None = None,
) -> Measurement:
    """Run a model on samples, and measure its embeddings at the sites, in one pass.

    Args:
        model: the model.
        batches: the samples.
        sites: where it will be attacked.
        to: what eps is a multiple of, as `Relative` has it: the mean over all samples, so that
            every sample has the same ball in whatever batch it is attacked. None: 1.
        norm: the ball's.
        evaluator: see `embattle.audit.evaluate`.
    """
    evaluator = evaluator or Evaluator()
    outputs: list[Tensor] = []
    sizes: dict[Place, list[tuple[float, int]]] = {}
    norms: list[Tensor] = []
    with examined(model):
        for batch in batches:
            here = batch.to(device_of(model))

            def run(here: Batch = here) -> object:
                return evaluator.evaluate(model, here)

            attacked = AttackedBatch(run, sites, mask=evaluator.mask(here))  # type: ignore[arg-type]
            with attacked.attacking():
                outputs.append(needed(attacked.record().evaluation.detach().outputs).cpu())
                for perturbation in attacked.perturbations:
                    size = _size(perturbation, to, norm)
                    sizes.setdefault(perturbation.places[0], []).append(size)
                    norms.append(_vector_norms(perturbation))
    unit = {
        place: sum(value * count for value, count in found) / max(1, sum(n for _, n in found))
        for place, found in sizes.items()
    }
    return Measurement(torch.cat(outputs), Measured(unit), float(torch.cat(norms).mean()))


def _size(perturbation: Perturbation, to: To | None, norm: str) -> tuple[float, int]:
    """What an eps of 1 is in this batch, and of how many vectors or groups it is the mean."""
    if to is None:
        return 1.0, 1
    base, geometry = perturbation.base, perturbation.geometry
    radii = torch.as_tensor(resolve(Relative(1.0, to=to), base, norm=norm, geometry=geometry))
    count = int((group_sizes(base, geometry) > 0).sum())
    if to == "token_norm":
        mask = geometry["mask"]
        count = base.shape[:-1].numel() if mask is None else int(mask.sum())
    return float(radii.flatten()[0]) if radii.numel() else 0.0, count


def _vector_norms(perturbation: Perturbation) -> Tensor:
    """The l2 norm of each vector that may move."""
    base, mask = perturbation.base, perturbation.geometry["mask"]
    found = ops.group_norm(base, norm="l2", group="token").flatten().float()
    return (found if mask is None else found[mask.reshape(-1)]).cpu()
