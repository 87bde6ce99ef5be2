"""Between the layers' backward passes and the clipper: who listens, where the samples are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from embattle.clipping.combine import Use

AddUse = Callable[[Parameter, Use], None]


class Listener:
    """Takes in the uses of one backward pass.

    Attributes:
        samples: B, the number of losses.
        uses: parameter -> its uses, in the order of the backward pass.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.uses: dict[Parameter, list[Use]] = {}

    def add(self, parameter: Parameter, use: Use, name: str) -> None:
        """Keeps a use of parameter; name is the layer's."""
        del name
        self.uses.setdefault(parameter, []).append(use)

    def layout(self, x: Tensor, batch_dim: int, features: int, name: str) -> Tensor:
        """Brings the samples to the front: [B, T, *features].

        Args:
            x: what a layer saw; all but its last dims are batch, positions, ...
            batch_dim: where the samples are; the first dim where there are not so many.
            features: how many of the last dims are the layer's own.
            name: the layer, for the error.

        Raises:
            ValueError: x does not hold the same number of rows for every sample.
        """
        outer = x.dim() - features
        if outer == 1 and x.shape[0] == self.samples:
            return x.unsqueeze(1)
        if outer == 0:
            raise ValueError(
                f"PerSampleClipper: layer '{name}' got a tensor of shape {tuple(x.shape)}, which "
                f"has no "
                "batch dimension; give the layer one row per sample"
            )
        if batch_dim:
            x = x.movedim(min(batch_dim, outer - 1), 0)
            outer = x.dim() - features
        if x.shape[0] != self.samples:
            if not len(x) or len(x) % self.samples:
                raise ValueError(
                    f"PerSampleClipper: layer '{name}' saw {len(x)} rows in its batch dimension "
                    f"for "
                    f"{self.samples} losses; set batch_dim if the samples are in another "
                    f"dimension, or "
                    "name the layer in broadcast if its input is the same for all samples"
                )
        elif outer == 1:
            return x.unsqueeze(1)
        elif outer == 2:
            return x
        return x.reshape(self.samples, -1, *x.shape[x.dim() - features :])


class IsolationCheck(Listener):
    """Listens to the backward pass of the second half of the losses only.

    The first half of the rows of every layer must then have zero gradient. If not, the losses are
    not those of single samples (batch statistics, in-batch negatives), or the samples are not where
    they are taken to be.
    """

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self._layers: list[str] = []
        self._leaks: list[Tensor] = []

    def add(self, parameter: Parameter, use: Use, name: str) -> None:
        """Looks at the first half of the samples' gradients; keeps nothing else."""
        half = use.grad[: self.samples // 2]
        self._layers.append(name)
        self._leaks.append((half.isfinite() & (half != 0)).any())

    def verify(self) -> None:
        """Raises:
        ValueError: naming the first layer in which one sample's loss reaches another sample's rows.
        """
        if not self._leaks:
            return
        for name, leak in zip(self._layers, torch.stack(self._leaks).tolist(), strict=True):
            if leak:
                raise ValueError(
                    f"PerSampleClipper: in layer '{name}' the losses of some samples depend on the "
                    f"rows "
                    "of other samples, so per-sample gradients do not exist as assumed. Batch "
                    "statistics "
                    "or in-batch negatives couple samples; samples in another dimension need "
                    "batch_dim; "
                    "a layer whose input is the same for all samples (positions) needs "
                    "broadcast=[name]"
                )


class Tape:
    """State shared by all the layers of a clipped model.

    Attributes:
        listener: who records the running backward pass; None when nobody does, as in an attack.
        batch_size: samples of the running forward pass, if known.
        anchor: makes the outputs of layers part of the graph even where their inputs are not.
        check: whether what runs through torch.func is compared with the module itself, once.
        inside: depth of layers being run through torch.func, whose own layers are left alone.
        ran_without_grad: whether a layer ran where no graph was built.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.batch_size: int | None = None
        self.anchor = torch.zeros((), requires_grad=True)
        self.inside = 0
        self.check = True
        self.ran_without_grad = False

    def spread(
        self, x: Tensor, batch_dim: int, features: int, *, declared: bool, name: str
    ) -> Tensor:
        """Gives every sample its own row of an input that is the same for all samples.

        Args:
            x: a layer's input; the samples are in batch_dim.
            batch_dim: where the samples are.
            features: how many of the last dims are the layer's own.
            declared: whether the user named the layer as broadcast: x then has no batch dimension
                at all if the size there is not 1.
            name: the layer, for the error.

        Raises:
            RuntimeError: the number of samples is needed and unknown.
        """
        outer = x.dim() - features
        if outer == 0:
            return x
        dim = min(batch_dim, outer - 1)
        if x.shape[dim] != 1 and not declared:
            return x
        if self.batch_size is None:
            if not declared:
                return x
            raise RuntimeError(
                f"PerSampleClipper: the number of samples is not known in layer '{name}'; call the "
                f"model "
                "itself, not only parts of it, or use clipper.expect(batch_size) before"
            )
        if x.shape[dim] != 1:
            if x.shape[dim] == self.batch_size and outer > 1:
                return x
            x, dim = x.unsqueeze(batch_dim), batch_dim
        sizes = list(x.shape)
        sizes[dim] = self.batch_size
        return x.expand(sizes)
