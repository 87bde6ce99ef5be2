"""Explanations: what parts of a perturbation did, the landscape, exchanged words, pictures."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import embattle as eb
import pytest
import torch
import toys
from embattle.data.batch import Batch
from embattle.explain import Carried, carried, content_words, landscape, parts, pictures, swapped
from embattle.tasks import Evaluator
from torch import Tensor, nn


class Quadratic(nn.Module):
    """Losses 1/2 v' A v of a sample's vectors v, joined."""

    def __init__(self, tokens: int = 3, dim: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, dim).double()
        square = torch.randn(tokens * dim, tokens * dim, dtype=torch.float64)
        self.matrix = square + square.T

    def forward(self, tokens: Tensor) -> Tensor:
        joined = self.embedding(tokens).flatten(1)
        return 0.5 * ((joined @ self.matrix) * joined).sum(1)


class OneTokenMatters(nn.Module):
    """Reads the vectors of one token alone, wherever it stands."""

    def __init__(self, token: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.token = nn.Embedding(40, 4, padding_idx=0).double(), token

    def forward(self, tokens: Tensor) -> Tensor:
        vectors = self.embedding(tokens) * (tokens == self.token)[..., None]
        return vectors.sum((1, 2)).exp()


def attacked(**options: Any) -> tuple[Callable[[], Any], eb.Site, Tensor, Tensor, Any]:
    """An encoder under attack: loss function, site, mask, tokens, and the result."""
    model = toys.encoder()
    tokens, labels = toys.text_batch()
    site, mask = eb.Site(model.embedding), tokens != 0
    loss = toys.classify(model, tokens, labels)
    attack = eb.PGD(**{"eps": 1.0, "steps": 4, **options})
    result = attack.run(loss, site, mask=mask, criterion=eb.Misclassify(labels))

    def subset(rows: Tensor) -> Callable[[], Any]:
        return toys.classify(model, tokens[rows], labels[rows])

    return loss, site, mask, subset, result


def test_a_quadratic_loss_is_divided_exactly() -> None:
    model, tokens = Quadratic(), torch.tensor([[0, 3, 5], [1, 1, 7]])
    delta = torch.randn(2, 3, 2, dtype=torch.float64)
    found = carried(lambda: model(tokens), eb.Site(model.embedding), [delta], steps=1)
    # The gradient at v + a d is A (v + a d): half of A d is met on the way.
    v, d = model.embedding(tokens).flatten(1).detach(), delta.flatten(1)
    wanted = (d * (v @ model.matrix + d @ model.matrix / 2)).reshape(2, 3, 2).sum(-1)
    torch.testing.assert_close(found.parts[0], wanted)
    torch.testing.assert_close(found.gap, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.clean, model(tokens).detach())
    sizes = delta.square().sum(-1) / delta.square().sum((1, 2))[:, None]
    torch.testing.assert_close(found.sizes[0], sizes)


def test_parts_add_up_and_shares_to_one() -> None:
    loss, site, mask, subset, result = attacked()
    for options in ({}, {"subset": subset}, {"steps": 64}):
        found = carried(loss, site, result.deltas, mask=mask, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found.increase, result.losses - result.clean_losses)
        assert (found.gap.abs() <= 0.01 * found.increase.abs()).all()
        torch.testing.assert_close(
            found.shares()[0].sum(1), torch.ones(len(mask), dtype=torch.float64)
        )
        assert (found.parts[0][~mask] == 0).all()
        assert torch.equal(found.movable[0], mask)
    assert (found.gap.abs() < 1e-9).all()
    assert not site.busy
    again = carried(loss, site, result.deltas, mask=mask, subset=subset)
    alone = carried(loss, site, result.deltas, mask=mask)
    torch.testing.assert_close(again.parts, alone.parts)


def test_the_delta_of_a_joint_attack_is_divided_among_its_outputs() -> None:
    torch.manual_seed(0)
    one, two = nn.Embedding(9, 2).double(), nn.Embedding(9, 5).double()
    tokens = torch.tensor([[0, 3, 5], [1, 1, 7]])

    def loss() -> Tensor:
        return one(tokens).square().sum((1, 2)) + two(tokens[:, :2]).square().sum((1, 2))

    sites = [eb.Site(one), eb.Site(two)]
    result = eb.FGM(eps=1.0).run(loss, sites, joint=True)
    assert result.delta.shape == (2, 16, 1)
    found = carried(loss, sites, result.deltas)
    first, second = result.delta[:, :6].reshape(2, 3, 2), result.delta[:, 6:].reshape(2, 2, 5)
    for part, table, at, delta in (
        (found.parts[0], one, tokens, first),
        (found.parts[1], two, tokens[:, :2], second),
    ):
        before = table(at).detach()
        wanted = ((before + delta).square() - before.square()).sum(-1)
        torch.testing.assert_close(part, wanted)


def test_samples_whose_parts_miss_much_get_more_points() -> None:
    class Steep(nn.Module):
        """The first sample's loss is a line, the second's a step."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(2, 1).double()
            nn.init.zeros_(self.embedding.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)[:, 0, 0]
            return torch.where(tokens[:, 0] == 0, x, torch.sigmoid(60 * (x - 0.47)))

    model = Steep()
    tokens = torch.tensor([[0], [1]])
    counted = []

    def subset(rows: Tensor) -> Callable[[], Tensor]:
        counted.append(rows.tolist())
        return lambda: model(tokens[rows])

    delta, site = torch.ones(2, 1, 1, dtype=torch.float64), eb.Site(model.embedding)
    rough = carried(lambda: model(tokens), site, [delta], subset=subset, steps=6)
    assert rough.gap[1].abs() > 0.01
    counted.clear()
    fine = carried(lambda: model(tokens), site, [delta], subset=subset)
    assert fine.gap.abs().max() < 0.01
    assert any(set(rows) == {1} for rows in counted)
    alone = carried(lambda: model(tokens), site, [delta])
    assert alone.gap.abs().max() < 0.01


def test_a_loss_that_falls_has_no_shares() -> None:
    model, tokens = OneTokenMatters(3), torch.tensor([[3, 1], [2, 1]])
    delta = -torch.ones(2, 2, 4, dtype=torch.float64)
    found = carried(lambda: model(tokens), eb.Site(model.embedding), [delta])
    assert found.increase[0] < 0
    assert found.shares()[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert parts.averages(found, [[["a", "b"], ["a", "b"]]]) == []


def test_captum_gives_the_same() -> None:
    pytest.importorskip("captum")
    loss, site, mask, _, result = attacked()

    def by(method: Any, steps: int) -> Carried:
        return carried(loss, site, result.deltas, mask=mask, method=method, steps=steps)

    mine = by("path", 40)
    torch.testing.assert_close(
        by("integrated_gradients", 40).parts, mine.parts, rtol=1e-6, atol=1e-8
    )
    drawn = by("shapley", 6)
    assert drawn.gap.abs().max() < 1e-6
    assert all(
        torch.equal(one, two) for one, two in zip(drawn.parts, by("shapley", 6).parts, strict=True)
    )
    # Two ways to divide the same rise: not the same, but near on a smooth model.
    assert (drawn.shares()[0] - mine.shares()[0]).abs().max() < 0.1
    assert torch.equal(by("ablation", 1).parts[0] == 0, ~mask)


def test_captums_methods_agree_where_parts_do_not_interact() -> None:
    pytest.importorskip("captum")
    torch.manual_seed(0)
    user, item = nn.Embedding(4, 3).double(), nn.Embedding(5, 3).double()
    users, items = torch.tensor([0, 2, 2]), torch.tensor([1, 1, 4])

    def loss() -> Tensor:
        return user(users).square().sum(1) + item.weight[items].sum(1)

    sites = [eb.Site.weight(user), eb.Site.weight(item)]
    deltas = [torch.randn(4, 3).double(), torch.randn(5, 3).double()]
    each = [
        carried(loss, sites, deltas, method=method, steps=3)  # type: ignore[arg-type]
        for method in ("path", "integrated_gradients", "ablation", "shapley")
    ]
    for found in each:
        # What samples share is divided once, for the sum of their losses.
        assert [tuple(table.shape) for table in found.parts] == [(1, 4), (1, 5)]
        torch.testing.assert_close(found.parts[0], each[0].parts[0], check_dtype=False)
        torch.testing.assert_close(found.parts[1], each[0].parts[1], check_dtype=False)
        assert found.gap.abs().max() < 1e-6
    rows = (user.weight + deltas[0]).square().sum(1) - user.weight.square().sum(1)
    wanted = rows.detach() * torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(each[0].parts[0][0], wanted)


def test_the_one_token_that_matters_gets_all() -> None:
    model = OneTokenMatters(token=7)
    tokens = torch.tensor([[7, 2, 3, 0], [4, 5, 7, 6]])
    # A ball for each token: all move as far, whatever they matter.
    site, mask = eb.Site(model.embedding, group="token"), tokens != 0
    noise = eb.UniformNoise(eps=1.0).run(lambda: model(tokens), site, mask=mask)
    deltas = [noise.delta.abs()]
    found = carried(lambda: model(tokens), site, deltas, mask=mask)
    shares = found.shares()[0]
    torch.testing.assert_close(shares, (tokens == 7).to(shares))
    named = parts.names_of(found, [[[f"t{i}" for i in row] for row in tokens.tolist()]], "token")
    average = parts.averages(found, named)
    assert average[0] == {"name": "t7", "share": pytest.approx(1.0), "count": 2}
    assert all(entry["share"] == 0 for entry in average[1:])
    assert {entry["name"] for entry in average} == {"t7", "t2", "t3", "t4", "t5", "t6"}
    places = parts.averages(found, named, positions=True)
    assert [entry["name"] for entry in places] == ["1", "2", "3", "4"]
    assert places[1]["share"] == places[3]["share"] == 0
    assert places[0]["share"] + places[2]["share"] == pytest.approx(1.0)
    one, two = parts.of_samples(found, named)
    assert [entry["name"] for entry in one] == ["t7", "t2", "t3"]
    assert [round(entry["share"], 9) for entry in two] == [0, 0, 1, 0]


def test_what_parts_miss_of_several_samples_does_not_cancel() -> None:
    """.2 too little of the first, .2 too much of the second, of 1 and 2 that the losses rose."""
    part, true = torch.tensor([[0.8], [2.2]]), torch.ones(2, 1, dtype=torch.bool)
    off = Carried(torch.zeros(2), torch.tensor([1.0, 2.0]), [part], [part], [true], "path")
    assert parts.missed(off) == pytest.approx(0.4 / 3)
    assert parts.missed(replace(off, attacked=torch.zeros(2))) == 0


def test_names_that_are_missing_or_do_not_fit_are_numbers() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    true = torch.ones(2, 2, dtype=torch.bool)
    one = Carried(torch.zeros(2), table.sum(1), [table], [table], [true], "path")
    assert parts.names_of(one, [], "field") == [[["field 1", "field 2"]] * 2]
    assert parts.names_of(one, [[["a", "b"]]], "field") == [[["a", "b"]] * 2]
    assert parts.names_of(one, [[["a"], ["b"]]], "field") == [[["field 1", "field 2"]] * 2]
    two = Carried(torch.zeros(2), table.sum(1), [table] * 2, [table] * 2, [true] * 2, "path")
    assert parts.names_of(two, [[["a", "b"]]], "row")[1][0] == [
        "row 1 of output 2",
        "row 2 of output 2",
    ]
    many = torch.arange(100.0)[None]
    long = Carried(torch.zeros(1), many.sum(1), [many], [many / many.sum()], [many >= 0], "path")
    (shown,) = parts.of_samples(long, parts.names_of(long, [], "row"))
    assert len(shown) == parts.SHOWN
    assert shown[0]["name"] == "row 62"
    assert shown[-1]["name"] == "(61 others)"
    assert sum(entry["share"] for entry in shown) == pytest.approx(1.0)


def test_the_landscape_has_the_clean_point_and_the_attack() -> None:
    loss, site, mask, subset, result = attacked()
    found = landscape(loss, site, result.deltas, mask=mask, subset=subset, lines=9, seed=3)
    assert found.x == found.y == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert found.z[4][4] == pytest.approx(float(result.clean_losses.mean()))
    assert found.z[4][6] == pytest.approx(float(result.losses.mean()))
    assert found.samples == len(mask)
    assert all(math.hypot(x, y) == pytest.approx(1) for x, y in found.edge)
    again = landscape(loss, site, result.deltas, mask=mask, lines=9, seed=3)
    torch.testing.assert_close(torch.tensor(again.z), torch.tensor(found.z))
    other = landscape(loss, site, result.deltas, mask=mask, lines=9, seed=4)
    assert other.z[4] == pytest.approx(again.z[4])
    assert other.z[0] != pytest.approx(again.z[0])
    steep = landscape(loss, site, result.deltas, mask=mask, lines=3, second="gradient")
    # Downhill of the gradient's direction across is lower than uphill.
    assert steep.z[0][1] < steep.z[1][1] < steep.z[2][1]


@pytest.mark.parametrize("group", ["sample", "token"])
def test_the_two_directions_are_at_right_angles_and_as_long(group: Any) -> None:
    embedding = nn.Embedding(5, 6).double()
    nn.init.zeros_(embedding.weight)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    site, mask = eb.Site(embedding, group=group), torch.tensor([[True, True, False], [True] * 3])
    delta = torch.randn(2, 3, 6, dtype=torch.float64) * mask[..., None]

    def loss() -> Tensor:  # of a sample's vectors, the squared norm
        return embedding(tokens).square().sum((1, 2))

    found = landscape(loss, site, [delta], mask=mask, lines=5)
    squared = float(delta.square().sum((1, 2)).mean())
    for y, line in zip(found.y, found.z, strict=True):
        wanted = [(x * x + y * y) * squared for x in found.x]
        assert line == pytest.approx(wanted)
    edge = landscape(loss, site, [delta / delta.norm()], mask=mask, eps=0.5, lines=3).edge
    assert len({round(math.hypot(x, y), 6) for x, y in edge}) == 1
    flat = landscape(loss, site, [delta.sign()], norm="linf", mask=mask, lines=3).edge
    along = max(x for x, _ in flat)
    assert along == pytest.approx(1.0)
    assert max(math.hypot(x, y) for x, y in flat) > 1.0 - 1e-9


def test_what_makes_no_sense_is_refused() -> None:
    loss, site, mask, _, result = attacked()
    with pytest.raises(ValueError, match=r"deltas: their shapes are .* this batch needs"):
        carried(loss, site, [result.delta[:2]], mask=mask)
    with pytest.raises(ValueError, match="method must be one of"):
        carried(loss, site, result.deltas, mask=mask, method="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        carried(loss, site, result.deltas, mask=mask, steps=0)
    with pytest.raises(ValueError, match="explanations need losses"):
        carried(lambda: eb.Evaluation(outputs=loss().outputs), site, result.deltas, mask=mask)
    with pytest.raises(ValueError, match="lines must be odd"):
        landscape(loss, site, result.deltas, mask=mask, lines=4)
    with pytest.raises(ValueError, match="finite"):
        landscape(lambda: loss().losses * math.inf, site, result.deltas, mask=mask, lines=3)


def test_swaps_are_whole_words_and_judged_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from embattle.models.pretrained import load_encoder
    from embattle.models.text import TextClassifier
    from tiny_job import BAD, GOOD, PLAIN, make_encoder

    torch.manual_seed(0)
    parts_of = load_encoder(str(make_encoder(tmp_path / "encoder")), None, 0.0)
    model = TextClassifier(*parts_of, classes=("bad", "good"), pooling="mean", max_tokens=12)
    texts = [
        f"{PLAIN[i]} {(GOOD if i % 2 else BAD)[i % 5]} {PLAIN[(i + 3) % 10]}" for i in range(10)
    ]
    batch = model.encode(texts, [i % 2 for i in range(10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**batch.inputs), batch.known_labels()).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    words = model.words("input_ids", "attention_mask")
    allowed = content_words(words, [batch.inputs["input_ids"]], 24, most=0.5)
    names = words.shown(torch.nonzero(allowed).flatten()[None])[0]
    assert set(names) <= {*GOOD, *BAD, *PLAIN} - {"a", "is"}
    assert "[PAD]" not in names
    found = swapped(model, batch, words, Evaluator(), allowed=allowed, similarity=None)
    assert len(found) >= 5
    labels = batch.known_labels()
    turned = 0
    for one in found:
        assert one.before == texts[one.row]
        for text, output in ((one.before, one.before_output), (one.after, one.after_output)):
            again = model.encode([text], [0])
            torch.testing.assert_close(output, model(**again.inputs)[0])
        old, new = one.before.split(), one.after.split()
        differ = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert 1 <= len(differ) <= 3
        assert [one.before[a:b] for a, b in one.before_marks] == [a for a, _ in differ]
        assert [one.after[a:b] for a, b in one.after_marks] == [b for _, b in differ]
        assert {word for pair in differ for word in pair} <= set(names)
        turned += int(one.before_output.argmax() == labels[one.row] != one.after_output.argmax())
    assert turned >= 3
    # A text that is not read back as it is written is left out: here an unknown word.
    odd = model.encode(["unheard of", *texts[:2]], [0, 0, 1])
    assert 0 not in {one.row for one in swapped(model, odd, words, Evaluator(), allowed=allowed)}
    fixed = Batch(batch.inputs, batch.labels, torch.zeros_like(batch.inputs["input_ids"]).bool())
    assert swapped(model, fixed, words, Evaluator(), allowed=allowed, similarity=None) == []


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_words_are_found_as_each_tokenizer_marks_them(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from embattle.models.words import Words

    kinds, before, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    texts = ["She wouldn't like red dress", "She saw red night"]
    if kind == "bytes":  # of GPT-2's kind, which knows no unknown token, and has "'t" as a token
        made, marks, trainer = (
            tokenizers.Tokenizer(kinds.BPE()),
            before.ByteLevel(add_prefix_space=False),
            trainers.BpeTrainer(show_progress=False, vocab_size=400),
        )
    else:  # as Llama 2's, which puts a space before every text
        made, marks, trainer = (
            tokenizers.Tokenizer(kinds.WordLevel(unk_token="<unk>")),
            before.Sequence([before.Split("'", "isolated"), before.Metaspace()]),
            trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
        )
    made.pre_tokenizer = marks
    decoders = tokenizers.decoders
    made.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    made.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    words = Words(tokenizer, nn.Embedding(400, 2), "input_ids", "attention_mask", 20)
    allowed = content_words(words, ids, 400, most=0.5)
    names = words.shown(torch.nonzero(allowed).flatten()[None])[0]
    # "She" and "red" are in all texts.
    assert sorted(names) == ["dress", "like", "night", "saw"]


def test_pictures_escape_what_comes_from_outside() -> None:
    evil = "<script>alert('x')</script>\"&\x00\x1b[31m\u202e\ud800"
    entries = [{"name": evil, "share": 0.7}, {"name": "b" * 500, "share": -0.3}]
    plane = {"x": [-1.0, 0.0, 1.0], "y": [-1.0, 0.0, 1.0], "z": [[1.0, 2.0, 3.0]] * 3}
    drawn = {
        "bars": pictures.bars(evil, entries),
        "words": pictures.word_heat(evil, entries * 40),
        "map": pictures.heat_map(evil, {**plane, "edge": [[1.0, 0.0], [0.0, 1.0]], "second": evil}),
        "empty": pictures.bars("none", []),
        "flat": pictures.heat_map("flat", {**plane, "z": [[0.0] * 3] * 3}),
    }
    for name, svg in drawn.items():
        assert "<script" not in svg, name
        tree = ET.fromstring(svg)
        assert tree.tag.endswith("svg")
        kinds = {element.tag.split("}")[1] for element in tree.iter()}
        assert kinds <= {"svg", "g", "title", "text", "rect", "circle", "polygon"}
    assert "&lt;script&gt;" in drawn["bars"]
    shares = [e.text for e in ET.fromstring(drawn["bars"]).iter() if (e.text or "").endswith("%")]
    assert shares == ["70.0%", "-30.0%"]
    assert len(ET.fromstring(drawn["map"]).findall(".//{*}rect")) == 9 + 60
