"""Models of other libraries and wrappers around models: peft, encoder-decoders, DDP, FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import devices
import embattle as eb
import pytest
import ranks
import torch
import toys
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}


def encoder_decoder(name: str) -> Any:
    torch.manual_seed(0)
    if name == "t5":
        config = transformers.T5Config(
            **TINY, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BartConfig(
        **TINY,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=16,
        dropout=0.0,
    )
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders(name: str) -> None:
    """Shared embeddings: the encoder's and the decoder's calls have a delta each."""
    model = encoder_decoder(name)
    source, target = torch.randint(1, 40, (3, 6)), torch.randint(1, 40, (3, 4))

    def loss_fn() -> Tensor:
        logits = model(input_ids=source, labels=target).logits
        return eb.losses.cross_entropy(logits, target)

    sites = eb.Site.embeddings(model)
    attack = eb.PGD(eps=0.3, steps=3, keep="best")
    result = attack.run(loss_fn, sites)
    assert sorted(delta.shape[1] for delta in result.deltas) == [4, 6]
    assert torch.all(result.losses > result.clean_losses)
    grads = []
    for early in (False, True):
        model.zero_grad()
        eb.AdversarialObjective(attack, sites, early_backward=early)(loss_fn)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "word_embeddings"]])
def test_peft(targets: list[str]) -> None:
    """LoRA on the layers, or on the embeddings too: only adapters get gradients."""
    model = peft.get_peft_model(
        toys.tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"),
    )
    tokens, labels = torch.randint(5, 60, (4, 8)), torch.tensor([0, 1, 0, 1])

    def loss_fn() -> Tensor:
        return eb.losses.cross_entropy(model(input_ids=tokens).logits, labels)

    site = eb.Site.embeddings(model)
    flags = [p.requires_grad for p in model.parameters()]
    found = []
    for early in (False, True):
        model.zero_grad()
        loss, metrics = eb.AdversarialObjective(
            eb.PGD(eps=0.5, steps=2), site, early_backward=early
        )(loss_fn)
        loss.backward()
        assert metrics["adversarial_loss"] > metrics["clean_loss"]
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all("lora_" in name or "classifier" in name for name in found[0])
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-6), name


def test_virtual_tokens_before_the_text_have_no_labels(tmp_path: Path) -> None:
    from embattle.integrations.transformers import AdversarialTrainer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ).train()
    tokens, mask = torch.randint(5, 60, (4, 8)), torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=devices.kind == "cpu"
    )
    own = transformers.Trainer(model=model, args=args).compute_loss(model, dict(batch))
    run = AdversarialTrainer(model=model, args=args, attack=eb.PGD(eps=0.5, steps=2))
    run.compute_loss(model, dict(batch))
    metrics = {name: total for name, (total, _) in run._seen.items()}
    torch.testing.assert_close(metrics["clean_loss"], own.detach())
    assert metrics["adversarial_loss"] > metrics["clean_loss"]


def objective(site: eb.Site, form: str, early: bool) -> eb.AdversarialObjective:
    attack = eb.PGD(eps=0.4, steps=2)
    return eb.AdversarialObjective(attack, site, form=form, early_backward=early)


CASES = (("mixed", True), ("mixed", False), ("adversarial", True), ("free", True))
SHARDED = (("mixed", False), ("adversarial", False))


def grads_of(form: str, early: bool) -> dict[str, Tensor]:
    model = toys.encoder(dtype=torch.float32)
    tokens, labels = toys.text_batch()
    site = eb.Site(model.embedding, model=model)
    loss, _ = objective(site, form, early)(toys.classify(model, tokens, labels), mask=tokens != 0)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def of_rank(rank: int, where: Path) -> None:
    train_wrapped(rank, where)
    try_what_is_refused(rank, where)


def train_wrapped(rank: int, where: Path) -> None:
    tokens, labels = toys.text_batch()
    tokens, labels = tokens[rank * 3 : rank * 3 + 3], labels[rank * 3 : rank * 3 + 3]
    for form, early in CASES:
        model = toys.encoder(dtype=torch.float32)
        site = eb.Site(model.embedding, model=model)
        wrapped = DistributedDataParallel(model)
        run = objective(site, form, early)
        for _ in range(2):  # the second step finds the wrapper as the first has left it
            wrapped.zero_grad()
            loss, _ = run(toys.classify(wrapped, tokens, labels), mask=tokens != 0)
            loss.backward()
        torch.save(
            {n: p.grad for n, p in model.named_parameters()},
            f"{where}/ddp-{form}-{early}-{rank}.pt",
        )
    for form, early in SHARDED:
        model = toys.encoder(dtype=torch.float32)
        site = eb.Site(model.embedding, model=model)
        fully_shard(model.layer)
        fully_shard(model)
        run = objective(site, form, early)
        for _ in range(2):
            model.zero_grad()
            loss, _ = run(toys.classify(model, tokens, labels), mask=tokens != 0)
            loss.backward()
        whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        torch.save(whole, f"{where}/fsdp-{form}-{early}-{rank}.pt")


class Partly(torch.nn.Module):
    """An encoder with a layer that no pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.base = toys.encoder(dtype=torch.float32)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.base(tokens)


def try_what_is_refused(rank: int, where: Path) -> None:
    tokens, labels = toys.text_batch()
    tokens, labels = tokens[rank * 3 : rank * 3 + 3], labels[rank * 3 : rank * 3 + 3]
    said = {}
    for name, form, options in (
        ("static", "mixed", {"static_graph": True}),
        ("static free", "free", {"static_graph": True}),
        ("unused free", "free", {"find_unused_parameters": True}),
        ("unused freeat", "freeat", {"find_unused_parameters": True}),
    ):
        torch.manual_seed(0)
        model = Partly()
        site = eb.Site(model.base.embedding, model=model)
        wrapped = DistributedDataParallel(model, **options)
        loss_fn = toys.classify(wrapped, tokens, labels)
        try:
            objective(site, form, True)(loss_fn, mask=tokens != 0)
        except RuntimeError as error:
            said[name] = str(error)
        assert not site.busy
        wrapped.zero_grad()
        if "static" not in name:  # the wrapper still works
            loss_fn().losses.mean().backward()
    # What remains allowed: unused parameters, in forms whose training passes are the model's own.
    for form in ("mixed", "trades"):
        torch.manual_seed(0)
        model = Partly()
        site = eb.Site(model.base.embedding, model=model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        attack = eb.PGD(eps=0.4, steps=2, random_start=eb.GaussianStart(0.01))
        run = eb.AdversarialObjective(attack, site, form=form, early_backward=False)
        for _ in range(2):
            wrapped.zero_grad()
            run(toys.classify(wrapped, tokens, labels), mask=tokens != 0)[0].backward()
        torch.save(model.base.head.weight.grad, f"{where}/{form}-{rank}.pt")
    torch.save(said, f"{where}/said-{rank}.pt")


def test_two_processes_give_what_one_does(tmp_path: Path) -> None:
    """And what DDP would get wrong is refused: the processes are started once for both."""
    ranks.run(of_rank, tmp_path)
    names = [("ddp", *case) for case in CASES] + [("fsdp", *case) for case in SHARDED]
    for kind, form, early in names:
        expected = grads_of(form, early)
        for rank in range(2):
            got = torch.load(tmp_path / f"{kind}-{form}-{early}-{rank}.pt", weights_only=True)
            assert got.keys() == expected.keys()
            for name, grad in expected.items():
                assert torch.allclose(got[name], grad, atol=1e-5), (kind, form, early, name)
    check_what_was_refused(tmp_path)


def check_what_was_refused(tmp_path: Path) -> None:
    for rank in range(2):
        said = torch.load(tmp_path / f"said-{rank}.pt", weights_only=True)
        assert sorted(said) == ["static", "static free", "unused free", "unused freeat"]
        for name, sentence in said.items():
            way_out = "find_unused_parameters=False" if "unused" in name else "static_graph=False"
            assert way_out in sentence
    for form in ("mixed", "trades"):
        grads = [torch.load(tmp_path / f"{form}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert torch.equal(*grads)
        assert grads[0].abs().sum() > 0
