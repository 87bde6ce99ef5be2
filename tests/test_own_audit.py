"""The audit of a model of one's own, against what is known of a linear one."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("scipy")
pytest.importorskip("pydantic")

from embattle.attacks import PGD
from embattle.audit import Audit, audit_model, audit_models
from embattle.audit.own import FARTHEST, usual_attacks, usual_search
from embattle.audit.schema import Metrics
from embattle.audit.scores import CLEAN, WORST, read_outcomes
from embattle.data.batch import Batch
from embattle.perturb.site import Site
from embattle.tasks import Classification, Evaluator, Ranking, Regression


class Linear(nn.Module):
    """The sum of the first features of two tokens: -2 to 2; an l2 ball of eps moves it sqrt(2)."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        with torch.no_grad():
            rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.2, 0.0]])
            self.embedding.weight.copy_(rows * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        total = self.embedding(tokens)[..., 0].sum(1)
        return torch.stack([-total, total], dim=1)


class Value(Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, 1]


class OfTokens(Linear):
    """A class for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


class Wrapped(Linear):
    """Its outputs under a key of a dict."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, tokens: Tensor) -> Any:
        return {self.key: super().forward(tokens)}


TOKENS = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 2]])


def batch(labels: Tensor | None = None) -> Batch:
    """Samples 2, -2, 0.4 and 1.2 far to the right."""
    return Batch({"tokens": TOKENS}, torch.tensor([1, 0, 1, 1]) if labels is None else labels)


def audited(model: nn.Module | None = None, **options: Any) -> Audit:
    model = model or Linear()
    options = {"eps": 0.5, "unit": "absolute", **options}
    return audit_model(model, options.pop("batch", batch()), Site(model.embedding), **options)


def test_a_linear_model_falls_where_it_must(tmp_path: Path) -> None:
    found = audited()
    Metrics.model_validate(found.facts)
    model = found.facts["models"]["model"]
    assert model["clean"]["accuracy"] == 1
    assert model["worst"]["accuracy"] == 0.75
    assert model["worst"]["success_rate"] == 0.25
    assert model["attacks"]["PGD-20"]["perturbation_norm"] == pytest.approx(0.5, rel=0.02)
    assert list(found.outcomes["model"]) == [
        CLEAN,
        *("Noise x5", "FGM", "PGD-20", "Ensemble-20"),
        WORST,
    ]
    assert found.outcomes["model"][WORST].right.tolist() == [True, True, False, True]
    # The third falls at 0.4 / sqrt(2), the last at 1.2 / sqrt(2), the others at sqrt(2).
    sweep = model["sweep"]
    for eps, share in zip(sweep["eps"], sweep["accuracy"], strict=True):
        radii = [0.2828, 0.8485, 1.4142, 1.4142]
        if min(abs(eps - radius) for radius in radii) > 0.03:
            assert share == sum(radius > eps for radius in radii) / 4, eps
    assert "0.750 [0.301, 0.954] under the worst" in found.summary()

    found.save(tmp_path / "mine")
    facts = json.loads((tmp_path / "mine" / "metrics.json").read_text())
    assert facts["fingerprints"].pop("outcomes")
    assert facts == json.loads(json.dumps(found.facts))
    part, right = read_outcomes(tmp_path / "mine" / "outcomes.safetensors")
    assert part == facts["fingerprints"]["part"]
    assert right["model"][WORST].tolist() == [True, True, False, True]
    page = (tmp_path / "mine" / "report.html").read_text()
    assert page == found.to_html()
    assert "training has not seen" not in page


def test_the_units_of_eps() -> None:
    """The mean norm of the eight tokens looked up is 5.6 / 8 of the scale; eps is half of it."""
    found = audited(Linear(scale=3.0), eps=0.5, unit="token_norm")
    model = found.facts["models"]["model"]
    assert model["vector_norm"] == pytest.approx(3 * 5.6 / 8)
    norm = 0.5 * 3 * 5.6 / 8
    assert model["attacks"]["PGD-20"]["perturbation_norm"] == pytest.approx(norm, rel=0.02)
    assert model["worst"]["accuracy"] == 0.75


def test_models_are_compared_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("yaml")
    from embattle.jobs.report import report

    models = {name: Linear(scale) for name, scale in (("weak", 0.3), ("strong", 4.0))}
    sites = {name: (model, Site(model.embedding)) for name, model in models.items()}
    found = audit_models(sites, batch().split(3), eps=0.5, unit="absolute")
    (one,) = (
        one
        for one in found.facts["comparisons"]
        if (one["attack"], one["measure"]) == (WORST, "accuracy")
    )
    assert one["models"] == ["weak", "strong"]
    # All four fall against none: two in sixteen.
    worst = [found.facts["models"][name]["worst"]["accuracy"] for name in models]
    assert worst == [0.0, 1.0]
    assert one["p"] == pytest.approx(2 / 16)
    found.save(tmp_path / "both")
    report([tmp_path / "both"], tmp_path / "page.html")
    assert "both/strong" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("kinds", "titles", "labels"),
    [
        ([Ranking(1), Ranking(2)], ["hit rate@1", "hit rate@2"], [1, 0, 1, 1]),
        (
            [Regression(within=0.3), Regression(within=0.5)],
            ["close enough (0.3)", "close enough (0.5)"],
            [2.0, -2.0, 0.4, 1.0],
        ),
    ],
)
def test_what_is_right_by_another_measure_is_not_compared(
    kinds: list[Any],
    titles: list[str],
    labels: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the same samples, by the same model: what differs is what counts as right."""
    pytest.importorskip("typer")
    pytest.importorskip("yaml")
    from embattle.jobs.report import report

    class Scores(Linear):
        """Three items."""

        def forward(self, tokens: Tensor) -> Tensor:
            found = super().forward(tokens)
            return torch.cat([found, found[:, :1] * 0.5 - 0.3], 1)

    attack = {"PGD": PGD(norm="l2", eps=0.2, step_size=0.1, steps=2)}
    model = Scores() if isinstance(kinds[0], Ranking) else Value()
    for i, kind in enumerate((*kinds, kinds[0])):
        given = batch(torch.tensor(labels))
        found = audited(model, batch=given, kind=kind, attacks=attack)
        assert found.facts["measures"][0][1] == titles[i % 2]
        found.save(tmp_path / str(i))
    report([tmp_path / "0", tmp_path / "1"], tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text())["comparisons"] == []
    assert f"measured otherwise ({', '.join(titles)})" in capsys.readouterr().out
    report([tmp_path / "0", tmp_path / "2"], tmp_path / "same.json")
    assert len(json.loads((tmp_path / "same.json").read_text())["comparisons"]) == 2


def test_other_kinds_and_attacks() -> None:
    values = torch.tensor([2.0, -2.0, 0.4, 1.0])
    attack = {"PGD": PGD(norm="l2", eps=0.2, step_size=0.1, steps=5, keep="best")}
    found = audited(Value(), batch=batch(values), kind=Regression(within=0.3), attacks=attack)
    model = found.facts["models"]["model"]
    assert list(model["attacks"]) == ["PGD"]
    assert model["clean"]["within"] == 1
    assert model["clean"]["mae"] == pytest.approx(0.05)
    # 0.2 * sqrt(2) is less than 0.3, but the last is 0.2 off already; the curve looks up to 0.5.
    assert model["attacks"]["PGD"]["within"] == 0.75
    assert model["worst"]["within"] == 0
    found = audited(kind=Ranking(1), attacks=attack)
    assert found.facts["models"]["model"]["attacks"]["PGD"]["hit_rate"] == 1


def test_a_task_of_ones_own() -> None:
    from embattle.tasks import Account, Section

    path = Path(__file__).parents[1] / "examples" / "own_task.py"
    spec = importlib.util.spec_from_file_location("own_task", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = module.Rents(module.Flats(count=60), Section())
    task.read(Account())
    torch.manual_seed(0)
    model = task.build()
    batches, sites = task.batches(model, "test", 50), task.sites(model, "sample")
    attack = {"FGM": PGD(norm="l2", eps=0.1, step_size=0.1, steps=1)}
    facts = audit_model(model, batches, sites, evaluator=task, attacks=attack, eps=0.1).facts
    assert facts["examples"] == 10
    assert facts["words"] == {"sample": "flat", "vector": "field"}
    assert [key for key, _ in facts["measures"]] == ["within", "mae", "r2"]
    assert facts["models"]["model"]["worst"]["intervals"]["mae"][0] > 0


def test_fingerprints_are_of_samples_and_weights() -> None:
    def print_of(**options: Any) -> dict[str, Any]:
        attack = {"FGM": PGD(norm="l2", eps=0.1, step_size=0.1, steps=1)}
        facts = audited(attacks=attack, **options).facts
        return {"all": facts["fingerprint"], **facts["fingerprints"]}

    first, again, other = print_of(), print_of(), print_of(model=Linear(2.0))
    assert first == again
    assert other["part"] == first["part"]
    assert other["weights"] != first["weights"]
    assert other["all"] != first["all"]
    assert print_of(batch=batch(torch.tensor([1, 0, 1, 0])))["part"] != first["part"]
    assert print_of(batch=batch().split(3)) == print_of(batch=batch().split(1)) == first
    assert print_of(batch=batch().take(torch.tensor([1, 0, 2, 3])))["part"] != first["part"]


def test_what_is_refused() -> None:
    model, tokens = Linear(), OfTokens()
    site = Site(model.embedding)
    with pytest.raises(ValueError, match="no labels"):
        audit_model(model, Batch({"tokens": TOKENS}), site)
    with pytest.raises(ValueError, match="hold no samples"):
        audit_model(model, [], site)
    for wrong in ({"unit": "absurd"}, {"norm": "l7"}, {"eps": -1.0}, {"eps": math.nan}):
        (key,) = wrong
        with pytest.raises(ValueError, match=f"audit_models: {key} must be"):
            audit_model(model, batch(), site, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an integer"):
        audit_model(model, batch(), site, seed=0.5)  # type: ignore[arg-type]
    for label in (2, -1):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 2\) .* got {label}"):
            audit_model(model, batch(torch.tensor([1, 0, label, 1])), site)
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        audit_model(model, batch(), site, name="a\ud800")
    with pytest.raises(ValueError, match="give one"):
        audit_model(model, batch(), site, kind=Classification(), evaluator=Evaluator())
    with pytest.raises(ValueError, match="no model is given"):
        audit_models({}, batch())
    with pytest.raises(ValueError, match="attacks is empty"):
        audit_model(model, batch(), site, attacks={})
    with pytest.raises(ValueError, match="model by a text, got 3"):
        audit_model(model, batch(), site, name=3)  # type: ignore[arg-type]
    for name in (CLEAN, WORST):
        with pytest.raises(ValueError, match=f"can be called '{name}'"):
            audit_model(model, batch(), site, attacks={name: PGD(norm="l2", eps=0.2)})
    with pytest.raises(ValueError, match=r"2 of 4 samples have no label that counts \(-100\)"):
        audit_model(model, batch(torch.tensor([1, -100, 1, -100])), site)
    with pytest.raises(ValueError, match=r"a sample has one class, and labels are \(4, 2\)"):
        audit_model(tokens, batch(torch.ones(4, 2, dtype=torch.int64)), Site(tokens.embedding))
    with pytest.raises(ValueError, match="got k=10 for outputs"):
        audit_model(model, batch(), site, kind=Ranking())
    with pytest.raises(TypeError, match="returned a dict with scores"):
        audit_model(Wrapped("scores"), batch(), Site(Wrapped("scores").embedding))


def test_a_model_that_returns_a_dict_and_batches_without_samples() -> None:
    model = Wrapped("logits")
    found = audited(model, batch=[batch(), batch().take(torch.arange(0))])
    assert found.facts["models"]["model"]["worst"]["accuracy"] == 0.75
    assert found.facts["examples"] == 4


@pytest.mark.parametrize("eps", [0.35, 0.5, 0.7, 1.1])
def test_the_curve_has_the_eps_of_the_threat(eps: float) -> None:
    """Where an attack of the table alone turned a sample, its place there is eps itself."""
    attack = {"PGD": PGD(norm="l2", eps=eps, step_size=eps / 4, steps=5, keep="best")}
    sweep = audited(eps=eps, attacks=attack).facts["models"]["model"]["sweep"]
    assert eps in sweep["eps"]


@pytest.mark.parametrize("norm", ["l2", "linf", "l1"])
def test_the_usual_attacks_are_those_of_a_recipe(norm: Any) -> None:
    pytest.importorskip("yaml")
    from embattle.jobs.attack_recipe import ThreatRecipe
    from embattle.jobs.audit_recipe import AuditRecipe
    from embattle.jobs.threat import make_attack

    threat = ThreatRecipe(norm=norm, eps=0.3, unit="absolute")
    generator = torch.Generator()
    recipe = AuditRecipe()
    made = {
        label: make_attack(attack, threat, generator, best=True)
        for label, (attack, _) in recipe.table().items()
    }
    assert usual_attacks(norm, 0.3, generator) == made
    search = make_attack(recipe.sweep_attack, threat, generator)
    assert usual_search(norm, 1.0, generator) == (recipe.sweep_attack.label, search)
    assert max(recipe.sweep) == FARTHEST
