"""The reference against mathematics: known answers, optimality, distributions."""

from __future__ import annotations

import math

import pytest
import torch
from embattle import ops, reference
from samples import NORMS
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# Random123's known-answer file, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    key: tuple[int, ...], counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    seeds = torch.tensor([_signed(key[0] | key[1] << 32), _signed(counter[2] | counter[3] << 32)])
    block = torch.tensor([_signed(counter[0] | counter[1] << 32)])
    assert tuple(reference.philox(seeds, block)[0].tolist()) == words


def test_streams_differ_in_the_top_bit_of_the_counter() -> None:
    key = torch.tensor([5, 7])
    other = torch.tensor([5, _signed(7 | 1 << 63)])
    blocks = torch.arange(3)
    assert torch.equal(reference.philox(key, blocks, 1), reference.philox(other, blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_element_i_has_the_same_number_in_a_longer_tensor(dtype: torch.dtype) -> None:
    for draw in (
        lambda n: reference.random_start(
            torch.zeros(n, dtype=dtype),
            eps=1.0,
            norm="linf",
            generator=torch.Generator().manual_seed(3),
        ),
        lambda n: reference.gaussian_noise(
            torch.zeros(n, dtype=dtype), std=1.0, generator=torch.Generator().manual_seed(3)
        ),
    ):
        longer = draw(103)
        for n in (1, 2, 3, 5, 8, 102):
            assert torch.equal(draw(n), longer[:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_moments(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    z = reference.gaussian_noise(torch.zeros(200_000, dtype=dtype), std=1.0, generator=generator)
    z = z.double()
    for power, wanted in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        spread = math.sqrt(z.pow(2 * power).mean() / len(z))
        assert abs(z.pow(power).mean() - wanted) < 4 * spread
    assert abs((z[0::2] * z[1::2]).mean()) < 4 / math.sqrt(len(z) / 2)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_is_uniform_in_the_ball(norm: str) -> None:
    """(||x|| / eps) ** n is uniform in [0, 1], whatever the norm; signs are even."""
    n = 3
    x = reference.random_start(
        torch.zeros(20_000, n), eps=2.0, norm=norm, generator=torch.Generator().manual_seed(0)
    ).double()
    share = (reference.group_norm(x, norm=norm) / 2) ** n
    ordered = share.sort().values
    grid = (torch.arange(len(x)) + 0.5) / len(x)
    assert (ordered - grid).abs().max() < 1.95 / math.sqrt(len(x))  # Kolmogorov-Smirnov, 0.1%
    assert ((x > 0).double().mean(0) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(len(x))
    inner = (x.abs().sum(1) < 1).double().mean()  # the l1 ball's share of the volume is known
    volume = {"l1": 16 / 3 * 2, "l2": 4 / 3 * math.pi * 8, "linf": 64.0}[norm]
    share_of_inner = (8 / 6) / volume
    assert abs(inner - share_of_inner) < 4 * math.sqrt(share_of_inner / len(x))


def _dykstra(v: Tensor, norm: str, eps: float, lower: Tensor, upper: Tensor) -> Tensor:
    """Projection on ball and box by Dykstra's alternating projections (slow, but independent)."""
    x, p, q = v, torch.zeros_like(v), torch.zeros_like(v)
    for _ in range(300):
        y = reference.project(x + p, eps=eps, norm=norm)
        p = x + p - y
        x = (y + q).clamp(lower, upper)
        q = y + q - x
    return x


@pytest.mark.parametrize("norm", NORMS)
def test_ball_and_box(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(5, 7, dtype=torch.float64, generator=g)
    lower = -torch.rand(5, 7, dtype=torch.float64, generator=g)
    upper = torch.rand(5, 7, dtype=torch.float64, generator=g)
    for eps in (0.3, 1.0, 2.0):
        wanted = _dykstra(v, norm, eps, lower, upper)
        result = reference.project(v, eps=eps, norm=norm, lower=lower, upper=upper)
        assert torch.allclose(result, wanted, atol=1e-7)


def test_a_huge_element_reaches_its_bound() -> None:
    x = torch.tensor([[1.3, 3e38, 0.4], [0.4, -1.5, -3e38]])
    found = reference.project(x, eps=1.0, lower=-1.0, upper=1.0)
    assert torch.equal(found, ops.project(x, eps=1.0, lower=-1.0, upper=1.0))
    assert found[0, 1] == -found[1, 2] == 1


def test_an_l1_step_moves_what_is_tiny_beside_the_largest() -> None:
    grad = torch.tensor([[1e300, 1e-300, 0.0]], dtype=torch.float64)
    step = {"step_size": 0.5, "eps": 9.0, "norm": "l1", "top": 3}
    found = reference.pgd_step(torch.zeros_like(grad), grad, **step)
    assert found.tolist() == [[0.25, 0.25, 0.0]]
    assert torch.equal(found, ops.pgd_step(torch.zeros_like(grad), grad, **step))


def test_a_tiny_ball_in_a_box() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    found = reference.project(x, eps=1e-300, lower=-1.0, upper=1.0)
    assert torch.allclose(found * 1e300, torch.tensor([[0.6, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_nearest_point(norm: str) -> None:
    """(v - P(v)) . (y - P(v)) <= 0 for every y of the ball: the projection theorem."""
    g = torch.Generator().manual_seed(1)
    v = 3 * torch.randn(6, 8, dtype=torch.float64, generator=g)
    nearest = reference.project(v, eps=1.0, norm=norm)
    for _ in range(50):
        y = reference.random_start(v, eps=1.0, norm=norm, generator=g)
        y = y / reference.group_norm(y, norm=norm)[:, None]
        assert ((v - nearest) * (y - nearest)).sum(1).max() < 1e-12


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", ["ball", "box", "origin", "ragged"])
def test_project_gradient(norm: str, place: str) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4, 6, dtype=torch.float64, generator=g).requires_grad_()
    options: dict[str, object] = {
        "ball": {},
        "box": {"lower": -0.2, "upper": 0.3},
        "origin": {"x0": torch.rand(4, 6, dtype=torch.float64, generator=g)},
        "ragged": {"offsets": torch.tensor([0, 3, 3, 4])},
    }[place]
    assert torch.autograd.gradcheck(
        lambda x: reference.project(x, eps=0.7, norm=norm, **options), x
    )


def test_l1_projection_does_not_cancel() -> None:
    """The threshold of [1e30, 1] on a ball of radius 0.5 is 1e30 - 0.5, which float64 rounds."""
    x = torch.tensor([[1e30, 1.0], [1.0, 3e30]], dtype=torch.float64)
    wanted = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)
    assert torch.equal(reference.project(x, eps=0.5, norm="l1"), wanted)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_ascent(norm: str) -> None:
    """No direction of the unit ball has a larger inner product with the gradient."""
    g = torch.Generator().manual_seed(3)
    grad = torch.randn(6, 8, dtype=torch.float64, generator=g)
    step = reference.pgd_step(torch.zeros_like(grad), grad, step_size=1.0, eps=math.inf, norm=norm)
    assert torch.allclose(reference.group_norm(step, norm=norm), torch.ones(6).double())
    best = (step * grad).sum(1)
    for _ in range(50):
        y = reference.random_start(grad, eps=1.0, norm=norm, generator=g)
        assert ((y * grad).sum(1) <= best).all()
