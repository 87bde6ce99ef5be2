"""Per-sample gradient clipping of a whole model in one backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embattle.clipping import noise as dp
from embattle.clipping import parallel
from embattle.clipping.arguments import (
    Weights,
    check_losses,
    checked_users,
    checked_weights,
    number,
)
from embattle.clipping.arguments import bound as checked_bound
from embattle.clipping.backward import differentiate
from embattle.clipping.context import Context
from embattle.clipping.factors import Mode, Rule, noticeable
from embattle.clipping.install import Installer
from embattle.clipping.norms import Gradients
from embattle.clipping.store import Noise, Store
from embattle.clipping.users import Users
from embattle.clipping.verify import Verifier, Verify
from embattle.perturb.evaluation import Evaluation


@dataclass(frozen=True)
class ClipResult:
    """What one `PerSampleClipper.backward` found; tensors on the model's device, no gradient.

    Attributes:
        norms: [U], or [U, parameters] for "per_layer": norms before clipping, float64; U is the
            number of samples, or of users where users were given.
        factors: what the gradients were multiplied by, same shape: 1 if unclipped, 0 if not finite.
        users: [U] the users' ids, in the order of norms; None without users.
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

    Where the samples are in each layer, that no loss depends on another sample, that sums and norms
    are right, is checked against autograd, and outputs against the model's own (see verify); what
    fails raises, and leaves ``.grad`` as it was. docs/clipping.md says which layers have rules, and
    which go through torch.func with per-sample gradients of that module in memory. What is computed
    in the block must be differentiated once only, and by `backward` alone as far as parameters go.
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
        verify: Verify = "sampled",
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
                through, inf clips nothing (not with noise).
            mode: "flat": factor ``min(1, C / ||g_b||)`` over all parameters together; "per_layer":
                the same for each parameter by itself; "automatic": ``C / (||g_b|| + gamma)``.
            weights: [B] factors w_b of the samples, or a function from the losses to them; 0
                removes a sample, whatever its gradient. `backward` can override it.
            gamma: of "automatic".
            reduction: "mean" divides the sum by the number of samples (of users, where given), over
                all ranks; "sum" does not.
            expected_batch_size: what "mean" divides by instead.
            batch_dim: where the samples are in the model's inputs, or a mapping from module name
                (and whatever is inside) to it: which inputs are the same for all samples, and how
                modules without rules are split, depend on it. Other layers find out.
            broadcast: names of modules whose input is the same for all samples and lacks the batch
                dimension (positions as [T]). A batch dimension of size 1 needs no mention.
            verify: when a backward pass is checked against autograd, at the price of about one
                more: "first": when the losses' graph is new (other layers, operators, sizes or
                modes), and again while gradients of zero may hide something; "sampled": one in 80
                passes besides, at random; "always".
            noise_multiplier: standard deviation of Gaussian noise on the sum, in units of C (of the
                root of the summed squares for "per_layer"); where a step has several batches, of
                the most that a sample of any of them can add. Weights must then not exceed 1.
            row_selection: which rows of sparse tables get noise; default: all, made dense, with a
                warning.
            generator: source of the noise; default: torch's own for the parameter's device.
            process_group: whose ranks hold the other parts of the batch; default: the one of
                DistributedDataParallel if model is wrapped in it, else no reduction.

        Raises:
            TypeError: an option that is not a number.
            ValueError: an option out of range.
        """
        for name, given, known in (
            ("mode", mode, ("flat", "per_layer", "automatic")),
            ("reduction", reduction, ("mean", "sum")),
            ("verify", verify, ("always", "sampled", "first")),
        ):
            if given not in known:
                raise ValueError(
                    f"PerSampleClipper: {name} must be one of {', '.join(known)}; got {given!r}"
                )
        if expected_batch_size is not None:
            expected_batch_size = number("expected_batch_size", expected_batch_size)
            if not expected_batch_size > 0:
                raise ValueError(
                    f"PerSampleClipper: expected_batch_size must be above 0, got "
                    f"{expected_batch_size:g}"
                )
        self.model = model
        self.mode: Mode = mode
        self.noise_multiplier = number("noise_multiplier", noise_multiplier, 0)
        self.max_norm = checked_bound(max_norm, mode, self.noise_multiplier)
        self.weights = weights
        self.gamma = number("gamma", gamma, 0)
        self.reduction = reduction
        self.expected_batch_size = expected_batch_size
        self.row_selection = row_selection
        self.generator = generator
        self._context = Context()
        self._verifier = Verifier(verify)
        self._installer = Installer(model, self._context, batch_dim, broadcast, self._verifier)
        ddp = self._installer.ddp
        self._group = process_group if ddp is None else ddp.process_group
        self._stack: ExitStack | None = None
        self._store = Store(self._group)
        self._sensitivity = 0.0

    # --- entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> PerSampleClipper:
        """Exchanges the forwards.

        Raises:
            RuntimeError: another clipper is at work on the model.
            ValueError: a layer couples the samples of a batch, or a parameter has a gradient hook.
        """
        if self._stack is not None:
            raise RuntimeError("PerSampleClipper: already entered; leave the with block first")
        with ExitStack() as stack:
            self._installer.put_in(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Puts the model's own forwards back.

        Raises:
            RuntimeError: in place of one of torch's that comes after inputs were spread over the
                batch, which may be why.
        """
        stack, self._stack = self._stack, None
        context = self._context
        context.batch_size, context.declared = None, False
        context.ran_without_grad = context.running = False
        spread, context.spread, context.again = context.spread, set(), {}
        if stack is not None:
            stack.close()
        if spread and type(error) is RuntimeError and "PerSampleClipper" not in str(error):
            raise RuntimeError(
                f"PerSampleClipper: the model failed: {error}. If it does not without the clipper: "
                f"the inputs of {sorted(spread)} have size 1 where samples are taken to be, and "
                "were given a row for every sample. If the samples are in another dim of theirs, "
                "say so by batch_dim={name: dim}"
            ) from error

    def expect(self, batch_size: int) -> None:
        """Says how many samples the forward passes in this block hold.

        For models that are not called whole, or whose first argument has another first dim.
        """
        self._context.batch_size, self._context.declared = batch_size, True

    def discard(self) -> None:
        """Forgets the batches of a step that is given up before its last one.

        Call it beside ``optimizer.zero_grad()``, which forgets what they left in ``.grad``: with a
        process group it is kept here until ranks are reduced, and noise is made for all batches.
        """
        self._store.discard()
        self._sensitivity = 0.0

    # --- the backward pass ------------------------------------------------------------------------

    def backward(
        self,
        losses: Tensor | Evaluation,
        *,
        weights: Weights = None,
        users: Tensor | Sequence[int] | None = None,
        scale: float = 1.0,
        max_norm: float | Sequence[float] | None = None,
        scaler: Any = None,
        retain_graph: bool = False,
        last: bool = True,
    ) -> ClipResult:
        """Adds the clipped gradients to ``.grad``.

        Args:
            losses: [B], one per sample (or an `Evaluation` that holds them), computed inside the
                with block; sums of several losses of the same sample (clean and adversarial) have
                their joint gradient clipped.
            weights: see the constructor.
            users: [B] integers: samples with the same one are one user, and the norm of their joint
                gradient is bounded. Weights then apply before clipping.
            scale: multiplies the result, not the norms: 1/k for each of k accumulated batches.
            max_norm: overrides the constructor's for this call.
            scaler: a torch.amp.GradScaler: the backward pass runs on scaled losses, norms are those
                of unscaled gradients, and the result is scaled, as scaler.step expects. If more
                than half of the norms are not finite the result is made so, for the scaler to
                notice.
            retain_graph: keep the graph for another backward.
            last: whether this is the last batch before the optimiser's step: ranks are reduced and
                noise is added then only.

        Returns:
            Norms and factors.

        Raises:
            RuntimeError: outside of the with block; a parameter was used where it cannot be
                followed; sums or norms are not autograd's.
            ValueError: losses, weights or users have a wrong shape, or samples are coupled.
        """
        if self._stack is None:
            raise RuntimeError("PerSampleClipper: call backward inside 'with clipper:'")
        if isinstance(losses, Evaluation):
            if losses.losses is None:
                raise ValueError("PerSampleClipper: the Evaluation holds no losses [B]")
            losses = losses.losses
        check_losses(losses)
        scale = number("scale", scale)
        given = self.weights if weights is None else weights
        weights = checked_weights(given, losses, noise=self.noise_multiplier > 0)
        ids = checked_users(users, losses)
        own_users = Users(len(losses), ids, weights if ids is not None else None)
        # scale, unlike get_scale, readies a fresh scaler for its step.
        loss_scale = 1.0 if scaler is None else float(scaler.scale(losses.new_ones(())))
        named = self._installer.named
        bound = self.max_norm
        if max_norm is not None:
            bound = checked_bound(max_norm, self.mode, self.noise_multiplier)
        if not isinstance(bound, float) and len(bound) != len(named):
            raise ValueError(
                f"PerSampleClipper: max_norm has {len(bound)} numbers for {len(named)} trained "
                f"parameters"
            )
        device = losses.device
        found = differentiate(
            self._installer.core,
            named,
            self._context,
            self._verifier,
            losses,
            own_users,
            self._installer.version,
            loss_scale=loss_scale,
            retain_graph=retain_graph,
        )
        with torch.no_grad(), _without_autocast(device.type):
            rule = Rule(self.mode, bound, self.gamma)
            gradients = Gradients(named, found.grad_samples, own_users)
            of = dict(gradients.of) if found.probed else {}
            norms = gradients.norms(device, apart=self.mode == "per_layer")
            # A sum that overflows costs a look at every sample, no more.
            finite = math.isfinite(float(norms.sum()))
            if finite:
                found.check(of, own_users, norms, self._verifier)
            of.clear()
            if loss_scale != 1:
                norms = norms / loss_scale
            factors = rule.factors(norms, finite)
            if not finite or own_users.left_out is not None:
                gradients.clean(norms)
            divisor, count = self._divisor(own_users.count, device)
            share = scale / divisor
            if count:
                most = rule.sensitivity(len(named)) * abs(share) * loss_scale
                self._sensitivity = max(self._sensitivity, most)
            self._store.add(
                gradients,
                factors if scaler is None else noticeable(factors, norms),
                weights if users is None else None,
                share,
                noise=self._noise(
                    self._sensitivity or rule.sensitivity(len(named)) * abs(share) * loss_scale
                ),
                last=last,
            )
            for node, grad in found.leaves:
                node(grad)
            if last:
                self._sensitivity = 0.0
        names = tuple(self._context.names.values())
        return ClipResult(norms, factors, own_users.ids, names)

    def _divisor(self, count: int, device: torch.device) -> tuple[float, int]:
        """What sums are divided by, and whether there is anything to sum."""
        if self.reduction == "sum" or self.expected_batch_size is not None:
            divisor = 1.0 if self.reduction == "sum" else self.expected_batch_size
            assert divisor is not None
            return divisor, count if self._group is None else 1
        if self._group is not None:
            count = parallel.total(count, device, self._group)
        return float(max(count, 1)), count

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


def _without_autocast(kind: str) -> AbstractContextManager[object]:
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
