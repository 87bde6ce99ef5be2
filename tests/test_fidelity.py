"""Every method against an independent transcription of its paper's equations, in float64.

The transcriptions use torch alone. Random starts are drawn by the package's own op, from the same
seed: what follows the start is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import embattle as eb
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

CLOSE = {"atol": 1e-6, "rtol": 0.0}


class Problem:
    """A model and a batch, its loss as a function of deltas added to its embeddings."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind != "factors":
            self.model: nn.Module
            if kind == "encoder":
                self.model = toys.encoder()
                self.tokens, self.labels = toys.text_batch()
            else:
                self.model, self.tokens, self.labels = toys.sampled()
            self.mask = torch.ones_like(self.tokens, dtype=torch.bool)
            if kind == "encoder":
                self.mask = self.tokens != 0
            self.loss_fn: Callable[[], Any] = toys.classify(self.model, self.tokens, self.labels)
            self.sites = [eb.Site(self.model.embedding)]
            self.arguments: dict[str, Any] = {"mask": self.mask}
            self.base = [self.model.embedding(self.tokens).detach()]
        else:
            self.model = toys.factors()
            self.batch = toys.triplets()
            self.loss_fn = toys.rank(self.model, self.batch)
            self.sites = [eb.Site(self.model.user), eb.Site(self.model.item)]
            self.arguments = {}
            tables = (self.model.user, self.model.item, self.model.item)
            self.base = [t(i).detach() for t, i in zip(tables, self.batch, strict=True)]

    def zeros(self) -> list[Tensor]:
        return [torch.zeros_like(base) for base in self.base]

    def logits(self, delta: Tensor | None = None) -> Tensor:
        handle = self.model.embedding.register_forward_hook(
            lambda module, arguments, out: out if delta is None else out + delta
        )
        try:
            return self.model(self.tokens)
        finally:
            handle.remove()

    def losses(self, deltas: list[Tensor]) -> Tensor:
        if self.kind != "factors":
            return F.cross_entropy(self.logits(deltas[0]), self.labels, reduction="none")
        tables = (self.model.user, self.model.item, self.model.item)
        u, p, n = (
            table(i) + delta for table, i, delta in zip(tables, self.batch, deltas, strict=True)
        )
        return -F.logsigmoid((u * p).sum(1) - (u * n).sum(1))

    def gradients(
        self, deltas: list[Tensor], losses: Callable[[list[Tensor]], Tensor] | None = None
    ) -> list[Tensor]:
        leaves = [delta.detach().clone().requires_grad_() for delta in deltas]
        grads = torch.autograd.grad((losses or self.losses)(leaves).sum(), leaves)
        if self.kind != "factors":
            return [grad * self.mask.unsqueeze(-1) for grad in grads]
        return list(grads)

    def tables(self) -> tuple[list[nn.Embedding], list[list[Tensor]]]:
        """The tables behind the embeddings, and where each is looked up."""
        if self.kind != "factors":
            return [self.model.embedding], [[self.tokens]]
        users, positive, negative = self.batch
        return [self.model.user, self.model.item], [[users], [positive, negative]]

    def on_rows(self, tables: list[Tensor]) -> Tensor:
        """Losses under deltas of whole tables; masked occurrences stay where they are."""
        places = self.tables()[1]
        deltas = [t[one] for t, each in zip(tables, places, strict=True) for one in each]
        if "mask" in self.arguments:
            deltas = [delta * self.mask.unsqueeze(-1) for delta in deltas]
        return self.losses(deltas)

    def start(self, seed: int, draw: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        """Draw the start that an attack with a generator seeded with `seed` draws."""
        own = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(int(own))
        mask = self.arguments.get("mask")
        return [
            draw(torch.zeros_like(base), generator=generator, mask=mask, **options)
            for base in self.base
        ]


@pytest.fixture(params=["encoder", "factors"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.fixture(params=["encoder", "sampled"])
def text(request: pytest.FixtureRequest) -> Problem:
    """A problem whose loss function gives outputs: an encoder, or factors and a sampled softmax."""
    return Problem(request.param)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rowwise(x: Tensor, values: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 1))


def l2(x: Tensor) -> Tensor:
    return rowwise(x, x.flatten(1).norm(dim=1))


def ball(x: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return x.clamp(-eps, eps)
    return x * (eps / l2(x).clamp(min=eps))


def unit(g: Tensor, norm: str) -> Tensor:
    return g.sign() if norm == "linf" else g / l2(g).clamp(min=1e-300)


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, **CLOSE)


# --- attacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd(problem: Problem, norm: str) -> None:
    """Madry et al., eq. 3, from a random start."""
    attack = eb.PGD(
        norm=norm, eps=0.5, step_size=0.2, steps=4, random_start=True, generator=seeded()
    )
    got = attack.run(problem.loss_fn, problem.sites, **problem.arguments)
    deltas = problem.start(7, eb.ops.random_start, eps=0.5, norm=norm)
    for _ in range(4):
        grads = problem.gradients(deltas)
        deltas = [
            ball(d + 0.2 * unit(g, norm), 0.5, norm) for d, g in zip(deltas, grads, strict=True)
        ]
    assert_close(got.deltas, deltas)


@pytest.mark.parametrize("projection", ["ball", "box"])
def test_msap(problem: Problem, projection: str) -> None:
    """Steps of eps / 4 along g / ||g||_2 of each row, in its ball or (authors' code) in a box."""
    modules, places = problem.tables()
    sites = [eb.Site(module, scope="row") for module in modules]
    attack = eb.MSAP(eps=0.2, steps=6, projection=projection)
    got = attack.run(problem.loss_fn, sites, **problem.arguments)
    tables = [torch.zeros_like(module.weight) for module in modules]
    for _ in range(6):
        leaves = [table.requires_grad_() for table in tables]
        grads = torch.autograd.grad(problem.on_rows(leaves).sum(), leaves)
        moved = [t.detach() + 0.05 * unit(g, "l2") for t, g in zip(tables, grads, strict=True)]
        tables = [ball(t, 0.2, "l2" if projection == "ball" else "linf") for t in moved]
    seen = [torch.cat([one.flatten() for one in each]).unique() for each in places]
    if "mask" in problem.arguments:
        seen = [problem.tokens[problem.mask].unique()]
    assert_close(got.deltas, [table[rows] for table, rows in zip(tables, seen, strict=True)])
    longest = max(float(norms.max()) for norms in got.norms)
    assert (longest > 0.21) == (projection == "box")


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_mifgsm(problem: Problem, norm: str) -> None:
    """Dong et al., eq. 6-7."""
    got = eb.MIFGSM(norm=norm, eps=0.5, steps=5, decay=0.8).run(
        problem.loss_fn, problem.sites, **problem.arguments
    )
    deltas, velocities = problem.zeros(), problem.zeros()
    for _ in range(5):
        grads = problem.gradients(deltas)
        velocities = [
            0.8 * v + g / rowwise(g, g.flatten(1).abs().sum(1))
            for v, g in zip(velocities, grads, strict=True)
        ]
        deltas = [
            ball(d + 0.1 * unit(v, norm), 0.5, norm)
            for d, v in zip(deltas, velocities, strict=True)
        ]
    assert_close(got.deltas, deltas)


def apgd(problem: Problem, deltas: list[Tensor], eps: float, norm: str, steps: int) -> list[Tensor]:
    """Algorithm 1 of Croce and Hein, sample by sample where it decides."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    w = [math.ceil(round(p * steps, 9)) for p in shares]
    alpha, rho = 0.75, 0.75
    batch = deltas[0].shape[0]
    eta = torch.full((batch,), 2 * eps, dtype=torch.float64)

    def ascended(x: list[Tensor], at: list[Tensor]) -> list[Tensor]:
        return [
            ball(d + rowwise(d, eta) * unit(g, norm), eps, norm)
            for d, g in zip(x, problem.gradients(at), strict=True)
        ]

    x = [[d.clone() for d in deltas]]
    f = [problem.losses(x[0]).detach()]
    x.append(ascended(x[0], x[0]))
    f.append(problem.losses(x[1]).detach())
    f_max = torch.maximum(f[0], f[1])
    x_max = [torch.where(rowwise(b, f[0] >= f[1]), a, b) for a, b in zip(x[0], x[1], strict=True)]
    f_max_at = {0: f[0].clone()}
    eta_at = {0: eta.clone()}
    for k in range(1, steps):
        z = ascended(x[k], x[k])
        new = [
            ball(now + alpha * (step - now) + (1 - alpha) * (now - old), eps, norm)
            for now, old, step in zip(x[k], x[k - 1], z, strict=True)
        ]
        value = problem.losses(new).detach()
        higher = value > f_max
        f_max = torch.where(higher, value, f_max)
        x_max = [torch.where(rowwise(n, higher), n, old) for n, old in zip(new, x_max, strict=True)]
        x.append(new)
        f.append(value)
        if k in w[1:]:
            j = w.index(k)
            eta_at[k] = eta.clone()  # the step size of this iteration
            for b in range(batch):
                ups = sum(bool(f[i + 1][b] > f[i][b]) for i in range(w[j - 1], w[j]))
                few = ups < rho * (w[j] - w[j - 1])
                same_eta = eta_at[w[j - 1]][b] == eta_at[k][b]
                stuck = bool(same_eta and f_max_at[w[j - 1]][b] == f_max[b])
                if few or stuck:
                    eta[b] = eta[b] / 2
                    for block, best in zip(x[k + 1], x_max, strict=True):
                        block[b] = best[b]
                    f[k + 1][b] = f_max[b]
            f_max_at[k] = f_max.clone()
    return x_max


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [7, 20])
def test_apgd(problem: Problem, norm: str, steps: int) -> None:
    got = eb.APGD(norm=norm, eps=2.0, steps=steps, generator=seeded()).run(
        problem.loss_fn, problem.sites, **problem.arguments
    )
    start = problem.start(7, eb.ops.random_start, eps=2.0, norm=norm)
    expected = apgd(problem, start, 2.0, norm, steps)
    assert torch.allclose(got.losses, problem.losses(expected), **CLOSE)
    assert_close(got.deltas, expected)


class Bowl:
    """Losses that fall around a target, where steps overshoot and the checkpoints decide much."""

    def __init__(self, far: float) -> None:
        torch.manual_seed(0)
        self.target = far * torch.randn(8, 3, dtype=torch.float64)
        self.module, self.base = nn.Identity(), torch.zeros_like(self.target)
        self.steep = torch.tensor([1.0, 5.0, 25.0], dtype=torch.float64)

    def losses(self, deltas: list[Tensor]) -> Tensor:
        return -(self.steep * (deltas[0] - self.target).square()).sum(1)

    def gradients(self, deltas: list[Tensor]) -> list[Tensor]:
        return [-2 * self.steep * (deltas[0] - self.target)]

    def loss_fn(self) -> Tensor:
        return self.losses([self.module(self.base)])


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("far", [0.3, 5.0])
def test_apgd_where_steps_overshoot(norm: str, far: float) -> None:
    """In the ball, and on its border."""
    bowl = Bowl(far)
    attack = eb.APGD(norm=norm, eps=2.0, steps=40, generator=seeded())  # type: ignore[arg-type]
    got = attack.run(bowl.loss_fn, eb.Site(bowl.module))
    own = torch.randint(2**62, (), generator=seeded())  # as `Problem.start`
    start = eb.ops.random_start(bowl.base, eps=2.0, norm=norm, generator=seeded(int(own)))
    assert_close(got.deltas, apgd(bowl, [start], 2.0, norm, 40))  # type: ignore[arg-type]


def test_apgd_checkpoints() -> None:
    from embattle.attacks.momentum import code_checkpoints, paper_checkpoints

    assert paper_checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    # Theirs, by hand: 22, then 3 shorter each time, at least 6.
    assert code_checkpoints(100) == {
        21: 22, 40: 19, 56: 16, 69: 13, 79: 10, 86: 7, 92: 6, 98: 6,
    }  # fmt: skip


def test_apgd_dlr(text: Problem) -> None:
    """Eq. 6 is what is ascended, and what decides."""
    got = eb.APGD(eps=1.0, steps=7, generator=seeded()).run(
        text.loss_fn,
        text.sites,
        criterion=eb.Misclassify(text.labels, ascend="dlr"),
        **text.arguments,
    )

    def dlr(deltas: list[Tensor]) -> Tensor:
        z = text.logits(deltas[0])
        ordered = z.sort(dim=1, descending=True).values
        right = z[range(6), text.labels]
        others = torch.where(F.one_hot(text.labels, 3).bool(), -math.inf, z).amax(1)
        return -(right - others) / (ordered[:, 0] - ordered[:, 2])

    other = Problem(text.kind)
    other.losses = dlr  # type: ignore[method-assign]
    start = text.start(7, eb.ops.random_start, eps=1.0)
    expected = dlr(apgd(other, start, 1.0, "l2", 7))
    fooled = text.logits(got.deltas[0]).argmax(1) != text.labels
    unfooled = ~fooled
    assert torch.allclose(dlr(got.deltas)[unfooled], expected[unfooled], **CLOSE)
    assert torch.equal(fooled, expected > 0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("iterations", [1, 3])
def test_vat_direction(text: Problem, iterations: int) -> None:
    """Miyato et al., eq. 5-8: d <- g / ||g|| at xi * d, then eps * d."""
    attack = eb.VAT(eps=0.8, xi=0.1, steps=iterations, generator=seeded())
    got = attack.run(text.loss_fn, text.sites, **text.arguments)
    clean = text.logits().detach()
    (d,) = text.start(7, eb.ops.gaussian_noise, std=1.0)
    for _ in range(iterations):
        d = d / l2(d)
        (d,) = text.gradients([0.1 * d], lambda x: kl(clean, text.logits(x[0])))
    assert torch.allclose(got.deltas[0], 0.8 * d / l2(d), **CLOSE)


@pytest.mark.parametrize("projection", ["paper", "code"])
def test_smart_step(text: Problem, projection: str) -> None:
    attack = eb.SMARTStep(
        eps=0.05, step_size=2.0, sigma=0.02, steps=2, projection=projection, generator=seeded()
    )
    got = attack.run(text.loss_fn, text.sites, **text.arguments)
    clean = text.logits().detach()
    (d,) = text.start(7, eb.ops.gaussian_noise, std=0.02)

    def divergence(x: list[Tensor]) -> Tensor:
        z = text.logits(x[0])
        return kl(clean, z) + kl(z, clean)

    for _ in range(2):
        (g,) = text.gradients([d], divergence)
        d = d + 2.0 * g
        if projection == "paper":
            d = d.clamp(-0.05, 0.05)
        else:
            d = torch.where(text.mask.unsqueeze(-1), d / d.abs().amax(-1, keepdim=True), 0.0)
    assert torch.allclose(got.deltas[0], d, **CLOSE)


# --- objectives ----------------------------------------------------------------------------------


def check(
    problem: Problem,
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    expected: Callable[[], Tensor],
) -> None:
    """Compare loss and weight gradients."""
    model = problem.model
    model.zero_grad()
    goal = None if problem.kind == "factors" else eb.Misclassify(problem.labels)
    loss, _ = objective(problem.loss_fn, criterion=goal, **problem.arguments)
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = expected()
    wanted.backward()
    assert torch.allclose(loss, wanted, **CLOSE)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(got[name], p.grad, **CLOSE), name


def test_trades(text: Problem) -> None:
    """Zhang et al., eq. 5, and the authors' start of 0.001 * N(0, 1)."""
    attack = eb.PGD(
        norm="linf",
        eps=0.3,
        step_size=0.1,
        steps=3,
        random_start=eb.GaussianStart(0.001),
        generator=seeded(),
    )
    objective = eb.AdversarialObjective(attack, text.sites, form="trades", lam=6.0)

    def expected() -> Tensor:
        (d,) = text.start(7, eb.ops.gaussian_noise, std=0.001)
        fixed = text.logits().detach()
        for _ in range(3):
            (g,) = text.gradients([d], lambda x: kl(fixed, text.logits(x[0])))
            d = (d + 0.1 * g.sign()).clamp(-0.3, 0.3)
        natural, moved = text.logits(), text.logits(d)
        return F.cross_entropy(natural, text.labels) + 6.0 * kl(natural, moved).mean()

    check(text, objective, expected)


def pgd(text: Problem, eps: float, size: float, steps: int) -> Tensor:
    (d,) = text.zeros()
    for _ in range(steps):
        (g,) = text.gradients([d])
        d = ball(d + size * g / l2(g), eps, "l2")
    return d


def test_mart(text: Problem) -> None:
    """Wang et al., eq. 8: BCE(p', y) + lam * KL(p || p') * (1 - p_y)."""
    attack = eb.PGD(eps=0.6, step_size=0.3, steps=3)
    objective = eb.AdversarialObjective(attack, text.sites, form="mart", lam=5.0)

    def expected() -> Tensor:
        d = pgd(text, 0.6, 0.3, 3)
        p, q = text.logits().softmax(1), text.logits(d).softmax(1)
        total = 0.0
        for b, y in enumerate(text.labels.tolist()):
            wrong = max(q[b, k] for k in range(3) if k != y)
            bce = -q[b, y].log() - (1 - wrong).log()
            total = total + bce + 5.0 * (p[b] * (p[b] / q[b]).log()).sum() * (1 - p[b, y])
        return total / 6

    check(text, objective, expected)


def test_alp(text: Problem) -> None:
    """Kannan et al., eq. 2, on mixed batches."""
    attack = eb.PGD(eps=0.6, step_size=0.3, steps=3)
    objective = eb.AdversarialObjective(attack, text.sites, form="alp", lam=0.5)

    def expected() -> Tensor:
        d = pgd(text, 0.6, 0.3, 3)
        clean, moved = text.logits(), text.logits(d)
        both = torch.cat([clean, moved])
        labels = torch.cat([text.labels, text.labels])
        return F.cross_entropy(both, labels) + 0.5 * F.mse_loss(clean, moved)

    check(text, objective, expected)


def test_vat(text: Problem) -> None:
    """Miyato et al., eq. 8: the clean prediction is a constant."""
    attack = eb.VAT(eps=0.8, generator=seeded())
    objective = eb.AdversarialObjective(attack, text.sites, form="vat", lam=2.0)

    def expected() -> Tensor:
        clean = text.logits().detach()
        (d,) = text.start(7, eb.ops.gaussian_noise, std=1.0)
        (g,) = text.gradients([0.1 * d / l2(d)], lambda x: kl(clean, text.logits(x[0])))
        r = 0.8 * g / l2(g)
        return F.cross_entropy(text.logits(), text.labels) + 2.0 * kl(clean, text.logits(r)).mean()

    check(text, objective, expected)


def test_smart_with_bregman(text: Problem) -> None:
    """Jiang et al., eq. 1-5, over three optimiser steps."""
    bregman = eb.Bregman(text.model, weight=0.7, momentum=0.9)
    attack = eb.SMARTStep(eps=0.05, step_size=2.0, sigma=0.02, generator=seeded())
    objective = eb.AdversarialObjective(attack, text.sites, form=eb.Smart(bregman=bregman), lam=3.0)
    starts = torch.Generator().manual_seed(7)
    old = {n: p.detach().clone() for n, p in text.model.named_parameters()}
    optimizer = torch.optim.SGD(text.model.parameters(), lr=0.5)

    def symmetric(p: Tensor, q: Tensor) -> Tensor:
        return kl(p, q) + kl(q, p)

    for _ in range(3):
        own = torch.randint(2**62, (), generator=starts)

        def expected(own: Tensor = own) -> Tensor:
            generator = torch.Generator().manual_seed(int(own))
            d = eb.ops.gaussian_noise(
                torch.zeros_like(text.base[0]), std=0.02, mask=text.mask, generator=generator
            )
            fixed = text.logits().detach()
            (g,) = text.gradients([d], lambda x: symmetric(fixed, text.logits(x[0])))
            d = (d + 2.0 * g).clamp(-0.05, 0.05)
            clean = text.logits()
            now = {n: p.detach().clone() for n, p in text.model.named_parameters()}
            with torch.no_grad():
                for n, p in text.model.named_parameters():
                    p.copy_(old[n])
                before = text.logits()
                for n, p in text.model.named_parameters():
                    p.copy_(now[n])
                for n in old:
                    old[n] = 0.9 * old[n] + 0.1 * now[n]
            clean = text.logits()
            return (
                F.cross_entropy(clean, text.labels)
                + 3.0 * symmetric(clean, text.logits(d)).mean()
                + 0.7 * symmetric(clean, before).mean()
            )

        check(text, objective, expected)
        optimizer.step()


def test_r3f(text: Problem) -> None:
    """Aghajanyan et al., eq. 4."""
    noise = eb.UniformNoise(norm="linf", eps=0.1, generator=seeded())
    objective = eb.AdversarialObjective(noise, text.sites, form="r3f", lam=0.7)

    def expected() -> Tensor:
        (z,) = text.start(7, eb.ops.random_start, eps=0.1, norm="linf")
        clean, moved = text.logits(), text.logits(z)
        return (
            F.cross_entropy(clean, text.labels) + 0.7 * (kl(clean, moved) + kl(moved, clean)).mean()
        )

    check(text, objective, expected)


@pytest.mark.parametrize("scope", ["output", "joint"])
def test_freelb(problem: Problem, scope: str) -> None:
    """Zhu et al., algorithm 1: K passes, weight gradients averaged over delta_0 .. delta_{K-1}."""
    joint = scope == "joint"
    attack = eb.PGD(eps=0.6, step_size=0.3, steps=3)
    objective = eb.AdversarialObjective(attack, problem.sites, form="free")
    problem.arguments = problem.arguments | {"joint": joint}

    def expected() -> Tensor:
        deltas, total = problem.zeros(), 0.0
        for _ in range(3):
            total = total + problem.losses([d.detach() for d in deltas]).mean() / 3
            grads = problem.gradients(deltas)
            if joint:
                norm = torch.cat([g.flatten(1) for g in grads], 1).norm(dim=1)
                norms = [rowwise(g, norm) for g in grads]
            else:
                norms = [l2(g) for g in grads]
            deltas = [d + 0.3 * g / n for d, g, n in zip(deltas, grads, norms, strict=True)]
            if joint:
                size = torch.cat([d.flatten(1) for d in deltas], 1).norm(dim=1)
                deltas = [d * rowwise(d, 0.6 / size.clamp(min=0.6)) for d in deltas]
            else:
                deltas = [ball(d, 0.6, "l2") for d in deltas]
        return total

    check(problem, objective, expected)


@pytest.mark.parametrize("eps", [0.6, math.inf])
def test_freelb_starts_uniformly_in_its_box(text: Problem, eps: float) -> None:
    """The paper's start and ball; or the code's: a magnitude of its own, and no ball."""
    attack = eb.PGD(
        eps=eps,
        step_size=0.5,
        steps=2,
        random_start=eb.BoxStart(eb.PerDim(0.6)),
        generator=seeded(),
    )
    passes = 0
    plain = text.loss_fn

    def counted() -> Any:
        nonlocal passes
        passes += 1
        return plain()

    text.loss_fn = counted
    objective = eb.AdversarialObjective(attack, text.sites, form="free")

    def expected() -> Tensor:
        assert passes == 2
        size = 0.6 / (text.mask.sum(1).double() * 8).sqrt()
        (d,) = text.start(7, eb.ops.random_start, eps=size, norm="linf")
        first = text.losses([d]).mean()
        (g,) = text.gradients([d])
        moved = d + 0.5 * g / l2(g)
        if math.isfinite(eps):
            assert (l2(moved) > eps).any()
            moved = ball(moved, eps, "l2")
        return (first + text.losses([moved]).mean()) / 2

    check(text, objective, expected)


@pytest.mark.parametrize("kind", ["rows", "parameters"])
def test_freelb_on_tables(kind: str) -> None:
    """The passes that move the deltas train the tables too."""
    problem = Problem("factors")
    tables = (problem.model.user, problem.model.item)
    sites = [
        eb.Site(table, scope="row") if kind == "rows" else eb.Site.weight(table) for table in tables
    ]
    attack = eb.PGD(eps=0.6, step_size=0.3, steps=2)
    objective = eb.AdversarialObjective(attack, sites, form="free")
    users, positive, negative = problem.batch

    def expected() -> Tensor:
        u, i = (torch.zeros_like(t.weight) for t in (problem.model.user, problem.model.item))
        first = problem.losses([u[users], i[positive], i[negative]]).mean()
        u.requires_grad_()
        i.requires_grad_()
        loss = problem.losses([u[users], i[positive], i[negative]]).sum()
        gu, gi = torch.autograd.grad(loss, [u, i])
        u, i = (0.3 * g / g.norm(dim=1, keepdim=True).clamp(min=1e-300) for g in (gu, gi))
        return (first + problem.losses([u[users], i[positive], i[negative]]).mean()) / 2

    check(problem, objective, expected)


def test_free_adversarial_training(text: Problem) -> None:
    """Shafahi et al., algorithm 1: the delta lives on from replay to replay."""
    attack = eb.FGSM(eps=0.05)
    objective = eb.AdversarialObjective(attack, text.sites, form="freeat")
    kept = text.zeros()
    optimizer = torch.optim.SGD(text.model.parameters(), lr=0.3)
    for _ in range(3):

        def expected() -> Tensor:
            loss = text.losses([kept[0].clone()]).mean()
            (g,) = text.gradients(kept)
            kept[0] = (kept[0] + 0.05 * g.sign()).clamp(-0.05, 0.05)
            return loss

        check(text, objective, expected)
        optimizer.step()
    assert torch.all(kept[0][text.mask].abs().amax(1) > 0)


@pytest.mark.parametrize("rows", ["batch", "table"])
def test_apr(problem: Problem, rows: str) -> None:
    """He et al., eq. 7-9; rows="table" is their code, with deltas for rows outside the batch."""
    modules, _ = problem.tables()
    sites = [eb.Site(module, scope="row", rows=rows) for module in modules]
    objective = eb.AdversarialObjective(eb.FGM(eps=0.5), sites, form="apr", lam=1.0)

    def expected() -> Tensor:
        leaves = [torch.zeros_like(module.weight).requires_grad_() for module in modules]
        grads = torch.autograd.grad(problem.on_rows(leaves).sum(), leaves)
        tables = [0.5 * g / g.norm(dim=1, keepdim=True).clamp(min=1e-300) for g in grads]
        return problem.losses(problem.zeros()).mean() + problem.on_rows(tables).mean()

    check(problem, objective, expected)
    with pytest.raises(ValueError, match="scope='row'"):
        eb.AdversarialObjective(eb.FGM(eps=0.5), problem.sites, form="apr")(problem.loss_fn)


@pytest.mark.parametrize("form", ["adversarial", "trades"])
def test_awp(text: Problem, form: str) -> None:
    """Wu et al., eq. 7-11: v = gamma * ||w|| * g / ||g|| per layer, deltas found at w."""
    attack = eb.PGD(
        eps=0.6,
        step_size=0.3,
        steps=2,
        random_start=eb.GaussianStart(0.01) if form == "trades" else False,
        generator=seeded(),
    )
    lam = 2.0 if form == "trades" else 1.0
    inner = eb.AdversarialObjective(attack, text.sites, form=form, lam=lam)
    objective = eb.AWP(inner, text.model, gamma=0.05)
    before = {n: p.detach().clone() for n, p in text.model.named_parameters()}

    def expected() -> Tensor:
        if form == "trades":
            (d,) = text.start(7, eb.ops.gaussian_noise, std=0.01)
            fixed = text.logits().detach()
            for _ in range(2):
                (g,) = text.gradients([d], lambda x: kl(fixed, text.logits(x[0])))
                d = ball(d + 0.3 * g / l2(g), 0.6, "l2")
        else:
            d = pgd(text, 0.6, 0.3, 2)

        def loss() -> Tensor:
            if form == "adversarial":
                return text.losses([d]).mean()
            clean = text.logits()
            return F.cross_entropy(clean, text.labels) + lam * kl(clean, text.logits(d)).mean()

        weights = [p for p in text.model.parameters() if p.dim() > 1]
        grads = torch.autograd.grad(loss(), weights)
        shifts = [0.05 * w.norm() * g / g.norm() for w, g in zip(weights, grads, strict=True)]
        with torch.no_grad():
            for w, v in zip(weights, shifts, strict=True):
                w += v
        at = loss()
        found = torch.autograd.grad(at, list(text.model.parameters()))
        with torch.no_grad():
            for n, p in text.model.named_parameters():
                assert not torch.equal(p, before[n]) or p.dim() == 1
                p.copy_(before[n])
        # A surrogate whose value and gradients are those at w + v.
        total = sum((p * g).sum() for p, g in zip(text.model.parameters(), found, strict=True))
        return total - total.detach() + at.detach()

    check(text, objective, expected)
    for n, p in text.model.named_parameters():
        assert torch.equal(p, before[n])
