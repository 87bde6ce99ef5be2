"""Ratings out of files of any kind."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

import pyarrow
import pyarrow.parquet
from embattle.data.account import Account
from embattle.data.moments import Moments
from embattle.data.ratings import Ratings, hold_out_latest, read_named_ratings, read_ratings
from embattle.errors import InputError
from embattle.tasks import ClickThrough


def test_the_latest_event_of_each_user_is_held_out() -> None:
    ratings = Ratings(
        np.array([1, 0, 1, 0, 2]),
        np.array([3, 2, 1, 0, 4]),
        np.ones(5),
        np.array([5.0, 1.0, 7.0, 0.0, 9.0]),
        3,
        5,
    )
    rest, held = hold_out_latest(ratings)
    assert sorted(zip(held.users.tolist(), held.items.tolist(), strict=True)) == [(0, 2), (1, 1)]
    assert sorted(rest.users.tolist()) == [0, 1, 2]
    empty, none = hold_out_latest(ratings.take(np.zeros(5, dtype=bool)))
    assert len(empty) == len(none) == 0


def test_reading_numbers_users_and_items(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("who,what,stars,when\nzoe,10,4,1\nann,2,5,2\nzoe,2,1,3\n")
    columns = ["who", "what", "stars", "when"]
    found = read_ratings(path, columns)
    assert (found.users.tolist(), found.items.tolist()) == ([1, 0, 1], [1, 0, 0])
    assert (found.user_count, found.item_count) == (2, 2)
    assert found.values.tolist() == [4, 5, 1]
    path.write_text("who,what,stars,when\nzoe,10,,1\nann,2,5,2\n")
    with pytest.raises(InputError, match="'stars' has empty cells"):
        read_ratings(path, columns)
    path.write_text("who,what,stars,when\nzoe,10,good,1\nann,2,5,2\n")
    with pytest.raises(InputError, match="'stars' must hold numbers"):
        read_ratings(path, columns)
    path.write_text("who,what,stars,when\nzoe,10,inf,1\nann,2,5,2\n")
    with pytest.raises(InputError, match="not finite"):
        read_ratings(path, columns)


EVENTS = [(196, 242, 3, 881250949), (186, 302, 3, 891717742), (9, 242, 1, 878887116)]


def plain(sep: str, header: str = "") -> str:
    lines = [sep.join(map(str, event)) for event in EVENTS]
    return "\n".join([header, *lines] if header else lines) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "style"),
    [
        ("u.data", plain("\t"), "GroupLens, utf-8, delimiter tab (guessed), no header line"),
        ("u1.test", plain("\t"), "GroupLens"),
        ("ratings.dat", plain("::"), "GroupLens, utf-8, delimiter '::' (guessed), no header line"),
        ("ratings.csv", plain(",", "userId,movieId,rating,timestamp"), "CSV"),
        (
            "ml-100k.inter",
            plain("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
            "RecBole atomic file, utf-8, delimiter tab",
        ),
        (
            "events.jsonl",
            "".join(
                f'{{"item": {i}, "user": {u}, "stars": {r}, "unix_time": {t}}}\n'
                for u, i, r, t in EVENTS
            ),
            "JSON lines",
        ),
    ],
)
def test_known_files_are_read_without_a_word(
    name: str, content: str, style: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    account = Account()
    found = read_ratings(path, account=account)
    assert (found.users.tolist(), found.items.tolist()) == ([2, 1, 0], [0, 1, 0])
    assert found.values.tolist() == [3, 3, 1]
    assert found.times.tolist() == [881250949, 891717742, 878887116]
    assert style in account.lines()[0]
    assert sum("(guessed)" in value for name, value in account.facts if name != "file") == 4


def test_clicks_have_neither_ratings_nor_times(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("session,product\nb,x\na,y\nb,x\n")
    account = Account()
    found = read_ratings(path, account=account)
    assert (found.users.tolist(), found.values.tolist(), found.times.tolist()) == (
        [1, 0, 1],
        [1, 1, 1],
        [0, 0, 0],
    )
    assert ("duplicates", "1 events repeat a user and an item") in account.facts


def test_whole_numbers_name_the_same_with_and_without_a_point(tmp_path: Path) -> None:
    """Columns of Parquet are floats as soon as pandas has met a row without a value."""
    floats = {"user": [10.0, 9.0, 10.0, 2.5], "item": [1.0, 2.0, 3.0, 1.0], "rating": [1, 2, 3, 4]}
    pyarrow.parquet.write_table(pyarrow.table(floats), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("user,item,rating\n10,1,1\n9,2,2\n10.0,3,3\n2.5,1,4\n")
    for name in ("a.parquet", "a.csv"):
        ratings, users, items = read_named_ratings(tmp_path / name)
        assert (users, items) == (["10", "2.5", "9"], ["1", "2", "3"])
        assert [users[i] for i in ratings.users] == ["10", "9", "10", "2.5"]
        assert (ratings.user_count, ratings.item_count) == (3, 3)


def test_dates_become_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item,rating,date\na,b,1,1970-01-02\na,c,1,1970-01-01T00:00:30.5\n")
    assert read_ratings(path).times.tolist() == [86400.0, 30.5]
    moments = [datetime.datetime(1970, 1, 2), datetime.datetime(1970, 1, 1, 0, 0, 30)]
    pyarrow.parquet.write_table(
        pyarrow.table({"user": [1, 1], "item": [2, 3], "rating": [4, 5], "date": moments}),
        tmp_path / "a.parquet",
    )
    assert read_ratings(tmp_path / "a.parquet").times.tolist() == [86400.0, 30.0]


@pytest.mark.parametrize(
    ("cells", "days"),
    [
        (["10/18/2020", "1/2/2020", "12/31/20"], [18553, 18263, 18627]),
        (["18/10/2020", "1/2/2020"], [18553, 18293]),
        (["2.1.2020", "31.12.2020 12:00"], [18263, 18627.5]),
        (["Jan 2, 2020", "31 December 2020", "2-Jan-20"], [18263, 18627, 18263]),
        (["2020-01", "2020-12"], [18262, 18597]),
        (["2020-01-02T00:00:00Z", "2020-01-02T06:00:00+06:00", "2020/1/2"], [18263] * 3),
        (["1/2/2020 12:00 AM", "1/22/2020, 6:00:00 pm"], [18263, 18283.75]),
        (["09 13, 2009"], [14500]),
        (["70-01-02", "97-12-31"], [1, 10226]),
        (["02-01-70", "31-12-97"], [1, 10226]),
    ],
)
def test_dates_in_several_styles(cells: list[str], days: list[float], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f'{i};x;"{cell}"\n' for i, cell in enumerate(cells))
    path.write_text("user;item;date\n" + rows)
    assert read_ratings(path).times.tolist() == [86400.0 * day for day in days]
    blocks = Moments()
    for cell in cells:  # the style is that of the whole column
        blocks.add([cell])
    assert blocks.seconds().tolist() == [86400.0 * day for day in days]


def test_decimal_commas_and_words_for_no_value(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user;item;rating;time\na;b;4,5;1\na;c;n/a;2\nb;NULL;3;3\nb;c;3;2,5\n")
    found = read_ratings(path, missing=["n/a", "NULL"], drop_blank=True)
    assert (found.values.tolist(), found.times.tolist()) == ([4.5, 3], [1, 2.5])
    with pytest.raises(InputError, match="'n/a' is none"):
        read_ratings(path)


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["950", "1.250", "12.500"], True),
        (["950", "1.25", "12.500"], False),
        (["1.250", "12.500"], False),
        (["950", "0.950"], False),
    ],
)
def test_points_that_may_be_of_thousands_are_told_of(
    cells: list[str], told: bool, tmp_path: Path
) -> None:
    """In clicks, too, where the label is such a number or a column of numbers is."""
    lines = [f"{i},{i},{cells[i % len(cells)]},ad" for i in range(60)]
    path = tmp_path / "a.csv"
    path.write_text("user,item,rating,banner\n" + "\n".join(lines) + "\n")
    warning = "column 'rating': the points of its numbers, such as '1.250', may be of thousands"
    account = Account()
    read_ratings(path, account=account, block=64)
    assert any(line.startswith(warning) for line in account.warnings) == told
    data = {"path": str(path), "fields": ["item", "banner"], "label": "user", "at_least": 30}
    for some in (data | {"dense": ["rating"]}, data | {"label": "rating", "at_least": 2}):
        account = Account()
        model = {"kind": "dlrm" if "dense" in some else "fm"}
        ClickThrough(ClickThrough.Data(**some), ClickThrough.Model(**model)).read(account)
        assert any(line.startswith(warning) for line in account.warnings) == told


def test_rows_with_empty_cells_are_dropped_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item,rating,time\n7,b,1,1\n,b,1,1\n8,,2,2\n9,c, ,3\n10,d,4,4\n")
    account = Account()
    found = read_ratings(path, account=account, drop_blank=True)
    assert (len(found), found.user_count, found.item_count) == (2, 2, 2)
    assert ("dropped", "3 rows with empty cells") in account.facts


@pytest.mark.parametrize(
    ("content", "message", "options"),
    [
        ("a,b\n1,2\n", "no columns of users and items can be told by their names", {}),
        ("user,item,rating\n1,2,\n", "'rating' has empty cells", {}),
        ("user,item\n,\n", "no row without empty cells", {"drop_blank": True}),
        ("user;item;rating\n1;2;4,5\n3;4;nine\n", "'rating' must hold numbers", {}),
        (
            "user,item,time\n1,2,yesterday\n",
            "hold numbers or dates: 'yesterday' is neither",
            {},
        ),
        ("user,item,time\n1,2,NaT\n", "'time' must hold numbers or dates: 'NaT' is neither", {}),
        ("user,item,time\n1,2,nan\n", "'time' has values that are not finite", {}),
        (
            "user,item,time\n1,2,3/4/2020\n1,3,4/5/2020\n",
            "nothing tells the day from",
            {},
        ),
        ("user,item,time\n1,2,3/14/2020\n1,3,14/5/2020\n", "some dates have the day first", {}),
        ("user,item,time\n1,2,20-01-30\n1,3,20-02-01\n", "begin with years of two digits", {}),
        ("user;item;rating\n1;2;1,250\n", "the comma of '1,250' may be decimal or of thou", {}),
    ],
)
def test_what_is_refused(
    content: str, message: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    columns = ["user", "item", "rating"] if "rating" in content else None
    with pytest.raises(InputError, match=message):
        read_ratings(path, columns, **options)


def test_names_that_look_like_numbers_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,item\n7,a\n007,a\n10,b\n")
    found = read_ratings(path)
    assert found.user_count == 3
    assert found.users.tolist() in ([1, 0, 2], [0, 1, 2])
