"""What adversarial training costs: ratios of medians to one clean training step of the same run.

    python benchmarks/attack_cost.py [--model NAME] [--rounds 3] [--out FILE.json]

The cases of a model are run in turn, round after round, so that a machine that slows down slows
all of them. "usual" is the loop as it is commonly written: `loss.backward()` in every ascent step,
which computes the gradients of all weights too, and separate torch calls for norms and projection.
"passes alone" makes the passes that a method cannot do without, and nothing with what they give: no
delta moves, and no gradients are added up. It is what a step costs at least on this machine.
"own" is the share of the step outside the model's forward and backward passes and the optimizer.
With `--out` the samples are added to those that FILE holds for the same commit and machine, and a
table is written beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import embattle as eb
import torch
import torch.nn.functional as F
from embattle.perturb import gradients
from embattle.perturb.guard import Mode
from embattle.perturb.hook import Hook
from origin import in_words, origin
from torch import Tensor, nn

Step = Callable[[], None]
EPS, SIZE, STEPS = 0.3, 0.12, 3

# Upper bounds: of the ratio to the clean step, and of that to the usual loop.
BARS = {
    "PGD-3 adversarial only": 2.75,
    "PGD-3 mixed from zero": 3.0,
    "PGD-3 mixed, random start": 3.55,
    "FreeLB-3": 2.75,
    "FGM mixed": 1.9,
}
# What the usual loops took where the encoder's bars were set. The ratio to the clean step depends
# on the machine (how much of it is the optimizer's); that to the usual loop hardly does.
USUAL = {"PGD-3 adversarial only": 3.6, "PGD-3 mixed": 4.4}
ENCODERS = ("no_dropout", "same_masks", "encoder")
USUAL_BAR = 0.75


class Passes:
    """Adds up the time inside the model's passes and the optimizer, and leaves out the hooks'."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any], *, inside: bool = True) -> Callable[..., Any]:
        """Count the calls of a function (`inside=False`: take them out of the pass around them)."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if inside == (self._depth > 0):  # part of a pass already; or a hook outside of any
                return function(*args, **kwargs)
            before = self._depth
            self._depth = int(inside)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += (time.perf_counter() - start) * (1 if inside else -1)
                self._depth = before

        return counted


PASSES = Passes()
torch.autograd.grad = PASSES.timed(torch.autograd.grad)
if gradients.run_backward is not None:
    gradients.run_backward = PASSES.timed(gradients.run_backward)
Tensor.backward = PASSES.timed(Tensor.backward)  # type: ignore[method-assign]
Hook.__call__ = PASSES.timed(Hook.__call__, inside=False)  # type: ignore[method-assign]


class Usual:
    """PGD as it is commonly written: hook, full backward passes, separate calls."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.deltas: list[Tensor] = []
        self.active, self.turn = False, 0
        for module in modules:
            module.register_forward_hook(PASSES.timed(self._add, inside=False))

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


class Alone:
    """The passes of an attack, and no attack: what the rest of a step is measured against."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.places: list[Tensor] | None = None
        for module in modules:
            module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor | None:
        if self.places is None:
            return None
        self.places.append(output.detach().requires_grad_())
        return self.places[-1]

    def run(self, losses: Callable[[], Tensor], model: nn.Module, ascents: int) -> None:
        """Make passes that differentiate the modules' outputs alone."""
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        for _ in range(ascents):
            self.places = []
            torch.autograd.grad(losses().sum(), self.places)
        self.places = None
        for p in trained:
            p.requires_grad_(True)


def cases(
    model: nn.Module,
    modules: list[nn.Module],
    losses: Callable[[], Tensor],
    mask: Tensor | None,
    mode: Mode = "as_is",
) -> dict[str, Step]:
    """The training steps that are compared."""
    losses = PASSES.timed(losses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    update, clear = PASSES.timed(optimizer.step), PASSES.timed(optimizer.zero_grad)
    sites = [eb.Site(module, model=model) for module in modules]
    usual, alone = Usual(modules), Alone(modules)

    def finish(loss: Tensor) -> None:
        loss.backward()
        update()
        clear()

    def robust(form: str, attack: eb.attacks.Attack) -> Step:
        objective = eb.AdversarialObjective(attack, sites, form=form)
        return lambda: finish(objective(losses, mask=mask)[0])

    def pgd(**options: object) -> eb.PGD:
        return eb.PGD(eps=EPS, step_size=SIZE, steps=STEPS, mode=mode, **options)  # type: ignore[arg-type]

    def usual_mixed_step() -> None:
        robust_loss = usual.run(losses, model, STEPS)
        finish(losses().mean() + robust_loss)

    def passes(ascents: int, *, clean: bool) -> Step:
        def step() -> None:
            kept = None
            if clean:
                kept = torch.autograd.grad(losses().mean(), list(model.parameters()))
            alone.run(losses, model, ascents)
            finish(losses().mean())
            del kept

        return step

    return {
        "clean": lambda: finish(losses().mean()),
        "PGD-3 adversarial only": robust("adversarial", pgd()),
        "PGD-3 adversarial only, passes alone": passes(STEPS, clean=False),
        "PGD-3 adversarial only, usual": lambda: finish(usual.run(losses, model, STEPS)),
        "PGD-3 mixed from zero": robust("mixed", pgd()),
        "PGD-3 mixed from zero, passes alone": passes(STEPS - 1, clean=True),
        "PGD-3 mixed, random start": robust("mixed", pgd(random_start=True)),
        "PGD-3 mixed, random start, passes alone": passes(STEPS, clean=True),
        "PGD-3 mixed, usual": usual_mixed_step,
        "FreeLB-3": robust("free", pgd()),
        "FGM mixed": robust("mixed", eb.FGM(eps=EPS, mode=mode)),
        "FGM mixed, passes alone": passes(0, clean=True),
    }


def encoder(mode: Mode = "as_is", dropout: float = 0.1) -> dict[str, Step]:
    """A MiniLM-size encoder, batch 16 x 64 tokens; every pass draws its own dropout masks."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = transformers.BertForSequenceClassification(config).train()
    tokens = torch.randint(0, 30522, (16, 64))
    labels = torch.randint(0, 2, (16,))
    mask = torch.ones_like(tokens)

    def losses() -> Tensor:
        logits = model(input_ids=tokens, attention_mask=mask).logits
        return F.cross_entropy(logits, labels, reduction="none")

    return cases(model, [model.get_input_embeddings()], losses, mask.bool(), mode)


def same_masks() -> dict[str, Step]:
    """The same encoder; the passes of a step have the same dropout masks."""
    return {n: step for n, step in encoder("same").items() if not n.endswith("usual")}


def no_dropout() -> dict[str, Step]:
    """A MiniLM-size encoder, batch 16 x 64 tokens, without dropout: all modes do the same."""
    return encoder(dropout=0.0)


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


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each case, in all and of its own, round by round; the first round warms up."""
    times: dict[str, dict[str, list[float]]] = {n: {"seconds": [], "own": []} for n in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            PASSES.seconds = 0.0
            start = time.perf_counter()
            step()
            took = time.perf_counter() - start
            if number:
                times[name]["seconds"].append(took)
                times[name]["own"].append(took - PASSES.seconds)
    return times


def form_of(case: str) -> str | None:
    """The form of which there is a usual loop that does what a case does."""
    for form in USUAL:
        if case.startswith(form) and not case.endswith(("usual", "alone")):
            return form
    return None


def table(name: str, times: dict[str, dict[str, list[float]]]) -> list[str]:
    """Lines of a Markdown table."""
    median = {case: statistics.median(each["seconds"]) for case, each in times.items()}
    lines = [
        f"{MODELS[name].__doc__}  Clean step {1e3 * median['clean']:.1f} ms; "
        f"{len(times['clean']['seconds'])} rounds.",
        "",
        "| step | ratio to clean | bar | ratio to the usual loop | own |",
        "|---|---|---|---|---|",
    ]
    for case, each in times.items():
        form = form_of(case)
        usual = f"{form}, usual" if f"{form}, usual" in times else None
        bar = BARS.get(case) if name in ENCODERS else None
        against = "" if usual is None else f"{median[case] / median[usual]:.2f}"
        if usual is not None and form is not None:
            goal = BARS[case] / USUAL[form] if name in ENCODERS else USUAL_BAR
            against += f" (bar {goal:.2f})"
        share = statistics.median(each["own"]) / median[case]
        lines.append(
            f"| {case} | {median[case] / median['clean']:.2f} | {bar or ''} | {against} | "
            f"{100 * share:.1f} % |"
        )
    return lines


def save(path: Path, where: dict[str, Any], found: dict[str, Any]) -> None:
    """Add the samples to a file, and write its tables beside it."""
    record: dict[str, Any] = {"origin": where, "models": {}}
    if path.exists():
        before = json.loads(path.read_text())
        if before["origin"] == where:
            record = before
    for name, times in found.items():
        known = record["models"].setdefault(name, {})
        for case, each in times.items():
            for kind, seconds in each.items():
                rounded = [round(one, 6) for one in seconds]
                known.setdefault(case, {}).setdefault(kind, []).extend(rounded)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")
    lines = ["# What adversarial training costs", ""]
    lines += ["Ratios of medians, cases in turn: `python benchmarks/attack_cost.py`.", ""]
    lines += [in_words(record["origin"]) + ".", ""]
    for name, times in record["models"].items():
        lines += [*table(name, times), ""]
    path.with_suffix(".md").write_text("\n".join(lines))


MODELS: dict[str, Callable[[], dict[str, Step]]] = {
    "no_dropout": no_dropout,
    "same_masks": same_masks,
    "encoder": encoder,
    "mf": mf,
    "deepfm": deepfm,
}


def main() -> None:
    """Measure, print and perhaps write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3, help="of the encoders; others have 10 x")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name, make in MODELS.items():
        if options.model in (name, "all"):
            rounds = options.rounds * (1 if name in ENCODERS else 10)
            found[name] = measure(make(), rounds)
            print("\n".join(table(name, found[name])), end="\n\n")
    if options.out is not None:
        save(options.out, origin(options.threads), found)


if __name__ == "__main__":
    main()
