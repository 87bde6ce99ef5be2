"""The losses' graph: which applications of parameters it holds, and their outputs' gradients.

A layer runs torch's own operator on its parameter and leaves a `Record` with the operator's node in
the graph, where it lives as long as the node. A backward pass finds the records that the losses
reach and asks autograd for the gradients of their outputs, all at once: no code of ours runs in the
pass, and no gradient of a weight is computed. Where the graph holds a parameter below no record,
the parameter was used where it cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter

from embattle.clipping.context import Context, Layout, body_of, layouts

if TYPE_CHECKING:
    from embattle.clipping.grad_sample import GradSample
    from embattle.clipping.layers import Layer

_grad, _backward = body_of(torch.autograd.grad), body_of(torch.autograd.backward)
# Names a record in a node's metadata.
_KEY = "_embattle_clipping"
_NOTHING: AbstractContextManager[None] = nullcontext()
# Takes in the per-sample gradient of a parameter.
Add = Callable[[Parameter, "GradSample"], None]


class Record:
    """One application of parameters to an input; subclasses know what follows for the parameters.

    Attributes:
        layer: where it happened.
        x: the input; None once it is not needed any more.
        inputs: what the operator was given beside the trained parameters: there the graph goes on.
        spread_dim: where x has been given a row for every sample, or None.
    """

    __slots__ = ("__weakref__", "inputs", "layer", "spread_dim", "version", "x")

    def __init__(self, layer: Layer, x: Tensor, *inputs: Tensor | None) -> None:
        self.layer = layer
        self.x: Tensor | None = x
        self.inputs = [t for t in (x, *inputs) if t is not None and t.requires_grad]
        self.version = x._version
        self.spread_dim, layer.spread_dim = layer.spread_dim, None

    @property
    def size(self) -> object:
        """What says how large the output is; another one is another graph."""
        return None if self.x is None else self.x.shape

    def shaped(self, grad: Tensor) -> Tensor:
        """The gradient of the output in the shape that `sample_dims` speaks of."""
        return grad

    def sample_dims(self, dims: int) -> Sequence[int]:
        """Which dims of the shaped gradient may hold the samples."""
        raise NotImplementedError

    def deliver(self, add: Add, grad: Tensor, layout: Layout, samples: int) -> None:
        """Tells the parameters' per-sample gradients, given the shaped gradient of the output."""
        raise NotImplementedError

    def layouts(self, grad: Tensor, samples: int) -> list[list[Layout]]:
        """Those that the sizes allow, the likeliest first, those of the same dims together."""
        dims = self.sample_dims(grad.dim()) if self.spread_dim is None else [self.spread_dim]
        own = self.layer.batch_dim
        return layouts(grad.shape, sorted(dims, key=lambda dim: dim != own), samples)

    def checked_input(self) -> Tensor:
        """The input.

        Raises:
            RuntimeError: it was overwritten, or let go of in an earlier backward pass.
        """
        x = self.x
        if x is None:
            raise RuntimeError(
                f"PerSampleClipper: layer '{self.layer.name}' is in a graph that has had its "
                "backward pass; give that one retain_graph=True"
            )
        if x._version != self.version:
            raise RuntimeError(
                f"PerSampleClipper: the input of layer '{self.layer.name}', of shape "
                f"{tuple(x.shape)}, was modified by an inplace operation before its gradient "
                "was computed"
            )
        return x.detach() if x.requires_grad else x


def _metadata(node: Any) -> dict[str, Any]:
    found: dict[str, Any] = node.metadata  # which torch's stub takes for a method
    return found


def note(out: Tensor, record: Record) -> None:
    """Leaves record with out's node; out must be the operator's own result, not a view of it."""
    node, context = out.grad_fn, record.layer.context
    if node is None:
        context.ran_without_grad = True
        return
    _metadata(node)[_KEY] = record
    if context.backward:
        # A recomputation in the backward pass. Reentrant checkpointing differentiates it right
        # away; anybody else has the gradient of the first computation's output.
        node.register_prehook(partial(_collect, record))


def _collect(record: Record, grads: Sequence[Tensor | None]) -> None:
    collected = record.layer.context.collected
    if collected is not None and grads[0] is not None:
        collected.append((record, grads[0]))


Entries = list[tuple[Record, Tensor | None]]


class Graph:
    """What a graph holds, found by a walk from its end.

    Attributes:
        records: the nodes with a record of the context, and the records.
        stray: a parameter that the graph holds below no record, or None.
        leaves: the nodes of the other leaves.
        nested: whether a backward pass through the graph may start others whose outputs it cannot
            know of: torch.utils.checkpoint with use_reentrant=True.
        structure: a hash of the nodes' kinds, the dims that they work on, and the records' layers.
        signature: the same with the records' sizes.
    """

    def __init__(self, root: Node | None, context: Context) -> None:
        self.context = context
        self.records: list[tuple[Node, Record]] = []
        self.stray: Parameter | None = None
        self.leaves: list[Any] = []
        found = set() if root is None else {root}
        stack = list(found)
        kinds: list[object] = []
        sizes: list[object] = []
        while stack:
            node = stack.pop()
            kinds.append(type(node))
            kinds += [getattr(node, name) for name in _dims_of(type(node))]
            record = _metadata(node).get(_KEY)
            below: Iterable[Node | None]
            if record is not None and record.layer.context is context:
                self.records.append((node, record))
                kinds.append(id(record.layer))
                sizes.append(record.size)
                below = [get_gradient_edge(x).node for x in record.inputs]
            else:
                below = [after for after, _ in node.next_functions]
                if not below:
                    self._leaf(node)
            for after in below:
                if after is not None and after not in found:
                    found.add(after)
                    stack.append(after)
        self.nested = context.ran_without_grad and any(map(_is_foreign, found))
        self.structure = hash(tuple(kinds))
        self.signature = hash((self.structure, *sizes))

    def _leaf(self, node: Any) -> None:
        variable = getattr(node, "variable", None)
        if variable is None:
            return
        if variable in self.context.names:
            self.stray = variable
        else:
            self.leaves.append(node)

    def gradients(
        self,
        losses: Tensor,
        seeds: Tensor,
        wanted: Sequence[Tensor],
        *,
        retain_graph: bool,
        edges: bool = True,
    ) -> tuple[Entries, list[Tensor | None]]:
        """A backward pass.

        Args:
            losses: whose graph it is.
            seeds: what the losses are multiplied by, same shape.
            wanted: leaves whose gradients are wanted too.
            retain_graph: whether the graph is needed again.
            edges: whether the records' are.

        Returns:
            The gradients of the records' outputs, and those of wanted.
        """
        context = self.context
        context.backward = True
        try:
            if self.nested:
                return self._nested(losses, seeds, wanted, retain_graph)
            records = self.records if edges else []
            asked: list[Any] = [GradientEdge(node, 0) for node, _ in records]
            if not asked and not wanted:
                return [], []
            with self._watching():
                grads = _grad(
                    losses, [*asked, *wanted], seeds, retain_graph=retain_graph, allow_unused=True
                )
        finally:
            context.backward = False
        found: Entries = []
        for (_, record), grad in zip(records, grads, strict=False):
            found.append((record, grad))
        return found, list(grads[len(asked) :])

    def _nested(
        self, losses: Tensor, seeds: Tensor, wanted: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Entries, list[Tensor | None]]:
        """The same by way of .grad, as reentrant checkpointing demands."""
        hooks = [node.register_prehook(partial(_collect, record)) for node, record in self.records]
        # Checkpointed parts hide their parameters.
        others = (node.variable for node in self.leaves)
        leaves = list({id(t): t for t in (*wanted, *self.context.names, *others)}.values())
        before = [leaf.grad for leaf in leaves]
        collected: Any = []
        self.context.collected = collected
        try:
            for leaf in leaves:
                leaf.grad = None
            with self._watching():
                _backward(losses, seeds, retain_graph=retain_graph)
            found = [leaf.grad for leaf in wanted]
        finally:
            self.context.collected = None
            for hook in hooks:
                hook.remove()
            for leaf, grad in zip(leaves, before, strict=True):
                leaf.grad = grad
        return collected, found

    def _watching(self) -> AbstractContextManager[object]:
        """What watches checkpoints that use parameters outside of a module's forward."""
        if not self.context.again:
            return _NOTHING
        stack = ExitStack()
        for again in self.context.again.values():
            stack.enter_context(again)
        return stack

    def forget_inputs(self) -> None:
        """Lets go of what the records hold: the graph may live on with the losses."""
        for _, record in self.records:
            record.x = None


@cache
def _dims_of(kind: type) -> list[str]:
    """The attributes of a node that say which dims were summed, moved, joined or picked from."""
    return [name for name in dir(kind) if name.startswith("_saved_dim")]


def _is_foreign(node: Node) -> bool:
    return isinstance(node, BackwardCFunction)
