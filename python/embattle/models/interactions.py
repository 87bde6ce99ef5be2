"""Which items each user has met, as sorted pairs: the edges of a graph, and masks for rankers."""

from __future__ import annotations

import torch
from torch import Tensor

from embattle import checks
from embattle.data.ratings import Ratings


class Interactions:
    """Pairs of a user and an item, each once, sorted by user and item.

    Args:
        users: [E] integers in [0, user_count).
        items: [E] integers in [0, item_count).
        user_count: users there are, with or without items.
        item_count: items there are.

    Attributes:
        users, items: the distinct pairs, [P] int64.
        counts: [user_count] items of each user.

    Raises:
        ValueError: numbers out of range, or not one item for each user.
    """

    def __init__(self, users: Tensor, items: Tensor, user_count: int, item_count: int) -> None:
        self.user_count = checks.integer("Interactions", "user_count", user_count, 1)
        self.item_count = checks.integer("Interactions", "item_count", item_count, 1)
        if users.dim() != 1 or users.shape != items.shape:
            raise ValueError(
                "Interactions: users and items must be [E], one item for each user; got "
                f"{tuple(users.shape)} and {tuple(items.shape)}"
            )
        for name, numbers, count in (("users", users, user_count), ("items", items, item_count)):
            if numbers.is_floating_point():
                raise ValueError(f"Interactions: {name} must be integers, got {numbers.dtype}")
            wrong = numbers[(numbers < 0) | (numbers >= count)]
            if len(wrong):
                raise ValueError(
                    f"Interactions: {name} must lie in [0, {count}); got {int(wrong[0])}"
                )
        pairs: Tensor = torch.unique(users.long() * item_count + items.long())
        self.users, self.items = pairs // item_count, pairs % item_count
        self.counts = self.users.bincount(minlength=user_count)
        self._first = self.counts.cumsum(0) - self.counts

    @classmethod
    def of(cls, ratings: Ratings, device: torch.device | str = "cpu") -> Interactions:
        """Take the pairs of ratings, whatever their values."""
        users, items = (torch.as_tensor(x, device=device) for x in (ratings.users, ratings.items))
        return cls(users, items, ratings.user_count, ratings.item_count)

    def __len__(self) -> int:
        return len(self.users)

    def mask(self, users: Tensor) -> Tensor:
        """Give bool `[B, item_count]`, True at the items of each of the users `[B]`."""
        count = self.counts[users]
        row = torch.arange(len(users), device=users.device).repeat_interleave(count)
        within = torch.arange(len(row), device=users.device) - (count.cumsum(0) - count)[row]
        found = torch.zeros(len(users), self.item_count, dtype=torch.bool, device=users.device)
        found[row, self.items[self._first[users][row] + within]] = True
        return found
