"""Rankers of items for users by vectors and by what is written about the items."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from embattle.data.account import Account
from embattle.data.batch import Batch
from embattle.data.item_texts import ItemTexts
from embattle.models.hybrid import HybridMF
from embattle.models.recipe import EncoderRecipe
from embattle.models.words import Words
from embattle.perturb.evaluation import Evaluation
from embattle.perturb.site import Group, Site
from embattle.sections import Section
from embattle.tasks.encoded import EncodedTexts
from embattle.tasks.item_ranking import ItemRanking
from embattle.tasks.ratings import RatingsRecipe

# isort: split
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt


class HybridData(RatingsRecipe):
    """A table of ratings, and one with the items' texts.

    Attributes:
        items: the latter.
    """

    items: ItemTexts


class HybridRecipe(EncoderRecipe):
    """BPR-MF with texts.

    Attributes:
        dim, std, l2: see `RankerRecipe`.
        train_encoder: whether the encoder is trained; otherwise each text is encoded once.
        attacked: `rows` of both tables, or `texts`: the words of the item that a user should be
            recommended, each user's anew.
    """

    max_tokens: PositiveInt = 32
    dim: PositiveInt = 64
    std: PositiveFloat = 0.1
    l2: NonNegativeFloat = 0.0
    train_encoder: bool = False
    attacked: Literal["rows", "texts"] = "rows"


class HybridRanking(EncodedTexts, ItemRanking):
    """Trains on triplets as `ItemRanking` does; an item is known by its text too.

    Where texts are attacked, those of the positive items of triplets are in training, and in the
    audit that of the item held out, which the attacker wants off the list.
    """

    Data: ClassVar[type[Section]] = HybridData
    Model: ClassVar[type[Section]] = HybridRecipe

    data_options: HybridData
    model_options: HybridRecipe  # type: ignore[assignment]

    def read(self, account: Account) -> None:
        """Read ratings and texts."""
        super().read(account)
        self.texts = self.data_options.items.read(self.items, account)

    def build(self) -> HybridMF:
        """Vectors drawn at random beside a pretrained encoder."""
        options = self.model_options
        return HybridMF(
            len(self.users),
            self.text_encoder(),
            self.texts,
            dim=options.dim,
            std=options.std,
            trained=options.train_encoder,
        )

    def batch(self, model: nn.Module, part: str, rows: Tensor, *, seed: int = 0) -> Batch:
        """The same as of `ItemRanking`, with the words that may be rewritten."""
        batch = super().batch(model, part, rows, seed=seed)
        if self.model_options.attacked == "rows":
            return batch
        words = cast(HybridMF, model).texts.tokens(batch.known_labels().tolist())
        return Batch({**batch.inputs, **words.inputs}, batch.labels, words.movable)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """The same as of `ItemRanking`; the words of the batch are read, if there are some."""
        ranker, inputs = cast(HybridMF, model), batch.inputs
        words = {name: inputs[name] for name in ("text_ids", "text_mask") if name in inputs}
        if "negative" not in inputs:
            users = inputs["users"]
            if not words:
                return self.ranked(ranker.scores(users), batch)
            return self.ranked(
                ranker.scores_where_rewritten(users, batch.known_labels(), **words), batch
            )
        triplets = tuple(inputs[name] for name in ("users", "positive", "negative"))
        losses = ranker.losses(*triplets, **words)
        if self.model_options.l2:
            losses = losses + self.model_options.l2 * ranker.penalty(*triplets)
        return Evaluation(losses)

    def for_scoring(self, model: nn.Module) -> nn.Module:
        """The items' texts are read once, all of them."""
        return cast(HybridMF, model).for_scoring()

    def parts_of(self, model: nn.Module, batch: Batch) -> list[list[list[str]]]:
        """Name the rows of both tables, or the tokens."""
        words = self.words(model)
        return super().parts_of(model, batch) if words is None else [words.names(batch)]

    def words(self, model: nn.Module) -> Words | None:
        """Give the items' texts, if these are attacked."""
        if self.model_options.attacked == "rows":
            return None
        return cast(HybridMF, model).texts.encoder.words("text_ids", "text_mask")

    def sites(self, model: nn.Module, group: Group) -> list[Site]:
        """Rows of both tables, or the words.

        Raises:
            InputError: rows, and a group other than `token`.
        """
        if self.model_options.attacked == "rows":
            return super().sites(model, group)
        return [Site(cast(HybridMF, model).texts.words, group=group)]
