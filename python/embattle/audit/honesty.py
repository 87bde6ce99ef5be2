"""Checks on the attacks themselves: robustness that rests on a weak attack is none.

Athalye, Carlini and Wagner (ICML 2018, section 3.1) list how a defence that only hides its
gradients gives itself away; Carlini et al. (On evaluating adversarial robustness, 2019, section 5)
what an evaluation has to show; Pintor et al. (Indicators of attack failure, NeurIPS 2022) how an
attack fails without notice; Kurakin et al. (ICLR 2017, section 4.2) how labels leak through one
step of an attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor, nn

from embattle.attacks import Attack
from embattle.audit.evaluation import (
    Sites,
    device_of,
    evaluate,
    examined,
    run_attack,
    sweep,
)
from embattle.audit.given import Given
from embattle.audit.outcomes import Attacked
from embattle.audit.probes import GradientProbe
from embattle.data.batch import Batch
from embattle.tasks.evaluator import Evaluator

# Samples without a gradient, or with a wrong one, that are no sign yet; and those with a loss of 0,
# which a model that is sure has too.
_FEW, _MANY = 0.1, 0.5
# Samples that a late step, or an attack without gradients, may still turn.
_LATE = 0.02
# By which share of the samples the figures of two attacks may differ by chance, one at least.
_CHANCE = 0.005


def chance(count: int) -> float:
    """The share of `count` samples by which the figures of two attacks may differ by chance."""
    return max(1 / max(1, count), _CHANCE)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what is demanded.
        passed: whether it holds.
        detail: the figures it was decided by.
        reason: what it means if it does not.
    """

    name: str
    passed: bool
    detail: str
    reason: str = ""


def order_checks(
    title: str,
    accuracies: Mapping[str, float],
    *,
    noise: Sequence[str],
    gradient: Sequence[str],
    measure: str = "accuracy",
    slack: float = 0.0,
) -> list[Check]:
    """Noise must not beat the strongest gradient attack, nor fewer steps more steps.

    Args:
        title: the model's name.
        accuracies: accuracy under each attack, or what corresponds, by name.
        noise: names of the attacks without gradients.
        gradient: names of the gradient attacks, from the weakest to the strongest.
        measure: what the accuracies are called.
        slack: by how much an accuracy may be higher all the same: random starts differ by a sample
            or two.

    Returns:
        The checks that these attacks allow.
    """
    checks = []
    if gradient and noise:
        best, random = gradient[-1], min(noise, key=lambda name: accuracies[name])
        checks.append(
            Check(
                f"{title}: random noise does not beat {best}",
                accuracies[best] <= accuracies[random] + slack,
                f"{measure} {accuracies[random]:.3f} under {random}, "
                f"{accuracies[best]:.3f} under {best}",
                "A gradient that leads to less than chance finds is hidden or wrong.",
            )
        )
    for weak, strong in pairwise(gradient):
        checks.append(
            Check(
                f"{title}: {strong} is no weaker than {weak}",
                accuracies[strong] <= accuracies[weak] + slack,
                f"{measure} {accuracies[weak]:.3f} under {weak}, "
                f"{accuracies[strong]:.3f} under {strong}",
                "More steps can only find more; where they find less, gradients mislead.",
            )
        )
    return checks


def eps_check(title: str, label: str, inside: Tensor, larger: Tensor, factor: float) -> Check:
    """An attack in a larger ball, which holds the smaller one, must turn as many samples at least.

    Args:
        title: the model's name.
        label: the attack's.
        inside, larger: which samples stand in the ball, and in one `factor` times as large,
            bool [N] each.
        factor: more than 1.
    """
    few, many = int(larger.sum()), int(inside.sum())
    return Check(
        f"{title}: {label} is no weaker in a larger ball",
        few <= many,
        f"{many} of {len(inside)} stand at eps, {few} at {factor:g} eps",
        "The larger ball holds every perturbation of the smaller; an attack that finds less there "
        "is led astray by the model's gradients.",
    )


def gradient_free_check(title: str, label: str, under: Attacked, by: str = "square") -> Check:
    """An attack without gradients must not turn what gradient attacks could not.

    Args:
        title: the model's name.
        label: the ensemble's.
        under: what it achieved.
        by: the name of its attack without gradients.
    """
    alone, total = sum(name == by for name in under.by), len(under.right)
    return Check(
        f"{title}: an attack without gradients turns no more than gradients do",
        alone <= max(1, _LATE * total),
        f"{alone} of {total} turned by {by} alone, in {label}",
        "Whoever sees the gradients knows more; if a search without them wins, they are hidden.",
    )


def unbounded_check(
    title: str,
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sites,
    attacks: Sequence[Attack],
    *,
    turned: Tensor | None = None,
    evaluator: Evaluator | None = None,
) -> Check:
    """Attacks up to a ball so large that it bounds nothing must fool every sample.

    Several sizes are tried: from afar a model may be so sure that it has no gradient any more.

    Args:
        title: the model's name.
        model, batches, sites, evaluator: see `embattle.audit.evaluate`.
        attacks: from the smallest ball to the largest, whose radius is far beyond the size of the
            embeddings.
        turned: which samples are known to be turned by some perturbation, bool [N].

    Returns:
        The check.
    """
    # Nearly all fall at once: the whole attacks are for those that do not.
    tries = [*(replace(attack, steps=min(attack.steps, 2)) for attack in attacks), *attacks]
    total = sum(len(batch) for batch in batches)
    shares = sweep(model, batches, sites, tries, fallen=[turned], evaluator=evaluator)
    left = round(shares[-1] * total)
    return Check(
        f"{title}: an attack without a bound fools every example",
        left == 0,
        f"{total - left} of {total} fooled",
        "Without a bound any prediction can be changed; an attack that cannot do it is broken.",
    )


def gradient_checks(title: str, probe: GradientProbe, clean: Tensor) -> list[Check]:
    """Gradients must be there, tell the truth, and not give labels away.

    Args:
        title: the model's name.
        probe: what was seen of its gradients.
        clean: which samples are right without attack, bool [N].
    """
    count = len(probe.slope)
    seen = (probe.vanishing, probe.rounded, probe.told, probe.wrong)
    gone, zero, told, wrong = (int(x.sum()) for x in seen)
    before, after = int(clean.sum()), int(probe.right.sum())
    return [
        Check(
            f"{title}: gradients do not vanish",
            gone <= _FEW * count and zero <= _MANY * count,
            f"of {count}, {gone} have none, and the loss of {zero} is 0 up to rounding",
            "An attack that climbs a flat loss goes nowhere: the model looks robust untested.",
        ),
        Check(
            f"{title}: gradients tell how the loss changes",
            wrong <= _FEW * told,
            f"of {told} samples where it can be told, {wrong} change otherwise in a small step",
            "A rounded, random or replaced gradient misleads every attack that follows it.",
        ),
        Check(
            f"{title}: one step of an attack does not help the model",
            after <= before,
            f"{after} of {len(clean)} right after the step, {before} without it",
            "Where accuracy rises under attack, labels leak through the perturbation: the model "
            "has learned to read the one-step attack.",
        ),
    ]


def random_check(title: str, differs: bool) -> Check:
    """Two passes over the same samples must agree, or one evaluation of an attack says little."""
    return Check(
        f"{title}: the same samples give the same outputs",
        not differs,
        "two passes differ" if differs else "two passes agree",
        "A model that draws random numbers as it predicts must be attacked over many draws: the "
        "figures of attacks that see one draw at a time are too good.",
    )


def converged_check(title: str, label: str, under: Attacked) -> Check | None:
    """The last quarter of an attack's steps must turn few more samples.

    Args:
        title: the model's name.
        label: the attack's.
        under: what it achieved, each sample's `steps` being those after which it fell.

    Returns:
        The check; None where no sample stood to the end, where samples did not leave as they fell
        (all have as many steps), or for fewer than four steps.
    """
    fell, stood = under.steps[~under.right & (under.steps > 0)], under.steps[under.right]
    if not len(stood) or int(stood.max()) < 4:
        return None
    total = int(stood.max())
    if len(fell) and bool((fell == total).all()):
        return None
    late = int((~under.right & (under.steps > 0.75 * total)).sum())
    return Check(
        f"{title}: {label} has converged",
        late <= max(1, _LATE * len(under.right)),
        f"{late} of {len(under.right)} fell in the last quarter of {total} steps",
        "Where samples still fall at the end, more steps would turn more: the figure is too good.",
    )


def transfer_check(
    title: str,
    target: tuple[nn.Module, Sites],
    source: tuple[nn.Module, Sites],
    batches: Sequence[Batch],
    attack: Attack,
    *,
    origin: str = "the other model",
    right: Tensor | None = None,
    deltas: Sequence[Sequence[Tensor]] | None = None,
    evaluator: Evaluator | None = None,
) -> Check:
    """Perturbations found on another model must not fool more samples than the model's own.

    They are projected on the attacked model's ball, which is another one where eps is relative to
    embeddings.

    Args:
        title: the attacked model's name.
        target: the attacked model and its sites.
        source: the model that the perturbations are transferred from, with its sites.
        batches: the samples; the two models must embed them in the same shape.
        attack: run on the source unless `deltas` are given, and on the target unless `right` is.
        origin: the source's name.
        right: whether each sample is right under an attack on the target that is no weaker, bool
            [N], where that is known.
        deltas: for each batch, what `perturbations` found on the source.
        evaluator: see `embattle.audit.evaluation.evaluate`.

    Returns:
        The check.
    """
    model, sites = target
    own = moved = total = 0
    deltas = deltas or perturbations(*source, batches, attack, evaluator=evaluator)
    with examined(model):
        for batch, found in zip(batches, deltas, strict=True):
            batch = batch.to(device_of(model))
            these = slice(total, total + len(batch))
            total += len(batch)
            given = Given(norm=attack.norm, eps=attack.eps, steps=0, deltas=found)
            tries = {"moved": given} if right is not None else {"moved": given, "own": attack}
            done = evaluate(model, [batch], sites, tries, evaluator=evaluator)
            moved += int((~done["moved"].right).sum())
            own += int((~(done["own"].right if right is None else right[these])).sum())
    return Check(
        f"{title}: an attack transferred from {origin} is no stronger than its own",
        moved <= own,
        f"{moved} of {total} wrong under the transferred attack, {own} under its own",
        "An attack that knows the model must beat one that does not, unless gradients are hidden.",
    )


def perturbations(
    model: nn.Module,
    sites: Sites,
    batches: Sequence[Batch],
    attack: Attack,
    *,
    evaluator: Evaluator | None = None,
) -> list[list[Tensor]]:
    """The deltas that an attack finds on a model, for each batch one for each perturbed output."""
    found = []
    with examined(model):
        for batch in batches:
            here = batch.to(device_of(model))
            result = run_attack(model, here, sites, attack, evaluator=evaluator, evaluate=False)
            found.append([delta.detach() for delta in result.deltas])
    return found
