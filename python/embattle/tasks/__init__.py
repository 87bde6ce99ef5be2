"""What the jobs know of a model and its data.

    from embattle.tasks import Account, Batch, Regression, Section, Task

A `Task` is the one protocol between a (model, data) pair and training, audit and prediction; its
`kind` says what is predicted. `Evaluator` is the part of it that attacks and audits need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embattle.data.account import Account as Account
    from embattle.data.batch import Batch as Batch
    from embattle.sections import Section as Section
    from embattle.tasks.base import Task as Task
    from embattle.tasks.clicks import ClickThrough as ClickThrough
    from embattle.tasks.evaluator import Evaluator as Evaluator
    from embattle.tasks.hybrid import HybridRanking as HybridRanking
    from embattle.tasks.item_ranking import ItemRanking as ItemRanking
    from embattle.tasks.kinds import BinaryClassification as BinaryClassification
    from embattle.tasks.kinds import Classification as Classification
    from embattle.tasks.kinds import Kind as Kind
    from embattle.tasks.kinds import MultiLabelClassification as MultiLabelClassification
    from embattle.tasks.kinds import Ranking as Ranking
    from embattle.tasks.kinds import Regression as Regression
    from embattle.tasks.llm_ranking import LLMRanking as LLMRanking
    from embattle.tasks.news import ClicksOnNews as ClicksOnNews
    from embattle.tasks.next_item import NextItem as NextItem
    from embattle.tasks.tabular import Tabular as Tabular
    from embattle.tasks.text import TextClassification as TextClassification

_HOMES = {
    "Account": "data.account",
    "Batch": "data.batch",
    "BinaryClassification": "tasks.kinds",
    "Classification": "tasks.kinds",
    "ClickThrough": "tasks.clicks",
    "Evaluator": "tasks.evaluator",
    "HybridRanking": "tasks.hybrid",
    "ItemRanking": "tasks.item_ranking",
    "Kind": "tasks.kinds",
    "LLMRanking": "tasks.llm_ranking",
    "MultiLabelClassification": "tasks.kinds",
    "ClicksOnNews": "tasks.news",
    "NextItem": "tasks.next_item",
    "Ranking": "tasks.kinds",
    "Regression": "tasks.kinds",
    "Section": "sections",
    "Tabular": "tasks.tabular",
    "Task": "tasks.base",
    "TextClassification": "tasks.text",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports lazily: a task's sections need pydantic, a kind only torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"embattle.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
