"""Perturb the output of any embedding module of any model, from a hook that is always there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

Group = Literal["sample", "token"]
Scope = Literal["output", "row"]
Rows = Literal["batch", "table"]
# What a site adds: a tensor, or what makes the perturbed output from the output.
Addition: TypeAlias = Tensor | Callable[[Tensor], Tensor]


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
    offsets: Tensor | None = field(default=None, repr=False)
    key: tuple[object, ...] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # `args` keeps the inputs alive: until then no other tensor can have their address.
        self.key = None if self.compiled else _key(self.args, self.kwargs)

    def repeats(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a later call has the very same inputs, unchanged since (not merely equal)."""
        return self.key is not None and self.key == _key(args, kwargs)


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
        rows: of scope `"row"`: deltas are stored for the distinct rows of the `"batch"` alone, or
            for the whole `"table"`, as APR's authors do. Rows outside the batch have no gradient
            and stay at zero unless the attack starts at random; a `Relative` eps is then measured
            on the whole table.
        model: the model around `module`, needed for attacks in eval mode, and for leaving batch
            norms alone when the model is compiled.

    Raises:
        TypeError: `module` is not a module, or has no weight to take rows from.
        ValueError: unknown group, scope or rows; `rows="table"` without scope `"row"`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        group: Group = "sample",
        scope: Scope = "output",
        rows: Rows = "batch",
        model: nn.Module | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Site: module must be a torch.nn.Module, got {type(module).__name__}")
        if group not in ("sample", "token"):
            raise ValueError(f"Site: group must be 'sample' or 'token', got {group!r}")
        if scope not in ("output", "row"):
            raise ValueError(f"Site: scope must be 'output' or 'row', got {scope!r}")
        if rows not in ("batch", "table"):
            raise ValueError(f"Site: rows must be 'batch' or 'table', got {rows!r}")
        if rows == "table" and scope != "row":
            raise ValueError(f"Site: rows='table' needs scope='row', got scope={scope!r}")
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
        self.rows: Rows = rows
        self.model = model
        self._additions: Sequence[Addition] | None = None
        self._calls: list[Call] | None = None
        self._detach = self._attached = self._graph = False
        self._turn = 0
        self._record: list[Call] | None = None
        self._attach = False
        self._begin: Callable[[Call], Tensor] | None = None
        self._aside: Callable[..., Any] | None = None
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
        what = "output"
        if self.scope == "row":
            what = "all rows" if self.rows == "table" else "rows"
        return f"Site({what} of {type(self.module).__name__}, one ball per {balls})"

    @property
    def busy(self) -> bool:
        """Whether an attack is using the site now."""
        return self._additions is not None or self._record is not None

    def watch(
        self,
        *,
        attach: bool,
        begin: Callable[[Call], Tensor] | None = None,
        graph: bool = False,
        aside: bool = False,
    ) -> list[Call]:
        """Record the calls of the coming forward pass.

        Args:
            attach: give the model leaves instead of the outputs, so that the gradient at zero can
                be asked for there. It then does not reach the module's weights: `Call.source` does.
            begin: gives for each call what is added to its output at once. A compiled model does
                not call it, and stays unperturbed in this pass.
            graph: the pass keeps its graph.
            aside: where the pass is compiled, step out of it at this module, so that what it
                returns and where its gradient is asked are seen: the code before and after is
                compiled apart.
        """
        self._aside = None
        if aside:
            self._aside = torch.compiler.disable(self._open)  # type: ignore[no-untyped-call]
        self._additions, self._record, self._turn = None, [], 0
        self._attach, self._begin, self._graph = attach, begin, graph
        return self._record

    def add(
        self,
        additions: Sequence[Addition],
        calls: list[Call] | None = None,
        *,
        attached: bool = False,
        detach: bool = False,
        graph: bool = False,
    ) -> None:
        """Perturb the output of the i-th call of the coming forward passes by `additions[i]`.

        Args:
            additions: one for each call.
            calls: the opening's calls. Their outputs stand in for those of later calls with the
                very same inputs, and an `nn.Embedding` is not looked up again.
            attached: take the outputs of `calls` attached to the module's weights.
            detach: cut the outputs off the module's weights.
            graph: the passes keep their graphs.
        """
        self._additions, self._calls, self._record, self._turn = additions, calls, None, 0
        self._attached, self._detach, self._graph = attached, detach, graph
        if calls is not None and is_plain(self.module) and "forward" not in self.module.__dict__:
            self.module.forward = self._look_up

    def rest(self) -> None:
        """Leave the module's output alone again."""
        self._additions, self._calls, self._record, self._begin = None, None, None, None
        if self.module.__dict__.get("forward") == self._look_up:
            del self.module.forward

    def _known(
        self, turn: int, args: tuple[Any, ...], kwargs: dict[str, Any], otherwise: Tensor | None
    ) -> Tensor | None:
        """Give the opening's output where this call repeats it."""
        if self._calls is None or not self._calls[turn].repeats(args, kwargs):
            return otherwise
        call = self._calls[turn]
        return call.source if self._attached else call.value.detach()

    def _look_up(self, input: Tensor) -> Tensor:
        """Stand in for the forward method of an `nn.Embedding` while deltas are placed."""
        known = self._known(self._turn % len(self._additions or [0]), (input,), {}, None)
        if known is not None:
            return known
        return nn.Embedding.forward(cast(nn.Embedding, self.module), input)

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
            return self._perturb(turn, additions[turn], args, kwargs, output)
        if self._record is not None:
            if self._aside is not None:
                return self._aside(args, kwargs, output)
            if not torch.compiler.is_compiling():
                return self._open(args, kwargs, output)
            value, offsets = rows_of(output)
            self._record.append(Call(value.detach(), value, True, args, kwargs, offsets))
        return None

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Record a call of the opening pass, and give the model what it goes on with."""
        self._refuse_checkpoints()
        value, offsets = rows_of(output)
        leaf = value.detach()
        if self._attach and self._begin is None:
            leaf.requires_grad_()
        call = Call(leaf, value, False, args, kwargs, offsets)
        cast(list[Call], self._record).append(call)
        if self._begin is not None:
            value = leaf if self._attach else value
            return _with_rows(output, value + self._begin(call).to(value.dtype))
        return _with_rows(output, leaf.clone() if self._attach else value.clone())

    def _perturb(
        self,
        turn: int,
        addition: Addition,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        value, _ = rows_of(output)
        if not torch.compiler.is_compiling():
            self._refuse_checkpoints()
            value = cast(Tensor, self._known(turn, args, kwargs, value))
        if self._detach:
            value = value.detach()
        if not isinstance(addition, Tensor):
            return _with_rows(output, addition(value))
        if value.shape != addition.shape:
            raise RuntimeError(
                f"Site: {type(self.module).__name__} returned shape {tuple(value.shape)} where the "
                f"perturbation has {tuple(addition.shape)}: the loss function must run the "
                "same batch at every call"
            )
        return _with_rows(output, value + addition.to(value.dtype))

    def _refuse_checkpoints(self) -> None:
        """Stop where the module would be run again, unperturbed, in the backward pass."""
        hooks = _saved_tensors_hooks()
        inside = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
        # A reentrant checkpoint runs its segment without a graph, although the pass has one.
        if inside or (self._graph and not torch.is_grad_enabled()):
            raise RuntimeError(
                f"Site: {type(self.module).__name__} is called inside a gradient checkpoint (or "
                "under no_grad), which runs it again in the backward pass, without the "
                "perturbation: put the site's module outside the checkpointed part"
            )


def is_plain(module: nn.Module) -> bool:
    """Whether a module is an `nn.Embedding` whose rows depend on its weight and indices alone."""
    return type(module) is nn.Embedding and module.max_norm is None


def rows_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """Find the embeddings in what a module returned; of a jagged tensor its rows and offsets."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            "Site: the module must return a floating-point tensor, or a tuple that starts with "
            f"one; got {type(value).__name__}"
            + (f" of {value.dtype}" if isinstance(value, Tensor) else "")
        )
    if not value.is_nested:
        return value, None
    if value.layout != torch.jagged:
        raise TypeError("Site: nested tensors must be of layout torch.jagged")
    return value.values(), value.offsets()  # type: ignore[attr-defined]


def _with_rows(output: Any, value: Tensor) -> Any:
    first = output[0] if isinstance(output, (tuple, list)) else output
    if first.is_nested:
        value = torch.nested.nested_tensor_from_jagged(
            value, first.offsets(), first.lengths(), first._ragged_idx
        )
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return type(output)(value, *output[1:])
    if isinstance(output, (tuple, list)):
        return type(output)([value, *output[1:]])
    return value


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...] | None:
    """Tell inputs from any others while they live: address, layout and version of each tensor."""
    found: list[object] = []
    for value in (*args, *kwargs, *kwargs.values()):
        if not isinstance(value, Tensor):
            found.append(value if isinstance(value, (str, int, float)) else id(value))
        elif type(value) is Tensor and not value.is_inference():
            found.append(
                (value.data_ptr(), value.shape, value.stride(), value.dtype, value._version)
            )
        else:
            return None
    return tuple(found)


def _saved_tensors_hooks() -> tuple[Any, Any] | None:
    """Give the saved-tensors hooks in force, where this torch tells."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)
