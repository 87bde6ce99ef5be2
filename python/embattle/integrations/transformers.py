"""Adversarial training in the Hugging Face Trainer: a mix-in for any subclass, and a ready one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from embattle.attacks import Attack
from embattle.losses import cross_entropy, squared_distance
from embattle.objectives import AdversarialObjective
from embattle.perturb.site import Site

LossPerSample = Callable[[Any, dict[str, Any]], Tensor]


def loss_per_sample(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """Cross-entropy (regression: squared error) of each sample from a model's logits, `[B]`.

    Sequences of labels are averaged over those that are not -100. A causal language model needs a
    function of its own, which shifts the labels.
    """
    labels, logits = inputs["labels"], outputs.logits
    if labels.is_floating_point():
        return squared_distance(logits.reshape(labels.shape), labels)
    return cross_entropy(logits, labels)


class AdversarialTrainerMixin:
    """Put this before a Trainer class: `class MyTrainer(AdversarialTrainerMixin, Trainer): ...`.

    Training batches go through an `AdversarialObjective`; evaluation and prediction are the
    Trainer's own. Metrics of the objective are logged as their means since the last log. Works with
    gradient accumulation and mixed precision; a float16 scaler or sharded parameters turn
    `early_backward` off.

    Args:
        attack: the attack.
        site: where; the model's input embeddings by default.
        loss_per_sample: from a model's outputs and inputs to losses `[B]`.
        objective: arguments of `AdversarialObjective`, such as `form`, `lam` or `eps_schedule`.
        args, kwargs: the Trainer's.
    """

    model: Any
    args: Any

    def __init__(
        self,
        *args: Any,
        attack: Attack,
        site: Site | list[Site] | None = None,
        loss_per_sample: LossPerSample = loss_per_sample,
        objective: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.site = Site(self.model) if site is None else site
        options = dict(objective or {})
        if getattr(self.args, "fp16", False) or getattr(self, "is_fsdp_enabled", False):
            options["early_backward"] = False
        self.objective = AdversarialObjective(attack, self.site, **options)
        self._loss_per_sample = loss_per_sample
        self._seen: list[dict[str, Tensor]] = []
        # The loss below is a mean over the batch: the Trainer divides it when it accumulates.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Compute the robust loss in training, and the Trainer's own loss otherwise."""
        if return_outputs or not model.training or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        labels = inputs["labels"]
        given = {key: value for key, value in inputs.items() if key != "labels"}

        def loss_fn() -> tuple[Tensor, Tensor]:
            outputs = model(**given)
            return self._loss_per_sample(outputs, inputs), outputs.logits

        mask = inputs.get("attention_mask")
        fits = mask is not None and mask.dim() == 2
        loss, metrics = self.objective(
            loss_fn,
            mask=mask.bool() if fits and mask is not None else None,
            labels=None if labels.is_floating_point() else labels,
        )
        self._seen.append(metrics)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the objective's metrics to the training logs."""
        if self._seen and "loss" in logs:
            for name in self._seen[-1]:
                if name == "loss":
                    continue
                values = [seen[name].float().mean().cpu() for seen in self._seen if name in seen]
                logs[name] = float(torch.stack(values).mean())
            self._seen.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class AdversarialTrainer(AdversarialTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with adversarial training (see `AdversarialTrainerMixin`)."""
