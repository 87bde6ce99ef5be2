"""Adversarial personalised ranking: BPR on matrix factors, hardened by APR.

python examples/adversarial_ranking.py
"""

from __future__ import annotations

from functools import partial

import embattle as eb
import torch
from torch import Tensor, nn


class Factors(nn.Module):
    """Users and items as vectors."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, 16), nn.Embedding(items, 16)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)


def main(steps: int = 300) -> dict[str, tuple[float, float]]:
    """Train both; returns the share of triplets ranked right, clean and under the row attack."""
    torch.manual_seed(0)
    users, items = 50, 80
    taste = torch.randn(users, 4) @ torch.randn(4, items)
    found: dict[str, tuple[float, float]] = {}
    for name in ("bpr", "apr"):
        torch.manual_seed(1)
        model = Factors(users, items)
        sites = [eb.Site(model.user, scope="row"), eb.Site(model.item, scope="row")]
        objective = eb.AdversarialObjective(
            eb.FGM(eps=0.5),
            sites,
            form="apr",
            lam=1.0 if name == "apr" else 0.0,
            eps_schedule=eb.schedules.WarmUp(steps // 2),
        )
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        monitor = eb.Monitor(sites=sites)
        monitor.check_tables()

        def draw(count: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
            u = torch.randint(0, users, (count,))
            a, b = torch.randint(0, items, (2, count))
            likes = taste[u, a] > taste[u, b]
            return u, torch.where(likes, a, b), torch.where(likes, b, a)

        def losses(batch: tuple[Tensor, Tensor, Tensor], model: Factors = model) -> eb.Evaluation:
            u, positive, negative = (
                table(i)
                for table, i in zip((model.user, model.item, model.item), batch, strict=True)
            )
            margin = (u * positive).sum(1) - (u * negative).sum(1)
            return eb.Evaluation(eb.losses.bpr(margin, torch.zeros_like(margin)), margin)

        seen = draw()  # all that is known of the users: few enough to overfit
        for _ in range(steps):
            some = torch.randint(0, len(seen[0]), (512,))
            batch = (seen[0][some], seen[1][some], seen[2][some])
            loss, _ = objective(partial(losses, batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        batch = draw()
        attack = eb.PGD(eps=0.5, steps=10)
        size = float(model.item.weight.detach().norm(dim=1).mean())
        # A margin is the logit of a binary decision, whose right answer is always 1.
        goal = eb.Misclassify(torch.ones(len(batch[0]), dtype=torch.long))
        result = attack.run(partial(losses, batch), sites, criterion=goal)
        clean, robust = float(result.clean_accuracy), float(result.robust_accuracy)
        found[name] = (clean, robust)
        # At a fixed eps larger vectors alone look robust: print how large they are.
        print(
            f"{name}: ranked right {clean:.3f}, under the row attack {robust:.3f}; "
            f"mean item norm {size:.2f}"
        )
    return found


if __name__ == "__main__":
    main()
