"""Matrix factorisation that also reads what is written about its items."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embattle import losses
from embattle.models.encoder import TextEncoder
from embattle.models.mf import MF
from embattle.models.text_table import TextTable


class HybridMF(MF):
    """BPR-MF in which an item's vector is its own and, projected, that of its text.

    The score of item i for user u is `<p_u, q_i + W e_i> + b_i`, where `e_i` is what a text encoder
    makes of the item's text: the visual term of He and McAuley, "VBPR: Visual Bayesian Personalized
    Ranking from Implicit Feedback", AAAI 2016, with texts for pictures, and one user vector.

    `Site.weight(model.user)` and `Site.weight(model.item)` perturb rows of the tables,
    `Site(model.texts.words)` the words of items whose texts are rewritten.

    Args:
        users: how many there are.
        encoder: of texts.
        texts: one for each item.
        dim, std: see `MF`.
        trained: whether the encoder is trained too.
    """

    def __init__(
        self,
        users: int,
        encoder: TextEncoder,
        texts: list[str],
        *,
        dim: int = 64,
        std: float = 0.01,
        trained: bool = False,
    ) -> None:
        super().__init__(users, len(texts), dim=dim, std=std)
        self.texts = TextTable(encoder, texts, trained=trained)
        self.projection = nn.Linear(encoder.width, dim, bias=False)
        nn.init.normal_(self.projection.weight, std=std / encoder.width**0.5)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Give the scores `[B]` of pairs, users and items `[B]`."""
        return super().forward(users, items) + self._read(users, self.texts(items))

    def scores(self, users: Tensor) -> Tensor:
        """Give the scores `[B, items]` of all items for users `[B]`."""
        text: Tensor = self.user(users) @ self.projection(self.texts.every()).T
        return super().scores(users) + text

    @torch.no_grad()
    def for_scoring(self) -> MF:
        """Give a model without texts, whose `scores` are the same, in evaluation mode."""
        users, items = self.user.num_embeddings, self.item.num_embeddings
        made = MF(users, items, dim=self.user.embedding_dim).to(self.user.weight)
        made.load_state_dict({name: self.get_parameter(name) for name in made.state_dict()})
        made.item.weight += self.projection(self.texts.every())
        return made.eval()

    def scored_with(self, users: Tensor, items: Tensor, text: Tensor) -> Tensor:
        """Give the scores `[B]` of pairs `[B]` where the items' texts have the vectors `text`."""
        return super().forward(users, items) + self._read(users, text)

    def scores_where_rewritten(
        self, users: Tensor, items: Tensor, text_ids: Tensor, text_mask: Tensor
    ) -> Tensor:
        """Give the scores `[B, items]` where each user sees one item with another text.

        Args:
            users: `[B]`.
            items: `[B]`, the item of each user whose text is rewritten.
            text_ids, text_mask: `[B, T]`, the new texts.
        """
        own = self.scored_with(users, items, self.texts.rewritten(text_ids, text_mask))
        return self.scores(users).scatter(1, items[:, None], own[:, None])

    def losses(
        self,
        users: Tensor,
        positive: Tensor,
        negative: Tensor,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Give `-log sigmoid(x_ui - x_uj)` of triplets, all `[B]`.

        Args:
            users, positive, negative: the triplets.
            text_ids, text_mask: `[B, T]`, the texts of the positive items, if they may be
                rewritten.
        """
        if text_ids is None or text_mask is None:
            return losses.bpr(self(users, positive), self(users, negative))
        own = self.scored_with(users, positive, self.texts.rewritten(text_ids, text_mask))
        return losses.bpr(own, self(users, negative))

    def penalty(self, users: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Give half the squared norm of what each triplet uses, projected texts too, `[B]`."""
        texts: Tensor = self.projection(self.texts(torch.stack([positive, negative], 1)))
        return super().penalty(users, positive, negative) + texts.square().sum((1, 2)) / 2

    def _read(self, users: Tensor, text: Tensor) -> Tensor:
        """What texts `[B, width]` add to the scores `[B]`."""
        score: Tensor = (self.user(users) * self.projection(text)).sum(-1)
        return score
