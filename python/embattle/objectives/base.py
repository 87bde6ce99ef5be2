"""The objective: one call per batch gives the loss to backpropagate, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from embattle import checks
from embattle.attacks.base import Attack
from embattle.attacks.result import warn_of_rounding
from embattle.criteria import Criterion
from embattle.objectives.batch import Batch, Samples
from embattle.objectives.consistency import R3F, Alp, Mart, Smart, Trades, Vat
from embattle.objectives.free import FreeAT, free
from embattle.objectives.masking import Masking
from embattle.objectives.mixed import adversarial, apr, mixed
from embattle.objectives.partial import Partial
from embattle.objectives.parts import Parts
from embattle.objectives.schedules import Constant, Schedule, factor_at
from embattle.objectives.staggered import StaggeredReplays
from embattle.perturb.attacked_batch import AttackedBatch, Masks, Subset
from embattle.perturb.evaluation import LossFn
from embattle.perturb.perturbation import total
from embattle.perturb.site import Site, as_sites

Form: TypeAlias = Callable[[Batch], Tensor]

# What makes each form: one with a state is created for each objective.
FORMS: dict[str, Callable[[], Form]] = {
    "mixed": lambda: mixed,
    "adversarial": lambda: adversarial,
    "apr": lambda: apr,
    "trades": Trades,
    "mart": Mart,
    "alp": Alp,
    "smart": Smart,
    "vat": Vat,
    "r3f": R3F,
    "free": lambda: free,
    "freeat": FreeAT,
    "staggered": StaggeredReplays,
    "partial": Partial,
}

# The forms that train in the attack's own passes.
SHARED_PASSES = ("free", "freeat", "staggered")

# The forms that add a clean and an adversarial loss of each sample, or take the latter alone.
_ADDITIVE = ("mixed", "adversarial", "apr", "staggered", "partial")

# The forms of an adversarial part alone, which lam has nothing to weigh against.
_ONE_PART = ("adversarial", "free", "freeat")

_SCHEDULES = ("eps_schedule", "lam_schedule", "steps_schedule")


class AdversarialObjective:
    """`L(theta) + lam * L_adv(theta)`, in the form you name.

    One call per batch finds the perturbations and returns the loss to backpropagate:

        objective = AdversarialObjective(attack, site, lam=1.0, eps_schedule=WarmUp(100))
        loss, metrics = objective(loss_fn, criterion=Misclassify(labels))
        loss.backward()

    Args:
        attack: finds the perturbations.
        sites: where.
        form: one of `FORMS`, or a callable that takes a `Batch` and returns the loss, such as
            `Trades(divergence="squared_distance")`.
        lam: weight of the adversarial part; it stays 1 for "adversarial", "free" and "freeat",
            which have that part alone.
        masking: leaves samples out of the adversarial part (see `embattle.objectives.masking`).
        eps_schedule: factor on eps and step size at each step; one object may be several schedules.
        lam_schedule: factor on `lam` at each step.
        steps_schedule: share of the attack's steps that is made (rounded up, one at least).
        early_backward: differentiate the clean loss right away, share that pass with the first
            ascent step where the attack starts at zero, and attach the gradients to the loss that
            is returned: cheaper, and the clean graph does not wait in memory. The returned loss can
            then be backpropagated once, and its graph shows only parameters. Turn it off where
            parameters are sharded (FSDP2), and with a float16 gradient scaler.
        compile: `torch.compile` the loss function, model and all, as for an attack. The sites must
            know their model.

    Raises:
        ValueError: unknown form, negative lam, or an option that the form would pass over.
    """

    def __init__(
        self,
        attack: Attack,
        sites: Site | Sequence[Site],
        *,
        form: str | Form = "mixed",
        lam: float = 1.0,
        masking: Masking | None = None,
        eps_schedule: Schedule | None = None,
        lam_schedule: Schedule | None = None,
        steps_schedule: Schedule | None = None,
        early_backward: bool = True,
        compile: bool = False,
    ) -> None:
        if isinstance(form, str) and form not in FORMS:
            raise ValueError(
                f"AdversarialObjective: form must be one of {', '.join(FORMS)}; got {form!r}"
            )
        lam = checks.real("AdversarialObjective", "lam", lam, 0)
        if not isinstance(attack, Attack):
            raise TypeError(f"AdversarialObjective: attack must be an Attack, got {attack!r}")
        if type(attack).run is not Attack.run:
            raise ValueError(
                f"AdversarialObjective: {attack!r} has a run of its own, and is for audits: train "
                "against PGD, APGD or another attack by steps"
            )
        self.attack = attack
        self.sites = as_sites(sites)
        self.form = FORMS[form]() if isinstance(form, str) else form
        self.name: str = form if isinstance(form, str) else _name(form)
        _refuse_options(attack, masking, self.name)
        if self.name in _ONE_PART and (lam != 1 or lam_schedule not in (None, Constant())):
            raise ValueError(
                f"AdversarialObjective: form {self.name!r} has the adversarial part alone, which "
                f"lam={lam:g}, lam_schedule={lam_schedule!r} would not weigh; leave them out, or "
                "use form='mixed', or 'partial' for a clean part within the same pass"
            )
        self.lam = lam
        self.masking = masking
        self.eps_schedule: Schedule = Constant() if eps_schedule is None else eps_schedule
        self.lam_schedule: Schedule = Constant() if lam_schedule is None else lam_schedule
        self.steps_schedule: Schedule = Constant() if steps_schedule is None else steps_schedule
        self.early_backward = early_backward
        self.compile = compile
        self.step = 0

    def __repr__(self) -> str:
        return f"AdversarialObjective({self.name}, lam {self.lam:g}, {self.attack!r})"

    def __call__(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion | None = None,
        mask: Masks = None,
        offsets: Masks = None,
        joint: bool = False,
        samples: Samples = None,
        subset: Subset | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one batch; under `torch.no_grad` that is an evaluation, and no step.

        Args:
            loss_fn: as for `Attack.run`: returns losses `[B]`, or an `Evaluation`.
            criterion, mask, offsets, joint: as for `Attack.run`.
            samples: the indices of the batch's samples in the data, `[B]`, for `StaggeredReplays`,
                and for `Partial`, which may also be told their number alone; the other forms keep
                nothing of a sample.
            subset: gives the loss function of some of the samples, from their rows (int64 `[n]`,
                ascending), for `Partial`.

        Returns:
            The loss (0-d), and metrics, detached: `loss`, `clean_loss`, `adversarial_loss`,
            `clean_accuracy` and `robust_accuracy` (where the criterion knows them), `eps_scale`,
            `lam`, `steps`, `masked` (samples left out, with masking), and of groups `nonfinite` and
            `zero_gradient` (never had a gradient).
        """
        batch = self.batch(
            loss_fn, criterion=criterion, mask=mask, offsets=offsets, joint=joint,
            samples=samples, subset=subset,
        )  # fmt: skip
        return self.finish(batch, self.form(batch))

    def parts(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion | None = None,
        mask: Masks = None,
        offsets: Masks = None,
        joint: bool = False,
        samples: Samples = None,
        subset: Subset | None = None,
    ) -> tuple[Parts, dict[str, Tensor]]:
        """Compute the losses of one batch sample by sample, for `PerSampleClipper.backward`.

        As a call of the objective, but nothing is averaged, and no gradient is computed
        early (`early_backward` does not apply).

        Args:
            loss_fn, criterion, mask, offsets, joint, samples, subset: as for a call.

        Returns:
            The parts, and metrics as for a call.

        Raises:
            ValueError: the form is none of "mixed", "adversarial", "apr", "partial" and
                "staggered".
        """
        if self.name not in _ADDITIVE:
            raise ValueError(
                f"AdversarialObjective.parts: form must be one of {', '.join(_ADDITIVE)}; got "
                f"{self.name!r}, whose samples have no losses to add"
            )
        batch = self.batch(
            loss_fn, criterion=criterion, mask=mask, offsets=offsets, joint=joint,
            samples=samples, subset=subset,
        )  # fmt: skip
        if isinstance(self.form, (Partial, StaggeredReplays)):
            parts = self.form.parts(batch)
        else:
            clean = None if self.name == "adversarial" else batch.clean()
            batch.ascend()
            adversarial = batch.perturbed()
            kept = batch.weights(adversarial, clean)
            parts = Parts(
                None if clean is None else batch.losses(clean),
                batch.losses(adversarial),
                kept,
                batch.lam,
            )
        _, metrics = self.finish(batch, parts.summed.mean())
        return parts, metrics

    def batch(
        self,
        loss_fn: LossFn,
        *,
        criterion: Criterion | None = None,
        mask: Masks = None,
        offsets: Masks = None,
        joint: bool = False,
        samples: Samples = None,
        subset: Subset | None = None,
    ) -> Batch:
        """Prepare a batch for `form` (a call of the objective does this, and `finish`)."""
        # In an autocast block around several steps its copies of weights are of the step before.
        torch.clear_autocast_cache()
        attack = self.attack.with_steps(self._factor("steps_schedule"))
        attacked = AttackedBatch(
            loss_fn,
            self.sites,
            mask=mask,
            offsets=offsets,
            joint=joint,
            mode=attack.mode,
            compile=self.compile or attack.compile,
            subset=subset,
        )
        return Batch(
            attacked,
            attack,
            criterion,
            self._factor("eps_schedule"),
            self.lam * self._factor("lam_schedule"),
            self.early_backward,
            self.masking,
            samples,
            self.step,
        )

    def finish(self, batch: Batch, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Complete the metrics, and advance by one step, unless under `torch.no_grad`."""
        attacked = batch.attacked if batch.part is None else batch.part[1].attacked
        metrics = batch.metrics
        metrics["loss"] = loss.detach()
        metrics["eps_scale"] = torch.tensor(batch.scale)
        metrics["lam"] = torch.tensor(batch.lam)
        if attacked.perturbations:
            found = attacked.perturbations
            counts = [p.nonfinite.count_nonzero() for p in found]
            metrics.setdefault("nonfinite", total(counts))
            if batch.attack.steps and not batch.frozen:
                metrics["zero_gradient"] = total([p.count_without_gradient() for p in found])
            if self.step == 0:
                warn_of_rounding(attacked.perturbed, batch.attack.norm)
        metrics["steps"] = torch.tensor(batch.attack.steps)
        if torch.is_grad_enabled():  # an evaluation is no step
            # One that serves as several, of eps and lam, say, is told once.
            for schedule in {id(one): one for _, one in self._schedules()}.values():
                update = getattr(schedule, "update", None)
                if update is not None:
                    update(metrics)
            self.step += 1
        return loss, metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs.

        That is the step, the schedules' and the form's states (deltas that are kept, averaged
        parameters), and the state of the attack's generator.
        """
        state: dict[str, Any] = {"step": self.step}
        for name, part in self._stateful():
            state[name] = part.state_dict()
        if self.attack.generator is not None:
            state["generator"] = self.attack.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.step = int(state["step"])
        for name, part in self._stateful():
            if name in state:
                part.load_state_dict(state[name])
        if self.attack.generator is not None and "generator" in state:
            self.attack.generator.set_state(state["generator"].cpu())

    def _factor(self, name: str) -> float:
        """Return the factor of a schedule at this step."""
        return factor_at("AdversarialObjective", name, getattr(self, name), self.step)

    def _schedules(self) -> list[tuple[str, Any]]:
        """Return the objective's schedules and the form's, with their names."""
        own = [(name, getattr(self, name)) for name in _SCHEDULES]
        return [*own, ("schedule", getattr(self.form, "schedule", None))]

    def _stateful(self) -> list[tuple[str, Any]]:
        parts = self._schedules()
        parts += [("form", self.form), ("bregman", getattr(self.form, "bregman", None))]
        return [(name, part) for name, part in parts if hasattr(part, "state_dict")]


def _name(form: Form) -> str:
    """Return what a form that was given as an object is called.

    The names of `FORMS` say what a form can do, and are those of the forms here alone.
    """
    name = str(getattr(form, "name", getattr(form, "__name__", repr(form))))
    if name not in FORMS:
        return name
    known = FORMS[name]()
    own = form is known if isinstance(known, FunctionType) else isinstance(form, type(known))
    return name if own else repr(form)


def _refuse_options(attack: Attack, masking: Masking | None, form: str) -> None:
    """Refuse options that a form would ignore."""
    if attack.stop_when_fooled:
        raise ValueError(
            "AdversarialObjective: stop_when_fooled=True: samples do not leave a training batch; "
            "leave samples out of the update by `masking`"
        )
    if masking is not None and form in ("free", "freeat"):
        raise ValueError(
            f"AdversarialObjective: form {form!r} trains on all samples of its passes and cannot "
            f"have masking={masking!r}; use form='mixed', 'partial' or 'staggered'"
        )
    if form not in SHARED_PASSES:
        return
    for name, value, usual in (
        ("mode", attack.mode, attack.mode != "eval"),
        ("restarts", attack.restarts, attack.restarts == 1),
        ("keep", attack.keep, attack.keep == "last"),
    ):
        if not usual:
            raise ValueError(
                f"AdversarialObjective: form {form!r} trains in the attack's passes and cannot "
                f"have {name}={value!r}"
            )
