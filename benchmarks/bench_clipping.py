"""Cost of per-sample clipping: a training step with it over the plain step, and its memory.

Every step is forward, backward and the optimiser's: SGD without momentum, the least that there is
to do, or --optimizer adam (SparseAdam for sparse tables), without the peers. All the ways of one
model take turns in one process, so that a slow moment hits all of them; the figures are ratios of
medians. Memory is the largest amount of live tensors during a step, the model's, the optimiser's
and the batch's own among them.

    python benchmarks/bench_clipping.py                      # all models, plain and clipped
    python benchmarks/bench_clipping.py --peers --out benchmarks/results

--peers adds Opacus (hooks and ghost clipping) where it is installed, and --fastdp FOLDER fastDP out
of a checkout of github.com/awslabs/fast-differential-privacy, which is on no package index. A peer
is left out where its per-sample gradients alone would take more than 8 GB. --out writes
bench_clipping_<date>.json and .md, and replaces the models that were measured in files of the same
day. Given for every peer is also how far its first update is from ours, relative to ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from embattle.clipping import PerSampleClipper
from origin import in_words, origin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], None]
Batch = tuple[list[Tensor], Tensor]


class Dlrm(nn.Module):
    """Tables and an MLP over what they give."""

    def __init__(self, tables: int, rows: int, width: int, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width, sparse=sparse) for _ in range(tables))
        self.mlp = nn.Sequential(
            nn.Linear(tables * width, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 2),
        )

    def forward(self, ids: Tensor) -> Tensor:
        found = [table(column) for table, column in zip(self.tables, ids.unbind(1), strict=True)]
        return self.mlp(torch.cat(found, 1))


class Text(nn.Module):
    """The mean of word vectors and an MLP."""

    def __init__(self, rows: int, width: int, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width, sparse=sparse)
        self.mlp = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.table(ids).mean(1))


class Encoder(nn.Module):
    """A transformer of MiniLM-L6's size with random weights, and a classifier.

    With `explicit`, positions and segments are given for every sample rather than broadcast: the
    peers need that (Opacus' issue 841).
    """

    def __init__(self, explicit: bool = False) -> None:
        super().__init__()
        self.explicit = explicit
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        given = {}
        if self.explicit:
            positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
            given = {"position_ids": positions, "token_type_ids": torch.zeros_like(ids)}
        return self.encoder(input_ids=ids, **given).logits


def ids_batch(samples: int, length: int, rows: int) -> Batch:
    """Word ids as they come: a few words make up most of the text."""
    ids = (torch.rand(samples, length).pow(3) * rows).long()
    return [ids], torch.randint(2, (samples,))


def mlp_batch(samples: int) -> Batch:
    return [torch.randn(samples, 256)], torch.randint(2, (samples,))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2)
    )


# name -> the plain model, the model that is clipped, the batch, and the bound on the ratio.
MODELS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], Batch], float]
] = {
    "mlp": (mlp, mlp, lambda: mlp_batch(512), 1.10),
    "dlrm-1k": (
        lambda: Dlrm(8, 1000, 16, False),
        lambda: Dlrm(8, 1000, 16, False),
        lambda: ids_batch(512, 8, 1000),
        1.30,
    ),
    "text-10k": (
        lambda: Text(10_000, 64, False),
        lambda: Text(10_000, 64, False),
        lambda: ids_batch(512, 32, 10_000),
        1.25,
    ),
    "dlrm-100k-sparse": (
        lambda: Dlrm(8, 100_000, 16, False),
        lambda: Dlrm(8, 100_000, 16, True),
        lambda: ids_batch(512, 8, 100_000),
        0.60,
    ),
    "text-100k-sparse": (
        lambda: Text(100_000, 64, False),
        lambda: Text(100_000, 64, True),
        lambda: ids_batch(512, 32, 100_000),
        0.60,
    ),
    "encoder": (Encoder, Encoder, lambda: ids_batch(16, 64, 30_000), 1.25),
}


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes of live tensors while it is on: those given, those made."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        self.given = [tensor.untyped_storage() for tensor in given]
        for storage in self.given:
            self._note(storage)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
                continue
            self._note(leaf.untyped_storage())
        return out


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.01)]


def adam(model: nn.Module) -> list[torch.optim.Optimizer]:
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse]
    known = set(map(id, tables))
    others = [p for p in model.parameters() if id(p) not in known]
    found: list[torch.optim.Optimizer] = [torch.optim.Adam(others)]
    return [*found, torch.optim.SparseAdam(tables)] if tables else found


OPTIMIZERS = {"sgd": sgd, "adam": adam}
TITLES = {"sgd": "SGD", "adam": "Adam"}


def plain_step(model: nn.Module, batch: Batch, optimizers: list[torch.optim.Optimizer]) -> Step:
    inputs, labels = batch

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(*inputs), labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def clipped_step(model: nn.Module, batch: Batch, optimizers: list[torch.optim.Optimizer]) -> Step:
    clipper = PerSampleClipper(model, max_norm=0.1)
    inputs, labels = batch

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with clipper:
            clipper.backward(F.cross_entropy(model(*inputs), labels, reduction="none"))
        for optimizer in optimizers:
            optimizer.step()

    return step


def opacus_step(model: nn.Module, batch: Batch, ghost: bool) -> Step:
    """A step as Opacus' users write it, without noise."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    inputs, labels = batch
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "expected_batch_size": len(labels)}
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=0.1, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(base, **options)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    else:
        wrapped = GradSampleModule(model)
        optimizer = DPOptimizer(base, **options)
        criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(*inputs), labels).backward()
        optimizer.step()

    return step


def fastdp_step(model: nn.Module, batch: Batch) -> Step:
    """A step as fastDP's users write it, with noise of deviation 0, which it draws all the same."""
    from fastDP import PrivacyEngine

    inputs, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = PrivacyEngine(
            model,
            batch_size=len(labels),
            sample_size=1_000_000,
            epochs=1,
            noise_multiplier=0.0,
            max_grad_norm=0.1,
            clipping_mode="MixOpt",
            clipping_fn="Abadi",
        )
        engine.attach(optimizer)

    def step() -> None:
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PEERS: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "opacus hooks": lambda model, batch: opacus_step(model, batch, False),
    "opacus ghost": lambda model, batch: opacus_step(model, batch, True),
    "fastdp": fastdp_step,
}


# What a peer trains instead of the plain model.
PEER_MODELS: dict[str, Callable[[], nn.Module]] = {"encoder": lambda: Encoder(explicit=True)}


def too_large(label: str, model: nn.Module, batch: Batch) -> float:
    """GB of what a peer materialises for each sample, where that is above 8; else 0."""
    inputs, labels = batch
    rows = [len(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)]
    needed = 0
    if label == "opacus hooks":
        needed = 4 * len(labels) * sum(p.numel() for p in model.parameters())
    elif label == "fastdp" and rows:  # one-hot words in int64, then as floats
        needed = 12 * inputs[0].numel() * max(rows)
    return needed / 1e9 if needed > 8e9 else 0.0


def first_update(model: nn.Module, step: Step) -> Tensor:
    """What one step adds to all parameters, in one vector."""
    before = [p.detach().clone() for p in model.parameters()]
    step()
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    return torch.cat([m.flatten() for m in moved])


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Times per step of all ways in turns, after two rounds to warm up.

    A turn is some 20 ms of steps in a row, as in training: single steps in turns would pay for the
    memory that the step before them gave back or took.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        repeats[name] = max(1, math.ceil(0.02 / (time.perf_counter() - start)))
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < 5 or time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            if rounds > 1:
                times[name].append((time.perf_counter() - start) / repeats[name])
        rounds += 1
    return times


def peak(step: Step, held: list[Tensor]) -> int:
    """Bytes of live tensors during a step at most; held: those that live before and after it."""
    with LiveBytes(held) as live:
        step()
    return live.peak


def states(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """What optimisers keep between steps."""
    kept = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]


def run(name: str, optimizer: str, peers: list[str], seconds: float) -> dict[str, Any]:
    """Ratios, memory and updates of one model."""
    plain, clipped, make_batch, bound = MODELS[name]
    torch.manual_seed(0)
    batch = make_batch()

    def fresh(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(1)
        return make()

    models = {"plain": fresh(plain), "embattle": fresh(clipped)}
    optimizers = {label: OPTIMIZERS[optimizer](model) for label, model in models.items()}
    steps = {
        "plain": plain_step(models["plain"], batch, optimizers["plain"]),
        "embattle": clipped_step(models["embattle"], batch, optimizers["embattle"]),
    }
    update = first_update(models["embattle"], steps["embattle"])
    apart, absent = {}, {}
    for label in peers:
        model = fresh(PEER_MODELS.get(name, plain))
        size = too_large(label, model, batch)
        if size:
            absent[label] = f"{size:.0f} GB for single samples"
            continue
        try:
            steps[label] = PEERS[label](model, batch)
            found = first_update(model, steps[label])
            steps[label]()
        except Exception as error:
            steps.pop(label, None)
            absent[label] = f"{type(error).__name__}: {error}"[:160]
            continue
        models[label] = model
        apart[label] = float((found - update).norm() / update.norm())
    times = measure(steps, seconds)
    medians = {label: statistics.median(t) for label, t in times.items()}
    memory = {}
    for label, step in steps.items():
        own = [*models[label].parameters(), *models[label].buffers()]
        memory[label] = peak(step, [*own, *states(optimizers.get(label, [])), *batch[0], batch[1]])
    return {
        "model": name,
        "optimizer": optimizer,
        "plain_ms": 1000 * medians["plain"],
        "rounds": len(times["plain"]),
        "ratio": {label: m / medians["plain"] for label, m in medians.items()},
        "peak_mb": {label: m / 1e6 for label, m in memory.items()},
        "apart": apart,
        "absent": absent,
        "bound": bound,
    }


def markdown(record: dict[str, Any]) -> str:
    """The table, and what is left out of it."""
    lines = [
        "# Cost of per-sample clipping",
        "",
        f"{in_words(record['about'])}. Each cell: time over the plain step's (ratio of medians), "
        "peak memory over the plain step's. The goal for the time ratio is in brackets. `*`: the "
        "first update differs from ours by more than 1%.",
    ]
    for optimizer in OPTIMIZERS:
        results = [each for each in record["results"] if each["optimizer"] == optimizer]
        if results:
            lines += ["", f"## {TITLES[optimizer]}", "", *table(results)]
    return "\n".join(lines) + "\n"


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of one optimiser."""
    found = [label for result in results for label in (*result["ratio"], *result["absent"])]
    labels = ["embattle", *(label for label in PEERS if label in found)]
    heads = ["model", "plain, ms", "plain, MB", *labels]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    notes = []
    for result in results:
        memory = result["peak_mb"]
        cells = [result["model"], f"{result['plain_ms']:.2f}", f"{memory['plain']:.1f}"]
        for label in labels:
            if label not in result["ratio"]:
                cells.append("-")
                why = result["absent"].get(label, "not measured")
                notes.append(f"- {label}, {result['model']}: {why}")
                continue
            cell = f"{result['ratio'][label]:.2f}, {memory[label] / memory['plain']:.2f}"
            if label == "embattle":
                cell += f" [{result['bound']:.2f}]"
            if result["apart"].get(label, 0.0) > 0.01:
                cell += f" *{100 * result['apart'][label]:.0f}%"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    if notes:
        lines += ["", "Left out:", "", *notes]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--peers", action="store_true", help="Opacus as well")
    parser.add_argument("--fastdp", type=Path, help="a checkout of fastDP: measure it as well")
    parser.add_argument("--seconds", type=float, default=5.0, help="per model, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the dated JSON and Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*backward hook.*")
    if args.optimizer != "sgd" and (args.peers or args.fastdp):
        parser.error("--peers and --fastdp are for --optimizer sgd: the peers' steps are SGD's")
    peers = ["opacus hooks", "opacus ghost"] if args.peers else []
    if args.fastdp:
        sys.path.append(os.fspath(args.fastdp))
        peers.append("fastdp")
    results = []
    for name in args.models:
        result = run(name, args.optimizer, peers, args.seconds)
        results.append(result)
        shown = ", ".join(
            f"{label} {ratio:.2f} ({result['peak_mb'][label]:.1f} MB)"
            for label, ratio in result["ratio"].items()
        )
        print(f"{name}: plain {result['plain_ms']:.2f} ms; {shown}; bound {result['bound']}")
        for label, why in result["absent"].items():
            print(f"  {label} is left out: {why}")
    if args.out:
        about = origin(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"bench_clipping_{about['date']}.json"
        kept = json.loads(path.read_text())["results"] if path.exists() else []
        every = {(result["optimizer"], result["model"]): result for result in [*kept, *results]}
        keys = [(optimizer, name) for optimizer in OPTIMIZERS for name in MODELS]
        record = {"about": about, "results": [every[key] for key in keys if key in every]}
        path.write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(record))


if __name__ == "__main__":
    main()
