"""How a recipe's models are examined: the section `audit`."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from embattle.data.recipe import Part
from embattle.jobs.attack_recipe import AttackRecipe, CurveChoice, TableChoice, attack_recipe
from embattle.jobs.certify_recipe import CertifyRecipe
from embattle.jobs.column_recipe import ColumnRecipe
from embattle.jobs.explain_recipe import ExplainRecipe
from embattle.sections import Section, unlike


class AuditRecipe(Section):
    """How the trained models are examined.

    Attributes:
        part: the part of the data that is attacked.
        batch_size: examples attacked at once.
        attacks: the attacks, from the weakest to the strongest. `kind: ensemble` attacks what all
            others left standing; it comes last.
        strengths: multiples of the threat model's eps at which each of them is run; 1 is among
            them.
        sweep: multiples of the threat model's eps for the accuracy curve.
        sweep_attack: the attack of the curve: `minimum_norm` gives all of it at once; another is
            run at each eps, as is `pgd` where samples have no smallest perturbation of their own.
        go_on: attack examples that have fallen, too: AUC, loss and calibration are then those of
            each one's worst point. It takes longer. Tables, clicks, values and several labels are
            always attacked so.
        explain: what is explained (see `ExplainRecipe`); null: nothing.
        columns: attacks on what rows of a table say: categories that are exchanged, noise on
            numbers. They have a section of their own: they are in no ball of the threat.
        certify: how it is proven what can be, with `embattle audit --certify`.
    """

    part: Part = "test"
    batch_size: PositiveInt = 50
    attacks: list[TableChoice] = Field(
        default=[
            attack_recipe(kind="noise", restarts=5),
            attack_recipe(kind="fgm"),
            attack_recipe(kind="pgd", steps=20, random_start=True),
            attack_recipe(kind="ensemble"),
        ],
        min_length=1,
    )
    strengths: list[PositiveFloat] = Field(default=[1.0], min_length=1)
    sweep: list[PositiveFloat] = Field(default=[0.25, 0.5, 1.0, 1.5, 2.0, 4.0], min_length=1)
    sweep_attack: CurveChoice = attack_recipe(kind="minimum_norm")
    go_on: bool = False
    explain: ExplainRecipe | None = ExplainRecipe()
    columns: list[ColumnRecipe] = Field(default=[])
    certify: CertifyRecipe = CertifyRecipe()

    @field_validator("strengths")
    @classmethod
    def _with_the_threat(cls, strengths: list[float]) -> list[float]:
        if 1.0 not in strengths or len(set(strengths)) < len(strengths):
            raise ValueError("multiples of the threat's eps, 1 among them, and none twice")
        return strengths

    def table(self) -> dict[str, tuple[AttackRecipe, float]]:
        """Each attack at each strength, by labels of which no two are alike.

        Those at the threat's eps come last, and the ensembles after the others.
        """
        scales = [*sorted(scale for scale in self.strengths if scale != 1.0), 1.0]
        found = {
            label if scale == 1.0 else f"{label} at {scale:g} eps": (attack, scale)
            for scale in scales
            for label, attack in self.labelled().items()
        }
        last = {label: one for label, one in found.items() if one[0].kind == "ensemble"}
        return {**{label: one for label, one in found.items() if label not in last}, **last}

    def labelled(self) -> dict[str, AttackRecipe]:
        """The attacks by labels of which no two are alike.

        Attacks with the same short name also say what they differ in, or else their number.
        """
        names = [attack.label for attack in self.attacks]
        full = [
            attack.detailed_label if names.count(attack.label) > 1 else attack.label
            for attack in self.attacks
        ]
        return dict(zip(unlike(full), self.attacks, strict=True))
