"""The group ops with the signatures of embattle.ops, by the CUDA kernels in the emulator."""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache
from types import ModuleType
from typing import Any

import emulator_build as build
import torch
from embattle import reference
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_NORMS = {"l1": 1, "l2": 2, "linf": 3}
_SOURCES = ["step.cu", "norm.cu", "draw.cu", "momentum.cu"]


@cache
def kernels() -> ModuleType:
    """The compiled launchers; EMBATTLE_EMULATOR chooses the variant ("watch" or "asan")."""
    variant = os.environ.get("EMBATTLE_EMULATOR", "watch")
    sources = [build.HERE / "bindings.cpp"]
    sources += [build.ROOT / "csrc" / "cuda" / name for name in _SOURCES]
    path = build.build("emulated_kernels", sources, variant, module=True)
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
        for name in ("lower", "upper"):
            value = options.get(name)
            broadcast = value is not None and not isinstance(value, Tensor)
            if broadcast:
                value = torch.tensor(value, dtype=x.dtype)
            elif value is not None:
                value = value.to(x.dtype)
            self.args[name] = self.pointer(value)
            self.args[f"{name}_broadcast"] = broadcast

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
    velocity = velocity.to(delta.dtype)
    out = torch.full(delta.shape, -7.0, dtype=delta.dtype)
    memory = out.clone()
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
