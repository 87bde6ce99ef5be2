"""The other libraries, really run, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import devices
import embattle as eb
import pytest
import torch
import toys
from torch import nn

transformers = pytest.importorskip("transformers")


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=devices.kind == "cpu")
    model = toys.encoder(dtype=torch.float32)
    site = eb.Site(model.embedding)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens, labels = toys.text_batch()
    objective = eb.AdversarialObjective(eb.PGD(eps=0.3, steps=2), site)
    losses = []
    for _ in range(5):
        loss, _ = objective(toys.classify(model, tokens, labels), mask=tokens != 0)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("manual", [False, True])
def test_lightning(tmp_path: Path, manual: bool) -> None:
    lightning = pytest.importorskip("lightning")
    from embattle.integrations.lightning import AdversarialModule

    class Robust(AdversarialModule, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = toys.encoder(dtype=torch.float32)
            self.automatic_optimization = not manual
            self.objective = eb.AdversarialObjective(
                eb.PGD(eps=0.3, steps=2), eb.Site(self.model.embedding)
            )

        def loss_fn(self, batch: Any) -> Any:
            return toys.classify(self.model, *batch)()

        def objective_arguments(self, batch: Any) -> dict[str, Any]:
            return {"mask": batch[0] != 0, "labels": batch[1]}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch: Any, *arguments: Any) -> Any:
            if not manual:
                return super().training_step(batch)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.robust_loss(batch))
            optimizer.step()
            return None

    tokens, labels = toys.text_batch(batch=12)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(tokens, labels), batch_size=6
    )
    module = Robust()
    before = module.model.head.weight.detach().clone()
    run = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu" if devices.kind == "cpu" else "gpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    run.fit(module, loader)
    assert module.objective.step == 4
    assert not torch.equal(before, module.model.head.weight)
    assert run.callback_metrics["train_adversarial_loss"] > run.callback_metrics["train_clean_loss"]
    run.save_checkpoint(tmp_path / "robust.ckpt")
    other = Robust()
    other.on_load_checkpoint(torch.load(tmp_path / "robust.ckpt", weights_only=True))
    assert other.objective.step == 4


def test_tied_embeddings_and_checkpointing() -> None:
    """A tied table gets both of its gradients; checkpointed layers see the perturbed embeddings."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    tokens = torch.randint(0, 40, (3, 8))

    def loss_fn() -> torch.Tensor:
        logits = model(tokens).logits
        return eb.losses.cross_entropy(logits[:, :-1], tokens[:, 1:])

    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        for early in (False, True):
            model.zero_grad()
            objective = eb.AdversarialObjective(
                eb.PGD(eps=0.3, steps=2), eb.Site(model), early_backward=early
            )
            loss, _ = objective(loss_fn)
            loss.backward()
            found.append(model.transformer.wte.weight.grad.clone())
            objective.sites[0].remove()
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-6)


def test_compiled_models() -> None:
    """A site made before torch.compile works in the compiled model, and gives the same result."""
    model = toys.encoder(dtype=torch.float32)
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding, model=model)
    compiled = torch.compile(model, backend="aot_eager")
    objective = eb.AdversarialObjective(eb.PGD(eps=0.4, steps=2, random_start=False), site)
    results = []
    for one in (model, compiled):
        model.zero_grad()
        loss, metrics = objective(toys.classify(one, tokens, labels), mask=tokens != 0)
        loss.backward()
        results.append((loss.detach(), metrics["adversarial_loss"], model.head.weight.grad.clone()))
    for eager, other in zip(*results, strict=True):
        assert torch.allclose(eager, other, atol=1e-5)


def test_peft_and_autocast() -> None:
    """Frozen embeddings inside a wrapper, and bfloat16 autocast."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = toys.encoder(dtype=torch.float32).requires_grad_(False)
            self.head = nn.Linear(3, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.base(tokens))

    model = Adapter()
    tokens, labels = toys.text_batch()
    objective = eb.AdversarialObjective(eb.PGD(eps=0.4, steps=2), eb.Site(model.base.embedding))
    with torch.autocast(devices.kind, dtype=torch.bfloat16):
        loss, metrics = objective(toys.classify(model, tokens, labels), mask=tokens != 0)
    loss.backward()
    assert model.head.weight.grad is not None
    assert model.base.embedding.weight.grad is None
    assert metrics["adversarial_loss"] > metrics["clean_loss"]
