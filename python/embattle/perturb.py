"""Perturb the output of any embedding module of any model, from a hook that is always there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Group = Literal["sample", "token"]
Scope = Literal["output", "row"]


@dataclass
class Call:
    """One call of a site's module during the forward pass that opens an attack.

    Attributes:
        value: the values of the module's output; a leaf where the gradient at zero will be asked
            for. The model goes on with a copy, which it may change in place.
        source: the module's output, attached to its weights.
        args: the module's positional arguments (row scope reads the indices from them).
        kwargs: the module's keyword arguments.
        compiled: the call was traced by `torch.compile`: no gradient can be asked at `value`.
    """

    value: Tensor
    source: Tensor
    compiled: bool = False
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: dict[str, Any] = field(default_factory=dict, repr=False)


class Site:
    """A place where a model can be perturbed: the output of one module.

    The site is a forward hook that stays on the module and does nothing until an attack uses it.
    Create it *before* `torch.compile`: a hook that comes later is silently ignored there.

    Args:
        module: any module that returns a floating-point tensor (or a tuple that starts with one),
            or a Hugging Face model, of which the input embeddings are taken.
        group: what has a ball of its own: `"sample"` (everything of one sample, dim 0) or
            `"token"` (every vector of the last dim).
        scope: `"output"` perturbs what the module returns; `"row"` perturbs rows of the embedding
            table: a row has the same delta wherever it occurs in the batch, and a ball of its own.
            Deltas are stored for the distinct rows of the batch alone.
        model: the model around `module`, needed for attacks in eval mode, and for leaving batch
            norms alone when the model is compiled.

    Raises:
        TypeError: `module` is not a module, or has no weight to take rows from.
        ValueError: unknown group or scope.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        group: Group = "sample",
        scope: Scope = "output",
        model: nn.Module | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Site: module must be a torch.nn.Module, got {type(module).__name__}")
        if group not in ("sample", "token"):
            raise ValueError(f"Site: group must be 'sample' or 'token', got {group!r}")
        if scope not in ("output", "row"):
            raise ValueError(f"Site: scope must be 'output' or 'row', got {scope!r}")
        getter = getattr(module, "get_input_embeddings", None)
        if callable(getter):
            model = module if model is None else model
            module = getter()
        if scope == "row" and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise TypeError(
                f"Site: scope='row' needs an nn.Embedding or nn.EmbeddingBag, got "
                f"{type(module).__name__}; use scope='output'"
            )
        if isinstance(module, nn.EmbeddingBag) and scope == "row" and module.mode == "max":
            raise ValueError("Site: scope='row' needs a bag of mode 'sum' or 'mean', got 'max'")
        self.module = module
        self.group: Group = "token" if scope == "row" else group
        self.scope: Scope = scope
        self.model = model
        self._additions: list[Tensor] | None = None
        self._bases: list[Tensor] | None = None
        self._detach = False
        self._turn = 0
        self._record: list[Call] | None = None
        self._attach = False
        self._begin: Callable[[Tensor], Tensor] | None = None
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the module. The site cannot be used afterwards."""
        self._handle.remove()

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        balls = "row" if self.scope == "row" else self.group
        what = "rows" if self.scope == "row" else "output"
        return f"Site({what} of {type(self.module).__name__}, one ball per {balls})"

    @property
    def busy(self) -> bool:
        """Whether an attack is using the site now."""
        return self._additions is not None or self._record is not None

    def watch(self, *, attach: bool, begin: Callable[[Tensor], Tensor] | None = None) -> list[Call]:
        """Record the calls of the coming forward pass.

        Args:
            attach: give the model leaves instead of the outputs, so that the gradient at zero can
                be asked for there. It then does not reach the module's weights: `Call.source` does.
            begin: gives for each output what is added to it at once. A compiled model does not
                call it, and stays unperturbed in this pass.
        """
        self._additions, self._record, self._turn = None, [], 0
        self._attach, self._begin = attach, begin
        return self._record

    def add(
        self,
        additions: list[Tensor],
        bases: list[Tensor] | None = None,
        *,
        detach: bool = False,
    ) -> None:
        """Add `additions[i]` to the output of the i-th call of the coming forward passes.

        Args:
            additions: one tensor for each call.
            bases: what they are added to, in place of the outputs.
            detach: cut the outputs off the module's weights.
        """
        self._additions, self._bases, self._record, self._turn = additions, bases, None, 0
        self._detach = detach

    def rest(self) -> None:
        """Leave the module's output alone again."""
        self._additions, self._bases, self._record, self._begin = None, None, None, None

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        additions = self._additions
        if additions is not None:
            # The counter is left alone for a single call: a compiled model would guard on it.
            turn = 0
            if len(additions) > 1:
                turn = self._turn % len(additions)
                self._turn += 1
            addition = additions[turn]
            value = first_tensor(output) if self._bases is None else self._bases[turn]
            if self._detach:
                value = value.detach()
            if value.shape != addition.shape:
                raise RuntimeError(
                    f"Site: {type(module).__name__} returned shape {tuple(value.shape)} where the "
                    f"perturbation has {tuple(addition.shape)}: the loss function must run the "
                    "same batch at every call"
                )
            return _with_first(output, value + addition.to(value.dtype))
        if self._record is not None:
            value = first_tensor(output)
            if torch.compiler.is_compiling():
                self._record.append(Call(value.detach(), value, True, args, kwargs))
                return None
            if self._begin is not None:
                self._record.append(Call(value.detach(), value, False, args, kwargs))
                value = value.detach() if self._attach else value
                return _with_first(output, value + self._begin(value).to(value.dtype))
            leaf = value.detach()
            if self._attach:
                leaf.requires_grad_()
            self._record.append(Call(leaf, value, False, args, kwargs))
            return _with_first(output, leaf.clone() if self._attach else value.clone())
        return None


def first_tensor(output: Any) -> Tensor:
    """Find the embeddings in what a module returned."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            "Site: the module must return a floating-point tensor, or a tuple that starts with "
            f"one; got {type(value).__name__}"
            + (f" of {value.dtype}" if isinstance(value, Tensor) else "")
        )
    return value


def _with_first(output: Any, value: Tensor) -> Any:
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return type(output)(value, *output[1:])
    if isinstance(output, (tuple, list)):
        return type(output)([value, *output[1:]])
    return value
