"""Whether clipped gradients are right: probes that compare them with autograd's.

*Row probe*: with random weights r, one per loss, the gradient of sum_b r_b loss_b at a layer's
output must be r_b times that of sum_b loss_b in every row of sample b. That tells which dim holds
the samples, whatever the sizes, and that no loss reaches another sample's rows.

*Linear probe*: the weighted sums S(r) that the rules make, without clipping, must equal autograd's
gradient of sum_b r_b loss_b, parameter by parameter.

*One-hot probe*: the norm of S(e_b), which the sums' path gives for one random sample or user b,
must equal the norm that the norms' path gives.

Differences are relative to the size of what was summed, not of the sum, which may cancel.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle.clipping.context import Layout, tolerance
from embattle.clipping.grad_sample import GradSample
from embattle.clipping.graph import Entries, Record
from embattle.clipping.norms import Named, weighted_gradient
from embattle.clipping.users import Users

Of: TypeAlias = dict[Parameter, list[GradSample]]
Verify = Literal["always", "sampled", "first"]
# One in so many steps is checked, and how often a structure is again where zeros hid something.
SHARE = 80
_AGAIN = 16
# Differences below this part of the largest gradient are rounding, relative to the tolerance.
_FLOOR = 1e-3
_KNOWN = 4096


@dataclass
class Known:
    """What checks have found out about graphs of one signature.

    Attributes:
        fits: for each entry the layouts that have fitted every time, the likeliest first; none
            where it has had no gradient.
        seen: for each entry [B, K], which rows of its samples have had one.
        done: whether every row has had a gradient, and no other layout fits.
        unsteady: whether no layout has fitted every time, so that each pass must be checked.
    """

    fits: list[list[Layout]] = field(default_factory=list)
    seen: list[Tensor | None] = field(default_factory=list)
    done: bool = False
    unsteady: bool = False

    @property
    def layouts(self) -> list[Layout | None]:
        """Each entry's, or None where it has had no gradient."""
        return [fits[0] if fits else None for fits in self.fits]


class Verifier:
    """Decides when to check, and remembers what checks have found out."""

    def __init__(self, verify: Verify) -> None:
        """As PerSampleClipper's verify says."""
        self.verify = verify
        self._random = random.Random(0)
        self._known: dict[object, Known] = {}
        self._again: dict[object, int] = {}

    def known(self, signature: object, structure: object) -> tuple[Known, bool]:
        """What is known of a graph, and whether it must be checked now."""
        chosen = self.chosen()
        found = self._known.get(signature)
        if found is None:
            return Known(), True
        if found.unsteady:
            return found, True
        again = self._again.get(structure, 0)
        if not found.done and again < _AGAIN:
            self._again[structure] = again + 1
            return found, True
        return found, chosen

    def chosen(self) -> bool:
        """Whether something is checked that need not be."""
        if self.verify == "sampled":
            return self._random.random() < 1 / SHARE
        return self.verify == "always"

    def weights(self, like: Tensor) -> Tensor:
        """r: random weights of losses."""
        generator = torch.Generator().manual_seed(self._random.getrandbits(62))
        draw = torch.randn(like.shape, dtype=torch.float64, generator=generator)
        return draw.to(like.device)

    def choose(self, count: int) -> int:
        """A random sample or user."""
        return self._random.randrange(count)

    def remember(self, signature: object, found: Known) -> None:
        """Keeps what a check that passed has found out."""
        before = self._known.get(signature)
        if found.done:
            return
        if before is not None and len(before.fits) == len(found.fits):
            found.unsteady = before.unsteady
            for i, (old, new) in enumerate(zip(before.fits, found.fits, strict=True)):
                both = [layout for layout in new if layout in old]
                found.unsteady |= bool(old and new and not both)
                found.fits[i] = (both or new) if old and new else old or new
            # Where a sample has several rows, all must show at once: losses[mask] shows others
            # each time, until all have been shown and none told apart.
            found.seen = [
                old | new
                if old is not None and new is not None and new.shape[1] == old.shape[1] == 1
                else new
                for old, new in zip(before.seen, found.seen, strict=True)
            ]
        found.done = (
            not found.unsteady
            and all(len(fits) < 2 for fits in found.fits)
            and all(seen is None or bool(seen.all()) for seen in found.seen)
        )
        if len(self._known) > _KNOWN:
            self._known.clear()
        self._known[signature] = found


def _fitting(
    grad: Tensor, probed: Tensor, same_dims: Sequence[Layout], r: Tensor, limit: float, finite: bool
) -> list[Layout]:
    """The layouts for which probed is grad with each row times its sample's weight."""
    first, last, _ = same_dims[0]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if not finite:
        known, dtype = grad.isfinite() & probed.isfinite(), torch.float64
        grad, probed = grad.where(known, 0), probed.where(known, 0)
    grad, probed = (
        x.flatten(first, last).movedim(first, 0).unsqueeze(-1).flatten(1).to(dtype)
        for x in (grad, probed)
    )
    weights = r.to(dtype)
    if not grad.numel():
        return list(same_dims)
    largest = torch.linalg.vector_norm(grad, math.inf)
    bound = limit * largest * weights.abs().amax()

    def differs(layout: Layout) -> Tensor:
        factor = layout.of_samples(weights, len(grad))[:, None]
        away = torch.addcmul(probed, grad, factor, value=-1)
        found: Tensor = torch.linalg.vector_norm(away, math.inf)
        return found

    if len(same_dims) == 1:
        return [x for x in same_dims if bool(differs(x) <= bound)]
    # For each row by itself first: the weight that it seems to have had.
    squares, products = grad.square().sum(1), (grad * probed).sum(1)
    sizes = squares.sqrt() * math.sqrt(max(grad.shape[1], 1)) * bound
    fits = []
    for layout in same_dims:
        factor = layout.of_samples(weights, len(grad))
        if not bool(((products - factor * squares).abs() <= sizes * 1.01).all()):
            continue
        if bool(differs(layout) <= bound):
            fits.append(layout)
    return fits


def precision(named: Named, entries: Entries, losses: Tensor) -> float:
    """How far rounding may take the probes' two sides apart: that of the least exact dtype."""
    dtypes = {losses.dtype, *(p.dtype for _, p in named)}
    dtypes |= {grad.dtype for _, grad in entries if grad is not None}
    return max(map(tolerance, dtypes))


def find_layouts(entries: Entries, probed: Entries, r: Tensor, limit: float, finite: bool) -> Known:
    """The row probe: each entry's layout.

    Args:
        entries: gradients of sum_b loss_b, a record's each.
        probed: the same of sum_b r_b loss_b.
        r: [B].
        limit: see `precision`.
        finite: whether the gradients are; what is not is left out.

    Raises:
        ValueError: naming the first layer for which no layout fits.
    """
    samples = len(r)
    found = Known()
    if len(entries) != len(probed):
        raise RuntimeError(
            "PerSampleClipper: two backward passes through the losses' graph found different "
            "layers; a checkpointed part must compute the same each time"
        )
    for (record, grad), (_, other) in zip(entries, probed, strict=True):
        if grad is None or other is None:
            found.fits.append([])
            found.seen.append(None)
            continue
        whole, wanted = record.shaped(grad), record.shaped(other)
        candidates = record.layouts(whole, samples)
        fits = [x for same in candidates for x in _fitting(whole, wanted, same, r, limit, finite)]
        if not fits:
            raise _no_layout(record, whole, candidates, samples)
        # Several fit while zeros hide the difference; for this batch they are then all right.
        found.fits.append(fits)
        found.seen.append((fits[0].to_front(whole, samples)[..., None].flatten(2) != 0).any(2))
    return found


def _no_layout(
    record: Record, grad: Tensor, candidates: Sequence[object], samples: int
) -> ValueError:
    name, kind = record.layer.name, type(record.layer.module).__name__
    if not candidates:
        return ValueError(
            f"PerSampleClipper: no dim of the output of layer '{name}' ({kind}), of shape "
            f"{tuple(grad.shape)}, holds a row for each of the {samples} losses. Name the layer in "
            "broadcast if its input is the same for all samples; give backward one loss for each "
            "sample that the model has seen, and leave samples out by weights="
        )
    return ValueError(
        f"PerSampleClipper: in layer '{name}' ({kind}) the losses of some samples depend on the "
        f"rows of other samples, in whatever dim of its output {tuple(grad.shape)} the "
        f"{samples} samples are taken to be, so there are no per-sample gradients. Batch "
        "statistics, in-batch negatives, sorting and listwise losses couple samples; losses[mask] "
        "leaves samples out (use weights=); a layer whose input is the same for all samples "
        "(positions) needs broadcast=[name]"
    )


def check_sums(
    named: Named, of: Of, truth: Sequence[Tensor | None], r: Tensor, limit: float
) -> float:
    """The linear probe.

    Args:
        named: the trained parameters.
        of: their grad samples; left as they are.
        truth: for each parameter, autograd's gradient of sum_b r_b loss_b.
        r: [B].
        limit: see `precision`.

    Returns:
        The largest size of a sum.

    Raises:
        RuntimeError: naming the first parameter whose sum differs.
    """
    sizes = [_size(of.get(p, []), r) for _, p in named]
    largest = max(sizes, default=0.0)
    for (name, p), size, wanted in zip(named, sizes, truth, strict=True):
        away = _distance(_weighted(of.get(p, []), r, p), wanted)
        if not away <= limit * max(size, _FLOOR * largest):
            raise RuntimeError(
                f"PerSampleClipper: the per-sample gradients of parameter '{name}' do not add up "
                f"to autograd's gradient: they are {away:.3g} apart, of {size:.3g}. Either the "
                "losses of some samples depend on the rows of other samples in this batch, as "
                "sorting has it, or a use of the parameter is missing or not what its layer's rule "
                "takes it for: rewrite that use with plain layers, or freeze the parameter"
            )
    return largest


def check_norms(
    named: Named, of: Of, users: Users, norms: Tensor, user: int, limit: float, largest: float
) -> None:
    """The one-hot probe.

    Args:
        named: the trained parameters.
        of: their grad samples; left as they are.
        users: the samples' users.
        norms: [U], or [U, parameters].
        user: the sample or user to look at.
        limit: see `precision`.
        largest: the size of the gradients.

    Raises:
        RuntimeError: the norm is not that of the gradient.
    """
    if users.of_sample is None or users.weights is None:
        rows = torch.tensor([user], device=norms.device)
        factor = torch.ones(1, dtype=torch.float64, device=norms.device)
    else:
        rows = (users.of_sample == user).nonzero().flatten()
        factor = users.weights[rows]
    wanted, sizes = [], []
    for _, p in named:
        own: list[GradSample] = [each.select(rows) for each in of.get(p, [])]
        gradient = _weighted(own, factor, p)
        wanted.append(0.0 if gradient is None else _norm(gradient))
        sizes.append(_size(own, factor))
    found = norms[user].reshape(-1).tolist()
    names = [f" '{name}'" for name, _ in named]
    if norms.dim() == 1:
        wanted, sizes, names = [math.hypot(*wanted)], [math.hypot(*sizes)], ["s"]
    for norm, exact, size, name in zip(found, wanted, sizes, names, strict=True):
        if not abs(norm - exact) <= limit * max(size, _FLOOR * largest):
            raise RuntimeError(
                f"PerSampleClipper: the norm {norm:.6g} of a sample's gradient of the parameter"
                f"{name} is not that of the gradient itself, {exact:.6g}. This is a defect of the "
                "rules for the layers that use it: freeze it (mode='per_layer' tells which), and "
                "please report it"
            )


def _weighted(own: list[GradSample], factor: Tensor, p: Parameter) -> Tensor | None:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return weighted_gradient(own, factor.to(dtype), p) if own else None


def _size(own: list[GradSample], factor: Tensor) -> float:
    """The root of the summed squares of what the weighted gradient sums."""
    if not own:
        return 0.0
    squares = torch.stack([each.squared_size() for each in own]).sum(0)
    return float((factor.square() * squares).sum().sqrt())


def _norm(x: Tensor) -> float:
    return float((x.coalesce().values() if x.is_sparse else x).double().norm())


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else _norm(a if b is None else b)  # type: ignore[arg-type]
    if a.is_sparse != b.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    return _norm(a - b)
