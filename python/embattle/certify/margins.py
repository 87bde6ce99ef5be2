"""The worst margin between two items of an inner-product ranker whose vectors may move.

User u scores item i by `<u, i> + b_i`. The attacker moves u by at most `a`, i by at most `e_i` and
another item j by at most `e_j`, each in the l2 norm. Whatever she makes of u, her best answers at
the items are against and along it, so with `v = i - j`, `w = <u, v>` and `c = e_i + e_j` the worst
margin is

    m = min { <x, y> : |x - u| <= a, |y - v| <= c } + b_i - b_j.

This has two quadratic constraints on the columns of a matrix with d rows, for which Lagrangian
duality is exact where d >= 2 (Beck, "Quadratic matrix programming", SIAM J. Optim. 17(4), 2007).
With multipliers p and q of the two balls the dual function is

    w - p a^2 - q c^2 - (q |v|^2 - w + p |u|^2) / (4 p q - 1),    4 p q > 1.

The best p / q for a given product is known in closed form; with `s = 1 / (4 p q - 1)` what is left
is one number:

    m - (b_i - b_j) = max (1 + s) w - sqrt((1 + s) (a^2 + s |u|^2) (c^2 + s |v|^2) / s)   over s > 0

Any s gives a lower bound, whether or not it is the best one: a search that stops early is loose,
never wrong. As the dual is concave, what is maximised has one hill. Without biases and with
a < |u|, c < |v| the sign alone is plain geometry: the margin is positive where the angles between
u and v, of asin(a / |u|) and of asin(c / |v|) add up to less than 90 degrees.

The often quoted `w - a |v| - c |u| - a c` lets u move against v and v against u at once, each with
all its strength. It is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embattle import checks

# The interval in which the best s lies is halved so often; 2^-50 of it, in logarithms, is left.
_HALVINGS = 50
# Where the best s is at infinity (vectors that are parallel, and may nearly vanish) it is this.
_LARGEST = 1e6
_TINY = 1e-300


@dataclass(frozen=True)
class Balls:
    """How far each vector may move, in the l2 norm; 0 where it may not.

    Attributes:
        user: the user's vector.
        item: the vector of the item that should be recommended.
        others: the vector of each other item, one as far as any other.
    """

    user: float
    item: float
    others: float

    def __post_init__(self) -> None:
        for name in ("user", "item", "others"):
            value = checks.real("Balls", name, getattr(self, name), 0)
            object.__setattr__(self, name, float(value))

    @property
    def items(self) -> float:
        """How far the difference of two items may move."""
        return self.item + self.others


def worst_margin(
    users: Tensor,
    items: Tensor,
    others: Tensor,
    balls: Balls,
    *,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Give the least score of an item above another's, exact up to float64's rounding.

    It is rounded down, by some 1e-14 of `(|u| + a) (|v| + c)`: what is returned is never more than
    the true worst margin. In one dimension it is a lower bound, not always attained.

    Args:
        users, items, others: `[..., d]`, shapes that broadcast.
        balls: how far they may move.
        bias: what is added to the margin, `b_i - b_j`; it does not move.

    Returns:
        `[...]` float64.

    Raises:
        ValueError: no floating point, or shapes that do not fit.
    """
    for name, vectors in (("users", users), ("items", items), ("others", others)):
        if not vectors.is_floating_point() or vectors.dim() < 1:
            raise ValueError(
                f"worst_margin: {name} must be floating-point vectors [..., d]; got "
                f"{vectors.dtype}, {tuple(vectors.shape)}"
            )
    u = users.double()
    v = items.double() - others.double()
    w = (u * v).sum(-1)
    uu, vv = (part.square().sum(-1).expand_as(w) for part in (u, v))
    off = rounding(u.shape[-1])
    found = lower_bound(w, uu, vv, balls, off)
    size = items.double().norm(dim=-1) + others.double().norm(dim=-1)
    far = (u.norm(dim=-1) + balls.user) * (size + balls.items)
    shift = torch.as_tensor(bias, dtype=torch.float64, device=found.device)
    margin: Tensor = found + shift - off * (far + shift.abs())
    return margin


def rounding(dim: int) -> float:
    """Bound on the relative error of float64 sums over `dim` products, and of what follows here."""
    return (dim + 32) * 2.0**-51


def lower_bound(
    w: Tensor, uu: Tensor, vv: Tensor, balls: Balls, off: float, *, halvings: int = _HALVINGS
) -> Tensor:
    """Give a lower bound of the worst margin without biases, the best one after many halvings.

    Args:
        w: `<u, v>`, float64.
        uu, vv: `|u|^2` and `|v|^2`, of the same shape.
        balls: how far u and v may move.
        off: bound on the relative errors of w (to `|u| |v|`), uu and vv.
        halvings: of the interval in which the best s is sought; 0 takes its first guess.
    """
    a, c = balls.user, balls.items
    u, v = uu.sqrt(), vv.sqrt()
    whole, across = u * v, a * v + c * u
    if a == 0 or c == 0:  # one of them stays, the other one moves against it
        return w - across - off * (whole + across)
    if not halvings:
        # Right in the limit of small balls.
        first = a * c / (whole - across * w / whole.clamp(min=_TINY)).clamp(min=_TINY)
        return _at(first.clamp(max=_LARGEST), w, uu, vv, balls, off)
    low = (a * c / (whole + across).clamp(min=_TINY)).clamp(max=_LARGEST).log()
    high = a * c / (whole - across).clamp(min=_TINY)
    high = high.clamp(max=_LARGEST).log().maximum(low)
    for _ in range(halvings):
        middle = (low + high) / 2
        rising = _rises(middle.exp(), w, uu, vv, balls)
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return _at(low.exp(), w, uu, vv, balls, off)


def _at(s: Tensor, w: Tensor, uu: Tensor, vv: Tensor, balls: Balls, off: float) -> Tensor:
    """What is maximised, at s, rounded down."""
    aa, cc = balls.user**2, balls.items**2
    root = ((1 + s) * (aa + s * uu) * (cc + s * vv) / s).sqrt()
    # The same without a difference of large numbers where w is positive and s large. The errors of
    # both forms are within `off` of the two terms.
    inner = s * (w * w - uu * vv) + (w * w - aa * vv - cc * uu) - aa * cc / s
    apart = (1 + s) * inner / ((1 + s) * w + root).clamp(min=_TINY)
    value = torch.where(w > 0, apart, (1 + s) * w - root)
    return value - off * ((1 + s) * (uu * vv).sqrt() + root)


def _rises(s: Tensor, w: Tensor, uu: Tensor, vv: Tensor, balls: Balls) -> Tensor:
    """Whether what is maximised rises at s."""
    one, two = balls.user**2 + s * uu, balls.items**2 + s * vv
    root = ((1 + s) * one * two / s).sqrt()
    slope: Tensor = w - root / 2 * (1 / (1 + s) + uu / one + vv / two - 1 / s)
    return slope > 0


def first_order_attack(w: Tensor, uu: Tensor, vv: Tensor, balls: Balls) -> Tensor:
    """Give the margin after the user's best first-order step, an upper bound of the worst one.

    The arguments are those of `lower_bound`.
    """
    a, c = balls.user, balls.items
    u = uu.sqrt().clamp(min=_TINY)
    # x = u - a g / |g| with g the gradient of <x, v> - c |x| at u.
    length = (vv - 2 * c * w / u + c * c).clamp(min=0).sqrt().clamp(min=_TINY)
    moved = w - a * (vv - c * w / u) / length
    square = uu + a * a - 2 * a * (w - c * u) / length
    return moved - c * square.clamp(min=0).sqrt()
