"""How strong `AutoAttack` and `FMN` are beside torchattacks and adversarial-lib, at equal budgets.

    pip install torchattacks==3.5.1 adv-lib==0.2.8 scikit-learn tqdm requests scipy
    python benchmarks/autoattack_peers.py --out benchmarks/results

400 digits of scikit-learn in [0, 1], three small nets. AutoAttack: how many samples stand, lower is
stronger, at the same steps and queries, with the passes of samples that each made. Minimum norm:
the median over all samples of the smallest norm found with the same number of backward passes,
lower is stronger; samples that never fell count as infinite (null: more than half).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
import types
from pathlib import Path
from typing import Any

import embattle as eb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, QUERIES = (10, 100), 1000


class Net(nn.Module):
    """An MLP or a small convolutional net on 8 x 8 pixels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.input = nn.Identity()
        self.layers = (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
            if kind == "mlp"
            else nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(256, 10),
            )
        )
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return self.layers(self.input(x))


def trained(kind: str, x: Tensor, labels: Tensor, eps: float) -> Net:
    """Train a net, on PGD's worst digits where eps is above 0."""
    torch.manual_seed(0)
    net = Net(kind)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(60):
        for rows in torch.randperm(len(x)).split(128):
            batch, delta = x[rows], torch.zeros_like(x[rows])
            for _ in range(5 if eps else 0):
                delta.requires_grad_()
                loss = F.cross_entropy(net(batch + delta), labels[rows])
                (grad,) = torch.autograd.grad(loss, delta)
                delta = (delta.detach() + eps / 3 * grad.sign()).clamp(-eps, eps)
            optimizer.zero_grad()
            F.cross_entropy(net(batch + delta), labels[rows]).backward()
            optimizer.step()
    net.passes = 0
    return net.eval().requires_grad_(False)


def counted(net: Net, labels: Tensor, run: Any) -> dict[str, Any]:
    """Run an attack; count who stands, passes and seconds."""
    net.passes, start = 0, time.perf_counter()
    moved = run()
    seconds, passes = time.perf_counter() - start, net.passes
    with torch.no_grad():
        standing = int((net(moved).argmax(1) == labels).sum())
    return {"standing": standing, "sample_passes": passes, "seconds": round(seconds, 2)}


def ours(net: Net, x: Tensor, labels: Tensor, norm: str, eps: float, steps: int) -> Tensor:
    attack = eb.AutoAttack(
        norm=norm, eps=eps, steps=steps, queries=QUERIES, lower=0.0, upper=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with eb.Site(net.input, model=net) as site:
        result = attack.run(
            lambda: eb.Evaluation(None, net(x)),
            site,
            criterion=eb.Misclassify(labels),
            subset=lambda rows: lambda: eb.Evaluation(None, net(x[rows])),
        )
    return x + result.delta


def theirs(net: Net, x: Tensor, labels: Tensor, norm: str, eps: float, steps: int) -> Tensor:
    import torchattacks

    attack = torchattacks.AutoAttack(net, norm=norm.capitalize(), eps=eps, seed=0)
    for part in attack._autoattack.attacks:
        if hasattr(part, "n_queries"):
            part.n_queries = QUERIES
        else:
            part.steps = steps
    return attack(x, labels)


def adversarial_lib() -> tuple[Any, Any]:
    """Import two attacks without their siblings, which need torchvision and visdom."""
    import adv_lib

    package = types.ModuleType("adv_lib.attacks")
    package.__path__ = [f"{adv_lib.__path__[0]}/attacks"]
    logger = types.ModuleType("adv_lib.utils.visdom_logger")
    logger.VisdomLogger = None  # type: ignore[attr-defined]
    sys.modules |= {package.__name__: package, logger.__name__: logger}
    from adv_lib.attacks.decoupled_direction_norm import ddn
    from adv_lib.attacks.fast_minimum_norm import fmn

    return fmn, ddn


def smallest(net: Net, x: Tensor, labels: Tensor, moved: Tensor, order: float) -> dict[str, Any]:
    """Norms of what was found, where it succeeds."""
    norms = (moved - x).flatten(1).norm(p=order, dim=1)
    fell = net(moved).argmax(1) != labels
    norms = torch.where(fell, norms, torch.full_like(norms, math.inf))
    median = norms.median().item()
    return {"median": round(median, 4) if math.isfinite(median) else None, "fell": int(fell.sum())}


def minimum(net: Net, x: Tensor, labels: Tensor, norm: str) -> dict[str, Any]:
    order = {"l2": 2.0, "linf": math.inf, "l1": 1.0}[norm]
    fmn, ddn = adversarial_lib()
    with eb.Site(net.input, model=net) as site:
        result = eb.FMN(norm=norm, steps=100, lower=0.0, upper=1.0).run(
            lambda: eb.Evaluation(None, net(x)), site, criterion=eb.Misclassify(labels)
        )
    key = 2 if norm == "l2" else order
    found = {"embattle": x + result.delta, "adv-lib FMN": fmn(net, x, labels, key, steps=100)}
    if norm == "l2":
        found["adv-lib DDN"] = ddn(net, x, labels, steps=100, levels=None)
    return {name: smallest(net, x, labels, moved, order) for name, moved in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    digits = load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.data))
    x = torch.tensor(digits.data / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    labels = torch.tensor(digits.target)[order]
    nets = {
        "MLP": (trained("mlp", x[:1200], labels[:1200], 0.0), 0.1),
        "conv": (trained("conv", x[:1200], labels[:1200], 0.0), 0.1),
        "conv, PGD-trained": (trained("conv", x[:1200], labels[:1200], 0.1), 0.15),
    }
    x, labels = x[1200:1600], labels[1200:1600]
    rows: list[dict[str, Any]] = []
    for name, (net, eps) in nets.items():
        for norm, size in (("linf", eps), ("l2", 5 * eps)):
            for steps in STEPS:
                row = {"net": name, "norm": norm, "eps": size, "steps": steps}
                for who, attack in (("embattle", ours), ("torchattacks", theirs)):
                    args = (net, x, labels, norm, size, steps)
                    row[who] = counted(net, labels, lambda: attack(*args))  # noqa: B023
                rows.append(row)
                print(json.dumps(row), flush=True)
    norms = [
        {"net": name, "norm": norm, "steps": 100} | minimum(net, x, labels, norm)
        for name, (net, _) in nets.items()
        for norm in ("l2", "linf", "l1")
    ]
    print(json.dumps(norms, indent=1))
    if out is not None:
        date = datetime.date.today().isoformat()
        record = {
            "date": date, "torch": torch.__version__, "python": platform.python_version(),
            "cpu": platform.processor() or platform.machine(), "queries": QUERIES,
            "autoattack": rows, "minimum_norm": norms,
        }  # fmt: skip
        (out / f"autoattack_peers_{date}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
