"""What an attack costs where the model is small: PGD-10 beside a hand-written loop, and libraries.

    pip install --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy gitpython gitdb smmap requests
    python benchmarks/small_attacks.py [--rounds 200] [--out FOLDER]

All give the same perturbations; one that does not is left out, with a word. They run in turn, on
one thread, timed by the process's own CPU time; the figures are ratios of medians. The loop in
plain torch knows the model: it computes the embeddings once and runs the layers behind them, and so
do torchattacks and foolbox, whose images are the embeddings. All have 10 forward and 10 backward
passes, the attack too (`evaluate=False`). A library that is not installed is left out.

Then what an attack costs beside its passes, in calls of `torch.add` on [32, 8, 16]: once, and at
every step, the fused op included. The model there is as small as can be, and the same passes
without an attack are taken off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import embattle as eb
import torch
import torch.nn.functional as F
from origin import in_words, origin
from torch import Tensor, nn

STEPS = 10
# eps, step size. Embeddings lie around 0.5: what moves so far stays in [0, 1], to which the
# libraries clamp their images.
STRENGTHS = {"l2": (0.3, 0.075), "linf": (0.1, 0.025)}
# Upper bounds of the attack's time, as shares of plain torch's and of torchattacks', and of the
# costs in calls of torch.add.
BARS = {
    "mlp_32": (0.95, 0.85),
    "mlp_512": (0.95, 0.85),
    "fields": (1.0, 0.9),
    "encoder": (1.0, 0.9),
}
FIXED_BAR, STEP_BAR = 50, 8


class Case(NamedTuple):
    """A model on one batch.

    Attributes:
        model: the model.
        place: the module whose output is perturbed.
        losses: runs the model on the batch; `[B]`.
        base: the embeddings.
        behind: the summed loss given embeddings: what a hand-written loop calls.
        logits: two or more logits of each sample given embeddings, `[B, C]`: what libraries call.
        labels: of the samples, int64 `[B]`.
        share: how many of the rounds are measured.
    """

    model: nn.Module
    place: nn.Module
    losses: Callable[[], Tensor]
    base: Callable[[], Tensor]
    behind: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    labels: Tensor
    share: float = 1.0


def around_half(*shape: int) -> Tensor:
    """Numbers that stay in [0, 1] when they are attacked."""
    return (0.5 + 0.1 * torch.randn(*shape)).clamp(0.3, 0.7)


def mlp(batch: int) -> Case:
    """64 inputs, two layers of 64 units, 10 classes."""
    place = nn.Identity()
    layers = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    model = nn.Sequential(place, layers)
    inputs, labels = around_half(batch, 64), torch.randint(0, 10, (batch,))

    def behind(x: Tensor) -> Tensor:
        return F.cross_entropy(layers(x), labels, reduction="sum")

    def losses() -> Tensor:
        return F.cross_entropy(model(inputs), labels, reduction="none")

    return Case(model, place, losses, lambda: inputs, behind, layers, labels)


class Fields(nn.Module):
    """26 fields of 16 dims and an MLP of 64 units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(26 * 1000, 16)
        self.embedding.weight.data = around_half(26 * 1000, 16)
        self.mlp = nn.Sequential(nn.Linear(26 * 16, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, fields: Tensor) -> Tensor:
        return self.behind(self.embedding(fields))

    def behind(self, e: Tensor) -> Tensor:
        logits: Tensor = self.mlp(e.flatten(1)).squeeze(1)
        return logits


def fields() -> Case:
    """26 fields of 16 dims, batch 2048."""
    model = Fields()
    values = torch.randint(0, 1000, (2048, 26)) + torch.arange(26) * 1000
    labels = torch.randint(0, 2, (2048,)).float()
    entropy = F.binary_cross_entropy_with_logits
    return Case(
        model,
        model.embedding,
        lambda: entropy(model(values), labels, reduction="none"),
        lambda: model.embedding(values),
        lambda e: entropy(model.behind(e), labels, reduction="sum"),
        lambda e: F.pad(model.behind(e).unsqueeze(1), (1, 0)),  # the other class has a logit of 0
        labels.long(),
        0.25,
    )


def encoder() -> Case:
    """A MiniLM-size encoder, 8 x 16 tokens, no dropout."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    tokens, labels = torch.randint(0, 30522, (8, 16)), torch.randint(0, 2, (8,))
    table = model.get_input_embeddings()
    table.weight.data = around_half(*table.weight.shape)

    def loss(reduction: str, **inputs: Tensor) -> Tensor:
        return F.cross_entropy(model(**inputs).logits, labels, reduction=reduction)

    return Case(
        model,
        table,
        lambda: loss("none", input_ids=tokens),
        lambda: table(tokens),
        lambda e: loss("sum", inputs_embeds=e),
        lambda e: model(inputs_embeds=e).logits,
        labels,
        0.1,
    )


CASES: dict[str, Callable[[], Case]] = {
    "mlp_32": lambda: mlp(32),
    "mlp_512": lambda: mlp(512),
    "fields": fields,
    "encoder": encoder,
}


def attack(case: Case, norm: Any, steps: int = STEPS) -> Callable[[], Tensor]:
    """PGD from zero."""
    eps, size = STRENGTHS[norm]
    site = eb.Site(case.place, model=case.model)
    pgd = eb.PGD(norm=norm, eps=eps, step_size=size, steps=steps)
    return lambda: pgd.run(case.losses, site, evaluate=False).delta


def plain(case: Case, norm: Any) -> Callable[[], Tensor]:
    """The same by hand."""
    eps, size = STRENGTHS[norm]

    def norms(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))

    def run() -> Tensor:
        with torch.no_grad():
            base = case.base()
        delta = torch.zeros_like(base)
        for _ in range(STEPS):
            delta.requires_grad_()
            (grad,) = torch.autograd.grad(case.behind(base + delta), delta)
            delta = delta.detach()
            if norm == "l2":
                delta = delta + size * grad / (norms(grad) + 1e-12)
                delta = delta * (eps / (norms(delta) + 1e-12)).clamp(max=1)
            else:
                delta = (delta + size * grad.sign()).clamp(-eps, eps)
        return delta

    return run


class Images(nn.Module):
    """A model whose images `[B, 1, rows, dim]` are embeddings."""

    def __init__(self, case: Case, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.logits, self.shape = case.model, case.logits, shape

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images.reshape(self.shape))


def of_torchattacks(case: Case, norm: Any) -> Callable[[], Tensor]:
    """The same by torchattacks, which is given the embeddings and the layers behind them."""
    import torchattacks

    eps, size = STRENGTHS[norm]
    base = case.base().detach()
    images = base.reshape(len(base), 1, -1, base.shape[-1])
    kind = torchattacks.PGDL2 if norm == "l2" else torchattacks.PGD
    # In eval mode: it would leave a model that it found in training mode with its dropout on.
    model = Images(case, base.shape).eval()
    run = kind(model, eps=eps, alpha=size, steps=STEPS, random_start=False)
    return lambda: run(images, case.labels).reshape(base.shape) - base


def of_foolbox(case: Case, norm: Any) -> Callable[[], Tensor]:
    """The same by foolbox."""
    import foolbox

    eps, size = STRENGTHS[norm]
    base = case.base().detach()
    images = base.reshape(len(base), 1, -1, base.shape[-1])
    model = foolbox.PyTorchModel(Images(case, base.shape).eval(), bounds=(0, 1), device="cpu")
    kind = foolbox.attacks.L2PGD if norm == "l2" else foolbox.attacks.LinfPGD
    run = kind(abs_stepsize=size, steps=STEPS, random_start=False)
    # Without its check of what fooled the model, a pass that the others do not make.
    return lambda: run.run(model, images, case.labels, epsilon=eps).reshape(base.shape) - base


PEERS = {"torchattacks": of_torchattacks, "foolbox": of_foolbox}


def in_turn(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    of: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """CPU seconds of each (their median, or another figure), run in turn; the first warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 5):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number >= 5:
                times[name].append(time.process_time() - start)
    return {name: of(each) for name, each in times.items()}


def ratios(rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Each case and norm: seconds, and the attack's time as a share of each other one's."""
    found = []
    for name in names:
        case = CASES[name]()
        case.model.requires_grad_(True)
        for norm in STRENGTHS:
            runs = {"ours": attack(case, norm), "plain": plain(case, norm)}
            for peer, of_peer in PEERS.items():
                if find_spec(peer) is not None:
                    runs[peer] = of_peer(case, norm)
            ours = runs["ours"]()
            for who, run in list(runs.items()):
                same = torch.isclose(ours, run(), rtol=1e-3, atol=1e-5).float().mean()
                # A gradient that is zero but for rounding has a sign of its own in each loop.
                if same < 0.999:
                    print(f"{name}, {norm}: {who} gives other perturbations ({same:.4f} agree)")
                    del runs[who]
            took = in_turn(runs, max(10, int(rounds * case.share)))
            shares = {who: took["ours"] / seconds for who, seconds in took.items()}
            found.append({"case": name, "norm": norm, "seconds": took, "ratios": shares})
    return found


def costs(rounds: int) -> dict[str, dict[str, float]]:
    """What an attack costs beside its passes, in calls of `torch.add` on [32, 8, 16]."""
    place = nn.Identity()
    model = nn.Sequential(place, nn.Flatten())
    inputs, weights = torch.randn(32, 8, 16), torch.randn(8 * 16, 1)

    def losses(x: Tensor) -> Tensor:
        return (model(x) @ weights).squeeze(1)

    summed: Callable[[Tensor], Tensor] = lambda x: losses(x).sum()  # noqa: E731
    case = Case(model, place, lambda: losses(inputs), lambda: inputs, summed, losses, inputs)

    def passes(count: int) -> Callable[[], None]:
        def run() -> None:
            delta = torch.zeros_like(inputs).requires_grad_()
            for _ in range(count):
                torch.autograd.grad(case.behind(inputs + delta), delta)

        return run

    def add() -> None:
        for _ in range(100):
            torch.add(inputs, inputs)

    few, many = 2, 7
    found = {}
    for norm in STRENGTHS:
        runs: dict[str, Callable[[], Any]] = {
            "few": attack(case, norm, few),
            "many": attack(case, norm, many),
            "few passes": passes(few),
            "many passes": passes(many),
            "add": add,
        }
        took = in_turn(runs, rounds, min)
        own = {n: took[n] - took[f"{n} passes"] for n in ("few", "many")}
        step = (own["many"] - own["few"]) / (many - few)
        one = took["add"] / 100
        fixed = own["few"] - few * step
        found[norm] = {"add_us": 1e6 * one, "fixed": fixed / one, "step": step / one}
    return found


def table(rows: list[dict[str, Any]], own: dict[str, dict[str, float]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| model | norm | attack, ms | / plain torch | bar | / torchattacks | bar | / foolbox |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        plain_bar, peer_bar = BARS[r["case"]]
        ratio = {who: f"{value:.2f}" for who, value in r["ratios"].items()}
        lines += [
            f"| {r['case']} | {r['norm']} | {1e3 * r['seconds']['ours']:.2f} | "
            f"{ratio.get('plain', '-')} | "
            f"{plain_bar} | {ratio.get('torchattacks', '-')} | {peer_bar} | "
            f"{ratio.get('foolbox', '-')} |"
        ]
    lines += ["", "| norm | once for an attack | bar | each step | bar | torch.add, us |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {norm} | {c['fixed']:.0f} | {FIXED_BAR} | {c['step']:.1f} | {STEP_BAR} | "
        f"{c['add_us']:.2f} |"
        for norm, c in own.items()
    ]
    return lines


def save(folder: Path, rows: list[dict[str, Any]], own: dict[str, dict[str, float]]) -> None:
    """Write the figures, and their table."""
    about = origin(1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"small_attacks_{about['date']}.json"
    path.write_text(json.dumps({"origin": about, "ratios": rows, "costs": own}) + "\n")
    text = ["# What an attack costs on small models", ""]
    text += [
        "`python benchmarks/small_attacks.py`: the time of PGD-10 as a share of that of a loop in",
        "plain torch, of torchattacks and of foolbox, with the same perturbations; and what an",
        "attack costs beside its passes, in calls of `torch.add` on [32, 8, 16].",
        "",
    ]
    text += [in_words(about) + ".", "", *table(rows, own)]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def main() -> None:
    """Measure, print and perhaps write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--out", type=Path, help="folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    own = costs(options.rounds)
    rows = ratios(options.rounds, options.models)
    print("\n".join(table(rows, own)))
    if options.out is not None:
        save(options.out, rows, own)


if __name__ == "__main__":
    main()
