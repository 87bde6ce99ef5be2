"""RecBole's models: one loss for each sample, the scores of all items, and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from embattle.errors import InputError, need
from embattle.integrations.recbole_data import library, quiet

#: What a trusted process runs to turn a checkpoint of RecBole into weights that can be loaded.
CONVERT = (
    "python -c 'import sys, torch; from safetensors.torch import save_file; "
    'save_file({k: v.clone() for k, v in torch.load(sys.argv[1], weights_only=False)["state_dict"]'
    ".items()}, sys.argv[2])' BPR.pth BPR.safetensors"
)

# Where models keep what they computed, to score by it later; they begin as None.
_KEPT = {"restore_user_e", "restore_item_e", "i_embedding"}


def losses_of(model: nn.Module, interaction: Any) -> tuple[Tensor, Tensor]:
    """Run the model's own `calculate_loss`, and tell what each sample contributes.

    RecBole's losses are means over a batch. The criterion inside (BPR, binary or softmax
    cross-entropy) is watched, and its terms are taken one by one. What else is in the loss, such as
    the norm of the embeddings, belongs to the batch: in training mode it is added to each term, so
    that the mean of the losses is the model's own loss, and its gradient the model's own. In
    evaluation mode the losses are the terms alone.

    Args:
        model: the model.
        interaction: RecBole's batch of B samples.

    Returns:
        Losses [B], and what the criterion was given first: logits [B] of a binary decision,
        logits [B, N] of items, or scores [B] of the items met.

    Raises:
        InputError: the loss is no mean of such terms, one for each sample.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(module: Any, given: tuple[Any, ...], value: Any) -> None:
        terms = _terms(module)
        if terms is not None:
            seen.append((terms(*given), value, given[0]))

    handles = [m.register_forward_hook(watch) for m in model.modules() if _terms(m) is not None]
    try:
        with uncached(model):
            found: Any = model.calculate_loss(interaction)  # type: ignore[operator]
    except (KeyError, TypeError) as error:
        raise _uncovered(model, f"its loss cannot be had of a batch ({error!r})") from error
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != 1:
        raise _uncovered(model, f"its loss has {len(seen)} known criteria; it must have one")
    terms, value, first = seen[0]
    terms = terms.reshape(-1)
    if len(terms) != len(interaction):
        raise _uncovered(
            model, f"its criterion has {len(terms)} terms for {len(interaction)} samples"
        )
    mean, its = terms.mean(), value.reshape(())
    # A loss that is no number is for the training to notice.
    if not torch.allclose(mean.detach(), its.detach(), rtol=1e-4, atol=1e-6, equal_nan=True):
        raise _uncovered(model, "its criterion is no mean over the samples")
    total: Any = sum(found) if isinstance(found, tuple) else found
    if value.requires_grad:
        (weight,) = torch.autograd.grad(
            total.sum(), value, retain_graph=True, materialize_grads=True
        )
        if not bool((weight == 1).all()):
            raise _uncovered(model, f"its criterion has weight {float(weight):g} in its loss")
    return (terms + (total.reshape(()) - mean) if model.training else terms), first


def scores_of(model: nn.Module, interaction: Any, items: Any) -> Tensor:
    """Give the scores of all items, [B, N], as RecBole's evaluation has them, with a graph.

    A sigmoid at their end is left out: it changes no order, and has no gradient where it is 0 or 1.

    Args:
        model: the model.
        interaction: RecBole's batch of B users or histories.
        items: its batch of all N items, with their features.
    """
    ranker: Any = model
    with uncached(model), _LastSigmoid() as last:
        scores: Tensor
        try:
            scores = ranker.full_sort_predict(interaction)
        except NotImplementedError:
            pairs = interaction.repeat_interleave(len(items))
            pairs.update(items.repeat(len(interaction)))
            scores = ranker.predict(pairs)
    if last.value is not None and last.value.data_ptr() == scores.data_ptr():
        scores = last.given
    if scores.numel() != len(interaction) * len(items):
        raise _uncovered(model, f"it scores {scores.numel()} items for {len(interaction)} samples")
    return scores.reshape(len(interaction), len(items))


class _LastSigmoid(TorchFunctionMode):
    """Remembers the last sigmoid: what it was given, and its value."""

    given: Any = None
    value: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.sigmoid, Tensor.sigmoid):
            self.given, self.value = args[0], found
        return found


@contextlib.contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Forget what a model keeps of a pass.

    Graph models keep the vectors of all users and items, DMF those of the items, and would score by
    them whatever is perturbed afterwards.
    """

    def forget() -> None:
        for name in _KEPT & vars(model).keys():
            setattr(model, name, None)

    forget()
    try:
        yield
    finally:
        forget()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's weights: a safetensors file, or what torch loads without running code.

    Raises:
        InputError: the file cannot be read so, or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            weights = need("safetensors.torch").load_file(path)
        else:
            with quiet():
                weights = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:
        # The file may hold anything.
        raise InputError(
            f"{path} cannot be loaded without running code that it may hold: RecBole's checkpoints "
            "are pickles. If you trust it, save its weights as safetensors, in RecBole's own "
            f"environment, and name these: {CONVERT}"
        ) from error
    try:
        model.load_state_dict(weights.get("state_dict", weights))
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} does not fit {type(model).__name__} on this data ({reason}); give the "
            "configuration and the data that it was trained with"
        ) from error


def _terms(module: Any) -> Callable[..., Tensor] | None:
    """What a criterion's mean is over; None: it is none that is known."""
    if isinstance(module, nn.BCEWithLogitsLoss):
        return lambda x, y: F.binary_cross_entropy_with_logits(
            x, y, module.weight, reduction="none", pos_weight=module.pos_weight
        )
    if isinstance(module, nn.CrossEntropyLoss):
        return lambda x, y: F.cross_entropy(
            x, y, module.weight, reduction="none", label_smoothing=module.label_smoothing
        )
    if isinstance(module, library("recbole.model.loss").BPRLoss):
        return lambda pos, neg: -torch.log(module.gamma + torch.sigmoid(pos - neg))
    return None


def _uncovered(model: nn.Module, why: str) -> InputError:
    return InputError(
        f"RecBole's {type(model).__name__} is not served: {why}; docs/integrations.md lists the "
        "models that are"
    )
