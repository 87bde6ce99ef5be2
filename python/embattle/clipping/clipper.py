"""Per-sample gradient clipping of a whole model in one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from embattle.clipping import noise as dp
from embattle.clipping import parallel
from embattle.clipping.combine import Use
from embattle.clipping.factors import Mode, Rule, checked_bound, noticeable
from embattle.clipping.found import Found
from embattle.clipping.graph import Reached
from embattle.clipping.install import stand_ins
from embattle.clipping.layer import Layer, in_use
from embattle.clipping.store import Noise, Store
from embattle.clipping.tape import IsolationCheck, Listener, Tape
from embattle.clipping.units import Units

Weights = Tensor | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class ClipResult:
    """What one `PerSampleClipper.backward` found; tensors on the model's device, no gradient.

    Attributes:
        norms: [units], or [units, parameters] for "per_layer": norms before clipping, float64. A
            unit is a sample, or a user where users were given.
        factors: what the gradients were multiplied by, same shape: 1 if unclipped, 0 if not finite.
        users: [units] the users' ids, in the order of norms; None without users.
        names: the parameters, in the order of norms' second dimension.
    """

    norms: Tensor
    factors: Tensor
    users: Tensor | None
    names: tuple[str, ...]


class PerSampleClipper:
    """Bounds what any one sample, or user, can do to a model.

    Inside ``with clipper:`` run the model, then call `backward` with one loss per sample. It leaves
    in ``.grad`` what ``loss.backward()`` would, had every sample's gradient g_b been replaced by
    ``w_b * factor_b * g_b``; autograd computes no weight gradients, and per-sample gradients are
    not held in memory (book-keeping: Bu et al., ICML 2023, arXiv 2210.00038). The model itself is
    not changed: forwards are exchanged for the duration of the ``with`` block.

    Layers with their own rule: Linear, Embedding, EmbeddingBag, LayerNorm, RMSNorm, Conv1d, Conv2d,
    MultiheadAttention, RNN, GRU, LSTM, transformers' Conv1D. Any other module with parameters of
    its own goes through torch.func, per-sample gradients of that module in memory, with one log
    line. A parameter used anywhere else raises. What is computed in the block must be
    differentiated once only.
    """

    def __init__(
        self,
        model: nn.Module,
        max_norm: float | Sequence[float],
        mode: Mode = "flat",
        weights: Weights = None,
        *,
        gamma: float = 0.01,
        reduction: Literal["mean", "sum"] = "mean",
        expected_batch_size: float | None = None,
        batch_dim: int | Mapping[str, int] = 0,
        broadcast: Iterable[str] = (),
        check: bool = True,
        noise_multiplier: float = 0.0,
        row_selection: dp.RowSelection | None = None,
        generator: torch.Generator | None = None,
        process_group: Any = None,
    ) -> None:
        """Prepares a clipper; the model stays as it is.

        Args:
            model: any module, also one wrapped in DistributedDataParallel or torch.compile.
            max_norm: C, the largest l2 norm of a sample's gradient; for "per_layer" also one number
                for each trained parameter, in the order of ``model.parameters()``. 0 lets nothing
                through, inf clips nothing.
            mode: "flat": factor ``min(1, C / ||g_b||)`` over all parameters together; "per_layer":
                the same for each parameter by itself; "automatic": ``C / (||g_b|| + gamma)``.
            weights: [B] factors w_b of the samples, or a function from the losses to them; 0
                removes a sample, whatever its gradient. `backward` can override it.
            gamma: of "automatic".
            reduction: "mean" divides the sum by the number of samples (of users, where given), over
                all ranks; "sum" does not.
            expected_batch_size: what "mean" divides by instead.
            batch_dim: where the samples are in the inputs of the layers, or a mapping from module
                name (and whatever is inside) to it. Attention and recurrent layers know by
                themselves.
            broadcast: names of modules whose input is the same for all samples and lacks the batch
                dimension (positions as [T]). A batch dimension of size 1 needs no mention.
            check: whether the first `backward` verifies, at the price of one more partial backward
                pass, that the losses of half of the samples leave the others' rows alone. Not done
                under torch.compile and reentrant checkpointing.
            noise_multiplier: standard deviation of Gaussian noise on the sum, in units of C (of the
                root of the summed squares for "per_layer"). Weights must then not exceed 1.
            row_selection: which rows of sparse tables get noise; default: all, made dense, with a
                warning.
            generator: source of the noise; default: torch's own for the parameter's device.
            process_group: whose ranks hold the other parts of the batch; default: the one of
                DistributedDataParallel if model is wrapped in it, else no reduction.

        Raises:
            ValueError: an option out of range.
        """
        if mode not in ("flat", "per_layer", "automatic"):
            raise ValueError(
                f"PerSampleClipper: mode must be 'flat', 'per_layer' or 'automatic', got {mode!r}"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f"PerSampleClipper: reduction must be 'mean' or 'sum', got {reduction!r}"
            )
        for name, value in (("gamma", gamma), ("noise_multiplier", noise_multiplier)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"PerSampleClipper: {name} must be finite and >= 0, got {value}")
        self.model = model
        self.mode: Mode = mode
        self.max_norm = checked_bound(max_norm, mode)
        self.weights = weights
        self.gamma = gamma
        self.reduction = reduction
        self.expected_batch_size = expected_batch_size
        self.noise_multiplier = noise_multiplier
        self.row_selection = row_selection
        self.generator = generator
        self._ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        core: Any = model.module if self._ddp is not None else model
        compiled: Any = getattr(core, "_orig_mod", None)
        self._core: nn.Module = core if compiled is None else compiled
        self._compiled = compiled is not None
        self._group = process_group if self._ddp is None else self._ddp.process_group
        self._batch_dims = {"": batch_dim} if isinstance(batch_dim, int) else dict(batch_dim)
        self._broadcast = tuple(broadcast)
        known = dict(self._core.named_modules())
        for name in (*self._batch_dims, *self._broadcast):
            if name not in known:
                raise ValueError(f"PerSampleClipper: the model has no module named {name!r}")
        self._check = check
        self._tape = Tape()
        self._tape.check = check
        self._layers: list[tuple[nn.Module, Layer]] = []
        self._layers_for: list[object] | None = None
        self._named: list[tuple[str, Parameter]] = []
        self._names: dict[Parameter, str] = {}
        self._stack: ExitStack | None = None
        self._store = Store(self._group)

    # --- entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> PerSampleClipper:
        """Exchanges the forwards.

        Raises:
            RuntimeError: another clipper is at work on the model.
            ValueError: a layer couples the samples of a batch.
        """
        if self._stack is not None:
            raise RuntimeError("PerSampleClipper: already entered; leave the with block first")
        with ExitStack() as stack:
            self._install(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the model's own forwards back."""
        stack, self._stack = self._stack, None
        self._tape.batch_size = None
        self._tape.ran_without_grad = False
        if stack is not None:
            stack.close()

    def _install(self, stack: ExitStack) -> None:
        current: list[object] = []
        for module in _modules(self._core):
            if in_use(module):
                raise RuntimeError(
                    "PerSampleClipper: the model is inside another clipper's with block"
                )
            own = module._parameters
            if own:
                current += (module, module.training, "forward" in module.__dict__)
                for p in own.values():
                    current += (id(p), p is not None and p.requires_grad)
        if current != self._layers_for:
            self._named = [(n, p) for n, p in self._core.named_parameters() if p.requires_grad]
            self._names = {p: name for name, p in self._named}
            self._layers = stand_ins(self._core, self._tape, self._batch_dims, self._broadcast)
            self._layers_for = current
        if self._ddp is not None:
            stack.enter_context(self._ddp.no_sync())
        stack.callback(self._take_out)
        for _, layer in self._layers:
            layer.put_in()
        hook = self._core.register_forward_pre_hook(
            self._note_batch, prepend=True, with_kwargs=True
        )
        stack.callback(hook.remove)

    def _take_out(self) -> None:
        for _, layer in self._layers:
            layer.take_out()

    def _note_batch(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._tape.inside:
            return
        dim = self._batch_dims.get("", 0)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() > dim:
                self._tape.batch_size = leaf.shape[dim]
                return

    def expect(self, batch_size: int) -> None:
        """Says how many samples the next forward passes hold, if the model is not called whole."""
        self._tape.batch_size = batch_size

    # --- the backward pass ------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor,
        *,
        weights: Weights = None,
        users: Tensor | None = None,
        scale: float = 1.0,
        max_norm: float | Sequence[float] | None = None,
        scaler: Any = None,
        retain_graph: bool = False,
        last: bool = True,
    ) -> ClipResult:
        """Adds the clipped gradients to ``.grad``.

        Args:
            losses: [B], one per sample, computed inside the with block; sums of several losses of
                the same sample (clean and adversarial) have their joint gradient clipped.
            weights: see the constructor.
            users: [B] integers: samples with the same one are a unit, and the norm of their summed
                gradient is bounded. Weights then apply before clipping.
            scale: multiplies the result, not the norms: 1/k for each of k accumulated batches.
            max_norm: overrides the constructor's for this call.
            scaler: a torch.amp.GradScaler: the backward pass runs on scaled losses, norms are those
                of unscaled gradients, and the result is scaled, as scaler.step expects. If more
                than half of the units are not finite the result is made so, for the scaler to
                notice.
            retain_graph: keep the graph for another backward.
            last: whether this is the last batch before the optimiser's step: ranks are reduced and
                noise is added then only.

        Returns:
            Norms and factors.

        Raises:
            RuntimeError: outside of the with block, or a parameter was used where it cannot be
                followed.
            ValueError: losses, weights or users have a wrong shape, or samples are coupled.
        """
        if self._stack is None:
            raise RuntimeError("PerSampleClipper: call backward inside 'with clipper:'")
        self._check_losses(losses)
        samples = len(losses)
        weights = self._resolve_weights(self.weights if weights is None else weights, losses)
        units = self._units(losses, users, weights)
        # scale, unlike get_scale, readies a fresh scaler for its step.
        loss_scale = 1.0 if scaler is None else float(scaler.scale(losses.new_ones(())))
        named = self._named
        bound = self.max_norm if max_norm is None else checked_bound(max_norm, self.mode)
        if not isinstance(bound, float) and len(bound) != len(named):
            raise ValueError(
                f"PerSampleClipper: max_norm has {len(bound)} numbers for {len(named)} trained "
                f"parameters"
            )
        reached = Reached(losses.grad_fn, self._tape, self._names)
        self._refuse_stray(reached.stray)
        if samples:
            self._verify_isolation(losses, reached)
        uses = self._listen(losses, reached, loss_scale, retain_graph)
        del reached
        device = losses.device
        with torch.no_grad(), _without_autocast(device.type):
            rule = Rule(self.mode, bound, self.gamma)
            apart = self.mode == "per_layer"
            found = Found(named, uses, units, joined=not apart)
            norms = found.layer_norms(device) if apart else found.norms(device)
            if loss_scale != 1:
                norms = norms / loss_scale
            # A sum that overflows costs a look at every sample, no more.
            finite = math.isfinite(float(norms.sum()))
            factors = rule.factors(norms, finite)
            if not finite:
                found.clean(norms)
            share = scale / self._divisor(units.count, device)
            self._store.add(
                found,
                factors if scaler is None else noticeable(factors, norms),
                weights if users is None else None,
                share,
                noise=self._noise(rule.sensitivity(len(named)) * share * loss_scale),
                last=last,
            )
        return ClipResult(norms, factors, units.ids, tuple(self._names.values()))

    @staticmethod
    def _check_losses(losses: Tensor) -> None:
        if losses.dim() != 1:
            raise ValueError(
                f"PerSampleClipper: losses must have shape [B], got {tuple(losses.shape)}; use "
                "reduction='none' and average over whatever is not the batch"
            )
        if not losses.requires_grad and len(losses):
            raise ValueError(
                "PerSampleClipper: losses depend on no trained parameter; compute them inside the "
                "with "
                "block, with gradients enabled"
            )

    def _resolve_weights(self, weights: Weights, losses: Tensor) -> Tensor | None:
        if weights is None:
            return None
        found = weights(losses.detach()) if callable(weights) else weights
        if found.shape != losses.shape:
            raise ValueError(
                f"PerSampleClipper: weights must have the losses' shape {tuple(losses.shape)}, got "
                f"{tuple(found.shape)}"
            )
        found = found.detach().to(losses.device, torch.float64)
        if self.noise_multiplier and bool((found.abs() > 1).any()):
            raise ValueError(
                f"PerSampleClipper: with noise, weights must lie in [-1, 1], got "
                f"{float(found.max())}: "
                "larger ones would exceed the bound that the noise is made for"
            )
        return found

    @staticmethod
    def _units(losses: Tensor, users: Tensor | None, weights: Tensor | None) -> Units:
        samples = len(losses)
        if users is None:
            return Units(samples)
        if users.shape != (samples,) or users.is_floating_point():
            raise ValueError(
                f"PerSampleClipper: users must be {samples} integers, got {users.dtype} of shape "
                f"{tuple(users.shape)}"
            )
        return Units(samples, users.to(losses.device), weights)

    def _verify_isolation(self, losses: Tensor, reached: Reached) -> None:
        samples = len(losses)
        if not self._check or self._compiled or samples < 2:
            return
        if reached.nested:
            self._check = False
            return
        listener = IsolationCheck(samples)
        half = torch.zeros_like(losses)
        half[samples // 2 :] = 1
        self._tape.listener = listener
        try:
            reached.differentiate(losses, half, self._tape, retain_graph=True, leaves=False)
        finally:
            self._tape.listener = None
        listener.verify()
        self._check = False

    def _listen(
        self, losses: Tensor, reached: Reached, loss_scale: float, retain_graph: bool
    ) -> dict[Parameter, list[Use]]:
        listener = Listener(len(losses))
        if not len(losses):
            return listener.uses
        self._tape.listener = listener
        seeds = torch.full_like(losses, loss_scale)
        try:
            if not reached.nested:
                reached.differentiate(
                    losses, seeds, self._tape, retain_graph=retain_graph, leaves=True
                )
                return listener.uses
            # Whatever autograd itself leaves in .grad was used where nobody listens.
            before = [p.grad for _, p in self._named]
            for _, p in self._named:
                p.grad = None
            try:
                reached.differentiate_nested(losses, seeds, retain_graph=retain_graph)
                stray = next((name for name, p in self._named if p.grad is not None), None)
            finally:
                for (_, p), grad in zip(self._named, before, strict=True):
                    p.grad = grad
        finally:
            self._tape.listener = None
        self._refuse_stray(stray)
        return listener.uses

    @staticmethod
    def _refuse_stray(name: str | None) -> None:
        if name is not None:
            raise RuntimeError(
                f"PerSampleClipper: parameter '{name}' is used where its per-sample gradients "
                "cannot be followed: outside of its module's forward, or in a forward compiled "
                "before the with block. Use it through a module (for tied weights, an nn.Linear "
                "whose weight is the table's), or freeze it"
            )

    def _divisor(self, count: int, device: torch.device) -> float:
        if self.reduction == "sum":
            return 1.0
        if self.expected_batch_size is not None:
            return self.expected_batch_size
        if self._group is not None:
            count = parallel.total(count, device, self._group)
        return float(max(count, 1))

    def _noise(self, sensitivity: float) -> Noise | None:
        if not self.noise_multiplier:
            return None
        return Noise(self.noise_multiplier * sensitivity, self.row_selection, self.generator)

    @property
    def effective_noise_multiplier(self) -> float:
        """The noise multiplier to account for: that of the sum and of the row selection together.

        Hand it to an accountant, for instance Opacus' ``RDPAccountant().step(noise_multiplier=...,
        sample_rate=...)``, once per optimiser step.
        """
        if self.row_selection is None or not self.noise_multiplier:
            return self.noise_multiplier
        both = self.noise_multiplier**-2 + self.row_selection.noise_multiplier**-2
        return float(both**-0.5)


def _modules(root: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once; plainer than Module.modules, which a step can feel."""
    found = {id(root): root}
    stack = [root]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


def _without_autocast(kind: str) -> AbstractContextManager[object]:
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
