"""The ops with the signatures of embattle.ops, by the CUDA kernels in the emulator."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import emulator_build as build
import torch
from embattle import reference
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_NORMS = {"l1": 1, "l2": 2, "linf": 3}


def compiled() -> Path:
    """The launchers as a module; EMBATTLE_EMULATOR chooses the variant ("watch" or "asan")."""
    variant = os.environ.get("EMBATTLE_EMULATOR", "watch")
    sources = [build.HERE / "bindings.cpp"]
    sources += sorted((build.ROOT / "csrc" / "cuda").glob("*.cu"))
    return build.build("emulated_kernels", sources, variant, module=True)


@cache
def kernels() -> ModuleType:
    """The compiled launchers, loaded."""
    path = compiled()
    spec = importlib.util.spec_from_file_location("emulated_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Call:
    """The arguments of one launch; holds the tensors that they point to."""

    def __init__(self, x: Tensor, norm: str | float, options: dict[str, Any]) -> None:
        self.held: list[Tensor] = []
        self.x = x.contiguous()
        offsets, mask = options.get("offsets"), options.get("mask")
        dim = x.shape[-1] if x.dim() else 1
        rows = math.prod(x.shape[:-1])
        if offsets is not None:
            groups, per_group = len(offsets) - 1, 0
        elif options.get("group", "sample") == "token":
            groups, per_group = rows, 1
        else:
            groups = x.shape[0] if x.dim() > 1 else 1
            per_group = rows // groups if groups else 0
        self.args: dict[str, Any] = {
            "rows": rows,
            "dim": dim,
            "groups": groups,
            "rows_per_group": per_group,
            "offsets": self.address(offsets),
            "mask": self.address(mask),
            "norm": _NORMS[reference._norm_name(norm)],
            "eps": self.strength(options.get("eps", math.inf)),
            "x0": self.pointer(options.get("x0")),
        }
        for name, none in (("lower", -math.inf), ("upper", math.inf)):
            value = options.get(name)
            per_element = value.to(x.dtype) if isinstance(value, Tensor) else None
            self.args[name] = self.pointer(per_element)
            self.args[f"{name}_broadcast"] = per_element is not None and per_element.numel() == 1
            self.args[f"{name}_value"] = float(value) if isinstance(value, (int, float)) else none

    def address(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        self.held.append(t.contiguous())
        return self.held[-1].data_ptr()

    def pointer(self, t: Tensor | None) -> tuple[int, int] | None:
        return None if t is None else (self.address(t), _DTYPES[t.dtype])

    def strength(self, value: float | Tensor) -> Any:
        if not isinstance(value, Tensor):
            return float(value)
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        return (self.address(value), _DTYPES[value.dtype], value.numel() == 1)

    def run(self, name: str, **args: Any) -> None:
        getattr(kernels(), name)({**self.args, **args})


def group_norm(x: Tensor, *, norm: str | float = "l2", **options: Any) -> Tensor:
    call = _Call(x, norm, options)
    wide = x.dtype == torch.float64
    out = torch.full((call.args["groups"],), -7.0, dtype=torch.float64 if wide else torch.float32)
    call.run("group_norm", x=call.pointer(x), out=call.pointer(out))
    return out


def project(delta: Tensor, *, norm: str | float = "l2", **options: Any) -> Tensor:
    call = _Call(delta, norm, options)
    out = torch.full(delta.shape, -7.0, dtype=delta.dtype)
    call.run("project", delta=call.pointer(delta), out=call.pointer(out))
    return out


def _step(call: _Call, delta: Tensor, grad: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    most = options.get("max_groups")
    samples = delta.shape[0] if delta.dim() > 1 else 1
    return {
        "delta": call.pointer(delta),
        "velocity": None,
        "velocity_out": None,
        "grad": call.pointer(grad),
        "step_size": call.strength(options["step_size"]),
        "top": float(options.get("top", 1)),
        "max_groups": -1 if most is None else most,
        "groups_per_sample": call.args["groups"] // max(samples, 1),
        "decay": float(options.get("decay", 0)),
        "apgd": options.get("style", "mi") == "apgd",
        "nonfinite": call.address(options.get("nonfinite")),
    }


def pgd_step(delta: Tensor, grad: Tensor, *, norm: str | float = "l2", **options: Any) -> Tensor:
    call = _Call(delta, norm, options)
    out = torch.full(delta.shape, -7.0, dtype=delta.dtype)
    call.run("pgd_step", **_step(call, delta, grad, options), out=call.pointer(out))
    return out


def pgd_step_(delta: Tensor, grad: Tensor, *, norm: str | float = "l2", **options: Any) -> Tensor:
    """In place; delta is contiguous, and may start anywhere."""
    call = _Call(delta, norm, options)
    where = call.pointer(delta)
    call.run("pgd_step", **{**_step(call, delta, grad, options), "delta": where}, out=where)
    return delta


def momentum_step(
    delta: Tensor, velocity: Tensor, grad: Tensor, *, norm: str | float = "l2", **options: Any
) -> tuple[Tensor, Tensor]:
    call = _Call(delta, norm, options)
    out = torch.full(delta.shape, -7.0, dtype=delta.dtype)
    memory = torch.full(velocity.shape, -7.0, dtype=velocity.dtype)
    args = _step(call, delta, grad, options)
    args["velocity"] = call.pointer(velocity)
    args["velocity_out"] = call.pointer(memory)
    call.run("momentum_step", **args, out=call.pointer(out))
    return out, memory


def _noise(name: str, x: Tensor, norm: str | float, options: dict[str, Any]) -> Tensor:
    if options.get("eps") is None:
        options = {**options, "eps": math.inf}
    call = _Call(x, norm, options)
    key = reference.draw_key(options.get("generator"))
    out = torch.full(x.shape, -7.0, dtype=x.dtype)
    call.run(
        name,
        x=call.pointer(x),
        out=call.pointer(out),
        key=call.address(key),
        key_on_host=bool(x.numel() % 2),
        std=call.strength(options.get("std", 0.0)),
    )
    return out


def random_start(like: Tensor, *, norm: str | float = "l2", **options: Any) -> Tensor:
    return _noise("random_start", like, norm, options)


def gaussian_noise(x: Tensor, *, norm: str | float = "l2", **options: Any) -> Tensor:
    return _noise("gaussian_noise", x, norm, options)


class _Held:
    """Addresses of contiguous tensors, which live as long as this."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def address(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        self.tensors.append(t.contiguous())
        return self.tensors[-1].data_ptr()

    def pointer(self, t: Tensor | None) -> tuple[int, int] | None:
        return None if t is None else (self.address(t), _DTYPES[t.dtype])

    def norms(self, sizes: Sequence[int], inputs: Sequence[Tensor]) -> Tensor:
        return torch.full(sizes, -7.0, dtype=reference._norm_dtype(inputs))


def _list(held: _Held, grads: Sequence[Tensor], sums: Sequence[Tensor | None]) -> list[Any]:
    return [
        (held.pointer(g), math.prod(g.shape[1:]), held.pointer(s))
        for g, s in zip(grads, sums, strict=True)
    ]


def per_sample_norm(grads: Sequence[Tensor]) -> Tensor:
    held = _Held()
    norms = held.norms([len(grads[0])], grads)
    kernels().per_sample_norm(
        {
            "tensors": _list(held, grads, [None] * len(grads)),
            "batch": len(grads[0]),
            "norms": held.pointer(norms),
        }
    )
    return norms


def clip_and_sum(
    grads: Sequence[Tensor],
    *,
    max_norm: float | Sequence[float],
    mode: str = "flat",
    weights: Tensor | None = None,
    gamma: float = 0.01,
) -> tuple[list[Tensor], Tensor]:
    held = _Held()
    sums = [torch.full(g.shape[1:], -7.0, dtype=g.dtype) for g in grads]
    each = mode == "per_layer"
    bounds = [max_norm] if isinstance(max_norm, (int, float)) else list(max_norm)
    if each and len(bounds) == 1:
        bounds *= len(grads)
    norms = held.norms([len(grads[0]), *([len(grads)] if each else [])], grads)
    kernels().clip_and_sum(
        {
            "tensors": _list(held, grads, sums),
            "batch": len(grads[0]),
            "mode": ["flat", "per_layer", "automatic"].index(mode),
            "max_norm": bounds,
            "gamma": gamma,
            "weights": held.pointer(weights),
            "norms": held.pointer(norms),
        }
    )
    return sums, norms


def linear_grad_norm(
    input: Tensor, grad_output: Tensor, *, bias: bool = False, method: str = "auto"
) -> Tensor:
    held = _Held()
    norms = held.norms([len(input)], [input, grad_output])
    kernels().linear_grad_norm(
        {
            "input": held.pointer(input),
            "grad": held.pointer(grad_output),
            "batch": len(input),
            "tokens": math.prod(input.shape[1:-1]),
            "inputs": input.shape[-1],
            "outputs": grad_output.shape[-1],
            "bias": bias,
            "method": ["auto", "gram", "direct"].index(method),
            "norms": held.pointer(norms),
        }
    )
    return norms


def embedding_grad_norm(
    indices: Tensor,
    grad_output: Tensor,
    *,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    held = _Held()
    batch = len(grad_output)
    norms = held.norms([batch], [grad_output])
    kernels().embedding_grad_norm(
        {
            "indices": held.address(indices),
            "offsets": held.address(offsets),
            "closed": offsets is not None and len(offsets) == batch + 1,
            "count": indices.numel(),
            "batch": batch,
            "tokens": 0 if offsets is not None else math.prod(indices.shape[1:]),
            "dim": grad_output.shape[-1],
            "grad": held.pointer(grad_output),
            "padding": -1 if padding_idx is None else padding_idx,
            "mean": mode == "mean",
            "weights": held.pointer(per_sample_weights),
            "norms": held.pointer(norms),
        }
    )
    return norms


def embedding_perturb(weight: Tensor, indices: Tensor, delta: Tensor, inverse: Tensor) -> Tensor:
    held = _Held()
    out = torch.full((*indices.shape, weight.shape[1]), -7.0, dtype=weight.dtype)
    kernels().embedding_perturb(
        {
            "weight": held.pointer(weight),
            "indices": held.address(indices),
            "delta": held.pointer(delta),
            "inverse": held.address(inverse),
            "count": indices.numel(),
            "dim": weight.shape[1],
            "out": held.pointer(out),
        }
    )
    return out


def embedding_grad_sum(
    indices: Tensor,
    grad_output: Tensor,
    rows: int,
    *,
    weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    padding = -1 if padding_idx is None else padding_idx
    return segment_sum(grad_output, indices, rows, weights, padding)


def segment_sum(
    grad: Tensor, inverse: Tensor, rows: int, weights: Tensor | None = None, padding: int = -1
) -> Tensor:
    """What embedding_grad_sum and the backward of embedding_perturb launch; padding -1: none."""
    held = _Held()
    out = torch.full((rows, grad.shape[-1]), -7.0, dtype=grad.dtype)
    kernels().segment_sum(
        {
            "grad": held.pointer(grad),
            "inverse": held.address(inverse),
            "count": inverse.numel(),
            "dim": grad.shape[-1],
            "rows": rows,
            "weights": held.pointer(weights),
            "tokens": 1 if weights is None else math.prod(inverse.shape[1:]),
            "padding": padding,
            "out": held.pointer(out),
        }
    )
    return out


def rowwise_adagrad_(
    weight: Tensor,
    state: Tensor,
    indices: Tensor,
    grad: Tensor,
    *,
    lr: float,
    eps: float = 1e-8,
    max_norm: float | None = None,
) -> Tensor:
    held = _Held()
    kernels().rowwise_adagrad(
        {
            "weight": held.pointer(weight),
            "state": held.pointer(state),
            "indices": held.address(indices),
            "rows": len(weight),
            "grad": held.pointer(grad),
            "count": indices.numel(),
            "dim": weight.shape[1],
            "lr": lr,
            "eps": eps,
            "max_norm": math.inf if max_norm is None else max_norm,
        }
    )
    return weight
