"""What breaks a run: every fault is one line and status 2, and the next start cleans up."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from embattle.errors import InputError
from embattle.files import UNFINISHED, remove_unfinished, replacing
from embattle.jobs import audit as auditing
from embattle.jobs import provenance, run_folder
from embattle.jobs import train as training
from embattle.jobs.run_folder import Run, locked
from safetensors.torch import load_file, save_file
from tiny_job import invoke, make_encoder, recipe_of


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """A folder with a recipe and a finished run in `run`."""
    folder = tmp_path_factory.mktemp("finished")
    status, text = invoke("train", recipe_of(folder, encoder), "--out", folder / "run")
    assert status == 0, text
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    """A folder with a recipe and a run in `run` that was stopped in its fifth step."""
    folder = tmp_path_factory.mktemp("stopped")
    step = training.Fit._step

    def interrupted(self: training.Fit, number: int) -> dict[str, float]:
        figures = step(self, number)
        if number == 4:
            signal.raise_signal(signal.SIGINT)
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Fit, "_step", interrupted)
        assert invoke("train", recipe_of(folder, encoder), "--out", folder / "run")[0] == 130
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a run so that it may be broken."""

    def make(folder: Path) -> Path:
        return Path(shutil.copytree(folder / "run", tmp_path / "run"))

    return make


def refused(words: str, *command: object) -> None:
    """The command is refused in one line that says these words."""
    status, text = invoke(*command)
    assert status == 2, text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in text
    assert len(text.splitlines()[text.splitlines().index(line) :]) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x13garbage" * 100)


def header(path: Path) -> None:
    """A header that claims more than there is."""
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def transposed(path: Path) -> None:
    """Each tensor with two axes the other way round."""
    tensors = {
        name: x.t().contiguous() if x.dim() == 2 else x for name, x in load_file(path).items()
    }
    save_file(tensors, path, metadata=metadata(path))


def moments(path: Path) -> None:
    """The optimiser's moments have another shape."""
    tensors = load_file(path)
    changed = {n: x[:1].clone() if n.endswith("exp_avg") else x for n, x in tensors.items()}
    save_file(changed, path, metadata=metadata(path))


def without_random_states(path: Path) -> None:
    tensors = {name: x for name, x in load_file(path).items() if "random" not in name}
    save_file(tensors, path, metadata=metadata(path))


def without_facts(path: Path) -> None:
    save_file(load_file(path), path)


def wrong_facts(path: Path) -> None:
    facts = json.loads(metadata(path)["embattle"])
    save_file(load_file(path), path, metadata={"embattle": json.dumps(facts | {"history": 3})})


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as stream:
        return stream.metadata() or {}


BREAKS = [truncate, garbage, header, nothing, transposed, without_facts]
CHECKPOINT_BREAKS = [*BREAKS, moments, without_random_states, wrong_facts]


@pytest.mark.parametrize("damage", CHECKPOINT_BREAKS, ids=lambda f: f.__name__)
def test_a_broken_checkpoint(
    damage: Callable[[Path], None], stopped: Path, copy: Callable[[Path], Path]
) -> None:
    out = copy(stopped)
    damage(out / "standard" / "checkpoint.safetensors")
    refused("checkpoint.safetensors", "train", stopped / "recipe.yaml", "--out", out, "--resume")
    refused("--overwrite", "train", stopped / "recipe.yaml", "--out", out, "--resume")


def not_a_number(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: x * float("nan") for name, x in tensors.items()}, path)


def fewer_tensors(path: Path) -> None:
    save_file(dict(list(load_file(path).items())[1:]), path)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("model.safetensors", damage) for damage in BREAKS if damage is not without_facts),
        ("model.safetensors", gone),
        ("model.safetensors", not_a_number),
        ("model.safetensors", fewer_tensors),
        ("config.json", gone),
        ("config.json", garbage),
        ("classifier.json", gone),
        ("classifier.json", nothing),
        ("tokenizer.json", garbage),
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_a_broken_model_is_noticed_before_the_first_attack(
    file: str,
    damage: Callable[[Path], None],
    finished: Path,
    copy: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = copy(finished)
    damage(out / "hardened" / file)
    attacked: list[str] = []
    monkeypatch.setattr(auditing, "examine", lambda *a: attacked.append(a[1]))
    refused("hardened does not hold a trained model", "audit", out)
    assert not attacked


@pytest.mark.parametrize("command", ["audit", "explain"])
def test_exchanged_weights_are_noticed_before_the_first_attack(
    command: str, finished: Path, copy: Callable[[Path], Path]
) -> None:
    out = copy(finished)
    standard, hardened = (out / name / "model.safetensors" for name in ("standard", "hardened"))
    mine = hardened.read_bytes()
    shutil.copyfile(standard, hardened)
    refused(
        "hardened are not those that `embattle train` wrote (they are those of 'st", command, out
    )
    save_file({name: x * 1.01 for name, x in load_file(standard).items()}, hardened)
    refused("restore them", command, out)
    assert not (out / "metrics.json").exists()
    hardened.write_bytes(mine)
    run = Run.read(out)
    assert provenance.trained_weights(out, run, ["hardened"]) == {
        "hardened": run.variants["hardened"].weights
    }
    # Of a run that an older version trained nothing is known.
    shutil.copyfile(standard, hardened)
    run.variants["hardened"].weights = None
    assert provenance.trained_weights(out, run, ["hardened"])


@pytest.mark.parametrize(
    "change",
    [
        {"facts": None},
        {"facts": {}},
        {"facts": {"kind": {"name": "Classification", "classes": ["no", "yes"]}}},
        {"counts": {}},
        {"counts": {"test": [1, 1]}},
        {"fingerprint": "0" * 64},
        {"fingerprint": 7},
        {"variants": []},
        {"variants": {"standard": {}}},
        {"variants": {"other": {}}},
        {"format": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_a_changed_run_json(
    change: dict[str, object], finished: Path, copy: Callable[[Path], Path]
) -> None:
    out = copy(finished)
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(facts | change))
    refused("", "audit", out)
    if "facts" in change or "variants" in change:
        refused("run.json", "audit", out)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", "\x00", "é"])
def test_a_run_json_that_is_none(text: str, finished: Path, copy: Callable[[Path], Path]) -> None:
    out = copy(finished)
    (out / "run.json").write_bytes(text.encode("latin-1"))
    refused("run.json", "audit", out)
    refused("run.json", "train", finished / "recipe.yaml", "--out", out, "--resume")


def test_two_jobs_in_one_folder(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = finished / "recipe.yaml"
    with locked(out, "train tiny"):
        who = f"in use by process {os.getpid()} on "
        for flags in ([], ["--overwrite"], ["--resume"]):
            refused(who, "train", recipe, "--out", out, *flags)
        refused(who, "audit", out)
        assert run_folder.contents(out) == []
    assert not out.exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    """Also where the dead one's number belongs to another process by now."""
    (tmp_path / run_folder.LOCK).write_text(json.dumps({"pid": os.getppid(), "host": "here"}))
    with locked(tmp_path, "train"):
        assert json.loads((tmp_path / run_folder.LOCK).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_is_no_way_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_folder.LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="cannot write"), locked(tmp_path / "run", "train"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_lock_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends between the opening of the lock file and its locking."""
    flock, removed = fcntl.flock, []

    def late(stream: object, flags: int) -> None:
        if not removed:
            removed.append(True)
            (tmp_path / run_folder.LOCK).unlink()
        flock(stream, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with locked(tmp_path, "train"):
        assert (tmp_path / run_folder.LOCK).exists()
        with pytest.raises(InputError, match="in use"), locked(tmp_path, "audit"):
            pass


def test_overwriting_through_a_link(finished: Path, copy: Callable[[Path], Path]) -> None:
    out = copy(finished)
    link = out.parent / "link"
    link.symlink_to(out)
    refused("symbolic link", "train", finished / "recipe.yaml", "--out", link, "--overwrite")
    assert (out / "run.json").is_file()
    link.unlink()
    link.symlink_to(out.parent / "nowhere")
    refused("symbolic link", "train", finished / "recipe.yaml", "--out", link)


def test_overwriting_replaces_all(finished: Path, copy: Callable[[Path], Path]) -> None:
    out = copy(finished)
    (out / "report.html").write_text("of the old run")
    recipe = finished / "recipe.yaml"
    status, text = invoke("train", recipe, "--out", out, "--overwrite", "--set", "train.steps=2")
    assert status == 0, text
    assert sorted(path.name for path in out.iterdir()) == [
        "hardened",
        "recipe.yaml",
        "run.json",
        "standard",
    ]
    assert len(Run.read(out).variants["hardened"].history) == 2


@pytest.mark.parametrize("size", [0, 100, 3000, 9000])
def test_a_full_disk(
    size: int, finished: Path, tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    out = tmp_path / "run"
    recipe = finished / "recipe.yaml"
    small_disk(size)
    refused("cannot write", "train", recipe, "--out", out, "--set", "train.steps=2")
    small_disk(resource.RLIM_INFINITY)
    assert not list(tmp_path.rglob(f"{UNFINISHED}*"))
    assert not out.exists()


def test_a_full_disk_later_loses_no_checkpoint(
    finished: Path,
    tmp_path: Path,
    small_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    command = ("train", finished / "recipe.yaml", "--out", out, "--set", "train.checkpoint_every=5")
    step = training.Fit._step

    def full(self: training.Fit, number: int) -> dict[str, float]:
        small_disk(1000 if number > 6 else resource.RLIM_INFINITY)
        return step(self, number)

    monkeypatch.setattr(training.Fit, "_step", full)
    refused("cannot write", *command)
    monkeypatch.undo()
    small_disk(resource.RLIM_INFINITY)
    assert (out / "standard" / "checkpoint.safetensors").is_file()
    status, text = invoke(*command, "--resume")
    assert status == 0, text


def test_what_a_killed_process_left_is_removed(
    finished: Path, copy: Callable[[Path], Path]
) -> None:
    out = copy(finished)
    left = [out / f"{UNFINISHED}a.json", out / "standard" / f"{UNFINISHED}b.safetensors"]
    for path in left:
        path.write_bytes(b"half")
    (out / f"{UNFINISHED}folder").mkdir()
    (out / f"{UNFINISHED}folder" / "wheel").touch()
    (out / run_folder.LOCK).write_text("")
    status, text = invoke("train", finished / "recipe.yaml", "--out", out, "--resume")
    assert status == 0, text
    assert "nothing to do" in text
    status, text = invoke("audit", out)
    assert status == 0, text
    assert not list(out.rglob(f"{UNFINISHED}*"))
    assert not (out / run_folder.LOCK).exists()


def test_young_unfinished_files_of_others_stay(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as part:
        assert remove_unfinished(tmp_path, older_than=3600) == 0
        os.utime(part, (0, 0))
        part.with_name(f"{UNFINISHED}other").touch()
        assert remove_unfinished(tmp_path, older_than=3600) == 1
        part.touch()
    assert remove_unfinished(tmp_path) == 1


# Runs a job in a child that dies, as by kill -9, at every fifth of its renamings and removals.
KILLER = """
import os, sys
from pathlib import Path
from embattle.cli import app
from typer.testing import CliRunner
recipe, out, first, *flags = sys.argv[1:]
import embattle.jobs.train, embattle.files, embattle.jobs.audit, transformers

def job(die_at):
    child = os.fork()
    if child == 0:
        seen = 0
        def counted(function):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == die_at:
                    os._exit(9)
                return function(*args, **kwargs)
            return call
        for name in ("replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        told = CliRunner().invoke(app, ["train", recipe, "--out", out, *flags])
        os._exit(0 if told.exit_code == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

died = 0
for n in range(int(first), 100, 5):
    code = job(n)
    if code == 0:
        break
    assert code == 9, (n, code)
    died += 1
    left = [str(path) for path in Path(out).rglob(".*")]
    again = CliRunner().invoke(app, ["train", recipe, "--out", out, *flags])
    assert again.exit_code == 0, (n, left, again.output)
    names = sorted(p.name for p in Path(out).iterdir())
    assert names == ["hardened", "recipe.yaml", "run.json", "standard"], (n, names)
    if "--resume" in flags:
        import shutil
        shutil.rmtree(out)
print(died)
"""


@pytest.mark.parametrize(("flag", "first"), [("--resume", "1"), ("--overwrite", "2")])
def test_killed_at_any_moment(
    flag: str, first: str, finished: Path, tmp_path: Path, encoder: Path
) -> None:
    changes = ["--set", "train.steps=2", "--set", "train.checkpoint_every=1"]
    recipe = str(finished / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, recipe, str(tmp_path / "run"), first, flag, *changes],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 3


def test_attacks_of_one_name_keep_their_rows(finished: Path, tmp_path: Path, encoder: Path) -> None:
    pgd = {"kind": "pgd", "steps": 2}
    audit = {
        "attacks": [{**pgd, "step_size": 0.1}, {**pgd, "step_size": 0.9}, pgd, pgd],
        "sweep": [1.0],
    }
    recipe = recipe_of(tmp_path, encoder, audit=audit)
    assert invoke("train", recipe, "--out", tmp_path / "run", "--set", "train.steps=2")[0] == 0
    status, text = invoke("audit", tmp_path / "run")
    assert status == 0, text
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(facts["models"]["standard"]["attacks"]) == [
        "PGD-2, step 0.1",
        "PGD-2, step 0.9",
        "PGD-2, step 1",
        "PGD-2, step 1 #2",
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Content-Security-Policy" in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_an_exclamation_mark_is_kept() -> None:
    from embattle.audit import html

    cells = html.table(["text", "share"], [["!wow", html.Fallen("3%")]])
    assert ">!wow</th>" in cells
    assert re.search('<td [^>]*class="fell"[^>]*>3%</td>', cells)


def test_what_was_read_is_said_first_and_kept(tmp_path: Path, encoder: Path) -> None:
    recipe = recipe_of(tmp_path, encoder)
    reviews = tmp_path / "reviews.csv"
    reviews.write_text(reviews.read_text() + ",\n" * 4)
    status, seen = invoke("data", "inspect", recipe)
    assert status == 0, seen
    status, text = invoke("train", recipe, "--out", tmp_path / "run", "--set", "train.steps=1")
    assert status == 0, text
    for line in seen.splitlines():
        assert line in text
    assert text.index("4 empty rows") < text.index("standard  1/1")
    assert "164 of 2 columns" in text
    assert "12 tokens of a text at most; 0 of the 160 texts are cut" in text
    assert Run.read(tmp_path / "run").reading == seen.splitlines()


def test_data_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBATTLE_CACHE", str(tmp_path))
    status, text = invoke("data", "list")
    assert status == 0
    assert "womens_reviews" in text
    refused("did you mean 'womens_reviews'", "data", "fetch", "womens_review")
    (tmp_path / "a.csv").write_bytes("body,label\ncafé,1\n".encode("latin-1"))
    refused("line 2: byte 0xE9", "data", "inspect", tmp_path / "a.csv")
    status, text = invoke("data", "inspect", tmp_path / "a.csv", "--encoding", "latin-1")
    assert status == 0
    assert "'body': words" in text
    refused("are for recipes", "data", "inspect", tmp_path / "a.csv", "--full")


def test_threads_wait_passively_unless_the_user_says_otherwise() -> None:
    code = "import os, sys; print('OMP_WAIT_POLICY', os.environ.get('OMP_WAIT_POLICY'))"

    def policy(*words: str, **more: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **more}
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
        )
        (line,) = [line for line in done.stdout.splitlines() if "OMP_WAIT_POLICY" in line]
        return line.split("OMP_WAIT_POLICY")[1].strip(" =")

    assert policy("-m", "embattle", "doctor") == "passive"
    assert policy("-m", "embattle", "doctor", OMP_WAIT_POLICY="active") == "active"
    assert policy("-c", f"import embattle; {code}") == "None"
