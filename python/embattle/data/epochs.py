"""What batch samplers share: epochs, a place in one, and going on from there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batches of positions of examples, epoch by epoch, for `DataLoader(batch_sampler=...)`.

    Attributes:
        epoch: that the next iteration gives, from 0; set by `set_epoch`.
        position: batches of it that have been given already.
    """

    def __init__(self) -> None:
        self.epoch = self.position = 0

    @abstractmethod
    def batches(self, epoch: int) -> list[list[int]]:
        """Give all batches of an epoch, in its order; the same for the same epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and start at its beginning."""
        self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        """The epoch's batches from `position` on; at its end, the next epoch is chosen."""
        for batch in self.batches(self.epoch)[self.position :]:
            self.position += 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Give where the order stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler of the same arguments stood."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
