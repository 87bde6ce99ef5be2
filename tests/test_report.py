"""What a report says: the verdict of every kind and outcome, all parts of the facts, escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import made_facts
import pytest
from embattle.audit import html, verdict, words
from embattle.audit.figures import Chart, Line, losses_over_steps, ticks
from embattle.audit.report import document, summary_rows
from embattle.audit.sections import curve
from embattle.audit.terms import meaning, prose

HELPED = {"standard": (0.92, 0.153), "hardened": (0.915, 0.603)}


def text_of(page: str) -> str:
    """What a page says, without style and script."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(page)
    return " ".join(" ".join(found).split())


def said(facts: dict[str, Any]) -> str:
    return verdict.verdict(facts).sentence


def test_the_verdict_says_what_hardening_keeps_and_costs() -> None:
    found = verdict.verdict(made_facts.facts(HELPED))
    assert found.sentence == (
        "Hardening keeps 60 of 100 reviews right under the strongest attack; without it, 15. It "
        "costs 0.5 points of accuracy without an attack (which may be chance) and 3.1 times the "
        "training time."
    )
    assert (found.figure, found.tone) == ("60%", "good")
    assert found.caption == "accuracy under the strongest attack, hardened"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("MultiLabelClassification", "Hardening keeps 60 of 100 posts right in every label under"),
        ("Regression", "Hardening keeps 60 of 100 predictions close enough under"),
        (
            "Ranking",
            "Hardening keeps the right item among the recommended ones for 60 of 100 users under",
        ),
    ],
)
def test_the_verdict_of_other_kinds(kind: str, words: str) -> None:
    facts = made_facts.facts(HELPED, kind=kind)
    assert said(facts).startswith(words)
    assert "; without it, 15. It costs 0.5 points of " in said(facts)
    facts["measures"][0] = ["bleu", "BLEU"]
    for model in facts["models"].values():
        for entry in (model["clean"], *model["attacks"].values()):
            entry["bleu"] = next(iter(entry.values()))
    assert "keeps 60 of 100" in said(facts)
    assert "(BLEU)" in said(facts)


@pytest.mark.parametrize(
    ("shares", "begins", "tone"),
    [
        ({"standard": (0.9, 0.2)}, "The strongest attack leaves 20 of 100 reviews right", ""),
        (
            {"standard": (0.9, 0.5), "hardened": (0.9, 0.51)},
            "Hardening did not clearly help here: under the strongest attack it keeps 51 of 100 "
            "reviews right, the standard model 50; such a difference may be chance.",
            "",
        ),
        (
            {"standard": (0.9, 0.5), "hardened": (0.9, 0.3)},
            "Hardening made things worse here: under the strongest attack it keeps 30",
            "bad",
        ),
        ({"standard": (0.9, 0.2), "trades": (0.9, 0.6)}, "“trades” keeps 60 of 100", "good"),
        (
            {"standard": (0.9, 0.5), "trades": (0.9, 0.5)},
            "“trades” is not clearly more robust than the standard model: ",
            "",
        ),
        (
            {"standard": (0.9, 0.5), "trades": (0.9, 0.3)},
            "“trades” is less robust than the standard model: ",
            "bad",
        ),
        (
            {"standard": (0.9, 0.2), "a": (0.9, 0.6), "b": (0.9, 0.7), "c": (0.9, 0.1)},
            "Of 3 models beside the standard model, “b” holds best: under the strongest attack "
            "it keeps 70 of 100 reviews right, the standard model 20.",
            "good",
        ),
        (
            {"standard": (0.9, 0.5), "a": (0.9, 0.5), "b": (0.9, 0.51)},
            "No model is clearly more robust than the standard model: under the strongest attack "
            "the best, “b”, keeps 51",
            "",
        ),
        (
            {"standard": (0.9, 0.5), "a": (0.9, 0.2), "b": (0.9, 0.3)},
            "All other models are less robust than the standard model: ",
            "bad",
        ),
        ({"first": (0.9, 0.2), "second": (0.9, 0.6)}, "“second” keeps 60 of 100 reviews right "
         "under the strongest attack, “first” 20.", "good"),
    ],
)  # fmt: skip
def test_the_verdict_of_every_outcome(
    shares: dict[str, tuple[float, float]], begins: str, tone: str
) -> None:
    found = verdict.verdict(made_facts.facts(shares))
    assert found.sentence.startswith(begins), found.sentence
    assert found.tone == tone


def test_failed_checks_come_first_and_unknown_figures_are_said() -> None:
    found = verdict.verdict(made_facts.facts(HELPED, failing=1))
    assert found.sentence.startswith(
        "Do not trust these figures: 1 of 2 checks on the attacks fails"
    )
    assert found.tone == "bad"
    facts = made_facts.facts({"standard": (0.9, float("nan"))})
    for entry in facts["models"]["standard"]["attacks"].values():
        entry["accuracy"] = None
    assert verdict.verdict(facts).figure == words.NONE
    assert "no figure" in said(facts)
    assert document(facts)


def test_the_audits_own_comparison_decides() -> None:
    facts = made_facts.full({"standard": (0.9, 0.5), "hardened": (0.9, 0.51)})
    assert said(facts).startswith("Hardening keeps 51 of 100")
    for entry in facts["comparisons"]:
        entry["significant"] = False
    assert "did not clearly help" in said(facts)
    # Without one, two standard errors of the difference: sqrt(2 * 0.5 * 0.5 / 1000) * 2 = 0.0447.
    facts["comparisons"] = []
    for share, clear in ((0.544, False), (0.546, True)):
        facts["models"]["hardened"]["worst"]["accuracy"] = share
        assert verdict.clear(facts, "hardened", "standard", "worst") == clear


def test_the_worst_of_all_attacks_goes_before_the_strongest() -> None:
    facts = made_facts.facts(HELPED)
    facts["models"]["hardened"]["attacks"]["FGM"]["accuracy"] = 0.55  # by accident below PGD's
    assert verdict.strongest(facts, "hardened")[0] == "FGM"
    assert said(facts).startswith("Hardening keeps 55 of 100")
    facts["models"]["hardened"]["worst"] = {"accuracy": 0.5}
    assert said(facts).startswith("Hardening keeps 50 of 100")


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ([0.6, 0.15], 1000, (["60", "15"], "100")),
        ([0.5, 0.25], 32, (["16", "8"], "32")),
        ([0.604, 0.602], 5000, (["604", "602"], "1,000")),
        ([0.604, 0.602], 500, (["60", "60"], "100")),
        ([0.001, 1.0], 5000, (["fewer than 1", "100"], "100")),
        ([0.999, 0.0], 900, (["more than 99", "0"], "100")),
        ([0.5, 0.5], 900, (["50", "50"], "100")),
    ],
)
def test_shares_as_counts(shares: list[float], count: int, expected: tuple[list[str], str]) -> None:
    assert words.among(shares, count) == expected


@pytest.mark.parametrize(
    ("share", "figure"),
    [(0.0, "0%"), (0.003, "<1%"), (0.006, "1%"), (0.994, "99%"), (0.997, ">99%"), (1.0, "100%")],
)
def test_the_verdicts_figure_is_none_or_all_only_where_it_is(share: float, figure: str) -> None:
    facts = made_facts.facts({"standard": (1.0, share)})
    assert verdict.verdict(facts).figure == figure
    assert f"<b>{figure.replace('<', '&lt;').replace('>', '&gt;')}</b>" in document(facts)


def test_cost_is_the_facts_or_the_seconds() -> None:
    facts = made_facts.facts(HELPED)
    facts["train_seconds"] = {"standard": 50.0, "hardened": 51.0}
    assert said(facts).endswith("and no more training time.")
    facts["cost"] = {
        "standard": {"seconds": 50},
        "hardened": {"seconds": 200, "passes_relative": 3},
    }
    assert said(facts).endswith("and 4.0 times the training time.")
    assert verdict.costs(facts)["hardened"] == {"seconds": 200.0, "times": 4.0, "passes": 3.0}
    del facts["cost"], facts["train_seconds"]
    assert said(facts).endswith("(which may be chance).")
    facts["models"]["hardened"]["clean"]["accuracy"] = 0.96
    assert said(facts).endswith("no accuracy without an attack (it gains 4.0 points).")


def test_all_that_the_facts_have_is_shown_and_nothing_else() -> None:
    parts = {
        "Are the differences more than chance?": "comparisons",
        "What is proven": "certificates",
        "ensemble of MF": "certificates of no model",
        "eps (fake users)": "certificates of no model",
        "it counts neither in the worst of all attacks": "columns",
        "marital status: Never-married → Widowed; hours -0.25 sd": "columns",
        "0.377 0.347 to 0.407": "columns",
        "marital status 53.1%": "columns",
        "Class by class": "per_class",
        "How the attack works": "explanations",
        "Brier": "calibration",
        "worst of all attacks": "worst",
        "McNemar": "comparisons",
        "9f9f9f": "fingerprint",
        "embattle audit 'runs/made up' --certify": "command",
        "an attack that it beats is broken": "reason",
        "passes, relative": "cost",
        "12.3 to 18.3%": "intervals",
        "Half of those that were turned fell within eps 0.1 (": "median_eps",
    }
    full = text_of(document(made_facts.full(), samples=made_facts.samples()))
    plain = text_of(document(made_facts.facts(), samples=made_facts.samples()))
    for words_shown, key in parts.items():
        assert words_shown in full, key
        assert words_shown not in plain, key
    for page in (full, plain):
        for always in ("Model against model", "Accuracy over eps", "844 rows without text"):
            assert always in page
        assert "recommended: 1" in page
        assert "32 tokens of a text at most" in page
    assert "Training" not in text_of(
        document({**made_facts.facts(), "train_seconds": {}, "variants": {}})
    )


def test_a_report_can_be_made_again_from_metrics_json() -> None:
    facts = made_facts.full()
    again = json.loads(json.dumps(facts))
    assert document(facts, samples=made_facts.samples()) == document(
        again, samples=made_facts.samples()
    )
    # What is not defined is null there.
    for entry in again["models"]["hardened"]["attacks"].values():
        entry.update(auc=None, accuracy=None, intervals={"accuracy": None}, calibration=None)
    assert document(again)
    assert summary_rows(again, ["hardened"])[2][1] == words.NONE


def test_an_audit_without_a_recipe_has_a_report_too() -> None:
    facts = made_facts.facts({"mine": (0.9, 0.2)})
    facts |= {"seed": None, "part": None, "task": None, "audit_seconds": None, "chance": None}
    for key in ("facts", "counts", "reading", "label", "variants", "train_seconds", "environment"):
        del facts[key]
    del facts["models"]["mine"]["sweep"], facts["models"]["mine"]["vector_norm"]
    facts["threat"]["unit"] = "absolute"
    page = text_of(document(facts))
    assert "A model on 1,000 reviews. " in page
    assert "The strongest attack leaves 20 of 100 reviews right" in page
    assert "None" not in page
    assert "How it was made" not in page


def test_everything_from_outside_is_escaped() -> None:
    facts, samples = made_facts.hostile()
    page = document(facts, settings=made_facts.EVIL[2], samples=samples)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert "<svg onload" not in page
    assert page.count("&lt;script&gt;") > 20
    assert not re.search("[\u202a-\u202e\x00-\x08\x1b]", page)
    svg = ElementTree.fromstring(curve(facts).file())
    assert {element.tag.split("}")[1] for element in svg.iter()} <= {
        *("svg", "title", "desc", "style", "rect", "text", "line", "path", "circle")
    }


def test_building_blocks_escape_what_they_are_given() -> None:
    evil = "<script>alert('x')</script>"
    page = html.page(
        evil,
        [
            html.heading(evil, evil, above=evil),
            html.headline(evil, evil, evil, tone=evil, more=html.badges([(evil, evil)])),
            html.table([evil], [["!" + evil]], groups=[(evil, 1)], text=[0], caption=evil),
            html.checks([{"passed": False, "name": evil, "detail": evil, "reason": evil}]),
            html.source(evil),
            html.tiles([(evil, {evil: evil})], legends=[evil], notes=[{evil: evil}]),
            html.paragraph(evil),
            html.subheading(evil),
            html.clipped(evil * 20),
            html.box(evil),
            html.section(evil, note=evil),
        ],
        contents=True,
    )
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;") > 30


def test_the_policy_names_style_and_script_by_their_hashes() -> None:
    page = html.page("title", [html.section("part", html.paragraph("words"))])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert 'style="' not in document(made_facts.full(), samples=made_facts.samples())


def test_terms_are_explained_where_they_stand() -> None:
    assert meaning("PGD-20 x2") == (
        "Projected gradient descent: many small steps uphill on the loss, each brought back into "
        "what is allowed; 20 steps; 2 tries from random points, of which the worst counts."
    )
    assert meaning("Noise x5") is not None
    assert meaning("FGM") is not None
    assert "exchanged" in str(meaning("Swap-2, noise l2 0.5"))
    assert "gradient" in str(meaning("noise linf 0.25"))
    assert meaning("FGSM") != meaning("FGM")
    assert meaning("a column of mine") is None
    assert prose("eps and eps").count("<a") == 1
    assert prose("epsilon, lossy, <b>") == "epsilon, lossy, &lt;b&gt;"
    page = html.page("t", [html.paragraph("eps"), html.paragraph("eps of PGD-3")])
    assert page.count("<dt>") == 2
    assert "<dt>" not in html.page("t", [html.paragraph("nothing")])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.2, [0, 0.25, 0.5, 0.75, 1.0, 1.25]),
        (0.0, 0.003, [0, 0.001, 0.002, 0.003]),
        (-3.0, 17.0, [-5, 0, 5, 10, 15, 20]),
        (2.0, 2.0, [2, 2.2, 2.4, 2.6, 2.8, 3]),
    ],
)
def test_ticks_are_round_and_span_all(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_puts_its_points_where_they_belong() -> None:
    line = Line("m", [0.0, 1.0, 2.0], [1.0, float("nan"), 0.25], 0, low=[0.9], high=[1.0])
    chart = Chart("title", [line], "eps", "share", x_mark=(1.0, "threat"), said="words")
    svg = ElementTree.fromstring(chart.file())
    name = "{http://www.w3.org/2000/svg}"
    dots = [dot for dot in svg.iter(f"{name}circle") if "dot" in dot.attrib["class"]]
    places = [(dot.attrib["cx"], dot.attrib["cy"]) for dot in dots]
    assert places == [("0.00%", "0.00%"), ("100.00%", "75.00%")]
    paths = [path.attrib["d"] for path in svg.iter(f"{name}path") if "vector-effect" in path.attrib]
    assert paths == ["M0.0 0.0 L1000.0 750.0"]
    assert "m: 100.0% (90.0% to 100.0%) at 0" in "".join(svg.itertext())
    empty = Chart("title", [Line("m", [], [], 0)], "eps", "share")
    assert empty.html() == ""
    assert ElementTree.fromstring(empty.file()) is not None


def test_losses_are_thinned_and_keep_their_end() -> None:
    history = [{"loss": 1.0 if i < 1999 else 0.0} for i in range(2000)]
    (line,) = losses_over_steps({"m": history}, most=100).lines
    assert len(line.x) <= 101
    assert line.x[-1] == 2000
    assert line.y[-1] == pytest.approx(199 / 200)
