"""Random numbers by Philox, and what is drawn with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from embattle.ops._arguments import Bound, Group, Norm, Strength
from embattle.ops.reference.groups import norms_of
from embattle.ops.reference.projection import Ball


def draw_key(generator: torch.Generator | None = None) -> Tensor:
    """int64 [2]: the key of one call's random numbers, drawn from the (default CPU) generator."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (2,), generator=generator, device=device)


def philox(key: Tensor, blocks: Tensor, stream: int = 0) -> Tensor:
    """Philox4x32-10: the 32-bit words of blocks [n] as int64 [n, 4] (layout: above)."""
    low = 0xFFFFFFFF
    seed, offset = key.tolist()
    k0, k1 = seed & low, seed >> 32 & low
    c0, c1 = blocks & low, blocks >> 32 & low
    c2 = torch.full_like(blocks, offset & low)
    c3 = torch.full_like(blocks, (offset >> 32 & low) ^ stream << 31)
    for _ in range(10):
        # int64 products wrap around, which leaves all 64 bits of the unsigned product right
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & low ^ c1 ^ k0, p1 & low, p0 >> 32 & low ^ c3 ^ k1, p0 & low
        c0, c2 = c0 & low, c2 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3], 1)


@dataclass(frozen=True)
class Random:
    """The random integers of n elements and float64 [n] functions of them (see above)."""

    m: Tensor
    sign: Tensor
    bits: int

    @staticmethod
    def of(key: Tensor, n: int, dtype: torch.dtype, device: torch.device) -> Random:
        if dtype == torch.float64:
            blocks = torch.arange((n + 1) // 2, device=device)
            high, low = philox(key, blocks).reshape(-1, 2)[:n].unbind(1)
            return Random(high << 21 | low >> 11, 1 - 2 * (low & 1), 53)
        words = philox(key, torch.arange((n + 3) // 4, device=device)).flatten()[:n]
        return Random(words >> 8, 1 - 2 * (words & 1), 24)

    def uniform(self) -> Tensor:
        return self.m.double() * 2.0**-self.bits

    def exponential(self) -> Tensor:
        return -((self.m + 1).double() * 2.0**-self.bits).log()

    def gaussian(self) -> Tensor:
        """For an even n: pairs are drawn whole."""
        radius = (2 * self.exponential()[0::2]).sqrt()
        angle = 2 * math.pi * self.uniform()[1::2]
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()


def gaussian(key: Tensor, like: Tensor) -> Tensor:
    """Standard normal float64 values in the shape of `like`, from the integers of its dtype."""
    n = like.numel()
    return Random.of(key, n + n % 2, like.dtype, like.device).gaussian()[:n].reshape(like.shape)


def random_start(
    like: Tensor,
    *,
    eps: Strength,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A point uniform in each group's ball (then projected on the box, if there is one).

    linf: ``eps * (2 * u - 1)``. l2: gaussians of the group divided by their l2 norm, times the
    group's radius. l1: signed exponentials divided by their l1 norm, times the radius. A direction
    of norm 0 gives 0.

    Args:
        like: gives shape, dtype and device.
        eps, norm, group, offsets, mask, x0, lower, upper: as for :func:`pgd_step`; eps is finite.
        generator: what the numbers are drawn from; the CPU's default generator if None. One seed
            gives the same random integers everywhere, and the same bits for any number of threads.
            Between devices, and between SIMD levels of a CPU, what is computed from the integers
            (logarithms, roots, sines) may differ in the last places.

    Returns:
        Tensor of the shape and dtype of `like`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.

    Source: l1: Barthe et al., "A probabilistic approach to the geometry of the l_p^n-ball" (2005).
    """
    key = draw_key(generator)
    ball = Ball.of(like, eps, norm, group, offsets, mask, x0, lower, upper)
    groups = ball.groups
    draws = Random.of(key, like.numel(), like.dtype, like.device)
    if ball.norm == "linf":
        z = ball.eps * groups.pack((2 * draws.uniform() - 1).reshape(like.shape))
        return ball.finish(z, ball.base)
    if ball.norm == "l2":
        z = groups.pack(gaussian(key, like))
    else:
        z = groups.pack((draws.sign * draws.exponential()).reshape(like.shape))
    high, low = philox(key, torch.arange(len(z), device=z.device), stream=1)[:, :2].unbind(1)
    uniform = ((high << 21 | low >> 11) + 1).double() * 2.0**-53
    count = groups.valid.sum(1).clamp_min(1)
    radius = ball.eps * (uniform ** (1 / count.double()))[:, None]
    length = norms_of(z, ball.norm)
    z = torch.where(ball.eps > 0, z * (radius / torch.where(length > 0, length, 1.0)), 0.0)
    return ball.finish(z, ball.base)


def gaussian_noise(
    x: Tensor,
    *,
    std: Strength,
    eps: Strength | None = None,
    norm: Norm = "l2",
    group: Group = "sample",
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    lower: Bound = None,
    upper: Bound = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``P_eps(x + N(0, std^2))`` in one pass; without `eps`, ``x + N(0, std^2)``.

    As everywhere `x` is a perturbation unless `x0` is given: masked-out rows are zero. To add noise
    to an input and leave masked rows as they are, pass it as `x0` too.

    Args:
        x: what the noise is added to: a perturbation, or a perturbed input where `x0` is given.
        std: standard deviation; a float or one value per group.
        eps: radius of the ball; None for no ball.
        norm, group, offsets, mask, x0, lower, upper: as for :func:`pgd_step`.
        generator: as for :func:`random_start`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: for a wrong shape, dtype or value; the message names the argument.
    """
    key = draw_key(generator)
    radius = math.inf if eps is None else eps
    ball = Ball.of(x, radius, norm, group, offsets, mask, x0, lower, upper)
    noise = ball.groups.column(std) * ball.groups.pack(gaussian(key, x))
    return ball.finish(ball.groups.pack(x) - ball.origin + noise, x)


def gaussian_noise_(x: Tensor, **options: object) -> Tensor:
    """:func:`gaussian_noise` written into x."""
    return x.copy_(gaussian_noise(x, **options))  # type: ignore[arg-type]
