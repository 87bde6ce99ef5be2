"""The base of all criteria, and the criterion that has no goal: a loss as high as can be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType, MemberDescriptorType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from embattle.perturb.evaluation import Evaluation


class Criterion(ABC):
    """What an attack is for.

    Write one of your own by deriving from it: `objective` must be there, `reached` where the attack
    has a goal. A recommendation that is to lose its lead over the runner-up by `gap`:

        class Shrink(eb.Criterion):
            per_sample = ("items",)
            needs_outputs = True

            def __init__(self, items, gap):
                self.items, self.gap = items, gap

            def objective(self, now, clean):
                return eb.losses.margin(now.outputs, self.items)

            def reached(self, now, clean):
                return self.objective(now, clean) > -self.gap

    Attributes:
        per_sample: names of the attributes with one entry for each sample (tensors `[B, ...]`);
            `select` takes rows of them.
        shared: names of the attributes with tensors that are common to all samples.
        needs_outputs: the loss function must return outputs.
        needs_clean: `objective` compares with the clean evaluation, so that it has no gradient
            where nothing is perturbed.
    """

    per_sample: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    needs_outputs: ClassVar[bool] = False
    needs_clean: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        for kind in ("per_sample", "shared"):
            names = getattr(cls, kind)
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise TypeError(
                    f"{cls.__name__}: {kind} must be a tuple of names, got {names!r}; a tuple of "
                    "one name ends with a comma"
                )

    def check(self, clean: Evaluation) -> None:
        """Check shapes, types and values against the first evaluation of a batch.

        Raises:
            TypeError: what is named in `per_sample` is no tensor.
            ValueError: outputs are needed and missing, or what is named in `per_sample` is of
                another number of samples, or on another device.
        """
        who = type(self).__name__
        if self.needs_outputs and clean.outputs is None:
            raise ValueError(
                f"{who}: needs the model's outputs; let loss_fn return "
                "embattle.Evaluation(losses, outputs)"
            )
        for name in self.per_sample:
            value = getattr(self, name)
            if value is None or isinstance(value, (int, float)):
                continue  # one for all samples
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{who}: {name} is named in per_sample and must be a tensor [B, ...], got "
                    f"{type(value).__name__}"
                )
            if value.dim() < 1 or value.shape[0] != clean.batch:
                beside = clean.losses if clean.outputs is None else clean.outputs
                kind = "losses" if clean.outputs is None else "outputs"
                raise ValueError(
                    f"{who}: {name} must have one entry for each of {clean.batch} samples; got "
                    f"{tuple(value.shape)} beside {kind} {tuple(beside.shape)}"  # type: ignore[union-attr]
                )
            if value.device != clean.device:
                raise ValueError(
                    f"{who}: {name} is on {value.device}, what loss_fn returns on {clean.device}; "
                    f"use {name}.to({str(clean.device)!r})"
                )

    @abstractmethod
    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Compute what is ascended, and what iterates are compared by: `[B]`, with a graph."""

    def reached(self, now: Evaluation, clean: Evaluation | None) -> Tensor | None:
        """Return bool `[B]`, True where the goal holds at `now`; None: there is no goal."""
        return None

    def predict(self, outputs: Tensor) -> Tensor | None:
        """Return the predictions that belong in a result; None: it does not know what they are."""
        return None

    def accuracy(self, now: Evaluation) -> Tensor | None:
        """Return the share of right answers over all labels that count, 0-d; None without labels.

        It is NaN where no label counts.
        """
        return None

    def counted(self, evaluation: Evaluation) -> Tensor | None:
        """Return bool `[B]`, True where a sample has a label at all; None: all have."""
        return None

    def select(self, rows: Tensor | slice) -> Criterion:
        """Return the criterion of some of the samples.

        Args:
            rows: int64 `[n]`, their places in the batch; or a slice.

        Raises:
            TypeError: an attribute holds tensors and is not named in `per_sample` or `shared`, or
                one that is named in `per_sample` is no tensor.
        """
        who = type(self).__name__
        chosen = copy(self)
        for name, value in _attributes(self):
            if name in self.shared:
                continue
            if name in self.per_sample:
                if isinstance(value, Tensor) and value.dim() > 0:
                    value = value[rows]
                elif value is not None and not isinstance(value, (int, float)):
                    raise TypeError(
                        f"{who}: {name} is named in per_sample and must be a tensor [B, ...], got "
                        f"{type(value).__name__}"
                    )
            elif isinstance(value, Criterion):
                value = value.select(rows)
            elif _holds_tensors(value):
                raise TypeError(
                    f"{who}: samples leave the batch, and it is not said whether {name!r} has one "
                    f"entry for each. Name it in the class: per_sample = ({name!r},) if it has, "
                    f"shared = ({name!r},) if it belongs to all samples"
                )
            else:
                continue
            object.__setattr__(chosen, name, value)
        return chosen

    def __repr__(self) -> str:
        parts = [f"{name}={_words(value)}" for name, value in vars(self).items()]
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, eq=False, repr=False)
class MaximizeLoss(Criterion):
    """Losses as high as can be: what an attack is for if nothing else is said. It has no goal."""

    def check(self, clean: Evaluation) -> None:
        """Check that there are losses."""
        super().check(clean)
        self.objective(clean, None)

    def objective(self, now: Evaluation, clean: Evaluation | None) -> Tensor:
        """Return the losses."""
        if now.losses is None:
            raise ValueError(
                "MaximizeLoss: needs losses, and loss_fn returned outputs alone; return "
                "embattle.Evaluation(losses, outputs), or give a criterion that needs outputs only"
            )
        return now.losses


def ascended(criterion: Criterion, now: Evaluation, clean: Evaluation | None) -> Tensor:
    """Return `criterion.objective(now, clean)`, checked to be one number for each sample.

    Raises:
        TypeError: it is not a floating-point tensor.
        ValueError: it is not `[B]`.
    """
    value = criterion.objective(now, clean)
    if value is now.losses and value is not None:
        return value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(_returned(criterion, "objective", "a floating-point", now.batch, value))
    if value.shape != (now.batch,):
        raise ValueError(_returned(criterion, "objective", "a", now.batch, value))
    return value


def reached(criterion: Criterion, now: Evaluation, clean: Evaluation | None) -> Tensor | None:
    """Return `criterion.reached(now, clean)`, checked to be one bool for each sample, or None.

    Raises:
        TypeError: it is neither None nor a bool tensor.
        ValueError: it is not `[B]`.
    """
    value = criterion.reached(now, clean)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(_returned(criterion, "reached", "a bool", now.batch, value))
    if value.shape != (now.batch,):
        raise ValueError(_returned(criterion, "reached", "a bool", now.batch, value))
    return value


def required_outputs(who: str, evaluation: Evaluation) -> Tensor:
    """Return the outputs.

    Raises:
        ValueError: the loss function returned none.
    """
    if evaluation.outputs is None:
        raise ValueError(
            f"{who}: needs the model's outputs; let loss_fn return "
            "embattle.Evaluation(losses, outputs)"
        )
    return evaluation.outputs


def integers(who: str, name: str, value: Any) -> Tensor:
    """Check that `value` is a tensor `[B, ...]` of integers or bool; give it as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} must be a tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex():
        raise ValueError(
            f"{who}: {name} must be integers, got {tuple(value.shape)} of {value.dtype}. Class "
            f"numbers: {name}.long(); values of a regression: embattle.Deviate; 0 and 1 for each "
            "of several labels: embattle.MultiLabel"
        )
    if value.dim() < 1:
        raise ValueError(f"{who}: {name} must have one entry for each sample, got a single number")
    # In narrow types a comparison with -100 would wrap around.
    return constant(value.long())


def constant(value: Tensor) -> Tensor:
    """Detach a tensor; of one made in inference mode, return a copy that can be in a graph."""
    if not value.is_inference():
        return value.detach()
    with torch.inference_mode(False):
        return value.clone()


def require(good: Tensor, values: Tensor, message: str) -> None:
    """Raise a ValueError unless all are `good`; on CUDA it is raised later, so that none waits."""
    if good.device.type == "cuda":
        torch._assert_async(good.all(), message)
    elif not good.all():
        raise ValueError(f"{message}; got {values[good.logical_not()][0].item()}")


def any_of(values: Tensor) -> Tensor:
    """Return whether any of a sample's values is True, `[B]`."""
    return values if values.dim() == 1 else values.flatten(1).any(1)


def largest(values: Tensor) -> Tensor:
    """Return the largest of each sample's values, `[B]`."""
    return values if values.dim() == 1 else values.flatten(1).amax(1)


def _attributes(criterion: Criterion) -> Iterator[tuple[str, Any]]:
    # Of the instance, of its slots, and of its classes: a tensor may be in any.
    found: dict[str, Any] = {}
    for kind in reversed(type(criterion).__mro__):
        if kind not in (object, ABC, Criterion):
            found.update({n: v for n, v in vars(kind).items() if not n.startswith("__")})
    for name, value in {**found, **vars(criterion)}.items():
        if isinstance(value, MemberDescriptorType):
            value = getattr(criterion, name, None)
        if not isinstance(value, FunctionType):
            yield name, value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, (type, Criterion)):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_tensors, value))
    return isinstance(value, (Tensor, np.ndarray, Criterion))


def _returned(criterion: Criterion, method: str, kind: str, batch: int, value: Any) -> str:
    got = type(value).__name__
    if isinstance(value, Tensor):
        got = f"{tuple(value.shape)} of {value.dtype}"
    return (
        f"{type(criterion).__name__}: {method} must return {kind} tensor with one entry for each "
        f"sample, [{batch}]; got {got}"
    )


def _words(value: Any) -> str:
    return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
