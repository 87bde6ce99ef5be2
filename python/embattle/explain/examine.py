"""All explanations of one model, as numbers for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from embattle.attacks import Attack, AttackResult
from embattle.data.batch import Batch
from embattle.explain import parts
from embattle.explain.landscape import landscape
from embattle.explain.path import Carried, carried
from embattle.explain.swaps import Swapped, content_words, swapped, take
from embattle.perturb.evaluation import LossFn
from embattle.perturb.site import Site
from embattle.tasks.base import Task

# Lines of the landscape's grid, and the samples that it is the mean of.
LINES, AVERAGED = 9, 3


class Examined:
    """One model with the samples that are explained, under one attack.

    Args:
        model: in evaluation mode.
        task: has the data and knows the model.
        part: of the data.
        rows: the samples' places in the part.
        sites: where the model is attacked.
        attack: finds the perturbations that are explained; run once.
        seed: of what is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        part: str,
        rows: Sequence[int],
        sites: Sequence[Site],
        attack: Attack,
        seed: int = 0,
    ) -> None:
        self.model, self.task, self.part, self.rows = model, task, part, list(rows)
        self.sites, self.attack, self.seed = list(sites), attack, seed
        device = next(model.parameters()).device
        self.batch = task.batch(model, part, torch.tensor(self.rows), seed=seed).to(device)
        self.result: AttackResult = replace(attack, restarts=1).run(
            self._of(self.batch),
            self.sites,
            criterion=task.criterion(self.batch),
            mask=task.mask(self.batch),
        )

    def carried(self, rows: Sequence[int]) -> list[tuple[Carried, list[Any]]]:
        """Divide the rise of the loss of some samples among named parts.

        Args:
            rows: places among the samples.

        Returns:
            What was carried, and the parts' names: all samples at once, or one after the other
            where they share deltas.
        """
        if self._coupled:
            return [self._explained(self._some([row]), self.result.deltas) for row in rows]
        deltas = [delta[self._places(rows)] for delta in self.result.deltas]
        return [self._explained(self._some(rows), deltas)]

    def together(self) -> tuple[Carried, list[Any]]:
        """Divide the rise of the loss of all samples among named parts."""
        return self._explained(self.batch, self.result.deltas)

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Explain samples one by one; `rows` are places among the samples."""
        task, result, labels = self.task, self.result, self.batch.known_labels()
        assert result.clean_outputs is not None
        assert result.outputs is not None
        found = self.carried(rows)
        listed = [one for each, names in found for one in parts.of_samples(each, names)]
        rises = torch.cat([each.increase for each, _ in found]).tolist()
        return [
            {
                "row": self.rows[row],
                "text": task.show(self.part, self.rows[row]),
                "label": task.kind.show_label(labels[row]),
                "before": task.kind.show(result.clean_outputs[row], labels[row]),
                "after": task.kind.show(result.outputs[row], labels[row]),
                "rise": rise,
                "parts": each,
            }
            for row, rise, each in zip(rows, rises, listed, strict=True)
        ]

    def landscape(self, rows: Sequence[int]) -> dict[str, Any]:
        """Evaluate the loss on a plane, averaged over some of the samples."""
        batch, deltas = self._some(rows), self.result.deltas
        if not self._coupled:
            deltas = [delta[self._places(rows)] for delta in deltas]
        found = landscape(
            self._of(batch),
            self.sites,
            deltas,
            norm=self.attack.norm,
            mask=self.task.mask(batch),
            subset=self._subset(batch),
            lines=LINES,
            seed=self.seed,
        )
        room = self._room()
        return {**asdict(found), "edge": [[room * x, room * y] for x, y in found.edge]}

    @property
    def _coupled(self) -> bool:
        """Whether samples share deltas: those of rows of tables."""
        return any(perturbation.coupled for perturbation in self.result.perturbations)

    def _room(self) -> float:
        """How many times what was found goes into eps, on average over the groups that moved.

        A relative eps is of the batch that was attacked, so it is known here alone.
        """
        ratios = []
        for perturbation, norms in zip(self.result.perturbations, self.result.norms, strict=True):
            given = perturbation.strength(self.attack.eps, self.attack.norm)
            eps = torch.as_tensor(given).to(norms).expand_as(norms)
            ratios.append((eps / norms)[norms > 0])
        every = torch.cat(ratios)
        room = float(every.mean()) if every.numel() else 1.0
        return room if math.isfinite(room) else 1.0

    def _explained(self, batch: Batch, deltas: Sequence[Tensor]) -> tuple[Carried, list[Any]]:
        found = carried(
            self._of(batch),
            self.sites,
            deltas,
            mask=self.task.mask(batch),
            subset=self._subset(batch),
        )
        given = self.task.parts_of(self.model, batch)
        return found, parts.names_of(found, given, self.task.vector)

    def _of(self, batch: Batch) -> LossFn:
        return lambda: self.task.evaluate(self.model, batch)

    def _subset(self, batch: Batch) -> Callable[[Tensor], LossFn]:
        return lambda rows: self._of(take(batch, rows))

    def _places(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), device=next(iter(self.batch.inputs.values())).device)

    def _some(self, rows: Sequence[int]) -> Batch:
        return take(self.batch, self._places(rows))


def exchanged(
    model: nn.Module,
    task: Task,
    part: str,
    rows: Sequence[int],
    texts: Sequence[Batch],
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Exchange words of some samples; words come from `texts`, batches of the part.

    Args:
        model, task, part, seed: see `explain`.
        rows: the samples' places in the part.
        texts: have the words that may come in.

    Returns:
        Nothing where the model reads no texts that may be moved.
    """
    words = task.words(model)
    if words is None or not isinstance(words.embedding, nn.Embedding) or not rows:
        return []
    known = [batch.inputs[words.ids] for batch in texts]
    allowed = content_words(words, known, words.embedding.num_embeddings)
    device = next(model.parameters()).device
    batch = task.batch(model, part, torch.tensor(list(rows)), seed=seed).to(device)
    labels = batch.known_labels().cpu()
    return [
        {"row": rows[one.row], **_told(task, one, labels[one.row])}
        for one in swapped(model, batch, words, task, allowed=allowed)
    ]


def _told(task: Task, swap: Swapped, label: Tensor) -> dict[str, Any]:
    outputs = (swap.before_output, swap.after_output)
    return {
        "label": task.kind.show_label(label),
        "before": swap.before,
        "after": swap.after,
        "before_marks": [list(span) for span in swap.before_marks],
        "after_marks": [list(span) for span in swap.after_marks],
        "predictions": [task.describe(output[None])[0]["prediction"] for output in outputs],
        "shown": [task.kind.show(output, label) for output in outputs],
        "right": [bool(task.kind.right(o[None], label[None])[0]) for o in outputs],
    }


def explain(
    model: nn.Module,
    task: Task,
    part: str,
    sites: Sequence[Site],
    attack: Attack,
    *,
    worst: Sequence[int],
    spread: Sequence[int],
    unsure: Sequence[int] = (),
    texts: Sequence[Batch] = (),
    plane: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Explain what an attack does to a model.

    Args:
        model: in evaluation mode, its weights without gradients.
        task: has read the data.
        part: of the data.
        sites: where the model is attacked.
        attack: finds the perturbations.
        worst: places in the part of the samples that are explained one by one.
        spread: places of the samples that averages are over.
        unsure: places of the samples whose words are exchanged.
        texts: batches whose words may come in.
        plane: evaluate the landscape.
        seed: of what is drawn.

    Returns:
        `carried` and `positions` (averages by name and by place), `samples`, `swaps`, `landscape`
        (None without, or where losses are not finite), `averaged` and `gap`: how many samples
        averages are over, and what the parts miss of the rise of their losses, as a share of it.
    """
    average = Examined(model, task, part, spread, sites, attack, seed)
    each, names = average.together()
    found: dict[str, Any] = {
        "averaged": len(spread),
        "carried": parts.averages(each, names),
        "positions": [],
        "gap": parts.missed(each),
        "samples": [],
        "swaps": [],
        "landscape": None,
    }
    if task.varying and all(site.scope == "output" for site in sites):
        found["positions"] = parts.averages(each, names, positions=True)
    if plane and bool(each.increase.isfinite().all()):
        found["landscape"] = average.landscape(range(min(AVERAGED, len(spread))))
    if worst:
        single = Examined(model, task, part, worst, sites, attack, seed)
        found["samples"] = single.samples(range(len(worst)))
    found["swaps"] = exchanged(model, task, part, unsure, texts, seed=seed)
    return found
