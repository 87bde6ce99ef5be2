"""What the sections of a recipe have in common."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from embattle.errors import need

if not typing.TYPE_CHECKING:
    need("pydantic")

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def unlike(names: Sequence[str]) -> list[str]:
    """Labels of which no two are alike: what has the name of one before it says its number."""
    found: list[str] = []
    for name in names:
        number, label = 1, name
        while label in found or (number > 1 and label in names):
            number += 1
            label = f"{name} #{number}"
        found.append(label)
    return found
