"""Attacks and objectives inside an autocast block of the user's own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import devices
import embattle as eb
import pytest
import torch
import toys
from torch import nn


class Plain(nn.Module):
    """An embedding, and two linear layers, whose weights autocast keeps in low precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embedding(tokens)).tanh().mean(1)).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("form", ["mixed", "free", "trades", "awp", "bregman"])
def test_an_autocast_block_of_the_users_own(form: str, dtype: torch.dtype) -> None:
    """Around the whole step it gives what a block in each pass gives: no weight is seen as it was.

    Two steps, the second one after weights were changed within the block.
    """
    tokens, labels = toys.text_batch()
    found = []
    for around in (False, True):
        torch.manual_seed(0)
        model = Plain()
        site = eb.Site(model.embedding, model=model)
        options: dict[str, Any] = {"form": "mixed" if form == "awp" else form}
        if form == "bregman":
            options["form"] = eb.Smart(bregman=eb.Bregman(model, momentum=0.0))
        attack = eb.PGD(
            eps=0.5,
            steps=2,
            random_start=form in ("trades", "bregman"),
            generator=torch.Generator().manual_seed(0),
        )
        objective: Any = eb.AdversarialObjective(attack, site, **options)
        if form == "awp":
            objective = eb.AWP(objective, model, gamma=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        plain = toys.classify(model, tokens, labels)

        def loss_fn(plain: Any = plain) -> Any:
            with torch.autocast(devices.kind, dtype=dtype):
                return plain()

        values = []
        block = torch.autocast(devices.kind, dtype=dtype) if around else nullcontext()
        with block:  # a disabled one would keep the cache as well
            model(tokens)  # the cache has the weights
            for _ in range(2):
                loss, metrics = objective(plain if around else loss_fn)
                optimizer.zero_grad()
                loss.backward()
                assert all(p.grad is not None for p in model.parameters())
                optimizer.step()
                values += [loss.detach(), metrics.get("bregman", loss.detach())]
        found.append([*values, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()  # the types round to 0.4 %


def test_samples_whose_gradient_float16_rounds_away_are_perturbed() -> None:
    """The training pass has no factor that keeps the gradients of confident samples."""
    torch.manual_seed(0)
    model = Plain()
    with torch.no_grad():
        model.head.weight.mul_(60)
    tokens = torch.randint(0, 40, (128, 6))
    with torch.no_grad():
        labels = model(tokens).argmax(1)
    plain = toys.classify(model, tokens, labels)

    def loss_fn() -> Any:
        with torch.autocast(devices.kind, dtype=torch.float16):
            return plain()

    site, attack = eb.Site(model.embedding), eb.FGM(eps=0.5)
    assert int(attack.run(loss_fn, site).zero_gradient) == 0
    for early in (True, False):
        objective = eb.AdversarialObjective(attack, site, early_backward=early)
        loss, metrics = objective(loss_fn)
        loss.backward()
        assert int(metrics["zero_gradient"]) == 0
