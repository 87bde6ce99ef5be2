"""What an audit explains."""

from __future__ import annotations

from pydantic import PositiveInt

from embattle.sections import Section


class ExplainRecipe(Section):
    """Explanations in the report, `explanations.json`, and pictures beside it.

    Attributes:
        samples: how many of the worst samples are explained one by one, and over how many, evenly
            drawn from the part, averages are.
        landscape: whether the loss is evaluated on a plane around the clean embeddings.
        swaps: whether words are exchanged in the worst texts, where the model reads texts.
    """

    samples: PositiveInt = 8
    landscape: bool = True
    swaps: bool = True
