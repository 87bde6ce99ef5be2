"""Vectors of known texts, such as those of items: an encoder, and what it gave, kept."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor, nn

from embattle.data.batch import Batch
from embattle.models.encoder import TextEncoder
from embattle.perturb.guard import eval_mode

# Texts that are encoded at once where no gradient is wanted.
_AT_ONCE = 256
# Numbers of each weight that are looked at to see whether it has changed.
_SOME = 16


class _Known:
    """Vectors of N texts, those that are known, of an encoder as it is now. A copy is None.

    It is no buffer: an attack puts buffers back as they were before it, and would put back vectors
    of weights that have changed since.

    Args:
        encoder: gives the vectors.
        count: N.
        like: [0, width], of the vectors' dtype and device.
    """

    def __init__(self, encoder: nn.Module, count: int, like: Tensor) -> None:
        with torch.inference_mode(False):  # to be read where gradients are wanted, too
            self.vectors = like.new_zeros(count, like.shape[1])
            self.known = torch.zeros(count, dtype=torch.bool, device=like.device)
        weights = list(encoder.parameters())
        self._of = [(ref(weight), *_writes(weight)) for weight in weights]
        self._some = _some(weights, like.device)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def is_of(self, encoder: nn.Module, like: Tensor) -> bool:
        """Return whether the weights are the same, lie where they lay, and were not written."""
        weights = list(encoder.parameters())
        return (
            (self.vectors.dtype, self.vectors.device) == (like.dtype, like.device)
            and len(weights) == len(self._of)
            and all(
                before() is weight and tuple(writes) == _writes(weight)
                for weight, (before, *writes) in zip(weights, self._of, strict=True)
            )
            and torch.equal(_some(weights, like.device), self._some)
        )


def _writes(weight: Tensor) -> tuple[int | None, int | None]:
    """How often a weight was written, and where it lies, as far as that is known."""
    return (
        None if weight.is_inference() else weight._version,
        weight.data_ptr() if type(weight) is nn.Parameter else None,
    )


def _some(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """Some numbers of each weight: writes of fused optimizers, and those to `.data`, do not count.

    Weights of special types, such as those that are sharded, have none.
    """
    found = [torch.zeros(0, device=device)]
    for weight in weights:
        if type(weight) is nn.Parameter:
            step = max(1, weight.numel() // _SOME)
            found.append(weight.reshape(-1)[::step].to(device))
    return torch.cat(found)


class TextTable(nn.Module):
    """A table of N texts' vectors, which is looked up by the texts' numbers.

    A text that is not trained on is encoded once, and again only after the encoder's weights have
    changed. `rewritten` encodes a text that an attacker may have changed: its token embeddings
    alone pass through `words`, the place of such an attack.

    Args:
        encoder: gives the vectors.
        texts: the N texts.
        trained: whether the encoder's weights are trained; otherwise they are frozen, and it stays
            in evaluation mode.
    """

    settled: Tensor

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], *, trained: bool) -> None:
        super().__init__()
        self.encoder, self.texts, self.trained = encoder, list(texts), trained
        self.words = nn.Identity()
        encoder.requires_grad_(trained)
        # One row for each text once the weights stay as they are; no rows before.
        self.register_buffer("settled", torch.zeros(0, encoder.width), persistent=False)
        self._known: _Known | None = None
        self.train(self.training)

    def train(self, mode: bool = True) -> TextTable:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.trained:
            self.encoder.eval()
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """Give the vectors [..., width] of the texts with the numbers `rows` [...]."""
        if self.trained and self.training and torch.is_grad_enabled():
            distinct: Tensor
            place: Tensor
            self._known = None  # the weights are about to change
            distinct, place = torch.unique(rows, return_inverse=True)
            return self._encode(distinct)[place]
        vectors: Tensor = self._learnt(rows)[rows]
        return vectors

    def settle(self) -> None:
        """Encode all texts now: the weights stay as they are, and look-ups look up."""
        self.settled = self.every()

    def every(self) -> Tensor:
        """Give the vectors [N, width] of all texts, without a graph."""
        return self._learnt(torch.arange(len(self.texts), device=self.settled.device))

    def rewritten(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Give the vectors [B, width] of texts as an attacker has left them.

        Args:
            text_ids, text_mask: [B, T], see `tokens`.
        """
        words = self.words(self.encoder.embedding(text_ids))
        return self.encoder.pooled(text_mask, inputs_embeds=words)

    def tokens(self, rows: Sequence[int]) -> Batch:
        """Give the tokens of texts, for `rewritten`: inputs, and what of them may move.

        The names are not those of a batch of texts: such a batch is cut wherever samples leave it.
        """
        batch = self.encoder.tokenize([self.texts[row] for row in rows])
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        return Batch({"text_ids": ids, "text_mask": mask}, movable=batch.movable)

    def _encode(self, rows: Tensor) -> Tensor:
        batch = self.encoder.tokenize([self.texts[row] for row in rows.tolist()])
        inputs = batch.to(rows.device).inputs
        return self.encoder.pooled(inputs.pop("attention_mask"), **inputs)

    @torch.no_grad()
    def _learnt(self, rows: Tensor) -> Tensor:
        """Give vectors [N, width] of which these rows are right.

        What is not known is encoded; texts of like length together, to pad little.
        """
        if len(self.settled):
            return self.settled
        kept = self._known
        if kept is None or not kept.is_of(self.encoder, self.settled):
            kept = self._known = _Known(self.encoder, len(self.texts), self.settled)
        new: Tensor = torch.unique(rows[~kept.known[rows]])
        if not len(new):
            return kept.vectors
        length = torch.tensor([len(self.texts[row]) for row in new.tolist()])
        with eval_mode([self.encoder], self.encoder.modules()):
            for some in torch.split(new[length.argsort().to(new.device)], _AT_ONCE):
                kept.vectors[some] = self._encode(some).to(kept.vectors.dtype)
                kept.known[some] = True
        return kept.vectors
