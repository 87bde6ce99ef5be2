"""`embattle init`: the recipe that it writes for a file loads and trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import made_tables
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from embattle.data.account import Account
from embattle.errors import InputError
from embattle.jobs import recipe as recipes
from embattle.jobs.init import Draft, look, recipe_of
from made_tables import table
from tiny_job import invoke, make_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def visits(path: Path) -> Path:
    """Who met what and when."""
    rows = [
        (f"u{i % 12}", f"s{(i * 7 + i // 12) % 20}", f"2024-01-{1 + i // 12:02}") for i in range(96)
    ]
    return table(path, ("customer_id", "product", "date"), rows)


def clicks(path: Path) -> Path:
    rows = [(f"u{i % 12}", f"i{i % 20}", "AB"[i % 2], i % 3 == 0, i) for i in range(120)]
    names = ("user", "item", "device", "clicked", "timestamp")
    return table(path, names, [(u, s, d, int(c), t) for u, s, d, c, t in rows])


def coded(path: Path) -> Path:
    """The columns of Criteo's files, with names."""
    names = ["label", *(f"I{i}" for i in range(1, 5)), *(f"C{i}" for i in range(1, 6))]
    rows = [
        [i % 2, *(i % k for k in range(5, 9)), *("abc"[i % 3] * k for k in range(1, 6))]
        for i in range(120)
    ]
    return table(path, names, rows)


def stars(path: Path) -> Path:
    """Ratings without times."""
    rows = [(f"u{i % 12}", f"i{i % 20}", 1 + i % 5) for i in range(120)]
    return table(path, ("user", "item", "stars"), rows)


KINDS: dict[str, tuple[Callable[[Path], Path], str, dict[str, object]]] = {
    "texts": (
        made_tables.drug_reviews,
        "text_classification",
        {"text": ["review"], "label": "rating"},
    ),
    "posts": (made_tables.posts, "text_classification", {"text": ["text"], "label": "reaction"}),
    "table": (made_tables.patients, "tabular", {"label": "TenYearCHD", "ignore": []}),
    "first": (made_tables.holders, "tabular", {"label": "default"}),
    "ratings": (made_tables.film_ratings, "item_ranking", {"item": "movie_id", "k": 10}),
    "stars": (
        stars,
        "click_through",
        {"fields": ["user", "item"], "label": "stars", "at_least": 3.0},
    ),
    "clicks": (clicks, "click_through", {"fields": ["user", "item", "device"], "label": "clicked"}),
    "coded": (coded, "click_through", {"dense": ["I1", "I2", "I3", "I4"], "label": "label"}),
    "visits": (visits, "next_item", {"user": "customer_id", "rating": None, "time": "date"}),
    "news": (made_tables.news, "news_clicks", {"text": ["title"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_for_a_file_trains(
    kind: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, task, data = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    file = Path("mind" if kind == "news" else "my file.csv")
    write(file)
    status, said = invoke("init", file)
    assert status == 0, said
    assert f"task {task}" in said
    written = Path("mind.yaml" if kind == "news" else "my_file.yaml")
    recipe = recipes.load(written)
    assert recipe.task == task
    assert {name: getattr(recipe.data, name) for name in data} == data
    changes = ["train.steps=2", "train.batch_size=8"]
    if hasattr(recipe.model, "pretrained"):
        changes += [f"model.pretrained={encoder}", "model.layers=1"]
    words = [word for change in changes for word in ("--set", change)]
    status, said = invoke("train", written, "--out", "run", *words)
    assert status == 0, said
    lines = [line for line in written.read_text().splitlines() if line.startswith("  ")]
    assert sum("# " in line for line in lines) > len(lines) / 3
    assert max(map(len, written.read_text().splitlines())) <= 100


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file, out = made_tables.holders(tmp_path / "a.csv"), tmp_path / "kept.yaml"
    out.write_text("mine")
    status, said = invoke("init", file, "--out", out)
    assert status == 2
    assert "is there already; choose another file with --out" in said
    assert out.read_text() == "mine"
    assert invoke("init", file, "--out", tmp_path / "new.yaml")[0] == 0


@pytest.mark.parametrize("name", ["2024", "on", "null", "2020-01-31"])
def test_a_file_may_be_called_by_what_yaml_reads_as_no_text(name: str, tmp_path: Path) -> None:
    file, out = made_tables.holders(tmp_path / f"{name}.csv"), tmp_path / "a.yaml"
    status, said = invoke("init", file, "--out", out)
    assert status == 0, said
    assert recipes.load(out).name == name


def test_columns_are_seen_as_what_they_are(tmp_path: Path) -> None:
    rows = [
        (i, f"c{i}", f"2024-01-{1 + i % 28:02}", "", i % 7, "xyz"[i % 3], "ab"[i % 2], i % 5)
        for i in range(300)
    ]
    names = ("patient_id", "code", "seen", "notes", "thyroid", "target", "sex", "dose")
    draft = look(table(tmp_path / "a.csv", names, rows))
    data = {key: value for key, value, _ in draft.data}
    about = {key: comment for key, _, comment in draft.data}
    assert (draft.task, draft.rows, data["label"]) == ("tabular", 300, "sex")
    assert data["ignore"] == ["patient_id", "code", "seen", "notes", "target"]
    assert "'target' has not" in about["label"]
    # Whatever a column is called, its name survives the recipe.
    odd = ["is: it\n# so", "yes", "1", "Ünï 'q' \"x\""]
    table(tmp_path / "odd.csv", odd, [("a" * (i % 4), i % 3, i % 7, i % 2) for i in range(90)])
    assert invoke("init", tmp_path / "odd.csv", "--out", tmp_path / "odd.yaml")[0] == 0
    recipe = recipes.load(tmp_path / "odd.yaml")
    assert (recipe.data.label, recipe.data.ignore) == (odd[3], [])
    drafted = recipe_of(
        Draft("tabular", "x", [("ignore", odd, "y"), ("label", odd[0], "")], 9, {}), "n"
    )
    assert yaml.safe_load(drafted)["data"] == {"ignore": odd, "label": odd[0]}
    # A label is counted over the whole file, not in its first rows alone.
    late = [(i, i % 9, "no" if i < 1500 else "yes") for i in range(3000)]
    draft = look(table(tmp_path / "b.csv", ("age", "dose", "ill"), late))
    assert {key: value for key, value, _ in draft.data}["label"] == "ill"


def test_numbers_that_name_something_are_categories(tmp_path: Path) -> None:
    names = ("user_id", "item_id", "ad_id", "row_id", "price", "clicked", "timestamp")
    rows = [(i % 12, i % 20, i % 50, i, f"{i / 7:.2f}", i % 3 // 2, 1000 + i) for i in range(240)]
    file, out = table(tmp_path / "a.csv", names, rows), tmp_path / "a.yaml"
    assert invoke("init", file, "--out", out)[0] == 0
    text = out.read_text()
    assert "# categories; left out: 'row_id', 'price', 'timestamp'\n" in text
    assert "  fields: [user_id, item_id, ad_id]\n" in text


def events(*, rating: str = "{}", time: str = "{}", rare: str = "") -> str:
    """Ratings in a file of semicolons, every 50th one `rare`."""
    lines = ["user_id;item_id;rating;timestamp"]
    for i in range(240):
        given = rare if i % 50 == 49 and rare else rating.format(1 + i % 5)
        lines.append(f"{i % 12:03};{(i * 7 + i // 12) % 20};{given};{time.format(i, 1 + i % 28)}")
    return "\n".join(lines) + "\n"


def adults(*, label: str = "{}", rare: str = "", debt: str = "{}.5") -> str:
    """A table of numbers and categories, every 20th label `rare`."""
    lines = ["age\tjob\tdebt\tdefault"]
    for i in range(200):
        given = rare if i % 20 == 0 and rare else label.format(int(i % 50 > 25))
        lines.append(
            f"{18 + i % 50}\t{'abcd'[i % 4]}\t{debt.format(i) if i != 9 else 'n/a'}\t{given}"
        )
    return "\n".join(lines) + "\n"


def opinions(*, rare: str = "") -> str:
    """Texts with labels, the ones of the last rows `rare`."""
    lines = ["review,label"]
    lines += [f"well it is {'good' if i % 2 else 'bad'} {i},{i % 2}" for i in range(1200)]
    return "\n".join([*lines, *(f"so it is {i},{rare}" for i in range(3))]) + "\n"


DROP = {"blank_cells": "drop"}


@pytest.mark.parametrize(
    ("text", "task", "data"),
    [
        (events(rating="{},5"), "item_ranking", {"missing": []}),
        (events(time="10/{1}/2020"), "item_ranking", {"blank_cells": "refuse"}),
        (events(rare=" "), "item_ranking", DROP),
        (events(rare="n/a"), "item_ranking", {"missing": ["n/a"], **DROP}),
        (events(rare="inf"), "item_ranking", {"missing": ["inf"], **DROP}),
        (events(rating="5"), "item_ranking", {"ragged_rows": "refuse"}),
        (events() + "7;3\n1;2;3;4;5\n", "item_ranking", {"ragged_rows": "drop"}),
        (adults() + "50\tclerk\n", "tabular", {"ragged_rows": "drop"}),
        (opinions() + "so, it is,1\n", "text_classification", {"ragged_rows": "drop"}),
        (
            events(rating="{},5", time="", rare="NA").replace("timestamp", "z"),
            "click_through",
            {"at_least": 3.5, "missing": ["NA"], "blank_labels": "drop"},
        ),
        (adults(rare="NA"), "tabular", {"label": "default", "missing": ["?", "NA", "n/a"]}),
        (adults(rare="null", label="0{}"), "tabular", {"missing": ["?", "NA", "n/a", "null"]}),
        (adults().replace("debt", "job"), "tabular", {"ignore": ["job"]}),
        (
            adults(label="x{}").replace("x0", "none").replace("n/a", "none"),
            "tabular",
            {"label": "default", "missing": ["?", "NA"]},
        ),
        (adults(debt="{},5").replace("job", "row"), "tabular", {"ignore": []}),
        (opinions(), "text_classification", {"blank_labels": "drop", "min_per_class": 1}),
        (opinions(rare="NA"), "text_classification", {"missing": ["NA"]}),
        (opinions(rare="3"), "text_classification", {"min_per_class": 5, "rare_classes": "drop"}),
    ],
)
def test_the_job_takes_the_recipe_for_a_table_as_tables_are(
    text: str, task: str, data: dict[str, object], tmp_path: Path
) -> None:
    file, out = tmp_path / "a table.csv", tmp_path / "é.yaml"
    file.write_text(text, encoding="utf-8-sig")
    status, said = invoke("init", file, "--out", out)
    assert status == 0, said
    recipe = recipes.load(out)
    assert recipe.task == task
    assert {name: getattr(recipe.data, name) for name in data} == data
    status, said = invoke("data", "inspect", out)
    assert status == 0, said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (events(time="1/2/2020", rare="4").replace("1/2/2020", "2/1/2020", 1), "the day from the"),
        (events(rating="1,250"), "the comma of '1,250' may be"),
        (events(time="Wed, {1:02} Jan 2020 00:00:00"), "Jan 2020 00:00:00' is neither"),
        (events(time="Mon Apr {1:02} 22:19:45 PDT 2009"), "PDT 2009' is neither"),
        (events(time="Friday, May {1}, 2020 at 10:30 AM"), "at 10:30 AM' is neither"),
        (events(time="{1}. Januar 2020"), "Januar 2020' is neither"),
        (events().replace("rating", "user_id"), "several columns are called 'user_id'; give each"),
        (adults(label="0").replace("\t0\n", "\t1\n", 1), "rows of one class only"),
        ("review,label\nso it is so,0\nso it was so,1\n", "no recipe is written: the"),
    ],
)
def test_no_recipe_is_written_that_the_job_refuses(text: str, message: str, tmp_path: Path) -> None:
    file, out = tmp_path / "a.csv", tmp_path / "a.yaml"
    file.write_text(text)
    status, said = invoke("init", file, "--out", out)
    assert status == 2
    assert message in said
    assert not out.exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_no_task_reads_are_left_out(kind: str, tmp_path: Path) -> None:
    """And a job does not read them where it is told to ignore them."""
    file, out = tmp_path / f"a.{kind}", tmp_path / "a.yaml"
    rows: list[dict[str, Any]] = [
        {"age": 18 + i % 50, "job": "abcd"[i % 4], "tags": ["x", "y"], "default": int(i % 50 > 25)}
        for i in range(200)
    ]
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        rows = [{**row, "face": b"\xff\xd8"} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), file)
    status, said = invoke("init", file, "--out", out)
    assert status == 0, said
    left = ["tags"] if kind == "jsonl" else ["tags", "face"]
    shown = ", ".join(map(repr, left))
    assert f"bytes that are no utf-8 text are left out: {shown}" in " ".join(said.split())
    assert recipes.load(out).data.ignore == left
    assert invoke("data", "inspect", file)[0] == 0


def test_how_a_file_is_written_is_in_its_recipe(tmp_path: Path) -> None:
    file, out = tmp_path / "a.csv", tmp_path / "a.yaml"
    file.write_text(adults().replace("a\t", "\xe9\t"), encoding="latin-1")
    status, said = invoke("init", file, "--out", out)
    assert status == 2
    assert "name the file's encoding in --encoding" in said
    assert invoke("init", file, "--out", out, "--encoding", "latin-1", "--delimiter", "tab")[0] == 0
    assert (recipes.load(out).data.encoding, recipes.load(out).data.delimiter) == ("latin-1", "\t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,review\n" + "".join(f"{i},a fine thing {i}\n" for i in range(40)),
            "nothing can be pre",
        ),
        ("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(40)), "no column of two classes"),
        (
            "a,b\n" + "".join(f"{i},{('Yes', 'yes', 'no')[i % 3]}\n" for i in range(40)),
            r"column 'b' has two classes.*'Yes' \(14\) = 'yes' \(13\)\): write each in one",
        ),
        (
            "a,b\n" + "".join(f"{i},{('1', '1.0', '0')[i % 3]}\n" for i in range(40)),
            r"column 'b' has two classes.*'1' \(14\) = '1\.0' \(13\)\): write each in one",
        ),
        (
            "a,b\n1,2\n3,4\n5,6\n1,2,3\n",
            r"\(1 rows with too few or too many cells are not looked at",
        ),
        ("", "is empty"),
    ],
)
def test_what_no_task_reads_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        look(path)
    with pytest.raises(InputError, match="cannot read"):
        look(tmp_path / "absent.csv")


def test_a_label_that_is_spelled_in_several_ways_is_told_of(tmp_path: Path) -> None:
    """Where another column has two values, and is predicted in its place."""
    file, out = tmp_path / "a.csv", tmp_path / "a.yaml"
    rows = [f"{i},{'mf'[i % 2]},{('Yes', 'yes', 'no')[i % 3]}" for i in range(90)]
    file.write_text("\n".join(["income,sex,churn", *rows]))
    status, said = invoke("init", file, "--out", out)
    assert status == 0, said
    assert "warning: column 'churn' has two classes, of which some are spelled in sev" in said
    assert recipes.load(out).data.label == "sex"
    changed = recipes.load(out, changes=["data.label=churn", "data.ignore=[]"])
    with pytest.raises(InputError, match=r"predicts two; write each in one way: 'Yes' \(30\) ="):
        changed.make_task().read(Account())
