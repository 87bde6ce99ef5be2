"""The experiment on what clipping buys and the big table's benchmark run, on little data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_experiment_runs_on_drawn_data(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "clipping_robustness"), "--quick"]
    command += ["--seeds", "2", "--shares", "0.25", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    (path,) = tmp_path.glob("clipping_robustness_*.json")
    record = json.loads(path.read_text())
    assert [task["name"] for task in record["tasks"]] == ["rating MF", "MF-BPR", "reviews"]
    for task in record["tasks"]:
        units = [arm["unit"] for arm in task["arms"]]
        assert units == ["none", "sample", "user"][: len(units)]
        for arm in task["arms"]:
            assert list(arm["figures"]) == list(task["attacks"])
            values = [v for f in arm["figures"].values() for own in f.values() for v in own]
            assert all(math.isfinite(v) for v in values)
    page = path.with_suffix(".md").read_text()
    assert page.count("| none | - |") == 3
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert "left 0:00" in done.stdout


def test_without_a_bound_clipping_trains_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what the arms differ in is the clipping alone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "clipping_robustness"))
    import factors
    import sources
    import texts
    from study import Clip

    ratings = sources.drawn_ratings()
    pushes = {"average": factors.Push(4)}
    for task in (
        factors.RatingTask(ratings, pushes, 2),
        factors.RankingTask(ratings, pushes, 2),
        texts.ReviewTask(sources.drawn_reviews(200), 2),
    ):
        attack = list(task.attacks)[-1]
        plain = task.fit(Clip(), 0.1, 2, 0, attack)
        for unit in task.units:
            same = task.fit(Clip(unit), 0.1, 2, 0, attack)
            assert same.validation == pytest.approx(plain.validation, abs=1e-4)
            assert same.test == pytest.approx(plain.test, abs=1e-4)
            other = task.fit(Clip(unit, 1e-6), 0.1, 2, 0, attack)
            assert other.norms != same.norms


def test_a_step_needs_no_memory_of_the_size_of_the_table() -> None:
    command = [sys.executable, str(BENCHMARKS / "clipping_big_table.py"), "--here", "--rows"]
    command += ["2000000", "--samples", "64", "--steps", "1", "--width", "16", "--threads", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["table_gb"] == pytest.approx(0.128)
    assert found["peak_gb"] - found["before_gb"] < found["table_gb"] / 2
