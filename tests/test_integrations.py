"""Other libraries and torch's own wrappers, really run, on tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import devices
import embattle as eb
import pytest
import torch
import toys
from torch import Tensor, nn

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
        with accelerator.accumulate(model):
            loss, metrics = objective(
                toys.classify(model, tokens, labels),
                criterion=eb.Misclassify(labels),
                mask=tokens != 0,
            )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert metrics["robust_accuracy"] <= metrics["clean_accuracy"]


def lightning_module(lightning: Any, manual: bool) -> Any:
    from embattle.integrations.lightning import AdversarialModule

    class Robust(AdversarialModule, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = toys.encoder(dtype=torch.float32)
            self.automatic_optimization = not manual
            self.site = eb.Site(self.model.embedding, model=self.model)
            self.objective = eb.AdversarialObjective(eb.PGD(eps=0.3, steps=2), self.site)
            self.results: list[Any] = []

        def loss_fn(self, batch: Any) -> Any:
            return toys.classify(self.model, *batch)()

        def objective_arguments(self, batch: Any) -> dict[str, Any]:
            return {"mask": batch[0] != 0, "criterion": eb.Misclassify(batch[1])}

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

        def attacked(self, batch: Any) -> None:
            attack = eb.PGD(eps=0.5, steps=3, keep="best")
            result = attack.run(
                lambda: self.loss_fn(batch), self.site, **self.objective_arguments(batch)
            )
            self.results.append((torch.is_inference_mode_enabled(), batch, result))
            self.log("robust_accuracy", result.robust_accuracy)

        def validation_step(self, batch: Any, *arguments: Any) -> None:
            self.attacked(batch)

        def test_step(self, batch: Any, *arguments: Any) -> None:
            self.attacked(batch)

    return Robust()


def lightning_trainer(lightning: Any, folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu" if devices.kind == "cpu" else "gpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def texts(batch: int = 12) -> Any:
    tokens, labels = toys.text_batch(batch=batch)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), batch_size=6)


@pytest.mark.parametrize("manual", [False, True])
def test_lightning(tmp_path: Path, manual: bool) -> None:
    lightning = pytest.importorskip("lightning")
    module = lightning_module(lightning, manual)
    before = module.model.head.weight.detach().clone()
    run = lightning_trainer(lightning, tmp_path, max_epochs=2, limit_val_batches=0)
    run.fit(module, texts())
    assert module.objective.step == 4
    assert not torch.equal(before, module.model.head.weight)
    logged = run.callback_metrics
    assert logged["train_adversarial_loss"] > logged["train_clean_loss"]
    assert logged["train_robust_accuracy"] <= logged["train_clean_accuracy"]
    run.save_checkpoint(tmp_path / "robust.ckpt")
    other = lightning_module(lightning, manual)
    other.on_load_checkpoint(torch.load(tmp_path / "robust.ckpt", weights_only=True))
    assert other.objective.step == 4


@dataclass
class Texts:
    tokens: Tensor
    labels: Tensor
    name: str = "texts"


def test_some_samples_of_a_batch_are_taken() -> None:
    """Whatever holds its tensors; what is no tensor of the samples stays as it is."""
    batch_module = pytest.importorskip("transformers.tokenization_utils_base")
    from embattle.integrations.trainer_batches import count, take

    tokens, labels = toys.text_batch(batch=5)
    rows = torch.tensor([3, 1])
    named = {"input_ids": tokens, "labels": labels, "weights": torch.ones(2)}
    for batch in (named, batch_module.BatchEncoding(named)):
        found = take(batch, rows)
        assert count(batch) == 5
        assert count(found) == 2
        assert type(found) is type(batch)
        assert torch.equal(found["input_ids"], tokens[rows])
        assert len(found["weights"]) == 2
        assert len(batch["input_ids"]) == 5
    taken = take(Texts(tokens, labels), rows)
    assert torch.equal(taken.labels, labels[rows])
    assert taken.name == "texts"
    with pytest.raises(ValueError, match=r"of type object no tensors.*in Lightning take"):
        count(object())


@pytest.mark.parametrize("form", ["staggered", "partial"])
def test_lightning_resumes_forms_in_the_middle_of_an_epoch(tmp_path: Path, form: str) -> None:
    lightning = pytest.importorskip("lightning")
    from embattle.integrations.lightning import AdversarialModule

    tokens, labels = toys.text_batch(batch=12)

    class Chosen(AdversarialModule, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = toys.encoder(dtype=torch.float32)
            site = eb.Site(self.model.embedding)
            self.objective = eb.AdversarialObjective(eb.FGM(eps=0.4), site, form=form)
            self.sizes: list[int] = []

        def train_dataloader(self) -> Any:
            data = torch.utils.data.TensorDataset(tokens, labels, torch.arange(12))
            if form == "partial":
                return torch.utils.data.DataLoader(data, batch_size=4)
            self.batches = eb.StaggeredBatches(12, 4, visits=2)
            return torch.utils.data.DataLoader(data, batch_sampler=self.batches)

        def loss_fn(self, batch: Any) -> eb.Evaluation:
            self.sizes.append(len(batch[0]))
            return toys.classify(self.model, batch[0], batch[1])()

        def objective_arguments(self, batch: Any) -> dict[str, Any]:
            return {"samples": batch[2], "mask": batch[0] != 0}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(module: Any, steps: int, **options: Any) -> Any:
        trainer = lightning_trainer(lightning, tmp_path, max_steps=steps, limit_val_batches=0)
        trainer.fit(module, **options)
        return trainer

    whole, begun, resumed = Chosen(), Chosen(), Chosen()
    run(whole, 10)
    run(begun, 9).save_checkpoint(tmp_path / "begun.ckpt")
    run(resumed, 10, ckpt_path=tmp_path / "begun.ckpt")
    if form == "staggered":  # six groups of two: seven batches in an epoch
        assert whole.sizes == [2, 4, 4, 4, 4, 4, 2, 2, 4, 4]
        for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, two)
    else:
        assert whole.sizes == [2, 4] * 10


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_attacks_run_in_lightnings_evaluation(tmp_path: Path, verb: str, inference: bool) -> None:
    """In inference mode, or without gradients, they find what they find outside."""
    lightning = pytest.importorskip("lightning")
    module = lightning_module(lightning, False)
    run = lightning_trainer(lightning, tmp_path, inference_mode=inference)
    getattr(run, verb)(module, texts(), verbose=False)
    assert len(module.results) == 2
    assert "robust_accuracy" in run.callback_metrics
    module.eval()
    for mode, batch, result in module.results:
        assert mode == inference
        tokens, labels = (one.clone() for one in batch)
        outside = eb.PGD(eps=0.5, steps=3, keep="best").run(
            toys.classify(module.model, tokens, labels),
            module.site,
            mask=tokens != 0,
            criterion=eb.Misclassify(labels),
        )
        assert torch.allclose(result.delta, outside.delta, atol=1e-6)
        assert torch.equal(result.success, outside.success)
        assert (result.losses > result.clean_losses).all()


def test_scaled_losses_are_not_differentiated_early(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    module = lightning_module(lightning, False)
    module.log_dict = lambda scalars: None
    batch = next(iter(texts()))
    module.robust_loss(batch)
    assert module.objective.early_backward
    module.trainer = lightning_trainer(lightning, tmp_path)
    module.trainer.strategy.precision_plugin.precision = "16-mixed"
    module.robust_loss(batch)
    assert not module.objective.early_backward


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
                eb.PGD(eps=0.3, steps=2), eb.Site.embeddings(model), early_backward=early
            )
            loss, _ = objective(loss_fn)
            loss.backward()
            found.append(model.transformer.wte.weight.grad.clone())
            objective.sites[0].remove()
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-6)


def test_reentrant_checkpoints_of_layers_say_what_to_do() -> None:
    torch.manual_seed(0)
    model = toys.tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    tokens, labels = torch.randint(5, 60, (4, 8)), torch.tensor([0, 1, 0, 1])
    site = eb.Site.embeddings(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        eb.PGD(eps=0.3).run(
            lambda: eb.losses.cross_entropy(model(input_ids=tokens).logits, labels), site
        )
    assert not site.busy


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
