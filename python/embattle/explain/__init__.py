"""Why an attack succeeds: what of it raised the loss, words that turn a model, the loss around.

    from embattle.explain import carried, landscape
    result = attack.run(loss_fn, site, criterion=goal)
    found = carried(loss_fn, site, result.deltas)   # found.shares(): [B, parts]

`embattle audit` and `embattle explain RUN` do it for the models of a run.
"""

from __future__ import annotations

from embattle.explain.examine import Examined, explain
from embattle.explain.landscape import Landscape, landscape
from embattle.explain.path import Carried, carried
from embattle.explain.swaps import Swapped, content_words, swapped

__all__ = [
    "Carried",
    "Examined",
    "Landscape",
    "Swapped",
    "carried",
    "content_words",
    "explain",
    "landscape",
    "swapped",
]
