"""Robust training in which a part of each batch is perturbed, within one training pass."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from embattle import checks
from embattle.errors import InputError
from embattle.losses import margin
from embattle.objectives.batch import Batch
from embattle.objectives.parts import Parts, mean_of_rows
from embattle.objectives.schedules import Constant, Schedule, factor_at
from embattle.perturb.chosen import run_with_chosen
from embattle.perturb.evaluation import Evaluation

Choose: TypeAlias = Literal["random", "loss", "margin"]
_MOST = 1 << 31  # samples that a number is kept of
_CHOOSE: tuple[Choose, ...] = ("random", "loss", "margin")


class Partial:
    """A share of each batch is perturbed, the rest is clean, within one training pass.

    A form for `AdversarialObjective` (Kurakin et al., ICLR 2017, eq. 1): of n chosen samples of B,
    `(sum L_rest + lam * sum L_adv) / (B - n + lam * n)`. The attack runs the model on the chosen
    samples alone, which `subset=` gives the loss function of; the training pass has the whole
    batch, the chosen samples under their deltas. Half of a batch by FGM adds half of a pass that
    differentiates the embeddings alone to a plain step; `mixed` adds a whole training pass.
    Choosing the samples at the border is BulletTrain's (Hua et al., NeurIPS 2021).

        loss, metrics = objective(
            loss_of(batch), subset=lambda rows: loss_of(batch.take(rows)), samples=indices
        )

    Masking, a criterion, any attack, joint balls
    and sites of scope "row" count for the chosen samples. `mode="same"` counts for the attack's
    passes. A relative eps is of the chosen samples' embeddings. A model whose samples depend on
    each other (batch norm, negatives of the batch) is attacked as it is with the chosen ones alone.

    Args:
        share: of the samples of a batch, rounded up.
        choose: "random"; "loss": the largest; "margin": the nearest to the border between right and
            wrong (needs `Misclassify(labels)`). Loss and margin are those of the sample's last
            batch, which cost nothing: the objective needs `samples=`, the indices, and what never
            came is chosen first. They are of the unperturbed sample where the attack starts at
            zero, else as it was trained on. Without indices, a forward pass of the whole batch
            shows them.
        delay: steps before the first perturbation; until then training is plain.
        schedule: factor on `share` at each step.
        every: attack in every so many-th step, and train plainly in the others. An ascent of few
            samples takes more time than its share: a quarter of the batch in every fourth step
            takes less than a sixteenth in each.

    Raises:
        TypeError, ValueError: about an argument.
    """

    name: ClassVar[str] = "partial"

    def __init__(
        self,
        share: float = 0.5,
        *,
        choose: Choose = "random",
        delay: int = 0,
        schedule: Schedule | None = None,
        every: int = 1,
    ) -> None:
        self.share = checks.real("Partial", "share", share, 0, 1)
        self.choose = checks.one_of("Partial", "choose", choose, _CHOOSE)
        self.delay = checks.integer("Partial", "delay", delay, 0)
        self.every = checks.integer("Partial", "every", every, 1)
        self.schedule: Schedule = Constant() if schedule is None else schedule
        # By index in the data: what is large is chosen. Infinite where a sample never came.
        self._last = torch.empty(0, dtype=torch.float32)

    def __repr__(self) -> str:
        often = "a batch" if self.every == 1 else f"one batch in {self.every}"
        return f"Partial({self.share:g} of {often}, by {self.choose})"

    def __call__(self, batch: Batch) -> Tensor:
        """Attack the chosen samples, and run the training pass.

        Returns:
            The loss, to be backpropagated.

        Raises:
            InputError: no loss function of the chosen samples, or a compiled model.
            ValueError: samples that share what is perturbed.
        """
        losses, rows, kept = self._run(batch)
        return losses.mean() if rows is None else mean_of_rows(losses, rows, kept, batch.lam)

    def parts(self, batch: Batch) -> Parts:
        """Do the same; nothing is averaged."""
        losses, rows, kept = self._run(batch)
        if rows is None:
            return Parts(losses, torch.zeros_like(losses), None, batch.lam)
        return Parts.of_rows(losses, rows, kept, batch.lam)

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attack, and run the training pass: losses `[B]`, the chosen rows, and their masking."""
        if batch.attacked.compile:
            raise InputError("Partial: cannot have compile=True, as the batches differ in size")
        clean: Evaluation | None = None
        if not batch.frozen:  # else the samples were chosen, and attacked, before
            rows = self._chosen(batch)
            batch.part = None
            if len(rows):
                if batch.attacked.subset is None:
                    raise InputError(
                        "Partial: needs the loss function of the chosen samples: "
                        "objective(loss_fn, subset=lambda rows: loss_fn_of_those_rows)"
                    )
                batch.part = rows, batch.choose(rows)
                clean = batch.part[1].ascend()
        if batch.part is None:
            evaluation = batch.clean()
            losses = batch.losses(evaluation)
            self._note(batch, evaluation, None, None)
            batch.metrics["perturbed"] = torch.tensor(0)
            return losses, None, None
        rows, part = batch.part
        _refuse_other_size(part, rows)
        evaluation = run_with_chosen(batch.attacked, part.attacked, rows)
        losses = batch.losses(evaluation)
        rows = rows.to(losses.device)
        if len(losses) != batch.size:
            raise InputError(f"Partial: {len(losses)} losses for {batch.size} samples")
        self._report(batch, evaluation, rows)
        kept = part.weights(evaluation.select(rows), clean)
        if "masked" in part.metrics:
            batch.metrics["masked"] = part.metrics["masked"]
        self._note(batch, evaluation, rows, clean)
        return losses, rows, kept

    # --- which samples ---------------------------------------------------------------------------

    def _chosen(self, batch: Batch) -> Tensor:
        """Return the rows of the samples to attack, int64 `[n]`, ascending."""
        attacks = batch.step >= self.delay and (batch.step - self.delay) % self.every == 0
        share = 0.0
        if attacks:
            share = min(self.share * factor_at("Partial", "schedule", self.schedule, batch.step), 1)
        # Where a schedule has taken eps or lam to zero there is nothing to look for.
        if share <= 0 or batch.scale == 0 or batch.lam == 0:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        size = batch.size
        count = math.ceil(round(share * size, 9))
        mixed = torch.randperm(size, generator=_cpu(batch.attack.generator), device="cpu")
        mixed = mixed.to(_device(batch))
        if self.choose != "random" and count < size:
            # What is equal stands in random order.
            keys = self._keys(batch, size)[mixed]
            mixed = mixed[keys.argsort(descending=True, stable=True)]
        return mixed[:count].sort().values

    def _keys(self, batch: Batch, size: int) -> Tensor:
        """Return a number for each sample, `[B]`; the largest are chosen."""
        samples = _indices(batch)
        if samples is not None:
            self._hold(samples)
            return self._last[samples.to(self._last.device)].to(_device(batch))
        attacked = batch.attacked
        with attacked.attacking(), torch.no_grad():
            evaluation = attacked.run().detach()
        if evaluation.batch != size:
            raise InputError(f"Partial: {evaluation.batch} losses for {size} samples")
        return self._key(batch, evaluation).to(_device(batch))

    def _key(self, batch: Batch, evaluation: Evaluation) -> Tensor:
        """Return what a sample is chosen by, `[B]` in float32."""
        if self.choose == "loss":
            return batch.losses(evaluation).detach().float()
        labels = batch.labels
        counted = getattr(batch.criterion, "ignore_index", -100)
        outputs = batch.outputs(evaluation).detach()
        return -margin(outputs, labels, ignore_index=counted).abs().float()

    def _note(
        self, batch: Batch, evaluation: Evaluation, rows: Tensor | None, clean: Evaluation | None
    ) -> None:
        """Keep what the samples' next batch chooses them by."""
        samples = None if self.choose == "random" else _indices(batch)
        # What is measured at other weights, or in an evaluation, is no batch of the training.
        if samples is None or batch.frozen or not torch.is_grad_enabled():
            return
        keys = self._key(batch, evaluation)
        if rows is not None and clean is not None and batch.part is not None:
            keys = keys.index_copy(0, rows, self._key(batch.part[1], clean))
        if self._last.device != keys.device:
            self._last = self._last.to(keys.device)
        self._hold(samples)
        # A broken sample is not to be chosen for ever.
        self._last[samples.to(keys.device)] = keys.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _hold(self, samples: Tensor) -> None:
        """Make room for samples."""
        missing = int(samples.max()) + 1 - len(self._last) if len(samples) else 0
        if missing > 0:
            new = self._last.new_full((missing,), math.inf)
            self._last = torch.cat([self._last, new])

    def _report(self, batch: Batch, evaluation: Evaluation, rows: Tensor) -> None:
        """Record the losses and accuracies of clean and perturbed samples."""
        rest = torch.ones(evaluation.batch, dtype=torch.bool, device=rows.device)
        rest[rows] = False
        batch.metrics["perturbed"] = torch.tensor(len(rows))
        batch.report("adversarial", evaluation, rows)
        if len(rows) < evaluation.batch:
            batch.report("clean", evaluation, rest.nonzero().squeeze(1))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a resumed run needs: the samples' last losses or margins."""
        return {"last": self._last.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self._last = state["last"].clone()


def _indices(batch: Batch) -> Tensor | None:
    """Return the indices of the batch's samples in the data, if they are known."""
    samples = batch.samples
    if samples is None or isinstance(samples, int):
        return None
    found = torch.as_tensor(samples)
    if found.is_floating_point() or found.dim() != 1 or (len(found) and int(found.min()) < 0):
        raise InputError("Partial: samples must be indices in the data, whole numbers from 0")
    if len(found) and int(found.max()) >= _MOST:
        raise InputError(
            f"Partial: samples must be indices in the data; got {int(found.max())}. A number is "
            "kept for each index: count the samples from 0"
        )
    return found.long()


def _device(batch: Batch) -> torch.device:
    """Return where the rows are wanted: where the model is that is perturbed."""
    parameters = (p for site in batch.attacked.sites for p in site.module.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))


def _cpu(generator: torch.Generator | None) -> torch.Generator | None:
    return generator if generator is not None and generator.device.type == "cpu" else None


def _refuse_other_size(part: Batch, rows: Tensor) -> None:
    if part.attacked.size != len(rows):
        raise InputError(
            f"Partial: subset gave {part.attacked.size} losses for {len(rows)} samples"
        )
