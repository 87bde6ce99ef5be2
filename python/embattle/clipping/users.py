"""Users: the groups of samples whose joint gradient is clipped as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _join(x: Tensor, samples: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, ...] -> [U, members * T, ...], times scale; exactly zero where scale is."""
    joined = x[samples]
    if x.is_floating_point():
        factor = scale.to(x.dtype).reshape(*scale.shape, *[1] * (x.dim() - 1))
        joined = torch.where(
            factor == 0, torch.zeros((), dtype=x.dtype, device=x.device), joined * factor
        )
    return joined.flatten(1, 2)


class Users:
    """Which samples belong together.

    Without users, every sample is a user of its own. With users, users of similar size (within a
    factor of two) are worked on together, so that a user with many samples does not make the others
    dear.

    Attributes:
        count: number of users.
        of_sample: [B] the user of each sample, or None where every sample is its own.
        weights: [B] the factors of the samples within their user, or None.
        ids: [U] the users' ids, or None.
        left_out: [B] the samples of users whose weight is zero, or None where there are none.
    """

    def __init__(
        self, samples: int, users: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Groups the samples.

        Args:
            samples: number of samples B.
            users: [B] integers, equal for samples of the same user; None: all different.
            weights: [B] factors of the samples, with users only.
        """
        self.count = samples
        self.of_sample: Tensor | None = None
        self.weights: Tensor | None = None
        self.ids: Tensor | None = None
        self.left_out: Tensor | None = None
        self._buckets: list[tuple[Tensor, Tensor, Tensor]] = []
        if users is None:
            return
        self.ids, user, sizes = torch.unique(users, return_inverse=True, return_counts=True)
        self.of_sample = user
        self.count = len(self.ids)
        self.weights = (
            users.new_ones(samples, dtype=torch.float64) if weights is None else weights.double()
        )
        if weights is not None and not bool(weights.all()):
            self.left_out = weights == 0
        order = user.argsort(stable=True)
        start = sizes.cumsum(0) - sizes
        lowest = 0
        largest = int(sizes.max()) if samples else 0
        limit = 1
        while lowest < largest:
            chosen = ((sizes > lowest) & (sizes <= limit)).nonzero().flatten()
            if len(chosen):
                place = torch.arange(int(sizes[chosen].max()), device=users.device)
                inside = place < sizes[chosen, None]
                members = order[(start[chosen, None] + place.where(inside, 0))]
                self._buckets.append((chosen, members, self.weights[members] * inside))
            lowest, limit = limit, 2 * limit

    def gather(
        self, norms: Callable[..., Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Tensor:
        """Norms of users from what the layer saw.

        Args:
            norms: called with the inputs and the gradients, [n, T, ...] each; returns [n].
            inputs: tensors [B, T, ...] of the forward pass.
            grads: tensors [B, T, ...], gradients of outputs: the samples' weights apply to these.

        Returns:
            [U] norms, float64 where users are users, else as they come.
        """
        if self.of_sample is None:
            return norms(*inputs, *grads)
        found = torch.zeros(self.count, dtype=torch.float64, device=grads[0].device)
        for chosen, members, scale in self._buckets:
            present = (scale != 0).double()
            joined = [_join(x, members, present) for x in inputs]
            joined += [_join(grad, members, scale) for grad in grads]
            found[chosen] = norms(*joined).double()
        return found

    def each(self, factor: Tensor) -> Tensor:
        """[U] factors of users -> [B] of each sample's."""
        return factor if self.of_sample is None else factor[self.of_sample]

    def sample_factors(self, factor: Tensor) -> Tensor:
        """[U] factors -> [B] factors of the samples."""
        each = self.each(factor)
        return each if self.weights is None else each * self.weights.to(factor.dtype)
