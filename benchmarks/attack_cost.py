"""What adversarial training costs: ratios of medians to one clean training step of the same run.

    python benchmarks/attack_cost.py [--model encoder|mf|deepfm|all] [--rounds 5] [--out FILE]

The cases of a model are run in turn, round after round, so that a machine that slows down slows
all of them. "usual" is the loop as it is commonly written: `loss.backward()` in every ascent step,
which computes the gradients of all weights too, and separate torch calls for norms and projection.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import embattle as eb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], None]
EPS, SIZE, STEPS = 0.3, 0.12, 3


class Usual:
    """PGD as it is commonly written: hook, full backward passes, separate calls."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.deltas: list[Tensor] = []
        self.active, self.turn = False, 0
        for module in modules:
            module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor | None:
        if not self.active:
            return None
        if self.turn == len(self.deltas):
            self.deltas.append(torch.zeros_like(output).requires_grad_())
        self.turn += 1
        return output + self.deltas[self.turn - 1]

    def run(self, losses: Callable[[], Tensor], model: nn.Module, steps: int) -> Tensor:
        """Return the loss of the training pass under the deltas."""
        self.deltas, self.active = [], True
        for _ in range(steps):
            self.turn = 0
            losses().mean().backward()
            for delta in self.deltas:
                assert delta.grad is not None
                grad = delta.grad.flatten(1)
                norm = grad.norm(dim=1, keepdim=True)
                moved = delta.data.flatten(1) + SIZE * grad / (norm + 1e-10)
                size = moved.norm(dim=1, keepdim=True)
                moved = torch.where(size > EPS, moved * (EPS / size), moved)
                delta.data = moved.reshape(delta.shape)
                delta.grad = None
            model.zero_grad()
        self.turn = 0
        loss = losses().mean()
        self.active = False
        return loss


def cases(
    model: nn.Module,
    modules: list[nn.Module],
    losses: Callable[[], Tensor],
    mask: Tensor | None,
) -> dict[str, Step]:
    """The training steps that are compared."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sites = [eb.Site(module, model=model) for module in modules]
    usual = Usual(modules)

    def finish(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def robust(form: str, attack: eb.attacks.Attack) -> Step:
        objective = eb.AdversarialObjective(attack, sites, form=form)
        return lambda: finish(objective(losses, mask=mask)[0])

    def pgd(**options: object) -> eb.PGD:
        return eb.PGD(eps=EPS, step_size=SIZE, steps=STEPS, **options)  # type: ignore[arg-type]

    def usual_mixed_step() -> None:
        robust_loss = usual.run(losses, model, STEPS)
        finish(losses().mean() + robust_loss)

    return {
        "clean": lambda: finish(losses().mean()),
        "PGD-3 adversarial only": robust("adversarial", pgd()),
        "PGD-3 adversarial only, usual": lambda: finish(usual.run(losses, model, STEPS)),
        "PGD-3 mixed from zero": robust("mixed", pgd()),
        "PGD-3 mixed, random start": robust("mixed", pgd(random_start=True)),
        "PGD-3 mixed, usual": usual_mixed_step,
        "FreeLB-3": robust("free", pgd()),
        "FGM mixed": robust("mixed", eb.FGM(eps=EPS)),
    }


def encoder() -> dict[str, Step]:
    """A MiniLM-size encoder, batch 16 x 64 tokens."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    model = transformers.BertForSequenceClassification(config).train()
    tokens = torch.randint(0, 30522, (16, 64))
    labels = torch.randint(0, 2, (16,))
    mask = torch.ones_like(tokens)

    def losses() -> Tensor:
        logits = model(input_ids=tokens, attention_mask=mask).logits
        return F.cross_entropy(logits, labels, reduction="none")

    return cases(model, [model.get_input_embeddings()], losses, mask.bool())


class Factors(nn.Module):
    """Matrix factorisation for BPR."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20000, 64), nn.Embedding(20000, 64)


def mf() -> dict[str, Step]:
    """MF-BPR, batch 4096, 64 factors."""
    model = Factors()
    users, positive, negative = torch.randint(0, 20000, (3, 4096))

    def losses() -> Tensor:
        u = model.user(users)
        return F.softplus((u * (model.item(negative) - model.item(positive))).sum(1))

    return cases(model, [model.user, model.item], losses, None)


class DeepFM(nn.Module):
    """26 fields of 16 dims, a factorisation machine and an MLP of 64 units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(26 * 1000, 16)
        self.mlp = nn.Sequential(nn.Linear(26 * 16, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, fields: Tensor) -> Tensor:
        e = self.embedding(fields)
        second = (e.sum(1).square() - e.square().sum(1)).sum(1) / 2
        return second + self.mlp(e.flatten(1)).squeeze(1)


def deepfm() -> dict[str, Step]:
    """DeepFM, batch 4096."""
    model = DeepFM()
    fields = torch.randint(0, 1000, (4096, 26)) + torch.arange(26) * 1000
    labels = torch.randint(0, 2, (4096,)).float()

    def losses() -> Tensor:
        return F.binary_cross_entropy_with_logits(model(fields), labels, reduction="none")

    return cases(model, [model.embedding], losses, None)


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, round by round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure, print and perhaps write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    models = {"encoder": encoder, "mf": mf, "deepfm": deepfm}
    parser.add_argument("--model", choices=[*models, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    record: dict[str, object] = {
        "torch": torch.__version__,
        "embattle": eb.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "rounds": options.rounds,
    }
    for name, make in models.items():
        if options.model not in (name, "all"):
            continue
        rounds = options.rounds if name == "encoder" else 10 * options.rounds
        times = measure(make(), rounds)
        clean = statistics.median(times["clean"])
        print(f"{make.__doc__}  clean step {1e3 * clean:.1f} ms")
        for case, seconds in times.items():
            median = statistics.median(seconds)
            print(f"  {case:32s} {median / clean:5.2f}   ({1e3 * median:.1f} ms)")
        record[name] = {
            case: {"median_s": statistics.median(seconds), "seconds": seconds}
            for case, seconds in times.items()
        }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
