"""What an audit says of the samples' outcomes: scores, their intervals, and models compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embattle.audit.outcomes import Attacked, success_rate
from embattle.audit.statistics import (
    DRAWS,
    bootstrap,
    holm,
    mcnemar,
    percentile_interval,
    permutation_tests,
    wilson,
)
from embattle.audit.victim import Victim
from embattle.errors import need
from embattle.files import save_tensors
from embattle.tasks.kinds import Kind
from embattle.tasks.kinds.weighted import Mean

#: What the rows beside the attacks are called.
CLEAN, WORST = "no attack", "worst"
#: The file of a run in which `write_outcomes` keeps what is right.
OUTCOMES = "outcomes.safetensors"
#: The chance of a difference by accident below which it is called significant.
LEVEL = 0.05


def outcomes_of(victim: Victim) -> dict[str, Attacked]:
    """A model's samples without attack, under each, and under the worst at the threat's eps."""
    found = {CLEAN: victim.unattacked, **victim.attacked}
    return found if victim.worst is None else {**found, WORST: victim.worst}


def score_models(
    kind: Kind,
    labels: Tensor,
    outcomes: Mapping[str, Mapping[str, Attacked]],
    *,
    seed: int = 0,
) -> tuple[dict[str, dict[str, dict[str, Any]]], list[dict[str, Any]]]:
    """Scores models on the same samples, and tests whether they differ.

    Shares have Wilson's interval, other measures the percentiles of a bootstrap over samples.
    Shares are tested by McNemar's exact test, other measures by a paired permutation test; Holm's
    correction is over all tests of one measure.

    Args:
        kind: what the models predict.
        labels: [N, ...].
        outcomes: of each model, by attack; `CLEAN` is among them.
        seed: of the draws.

    Returns:
        By model and attack, the scores with `intervals`, the share of right samples that fell
        (`success_rate`, not of `CLEAN`), and the kind's details; and the comparisons of all pairs
        of models.
    """
    measures = {
        (model, row): kind.weighted(outcome.outputs, labels)
        for model, rows in outcomes.items()
        for row, outcome in rows.items()
    }
    flat = {(*place, key): m for place, found in measures.items() for key, m in found.items()}
    drawn = bootstrap(flat, len(labels), seed=seed)
    scored: dict[str, dict[str, dict[str, Any]]] = {model: {} for model in outcomes}
    for model, rows in outcomes.items():
        for row, outcome in rows.items():
            entry: dict[str, Any] = kind.scores(outcome.outputs, labels)
            intervals = {}
            for key, measure in measures[model, row].items():
                share = isinstance(measure, Mean) and measure.is_share
                intervals[key] = (
                    wilson(int(measure.values.sum()), len(labels))
                    if share and isinstance(measure, Mean)
                    else percentile_interval(drawn[model, row, key])
                )
            if row != CLEAN:
                before = rows[CLEAN].right
                fell, count = int((before & ~outcome.right).sum()), int(before.sum())
                entry["success_rate"] = success_rate(before, outcome.right)
                intervals["success_rate"] = wilson(fell, count) if count else None
            known = {key: list(value) for key, value in intervals.items() if value is not None}
            scored[model][row] = {
                **entry,
                "intervals": known,
                **kind.details(outcome.outputs, labels),
            }
    return scored, _compare(kind, labels, outcomes, drawn, seed)


def add_scores(
    facts: dict[str, Any],
    kind: Kind,
    labels: Tensor,
    outcomes: Mapping[str, Mapping[str, Attacked]],
    *,
    seed: int = 0,
) -> None:
    """Puts what `score_models` gives into an audit's facts.

    Args:
        facts: with `models`, whose `clean`, `attacks` and `columns` (those that are there) are
            extended; `worst` and `comparisons` are set.
        kind, labels, outcomes, seed: see `score_models`; `WORST` is among the outcomes.
    """
    scored, facts["comparisons"] = score_models(kind, labels, outcomes, seed=seed)
    facts["smaller_is_better"] = sorted(kind.smaller_is_better)
    for name, rows in scored.items():
        model = facts["models"][name]
        model.setdefault("clean", {}).update(rows[CLEAN])
        for label, entry in rows.items():
            if label not in (CLEAN, WORST):
                place = "columns" if label in model.get("columns", {}) else "attacks"
                model.setdefault(place, {}).setdefault(label, {}).update(entry)
        if WORST in rows:
            model.setdefault("worst", {}).update(rows[WORST])


def plain(value: Any) -> Any:
    """The same value with NaN and infinities as None: JSON has none."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compare(
    kind: Kind,
    labels: Tensor,
    outcomes: Mapping[str, Mapping[str, Attacked]],
    drawn: Mapping[tuple[str, str, str], Tensor],
    seed: int,
) -> list[dict[str, Any]]:
    """All pairs of models on the measures of the tables, under each attack that both were under."""
    pairs = list(combinations(outcomes, 2))
    shared = {
        pair: [row for row in outcomes[pair[0]] if row in outcomes[pair[1]]] for pair in pairs
    }
    family = sum(len(rows) for rows in shared.values())
    # The smallest p-value of a permutation test must be able to stand a correction.
    draws = max(DRAWS, math.ceil(2 * family / LEVEL))
    found: list[dict[str, Any]] = []
    for first, second in pairs:
        joined, tested = {}, {}
        for row in shared[first, second]:
            ours, theirs = outcomes[first][row].outputs, outcomes[second][row].outputs
            both = kind.weighted(torch.cat([ours, theirs]), torch.cat([labels, labels]))
            for key in (key for key, _ in kind.measures if key in both):
                measure = both[key]
                if isinstance(measure, Mean) and measure.is_share:
                    a, b = (half.bool() for half in measure.values.chunk(2))
                    gain = float(b.double().mean() - a.double().mean())
                    tested[row, key] = (gain, mcnemar(a, b), "exact McNemar")
                else:
                    joined[row, key] = measure
        for place, (gain, p) in permutation_tests(
            joined, len(labels), draws=draws, seed=seed
        ).items():
            tested[place] = (gain, p, "paired permutation")
        for row in shared[first, second]:
            for key in (key for key, _ in kind.measures if (row, key) in tested):
                gain, p, test = tested[row, key]
                interval = percentile_interval(drawn[second, row, key] - drawn[first, row, key])
                found.append(
                    {
                        "models": [first, second],
                        "attack": row,
                        "measure": key,
                        "difference": gain,
                        "interval": None if interval is None else list(interval),
                        "p": p,
                        "test": test,
                    }
                )
    return corrected(found)


def corrected(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The comparisons with `p_corrected`, `significant` and `correction`, measure by measure."""
    found = [dict(one) for one in comparisons]
    for key in dict.fromkeys(one["measure"] for one in found):
        family = [one for one in found if one["measure"] == key]
        made = sum(not math.isnan(one["p"]) for one in family)
        for one, p in zip(family, holm([one["p"] for one in family]), strict=True):
            one["p_corrected"] = p
            one["significant"] = p < LEVEL
            one["correction"] = f"Holm, of {made}"
    return found


def write_outcomes(
    path: Path, outcomes: Mapping[str, Mapping[str, Attacked]], *, part: str
) -> None:
    """Writes which samples are right, by model and attack, for later comparisons of runs.

    Args:
        path: a safetensors file.
        outcomes: of each model, by attack.
        part: the fingerprint of the samples: outcomes of the same samples can be paired.
    """
    torch_file = need("safetensors.torch")
    names = [[model, row] for model, rows in outcomes.items() for row in rows]
    tensors = {str(i): outcomes[model][row].right.clone() for i, (model, row) in enumerate(names)}
    # One key: safetensors writes several in an order that changes from call to call.
    about = {"embattle": json.dumps({"part": part, "names": names})}
    save_tensors(path, lambda file: torch_file.save_file(tensors, file, metadata=about))


def read_outcomes(path: Path) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Reads what `write_outcomes` wrote: the fingerprint, and what is right by model and attack.

    Raises:
        Any exception: it is no such file.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with need("safetensors").safe_open(str(path), framework="pt") as file:
        said = file.metadata()
        if "embattle" in said:
            about = json.loads(said["embattle"])
        else:  # before 2026-12
            about = {"part": said["part"], "names": json.loads(said["names"])}
        for i, (model, row) in enumerate(about["names"]):
            right = file.get_tensor(str(i))
            if right.dtype != torch.bool or right.dim() != 1:
                raise ValueError(f"{path} does not hold truth values of samples")
            found.setdefault(model, {})[row] = right
    return about["part"], found
