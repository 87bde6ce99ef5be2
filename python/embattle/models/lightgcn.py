"""LightGCN: vectors of users and items, averaged over their neighbourhoods in the graph."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from embattle import checks, losses
from embattle.models.interactions import Interactions
from embattle.models.mf import MF, squared_norm


class LightGCN(nn.Module):
    """LightGCN: He et al., "LightGCN: Simplifying and Powering Graph Convolution", SIGIR 2020.

    A layer replaces each vector by the sum of its neighbours', each over the square root of both
    degrees (their eq. 3); the mean over all layers is used (eq. 4), scored by inner products.

    Each vector reaches many others, and the tables are read as a whole: perturb them by
    `Site.weight(model.user)` and `Site.weight(model.item)`.

    Args:
        graph: the training part; its pairs are the edges.
        dim: width of the vectors.
        layers: how often vectors are passed on.
        std: standard deviation of the first vectors.
    """

    starts: Tensor
    ends: Tensor
    weights: Tensor

    def __init__(
        self, graph: Interactions, *, dim: int = 64, layers: int = 3, std: float = 0.1
    ) -> None:
        super().__init__()
        self.layers = checks.integer("LightGCN", "layers", layers, 0)
        self.user = nn.Embedding(graph.user_count, dim)
        self.item = nn.Embedding(graph.item_count, dim)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=std)
        # In parts: a sparse tensor cannot be copied with its module.
        starts, ends, weights = _edges(graph)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("weights", weights, persistent=False)

    def propagate(self) -> tuple[Tensor, Tensor]:
        """Give the final vectors of all users `[users, dim]` and all items `[items, dim]`."""
        now = torch.cat([self.user.weight, self.item.weight])
        total = now
        edges = _sparse(self.starts, self.ends, self.weights)
        for _ in range(self.layers):
            now = _spread(edges, now)
            total = total + now
        mean, users = total / (self.layers + 1), self.user.num_embeddings
        return mean[:users], mean[users:]

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Give the scores `[B]` of pairs, users and items `[B]`."""
        of_users, of_items = self.propagate()
        return (of_users[users] * of_items[items]).sum(-1)

    def scores(self, users: Tensor) -> Tensor:
        """Give the scores `[B, items]` of all items for users `[B]`."""
        of_users, of_items = self.propagate()
        return of_users[users] @ of_items.T

    @torch.no_grad()
    def for_scoring(self) -> MF:
        """Give a model of the final vectors, whose scores are the same, in evaluation mode."""
        of_users, of_items = self.propagate()
        users, dim = of_users.shape
        made = MF(users, len(of_items), dim=dim, bias=False).to(of_users)
        made.user.weight.copy_(of_users)
        made.item.weight.copy_(of_items)
        return made.eval()

    def losses(self, users: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Give the BPR losses of triplets (their eq. 15), all `[B]`."""
        of_users, of_items = self.propagate()
        user = of_users[users]
        return losses.bpr((user * of_items[positive]).sum(-1), (user * of_items[negative]).sum(-1))

    def penalty(self, users: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Give half the squared norm of the first vectors of each triplet, `[B]` (eq. 15)."""
        return squared_norm((self.user, users), (self.item, positive), (self.item, negative)) / 2


class _Spread(torch.autograd.Function):
    """A product with a symmetric sparse matrix, whose backward pass need not transpose it."""

    @staticmethod
    def forward(ctx: Any, edges: Tensor, vectors: Tensor) -> Tensor:
        ctx.edges = edges
        return edges @ vectors

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _spread(ctx.edges, grad.contiguous())


def _spread(edges: Tensor, vectors: Tensor) -> Tensor:
    spread: Tensor = _Spread.apply(edges, vectors)  # type: ignore[no-untyped-call]
    return spread


def _edges(graph: Interactions) -> tuple[Tensor, Tensor, Tensor]:
    """D^-1/2 A D^-1/2 of users and then items by rows: where each starts, columns, values."""
    items = graph.items + graph.user_count
    count = graph.user_count + graph.item_count
    one, two = torch.cat([graph.users, items]), torch.cat([items, graph.users])
    order = torch.argsort(one * count + two)
    one, two = one[order], two[order]
    degree = one.bincount(minlength=count)
    starts = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    weights = (degree[one] * degree[two]).to(torch.get_default_dtype()).rsqrt()
    return starts, two, weights


def _sparse(starts: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    count = len(starts) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            starts, ends, weights, (count, count), check_invariants=False
        )
