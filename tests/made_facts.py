"""Facts of audits that never were: what a report must be able to say, and what it must survive."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from embattle.audit.html import Fallen

Facts = dict[str, Any]

#: Kind of prediction: its measures, and what it is called.
KINDS: dict[str, tuple[list[list[str]], str, str]] = {
    "Classification": ([["accuracy", "accuracy"], ["f1", "F1"], ["auc", "AUC"]], "review", "token"),
    "MultiLabelClassification": ([["all_right", "all right"], ["f1", "F1"]], "post", "token"),
    "Regression": (
        [["within", "close enough (0.5)"], ["mae", "MAE"], ["r2", "R2"]],
        "flat",
        "field",
    ),
    "Ranking": ([["hit_rate", "hit rate@10"], ["ndcg", "NDCG@10"]], "user", "history"),
}
ATTACKS = ("Noise x5", "FGM", "PGD-20 x2")
EPS = [0.0, 0.075, 0.15, 0.3, 0.6, 1.2]

#: What no page may run, load or be broken by.
EVIL = (
    '<script>document.title="owned"</script>',
    '"><img src=x onerror="document.title=\'owned\'">',
    "'; </style></script><svg onload=alert(1)>",
    "\u202egnp.exe \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "W" * 300,
    "\N{FIRE}\N{ZERO WIDTH JOINER}\N{WOMAN} &lt;b&gt; &amp; {count} %s \x00\x1b[31m",
    "javascript:alert(1)",
)


def facts(
    shares: Mapping[str, tuple[float, float]] | None = None,
    *,
    kind: str = "Classification",
    examples: int = 1000,
    failing: int = 0,
) -> Facts:
    """The facts that every audit has.

    Args:
        shares: model to what is right of the examples without and under the strongest attack.
        kind: one of `KINDS`.
        examples: how many there are.
        failing: how many of the checks fail.
    """
    shares = {"standard": (0.92, 0.153), "hardened": (0.915, 0.603)} if shares is None else shares
    measures, sample, vector = KINDS[kind]
    return {
        "name": "made_up",
        "seed": 7,
        "part": "test",
        "examples": examples,
        "task": "text_classification",
        "words": {"sample": sample, "vector": vector},
        "measures": measures,
        "note": "F1 is the mean over the classes.",
        "shown": "confidence in the true label",
        "facts": {"kind": {"name": kind, "classes": ["0", "1"]}},
        "counts": {"train": [2400, 1600], "validation": [120, 80], "test": [600, 400]},
        "reading": [
            "rows               23,486 of 11 columns",
            "dropped            844 rows without text",
            "read by the model  32 tokens of a text at most; 310 of the 5,200 texts are cut",
        ],
        "label": "recommended",
        "chance": 0.6 if kind == "Classification" else None,
        "threat": {"norm": "l2", "group": "sample", "eps": 0.3, "unit": "token_norm"},
        "variants": {name: "plain" if name == "standard" else "mixed" for name in shares},
        "models": {name: _model(*pair, measures) for name, pair in shares.items()},
        "checks": [
            {
                "name": f"{name}: random noise does not beat PGD-20 x2",
                "passed": i >= failing,
                "detail": "accuracy 0.914 under Noise x5, 0.153 under PGD-20 x2",
            }
            for i, name in enumerate(shares)
        ],
        "train_seconds": {name: 61.0 * (1 + 2.1 * (i > 0)) for i, name in enumerate(shares)},
        "audit_seconds": 103.4,
        "environment": {"python": "3.11.4", "torch": "2.13.0", "device": "CPU, 2 threads"},
    }


def _model(clean: float, attacked: float, measures: list[list[str]]) -> Facts:
    def scores(share: float) -> Facts:
        others = {key: round(0.96 * share, 3) for key, _ in measures[1:]}
        return {measures[0][0]: share, **others, "loss": round(1.4 - share, 3)}

    under = {}
    for i, label in enumerate(ATTACKS):
        share = clean + (attacked - clean) * (0.02, 0.8, 1.0)[i]
        under[label] = {
            **scores(share),
            "success_rate": (clean - share) / clean if clean else 0.0,
            "perturbation_norm": 0.326,
            "seconds": 2.0 + 20 * i,
        }
    curve = [clean, *(attacked + (clean - attacked) * math.exp(-9 * e) * 0.9 for e in EPS[1:3])]
    curve += [attacked, attacked * 0.35, attacked * 0.02]
    return {
        "clean": scores(clean),
        "attacks": under,
        "sweep": {"attack": "PGD-10", "eps": EPS, measures[0][0]: curve},
        "vector_norm": 1.084,
    }


def full(shares: Mapping[str, tuple[float, float]] | None = None, *, failing: int = 0) -> Facts:
    """Facts with everything that a report knows how to show."""
    made = facts(shares, failing=failing)
    names = list(made["models"])
    made |= {
        "schema": 2,
        "command": ["embattle", "audit", "runs/made up", "--certify"],
        "fingerprint": "9f" * 32,
        "cost": {
            name: {
                "seconds": made["train_seconds"][name],
                "passes_relative": 3.0 if place else 1.0,
            }
            for place, name in enumerate(names)
        },
        "comparisons": [
            {
                "models": [names[0], name],
                "attack": under,
                "measure": "accuracy",
                "difference": difference,
                "interval": [difference - 0.03, difference + 0.03],
                "p": 1e-24 if under == "worst" else 0.41,
                "p_corrected": 0.0002 if under == "worst" else 0.82,
                "significant": under == "worst",
                "test": "McNemar's exact test",
                "correction": "Holm",
            }
            for name in names[1:]
            for under, difference in (("no attack", -0.005), ("worst", 0.45), ("Swap-1", 0.05))
        ],
    }
    for check in made["checks"]:
        check["reason"] = "Noise knows nothing of the model: an attack that it beats is broken."
    for place, found in enumerate(made["models"].values()):
        found["worst"] = dict(found["attacks"]["PGD-20 x2"])
        for entry in (found["clean"], found["worst"], *found["attacks"].values()):
            share = entry["accuracy"]
            entry["intervals"] = {"accuracy": [share - 0.03, share + 0.03]}
            entry["calibration"] = {"ece": round(0.4 * (1 - share), 3), "brier": 0.12}
            entry["per_class"] = {
                name: {
                    "precision": share,
                    "recall": share - 0.05 * i,
                    "f1": share - 0.02 * i,
                    "count": 400,
                }
                for i, name in enumerate(("0", "1"))
            }
        ends = [[max(0, y - 0.03), min(1, y + 0.03)] for y in found["sweep"]["accuracy"]]
        found["sweep"] |= {"intervals": {"accuracy": ends}, "kind": "minimum_norm"}
        found["sweep"] |= {"attack": "Minimum norm-14", "median_eps": 0.1 + 0.2 * place}
        found["certificates"] = [_certificate(kind, place) for kind in ("smoothing", "margin")]
        found["explanations"] = _explanations()
        found["columns"] = {"Swap-1": _columns(found["clean"])}
    fakes = {**_certificate("fakes", 0), "title": "Lists of an ensemble", "unit": "fake users"}
    made["certificates"] = [fakes]
    return made


def _columns(clean: Facts) -> Facts:
    return {
        **clean,
        "accuracy": 0.377,
        "success_rate": 0.613,
        "intervals": {"accuracy": [0.347, 0.407]},
        "swapped": {"marital status": 0.531, "age": 0.0},
        "noise": {"hours": 0.241},
        "seconds": 1.5,
        "examples": [
            {
                "before": {"marital status": "Never-married"},
                "after": {"marital status": "Widowed"},
                "noise": {"hours": -0.25},
                "label": "1",
                "predictions": ["71%", "32%"],
            }
        ],
    }


def _certificate(kind: str, place: int) -> Facts:
    eps = [0.0, 0.05, 0.1, 0.2, 0.4]
    return {
        "kind": kind,
        "title": "Randomised smoothing" if kind == "smoothing" else "Margin over Lipschitz bound",
        "measure": "accuracy",
        "eps": eps,
        "unit": "in mean norms of a token embedding",
        "certified": [max(0.0, 0.9 - (4 - 2 * place) * e) for e in eps],
        "attacked": [max(0.0, 0.92 - (2.4 - place) * e) for e in eps] if kind == "margin" else None,
        "seconds": 12.5,
        "note": "Holds with 99.9% probability.",
    }


def _explanations() -> Facts:
    words = ["I", "love", "the", "soft", "fabric", "but", "it", "runs", "small", "."]
    shares = [0.01, 0.31, 0.02, 0.24, 0.08, 0.12, 0.03, 0.06, 0.12, 0.01]
    parts = [{"name": w, "share": s} for w, s in zip(words, shares, strict=True)]
    parts[5]["share"] = -0.08
    edge = [[1.4 * math.cos(a / 8), 1.4 * math.sin(a / 8)] for a in range(50)]
    axis = [-2.0 + 0.25 * i for i in range(17)]
    return {
        "carried": sorted(parts, key=lambda part: -part["share"]),
        "samples": [{"parts": parts, "before": "97%", "after": "12%", "label": "1"}],
        "swaps": [
            {
                "before": "I love the soft fabric",
                "after": "I like the soft fabric",
                "before_marks": [[2, 6]],
                "after_marks": [[2, 6]],
                "label": "1",
                "predictions": ["1", "0"],
                "shown": ["97%", "31%"],
                "right": [True, False],
            }
        ],
        "attack": "PGD-10",
        "averaged": 32,
        "landscape": {
            "x": axis,
            "y": axis,
            "z": [[math.tanh(x) + 0.1 * y * y + 1 for x in axis] for y in axis],
            "edge": edge,
        },
    }


def samples(models: int = 2) -> list[list[str]]:
    """Rows of the table of examples."""
    long = "I love this dress so much: it fits me well and the fabric is soft. " * 9
    one: list[str] = [long, "1", *["97%", Fallen("3%")] * models]
    other: list[str] = ["Runs small, itchy, went straight back.", "0", "99%", Fallen("1%")]
    return [one, [*other, *["93%", "71%"] * (models - 1)]]


def histories(names: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Losses that fall."""
    return {
        name: [
            {"loss": math.exp(-i / 60), **({"robust_loss": 1.2 * math.exp(-i / 90)} if k else {})}
            for i in range(200)
        ]
        for k, name in enumerate(names or ["standard", "hardened"])
    }


def hostile() -> tuple[Facts, list[list[str]]]:
    """Full facts whose every text is hostile, and examples of the same kind."""
    number = iter(range(10**6))

    def evil(_: str) -> str:
        return EVIL[next(number) % len(EVIL)]

    made = full()
    for key in ("name", "task", "note", "shown", "label", "fingerprint"):
        made[key] = evil(key)
    made["words"] = {key: evil(key) for key in made["words"]}
    made["measures"] = [[key, evil(key)] for key, _ in made["measures"]]
    made["certificates"] = _changed(made["certificates"], evil, keep=("kind", "measure"))
    for key in ("reading", "command", "checks", "comparisons", "environment", "facts", "variants"):
        made[key] = _changed(made[key], evil, keep=("models", "measure"))
    renamed = {name: f"{name} {evil(name)}" for name in made["models"]}
    for entry in made["comparisons"]:
        entry["models"] = [renamed[name] for name in entry["models"]]
    for found in made["models"].values():
        found["attacks"] = {f"{k} {EVIL[0]}": v for k, v in found["attacks"].items()}
        for key in ("certificates", "explanations"):
            found[key] = _changed(found[key], evil, keep=("kind", "measure"))
        under = _changed(found["columns"]["Swap-1"], evil)
        for key in ("swapped", "noise"):
            under[key] = {f"{name} {evil(name)}": value for name, value in under[key].items()}
        (one,) = under["examples"]
        for key in ("before", "after"):
            one[key] = {f"{name} {EVIL[0]}": value for name, value in one[key].items()}
        found["columns"] = {f"Swap-1 {EVIL[0]}": under}
        for entry in (found["clean"], found["worst"]):
            entry["per_class"] = {f"{k} {EVIL[1]}": v for k, v in entry["per_class"].items()}
    for key in ("models", "train_seconds", "cost", "variants"):
        made[key] = {renamed[name]: value for name, value in made[key].items()}
    rows = [[evil(""), evil(""), *[evil(""), Fallen(evil(""))] * 2] for _ in EVIL]
    return made, rows


def _changed(value: Any, change: Callable[[str], str], *, keep: tuple[str, ...] = ()) -> Any:
    """The same with its texts changed, but for those under some keys."""
    if isinstance(value, dict):
        return {k: v if k in keep else _changed(v, change, keep=keep) for k, v in value.items()}
    if isinstance(value, list):
        return [_changed(item, change, keep=keep) for item in value]
    return change(value) if isinstance(value, str) else value
