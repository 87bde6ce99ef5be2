"""TorchRec's containers, by stand-ins with its signatures: a model's outputs feature by feature.

Its wheels need a GPU's libraries; what the package asks of them is in `perturb/outputs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import embattle as eb
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree


class KeyedTensor:
    """Features side by side in one dim: `torchrec.KeyedTensor`."""

    def __init__(
        self,
        keys: list[str],
        length_per_key: list[int],
        values: Tensor,
        key_dim: int = 1,
        offset_per_key: list[int] | None = None,
        index_per_key: dict[str, int] | None = None,
    ) -> None:
        self._keys, self._lengths, self._values, self._dim = keys, length_per_key, values, key_dim

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Tensor:
        return self._values

    def key_dim(self) -> int:
        return self._dim

    def length_per_key(self) -> list[int]:
        return self._lengths

    def __getitem__(self, key: str) -> Tensor:
        place = self._keys.index(key)
        return self._values.narrow(self._dim, sum(self._lengths[:place]), self._lengths[place])


class JaggedTensor:
    """Packed rows: `torchrec.JaggedTensor`, whose lengths and offsets are int32 as a rule."""

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        assert lengths is not None or offsets is not None
        self._values, self._weights, self._lengths, self._offsets = (
            values,
            weights,
            lengths,
            offsets,
        )

    def values(self) -> Tensor:
        return self._values

    def weights(self) -> Tensor:
        assert self._weights is not None
        return self._weights

    def weights_or_none(self) -> Tensor | None:
        return self._weights

    def lengths(self) -> Tensor:
        return self._offsets.diff() if self._lengths is None else self._lengths

    def offsets(self) -> Tensor:
        if self._offsets is not None:
            return self._offsets
        return nn.functional.pad(self._lengths.cumsum(0, dtype=torch.int32), (1, 0))


class KeyedJaggedTensor(JaggedTensor):
    """A batch of indices: for each feature in turn the lists of all samples."""

    def __init__(self, keys: list[str], values: Tensor, lengths: Tensor) -> None:
        super().__init__(values, lengths=lengths)
        self._keys = keys

    def __getitem__(self, key: str) -> JaggedTensor:
        place = self._keys.index(key)
        batch = len(self._lengths) // len(self._keys)
        lengths = self._lengths[place * batch : (place + 1) * batch]
        start = int(self._lengths[: place * batch].sum())
        return JaggedTensor(self._values[start : start + int(lengths.sum())], lengths=lengths)


_pytree.register_pytree_node(
    KeyedJaggedTensor,
    lambda one: ([one._values, one._lengths], one._keys),
    lambda values, keys: KeyedJaggedTensor(keys, *values),
)


class EmbeddingBagCollection(nn.Module):
    """Sums of rows: gives a KeyedTensor."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {key: nn.EmbeddingBag(20, width, mode="sum") for key, width in widths.items()}
        )

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        found = [
            table(features[key].values(), features[key].offsets()[:-1].long())
            for key, table in self.tables.items()
        ]
        return KeyedTensor(list(self.tables), [v.shape[1] for v in found], torch.cat(found, dim=1))


class EmbeddingCollection(nn.Module):
    """Rows one by one: gives a dict of JaggedTensors."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.keys = keys

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        found = {}
        for key in self.keys:
            one = features[key]
            values = self.table(one.values())
            weights = torch.ones(len(values))
            found[key] = JaggedTensor(values, weights=weights, lengths=one.lengths())
        return found


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = EmbeddingBagCollection({"user": 3, "item": 5})
        self.head = nn.Linear(8, 2)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.head(self.embeddings(features).values().tanh())


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = EmbeddingCollection(["clicked", "bought"])
        self.head = nn.Linear(8, 2)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.embeddings(features)
        sums = []
        for key in ("clicked", "bought"):
            one = found[key]
            rows = one.values().tanh() * one.weights()[:, None]
            sample = torch.repeat_interleave(torch.arange(3), one.lengths().long())
            sums.append(torch.zeros(3, 4, dtype=rows.dtype).index_add(0, sample, rows))
        return self.head(torch.cat(sums, dim=1))


LABELS = [0, 1, 0]


def batch(keys: list[str], seed: int = 0) -> KeyedJaggedTensor:
    """Two features of three samples; one list is empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([2, 0, 3, 1, 1, 2], dtype=torch.int32)
    return KeyedJaggedTensor(keys, torch.randint(0, 20, (9,), generator=g), lengths)


def loss_of(model: nn.Module, features: KeyedJaggedTensor) -> Callable[[], Tensor]:
    labels = torch.tensor(LABELS)
    return lambda: eb.losses.cross_entropy(model(features), labels)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_keyed_tensor_has_a_delta_for_each_feature(norm: Any) -> None:
    model = made(Pooled)
    loss_fn = loss_of(model, batch(["user", "item"]))
    result = eb.PGD(eps=0.3, norm=norm, steps=3).run(loss_fn, eb.Site(model.embeddings))
    assert [tuple(delta.shape) for delta in result.deltas] == [(3, 3), (3, 5)]
    assert all((norms - 0.3).abs().max() < 1e-5 for norms in result.norms)
    # The reference: the deltas, side by side, on the whole tensor.
    handle = model.embeddings.register_forward_hook(
        lambda m, a, out: KeyedTensor(
            out.keys(), out.length_per_key(), out.values() + torch.cat(result.deltas, 1)
        )
    )
    assert torch.allclose(loss_fn(), result.losses)
    handle.remove()
    assert (result.losses > result.clean_losses).all()


def test_a_keyed_tensor_has_a_mask_for_each_feature() -> None:
    model = made(Pooled)
    loss_fn = loss_of(model, batch(["user", "item"]))
    kept = {"user": torch.tensor([True, False, True]), "item": torch.tensor([False, True, True])}
    result = eb.PGD(eps=0.3, steps=2).run(
        loss_fn, eb.Site(model.embeddings), mask=lambda call: kept[call.key]
    )
    for delta, mask in zip(result.deltas, kept.values(), strict=True):
        assert torch.equal(delta.any(1), mask)


def test_one_feature_alone() -> None:
    model = made(Pooled)
    loss_fn = loss_of(model, batch(["user", "item"]))
    result = eb.PGD(eps=0.3, steps=2).run(loss_fn, eb.Site(model.embeddings, key="item"))
    assert result.delta.shape == (3, 5)
    values: list[Tensor] = []
    with result.applied():
        handle = model.embeddings.register_forward_hook(
            lambda m, a, out: values.append(out["user"])
        )
        losses = loss_fn()
        handle.remove()
    assert torch.allclose(losses, result.losses)
    assert torch.equal(values[0], model.embeddings(batch(["user", "item"]))["user"])
    with pytest.raises(KeyError, match=r"KeyedTensor of 'user', 'item', without 'price'"):
        eb.FGM(eps=0.1).run(loss_fn, eb.Site(model.embeddings, key="price"))
    with pytest.raises(KeyError, match="'user' was given, and the module returned one Tensor"):
        eb.FGM(eps=0.1).run(loss_fn, eb.Site(model.embeddings.tables["user"], key="user"))


def test_lists_of_rows_have_a_ball_for_each_sample_and_feature() -> None:
    model = made(Sequences)
    features = batch(["clicked", "bought"])
    result = eb.PGD(eps=0.3, steps=3).run(loss_of(model, features), eb.Site(model.embeddings))
    assert [tuple(delta.shape) for delta in result.deltas] == [(5, 4), (4, 4)]
    for delta, lengths in zip(result.deltas, ([2, 0, 3], [1, 1, 2]), strict=True):
        for rows in torch.split(delta, lengths):
            assert rows.norm().item() == pytest.approx(0.3 if len(rows) else 0.0, abs=1e-5)
    assert (result.losses > result.clean_losses).all()


def test_lists_of_rows_have_a_mask_for_each_feature() -> None:
    model = made(Sequences)
    features = batch(["clicked", "bought"])
    kept = {"clicked": torch.tensor([True, False, True, True, False]), "bought": None}
    result = eb.PGD(eps=0.3, steps=2).run(
        loss_of(model, features), eb.Site(model.embeddings), mask=lambda call: kept[call.key]
    )
    assert torch.equal(result.deltas[0].any(1), kept["clicked"])
    assert result.deltas[1].any(1).all()


def test_another_batch_of_the_same_lengths_is_refused() -> None:
    model = made(Sequences)
    features, other = batch(["clicked", "bought"]), batch(["clicked", "bought"], seed=1)
    result = eb.FGM(eps=0.3).run(loss_of(model, features), eb.Site(model.embeddings))
    with result.applied():
        model(features)
        with pytest.raises(RuntimeError, match="other inputs than those of the attacked batch"):
            model(other)


@pytest.mark.parametrize("kind", [Pooled, Sequences])
def test_training(kind: type[nn.Module]) -> None:
    """An early backward pass gives the tables the gradients of a plain one."""
    found = []
    for early in (False, True):
        model = made(kind)
        keys = ["user", "item"] if kind is Pooled else ["clicked", "bought"]
        objective = eb.AdversarialObjective(
            eb.PGD(eps=0.3, steps=2), eb.Site(model.embeddings), early_backward=early
        )
        objective(loss_of(model, batch(keys)))[0].backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
