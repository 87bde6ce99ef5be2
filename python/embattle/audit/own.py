"""The audit of a model of one's own: attacks, figures, checks and the report, without a job."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from embattle.attacks import FGM, FMN, PGD, Attack, AutoAttack, UniformNoise
from embattle.audit.environment import command, environment
from embattle.audit.evaluation import Sites, device_of
from embattle.audit.examine import POINTS, Curve, Examination, Norm, Unit, labels_of, note_of
from embattle.audit.outcomes import Attacked
from embattle.audit.report import document
from embattle.audit.scores import (
    CLEAN,
    OUTCOMES,
    WORST,
    add_scores,
    outcomes_of,
    plain,
    write_outcomes,
)
from embattle.audit.summary import summary_lines
from embattle.audit.trust import CHECKED, check_victims
from embattle.checks import integer, one_of, real
from embattle.data.batch import Batch, first_samples
from embattle.files import sha256, writable, write_text
from embattle.perturb.site import as_sites
from embattle.perturb.strength import Strength, scaled
from embattle.tasks.evaluator import Evaluator
from embattle.tasks.kinds import Kind

# Samples that are attacked at once where they come in one batch.
_AT_ONCE = 50
#: The curve goes up to so many times eps.
FARTHEST = 4.0


@dataclass(frozen=True)
class Audit:
    """An audit that is done.

    Attributes:
        facts: what `metrics.json` holds (docs/metrics.md).
        outcomes: of each model, the samples without attack, under each, and under the worst.
    """

    facts: dict[str, Any]
    outcomes: dict[str, dict[str, Attacked]]

    def summary(self) -> str:
        """Tables of figures, how models compare, and checks that fail, as text."""
        return "\n".join(summary_lines(self.facts))

    def to_html(self) -> str:
        """The report, a page that needs no other file."""
        return document(self.facts)

    def save(self, folder: str | Path) -> None:
        """Write `metrics.json`, `outcomes.safetensors` and `report.html`, for `embattle report`.

        Args:
            folder: is made where it is missing; an audit that is there is replaced.

        Raises:
            InputError: it cannot be written to.
        """
        folder = Path(folder)
        prints = self.facts["fingerprints"]
        write_outcomes(folder / OUTCOMES, self.outcomes, part=prints["part"])
        written = {**prints, "outcomes": sha256(folder / OUTCOMES)}
        facts = {**self.facts, "fingerprints": written}
        write_text(folder / "metrics.json", json.dumps(facts, indent=2) + "\n")
        write_text(folder / "report.html", self.to_html())


def audit_model(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    sites: Sites,
    *,
    eps: float = 0.3,
    norm: Norm = "l2",
    unit: Unit = "token_norm",
    kind: Kind | None = None,
    evaluator: Evaluator | None = None,
    attacks: Mapping[str, Attack] | None = None,
    name: str = "model",
    seed: int = 0,
) -> Audit:
    """Attacks one model, and says how far it holds and how far the attacks can be trusted.

    Args:
        model: any module.
        batches: samples with labels, best ones that training has not seen. One batch is divided.
        sites: where the model is attacked.
        eps: the radius of the attacker's balls; each is a group of the sites.
        norm: their norm.
        unit: what eps counts in: `token_norm`, mean norms (in `norm`) of the embeddings at the
            sites over all samples; `mean_norm`, the same of whole groups; `absolute`, 1.
        kind: what the model predicts; classes by default. The model is called as
            `model(**batch.inputs)` and returns outputs, or something that has them as `logits`.
        evaluator: runs a model that is called otherwise, and says what is right: an `Evaluator`, or
            a task. It brings the kind.
        attacks: name to attack, from the weakest to the strongest, in place of the usual ones:
            noise, FGM, PGD-20, and an ensemble on the samples that still stand. Their balls should
            not be larger than eps. None can be called `no attack` or `worst`.
        name: the model's.
        seed: decides all random numbers.

    Raises:
        ValueError: there are no samples, one has no label, or an argument is not as it should be.
        TypeError: the model returns no outputs, or an argument is of another type.
        InputError: a package is missing that the figures need: `pip install 'embattle[jobs]'`.
    """
    models = {name: (model, sites)}
    return audit_models(
        models,
        batches,
        eps=eps,
        norm=norm,
        unit=unit,
        kind=kind,
        evaluator=evaluator,
        attacks=attacks,
        seed=seed,
    )


def audit_models(
    models: Mapping[str, tuple[nn.Module, Sites]],
    batches: Batch | Sequence[Batch],
    *,
    eps: float = 0.3,
    norm: Norm = "l2",
    unit: Unit = "token_norm",
    kind: Kind | None = None,
    evaluator: Evaluator | None = None,
    attacks: Mapping[str, Attack] | None = None,
    seed: int = 0,
) -> Audit:
    """Attacks several models on the same samples, and tests whether they differ.

    Args:
        models: by name, each with its sites.
        batches, eps, norm, unit, kind, evaluator, attacks, seed: see `audit_model`.

    Raises:
        ValueError, TypeError, InputError: see `audit_model`.
    """
    began = time.monotonic()
    if not models:
        raise ValueError("audit_models: no model is given; give at least one")
    if kind is not None and evaluator is not None:
        raise ValueError("audit_models: kind is the evaluator's where there is one; give one")
    one_of("audit_models", "unit", unit, get_args(Unit))
    one_of("audit_models", "norm", norm, get_args(Norm))
    eps = real("audit_models", "eps", eps, 0)
    seed = integer("audit_models", "seed", seed, -(2**63))
    evaluator = evaluator or Evaluator(kind)
    _check_names(models, attacks)
    parts = batches.split(_AT_ONCE) if isinstance(batches, Batch) else list(batches)
    parts = [part for part in parts if len(part)]
    if not parts:
        raise ValueError("audit_models: batches hold no samples; give at least one")
    labels = labels_of(parts)
    ones = {
        title: Examination(model, parts, sites, evaluator=evaluator, norm=norm, eps=eps, unit=unit)
        for title, (model, sites) in models.items()
    }
    found = {title: _run(one, norm, attacks, seed) for title, one in ones.items()}
    victims = {title: one.victim for title, one in ones.items()}
    first, sites = next(iter(models.values()))
    balls = as_sites(sites)[0]
    facts: dict[str, Any] = {
        **_origin(models, parts),
        "name": ", ".join(models),
        "seed": seed,
        "part": None,
        "examples": len(labels),
        "task": None,
        "words": {
            "sample": getattr(evaluator, "sample", "sample"),
            "vector": getattr(evaluator, "vector", "vector"),
        },
        "measures": evaluator.kind.titled(),
        "note": note_of(evaluator.kind),
        "shown": evaluator.kind.shown,
        "threat": {"norm": norm, "group": balls.group, "eps": eps, "unit": unit},
        "models": found,
    }
    outcomes = {title: outcomes_of(victim) for title, victim in victims.items()}
    add_scores(facts, evaluator.kind, labels, outcomes, seed=seed)
    checks = check_victims(
        victims,
        first_samples(parts, CHECKED),
        evaluator=evaluator,
        measure=evaluator.kind.titled()[0][1],
        seed=seed,
    )
    facts |= {
        "checks": [asdict(check) for check in checks],
        "chance": evaluator.kind.chance(labels),
        "audit_seconds": round(time.monotonic() - began, 1),
        "environment": environment(device_of(first)),
    }
    return Audit(plain(facts), outcomes)


def _check_names(
    models: Mapping[str, tuple[nn.Module, Sites]], attacks: Mapping[str, Attack] | None
) -> None:
    """Check what models and attacks are called.

    Raises:
        ValueError: a name that is no text or is kept for other rows, or an empty table of attacks.
    """
    if attacks is not None and not attacks:
        raise ValueError("audit_models: attacks is empty; give some, or None for the usual ones")
    for kind, names in (("model", models), ("attack", attacks or {})):
        for name in names:
            if not isinstance(name, str) or not name:
                raise ValueError(f"audit_models: name each {kind} by a text, got {name!r}")
            if not writable(name):
                raise ValueError(
                    f"audit_models: {name!r} cannot be written into a file (half of a surrogate "
                    f"pair); give the {kind} another name"
                )
            if kind == "attack" and name in (CLEAN, WORST):
                raise ValueError(
                    f"audit_models: no attack can be called {name!r}, which is a row of its own; "
                    "give it another name"
                )


def usual_attacks(norm: Norm, eps: Strength, generator: torch.Generator) -> dict[str, Attack]:
    """The attacks of an audit if nothing else is said: those of a recipe that names none.

    Args:
        norm, eps: the ball.
        generator: of random starts.
    """
    ball: dict[str, Any] = {"norm": norm, "eps": eps, "generator": generator}
    start: dict[str, Any] = {"random_start": True, "keep": "best"}
    return {
        "Noise x5": UniformNoise(restarts=5, **ball),
        "FGM": FGM(**ball),
        "PGD-20": PGD(steps=20, step_size=scaled(eps, 0.125), **start, **ball),
        "Ensemble-20": AutoAttack(steps=20, queries=100, **ball),
    }


def usual_search(norm: Norm, unit: Strength, generator: torch.Generator) -> tuple[str, FMN]:
    """The search of the curve, in the same way; `unit` is what an eps of 1 is."""
    return "Minimum norm-20", FMN(norm=norm, unit=unit, steps=20, generator=generator)


def _run(
    one: Examination, norm: Norm, attacks: Mapping[str, Attack] | None, seed: int
) -> dict[str, Any]:
    """Attack a model, and give its facts."""
    generator = torch.Generator().manual_seed(seed)
    given = attacks or usual_attacks(norm, one.victim.eps, generator)
    # The threat's eps is one of them, to the last digit.
    eps = [FARTHEST * k / POINTS * one.eps for k in range(POINTS + 1)]
    curve = Curve(usual_search(norm, one.unit, generator), eps)
    return one.run({label: (attack, 1.0) for label, attack in given.items()}, curve)


def _origin(
    models: Mapping[str, tuple[nn.Module, Sites]], batches: Sequence[Batch]
) -> dict[str, Any]:
    """The schema, the command, and fingerprints of samples and weights."""
    from embattle.audit.schema import SCHEMA  # needs pydantic

    part = _print_of_samples(batches)
    weights = {}
    for name, (model, _) in models.items():
        digest = hashlib.sha256()
        _feed(digest, {key: x for key, x in model.state_dict().items() if isinstance(x, Tensor)})
        weights[name] = digest.hexdigest()
    prints: dict[str, Any] = {"part": part, "weights": weights}
    lines = [prints["part"], *(f"{name} {value}" for name, value in weights.items())]
    return {
        "schema": SCHEMA,
        "command": command(),
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "fingerprints": prints,
    }


def _print_of_samples(batches: Sequence[Batch]) -> str:
    """A hash of inputs and labels, however they are divided into batches of one width."""
    columns: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    rows = 0
    for batch in batches:
        for name, x in {**batch.inputs, "labels": batch.known_labels()}.items():
            digest = columns.setdefault(name, hashlib.sha256())
            kind = f"{x.dtype} {tuple(x.shape[1:])}"
            if kinds.get(name) != kind:
                digest.update(f"{rows} {kind}\n".encode())
                kinds[name] = kind
            digest.update(_raw(x))
        rows += len(batch)
    lines = [f"{name} {digest.hexdigest()}" for name, digest in columns.items()]
    return hashlib.sha256("\n".join([str(rows), *lines]).encode()).hexdigest()


def _feed(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Feed tensors with their names to a hash."""
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))


def _raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
