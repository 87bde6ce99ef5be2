"""Per-sample losses and divergences: each returns one value per sample, `[B]`.

Logits are `[B, C]`; `[B]` or `[B, 1]` is one logit of a binary decision; `[B, ..., C]` are
sequences, averaged over the dims in between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = float("inf")


def _is_binary(logits: Tensor) -> bool:
    return logits.dim() == 1 or logits.shape[-1] == 1


def two_sided(logits: Tensor) -> Tensor:
    """Write one logit of a binary decision as two, `[B, 2]`; leave others as they are."""
    if not _is_binary(logits):
        return logits
    single = logits.reshape(logits.shape[0], *logits.shape[1:-1])
    return torch.stack([torch.zeros_like(single), single], dim=-1)


def per_sample(values: Tensor) -> Tensor:
    """Average over all dims but the first."""
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def predict(outputs: Tensor) -> Tensor:
    """The predicted class, `[B]` or `[B, ...]`: the largest logit, or the sign of a single one."""
    if _is_binary(outputs):
        return (outputs.reshape(outputs.shape[0], *outputs.shape[1:-1]) > 0).long()
    return outputs.argmax(-1)


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of each sample, `[B]`, averaged over its labels that are not `ignore_index`."""
    logits = two_sided(logits)
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.reshape(-1).long(),
        reduction="none",
        ignore_index=ignore_index,
    )
    if labels.dim() < 2:
        return losses
    kept = labels != ignore_index
    return losses.reshape(labels.shape).flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """`softplus(negative - positive)`: Bayesian personalised ranking (Rendle et al., UAI 2009)."""
    return per_sample(F.softplus(negative - positive))


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the right one (Carlini and Wagner, S&P 2017): above 0 if fooled."""
    logits = two_sided(logits)
    right = logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    wrong = logits.scatter(-1, labels.long().unsqueeze(-1), -_FAR).amax(-1)
    return per_sample(wrong - right)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, eq. 6), `[B]`.

    `-(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3)`, with pi the descending order. It does not change
    when the logits are scaled. With two classes there is no third logit: the denominator is then
    the spread of the logits, and the loss tells only the sign.
    """
    logits = two_sided(logits)
    ordered = logits.sort(dim=-1, descending=True).values
    spread = ordered[..., 0] - ordered[..., min(2, logits.shape[-1] - 1)]
    right = logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    wrong = logits.scatter(-1, labels.long().unsqueeze(-1), -_FAR).amax(-1)
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    return per_sample((wrong - right) / safe)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """`KL(p || q)` of two categorical distributions given by logits, `[B]`."""
    p = two_sided(p_logits).log_softmax(-1)
    q = two_sided(q_logits).log_softmax(-1)
    return per_sample((p.exp() * (p - q)).sum(-1))


def symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """`KL(p || q) + KL(q || p)`, `[B]`."""
    p = two_sided(p_logits).log_softmax(-1)
    q = two_sided(q_logits).log_softmax(-1)
    return per_sample(((p.exp() - q.exp()) * (p - q)).sum(-1))


def squared_distance(p: Tensor, q: Tensor) -> Tensor:
    """Mean squared difference of each sample's outputs, `[B]`: the divergence for regression."""
    return per_sample((p - q).square())
