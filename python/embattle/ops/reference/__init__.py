"""The definition of every op, in plain torch and float64: slow, clear, what the tests compare with.

Every function has the signature of its namesake in :mod:`embattle.ops`; those on groups have
their signatures and words from here. Arguments are taken as valid. Results have the dtype of the
first argument; the arithmetic in between is float64, so that the reference called on
``x.double()`` is exact to about 1e-15 for whatever ``x`` holds.

**Groups.** A tensor is seen as ``[rows, dim]``, where ``dim`` is its last dimension, and a group is
a run of rows (``group="sample"``: all rows of one index of dimension 0; ``group="token"``: one row;
``offsets``: rows ``offsets[g]`` up to ``offsets[g + 1]``). A 1-D or 0-D tensor is one group.
``Groups`` copies the groups into a padded ``[groups, width]`` float64 matrix; everything below
works on such matrices.

**Origin and box.** With ``x0`` the first argument and the result are inputs, ``x0 + delta``;
without it they are ``delta``. The box bounds the result itself. The origin need not lie in it: the
result is the projection on the intersection of ball and box, and where they do not meet the box
wins: the result is the point of the box that is nearest to the origin (linf: element by element).
All values of bounds have a meaning: an element whose bound is a NaN has none, and where lower is
above upper, upper holds. Rows that are masked out get the origin, box or not.

**Storing.** ``norm(result - x0) <= eps`` holds in float64 on the *stored* values, where ball and
box meet: where rounding to the result's dtype would leave the ball, that group is rounded towards
its origin. Box bounds are rounded to the result's dtype.

**Random numbers** come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011). ``key``, two non-negative int64 drawn by :func:`draw_key`, gives the Philox key
``(low32(key[0]), high32(key[0]))``. The counter of block ``n`` in stream ``s`` is ``(low32(n),
high32(n), low32(key[1]), high32(key[1]) ^ (s << 31))``. A block yields words ``w[0..3]``.

- Stream 0 serves elements, ``i`` being the index in the flattened (contiguous) tensor, masked ones
  counted. For float32, float16 and bfloat16 results element ``i`` has word ``w[i % 4]`` of block
  ``i // 4``, and the 24-bit integer ``m = w >> 8``; for float64 it has ``high = w[2 * (i % 2)]``,
  ``low = w[2 * (i % 2) + 1]`` of block ``i // 2``, and the 53-bit integer ``m = (high << 21) | (low
  >> 11)``. With ``p`` = 24 or 53 bits:
- uniform in [0, 1): ``u = m * 2**-p``; uniform in (0, 1]: ``v = (m + 1) * 2**-p``. Both are exact.
- sign: minus where bit 0 of ``w`` (float64: of ``low``) is set; that bit is no part of ``m``.
- gaussian: elements ``2j`` and ``2j + 1`` form a pair (Box-Muller); with ``r = sqrt(-2 *
  log(v[2j]))`` and ``a = 2 * pi * u[2j + 1]`` they are ``r * cos(a)`` and ``r * sin(a)``.
- exponential: ``-log(v)``.
- Stream 1 serves groups: the radius of group ``g`` is ``eps * U ** (1 / n)``, with ``n`` the number
  of unmasked elements, and ``U = (m + 1) * 2**-53`` from ``high = w[0]``, ``low = w[1]`` of block
  ``g``, whatever the dtype.
"""

from embattle.ops.reference.clipping import (
    clip_and_sum,
    group_norm,
    linear_grad_norm,
    per_sample_norm,
)
from embattle.ops.reference.embedding import (
    embedding_grad_norm,
    embedding_grad_sum,
    embedding_perturb,
    rowwise_adagrad_,
)
from embattle.ops.reference.projection import project, project_
from embattle.ops.reference.random import (
    draw_key,
    gaussian_noise,
    gaussian_noise_,
    philox,
    random_start,
)
from embattle.ops.reference.steps import momentum_step, momentum_step_, pgd_step, pgd_step_

__all__ = [
    "clip_and_sum",
    "draw_key",
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
    "philox",
    "project",
    "project_",
    "random_start",
    "rowwise_adagrad_",
]
