"""Randomised smoothing at a site: the class that a classifier mostly gives under Gaussian noise.

Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019.
Noise `N(0, sigma^2)` is added to every element of the embeddings that a site's modules return and
that may move. Let `p` be the probability of a class under it, and `p > 1/2`. Then the smoothed
classifier, which answers the most probable class, gives that class for every perturbation of those
embeddings whose l2 norm **over the whole sample** (all its vectors as one) is below

    R = sigma * Phi^-1(p)

(their theorem 1 with the runner-up at 1 - p). `p` is not known; its Clopper-Pearson lower bound at
level `alpha` from n draws stands in for it, so that each sample's certificate fails with a
probability of at most `alpha`. The class to certify is chosen by n0 draws of their own.

What is certified is the smoothed classifier, which is another one than the classifier: predictions
have to be made by `smoothed_predictions`. It is of the embeddings; words that are replaced or left
out move them further than most radii reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embattle import checks, losses
from embattle.data.batch import Batch
from embattle.errors import need
from embattle.perturb.outputs import Part, parts_of, replace_parts
from embattle.perturb.site import Site, as_sites
from embattle.tasks.evaluator import Evaluator

#: What a smoothed classifier answers where it does not know.
ABSTAIN = -1


@dataclass(frozen=True)
class Smoothed:
    """A classifier under noise at its sites.

    Attributes:
        model: the classifier, in evaluation mode; its outputs are logits `[B, C]`, or `[B]` of two
            classes.
        sites: where noise is added: what modules return, with samples first.
        sigma: standard deviation of the noise, in the embeddings' unit.
        evaluator: runs the model; None calls it as `model(**batch.inputs)`.
        batch_size: noisy copies that are run at once.
    """

    model: nn.Module
    sites: Site | Sequence[Site]
    sigma: float
    evaluator: Evaluator | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not checks.real("Smoothed", "sigma", self.sigma, 0) > 0:
            raise ValueError("Smoothed: sigma must be above 0: without noise nothing is certified")
        checks.integer("Smoothed", "batch_size", self.batch_size, 1)
        if any(site.scope != "output" for site in as_sites(self.sites)):
            raise ValueError(
                "Smoothed: a site must be what modules return (scope 'output'): rows of tables are "
                "shared by samples, whose noise has to be independent"
            )
        if self.model.training:
            raise ValueError("Smoothed: the model is in training mode; call model.eval() before")

    def counts(self, batch: Batch, n: int, generator: torch.Generator) -> Tensor:
        """Count the classes of n noisy copies of each sample, `[B, C]` int64.

        The same generator state, batch and batch size give the same counts.
        """
        n = checks.integer("Smoothed.counts", "n", n, 1)
        device = next(self.model.parameters()).device
        copies = torch.arange(len(batch)).repeat_interleave(n)
        found: list[Tensor] = []
        evaluator = self.evaluator or Evaluator()
        for rows in torch.split(copies, self.batch_size):
            some = batch.take(rows).to(device)
            with torch.no_grad(), self._noise(some, generator):
                outputs = evaluator.evaluate(self.model, some).outputs
            if outputs is None or outputs.dim() not in (1, 2):
                raise ValueError("Smoothed: the model must give logits [B, C] or [B]")
            # Outputs that are no numbers vote for no class.
            voted = losses.one_hot(losses.predict(outputs), losses.classes(outputs))
            found.append(voted.long().cpu())
        votes = torch.cat(found)
        return votes.reshape(len(batch), n, -1).sum(1)

    @contextmanager
    def _noise(self, batch: Batch, generator: torch.Generator) -> Iterator[None]:
        movable = batch.movable
        noisy = 0

        def add(part: Part) -> Tensor:
            base = part.value
            if part.offsets is not None or len(base) != len(batch):
                raise ValueError(
                    f"Smoothed: embeddings must have the batch's {len(batch)} samples first, got "
                    f"{tuple(base.shape)}"
                )
            noise = self.sigma * torch.randn(base.shape, generator=generator, device="cpu")
            noise = noise.to(base)
            if movable is not None:
                if movable.shape != base.shape[:-1]:
                    raise ValueError(
                        f"Smoothed: movable is {tuple(movable.shape)}, the embeddings "
                        f"{tuple(base.shape)}"
                    )
                noise = noise * movable[..., None]
            return base + noise

        with ExitStack() as stack:
            for site in as_sites(self.sites):
                for module in site.modules:

                    def hook(m: nn.Module, args: object, output: Any, key: Any = site.key) -> Any:
                        nonlocal noisy
                        noisy += 1
                        return replace_parts(output, {p.key: add(p) for p in parts_of(output, key)})

                    stack.callback(module.register_forward_hook(hook).remove)
            yield
        if not noisy:
            raise ValueError("Smoothed: the model ran without the sites' modules; name others")


@dataclass(frozen=True)
class Radii:
    """Certificates of B samples.

    Attributes:
        classes: `[B]` int64, the smoothed classifier's, `ABSTAIN` where the draws do not tell.
        radii: `[B]` float64, within which it stays; 0 where it abstains.
    """

    classes: Tensor
    radii: Tensor

    def accuracy(self, labels: Tensor, radius: float) -> float:
        """Give the share of samples that are right and certified to at least `radius`.

        A certificate holds for perturbations shorter than its radius.
        """
        right = (self.classes == labels.cpu()) & (self.radii >= radius)
        right &= self.classes != ABSTAIN
        return float(right.double().mean())


def certified_radii(
    smoothed: Smoothed,
    batch: Batch,
    *,
    n: int = 1000,
    n0: int = 100,
    alpha: float = 0.001,
    generator: torch.Generator,
) -> Radii:
    """Certify samples: CERTIFY of Cohen et al., for each of a batch.

    Args:
        smoothed: the classifier under noise.
        batch: B samples.
        n: draws by which a radius is found; the largest is `sigma * Phi^-1(alpha^(1/n))`.
        n0: draws by which the class is chosen.
        alpha: probability, for each sample, that its certificate is wrong.
        generator: of the draws, on the CPU.

    Raises:
        InputError: scipy is not installed.
        ValueError: arguments out of range.
    """
    _check_alpha("certified_radii", alpha)
    chosen = smoothed.counts(batch, n0, generator).argmax(1)
    hits = smoothed.counts(batch, n, generator).gather(1, chosen[:, None]).squeeze(1)
    lower = lower_confidence(hits, n, alpha)
    radii = smoothed.sigma * torch.special.ndtri(lower)
    sure = lower > 0.5
    return Radii(torch.where(sure, chosen, ABSTAIN), torch.where(sure, radii, 0.0))


def smoothed_predictions(
    smoothed: Smoothed,
    batch: Batch,
    *,
    n: int = 1000,
    alpha: float = 0.001,
    generator: torch.Generator,
) -> Tensor:
    """Give the smoothed classifier's classes `[B]`, `ABSTAIN` where the draws do not tell.

    PREDICT of Cohen et al.: the most frequent class, if a binomial test tells it from the second at
    level `alpha`.

    Args:
        smoothed, batch, n, alpha, generator: see `certified_radii`.
    """
    _check_alpha("smoothed_predictions", alpha)
    binomtest = need("scipy.stats", "certify").binomtest
    best = smoothed.counts(batch, n, generator).topk(2, dim=1)
    pairs = best.values.tolist()
    sure = [bool(one) and binomtest(one, one + two, 0.5).pvalue <= alpha for one, two in pairs]
    return torch.where(torch.tensor(sure), best.indices[:, 0], ABSTAIN)


def lower_confidence(hits: Tensor, n: int | Tensor, alpha: float) -> Tensor:
    """Give the one-sided Clopper-Pearson lower bounds of probabilities, float64.

    Each is above its probability with a chance of at most `alpha`.

    Args:
        hits: int64, of n independent draws.
        n: draws, of all or of each.
        alpha: that chance.
    """
    beta = need("scipy.stats", "certify").beta
    k, draws = hits.double().numpy(), torch.as_tensor(n).double().numpy()
    found = torch.from_numpy(np.asarray(beta.ppf(alpha, k, draws - k + 1)))
    return torch.where(hits > 0, found.reshape(hits.shape), 0.0)


def upper_confidence(hits: Tensor, n: int | Tensor, alpha: float) -> Tensor:
    """Give the upper bounds, as `lower_confidence` does the lower ones."""
    return 1 - lower_confidence(n - hits, n, alpha)


def _check_alpha(who: str, alpha: float) -> None:
    if not 0 < checks.real(who, "alpha", alpha) < 1:
        raise ValueError(f"{who}: alpha must be between 0 and 1, got {alpha:g}")
