"""A language model that answers yes or no: whether a user will like a title."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embattle.errors import InputError, first_line, need
from embattle.models.pretrained import fitting, load_causal
from embattle.models.prompts import Prompts


class LanguageRecommender(nn.Module):
    """A causal language model with low-rank adapters (LoRA: Hu et al., ICLR 2022).

    The prompts and the yes or no at their ends follow TALLRec (Bao et al., RecSys 2023). Of the
    head's rows (and biases, if it has any) only those of the two answers are kept, and read at the
    last token alone: the other logits are never computed. Adapters and these two rows are trained;
    all else stays as it was.

    Args:
        body: a transformers causal model without its head; adapters are put into its linear layers.
        answers: the head's two rows of the answers no and yes.
        prompts: makes the prompts.
        rank: of the adapters.
        alpha: the adapters' product is scaled by alpha / rank.

    Raises:
        InputError: peft cannot adapt such a body.
    """

    def __init__(
        self, body: Any, answers: nn.Linear, prompts: Prompts, *, rank: int, alpha: float
    ) -> None:
        super().__init__()
        peft = need("peft", "llm")
        body.requires_grad_(False)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
        try:
            self.body = peft.inject_adapter_in_model(config, body)
        except ValueError as error:
            raise InputError(
                f"model.pretrained: peft has no adapters for a {body.config.model_type}: "
                f"{first_line(error)}"
            ) from error
        self.answers = answers
        self.prompts = prompts

    @property
    def embedding(self) -> nn.Embedding:
        """The table of tokens, whose output an attacker perturbs."""
        module: nn.Embedding = self.body.get_input_embeddings()
        return module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 2] of no and yes after prompts [B, T], padded on the right."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = (attention_mask.sum(1) - 1).clamp(min=0)
        rows = torch.arange(hidden.shape[0], device=last.device)
        logits: Tensor = self.answers(hidden[rows, last])
        return logits

    def trained(self) -> dict[str, Tensor]:
        """What training changes: the adapters' weights, and the rows of the answers."""
        adapters = need("peft", "llm").get_peft_model_state_dict(self.body)
        return {f"adapters.{name}": x for name, x in adapters.items()} | {
            f"answers.{name}": x for name, x in self.answers.named_parameters()
        }

    def set_trained(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `trained` gave.

        Raises:
            ValueError: the tensors are others.
        """
        shapes = {name: x.shape for name, x in self.trained().items()}
        if shapes != {name: x.shape for name, x in tensors.items()}:
            raise ValueError("its adapters are not those of this model: layers or rank differ")
        adapters = {
            name.removeprefix("adapters."): x
            for name, x in tensors.items()
            if name.startswith("adapters.")
        }
        need("peft", "llm").set_peft_model_state_dict(self.body, adapters)
        for name, weight in self.answers.named_parameters():
            weight.data.copy_(tensors[f"answers.{name}"])

    def base_hash(self) -> str:
        """A hash of the weights that are not trained: adapters are of use on these alone."""
        digest = hashlib.sha256()
        for name, weight in self.body.named_parameters():
            if not weight.requires_grad and "lora_" not in name:
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def build(
    pretrained: str,
    *,
    layers: int | None,
    rank: int,
    alpha: float,
    prompt: str,
    answers: Sequence[str],
    max_tokens: int,
) -> LanguageRecommender:
    """A pretrained language model, or its first layers, with adapters that change nothing yet.

    The answers' rows are the head's. They fit what its last layer gives: where layers are left out
    they begin at zero.

    Args:
        pretrained: see `embattle.models.pretrained.locate`.
        layers: keep the first so many layers; None keeps all.
        rank, alpha: of the adapters.
        prompt: the template, see `Prompts`.
        answers: no and yes, of which the first tokens are taken.
        max_tokens: longest prompt.

    Raises:
        InputError: it cannot be had or adapted, or the answers begin with the same token.
    """
    model, tokenizer = load_causal(pretrained, layers)
    prompts = Prompts(tokenizer, prompt, fitting(max_tokens, model))
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in answers]
    if not all(rows) or rows[0] == rows[1]:
        raise InputError(
            f"model.answers: {list(answers)} do not begin with two different tokens of "
            f"{pretrained!r}; choose other words"
        )
    head, chosen = model.get_output_embeddings(), [row[0] for row in rows]
    biased = getattr(head, "bias", None) is not None
    kept = nn.Linear(head.weight.shape[1], 2, bias=biased, device="meta")
    kept = kept.to_empty(device=head.weight.device)  # without drawing random numbers
    for mine, whole in zip(kept.parameters(), head.parameters(), strict=True):
        mine.data.copy_(whole.detach()[chosen] if layers is None else torch.zeros_like(mine))
    return LanguageRecommender(model.base_model, kept, prompts, rank=rank, alpha=alpha)
