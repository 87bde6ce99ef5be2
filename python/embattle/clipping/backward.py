"""The backward passes of a batch: every parameter's per-sample gradients, and what probes need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from embattle.clipping.context import Context, Layout
from embattle.clipping.grad_sample import DenseGradSample, GradSample
from embattle.clipping.graph import Entries, Graph
from embattle.clipping.norms import Named
from embattle.clipping.table_grad_sample import EmbeddingGradSample
from embattle.clipping.users import Users
from embattle.clipping.verify import (
    Known,
    Verifier,
    check_norms,
    check_sums,
    find_layouts,
    precision,
)


@dataclass
class Backward:
    """What `differentiate` found.

    Attributes:
        named: the trained parameters.
        grad_samples: of each parameter.
        leaves: nodes of leaves that are not the model's, and their gradients, which they get when
            the pass is known to be right.
        r, truth, limit, probed, signature: of a pass that is checked: the probe's weights, each
            parameter's gradient under them, how exact it is, the layouts, and what to remember
            them by.
    """

    named: Named
    grad_samples: dict[Parameter, list[GradSample]] = field(default_factory=dict)
    leaves: list[tuple[Any, Tensor]] = field(default_factory=list)
    r: Tensor = field(default_factory=lambda: torch.zeros(0))
    truth: list[Tensor | None] = field(default_factory=list)
    limit: float = 0.0
    probed: Known | None = None
    signature: object = None

    def keep(self, graph: Graph, grads: Sequence[Tensor | None]) -> None:
        """Keeps the leaves' gradients."""
        for node, grad in zip(graph.leaves, grads, strict=True):
            if grad is not None:
                self.leaves.append((node, grad))

    def deliver(self, entries: Entries, places: list[Layout | None], samples: int) -> None:
        """Fills grad_samples; empties entries as it goes."""

        def add(p: Parameter, each: GradSample) -> None:
            self.grad_samples.setdefault(p, []).append(each)

        with torch.no_grad():
            while entries:
                record, grad = entries.pop()
                layout = places[len(entries)]
                if grad is not None and layout is not None:
                    record.deliver(add, record.shaped(grad), layout, samples)

    def check(
        self,
        of: dict[Parameter, list[GradSample]],
        users: Users,
        norms: Tensor,
        verifier: Verifier,
    ) -> None:
        """The probes of sums and norms, where the pass is checked.

        Args:
            of: the parameters' merged grad samples; left as they are.
            users: the samples' users.
            norms: [U], or [U, parameters].
            verifier: what remembers a pass that is right.

        Raises:
            RuntimeError: a sum or a norm is wrong.
        """
        if self.probed is None:
            return
        user = verifier.choose(users.count)
        largest = check_sums(self.named, of, self.truth, self.r, self.limit)
        check_norms(self.named, of, users, norms, user, self.limit, largest)
        verifier.remember(self.signature, self.probed)


def differentiate(
    model: nn.Module,
    named: Named,
    context: Context,
    verifier: Verifier,
    losses: Tensor,
    users: Users,
    version: int,
    *,
    loss_scale: float,
    retain_graph: bool,
) -> Backward:
    """The backward passes.

    Args:
        model: whose parameters are clipped.
        named: the trained ones.
        context: the clipper's state.
        verifier: decides what is checked.
        losses: [B].
        users: the samples' users.
        version: counts the model's changes.
        loss_scale: what the losses are multiplied by.
        retain_graph: keep the graph.

    Raises:
        RuntimeError: a parameter was used where it cannot be followed.
        ValueError: samples are coupled.
    """
    found = Backward(named)
    samples = len(losses)
    if not samples:
        return found
    graph = Graph(losses.grad_fn, context)
    _refuse_changes(model, graph)
    parameters = [p for _, p in named]
    leaves = [node.variable for node in graph.leaves]
    seeds = torch.full_like(losses, loss_scale)
    if samples == 1:
        # The gradient of one loss is autograd's, whatever the model does.
        _, grads = graph.gradients(
            losses, seeds, [*parameters, *leaves], retain_graph=retain_graph, edges=False
        )
        for p, grad in zip(parameters, grads, strict=False):
            if grad is not None:
                found.grad_samples[p] = [_of_one(grad)]
        found.keep(graph, grads[len(parameters) :])
        return found
    _refuse_stray(context, graph.stray)
    found.signature = (graph.signature, samples, users.of_sample is None, version)
    known, due = verifier.known(found.signature, (graph.structure, version))
    probed: Entries = []
    if graph.nested:
        due, r = True, verifier.weights(losses)
        share = (seeds * r).to(losses.dtype)
        # Leaves that a checkpointed part hides get what either pass leaves, the whole in all.
        probed, first = graph.gradients(losses, share, [*parameters, *leaves], retain_graph=True)
        rest, others = graph.gradients(losses, seeds - share, leaves, retain_graph=retain_graph)
        entries = [
            (record, _added(grad, part))
            for (record, grad), (_, part) in zip(rest, probed, strict=False)
        ]
        found.truth = first[: len(parameters)]
        grads = [_added(a, b) for a, b in zip(first[len(parameters) :], others, strict=True)]
    else:
        unseen = due or None in known.layouts
        entries, grads = graph.gradients(losses, seeds, leaves, retain_graph=retain_graph or unseen)
        if any(
            layout is None and grad is not None
            for layout, (_, grad) in zip(known.layouts, entries, strict=False)
        ):
            # A layer whose place nobody has seen yet; the graph is still there.
            known, due = Known(), True
    found.keep(graph, grads)
    places = known.layouts
    if due:
        whole = not known.done or graph.nested
        if not graph.nested:
            r = verifier.weights(losses)
            share = (seeds * r).to(losses.dtype)
            probed, found.truth = graph.gradients(
                losses, share, parameters, retain_graph=retain_graph, edges=whole
            )
        finite = _finite(entries) and _finite(probed)
        found.r, found.limit = r, precision(named, entries, losses)
        if whole:
            known = find_layouts(entries, probed, r, found.limit, finite)
            places = known.layouts
        found.probed = known if finite else None
        del probed
    context.probed = found.probed is not None
    found.deliver(entries, places, samples)
    if not retain_graph:
        graph.forget_inputs()
    return found


def _refuse_changes(model: nn.Module, graph: Graph) -> None:
    """A parameter that has come to the model, or is trained now, since the block began."""
    new = {id(node.variable) for node in graph.leaves if isinstance(node.variable, Parameter)}
    if not new:
        return
    for name, p in model.named_parameters():
        if id(p) in new:
            raise RuntimeError(
                f"PerSampleClipper: parameter '{name}' was not the model's, or not trained, when "
                "the with block was entered; change the model outside of the block"
            )


def _refuse_stray(context: Context, stray: Parameter | None) -> None:
    if stray is not None:
        raise RuntimeError(
            f"PerSampleClipper: parameter '{context.names[stray]}' is used where its per-sample "
            "gradients cannot be followed: outside of its module's forward, through a tensor that "
            "stands in for it (functional_call), in a forward compiled before the with block, "
            "in a gradient that is itself differentiated, or in the clipper's own pass without "
            "rules, of which a list that a forward hook appends to holds the first output: take "
            "the last. Use it through a module (for tied weights, an nn.Linear whose weight is the "
            "table's), or freeze it"
        )


def _finite(entries: Entries) -> bool:
    return all(grad is None or bool(grad.sum().isfinite()) for _, grad in entries)


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _of_one(grad: Tensor) -> GradSample:
    """The gradient of a single sample as per-sample gradients."""
    if not grad.is_sparse:
        return DenseGradSample(grad.unsqueeze(0))
    grad = grad.coalesce()
    return EmbeddingGradSample(grad.indices(), grad.values().unsqueeze(0), None, True)
