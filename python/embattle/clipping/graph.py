"""The losses' graph: which applications of parameters it holds, and their outputs' gradients.

A layer with a rule of its own runs torch's operator on an `alias` of its parameter and leaves a
`Record` with the operator's node in the graph, where it lives as long as the node. A backward pass
finds the records that the losses reach and asks autograd for the gradients of their outputs, all at
once: no code of ours runs in the pass, and no gradient of a weight is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter

if TYPE_CHECKING:
    from embattle.clipping.layer import Layer
    from embattle.clipping.tape import Listener, Tape

# Marks an alias, and names a record in a node's metadata.
_MARK = "_embattle_clipping"


def alias(data: Tensor, trained: bool) -> Tensor:
    """data, without history, as a leaf of its own in the graph.

    Where a graph holds the parameter itself, it was thus used outside of its layer; and where it
    holds the alias other than below its layer's record, a gradient was differentiated.
    """
    if trained:
        data.requires_grad_()
        setattr(data, _MARK, True)
    return data


class Record:
    """One application of parameters to an input; subclasses know what follows for the parameters.

    Attributes:
        layer: where it happened.
        x: the input; None once it is not needed any more.
    """

    __slots__ = ("__weakref__", "layer", "version", "x")

    def __init__(self, layer: Layer, x: Tensor) -> None:
        self.layer = layer
        self.x: Tensor | None = x
        self.version = x._version

    def deliver(self, listener: Listener, grad: Tensor) -> None:
        """Tells the listener, given the gradient of the output."""
        raise NotImplementedError

    def below(self) -> list[Node | None]:
        """Where the graph goes on behind the layer: not to the aliases."""
        if self.x is None or not self.x.requires_grad:
            return []
        return [get_gradient_edge(self.x).node]

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
    node, tape = out.grad_fn, record.layer.tape
    if node is None:
        tape.ran_without_grad = True
        return
    _metadata(node)[_MARK] = record
    if tape.listener is not None:
        # A recomputation in the backward pass. Reentrant checkpointing differentiates it right
        # away; anybody else has the gradient of the first computation's output.
        node.register_prehook(partial(_deliver, record))


def _deliver(record: Record, grads: Sequence[Tensor | None]) -> None:
    listener = record.layer.tape.listener
    if listener is not None and grads[0] is not None:
        record.deliver(listener, grads[0])


class Reached:
    """What a graph holds, found by a walk from its end.

    Attributes:
        records: the nodes with a record of tape, and the records.
        stray: the name of a parameter that the graph holds outside of any layer, or None.
        nested: whether a backward pass through the graph may start others whose outputs it cannot
            know of: torch.utils.checkpoint with use_reentrant=True.
    """

    def __init__(self, root: Node | None, tape: Tape, names: dict[Parameter, str]) -> None:
        self.records: list[tuple[Node, Record]] = []
        self.stray: str | None = None
        self._leaves: list[Any] = []
        found = set() if root is None else {root}
        stack = list(found)
        while stack:
            node = stack.pop()
            record = _metadata(node).get(_MARK)
            if record is not None and record.layer.tape is tape:
                self.records.append((node, record))
                below = record.below()
            else:
                below = [after for after, _ in node.next_functions]
                if not below:
                    self._leaf(node, tape, names)
            for after in below:
                if after is not None and after not in found:
                    found.add(after)
                    stack.append(after)
        self.nested = tape.ran_without_grad and any(map(_is_foreign, found))

    def _leaf(self, node: Any, tape: Tape, names: dict[Parameter, str]) -> None:
        variable = getattr(node, "variable", None)
        if variable is None or variable is tape.anchor:
            return
        if variable in names:
            self.stray = names[variable]
        elif hasattr(variable, _MARK):
            raise RuntimeError(
                "PerSampleClipper: the losses hold a gradient with respect to something inside of "
                "the model. Second derivatives cannot be clipped per sample"
            )
        else:
            self._leaves.append(node)

    def differentiate(
        self, losses: Tensor, seeds: Tensor, tape: Tape, *, retain_graph: bool, leaves: bool
    ) -> None:
        """A backward pass; tape's listener hears of all the applications of parameters.

        Args:
            losses: whose graph it is.
            seeds: what the losses are multiplied by, same shape.
            tape: the clipper's state, with a listener.
            retain_graph: whether the graph is needed again.
            leaves: whether other leaves of the graph get their gradients.
        """
        listener = tape.listener
        assert listener is not None
        edges = [GradientEdge(node, 0) for node, _ in self.records]
        others = self._leaves if leaves else []
        grads = torch.autograd.grad(
            losses,
            [tape.anchor, *edges, *(node.variable for node in others)],
            seeds,
            retain_graph=retain_graph,
            allow_unused=True,
        )
        for (_, record), grad in zip(self.records, grads[1:], strict=False):
            if grad is not None:
                record.deliver(listener, grad)
                if not retain_graph:
                    # The graph may live on with the losses.
                    record.x = None
        with torch.no_grad():
            for node, grad in zip(others, grads[1 + len(edges) :], strict=True):
                if grad is not None:
                    node(grad)

    def differentiate_nested(self, losses: Tensor, seeds: Tensor, *, retain_graph: bool) -> None:
        """The same where the graph is nested: every gradient is computed, the aliases' too."""
        hooks = [node.register_prehook(partial(_deliver, record)) for node, record in self.records]
        try:
            torch.autograd.backward(losses, seeds, retain_graph=retain_graph)
        finally:
            for hook in hooks:
                hook.remove()


def _is_foreign(node: Node) -> bool:
    if not isinstance(node, BackwardCFunction):
        return False
    return not type(node)._forward_cls.__module__.startswith("embattle.clipping.")
