"""The attacker in a recipe: what she may do, and how she does it.

The ball is the threat's, so that all attacks of a job share it; an attack's own lengths are shares
of eps. An attack's other options are those of its class in `embattle.attacks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embattle import attacks
from embattle.jobs.choices import Option, choice, section_of
from embattle.sections import Section


class ThreatRecipe(Section):
    """What the attacker may do; training and audit share it.

    Attributes:
        norm: the norm of a perturbation of the embeddings.
        group: `sample` gives a whole sample (a text) one budget, `token` each of its vectors its
            own.
        eps: the budget; in units of `unit`.
        unit: what eps counts in. `token_norm`: the mean norm (the attack's norm) of the model's own
            embeddings in the batch, so that a model gains nothing from larger embeddings;
            `mean_norm`: the same of whole groups; `absolute`: 1.
    """

    norm: Literal["l2", "linf", "l1"] = "l2"
    group: Literal["sample", "token"] = "sample"
    eps: NonNegativeFloat = 0.3
    unit: Literal["token_norm", "mean_norm", "absolute"] = "token_norm"


class StartRecipe(Section):
    """A random start other than uniform in the ball.

    Attributes:
        kind: `gaussian` (`size` is the standard deviation) or `box` (uniform in `+- size` in every
            coordinate); projected on the ball.
        size: as a share of eps.
    """

    kind: Literal["gaussian", "box"] = "gaussian"
    size: PositiveFloat


class AttackRecipe(Option):
    """One attack on the threat model's ball.

    Attributes:
        kind: one of `ATTACKS`: `noise` (uniform), `gaussian_noise` and `neftune` use no gradient;
            `fgsm` and `fgm` make one step of sign, or of the norm's steepest ascent, to the edge of
            the ball; the others make many steps. In the audit alone: `ensemble`, several strong
            attacks on the samples that all others left standing, and `minimum_norm`, which
            searches each sample's smallest perturbation.
        steps: gradient steps.
        random_start: whether it starts at a random point of the ball.
        start: another random start.
        restarts: how often the attack is tried from a random start; the worst try counts.
        title: the attack's name in tables.
        lengths: the options that are shares of eps.
    """

    steps: int = 1
    random_start: bool = False
    start: StartRecipe | None = None
    restarts: PositiveInt = 1

    title: ClassVar[str]
    lengths: ClassVar[frozenset[str]]

    @model_validator(mode="after")
    def _restarts_differ(self) -> AttackRecipe:
        if self.restarts > 1 and not self.starts_at_random:
            raise ValueError("restarts need random_start: true, or every try would be the same")
        return self

    @property
    def starts_at_random(self) -> bool:
        """Whether two runs begin at different points."""
        return self.random_start or self.start is not None

    @property
    def label(self) -> str:
        """A short name, such as `PGD-20 x2`."""
        many = type(self).model_fields["steps"].annotation is int
        steps = f"-{self.steps}" if many else ""
        return f"{self.title}{steps}" + (f" x{self.restarts}" if self.restarts > 1 else "")

    @property
    def detailed_label(self) -> str:
        """The short name, and all options that are not the usual ones."""
        said = [self.label]
        if self.kind == "pgd":
            said.append(f"step {self.step_share:g}")
        usual = type(self).model_fields
        for name in usual:
            value = getattr(self, name)
            if name not in _SAID and value != usual[name].default:
                said.append(f"{name.replace('_', ' ')} {_words(value)}")
        if self.random_start and usual["random_start"].annotation is bool:
            said.append("random start")
        return ", ".join(said)

    @property
    def step_share(self) -> float | None:
        """The step as a share of eps; None: as the attack's class says."""
        given: float | None = getattr(self, "step_size", None)
        if given is None and self.kind == "pgd":
            return min(1.0, 2.5 / self.steps)
        return given


# What names and labels say in their own way.
_SAID = ("kind", "steps", "restarts", "step_size", "random_start")

# The ball is the threat's; what remains is the job's to decide.
_NOT_GIVEN = (
    *("norm", "eps", "unit", "lower", "upper"),
    *("keep", "stop_when_fooled", "go_on", "generator", "compile"),
    *("steps", "random_start", "restarts"),
)

_Always = Literal[True]
_STEPS = {"steps": (PositiveInt, 1), "step_size": (PositiveFloat | None, None)}
_ONE_STEP = {"steps": (Literal[1], 1), "step_size": (PositiveFloat | None, None)}
_NOISE = {"steps": (Literal[0], 0), "random_start": (_Always, True), "start": (None, None)}
_KINDS: dict[str, tuple[str, type[attacks.Attack], dict[str, tuple[Any, Any]]]] = {
    "noise": ("Noise", attacks.UniformNoise, _NOISE),
    "gaussian_noise": (
        "Gaussian noise",
        attacks.GaussianNoise,
        {**_NOISE, "std": (PositiveFloat, ...)},
    ),
    "neftune": ("NEFTune", attacks.NEFTune, _NOISE),
    "fgsm": ("FGSM", attacks.FGSM, _ONE_STEP),
    "fgm": ("FGM", attacks.FGM, _ONE_STEP),
    "pgd": ("PGD", attacks.PGD, _STEPS),
    "msap": ("MSAP", attacks.MSAP, _STEPS),
    "mifgsm": ("MI-FGSM", attacks.MIFGSM, _STEPS),
    "apgd": ("APGD", attacks.APGD, {"steps": (PositiveInt, 20), "random_start": (bool, True)}),
    "vat": (
        "VAT",
        attacks.VAT,
        {
            "steps": (PositiveInt, 1),
            "random_start": (_Always, True),
            "start": (None, None),
            "xi": (PositiveFloat, 0.1),
        },
    ),
    "smart": (
        "SMART",
        attacks.SMARTStep,
        {"steps": (PositiveInt, 1), "random_start": (_Always, True)},
    ),
}
# What examines a model and trains none.
_EXAMINING: dict[str, tuple[str, type[attacks.Attack], dict[str, tuple[Any, Any]]]] = {
    "ensemble": (
        "Ensemble",
        attacks.AutoAttack,
        {
            "steps": (PositiveInt, 20),
            "queries": (NonNegativeInt, 100),
            "random_start": (_Always, True),
            "start": (None, None),
        },
    ),
    "minimum_norm": (
        "Minimum norm",
        attacks.FMN,
        {
            "steps": (PositiveInt, 20),
            "random_start": (Literal[False], False),
            "start": (None, None),
            "restarts": (Literal[1], 1),
        },
    ),
}


#: The attacks without a gradient.
NOISES = frozenset(("noise", "gaussian_noise", "neftune"))


def _sections(
    kinds: dict[str, tuple[str, type[attacks.Attack], dict[str, tuple[Any, Any]]]],
) -> dict[str, type[AttackRecipe]]:
    found: dict[str, type[AttackRecipe]] = {}
    for kind, (title, made, own) in kinds.items():
        without = (*_NOT_GIVEN, *(("mode",) if kind in NOISES else ()))
        section = section_of(AttackRecipe, kind, made, without=without, own=own)
        section.title = title
        section.lengths = frozenset(own) & {"step_size", "std", "xi"}
        found[kind] = section
    return found


#: The sections of the attacks that training knows too, by `kind`.
ATTACKS = _sections(_KINDS)
#: Those of the audit alone.
EXAMINING = _sections(_EXAMINING)

if TYPE_CHECKING:
    AttackChoice = AttackRecipe
    TableChoice = AttackRecipe
    CurveChoice = AttackRecipe
else:
    AttackChoice = choice(ATTACKS, "kind", "pgd")
    # Of the audit's table, and of its curve over eps.
    TableChoice = choice({**ATTACKS, "ensemble": EXAMINING["ensemble"]}, "kind", "pgd")
    CurveChoice = choice({**ATTACKS, "minimum_norm": EXAMINING["minimum_norm"]}, "kind", "pgd")


def attack_recipe(**options: Any) -> AttackRecipe:
    """The section of an attack, `kind: pgd` unless another is named."""
    return {**ATTACKS, **EXAMINING}[options.get("kind", "pgd")](**options)


def _words(value: Any) -> str:
    if isinstance(value, StartRecipe):
        return f"{value.kind} {value.size:g}"
    return f"{value:g}" if isinstance(value, float) else str(value)
