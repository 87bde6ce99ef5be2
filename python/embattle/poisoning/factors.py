"""The surrogate: matrix factorisation by weighted least squares, and how it answers to fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from embattle.poisoning.crowd import Crowd, Profiles

DIM = 16
# The weight of the squared vectors beside the squared errors.
RIDGE = 0.5
# Sweeps before there are fakes, and with them.
FIRST, AGAIN = 15, 4


class Factors:
    """Vectors of users and items that minimise `sum w (r - <p, q>)^2 + RIDGE (|P|^2 + |Q|^2)`.

    Alternating least squares; Hu, Koren and Volinsky, "Collaborative Filtering for Implicit
    Feedback Datasets", ICDM 2008. It is trained on the genuine users once, and on from there with
    each set of fakes.

    Args:
        crowd: the genuine users.
        generator: of the first vectors.
    """

    def __init__(self, crowd: Crowd, generator: torch.Generator) -> None:
        self.crowd = crowd
        self._weights = crowd.weights()
        self._weighted = self._weights * crowd.values
        self._first = 0.1 * torch.randn(crowd.seen.shape[1], DIM, generator=generator)
        nobody = torch.zeros(0, crowd.seen.shape[1])
        self._first = self._fit(Profiles(nobody, nobody), self._first, FIRST)[1]
        self._now = self._first

    @torch.no_grad()
    def fit(self, fakes: Profiles) -> Tensor:
        """Train with fakes, and give the genuine users' scores [U, I]."""
        users, self._now = self._fit(fakes, self._first, AGAIN)
        return users @ self._now.T

    def answer(self, fakes: Profiles) -> Tensor:
        """The scores [U, I] after one more sweep from the last `fit`, differentiable in the fakes.

        At a minimum every vector solves its normal equations. Those of the fakes, of the items and
        then of the genuine users are differentiated, each given the ones before: the implicit
        gradient of Li et al. (NIPS 2016, section 4), cut after the first round.
        """
        users, items = self._sweep(fakes, self._now)
        return users @ items.T

    def _fit(self, fakes: Profiles, items: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
        users = items
        for _ in range(sweeps):
            users, items = self._sweep(fakes, items)
        return users, items

    def _sweep(self, fakes: Profiles, items: Tensor) -> tuple[Tensor, Tensor]:
        """Users, items, and the genuine users again; each by least squares given the last."""
        weights, values = self.crowd.cells(fakes)
        genuine = _solve(self._weights, self._weighted, items)
        fake = _solve(weights, weights * values, items)
        all_weights = torch.cat([self._weights, weights]).T
        all_weighted = torch.cat([self._weighted, weights * values]).T
        items = _solve(all_weights, all_weighted, torch.cat([genuine, fake]))
        return _solve(self._weights, self._weighted, items), items


def _solve(weights: Tensor, weighted: Tensor, vectors: Tensor) -> Tensor:
    """[N, dim] vectors of N rows with weights [N, M] and weighted values [N, M], given M others."""
    dim = vectors.shape[1]
    squares = (vectors[:, :, None] * vectors[:, None, :]).flatten(1)
    left = (weights @ squares).reshape(-1, dim, dim) + RIDGE * torch.eye(dim)
    found: Tensor = torch.linalg.solve(left, weighted @ vectors)
    return found
