"""What `metrics.json` holds, field by field; as JSON Schema in `docs/metrics.schema.json`."""

from __future__ import annotations

import typing
from typing import Any, Literal

from embattle.errors import need

if not typing.TYPE_CHECKING:
    need("pydantic")

from pydantic import BaseModel, ConfigDict, Field

#: Is raised when a key changes its meaning or goes; keys may be added under the same number.
SCHEMA = 1

Interval = tuple[float, float]


class _Open(BaseModel):
    """A mapping that may have further keys."""

    model_config = ConfigDict(extra="allow")


class PerClass(_Open):
    """How well one class, or one of several labels, is found."""

    precision: float = Field(description="share of its predictions that are right")
    recall: float = Field(description="share of its samples that are predicted so")
    f1: float = Field(description="harmonic mean of the two")
    count: int = Field(description="its samples")


class Calibration(_Open):
    """How far probabilities can be believed."""

    ece: float | None = Field(description="expected calibration error, 15 bins")
    brier: float | None = Field(description="Brier score, summed over the classes")


class Scores(_Open):
    """Measures, each under its own key (those of `measures`, `loss`, and others of the kind)."""

    loss: float | None = Field(description="mean loss; of classes the log loss")
    intervals: dict[str, Interval] = Field(
        default={}, description="by measure, its 95 % interval over samples"
    )
    per_class: dict[str, PerClass] | None = Field(
        default=None, description="by class or label, its report"
    )
    calibration: Calibration | None = None


class Attacked(Scores):
    """The same under an attack."""

    success_rate: float = Field(description="share of the right samples that it turns")
    perturbation_norm: float | None = Field(
        default=None, description="mean norm of the perturbations, absolute, in the threat's norm"
    )
    eps: float | None = Field(default=None, description="the radius, in the threat's unit")
    eps_absolute: float | list[float] | None = Field(
        default=None, description="the same as a number; several where sites differ"
    )
    seconds: float | None = Field(default=None, description="that it took")


class Columns(Scores):
    """The same where what rows say is changed (`audit.columns`)."""

    success_rate: float = Field(description="share of the right samples that it turns")
    swapped: dict[str, float] = Field(
        description="by column of categories, the share of the samples in which it was exchanged"
    )
    noise: dict[str, float] = Field(
        description="by column of numbers, by how much it was moved: the mean, in standard "
        "deviations"
    )
    seconds: float | None = Field(default=None, description="that it took")
    examples: list[dict[str, Any]] = Field(
        default=[],
        description="samples that it turned: what was changed, `before` and `after`, `noise`, "
        "`label`, and both `predictions`",
    )


class Model(_Open):
    """One model."""

    clean: Scores = Field(description="without attack")
    attacks: dict[str, Attacked] = Field(description="under each attack, by its label")
    worst: Attacked = Field(description="each sample under the worst attack on it")
    columns: dict[str, Columns] | None = Field(
        default=None,
        description="under each attack on columns, by its label; in no ball of the threat, and so "
        "neither in `worst` nor in the curve",
    )
    sweep: dict[str, Any] | None = Field(
        default=None,
        description="the curve over eps: `attack`, `eps`, and the headline's values under its key",
    )
    vector_norm: float | None = Field(
        default=None, description="mean l2 norm of the embeddings that are attacked"
    )
    certificates: list[dict[str, Any]] | None = Field(
        default=None, description="what is proven (`--certify`): docs/certificates.md"
    )


class Comparison(_Open):
    """Two models on one measure."""

    models: tuple[str, str]
    attack: str = Field(description="an attack's label, `no attack` or `worst`")
    measure: str
    difference: float | None = Field(description="the second model's less the first's")
    interval: Interval | None = Field(description="of the difference: paired bootstrap, 95 %")
    p: float | None = Field(description="two-sided p-value")
    p_corrected: float | None
    significant: bool = Field(description="whether `p_corrected` is below 0.05")
    test: str = Field(description="`exact McNemar` or `paired permutation`")
    correction: str = Field(description="such as `Holm, of 6`: among so many tests")


class Check(_Open):
    """A check on the attacks themselves."""

    name: str
    passed: bool
    detail: str = Field(description="the figures that it was decided by")
    reason: str | None = Field(default=None, description="what a failure means")


class Threat(_Open):
    """What the attacker may do."""

    norm: str
    group: str = Field(description="what has a ball of its own")
    eps: float
    unit: str = Field(description="what eps counts in")


class Fingerprints(_Open):
    """SHA-256 of what was examined."""

    data: str | None = Field(default=None, description="of all parts")
    part: str = Field(description="of the samples that were attacked")
    outcomes: str | None = Field(default=None, description="of `outcomes.safetensors`")
    weights: dict[str, str] = Field(default={}, description="of each model's weights")


class Metrics(_Open):
    """An audit: all that `metrics.json` says."""

    schema_: Literal[1] = Field(alias="schema", description="version of this schema")
    name: str
    seed: int | None
    part: str | None = Field(description="the part of the data that was attacked")
    examples: int = Field(description="its samples")
    task: str | None = Field(description="as the recipe names it")
    command: list[str] = Field(description="the command line that wrote this")
    fingerprint: str = Field(description="SHA-256 of data and weights together")
    fingerprints: Fingerprints
    reading: list[str] = Field(
        default=[],
        description="what was read, line by line: rows, what was dropped, copies, classes, and how "
        "many texts the model sees cut",
    )
    words: dict[str, str] = Field(description="what a sample and an embedding are called")
    measures: list[tuple[str, str]] = Field(
        description="keys and titles of the tables' columns; the first is the headline, a share of "
        "samples"
    )
    smaller_is_better: list[str] = Field(default=[], description="the measures that are errors")
    note: str = Field(description="a sentence about the measures")
    threat: Threat
    variants: dict[str, str] = Field(default={}, description="what each model was trained on")
    models: dict[str, Model]
    certificates: list[dict[str, Any]] | None = Field(
        default=None,
        description="what is proven of no model of these, but of an ensemble under fake users "
        "(`--certify` with `audit.certify.fakes`)",
    )
    comparisons: list[Comparison]
    checks: list[Check]
    train_seconds: dict[str, float] = Field(default={}, description="of each model")
    audit_seconds: float
    environment: dict[str, Any] = Field(description="versions and device")


def json_schema() -> dict[str, Any]:
    """The schema of `metrics.json`."""
    made = Metrics.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
