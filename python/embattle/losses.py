"""Per-sample losses and divergences: each returns one value per sample, `[B]`.

Logits are `[B, C]`; `[B]` or `[B, 1]` is one logit of a binary decision; `[B, ..., C]` are
sequences, averaged over the dims in between. Labels are class numbers in integers (or bool), of the
logits' shape without the class dim; any other shape is refused, so that none is ever broadcast.
A label `ignore_index` adds nothing. Logits of -inf are classes that are ruled out (masked items).
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


def wide(outputs: Tensor) -> Tensor:
    """Outputs in float32 at least: float64 stays, as rounding may turn what is nearly equal."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def classes(logits: Tensor) -> int:
    """How many classes the logits are of: two if there is one logit."""
    return 2 if _is_binary(logits) else logits.shape[-1]


def one_hot(numbers: Tensor, count: int) -> Tensor:
    """Bool `[N, count]`, True at each number; a number that is no class is in no column."""
    return numbers[:, None] == torch.arange(count, device=numbers.device)


def per_sample(values: Tensor) -> Tensor:
    """Average over all dims but the first."""
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def per_counted(values: Tensor, kept: Tensor) -> Tensor:
    """Average each sample's values where `kept` (bool, of their shape) is True; 0 if nowhere."""
    values = torch.where(kept, values, 0.0)
    if values.dim() == 1:
        return values
    total = wide(values).flatten(1).sum(1)  # float16 sums may overflow
    return (total / kept.flatten(1).sum(1).clamp(min=1)).to(values.dtype)


def predict(outputs: Tensor) -> Tensor:
    """The predicted class, `[B]` or `[B, ...]`: the largest logit, or the sign of a single one.

    It is -1, which is no class, where a logit is NaN.
    """
    if _is_binary(outputs):
        single = outputs.reshape(outputs.shape[0], *outputs.shape[1:-1])
        return (single > 0).long().masked_fill(single.isnan(), -1)
    largest, found = outputs.max(-1)  # a NaN is the largest
    return found.masked_fill(largest.isnan(), -1)


def check_labels(who: str, logits: Tensor, labels: Tensor) -> None:
    """Check that there is one class number for each prediction.

    Raises:
        ValueError: labels that are no integers, or not of the logits' shape without the class dim.
    """
    need = logits.shape if logits.dim() == 1 else logits.shape[:-1]
    if labels.shape == need and not labels.is_floating_point() and not labels.is_complex():
        return
    hint = ""
    if labels.shape == need:
        hint = "; values that are no class numbers are a matter for embattle.Deviate"
    elif labels.shape == (*need, 1):
        hint = "; use labels.squeeze(-1)"
    elif labels.shape == logits.shape:
        hint = "; several labels for each sample are a matter for embattle.MultiLabel"
    elif labels.shape == (*logits.shape[:1], *logits.shape[2:]):
        hint = "; the classes must be the logits' last dim"
    raise ValueError(
        f"{who}: logits {tuple(logits.shape)} need integer labels {tuple(need)}, one class number "
        f"for each prediction; got labels {tuple(labels.shape)} of {labels.dtype}{hint}"
    )


def _same_shape(who: str, first: str, one: Tensor, second: str, two: Tensor) -> None:
    if one.shape != two.shape:
        raise ValueError(
            f"{who}: {first} and {second} must have one shape; got {first} {tuple(one.shape)} and "
            f"{second} {tuple(two.shape)}"
        )


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Cross-entropy of each sample, `[B]`, averaged over its labels that are not `ignore_index`."""
    check_labels("cross_entropy", logits, labels)
    labels = labels.long()
    try:
        losses = F.cross_entropy(
            two_sided(logits).flatten(0, -2),
            labels.reshape(-1),
            reduction="none",
            ignore_index=ignore_index,
        ).reshape(labels.shape)
    except IndexError as error:  # of the CPU, which looks at each label; a GPU does not say which
        count = classes(logits)
        wrong = ((labels < 0) | (labels >= count)) & (labels != ignore_index)
        raise ValueError(
            f"cross_entropy: labels must lie in [0, {count}) for logits {tuple(logits.shape)}, or "
            f"be ignore_index={ignore_index}; got {labels[wrong][0].item()}"
        ) from error
    return losses if labels.dim() == 1 else per_counted(losses, labels != ignore_index)


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """`softplus(negative - positive)`: Bayesian personalised ranking (Rendle et al., UAI 2009).

    Scores `[B]`, or `[B, 1]` against `[B, K]` negatives, which are averaged over.
    """
    if positive.dim() != negative.dim() or positive.shape[0] != negative.shape[0]:
        _same_shape("bpr", "positive", positive, "negative", negative)
    return per_sample(F.softplus(negative - positive))


def _sides(
    who: str, logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    # The logit of the label, the largest of the others, and which labels count.
    check_labels(who, logits, labels)
    logits, labels = two_sided(logits), labels.long()
    kept = labels != ignore_index
    index = torch.where(kept, labels, 0).unsqueeze(-1)
    right = logits.gather(-1, index).squeeze(-1)
    wrong = logits.scatter(-1, index, -_FAR).amax(-1)
    return right, wrong, kept


def margin(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Largest wrong logit minus the right one (Carlini and Wagner, S&P 2017): above 0 if fooled."""
    right, wrong, kept = _sides("margin", logits, labels, ignore_index)
    return per_counted(wrong - right, kept)


def dlr(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, eq. 6), `[B]`.

    `-(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3)`, with pi the descending order. It does not change
    when the logits are scaled. Where fewer than three logits, or not the label's, are finite, it is
    the margin.

    Raises:
        ValueError: fewer than three classes. The ratio would be 1 or -1, without a gradient.
    """
    if classes(logits) < 3:
        raise ValueError(
            f"dlr: needs at least three classes, got logits {tuple(logits.shape)}; with two the "
            "ratio has no gradient: take the margin"
        )
    right, wrong, kept = _sides("dlr", logits, labels, ignore_index)
    largest = logits.topk(3, dim=-1).values
    spread = largest.select(-1, 0) - largest.select(-1, 2)
    lead = wrong - right
    usable = (spread > 0) & (spread < _FAR) & lead.isfinite()
    return per_counted(lead / torch.where(usable, spread, 1.0), kept)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """`KL(p || q)` of two categorical distributions given by logits, `[B]`."""
    return per_sample(kl_of_logs(*_log_probabilities("kl", p_logits, q_logits)))


def kl_of_logs(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q)` of each pair of distributions given by log-probabilities, `[..., C]`."""
    mass = p.exp()
    # p log p is 0 at p = 0. Filling the difference keeps -inf out of the value and the gradient.
    ratio = (p - q).masked_fill(mass == 0, 0.0)
    return (mass * ratio).sum(-1)


def symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """`KL(p || q) + KL(q || p)`, `[B]`."""
    p, q = _log_probabilities("symmetric_kl", p_logits, q_logits)
    p_mass, q_mass = p.exp(), q.exp()
    ratio = (p - q).masked_fill((p_mass == 0) & (q_mass == 0), 0.0)
    return per_sample(((p_mass - q_mass) * ratio).sum(-1))


def _log_probabilities(who: str, p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    _same_shape(who, "p_logits", p_logits, "q_logits", q_logits)
    return two_sided(p_logits).log_softmax(-1), two_sided(q_logits).log_softmax(-1)


def squared_distance(p: Tensor, q: Tensor) -> Tensor:
    """Mean squared difference of each sample's outputs, `[B]`: the divergence for regression.

    Scores that are -inf in both are equal.
    """
    _same_shape("squared_distance", "p", p, "q", q)
    return per_sample((p - q).masked_fill(p.isinf() & (p == q), 0.0).square())


#: By the name that `embattle.Diverge` and the forms of objectives know them by.
DIVERGENCES = {"kl": kl, "symmetric_kl": symmetric_kl, "squared_distance": squared_distance}
