"""The clipper on models of other libraries, with an adversarial objective, with an accountant."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import devices
import embattle as eb
import pytest
import torch
import toys
from clipping_cases import assert_close, clipped_sum, gradients
from embattle.clipping import PerSampleClipper
from torch import Tensor, nn

SAMPLES = 4


def bert(**options: Any) -> nn.Module:
    """A tiny classifier with random weights, in float64, without dropout."""
    pytest.importorskip("transformers")
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return toys.tiny_bert(**quiet, **options).double()


def adapted(targets: list[str]) -> nn.Module:
    """The same under LoRA; its second factors are drawn, for they begin at zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="SEQ_CLS")
    model = peft.get_peft_model(bert(), config).double()
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(p)
    return model


LIBRARY_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "bert, eager attention": lambda: bert(attn_implementation="eager"),
    "lora": lambda: adapted(["query", "value"]),
    "lora, all layers": lambda: adapted(["query", "key", "value", "dense"]),
    "lora, embeddings": lambda: adapted(["query", "word_embeddings"]),
}


@pytest.mark.parametrize("name", LIBRARY_MODELS)
@pytest.mark.parametrize("mode", ["flat", "per_layer"])
def test_library_models_equal_the_loop(name: str, mode: str) -> None:
    model = LIBRARY_MODELS[name]()
    ids = torch.randint(5, 60, (SAMPLES, 8))
    attention = (torch.arange(8) < torch.tensor([[8], [5], [6], [3]])).long()
    labels = torch.tensor([0, 1, 1, 0])

    def losses(rows: list[int]) -> Tensor:
        logits = model(input_ids=ids[rows], attention_mask=attention[rows]).logits
        return nn.functional.cross_entropy(logits, labels[rows], reduction="none")

    trained = [p for p in model.parameters() if p.requires_grad]
    singles = []
    for b in range(SAMPLES):
        grads = torch.autograd.grad(losses([b]).sum(), trained, allow_unused=True)
        singles.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)]
        )
    _, norms = clipped_sum(singles, 1.0, mode)
    bound = float(norms[norms > 0].median())
    wanted, norms = clipped_sum(singles, bound, mode)
    with PerSampleClipper(model, bound, mode, reduction="sum") as clipper:
        result = clipper.backward(losses(list(range(SAMPLES))))
    assert_close([result.norms], [norms], 1e-10)
    assert_close(gradients(model), wanted, 1e-10)
    assert 0 < int((result.factors < 1).sum()) < result.factors.numel()


@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_language_models_equal_the_loop(name: str) -> None:
    """Tied tables, subclassed embeddings with padding and offsets, Conv1D; one loss a sequence."""
    transformers = pytest.importorskip("transformers")
    from test_libraries import encoder_decoder

    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0)
        ).double()
    else:
        model = encoder_decoder(name).double()
    source, target = torch.randint(1, 40, (SAMPLES, 6)), torch.randint(1, 40, (SAMPLES, 4))

    def losses(rows: list[int]) -> Tensor:
        if name == "gpt2":
            logits, labels = model(input_ids=target[rows]).logits[:, :-1], target[rows][:, 1:]
        else:
            logits, labels = model(source[rows], labels=target[rows]).logits, target[rows]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return each.sum(1)

    trained = list(model.parameters())
    singles = [list(torch.autograd.grad(losses([b]).sum(), trained)) for b in range(SAMPLES)]
    _, norms = clipped_sum(singles, 1.0)
    wanted, _ = clipped_sum(singles, float(norms.median()))
    with PerSampleClipper(model, float(norms.median()), reduction="sum") as clipper:
        result = clipper.backward(losses(list(range(SAMPLES))))
    assert_close([result.norms], [norms], 1e-10)
    assert_close(gradients(model), wanted, 1e-10)


# --- with an adversarial objective -------------------------------------------------------------


class Watched:
    """Masks the samples that the test names, whatever they look like."""

    def __init__(self, masked: list[int]) -> None:
        self.masked = masked

    def __call__(self, outcome: eb.masking.Outcome) -> Tensor:
        kept = torch.ones_like(outcome.losses, dtype=torch.bool)
        kept[self.masked] = False
        return kept


def adversarial_case(scope: Any, known: bool) -> tuple[nn.Module, Any, Any]:
    """A model, its objective, and losses of chosen rows of its batch."""
    if scope == "row":
        model: nn.Module = toys.Factors().double()
        u, i, j = torch.randint(0, 12, (3, SAMPLES), generator=torch.Generator().manual_seed(3))
        sites = [eb.Site(model.user, scope="row"), eb.Site(model.item, scope="row")]

        def losses(rows: Tensor) -> Tensor:
            positive, negative = model(u[rows], i[rows], j[rows])
            return nn.functional.softplus(negative - positive)

        mask = None
    else:
        model = toys.encoder()
        tokens, labels = toys.text_batch(SAMPLES)
        sites = [eb.Site(model.embedding, model=model if known else None)]

        def losses(rows: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(tokens[rows]), labels[rows], reduction="none")

        mask = tokens != 0
    objective = eb.AdversarialObjective(
        eb.PGD(eps=0.5, step_size=0.3, steps=2),
        sites,
        form="apr" if scope == "row" else "mixed",
        lam=0.7,
        masking=Watched([1]),
    )
    return model, objective, (losses, sites, mask)


@pytest.mark.parametrize("part", ["clean", "adversarial", "summed"])
@pytest.mark.parametrize(("scope", "known"), [("output", True), ("output", False), ("row", False)])
def test_with_an_adversarial_objective(part: str, scope: str, known: bool) -> None:
    """Each part's gradients clipped, or their sum's; a masked sample's adversarial part is out."""
    model, objective, (losses, sites, mask) = adversarial_case(scope, known)
    every = torch.arange(SAMPLES)
    trained = list(model.parameters())

    attacked = objective.attack.run(lambda: losses(every), sites, mask=mask)
    singles = []
    for b in range(SAMPLES):
        terms = []
        if part != "adversarial":
            terms.append(losses(every)[b])
        if part != "clean" and b != 1:
            with attacked.applied():
                terms.append(0.7 * losses(every)[b])
        grads: Any = [None] * len(trained)
        if terms:
            grads = torch.autograd.grad(sum(terms), trained, allow_unused=True)
        singles.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(trained, grads, strict=True)]
        )
    _, norms = clipped_sum(singles, 1.0)
    bound = float(norms[norms > 0].median())
    wanted, norms = clipped_sum(singles, bound)
    with PerSampleClipper(model, bound, reduction="sum", verify="first") as clipper:
        parts, metrics = objective.parts(lambda: losses(every), mask=mask)
        if part == "summed":
            result = clipper.backward(parts.summed)
        elif part == "clean":
            result = clipper.backward(parts.clean)
        else:
            result = clipper.backward(parts.lam * parts.adversarial, weights=parts.kept)
    if part == "adversarial":  # a weight acts after the norm, which the masked sample has too
        norms[1] = result.norms[1]
    assert_close([result.norms], [norms], 1e-8)
    assert_close(gradients(model), wanted, 1e-8)
    assert int(metrics["masked"]) == 1


def test_parts_add_up_to_the_objective() -> None:
    _, objective, (losses, _, mask) = adversarial_case("output", True)
    every = torch.arange(SAMPLES)
    loss, _ = objective(lambda: losses(every), mask=mask)
    parts, metrics = objective.parts(lambda: losses(every), mask=mask)
    assert parts.summed.mean().item() == pytest.approx(loss.item())
    assert metrics["loss"].item() == pytest.approx(loss.item())
    assert objective.step == 2
    trades = eb.AdversarialObjective(objective.attack, objective.sites, form="trades")
    forms = "mixed, adversarial, apr, staggered, partial"
    with pytest.raises(ValueError, match=f"form must be one of {forms}; got 'trad"):
        trades.parts(lambda: losses(every))


def test_a_masked_sample_may_be_infinite_under_attack() -> None:
    model, objective, (losses, sites, _) = adversarial_case("output", False)
    every = torch.arange(SAMPLES)

    def breaking() -> Tensor:
        found = losses(every)
        worse = bool(sites[0].busy)
        return found * torch.tensor([1.0, math.inf if worse else 1.0, 1.0, 1.0])

    with PerSampleClipper(model, 0.1) as clipper:
        parts, _ = objective.parts(breaking)
        clipper.backward(parts.adversarial, weights=parts.kept)
    assert all(bool(g.isfinite().all()) for g in gradients(model))
    assert any(bool(g.any()) for g in gradients(model))


def test_automatic_mixed_precision_with_loss_scaling() -> None:
    """Autocast, a gradient scaler and accumulation together take the step of plain float32."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6)
    found = []
    for mixed in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(devices.kind, init_scale=256.0, enabled=mixed)
        before = [p.detach().clone() for p in model.parameters()]
        with PerSampleClipper(model, 0.5) as clipper:
            for half in x.split(4):
                with torch.autocast(devices.kind, torch.bfloat16, enabled=mixed):
                    losses = model(half).float().square().flatten(1).sum(1)
                clipper.backward(losses, scale=0.5, scaler=scaler if mixed else None)
        scaler.step(optimizer)
        scaler.update()
        found.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    assert_close(found[1], found[0], 0.05)


# --- privacy -----------------------------------------------------------------------------------


def test_opacus_accountant() -> None:
    """The accountant takes the multiplier as it is; a selection of rows costs privacy too."""
    accountants = pytest.importorskip("opacus.accountants")
    table = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    spent = {}
    for name, selection in (
        ("dense", None),
        ("rows", eb.RowSelection(threshold=3.0, noise_multiplier=2.0)),
    ):
        accountant = accountants.RDPAccountant()
        clipper = PerSampleClipper(
            table,
            1.0,
            noise_multiplier=1.2,
            row_selection=selection,
            expected_batch_size=10,
            generator=torch.Generator().manual_seed(0),
        )
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            rows = torch.randint(50, (10, 2))
            warns = pytest.warns(UserWarning, match="dense") if selection is None else nullcontext()
            with clipper, warns:
                clipper.backward(table(rows).square().sum(1))
            optimizer.step()
            accountant.step(noise_multiplier=clipper.effective_noise_multiplier, sample_rate=0.01)
        spent[name] = accountant.get_epsilon(delta=1e-5)
    same = accountants.RDPAccountant()
    for _ in range(3):
        same.step(noise_multiplier=1.2, sample_rate=0.01)
    assert spent["dense"] == same.get_epsilon(delta=1e-5)
    assert spent["rows"] > spent["dense"]
