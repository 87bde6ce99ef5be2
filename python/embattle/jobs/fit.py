"""One model's training, from its first weights or from a checkpoint to its files."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embattle.audit.evaluation import predict
from embattle.audit.examine import labels_of
from embattle.data.batch import Batch
from embattle.errors import InputError, Interrupted
from embattle.files import write_text
from embattle.jobs.checkpoint import (
    Checkpoint,
    model_tensors,
    of_all_processes,
    optimizer_tensors,
    random_tensors,
    restore_model,
    restore_optimizer,
    restore_random,
)
from embattle.jobs.loss import Loss
from embattle.jobs.order import Order
from embattle.jobs.provenance import weights_of
from embattle.jobs.recipe import Recipe
from embattle.jobs.run_folder import Trained
from embattle.jobs.validation import Validation
from embattle.progress import bar, say
from embattle.tasks.base import Task


def first_model(task: Task) -> nn.Module:
    """The model with its first weights, in training mode; the same for the same seed.

    The state of torch's random numbers stays as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        return task.build().train()


class Diverged(InputError):
    """The loss is no longer a number."""


class Fit:
    """One model's training, from its first weights or from a checkpoint to its files.

    Args:
        recipe: the job.
        variant: its name in the recipe.
        task: has read its data.
        out: the run's folder.
        accelerator: Accelerate's object.
        watch: called with the figures of each look at the validation part; may raise.
    """

    def __init__(
        self,
        recipe: Recipe,
        variant: str,
        task: Task,
        out: Path,
        accelerator: Any,
        *,
        watch: Callable[[Mapping[str, float]], None] = lambda look: None,
    ) -> None:
        self.recipe, self.variant, self.task, self.out = recipe, variant, task, out
        self.accelerator, self.watch = accelerator, watch
        self.steps = recipe.steps_of(variant)
        self.checkpoint = out / variant / "checkpoint.safetensors"
        rank = accelerator.process_index
        torch.manual_seed(recipe.seed + rank)
        self.generator = torch.Generator().manual_seed(recipe.seed + 1000 + rank)
        self.bare = first_model(task)
        sites = task.sites(self.bare, recipe.threat.group)
        self.loss = Loss(
            recipe,
            variant,
            task,
            self.bare,
            sites,
            self.generator,
            processes=accelerator.num_processes,
        )
        self.validation: Validation | None = None
        if recipe.train.validation is not None:
            self.validation = Validation(recipe, variant, task, self.bare, sites)
        trained = [p for p in self.bare.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=0.0, weight_decay=recipe.train.weight_decay, fused=True
        )
        self.model, self.optimizer = accelerator.prepare(self.bare, optimizer)
        self.history: list[dict[str, float]] = []
        self.order = Order(
            recipe,
            variant,
            task,
            self.bare,
            rank=rank,
            ranks=accelerator.num_processes,
        )
        self.seconds = 0.0
        # What the last look at the validation part found, for the progress.
        self._seen: dict[str, float] = {}
        if self.checkpoint.is_file():
            self._restore()

    def go(self) -> Trained:
        """Trains to the end and saves the model.

        Returns:
            What `run.json` keeps about it.

        Raises:
            Interrupted: after a checkpoint was written.
            InputError: if the loss is no longer a number.
        """
        trained = self.fit()
        if self.accelerator.is_main_process:
            folder = self.out / self.variant
            self.task.save(self.bare, folder)
            write_text(folder / "recipe.yaml", self.recipe.to_yaml())
            self.checkpoint.unlink(missing_ok=True)
            trained = trained.model_copy(update={"weights": weights_of(folder)})
        return trained

    def fit(self) -> Trained:
        """The same, without saving."""
        steps, every = self.steps, self.recipe.train.checkpoint_every
        start = len(self.history)
        began = time.monotonic() - self.seconds
        first = self.accelerator.is_main_process
        with _stop_requests() as stop, bar(self.variant, steps, start=start, shown=first) as show:
            for step in range(start, steps):
                figures = self._step(step)
                self.history.append(figures)
                ended = self._look(step + 1)
                self.seconds = time.monotonic() - began
                show(step + 1, {**figures, **self._seen})
                for text in self.loss.findings() if first else ():
                    say(f"{self.variant}, step {step + 1}: {text}")
                self._track(figures, step + 1)
                if step + 1 == steps or ended:
                    break
                if self._agreed(stop()):
                    self._save_checkpoint()
                    raise Interrupted(
                        f"stopped after step {step + 1} of {steps} ({self.variant}); the same "
                        "command with --resume goes on from there"
                    )
                if every and (step + 1) % every == 0:
                    self._save_checkpoint()
        chosen = None
        looks: list[dict[str, float]] = []
        if self.validation is not None:
            self.validation.take()
            looks, chosen = self.validation.looks, self.validation.chosen
        return Trained(
            seconds=round(self.seconds, 1),
            validation=self._validate(),
            history=self.history,
            looks=looks,
            chosen=chosen,
        )

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step."""
        rate = self.recipe.train.learning_rate * self.recipe.variants[self.variant].rate
        rate *= self._decay(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures: dict[str, list[float]] = {}
        places = self.order.places(step)
        parts = self._batches_of(step, places)
        for number, (batch, mine) in enumerate(zip(parts, places, strict=True), 1):
            with self.accelerator.accumulate(self.model), self.loss.open():
                loss, found = self.loss(self.model, batch, step, mine)
                if not math.isfinite(float(loss.detach().sum())):
                    raise Diverged(
                        f"the {self.variant} loss is no longer a number at step {step + 1}: lower "
                        "train.learning_rate or threat.eps, or let eps grow more slowly "
                        f"(variants.{self.variant}.eps_schedule)"
                    )
                last = number == len(parts)
                self.loss.backward(loss, self.accelerator, share=1 / len(parts), last=last)
            for name, value in found.items():
                figures.setdefault(name, []).append(value)
        bound = self.recipe.train.max_grad_norm
        if bound is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), bound)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: sum(values) / len(values) for name, values in figures.items()}

    def _decay(self, step: int) -> float:
        """Linear growth over the warm-up, then linear decay; the last step's rate is above 0."""
        warm = round(self.recipe.train.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        return (self.steps - step) / max(1, self.steps - warm)

    def _batches_of(self, step: int, places: Sequence[Tensor]) -> list[Batch]:
        """These samples as batches on the device."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        drawn = self.recipe.seed * 1_000_003 + step // self.order.replays * ranks + rank
        batch = self.task.batch(self.bare, "train", torch.cat(list(places)), seed=drawn)
        batch = batch.to(self.accelerator.device)
        if len(places) == 1:
            return [batch]
        ends = [0, *accumulate([len(rows) for rows in places])]
        return [batch.take(torch.arange(a, b)) for a, b in pairwise(ends)]

    def _track(self, figures: Mapping[str, float], done: int) -> None:
        """Hands figures to the recipe's trackers."""
        named = {f"{self.variant}/{name}": value for name, value in figures.items()}
        self.accelerator.log(named, step=done)

    def _look(self, done: int) -> bool:
        """Looks at the validation part if it is time; whether the training should end."""
        if self.validation is None or not self.validation.due(done):
            return False
        look = self.validation.look(done)
        self.loss.check_held(self.bare, self.validation.batches[0])
        if self.accelerator.num_processes > 1:  # all go by the first one's figures
            mine = torch.tensor([list(look.values())], device=self.accelerator.device)
            look = dict(zip(look, self.accelerator.gather(mine)[0].tolist(), strict=True))
        self.validation.note(look)
        self.watch(self.validation.looks[-1])
        right = self.task.kind.measures[0][0]
        self._track({f"validation/{key}": value for key, value in look.items()}, done)
        self._seen = {f"validation {right}": look[right], "under attack": look[f"robust_{right}"]}
        return self.validation.exhausted

    def _validate(self) -> dict[str, float]:
        """What is right of the validation part, and its loss; nothing if there is no such part."""
        if not len(self.task.parts.get("validation", ())):
            return {}
        batches = self.task.batches(self.bare, "validation", 100)
        outputs, kind = predict(self.bare, batches, self.task), self.task.kind
        labels = labels_of(batches)
        if self.accelerator.is_main_process and kind.learnt_nothing(outputs, labels):
            say(
                f"{self.variant}: on the validation part the model is no better than one answer "
                "for all: the training has collapsed, or was too short; lower "
                f"train.learning_rate or variants.{self.variant}.rate, or raise train.steps"
            )
        return {
            kind.measures[0][0]: float(kind.right(outputs, labels).double().mean()),
            "loss": float(kind.losses(outputs, labels).mean()),
        }

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop; all give the same answer."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor([float(stop)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _save_checkpoint(self) -> None:
        """Writes the state at a step boundary; random states of all processes included."""
        tensors = {**model_tensors(self.bare), **optimizer_tensors(self.optimizer.optimizer)}
        for name, state in random_tensors(self.generator).items():
            mine = state.to(self.accelerator.device)[None]
            tensors[name] = self.accelerator.gather(mine)
        facts = {
            "variant": self.variant,
            "processes": self.accelerator.num_processes,
            "history": self.history,
            "seconds": self.seconds,
        }
        objective, facts["objective"] = self.loss.state()
        for rank, found in enumerate(of_all_processes(self.accelerator, objective)):
            tensors.update({f"process{rank}.{name}": value for name, value in found.items()})
        if self.validation is not None:
            chosen, facts["validation"] = self.validation.state()
            tensors.update(chosen)
        if self.accelerator.scaler is not None:
            facts["scaler"] = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            Checkpoint(tensors, facts).save(self.checkpoint)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        saved = Checkpoint.load(self.checkpoint)
        try:
            self._take(saved)
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.checkpoint} does not fit this run ({type(error).__name__}: {reason}); "
                "start again with --overwrite"
            ) from error

    def _take(self, saved: Checkpoint) -> None:
        """Puts a checkpoint's state in place."""
        if saved.facts["processes"] != self.accelerator.num_processes:
            raise InputError(
                f"{self.checkpoint} was written by {saved.facts['processes']} processes; continue "
                "with as many"
            )
        if saved.facts["variant"] != self.variant:
            raise ValueError(f"it is the {saved.facts['variant']} model's")
        history = [{k: float(v) for k, v in step.items()} for step in saved.facts["history"]]
        if not 0 < len(history) < self.steps:
            raise ValueError(f"it was written after step {len(history)}")
        restore_model(self.bare, saved.tensors)
        restore_optimizer(self.optimizer.optimizer, saved.tensors)
        mine = f"process{self.accelerator.process_index}."
        own = {k.removeprefix(mine): x for k, x in saved.tensors.items() if k.startswith(mine)}
        self.loss.restore(own, saved.facts["objective"])
        if self.validation is not None:
            self.validation.restore(saved.tensors, saved.facts["validation"])
        rank = self.accelerator.process_index
        restore_random(
            self.generator,
            {k: x[rank] for k, x in saved.tensors.items() if k.startswith("random.")},
        )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.facts["scaler"])
        self.history = history
        self.seconds = float(saved.facts["seconds"])


@contextmanager
def _stop_requests() -> Iterator[Any]:
    """Lets Ctrl-C and SIGTERM finish the step first; a second Ctrl-C stops at once.

    Yields:
        A function that tells whether a stop was asked for.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in before:
        signal.signal(number, note)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
