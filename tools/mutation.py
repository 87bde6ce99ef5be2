"""Would the tests notice? Change the code at random places, one at a time, and run the tests.

    make mutation [MUTATION="--packages clipping --count 100"]

Mutants come from cosmic-ray's operators, and from one of our own that deletes a statement. Places
are drawn first and then one mutant for each, since a comparison has ten mutants and a call has one.
Places that cannot matter are left out: annotations, what only a type checker reads, and guards
against mistakes of our own (`assert`, `zip(strict=True)`).

A first run of the tests under coverage tells which tests reach which line. A mutant gets those
alone, those that killed others in the same file first, then the quickest, up to `--budget` seconds;
it counts as killed when a test fails or the time is up. Each process works in a copy of the tree
and forks for each mutant, so that torch is imported once.

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
    "criteria": ["criteria", "losses", "results", "options", "leaving"],
    "attacks": [
        "results",
        "options",
        "attacks",
        "leaving",
        "tokens",
        "sites",
        "perturb",
        "fidelity",
        "autoattack",
        "minimum_norm",
    ],
    "objectives": ["objective", "options", "results", "sites", "fidelity"],
    "perturb": [
        "sites",
        "results",
        "perturb",
        "guard",
        "replay",
        "options",
        "objective",
        "leaving",
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
COMMON = ["attack_properties"]  # of all packages but clipping
CASES = "80"  # of the property tests


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


def mutants_of(path: Path) -> Iterator[tuple[tuple[Any, ...], Mutant]]:
    """All mutants of a file, each with the place that it shares with its alternatives."""
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
        if kind.arguments():
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
    chosen = rng.sample(sorted(places, key=str), min(count, len(places)))
    drawn = [rng.choice(places[place]) for place in chosen]
    for mutant in drawn:
        show(mutant)
    return drawn, len(places)


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
        alike = []
        for _, mutant in mutants_of(ROOT / given["file"]):
            if mutant.operator == given["operator"]:
                show(mutant)
                if (mutant.before, mutant.after) == (given["before"], given["after"]):
                    alike.append(mutant)
        if alike:
            found.append(min(alike, key=lambda m: abs(m.line - given["line"])))
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


def reach(files: list[str], data: Path) -> dict[str, Any]:
    """Run the tests once: which of them run which lines, and how long each takes."""
    import coverage

    config = data / "coverage.ini"
    config.write_text(
        f"[run]\ndynamic_context = test_function\nsource = {ROOT}/python/embattle\n"
        f"data_file = {data}/coverage\n"
    )
    command = ["-m", "coverage", "run", f"--rcfile={config}", "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", f"--junitxml={data}/tests.xml", *files]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=_environment(ROOT), check=False)
    seconds: Counter[str] = Counter()
    failed: set[str] = set()
    for case in ElementTree.parse(data / "tests.xml").iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{_bare(case.get('name', ''))}"
        seconds[name] += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
    lines: dict[str, dict[int, list[str]]] = {}
    measured = coverage.CoverageData(str(data / "coverage"))
    measured.read()
    for path in measured.measured_files():
        found = {}
        for line, contexts in measured.contexts_by_lineno(path).items():
            names = {_node(context) for context in contexts if context} - failed
            found[line] = sorted(name for name in names if name in seconds)
        lines[str(Path(path).relative_to(ROOT))] = found
    return {"seconds": dict(seconds), "lines": lines, "failed": sorted(failed)}


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


def tests_for(mutant: Mutant, known: dict[str, Any], kills: Counter[str], budget: float) -> Any:
    """The tests that reach a mutant's line, the likeliest killers first."""
    lines = known["lines"].get(mutant.file, {})
    names = set(lines.get(mutant.line, []))
    seconds = known["seconds"]
    if not names:  # what runs at import may show anywhere
        names = set(seconds) - set(known["failed"])
    chosen, total = [], 0.0
    for name in sorted(names, key=lambda n: (-kills[n], seconds[n], n)):
        total += seconds[name]
        if chosen and total > budget:
            break
        chosen.append(name)
    return chosen, total


# --- running --------------------------------------------------------------------------------------


_worker: dict[str, Any] = {}


def start_worker(known: dict[str, Any], options: argparse.Namespace, base: str) -> None:
    tree = Path(tempfile.mkdtemp(dir=base))
    ignored = shutil.ignore_patterns(".git", "build", ".venv", "runs", "__pycache__")
    shutil.copytree(ROOT, tree / "tree", ignore=ignored, dirs_exist_ok=True)
    _worker.update(tree=tree / "tree", known=known, options=options, kills={})


def try_mutant(mutant: Mutant) -> Mutant:
    """Write the change into this process' copy of the tree, and run the tests on it."""
    tree, options, known = _worker["tree"], _worker["options"], _worker["known"]
    kills = _worker["kills"].setdefault(mutant.file, Counter())
    names, total = tests_for(mutant, known, kills, options.budget)
    path = tree / mutant.file
    source = path.read_text()
    changed = mutated(source, mutant)
    if changed is None or changed == source or not names:
        mutant.outcome = "survived" if changed not in (None, source) else "no change"
        mutant.killer = "" if names else "no test reaches it"
        return mutant
    begin = time.monotonic()
    log = tree / "mutant.log"
    try:
        path.write_text(changed)
        code = run_forked(tree, names, log, options.slack * total + options.limit)
    finally:
        path.write_text(source)
    mutant.seconds = round(time.monotonic() - begin, 1)
    mutant.outcome = {0: "survived", None: "killed"}.get(code, "killed")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    mutant.killer = "time" if code is None else found[1] if found and code else ""
    if found and code:
        kills[_bare(found[1])] += 1
    return mutant


def run_forked(tree: Path, names: list[str], log: Path, limit: float) -> int | None:
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
            sys.dont_write_bytecode = True
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=no", "-rfE"]
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
    parser.add_argument("--known", type=Path, help="keep what the first run shows here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        known = None
        if options.known and options.known.exists():
            known = json.loads(options.known.read_text())
            for file, lines in known["lines"].items():
                known["lines"][file] = {int(line): names for line, names in lines.items()}
        if known is None:
            known = reach(test_files(options.packages), Path(base))
            if options.known:
                options.known.write_text(json.dumps(known))
        print(f"tests that fail without a mutant, left out: {known['failed'] or 'none'}")
        if options.again:
            before = json.loads(options.again.read_text())
            chosen, places = survivors(before), before["places"]
        else:
            chosen, places = sample(options.packages, options.count, options.seed, options.skip)
        print(f"{len(chosen)} mutants of {places} places in {', '.join(options.packages)}")
        preload()
        done: list[Mutant] = []
        pool = multiprocessing.get_context("fork").Pool(
            options.processes, start_worker, (known, options, base)
        )
        with pool:
            for mutant in pool.imap_unordered(try_mutant, chosen):
                done.append(mutant)
                mark = "." if mutant.outcome == "killed" else "\n" + words(mutant) + "\n"
                print(mark, end="", flush=True)
                write(options, places, known, done)
    killed = sum(m.outcome == "killed" for m in done)
    real = sum(m.outcome != "no change" for m in done)
    print(f"\n{killed} of {real} killed ({100 * killed / max(real, 1):.1f} %): {options.out}")


def preload() -> None:
    """Import what every test imports, but nothing that is mutated."""
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401


def words(mutant: Mutant) -> str:
    return (
        f"{mutant.outcome}: {mutant.file}:{mutant.line} ({mutant.operator})\n"
        f"  - {mutant.before}\n  + {mutant.after}"
    )


def write(options: argparse.Namespace, places: int, known: Any, done: list[Mutant]) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "packages": options.packages,
        "seed": options.seed,
        "places": places,
        "failing_without_a_mutant": known["failed"],
        "mutants": [asdict(m) for m in done],
    }
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
