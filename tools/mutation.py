"""Would the tests notice? Change the code at random places, one at a time, and run the tests.

    make mutation [MUTATION="--packages clipping --count 100"]

Mutants come from cosmic-ray's operators, and from one of our own that deletes a statement. Places
are drawn first and then one mutant for each, since a comparison has ten mutants and a call has one.
Places that cannot matter are left out: annotations, what only a type checker reads, and guards
against mistakes of our own (`assert`, `zip(strict=True)`). So are changes that are not Python.

A first run of the tests under coverage tells which tests reach which line. A mutant gets those
alone, first those that have killed most in the same file for their seconds, and that reach few
other lines, up to `--budget` seconds; it counts as killed when a test fails or the time is up. Each
process works in a copy of the tree and forks for each mutant, so that torch is imported once; the
few likeliest tests run in a fork of their own, since to collect all of them takes longer.

Needs an environment with cosmic-ray and coverage beside what the tests need.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("criteria", "attacks", "objectives", "perturb")
# What tells most, in seconds rather than minutes: no compilers, no processes, no large models.
TESTS = {
    "criteria": ["criteria", "losses", "results", "options", "early_stopping"],
    "attacks": [
        "results",
        "options",
        "attacks",
        "early_stopping",
        "tokens",
        "sites",
        "perturb",
        "fidelity",
        "autoattack",
        "minimum_norm",
    ],
    "objectives": [
        "objective",
        "options",
        "results",
        "sites",
        "fidelity",
        "monitor",
    ],
    "perturb": [
        "sites",
        "results",
        "perturb",
        "guard",
        "replay",
        "options",
        "objective",
        "early_stopping",
    ],
    "clipping": [
        "clipping",
        "clipping_defects",
        "clipping_verify",
        "clipping_rules",
        "clipping_parallel",
        "clipping_properties",
        "clipping_libraries",
    ],
}
COMMON = ["attack_properties", "small_print"]  # of all packages but clipping
CASES = "30"  # of the property tests
FIRST = 6.0  # seconds of the tests that run first
MEMORY = 6 << 30  # bytes that tests may take: loops that do not end often gather something


@dataclass
class Mutant:
    """One change: `occurrence` of `operator` in `file`, which is at `line`."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str = ""
    after: str = ""
    outcome: str = ""
    killer: str = ""
    seconds: float = 0.0


# --- mutants --------------------------------------------------------------------------------------


def unimportant(tree: ast.AST) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where nothing runs that a test could see: types, and guards against our own mistakes."""
    found: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += [a.annotation for a in [*every, node.args.vararg, node.args.kwarg] if a]
            found.append(node.returns)
        elif isinstance(node, ast.AnnAssign):
            alias = ast.unparse(node.annotation) == "TypeAlias"
            found.append(node if alias else node.annotation)
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node.value)
        elif (
            isinstance(node, ast.Assert)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            or (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal")
        ):
            found.append(node)
    return [_span(node) for node in found if node is not None]


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def deletable(tree: ast.AST) -> list[Any]:
    """Statements that can be left out: calls, and changes of something that is there."""
    found = []
    for node in ast.walk(tree):
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        kept = isinstance(node, ast.Assign) and not isinstance(
            node.targets[0], (ast.Name, ast.Tuple)
        )
        if call or kept or isinstance(node, ast.AugAssign):
            found.append(node)
    return found


def mutants_of(path: Path, only: str | None = None) -> Iterator[tuple[tuple[Any, ...], Mutant]]:
    """All mutants of a file, or of one operator, each with the place that it shares with others."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text()
    tree, file = ast.parse(source), str(path.relative_to(ROOT))
    skipped = unimportant(tree)

    def counts(start: tuple[int, int]) -> bool:
        return not any(a <= start < b for a, b in skipped)

    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments() or (only is not None and name != only):
            continue
        operator = kind()
        positions = (p for node in nodes for p in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(positions):
            if counts(tuple(start)):
                category = re.sub(r"_.*", "", name)
                yield (file, category, tuple(start)), Mutant(file, start[0], name, occurrence)
    for occurrence, node in enumerate(deletable(tree)):
        start, _ = _span(node)
        if counts(start):
            yield (file, "delete", start), Mutant(file, start[0], "delete statement", occurrence)


def mutated(source: str, mutant: Mutant) -> str | None:
    """The file with the change."""
    if mutant.operator == "delete statement":
        (first, column), (last, end) = _span(deletable(ast.parse(source))[mutant.occurrence])
        lines = source.split("\n")
        lines[first - 1] = lines[first - 1][:column] + "pass" + lines[last - 1][end:]
        del lines[first:last]
        return "\n".join(lines)
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code: str | None = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    return code


def sample(packages: list[str], count: int, seed: int, skip: list[str]) -> tuple[list[Mutant], int]:
    """Draw places, and one mutant for each; also how many places there are."""
    places: dict[tuple[Any, ...], list[Mutant]] = {}
    for package in packages:
        for path in sorted((ROOT / "python/embattle" / package).rglob("*.py")):
            if path.name in skip:
                continue
            for place, mutant in mutants_of(path):
                places.setdefault(place, []).append(mutant)
    rng = random.Random(seed)
    order = sorted(places, key=str)
    rng.shuffle(order)
    drawn: list[Mutant] = []
    for place in order:
        mutant = rng.choice(places[place])
        if compiles(mutant):
            show(mutant)
            drawn.append(mutant)
        if len(drawn) == count:
            break
    return drawn, len(places)


def compiles(mutant: Mutant) -> bool:
    """Whether the change is Python: what is not would be killed by any test."""
    source = (ROOT / mutant.file).read_text()
    try:
        compile(mutated(source, mutant) or source, mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def show(mutant: Mutant) -> None:
    """Note the first line that changes."""
    source = (ROOT / mutant.file).read_text()
    old, new = source.split("\n"), (mutated(source, mutant) or source).split("\n")
    differ = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    mutant.before, mutant.after = old[differ].strip(), new[differ].strip()


def survivors(result: dict[str, Any]) -> list[Mutant]:
    """Find the survivors of an earlier run in the files as they are now."""
    found = []
    for given in result["mutants"]:
        if given["outcome"] != "survived":
            continue
        alike = [one for _, one in mutants_of(ROOT / given["file"], given["operator"])]
        for mutant in sorted(alike, key=lambda one: abs(one.line - given["line"])):
            if mutant.operator == given["operator"]:
                show(mutant)
                if (mutant.before, mutant.after) == (given["before"], given["after"]):
                    found.append(mutant)
                    break
        else:
            print(f"gone: {given['file']}:{given['line']} {given['before']}")
    return found


# --- tests ----------------------------------------------------------------------------------------


def test_files(packages: list[str]) -> list[str]:
    names = dict.fromkeys(n for p in packages for n in TESTS.get(p, []))
    if set(packages) != {"clipping"}:
        names |= dict.fromkeys(COMMON)
    files = [f"tests/test_{name}.py" for name in names]
    return [file for file in files if (ROOT / file).exists()]


def reach(files: list[str], packages: list[str], processes: int, data: Path) -> dict[str, Any]:
    """Run the tests once: which of them run which lines, and how long each takes."""
    folders, running = [], []
    for at in range(min(processes, len(files))):
        folder = data / f"reach{at}"
        folder.mkdir()
        source = "".join(f"\n    {ROOT}/python/embattle/{package}" for package in packages)
        config = folder / "coverage.ini"
        config.write_text(
            f"[run]\ndynamic_context = test_function\nsource ={source}\n"
            f"data_file = {folder}/coverage\n"
        )
        command = ["-m", "coverage", "run", f"--rcfile={config}", "-m", "pytest", "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={folder}/tests.xml"]
        command += files[at::processes]
        folders.append(folder)
        running.append(
            subprocess.Popen([sys.executable, *command], cwd=ROOT, env=_environment(ROOT))
        )
    for process in running:
        process.wait()
    seconds: Counter[str] = Counter()
    failed: set[str] = set()
    for folder in folders:
        for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
            path = case.get("classname", "").replace(".", "/")
            name = f"{path}.py::{_bare(case.get('name', ''))}"
            seconds[name] += float(case.get("time", 0))
            if case.find("failure") is not None or case.find("error") is not None:
                failed.add(name)
    lines: dict[str, dict[int, list[str]]] = {}
    for folder in folders:
        note_lines(folder / "coverage", set(seconds) - failed, lines)
    return {"seconds": dict(seconds), "lines": lines, "failed": sorted(failed)}


def note_lines(data: Path, tests: set[str], lines: dict[str, dict[int, list[str]]]) -> None:
    """Add which of these tests ran which line, by what coverage noted in a file."""
    import coverage

    measured = coverage.CoverageData(str(data))
    measured.read()
    for path in measured.measured_files():
        found = lines.setdefault(str(Path(path).relative_to(ROOT)), {})
        for line, contexts in measured.contexts_by_lineno(path).items():
            names = {_node(context) for context in contexts if context} & tests
            found[line] = sorted({*found.get(line, []), *names})


def _bare(name: str) -> str:
    return name.split("[")[0]


def _node(context: str) -> str:
    # test_sites.test_x, or test_sites.test_x.<locals>.inner
    parts = context.split(".")
    at = next((i for i, part in enumerate(parts[1:], 1) if part.startswith("test_")), 1)
    return f"tests/{parts[at - 1]}.py::{parts[at] if at < len(parts) else ''}"


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(root / "python"),
        "OMP_NUM_THREADS": "1",
        "EMBATTLE_PROPERTY_CASES": CASES,
        "EMBATTLE_CLIPPING_CASES": CASES,
    }


def tests_for(
    mutant: Mutant, known: dict[str, Any], kills: Counter[str], budget: float
) -> list[str]:
    """The tests that reach a mutant's line, those first that kill most for their seconds."""
    lines = known["lines"].get(mutant.file, {})
    names = set(lines.get(mutant.line, []))
    seconds, reach = known["seconds"], reached(known)
    near: set[str] = set()
    bodies, classes = spans_of(ast.parse((ROOT / mutant.file).read_text()))
    if not names or not any(mutant.line in body for body in bodies):
        # Whoever imports the module first runs it. It may show anywhere, and most where the
        # functions of the class around it run, or of the file.
        held = [span for span in classes if mutant.line in span] or [range(sys.maxsize)]
        smallest = min(held, key=len)
        inside = [n for n in lines if n in smallest and any(n in body for body in bodies)]
        near = {name for n in inside for name in lines[n]}
        names = set(seconds) - set(known["failed"])

    def worth(name: str) -> float:
        # A test of few lines is likelier to look at what they do.
        likely = kills[name] + 30 / (100 + reach[name])
        return likely * (5 if name in near else 1) / (seconds[name] + 0.2)

    order = sorted(names, key=lambda name: (-worth(name), name))
    return order[: up_to(order, seconds, budget)]


def spans_of(tree: ast.AST) -> tuple[list[range], list[range]]:
    """The lines of the bodies of functions; and of classes, with their decorators."""
    bodies, classes = [], []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            bodies.append(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.ClassDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            classes.append(range(first, (node.end_lineno or 0) + 1))
    return bodies, classes


def reached(known: dict[str, Any]) -> Counter[str]:
    """How many lines each test reaches."""
    if "reach" not in known:
        known["reach"] = Counter(
            name for lines in known["lines"].values() for names in lines.values() for name in names
        )
    return known["reach"]  # type: ignore[no-any-return]


def up_to(names: list[str], seconds: dict[str, float], budget: float) -> int:
    """How many of these tests take these seconds together; at least one."""
    total = 0.0
    for at, name in enumerate(names):
        total += seconds[name]
        if at and total > budget:
            return at
    return len(names)


# --- running --------------------------------------------------------------------------------------


_worker: dict[str, Any] = {}


def start_worker(known: dict[str, Any], options: argparse.Namespace, base: str) -> None:
    tree = Path(tempfile.mkdtemp(dir=base)) / "tree"
    ignored = shutil.ignore_patterns(".git", "build", ".venv", "runs", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    _worker.update(tree=tree, known=known, options=options, kills={})
    # once with bytecode, which is kept: the mutants' runs compile nothing but the mutant
    files = sorted({name.split("::")[0] for name in known["seconds"]})
    run_forked(tree, ["--collect-only", *files], tree / "mutant.log", 600, bytecode=True)


def try_numbered(given: tuple[int, Mutant]) -> tuple[int, Mutant]:
    return given[0], try_mutant(given[1])


def try_mutant(mutant: Mutant) -> Mutant:
    """Write the change into this process' copy of the tree, and run the tests on it."""
    tree, options, known = _worker["tree"], _worker["options"], _worker["known"]
    kills = _worker["kills"].setdefault(mutant.file, Counter())
    seconds = known["seconds"]
    names = tests_for(mutant, known, kills, options.budget)
    path = tree / mutant.file
    source, status = path.read_text(), path.stat()
    changed = mutated(source, mutant)
    if changed is None or changed == source or not names:
        mutant.outcome = "survived" if changed not in (None, source) else "no change"
        mutant.killer = "" if names else "no test reaches it"
        return mutant
    begin = time.monotonic()
    mutant.outcome = "survived"
    log = tree / "mutant.log"
    first = up_to(names, seconds, min(FIRST, options.budget))
    try:
        path.write_text(changed)
        for some in filter(None, (names[:first], names[first:])):
            limit = options.slack * sum(seconds[name] for name in some) + options.limit
            code = run_forked(tree, some, log, limit)
            if code != 0:
                note_killer(mutant, code, log.read_text(errors="replace"), kills)
                break
    finally:
        path.write_text(source)
        # what was compiled from this file is found by its time
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    mutant.seconds = round(time.monotonic() - begin, 1)
    return mutant


def note_killer(mutant: Mutant, code: int | None, log: str, kills: Counter[str]) -> None:
    mutant.outcome, mutant.killer = "killed", "time" if code is None else ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    if code in (4, 5) and not found:
        raise RuntimeError(f"tests are gone that --known names; let them be measured anew:\n{log}")
    if found and code is not None:
        mutant.killer = found[1]
        kills[_bare(found[1])] += 1


def run_forked(
    tree: Path, names: list[str], log: Path, limit: float, *, bytecode: bool = False
) -> int | None:
    """Run tests in a fork of this process, which has imported torch: its exit code, or None."""
    child = os.fork()
    if child == 0:
        code = 3
        with contextlib.suppress(BaseException):
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(tree)
            os.environ.update(_environment(tree))
            sys.path[:0] = [str(tree / "python"), str(tree / "tests")]
            sys.dont_write_bytecode = not bytecode
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            import hypothesis
            import pytest

            once = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # without shrinking
            hypothesis.settings.register_profile(
                "mutation", deadline=None, derandomize=True, database=None, phases=once
            )
            options = [
                "--hypothesis-profile=mutation",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:randomly",
                "--tb=no",
                "-rfE",
            ]
            code = int(pytest.main([*options, *names]))
        os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--skip", nargs="*", default=[], help="names of files to leave out")
    parser.add_argument("--count", type=int, default=240, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=25, help="seconds of tests for a mutant")
    parser.add_argument("--limit", type=float, default=30, help="seconds that a mutant may waste")
    parser.add_argument("--slack", type=float, default=3, help="times the clean tests' seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/mutation.json")
    parser.add_argument("--again", type=Path, help="a result: try its survivors once more")
    parser.add_argument("--resume", action="store_true", help="go on with a broken-off sample")
    parser.add_argument("--known", type=Path, help="keep what the first run shows here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        known = None
        if options.known and options.known.exists():
            known = json.loads(options.known.read_text())
            for file, lines in known["lines"].items():
                known["lines"][file] = {int(line): names for line, names in lines.items()}
        if known is None:
            files = test_files(options.packages)
            known = reach(files, options.packages, options.processes, Path(base))
            if options.known:
                options.known.write_text(json.dumps(known))
        print(f"tests that fail without a mutant, left out: {known['failed'] or 'none'}")
        done: list[Mutant] = []
        if options.resume:
            before = json.loads(options.out.read_text())
            given, places = [Mutant(**one) for one in before["mutants"]], before["places"]
            done = [mutant for mutant in given if mutant.outcome]
            chosen = [mutant for mutant in given if not mutant.outcome]
        elif options.again:
            before = json.loads(options.again.read_text())
            chosen, places = survivors(before), before["places"]
        else:
            chosen, places = sample(options.packages, options.count, options.seed, options.skip)
        print(f"{len(chosen)} mutants of {places} places in {', '.join(options.packages)}")
        preload()
        pool = multiprocessing.get_context("fork").Pool(
            options.processes, start_worker, (known, options, base)
        )
        with pool:
            for number, mutant in pool.imap_unordered(try_numbered, enumerate(chosen)):
                chosen[number] = mutant
                done.append(mutant)
                mark = "." if mutant.outcome == "killed" else "\n" + words(mutant) + "\n"
                print(mark, end="", flush=True)
                left = [one for one in chosen if not one.outcome]
                write(options, places, known, done + left)
    killed = sum(m.outcome == "killed" for m in done)
    real = sum(m.outcome != "no change" for m in done)
    print(f"\n{killed} of {real} killed ({100 * killed / max(real, 1):.1f} %): {options.out}")


def preload() -> None:
    """Import what many tests import, but nothing that is mutated."""
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import transformers

        transformers.BertForSequenceClassification  # noqa: B018


def words(mutant: Mutant) -> str:
    return (
        f"{mutant.outcome}: {mutant.file}:{mutant.line} ({mutant.operator})\n"
        f"  - {mutant.before}\n  + {mutant.after}"
    )


def write(options: argparse.Namespace, places: int, known: Any, mutants: list[Mutant]) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "packages": options.packages,
        "seed": options.seed,
        "places": places,
        "failing_without_a_mutant": known["failed"],
        "mutants": [asdict(m) for m in mutants],
    }
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
