"""A model under audit: what is known of it, and what attacks achieved."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from embattle.attacks import Attack
from embattle.audit.outcomes import Attacked
from embattle.perturb.site import Site
from embattle.perturb.strength import Strength


@dataclass
class Victim:
    """A model under audit.

    Attributes:
        model: the model.
        sites: where it is attacked.
        clean: outputs without attack, [N, ...].
        right: where those are right, bool [N].
        norm, eps: the threat's ball.
        attacks: the attacks of the table at the threat's eps, from the weakest to the strongest, by
            label.
        attacked: what each attack of the table achieved, at any eps, by label.
        worst: each sample's worst over all attacks at the threat's eps, or below.
        radii: the smallest radius at which each sample fell, in multiples of the threat's eps,
            [N]; 0 where it is wrong anyway, inf where it never fell. None: not searched.
    """

    model: nn.Module
    sites: list[Site]
    clean: Tensor
    right: Tensor
    norm: str
    eps: Strength
    attacks: dict[str, Attack] = field(default_factory=dict)
    attacked: dict[str, Attacked] = field(default_factory=dict)
    worst: Attacked | None = None
    radii: Tensor | None = None

    @property
    def unattacked(self) -> Attacked:
        """The samples without attack."""
        return Attacked.clean(self.clean, self.right)

    def attacked_right(self) -> Tensor:
        """Which samples stand in the threat's ball, bool [N]."""
        return self.right if self.worst is None else self.worst.right

    def turned(self) -> Tensor:
        """Which samples any attack turned, or are wrong anyway, bool [N]."""
        found = [~self.right, *(~under.right for under in self.attacked.values())]
        if self.radii is not None:
            found.append(self.radii.isfinite())
        return torch.stack(found).any(0)
