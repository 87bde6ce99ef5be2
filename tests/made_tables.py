"""Small made-up tables with the columns of the data sets and layouts that the recipes read."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from embattle.data.movielens import GENRES
from tiny_job import BAD, GOOD, PLAIN

REACTIONS = ("like", "love", "angry")


def table(path: Path, names: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """A CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    return path


def mood(i: int) -> str:
    """A text of five words that are good for odd numbers, bad for even ones."""
    words = GOOD if i % 2 else BAD
    return " ".join([PLAIN[i % 10], words[i % 5], PLAIN[(3 * i + 1) % 10], words[(i // 5) % 5]])


def film_ratings(path: Path) -> Path:
    """24 users rate 9 of 30 films each; a user's taste is her parity."""
    draw = np.random.default_rng(0)
    rows: list[list[int]] = []
    for user in range(1, 25):
        for number, film in enumerate((draw.permutation(30)[:9] + 1).tolist()):
            stars = 5 if (user + film) % 2 else 2
            rows.append([user, film, stars, 1000 * user + number])
    return table(path, ("user_id", "movie_id", "rating", "timestamp"), rows)


def film_users(path: Path) -> Path:
    """The 24 users, last first."""
    rows = [(user, 17 + user, "MF"[user % 2], "writer") for user in range(24, 0, -1)]
    return table(path, ("user_id", "age", "gender", "occupation"), rows)


def films(path: Path) -> Path:
    """The 30 films; the fourth has no date."""
    rows = [
        [
            *(film, mood(film), "" if film == 4 else f"01-Jan-{1950 + film}"),
            *(int(film % 19 == g) for g in range(19)),
        ]
        for film in range(1, 31)
    ]
    return table(path, ("movie_id", "movie_title", "release_date", *GENRES), rows)


def census(path: Path) -> Path:
    """Who is old earns more."""
    rows = [(17 + i % 60, "Sales", 40, ">50K" if i % 60 > 30 else "<=50K") for i in range(240)]
    return table(path, ("age", "occupation", "hours-per-week", "income"), rows)


def holders(path: Path) -> Path:
    """Who owes much defaults."""
    rows = [
        ("Yes" if i % 60 > 50 else "No", ("No", "Yes")[i % 2], 12.5 * (i % 60), 9000 + 7 * i)
        for i in range(240)
    ]
    return table(path, ("default", "student", "balance", "income"), rows)


def patients(path: Path) -> Path:
    """Who is old falls ill; some were not measured."""
    names = ("male", "age", "cigsPerDay", "glucose", "TenYearCHD")
    rows = [
        (i % 2, 30 + i % 40, i % 7, "NA" if i % 9 == 0 else 70 + i % 50, int(i % 40 > 30))
        for i in range(240)
    ]
    return table(path, names, rows)


def drug_reviews(path: Path) -> Path:
    """Reviews whose words tell the rating."""
    rows = [("Pain", f"{mood(i)} {i}", ("negative", "positive")[i % 2]) for i in range(120)]
    return table(path, ("condition", "review", "rating"), rows)


def clothes_reviews(path: Path) -> Path:
    """Reviews whose words tell whether the garment is recommended."""
    rows = [("A dress", f"{mood(i)} {i}", i % 2) for i in range(160)]
    return table(path, ("Title", "Review Text", "Recommended IND"), rows)


def posts(path: Path) -> Path:
    """Posts, how often each reaction was given, and that of one user."""
    names = ("post_id", "author", "user", "text", "reaction", *REACTIONS)
    rows = []
    for i in range(120):
        counts = [(i % 3) + 1, 5 * (i % 2), 5 * (1 - i % 2)]
        reaction = ("angry", "love")[i % 2]
        rows.append((i, f"a{i % 9}", f"u{i % 20}", f"{mood(i)} {i}", reaction, *counts))
    return table(path, names, rows)


#: What is made in place of a named data set.
SOURCES: dict[str, Callable[[Path], Path]] = {
    "adult": census,
    "credit_default": holders,
    "drug_reviews": drug_reviews,
    "framingham": patients,
    "movielens_100k": film_ratings,
    "movielens_100k_items": films,
    "movielens_100k_users": film_users,
    "womens_reviews": clothes_reviews,
}


def news(folder: Path, impressions: int = 120) -> Path:
    """News and behaviors as MIND has them, unquoted; a reader likes good words or bad ones."""
    draw = random.Random(0)
    folder.mkdir(exist_ok=True)
    lines = [
        f'N{i}\tsports\tgolf\t{mood(i)} "{i}\tAn abstract, quoted " once\thttps://a.b/{i}\t[]\t'
        '[{"Label": "Golf", "Type": "C"}]'
        for i in range(30)
    ]
    (folder / "news.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = []
    for k in range(impressions):
        likes = k % 2
        history = " ".join(f"N{2 * draw.randrange(15) + likes}" for _ in range(k % 4))
        shown = " ".join(f"N{n}-{int(n % 2 == likes)}" for n in draw.sample(range(30), 5))
        time = f"11/{10 + k // 30}/2019 {1 + k % 12}:{k % 60:02}:58 {'AP'[k % 2]}M"
        lines.append(f"{k + 1}\tU{k % 30}\t{time}\t{history}\t{shown}")
    (folder / "behaviors.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
