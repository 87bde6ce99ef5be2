"""Forms that compare clean and perturbed outputs: TRADES, MART, ALP, VAT, SMART, R3F.

Divergences are between the outputs that the loss function returns beside its losses; for regression
name the divergence: `form=Trades(divergence="squared_distance")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from embattle.criteria import Diverge
from embattle.losses import DIVERGENCES, kl_of_logs, per_counted, squared_distance, two_sided
from embattle.objectives.batch import Batch

if TYPE_CHECKING:
    from embattle.objectives.bregman import Bregman

Divergence: TypeAlias = Literal["kl", "symmetric_kl", "squared_distance"]


@dataclass(frozen=True)
class Trades:
    """TRADES (Zhang et al., ICML 2019, eq. 5): `L(f(x)) + lam * KL(f(x) || f(x'))`.

    The attack ascends the same KL, with the clean outputs held fixed; both outputs are
    differentiated in the loss, as in the paper and in the authors' code. The KL has no gradient at
    zero: start the attack at random (theirs: `GaussianStart(0.001)`). `lam` is their beta.
    """

    divergence: Divergence = "kl"

    def __call__(self, batch: Batch) -> Tensor:
        clean = batch.clean()
        batch.ascend(toward=Diverge(self.divergence), clean=clean)
        perturbed = batch.perturbed()
        distance = DIVERGENCES[self.divergence](batch.outputs(clean), batch.outputs(perturbed))
        return batch.losses(clean).mean() + batch.lam * batch.mean(
            distance, batch.weights(perturbed, clean)
        )


@dataclass(frozen=True)
class Vat:
    """Virtual adversarial training (Miyato et al., 2017, eq. 8): `L + lam * KL(p || p(x + r))`.

    p, the clean prediction, is a constant in the divergence. The attack is `VAT`, or any other: it
    ascends the KL. A batch without labels has the divergence alone: let the loss function return
    `Evaluation(outputs=logits)`.
    """

    divergence: Divergence = "kl"

    def __call__(self, batch: Batch) -> Tensor:
        loss, clean, _ = batch.clean_and_first_step(unlabelled=True)
        batch.ascend(toward=Diverge(self.divergence), clean=clean)
        perturbed = batch.perturbed()
        distance = DIVERGENCES[self.divergence](batch.outputs(clean), batch.outputs(perturbed))
        return loss + batch.lam * batch.mean(distance, batch.weights(perturbed, clean))


@dataclass(frozen=True)
class Mart:
    """MART (Wang et al., ICLR 2020, eq. 8): `BCE(p', y) + lam * KL(p || p') * (1 - p_y)`.

    `BCE = -log p'_y - log(1 - max_{k != y} p'_k)`; the attack ascends the loss. The authors' code
    adds 1.0001 - p and 1e-12 against log(0); here the logarithms are computed from logits.
    """

    def __call__(self, batch: Batch) -> Tensor:
        clean = batch.clean()
        batch.ascend()
        perturbed = batch.perturbed()
        kept = batch.counted_labels
        labels = batch.labels.masked_fill(~kept, 0)
        p = two_sided(batch.outputs(clean)).log_softmax(-1)
        q = two_sided(batch.outputs(perturbed)).log_softmax(-1)
        where = labels.unsqueeze(-1)
        others = q.scatter(-1, where, -torch.inf)
        # log(1 - q_k) is the log of the sum of all but the k-th probability.
        rest = q.scatter(-1, others.argmax(-1, keepdim=True), -torch.inf).logsumexp(-1)
        bce = -q.gather(-1, where).squeeze(-1) - rest
        wrong = 1 - p.gather(-1, where).squeeze(-1).exp()
        values = per_counted(bce + batch.lam * kl_of_logs(p, q) * wrong, kept)
        return batch.mean(values, batch.weights(perturbed, clean))


@dataclass(frozen=True)
class Alp:
    """Adversarial logit pairing (Kannan et al., 2018, eq. 2): mixed loss + lam * logit distance.

    `(L + L_adv) / 2 + lam * mean (z - z')^2` over samples and logits, as the paper's M-PGD has half
    of a batch clean and half attacked.
    """

    def __call__(self, batch: Batch) -> Tensor:
        clean = batch.clean()
        batch.ascend()
        perturbed = batch.perturbed()
        distance = squared_distance(batch.outputs(clean), batch.outputs(perturbed))
        weights = batch.weights(perturbed, clean)
        values = batch.losses(perturbed) / 2 + batch.lam * distance
        return batch.losses(clean).mean() / 2 + batch.mean(values, weights)


@dataclass(frozen=True)
class Smart:
    """SMART (Jiang et al., ACL 2020, eq. 1-3): `L + lam * symmetric KL(f(x), f(x'))`.

    For classification the divergence is the symmetric KL, for regression "squared_distance". The
    attack ascends it; `SMARTStep` is the paper's.

    Args:
        bregman: adds the proximal term `mu * D(f(x), f_old(x))`; f_old is an average of the model.
    """

    divergence: Divergence = "symmetric_kl"
    bregman: Bregman | None = None

    def __call__(self, batch: Batch) -> Tensor:
        if self.bregman is not None and batch.old is None:  # once: AWP calls again at w + v
            batch.old = batch.outputs(self.bregman.evaluate_average(batch.attacked.loss_fn))
        clean = batch.clean()
        batch.ascend(toward=Diverge(self.divergence), clean=clean)
        perturbed = batch.perturbed()
        measure = DIVERGENCES[self.divergence]
        distance = measure(batch.outputs(clean), batch.outputs(perturbed))
        loss = batch.losses(clean).mean() + batch.lam * batch.mean(
            distance, batch.weights(perturbed, clean)
        )
        if self.bregman is None or batch.old is None:
            return loss
        proximal = measure(batch.outputs(clean), batch.old).mean()
        batch.metrics["bregman"] = proximal.detach()
        return loss + self.bregman.weight * proximal


@dataclass(frozen=True)
class R3F:
    """R3F (Aghajanyan et al., ICLR 2021, eq. 4): `L + lam * symmetric KL(f(x), f(x + z))`.

    z is noise, not an attack: `UniformNoise(norm="linf", eps=1e-5)` or `GaussianNoise(std=1e-5)`.
    (R4F adds spectral normalisation to the head: `torch.nn.utils.parametrizations`.)
    """

    def __call__(self, batch: Batch) -> Tensor:
        if batch.attack.steps:
            raise ValueError(f"form 'r3f' takes a noise, not {batch.attack!r}")
        clean = batch.clean()
        batch.ascend()
        perturbed = batch.perturbed()
        distance = DIVERGENCES["symmetric_kl"](batch.outputs(clean), batch.outputs(perturbed))
        return batch.losses(clean).mean() + batch.lam * batch.mean(
            distance, batch.weights(perturbed, clean)
        )
