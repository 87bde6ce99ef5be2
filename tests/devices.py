"""Where the tensors of the tests live: the device that `pytest --device` names.

Under another device than the CPU every tensor that a test makes, by `torch.randn(...)`, by
`nn.Linear(...)` or in a helper of the tests, is made on the CPU and moved there: tests say nothing
of devices, and the random numbers are those of the CPU. What the package makes stays where the
package puts it: a tensor that it makes on the CPU by mistake meets one of the device, and fails.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import embattle
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_TESTS = str(Path(__file__).resolve().parent) + "/"
_PACKAGE = str(Path(embattle.__file__).resolve().parent) + "/"
_MAKING = _device_constructors() | {torch.normal}
_DRAWING = {Tensor.bernoulli_, Tensor.normal_, Tensor.random_, Tensor.uniform_}

#: Of the device in use: "cpu", "cuda" or "pretend". For what takes the name of a device, such as
#: torch.autocast; tensors need none.
kind = "cpu"


def use(device: str) -> On:
    """From now on tensors are on `device`, until the mode that is returned is left."""
    global kind
    if device == "pretend":
        import pretend

        pretend.set_up()
        device = pretend.NAME
    mode = On(device)
    kind = mode.device.type
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no GPU here")
        torch.backends.cudnn.allow_tf32 = False  # what the tests compare has 24 bits
    return mode.__enter__()


def _asked_by_tests() -> bool:
    """Whether the nearest caller that is of the tests or the package is of the tests."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            return False
        if file.startswith(_TESTS) and file != __file__:
            return True
        frame = frame.f_back
    return False


def _names(device: Any, kind: str) -> bool:
    return device is not None and torch.device(device).type == kind


class On(TorchFunctionMode):
    """Within it, tensors that tests make are on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)  # nobody can be asked who called
        if func in _MAKING and kwargs.get("device") is None and _asked_by_tests():
            made = func(*args, **kwargs)
            return made.detach().to(self.device).requires_grad_(made.requires_grad)
        if func in _DRAWING and args[0].device.type == self.device.type and _asked_by_tests():
            drawn = func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            return args[0].copy_(drawn)
        if func is torch.tensor and _names(kwargs.get("device"), "pretend"):
            # Torch makes no tensor from data on a device of Python's: libraries ask for it by name.
            return func(*args, **kwargs | {"device": "cpu"}).to(self.device)
        return func(*args, **kwargs)
