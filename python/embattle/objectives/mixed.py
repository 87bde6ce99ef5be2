"""Clean plus adversarial loss, and adversarial loss alone."""

from __future__ import annotations

from torch import Tensor

from embattle.objectives.batch import Batch


def mixed(batch: Batch) -> Tensor:
    """Compute `mean L + lam * mean L_adv` (Goodfellow et al., 2015, up to scale; APR, 2018)."""
    loss, clean, first = batch.clean_and_first_step()
    if batch.lam == 0:
        return loss
    batch.ascend(first)
    adversarial = batch.perturbed()
    weights = batch.weights(adversarial, clean)
    return loss + batch.lam * batch.mean(batch.losses(adversarial), weights)


def adversarial(batch: Batch) -> Tensor:
    """Compute `mean L_adv` alone (Madry et al., ICLR 2018)."""
    batch.ascend()
    evaluation = batch.perturbed()
    return batch.mean(batch.losses(evaluation), batch.weights(evaluation, None))


def apr(batch: Batch) -> Tensor:
    """Adversarial personalised ranking (He et al., SIGIR 2018, eq. 7-9): `mixed` on table rows.

    One delta per distinct row of the batch, `eps * g / ||g||` with g summed over the row's
    occurrences: `FGM(eps=0.5)` on sites of scope "row", `lam=1`, a BPR loss. Other rows are not
    perturbed, and cost nothing; the authors' code holds a delta for the whole table, as
    `Site(..., scope="row", rows="table")` and `Site.weight(table)` do: the same numbers, at the
    table's cost.
    """
    for site in batch.attacked.sites:
        if site.scope == "output" or site.group != "token":
            raise ValueError(
                f"form 'apr' perturbs table rows: Site(..., scope='row') or Site.weight(table), "
                f"not {site!r}; elsewhere the same loss is form 'mixed'"
            )
    return mixed(batch)
