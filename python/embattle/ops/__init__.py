"""Fused ops on embedding-space perturbations, per-sample gradients and embedding tables.

Every function is a thin, typed front of the op of the same name in ``torch.ops.embattle``; what
each one means is written out in plain torch in :mod:`embattle.ops.reference`. Names that end in
``_`` write their first argument.

`project`, `embedding_perturb` and `clip_and_sum` are differentiable, in reverse mode; a tensor with
a tangent (forward mode) is refused. To autograd, what the others return is a constant.
"""

from embattle.ops import _rules_clip as _rules_clip  # fake, autograd and vmap rules of the ops
from embattle.ops import _rules_embedding as _rules_embedding
from embattle.ops import _rules_group as _rules_group
from embattle.ops._no_cuda import register as _register
from embattle.ops.clip import clip_and_sum, linear_grad_norm, per_sample_norm
from embattle.ops.embedding import (
    embedding_grad_norm,
    embedding_grad_sum,
    embedding_perturb,
    rowwise_adagrad_,
)
from embattle.ops.group import (
    gaussian_noise,
    gaussian_noise_,
    group_norm,
    momentum_step,
    momentum_step_,
    pgd_step,
    pgd_step_,
    project,
    project_,
    random_start,
)

_library = _register()  # kept: the registrations live as long as it does

__all__ = [
    "clip_and_sum",
    "embedding_grad_norm",
    "embedding_grad_sum",
    "embedding_perturb",
    "gaussian_noise",
    "gaussian_noise_",
    "group_norm",
    "linear_grad_norm",
    "momentum_step",
    "momentum_step_",
    "per_sample_norm",
    "pgd_step",
    "pgd_step_",
    "project",
    "project_",
    "random_start",
    "rowwise_adagrad_",
]
