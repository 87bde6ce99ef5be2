"""What a model predicts: classes, several labels, values, or an order of items.

A kind says what is lost on a sample, what an attack on it is for, how good predictions are, and how
they are shown. Its `headline` is the share of samples on which that attack's goal does not hold:
accuracy, for classes.
"""

from __future__ import annotations

from typing import Any

from embattle.tasks.kinds.base import Kind
from embattle.tasks.kinds.classes import (
    BinaryClassification,
    Classification,
    MultiLabelClassification,
)
from embattle.tasks.kinds.ranking import Ranking
from embattle.tasks.kinds.values import Regression

__all__ = [
    "KINDS",
    "BinaryClassification",
    "Classification",
    "Kind",
    "MultiLabelClassification",
    "Ranking",
    "Regression",
    "from_json",
]

#: By the name that `Kind.to_json` gives.
KINDS: dict[str, type[Kind]] = {
    kind.__name__: kind
    for kind in (
        Classification,
        BinaryClassification,
        MultiLabelClassification,
        Regression,
        Ranking,
    )
}


def from_json(facts: dict[str, Any]) -> Kind:
    """Make the kind that `Kind.to_json` described.

    Raises:
        ValueError: it describes none.
    """
    found = dict(facts)
    kind = KINDS.get(found.pop("name", ""))
    if kind is None:
        raise ValueError(f"no kind of prediction is called {facts.get('name')!r}")
    try:
        made = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error
    return made
