"""Adversarial training in the Hugging Face Trainer: a mix-in for any subclass, and a ready one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor

from embattle.attacks import Attack
from embattle.criteria import Criterion
from embattle.integrations.head_losses import Given, HeadLoss, Inputs, LossPerSample, head_loss_of
from embattle.integrations.trainer_batches import (
    SAMPLES,
    count,
    needs_numbers,
    numbered_loader,
    take,
)
from embattle.objectives import AdversarialObjective, Partial
from embattle.perturb.calls import Call
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.model_state import kept_state
from embattle.perturb.random_state import preserved_random_state
from embattle.perturb.site import Site

Sites: TypeAlias = "Site | Sequence[Site]"

_STATE = "embattle_objective.pt"
_WAY_OUT = (
    "Say what to train on: loss_per_sample=f, where f(outputs, inputs) gives one loss for each "
    "sample, [B]"
)


@dataclass
class _Known:
    """What was found out about batches with the same inputs.

    Attributes:
        head: what the model is trained on.
        by_items: its loss is a sum over the batch, divided by the number of labels of all batches
            that are accumulated, instead of a mean; None while both have been the same.
        seen: batches so far.
    """

    head: HeadLoss
    by_items: bool | None = None
    seen: int = 0


class AdversarialTrainerMixin:
    """Put this before a Trainer class: `class MyTrainer(AdversarialTrainerMixin, Trainer): ...`.

    Training batches go through an `AdversarialObjective`; evaluation and prediction are the
    Trainer's own. The loss of each sample is the one that transformers' models have for the task:
    one class for each sample, token, or choice, several labels, values, answer spans, the next
    token; with label smoothing if the Trainer has it. Its mean is compared with the Trainer's own
    loss on the 1st, 10th, 100th, ... batch: what differs is refused. Metrics of the objective are
    logged as their means since the last log.

    For the form `StaggeredReplays` the training batches are those of `StaggeredBatches`, each
    process's own: an epoch has `visits` visits of each sample, so take 1/visits as many epochs. For
    `Partial` the chosen rows of a batch's tensors are run alone.

    Gradients may be accumulated, in mixed precision too; a float16 scaler or sharded parameters
    turn `early_backward` off. Checkpoints hold the objective's state.

    Args:
        attack: the attack.
        site: where, or a function of the model that makes the site; the model's input embeddings by
            default. Where the site has no mask of its own, what the attention mask leaves out, and
            padding, is not perturbed.
        loss_per_sample: from a model's outputs and inputs to losses `[B]`, for a loss that is not
            known, and in place of a `compute_loss_func`. It is not compared with the Trainer's.
        criterion: from a batch's inputs to what the attack is for. By default it is what the labels
            say; none for values, for which it says how far off counts:
            `lambda inputs: Deviate(inputs["labels"], by=0.5)`.
        objective: arguments of `AdversarialObjective`, such as `form`, `lam` or `eps_schedule`.
        args, kwargs: the Trainer's.

    Raises:
        ValueError: a `compute_loss_func` without `loss_per_sample`, or a `model_init` with a site
            of another model; in training a batch whose loss for each sample is not known, or does
            not agree with the Trainer's.
    """

    model: Any
    args: Any
    accelerator: Any
    compute_loss_func: Any
    label_smoother: Any
    model_accepts_loss_kwargs: bool
    model_init: Any
    loss_is_scaled_for_ga: bool | None
    hp_search_backend: Any
    _adversarial: AdversarialObjective
    _searched: Any

    def __init__(
        self,
        *args: Any,
        attack: Attack,
        site: Sites | Callable[[Any], Sites] | None = None,
        loss_per_sample: LossPerSample | None = None,
        criterion: Callable[[Inputs], Criterion | None] | None = None,
        objective: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "compute_loss_func", None) is not None and loss_per_sample is None:
            raise ValueError(
                "AdversarialTrainer: compute_loss_func gives one number for a batch, and an attack "
                f"needs one for each sample. {_WAY_OUT}"
            )
        if site is not None and not callable(site) and self.model_init is not None:
            raise ValueError(
                "AdversarialTrainer: model_init makes a new model for each training, which the "
                "site does not belong to; give a function: site=lambda model: Site(model...)"
            )
        self._attack, self._options = attack, dict(objective or {})
        if (
            getattr(self.args, "fp16", False)
            or getattr(self, "is_fsdp_enabled", False)
            or getattr(self, "is_deepspeed_enabled", False)
        ):
            self._options["early_backward"] = False
        self._site = site
        self._loss_per_sample, self._criterion = loss_per_sample, criterion
        self._known: dict[tuple[Any, ...], _Known] = {}
        # The sum of each metric since the last log, and of how many batches.
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._inputs: Inputs = {}
        self._first_state: dict[str, Any] | None = None  # the objective's, before any training
        self._place(self.model)

    @property
    def objective(self) -> Any:
        """What is trained on; during a search over hyperparameters what the Trainer has there."""
        return self._adversarial if self.hp_search_backend is None else self._searched

    @objective.setter
    def objective(self, value: Any) -> None:
        self._searched = value

    @property
    def site(self) -> Sites:
        """Where the model is perturbed."""
        sites = self._adversarial.sites
        return sites[0] if len(sites) == 1 else sites

    def call_model_init(self, *args: Any) -> Any:
        """Make a new model, and an objective for it."""
        model = super().call_model_init(*args)  # type: ignore[misc]
        if hasattr(self, "_adversarial"):  # the first model is there before the attack
            self._place(model)
        return model

    def _place(self, model: Any) -> None:
        site = self._site
        if site is None:
            sites: Sites = Site.embeddings(model, per_sample=self._choices)
        else:
            sites = site(model) if callable(site) else site
        self._adversarial = AdversarialObjective(self._attack, sites, **self._options)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, with the objective as it was before the first training.

        The Trainer calls this once more for each batch size that it tries (auto_find_batch_size).
        """
        self._seen.clear()
        if self._first_state is None:
            self._first_state = deepcopy(self._adversarial.state_dict())
        else:
            self._adversarial.load_state_dict(deepcopy(self._first_state))
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def get_train_dataloader(self) -> Any:
        """Give the Trainer's batches; with the samples' numbers for forms that need them."""
        form = self._adversarial.form
        if needs_numbers(form):
            return numbered_loader(self, form)  # type: ignore[arg-type]
        return super().get_train_dataloader()  # type: ignore[misc]

    # --- the loss --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the robust loss in training, and the Trainer's own loss otherwise.

        Outputs that are returned in training are those of the last pass.
        """
        items = num_items_in_batch
        if not (model.training and torch.is_grad_enabled()):
            if items is not None:
                kwargs["num_items_in_batch"] = items
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        inputs = dict(inputs)
        samples = inputs.pop(SAMPLES, None)
        known = self._understood(model, inputs, items)
        head, scale = known.head, self._scale(known, inputs, items)
        # A mean over this batch is divided by the number of batches that are accumulated.
        self.loss_is_scaled_for_ga = bool(known.by_items)
        last: list[Any] = [None]

        def loss_of(mine: Inputs) -> Callable[[], Evaluation]:
            given = self._given(mine, items)

            def loss_fn() -> Evaluation:
                self._inputs = mine  # which the masks of this pass are made of
                outputs = last[0] = model(**given)
                return head.evaluate(outputs, mine)

            return loss_fn

        more: dict[str, Any] = {"samples": samples}
        if isinstance(self._adversarial.form, Partial):
            more["samples"] = count(inputs) if samples is None else samples
            more["subset"] = lambda rows: loss_of(take(inputs, rows))
        try:
            masks = [self._mask if site.mask is None else None for site in self._adversarial.sites]
            loss, metrics = self._adversarial(
                loss_of(inputs),
                criterion=(self._criterion or head.criterion)(inputs),
                mask=masks if len(masks) > 1 else masks[0],
                **more,
            )
        finally:
            self._inputs = {}
        self._note(metrics)
        # Not the losses of the samples, by which some may be chosen: they are those of any batch.
        loss = loss if scale is None else loss * scale
        return (loss, last[0]) if return_outputs else loss

    def _given(self, inputs: Inputs, items: Tensor | int | None) -> Inputs:
        """Give what the Trainer calls the model with."""
        given = dict(inputs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            given.pop("labels", None)
        if self.model_accepts_loss_kwargs and items is not None:
            given["num_items_in_batch"] = items
        return given

    def _understood(self, model: Any, inputs: Inputs, items: Tensor | int | None) -> _Known:
        """Find out what such batches are trained on, and compare it with the Trainer's own loss."""
        key = (*sorted(inputs), items is None)
        known = self._known.get(key)
        seen = 0 if known is None else known.seen
        undecided = known is not None and known.by_items is None and self._accumulates(items)
        if known is None or undecided or _is_power_of_ten(seen + 1):
            found = self._find_out(model, inputs, items)
            if known is not None and found.by_items is None:
                found.by_items = known.by_items
            known = self._known[key] = found
        known.seen = seen + 1
        return known

    def _accumulates(self, items: Tensor | int | None) -> bool:
        """Whether labels of several batches make one step."""
        steps = getattr(self.args, "gradient_accumulation_steps", 1)
        return items is not None and (steps > 1 or self.accelerator.num_processes > 1)

    def _find_out(self, model: Any, inputs: Inputs, items: Tensor | int | None) -> _Known:
        plain = self.accelerator.unwrap_model(model)
        base = getattr(plain, "_orig_mod", plain)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base  # peft
        name = type(base).__name__
        of_user = self._loss_per_sample
        if of_user is None and not {"labels", "start_positions"} & inputs.keys():
            raise ValueError(
                f"AdversarialTrainer: a batch for {name} has no `labels` (but "
                f"{', '.join(sorted(inputs))}), so that its samples have no losses that are known. "
                f"{_WAY_OUT}"
            )
        own: Any = None
        with torch.no_grad(), preserved_random_state(), kept_state([base]):
            if of_user is None:
                options = {} if items is None else {"num_items_in_batch": items}
                own, outputs = super().compute_loss(plain, dict(inputs), True, **options)  # type: ignore[misc]
            else:
                outputs = plain(**self._given(inputs, items))
            smoother = None if "labels" not in inputs else self.label_smoother
            smoothing = None if smoother is None else float(smoother.epsilon)
            head = head_loss_of(base, outputs, inputs, smoothing)
            if of_user is not None:
                return _Known(Given(of_user, head))
            if head is None:
                raise ValueError(
                    f"AdversarialTrainer: for {name} with {', '.join(sorted(inputs))} the loss of "
                    f"each sample is not known. {_WAY_OUT}"
                )
            losses = head.evaluate(outputs, inputs).losses
        assert losses is not None
        return _Known(head, self._compare(name, head, losses.mean(), own, inputs, items))

    def _compare(
        self, name: str, head: HeadLoss, mean: Tensor, own: Tensor, inputs: Inputs, items: Any
    ) -> bool | None:
        """Compare with the Trainer's own loss; tell whether that was divided by all items."""
        world = self._world(items)
        counted = head.counted(inputs)
        shares: dict[bool, float] = {False: float(mean) * world}
        if items is not None and counted is not None:
            shares[True] = float(mean) * float(counted / items) * world
        loss = float(own)
        if not (torch.isfinite(mean) & torch.isfinite(own)):
            return None  # no label counts, or the model is broken: the next batch may tell
        narrow = own.dtype in (torch.float16, torch.bfloat16) or self._autocast()
        tolerance = 2e-2 if narrow else 1e-3
        fits = [
            by_items
            for by_items, share in shares.items()
            if abs(share - loss) <= tolerance * max(abs(share), abs(loss))
        ]
        if not fits:
            raise ValueError(
                f"AdversarialTrainer: the Trainer's own loss for this batch is {loss:g}, and the "
                f"losses of its samples, as far as they are known for {name} ({head.name}), have "
                f"the mean {float(mean):g}. Has the loss other terms or weights, or is "
                f"compute_loss overridden? {_WAY_OUT}"
            )
        return fits[0] if len(fits) == 1 and len(shares) == 2 else None

    def _autocast(self) -> bool:
        return bool(getattr(self.args, "fp16", False) or getattr(self.args, "bf16", False))

    def _world(self, items: Any) -> int:
        """Give what the Trainer multiplies by, as gradients are averaged over processes."""
        across = getattr(self.args, "average_tokens_across_devices", False)
        if not across or items is None or not self.model_accepts_loss_kwargs:
            return 1
        tensor_parallel = getattr(self, "get_tp_size", lambda: 1)()
        return int(self.accelerator.num_processes // tensor_parallel)

    def _scale(self, known: _Known, inputs: Inputs, items: Any) -> Tensor | None:
        """Give the factor from a mean over the batch to its share of all items."""
        counted = known.head.counted(inputs) if known.by_items else None
        return None if counted is None else counted / items * self._world(items)

    # --- where -----------------------------------------------------------------------------------

    def _choices(self, call: Call) -> int:
        """Tell how many rows of a look-up belong to a sample: its choices, in one batch."""
        tokens = self._inputs.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            return 1
        return tokens.shape[1] if len(call.value) == tokens.shape[0] * tokens.shape[1] else 1

    def _mask(self, call: Call) -> Tensor | None:
        """Tell which vectors may move: those that are attended to, and no padding."""
        indices, places = call.indices, call.value.shape[:-1]
        if indices is None or indices.shape != places:
            mask = self._inputs.get("attention_mask")
            fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == places
            return mask.bool() if fits and not self._config("is_encoder_decoder") else None  # type: ignore[union-attr]
        for same in (_is, _equals):
            for name, masked in _MASKS:
                tokens, mask = self._inputs.get(name), self._inputs.get(masked)
                if not isinstance(tokens, Tensor) or not same(tokens, indices):
                    continue
                if isinstance(mask, Tensor) and mask.numel() == indices.numel():
                    return mask.reshape(places).bool()
        padding = self._config("pad_token_id")
        return None if padding is None else indices != padding

    def _config(self, name: str) -> Any:
        return getattr(getattr(self.model, "config", None), name, None)

    # --- logs and checkpoints --------------------------------------------------------------------

    def _note(self, metrics: dict[str, Tensor]) -> None:
        """Add a batch's metrics to those of the next log."""
        for name, values in metrics.items():
            if name == "loss":
                continue
            value = values.detach().float().mean()
            known = (~value.isnan()).float()
            total, batches = self._seen.get(name, (0.0, 0.0))
            self._seen[name] = (total + torch.where(value.isnan(), 0, value), batches + known)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the objective's metrics to the training logs."""
        if "loss" in logs:
            logs |= {name: float(total / known) for name, (total, known) in self._seen.items()}
            self._seen.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save or self.args.process_index:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self._adversarial.state_dict(), Path(output_dir) / self._state_file())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = Path(checkpoint) / self._state_file()
        if path.exists():
            self._adversarial.load_state_dict(torch.load(path, weights_only=True))

    def _state_file(self) -> str:
        """Name the file of this process: what is kept of samples is of its own share."""
        rank = self.args.process_index
        return _STATE if rank == 0 else _STATE.replace(".", f"_{rank}.")


_MASKS = (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))


def _is_power_of_ten(number: int) -> bool:
    return str(number).rstrip("0") == "1"


def _is(one: Tensor, two: Tensor) -> bool:
    return one.data_ptr() == two.data_ptr() and one.numel() == two.numel()


def _equals(one: Tensor, two: Tensor) -> bool:
    return one.numel() == two.numel() and torch.equal(one.reshape(-1), two.reshape(-1))


class AdversarialTrainer(AdversarialTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with adversarial training (see `AdversarialTrainerMixin`)."""
