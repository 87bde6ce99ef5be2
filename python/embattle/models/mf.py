"""Matrix factorisation, trained by Bayesian personalised ranking."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embattle import losses


def squared_norm(*used: tuple[nn.Embedding, Tensor]) -> Tensor:
    """Give the sum of the squared norms of rows `[B]` of tables, `[B]`."""
    vectors = [F.embedding(rows, table.weight) for table, rows in used]
    return torch.stack([vector.square().sum(-1) for vector in vectors]).sum(0)


class MF(nn.Module):
    """BPR-MF: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009.

    The score of item i for user u is `<p_u, q_i> + b_i` (their eq. 6, with item biases).

    `Site.embeddings(model)` perturbs what a triplet looks up; `Site(model.user, scope="row")` rows
    of a table. `scores` reads the item table as a whole: `Site.weight(model.item)` perturbs it
    there.

    Args:
        users, items: how many there are.
        dim: width of the vectors.
        bias: give each item a bias.
        std: standard deviation of the first vectors.
    """

    def __init__(
        self, users: int, items: int, *, dim: int = 64, bias: bool = True, std: float = 0.01
    ) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, dim), nn.Embedding(items, dim)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=std)
        self.bias = nn.Parameter(torch.zeros(items)) if bias else None

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Give the scores `[B]` of pairs, users and items `[B]`."""
        score: Tensor = (self.user(users) * self.item(items)).sum(-1)
        return score if self.bias is None else score + self.bias[items]

    def scores(self, users: Tensor) -> Tensor:
        """Give the scores `[B, items]` of all items for users `[B]`."""
        score: Tensor = self.user(users) @ self.item.weight.T
        return score if self.bias is None else score + self.bias

    def losses(self, users: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Give `-log sigmoid(x_ui - x_uj)` of triplets (BPR-Opt), all `[B]`."""
        user = self.user(users)
        scores = [(user * self.item(items)).sum(-1) for items in (positive, negative)]
        if self.bias is not None:
            scores = [
                score + self.bias[items]
                for score, items in zip(scores, (positive, negative), strict=True)
            ]
        return losses.bpr(*scores)

    def penalty(self, users: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Give half the squared norm of the weights that each triplet uses, `[B]`.

        BPR-Opt's regulariser, to be weighted by lambda and added to the losses.
        """
        total = squared_norm((self.user, users), (self.item, positive), (self.item, negative))
        if self.bias is not None:
            total = total + self.bias[positive].square() + self.bias[negative].square()
        return total / 2
