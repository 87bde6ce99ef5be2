"""Modules that look the same table up."""

from __future__ import annotations

from typing import Any

from torch import nn

from embattle.perturb.calls import is_lookup


def with_tied(modules: list[nn.Module], model: nn.Module | None) -> list[nn.Module]:
    """Check the modules of scope "row", and add those of the model that look the same table up."""
    for module in modules:
        if not is_lookup(module):
            raise TypeError(
                f"Site: scope='row' needs an nn.Embedding or nn.EmbeddingBag, got "
                f"{type(module).__name__}; use scope='output'"
            )
        _refuse_scaled_rows(module)
    weight = modules[0].weight
    if any(not shares(module, weight) for module in modules):
        raise ValueError("Site: scope='row' needs modules of one table; make a site of each")
    others = [] if model is None else [m for m in model.modules() if is_lookup(m)]
    for module in others:
        if shares(module, weight) and not any(module is one for one in modules):
            _refuse_scaled_rows(module)
            modules = [*modules, module]
    return modules


def _refuse_scaled_rows(module: nn.Module) -> None:
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        raise ValueError("Site: scope='row' needs a bag of mode 'sum' or 'mean', got 'max'")
    if type(module) not in (nn.Embedding, nn.EmbeddingBag) or module.max_norm is not None:
        raise TypeError(
            f"Site: scope='row' adds deltas to the rows that a plain look-up gives; "
            f"{type(module).__name__} may scale or renormalise its rows. Perturb the table "
            "itself, Site.weight(module), or what the module returns, scope='output'"
        )


def shares(module: nn.Module, weight: Any) -> bool:
    """Return whether a module has this very parameter as its weight."""
    return weight is not None and getattr(module, "weight", None) is weight
