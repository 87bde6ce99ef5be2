"""Which items each user has met, as sorted pairs: masks, look-ups and negatives for rankers."""

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
        # How many items a user has not met before each of those she has; sorted, as pairs are.
        place = torch.arange(len(pairs), device=pairs.device) - self._first[self.users]
        self._gaps = self.users * (item_count + 1) + self.items - place

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

    def negatives(self, users: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw for each user one item that she has not met, all of them alike.

        Args:
            users: [B] int64.
            generator: source of the random numbers; torch's of the CPU by default.

        Returns:
            Items, [B] int64.

        Raises:
            ValueError: a user has met all items.
        """
        free = self.item_count - self.counts[users]
        if bool((free == 0).any()):
            full = int(users[free == 0][0])
            raise ValueError(
                f"Interactions.negatives: user {full} has met all {self.item_count} items; leave "
                "her out of training"
            )
        device = "cpu" if generator is None else generator.device
        share = torch.rand(len(users), generator=generator, device=device, dtype=torch.float64)
        nth = (share.to(free.device) * free).long()
        # The nth item not met comes after as many of those met as have at most nth before them.
        met = torch.searchsorted(self._gaps, users * (self.item_count + 1) + nth, right=True)
        items: Tensor = nth + met - self._first[users]
        return items
