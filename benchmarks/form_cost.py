"""What staggered replays and partial batches cost beyond their passes, and beside plain training.

    python benchmarks/form_cost.py [--model NAME] [--rounds 11] [--out FILE.json]

With `--out` the models are added to those that FILE holds for the same commit and machine.

Each form's step is compared with the loop of the same passes as one would write it by hand: a
hook that adds a tensor of deltas, its gradient, one step to the border of an l2 ball. The cases of
a model are run in turn, round after round. The figures are ratios of medians within one run, and
the median of the rounds' own ratios; times are the process's CPU time, on one thread, so that other
work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import embattle as eb
import torch
import torch.nn.functional as F
from attack_cost import DeepFM, Factors
from origin import in_words, origin
from torch import Tensor, nn

EPS = 0.3
# From the rows of a batch (None: all) to the function that gives their losses.
LossOf = Callable[[Tensor | None], Callable[[], Tensor]]
Step = Callable[[], None]


class ByHand:
    """Deltas that hooks add to the modules' outputs, one for each module."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.deltas: dict[nn.Module, Tensor] = {}
        for module in modules:
            module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor | None:
        if not self.deltas:
            return None
        if module not in self.deltas:
            self.deltas[module] = torch.zeros_like(output)
        return output + self.deltas[module]

    @staticmethod
    def moved(grad: Tensor) -> Tensor:
        """One step to the border of each sample's ball."""
        flat = grad.flatten(1)
        return (EPS * flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)).view_as(grad)


def cases(
    model: nn.Module, modules: list[nn.Module], shapes: list[torch.Size], loss_of: LossOf, size: int
) -> dict[str, Step]:
    """The training steps that are compared: half of each batch is perturbed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sites = [eb.Site(module, model=model) for module in modules]
    hand = ByHand(modules)
    trained = [p for p in model.parameters() if p.requires_grad]
    half = size // 2
    order = torch.arange(size)

    def finish(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    objective = eb.AdversarialObjective(eb.FGM(eps=EPS), sites, form=eb.StaggeredReplays(2))
    turn = [0]

    def staggered() -> None:
        # The second half comes again; the first half is new.
        new = turn[0] * half
        samples = [*range(new, new + half), *range(new - half, new)] if new else [*range(half)]
        turn[0] += 1
        rows = None if new else order[:half]
        loss, _ = objective(loss_of(rows), samples=samples)
        finish(loss)

    kept: list[Tensor] = []

    def staggered_by_hand() -> None:
        deltas = [torch.zeros(shape) for shape in shapes]
        for delta, old in zip(deltas, kept, strict=False):
            delta[half:] = old
        hand.deltas = dict(zip(modules, [delta.requires_grad_() for delta in deltas], strict=True))
        loss = loss_of(None)().mean()
        hand.deltas = {}
        loss.backward()
        kept[:] = [hand.moved(delta.grad[:half] * size) for delta in deltas]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    chosen = eb.AdversarialObjective(eb.FGM(eps=EPS), sites, form=eb.Partial(0.5))

    def partial() -> None:
        loss, _ = chosen(loss_of(None), samples=size, subset=lambda rows: loss_of(rows))
        finish(loss)

    def partial_by_hand() -> None:
        rows = torch.randperm(size)[:half].sort().values
        for p in trained:
            p.requires_grad_(False)
        own = [torch.zeros(half, *shape[1:]).requires_grad_() for shape in shapes]
        hand.deltas = dict(zip(modules, own, strict=True))
        grads = torch.autograd.grad(loss_of(rows)().sum(), own)
        for p in trained:
            p.requires_grad_(True)
        whole = [torch.zeros(shape) for shape in shapes]
        for delta, grad in zip(whole, grads, strict=True):
            delta[rows] = hand.moved(grad)
        hand.deltas = dict(zip(modules, whole, strict=True))
        loss = loss_of(None)().mean()
        hand.deltas = {}
        finish(loss)

    mixed = eb.AdversarialObjective(eb.FGM(eps=EPS), sites)
    return {
        "plain": lambda: finish(loss_of(None)().mean()),
        "staggered": staggered,
        "staggered, by hand": staggered_by_hand,
        "partial": partial,
        "partial, by hand": partial_by_hand,
        "mixed": lambda: finish(mixed(loss_of(None))[0]),
    }


def encoder() -> dict[str, Step]:
    """A MiniLM-size encoder, batch 16 x 64 tokens, without dropout."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(config).train()
    tokens, labels = torch.randint(1, 30522, (16, 64)), torch.randint(0, 2, (16,))
    mask = torch.ones_like(tokens)

    def loss_of(rows: Tensor | None) -> Callable[[], Tensor]:
        some = slice(None) if rows is None else rows

        def losses() -> Tensor:
            logits = model(input_ids=tokens[some], attention_mask=mask[some]).logits
            return F.cross_entropy(logits, labels[some], reduction="none")

        return losses

    return cases(model, [model.get_input_embeddings()], [torch.Size([16, 64, 384])], loss_of, 16)


def mf() -> dict[str, Step]:
    """MF-BPR, batch 4096, 64 factors; users and items are perturbed."""
    model = Factors()
    ids = torch.randint(0, 20000, (3, 4096))

    def loss_of(rows: Tensor | None) -> Callable[[], Tensor]:
        users, positive, negative = ids if rows is None else ids[:, rows]
        items = torch.stack([positive, negative], 1)

        def losses() -> Tensor:
            both = model.item(items)
            return F.softplus((model.user(users) * (both[:, 1] - both[:, 0])).sum(1))

        return losses

    shapes = [torch.Size([4096, 64]), torch.Size([4096, 2, 64])]
    return cases(model, [model.user, model.item], shapes, loss_of, 4096)


def deepfm() -> dict[str, Step]:
    """DeepFM, batch 4096, 26 fields of 16 dims."""
    model = DeepFM()
    fields = torch.randint(0, 1000, (4096, 26)) + torch.arange(26) * 1000
    labels = torch.randint(0, 2, (4096,)).float()

    def loss_of(rows: Tensor | None) -> Callable[[], Tensor]:
        some = slice(None) if rows is None else rows
        mine, right = fields[some], labels[some]
        return lambda: F.binary_cross_entropy_with_logits(model(mine), right, reduction="none")

    return cases(model, [model.embedding], [torch.Size([4096, 26, 16])], loss_of, 4096)


MODELS = {"encoder": encoder, "mf": mf, "deepfm": deepfm}
ROUNDS = {"encoder": 1, "mf": 8, "deepfm": 8}


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each case, round by round; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number > 1:
                times[name].append(time.process_time() - start)
    return times


def table(name: str, times: dict[str, list[float]]) -> list[str]:
    """Lines of a Markdown table."""
    median = {case: statistics.median(each) for case, each in times.items()}
    lines = [
        f"{MODELS[name].__doc__}  Plain step {1e3 * median['plain']:.1f} ms of CPU time; "
        f"{len(times['plain'])} rounds.",
        "",
        "| step | ratio to plain | ratio to the loop by hand | median of the rounds' ratios |",
        "|---|---|---|---|",
    ]
    for case in ("staggered", "partial", "mixed"):
        line = f"| {case} | {median[case] / median['plain']:.3f} |"
        by_hand = times.get(f"{case}, by hand")
        if by_hand is not None:
            pairs = [a / b for a, b in zip(times[case], by_hand, strict=True)]
            line += f" {median[case] / statistics.median(by_hand):.3f} |"
            line += f" {statistics.median(pairs):.3f} |"
        else:
            line += " | |"
        lines.append(line)
    return [*lines, ""]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    found = {}
    torch.set_num_threads(1)
    facts = origin(1)
    print(in_words(facts), "\n")
    for name in options.model or MODELS:
        found[name] = measure(MODELS[name](), options.rounds * ROUNDS[name])
        print("\n".join(table(name, found[name])), flush=True)
    if options.out is not None:
        held = json.loads(options.out.read_text()) if options.out.exists() else {}
        if held.get("origin") == facts:  # other models of the same commit and machine
            found = {**held["seconds"], **found}
        lines = ["# What staggered replays and partial batches cost", "", in_words(facts), ""]
        for name, times in found.items():
            lines += table(name, times)
        options.out.write_text(json.dumps({"origin": facts, "seconds": found}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
