"""What the sections of a recipe have in common."""

from __future__ import annotations

import typing

from embattle.errors import need

if not typing.TYPE_CHECKING:
    need("pydantic")

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
