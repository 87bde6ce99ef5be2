"""Mode "same" on a CPU: dropout masks are drawn once, and every number stays the same."""

from __future__ import annotations

import gc
from typing import Any

import embattle as eb
import pytest
import torch
import toys
from embattle.perturb.attacked_batch import AttackedBatch
from embattle.perturb.replay import DropoutMasks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Draws(TorchDispatchMode):
    """Counts the dropout masks that are really drawn."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.bernoulli_.float
        return func(*args, **(kwargs or {}))


def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass draw its masks, as if nothing were kept."""
    monkeypatch.setattr(
        AttackedBatch, "_replay_from", lambda self, state: setattr(self, "_replay", state)
    )


class Mixed(nn.Module):
    """Draws other random numbers between its masks, and every second pass one mask more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)
        self.drop, self.passes = nn.Dropout(0.4), 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        hidden = self.drop(self.embedding(tokens))
        if self.passes % 2:
            hidden = self.drop(hidden.transpose(0, 1)).transpose(0, 1)
        hidden = hidden * (0.5 + torch.rand(hidden.shape[-1]))
        return self.head(self.drop(hidden).mean(1))


def outcome(model: nn.Module, form: str, random: bool) -> list[Tensor]:
    torch.manual_seed(5)
    tokens, labels = toys.text_batch()
    with eb.Site(model.embedding) as site:
        attack = eb.PGD(eps=0.5, steps=3, mode="same", random_start=random)
        objective = eb.AdversarialObjective(attack, site, form=form)
        found: list[Tensor] = []
        for _ in range(2):
            model.zero_grad()
            loss, metrics = objective(toys.classify(model, tokens, labels), mask=tokens != 0)
            loss.backward()
            found += [loss.detach(), metrics["adversarial_loss"], torch.get_rng_state()]
            found += [p.grad.clone() for p in model.parameters()]
    return found


@pytest.mark.parametrize("form", ["mixed", "adversarial", "free"])
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_kept_masks_change_no_bit(
    form: str, random: bool, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        return Mixed() if mixed else toys.encoder(dropout=0.3)

    kept = outcome(make(), form, random)
    anew(monkeypatch)
    drawn = outcome(make(), form, random)
    assert all(torch.equal(a, b) for a, b in zip(kept, drawn, strict=True))


def test_masks_are_drawn_once_and_freed() -> None:
    model = toys.encoder(dropout=0.3)
    loss_fn = toys.classify(model, *toys.text_batch())
    with Draws() as one:
        loss_fn()
    assert one.count > 0
    with Draws() as all_of:
        result = eb.PGD(eps=0.5, steps=4, mode="same").run(loss_fn, eb.Site(model.embedding))
    assert all_of.count == one.count
    kept = [one for one in gc.get_objects() if type(one) is DropoutMasks and one._drawn]
    assert not kept
    assert result.losses is not None


def test_a_model_without_dropout_is_watched_once() -> None:
    model = toys.encoder()
    batch = AttackedBatch(
        toys.classify(model, *toys.text_batch()), eb.Site(model.embedding), mode="same"
    )
    with batch.attacking():
        batch.record()
        assert batch._masks is not None
        assert batch._masks.idle


def test_compiled_models_stay_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    with DropoutMasks():
        compiled(torch.randn(3, 4))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()
