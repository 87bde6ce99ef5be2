"""Fake, autograd and vmap rules of the group ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from embattle.ops._rules import outside_autograd, register_fake, register_vmap

_ops = torch.ops.embattle

# ---- Shapes ----


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_DRAWS = ("random_start", "gaussian_noise")

for _name in (
    "pgd_step",
    "pgd_step_plain",
    "project",
    "project_constant",
    "project_plain",
    *_DRAWS,
):

    @register_fake(f"embattle::{_name}", one_device=_name not in _DRAWS)
    def _(x: Tensor, *args: object, **options: object) -> Tensor:
        return _like(x)


for _name in (
    "pgd_step_",
    "pgd_step_plain_",
    "project_",
    "gaussian_noise_",
    "momentum_step_",
):

    @register_fake(f"embattle::{_name}", one_device=_name != "gaussian_noise_")
    def _(x: Tensor, *args: object, **options: object) -> None:
        return None


@register_fake("embattle::momentum_step")
def _(delta: Tensor, velocity: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
    return _like(delta), _like(velocity)


def _groups(x: Tensor, token: bool, offsets: Tensor | None) -> int | torch.SymInt:
    if offsets is not None:
        return offsets.shape[0] - 1
    if token:
        return x.shape[:-1].numel() if x.dim() else 1
    return x.shape[0] if x.dim() > 1 else 1


@register_fake("embattle::group_norm")
def _(
    x: Tensor,
    norm: float = 2.0,
    token: bool = False,
    offsets: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty([_groups(x, token, offsets)], dtype=dtype)


def _named(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """All arguments by name: the dispatcher drops trailing ones that have their default value."""
    arguments = getattr(_ops, op).default._schema.arguments
    return {a.name: args[i] if i < len(args) else a.default_value for i, a in enumerate(arguments)}


# ---- Gradient of the projection ----


class _PerGroup:
    """Sums over groups, and one number per group for every element."""

    def __init__(self, x: Tensor, token: bool, offsets: Tensor | None) -> None:
        self.shape = x.shape
        self.dim = x.shape[-1] if x.dim() else 1
        self.rows = x.numel() // self.dim if self.dim else 0
        self.offsets = offsets
        self.groups = _groups(x, token, offsets)
        if offsets is not None:
            lengths = offsets.diff()
            self.row_group = torch.repeat_interleave(lengths, output_size=self.rows)

    def sum(self, x: Tensor) -> Tensor:
        """``[groups]``."""
        if self.offsets is None:
            return x.reshape(self.groups, -1).sum(1) if x.numel() else x.new_zeros(self.groups)
        per_row = x.reshape(self.rows, self.dim).sum(1)
        return per_row.new_zeros(self.groups).index_add(0, self.row_group, per_row)

    def spread(self, per_group: Tensor) -> Tensor:
        """``[groups]`` to the shape of the tensor."""
        if self.offsets is None:
            wide = per_group[:, None].expand(
                self.groups, self.rows * self.dim // max(self.groups, 1)
            )
            return wide.reshape(self.shape)
        return per_group[self.row_group][:, None].expand(self.rows, self.dim).reshape(self.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    options = _named("project", inputs)
    ctx.norm, ctx.token, ctx.inputs = options["norm"], options["token"], len(inputs)
    ctx.lower, ctx.upper = options["lower"], options["upper"]
    names = ("offsets", "mask", "x0", "lower_per_element", "upper_per_element")
    ctx.save_for_backward(inputs[0], output, *[options[name] for name in names])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The Jacobian of the projection: on the elements that neither vanish nor lie at a bound,
    the identity inside the ball, and outside it what keeps the norm: the part along the sphere
    (l2, shrunk by the same factor), the part along the face (l1), nothing (linf)."""
    delta, output, offsets, mask, x0, lower, upper = ctx.saved_tensors
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    origin = torch.zeros((), dtype=wide, device=delta.device) if x0 is None else x0.to(wide)
    z, p, g = delta.to(wide) - origin, output.to(wide) - origin, grad.to(wide)
    per_group = _PerGroup(delta, ctx.token, offsets)
    free = torch.ones_like(z, dtype=torch.bool)
    if mask is not None:
        free = free & mask[..., None]
    used = free
    for number, bound, beyond in ((ctx.lower, lower, torch.lt), (ctx.upper, upper, torch.gt)):
        if bound is None and number is not None:
            bound = delta.new_tensor(number)
        if bound is not None:
            b = bound.to(delta.dtype).to(wide)
            # Where the origin is outside the box, what the ball makes of z may be, too. The origin
            # and what leads from there to a bound may add up to its neighbour.
            held = beyond(z + origin, b) | beyond(origin, b)
            near = 2 * torch.finfo(wide).eps * (b.abs() + origin.abs())
            free = free & ~(((output.to(wide) - b).abs() <= near) & held)
    if ctx.norm == float("inf"):
        free = free & ((p == z) | (output == delta))
        return (torch.where(free, g, 0.0).to(delta.dtype), *[None] * (ctx.inputs - 1))
    # A group moved by the ball: an element that no bound holds came out elsewhere.
    moved = per_group.spread(per_group.sum((used & free & (p != z)).to(wide)) > 0)
    if ctx.norm == 2:
        square = per_group.sum(torch.where(free, z * z, 0.0))
        along = per_group.sum(torch.where(free, z * g, 0.0))
        factor = (per_group.sum(torch.where(free, p * p, 0.0)) / square).sqrt()
        inner = per_group.spread(torch.where(square > 0, along / square, 0.0))
        outside = per_group.spread(torch.where(square > 0, factor, 0.0)) * (g - z * inner)
    else:
        active = free & (p != 0)
        count = per_group.sum(active.to(wide)).clamp_min(1)
        mean = per_group.spread(per_group.sum(torch.where(active, g * z.sign(), 0.0)) / count)
        outside = torch.where(active, g - z.sign() * mean, 0.0)
    out = torch.where(free, torch.where(moved, outside, g), 0.0)
    return (out.to(delta.dtype), *[None] * (ctx.inputs - 1))


torch.library.register_autograd("embattle::project", _backward, setup_context=_save)


# ---- vmap: the mapped dim joins the samples ----

Out = tuple[Any, Any]


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """[size, ...], whether the tensor is mapped or not."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


class _Merge:
    """Turns the arguments of one mapped call into those of one call on a larger batch."""

    def __init__(self, size: int, x: Tensor, dim: int | None, options: dict[str, Any]) -> None:
        self.size = size
        self.shape = x.shape if dim is None else x.movedim(dim, 0).shape[1:]
        self.rows = self.shape[:-1].numel() if self.shape else 1
        offsets = options.get("offsets")
        if offsets is not None:
            self.groups = offsets.shape[-1] - 1
        elif options["token"]:
            self.groups = self.rows
        else:
            self.groups = self.shape[0] if len(self.shape) > 1 else 1

    def elements(self, x: Tensor, dim: int | None) -> Tensor:
        """A tensor of x's shape; one group without a dim of its own gets one."""
        front = _front(x, dim, self.size)
        if len(self.shape) >= 2:
            return front.reshape(self.size * self.shape[0], *self.shape[1:])
        return front.reshape(self.size, *(self.shape or (1,)))

    def split(self, out: Tensor) -> Tensor:
        """The inverse, of a result."""
        return out.reshape(self.size, *self.shape)

    def option(self, name: str, value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        front = _front(value, dim, self.size)
        if name == "offsets":
            shift = torch.arange(self.size, device=value.device)[:, None] * self.rows
            ends = (front[:, 1:] + shift).reshape(-1)
            return torch.cat([ends.new_zeros(1), ends])
        if name == "mask":
            tail = self.shape[1:-1] if len(self.shape) >= 2 else ()
            return front.reshape(-1, *tail)
        if name.endswith("_per_group"):
            return front.reshape(self.size, -1).expand(self.size, self.groups).reshape(-1)
        if front.dim() - 1 == len(self.shape):
            return self.elements(value, dim)
        if dim is None:
            return value
        bound = front.reshape(self.size, *[1] * len(self.shape))  # one number per slice
        return self.elements(bound.expand(self.size, *self.shape), 0)


def _merged(name: str, tensors: int, written: int) -> Callable[..., Out]:
    """The rule of an op whose first `tensors` arguments have one shape, and of which the first
    `written` are written in place (0: it returns new ones)."""
    # What is constant at this level of torch.func may not be so at the one below.
    op = getattr(_ops, "project" if name.startswith("project_") and not written else name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Out:
        options, dims = _named(name, args), dict.fromkeys(_named(name, args))
        dims.update(zip(options, in_dims, strict=False))
        if options.get("nonfinite") is not None:
            raise NotImplementedError(f"embattle.{name}: nonfinite cannot be counted under vmap")
        merge = _Merge(info.batch_size, args[0], in_dims[0], options)
        inputs = list(options)[:tensors]
        merged = {
            key: merge.elements(value, dims[key])
            if key in inputs
            else merge.option(key, value, dims[key])
            for key, value in options.items()
        }
        out = op(**merged)
        for key in inputs[:written]:
            if dims[key] is None:
                raise ValueError(f"embattle.{name}: {key} is written, and has to be mapped")
            target = options[key].movedim(dims[key], 0)
            if target.data_ptr() != merged[key].data_ptr():
                target.copy_(merge.split(merged[key]))
        if written:
            return None, None
        if isinstance(out, tuple):
            return tuple(merge.split(o) for o in out), (0,) * len(out)
        return merge.split(out), 0

    return rule


def _one_by_one(name: str, written: bool) -> Callable[..., Out]:
    """The rule of an op that draws random numbers: a key of its own, or the same, for every slice,
    as the `randomness` of the vmap has it."""
    op = getattr(_ops, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Out:
        if written and in_dims[0] is None:
            raise ValueError(f"embattle.{name}: x is written, and has to be mapped")
        outs = [
            op(*[a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        return (None, None) if written else (torch.stack(outs), 0)

    return rule


@register_vmap("embattle::group_norm")
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Out:
    options = _named("group_norm", args)
    dims = dict(zip(options, in_dims, strict=False))
    merge = _Merge(info.batch_size, args[0], in_dims[0], options)
    merged = {
        key: merge.elements(value, dims[key])
        if key == "x"
        else merge.option(key, value, dims.get(key))
        for key, value in options.items()
    }
    return _ops.group_norm(**merged).reshape(info.batch_size, merge.groups), 0


for _name, _tensors, _written in (
    ("pgd_step", 2, 0),
    ("pgd_step_plain", 2, 0),
    ("pgd_step_", 2, 1),
    ("pgd_step_plain_", 2, 1),
    ("project", 1, 0),
    ("project_constant", 1, 0),
    ("project_plain", 1, 0),
    ("project_", 1, 1),
    ("momentum_step", 3, 0),
    ("momentum_step_", 3, 2),
):
    register_vmap(f"embattle::{_name}")(_merged(_name, _tensors, _written))
for _name in ("random_start", "gaussian_noise", "gaussian_noise_"):
    register_vmap(f"embattle::{_name}")(_one_by_one(_name, _name.endswith("_")))

outside_autograd(
    "pgd_step",
    "pgd_step_plain",
    "pgd_step_",
    "pgd_step_plain_",
    "project_constant",
    "project_plain",
    "project_",
    "random_start",
    "gaussian_noise",
    "gaussian_noise_",
    "momentum_step",
    "momentum_step_",
    "group_norm",
)
