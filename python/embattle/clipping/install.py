"""Which stand-in each module of a model gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from embattle.clipping.attention import AttentionLayer
from embattle.clipping.conv import ConvLayer
from embattle.clipping.embedding import DerivedEmbeddingLayer, EmbeddingBagLayer, EmbeddingLayer
from embattle.clipping.functional import BroadcastParameterLayer, FunctionalLayer
from embattle.clipping.layer import Layer
from embattle.clipping.linear import LinearLayer, TransposedLinearLayer
from embattle.clipping.norm import LayerNormLayer, RMSNormLayer
from embattle.clipping.recurrent import RecurrentLayer
from embattle.clipping.tape import Tape

_KINDS: tuple[type[Layer], ...] = (
    LinearLayer,
    EmbeddingLayer,
    DerivedEmbeddingLayer,
    EmbeddingBagLayer,
    LayerNormLayer,
    RMSNormLayer,
    ConvLayer,
    AttentionLayer,
    RecurrentLayer,
    TransposedLinearLayer,
)


def _kind(module: nn.Module, own: set[str], batch_dim: int) -> type[Layer]:
    plain = "forward" not in vars(module) and not hasattr(module, "parametrizations")
    if plain:
        for kind in _KINDS:
            if kind.accepts(module) and _complete(kind, module):
                return kind
    if batch_dim == 0 and all(
        p is None or not p.requires_grad or (p.dim() > 1 and p.shape[0] == 1)
        for p in module._parameters.values()
    ):
        return BroadcastParameterLayer
    return FunctionalLayer


def _complete(kind: type[Layer], module: nn.Module) -> bool:
    """Whether the module's parameters are those that the stand-in reads."""
    if kind in (AttentionLayer, RecurrentLayer):
        return True
    return module._parameters.get("weight") is not None and module._parameters.keys() <= {
        "weight",
        "bias",
    }


def _holds_parameters(module: nn.Module) -> bool:
    """Whether module is a mere container, whose parameters the module around it uses."""
    return isinstance(module, (nn.ParameterList, nn.ParameterDict)) and any(
        p.requires_grad for p in module.parameters()
    )


def _refuse_batch_statistics(module: nn.Module, name: str) -> None:
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return
    if module.training or not module.track_running_stats:
        raise ValueError(
            f"PerSampleClipper: layer '{name}' ({type(module).__name__}) normalises over the "
            "batch, so there are no per-sample gradients; use LayerNorm, or put it in eval mode"
        )


def stand_ins(
    model: nn.Module,
    tape: Tape,
    batch_dims: Mapping[str, int],
    broadcast: Iterable[str],
) -> list[tuple[nn.Module, Layer]]:
    """The modules of model with parameters to train, and what stands in for their forward.

    Args:
        model: the model.
        tape: the clipper's state.
        batch_dims: module name -> where the samples are in its inputs; holds for what is inside of
            it too, the longest name wins; "" for the whole model.
        broadcast: names of modules whose input is the same for all samples.
    """
    found: list[tuple[nn.Module, Layer]] = []
    spread = set(broadcast)
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        _refuse_batch_statistics(module, name)
        if not any(p.requires_grad for p in module.parameters()):
            return
        own = {n for n, p in module._parameters.items() if p is not None and p.requires_grad}
        batch_dim = _batch_dim(batch_dims, name)
        attention = isinstance(module, nn.MultiheadAttention)
        parametrized = hasattr(module, "parametrizations")
        if any(_holds_parameters(child) for child in module.children()):
            found.append((module, FunctionalLayer(module, tape, name, batch_dim, name in spread)))
            return
        if own or attention or parametrized:
            kind = _kind(module, own, batch_dim)
            found.append((module, kind(module, tape, name, batch_dim, name in spread)))
            if kind is not BroadcastParameterLayer:
                return
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return found


def _batch_dim(batch_dims: Mapping[str, int], name: str) -> int:
    best, found = -1, 0
    for prefix, dim in batch_dims.items():
        inside = not prefix or name == prefix or name.startswith(prefix + ".")
        if inside and len(prefix) > best:
            best, found = len(prefix), dim
    return found
