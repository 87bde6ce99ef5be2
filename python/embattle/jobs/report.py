"""Audited runs side by side: what each model reaches, what it cost, and which of them differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from embattle.audit import html
from embattle.audit.schema import SCHEMA, Metrics
from embattle.audit.scores import CLEAN, OUTCOMES, WORST, corrected, plain, read_outcomes
from embattle.audit.statistics import bootstrap, mcnemar, percentile_interval
from embattle.audit.summary import difference_words, figure
from embattle.audit.words import threat_words
from embattle.errors import InputError, first_line
from embattle.files import sha256, write_text
from embattle.progress import say
from embattle.tasks.kinds.weighted import Mean


@dataclass(frozen=True)
class Audited:
    """A run with its audit.

    Attributes:
        name: which no other of the runs has.
        facts: what its `metrics.json` holds.
        part: the fingerprint of the samples, where their outcomes are known.
        right: what is right, by model and attack, each bool [N].
    """

    name: str
    facts: dict[str, Any]
    part: str | None
    right: dict[str, dict[str, Tensor]]


def report(folders: Sequence[Path], out: Path | None = None, *, overwrite: bool = False) -> None:
    """Prints how the models of audited runs compare, and may write it down.

    Models of runs with the same test part are also tested against each other, sample by sample:
    without attack, and under the worst attack if the runs' attackers may do the same.

    Args:
        folders: of runs that `embattle audit` examined.
        out: a page (.html), or the figures (.json).
        overwrite: whether a file that is there is replaced.

    Raises:
        InputError: a run was not audited, or by another version; `out` cannot be written.
    """
    if out is not None:
        if out.suffix.lower() not in (".html", ".json"):
            raise InputError(f"--out {out}: name a file that ends in .html or .json")
        if out.exists() and not overwrite:
            raise InputError(f"--out {out} is there already; use --overwrite or another name")
    short = [folder.resolve().name for folder in folders]
    alike = len(set(short)) < len(short)
    runs = [
        _read(folder, str(folder) if alike else name)
        for folder, name in zip(folders, short, strict=True)
    ]
    if len({run.name for run in runs}) < len(runs):
        raise InputError("a run is named twice; name each once")
    rows, comparisons = [row for run in runs for row in _rows(run)], _comparisons(runs)
    for line in _lines(runs, rows, comparisons):
        say(line)
    if out is None:
        return
    if out.suffix.lower() == ".html":
        write_text(out, _page(runs, rows, comparisons))
    else:
        found = {"schema": SCHEMA, "rows": rows, "comparisons": comparisons}
        write_text(out, json.dumps(plain(found), indent=2) + "\n")
    say(f"written: {out}")


def _read(folder: Path, name: str) -> Audited:
    """A run's audit, checked."""
    file = folder / "metrics.json"
    if not file.is_file():
        what = "has not been audited" if (folder / "run.json").is_file() else "is not a run"
        raise InputError(
            f"{folder} {what} (no metrics.json); run `embattle audit {folder}` on what "
            "`embattle train` wrote first"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        Metrics.model_validate(facts)
    except ValidationError as errors:
        first = errors.errors()[0]
        spot = ".".join(str(step) for step in first["loc"]) or "the whole"
        raise InputError(
            f"{file} is not an audit of this version ({spot}: {first['msg']}); run "
            f"`embattle audit {folder}` again"
        ) from errors
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read ({first_line(error)}); run `embattle audit {folder}` again"
        ) from error
    outcomes = folder / OUTCOMES
    # Of another audit, or none: the figures still compare, but not sample by sample.
    if not outcomes.is_file() or sha256(outcomes) != facts["fingerprints"].get("outcomes"):
        return Audited(name, facts, None, {})
    try:
        return Audited(name, facts, *read_outcomes(outcomes))
    except Exception as error:
        # The file may have been changed in any way.
        raise InputError(
            f"{outcomes} cannot be read ({first_line(error)}); run `embattle audit {folder}` again"
        ) from error


def _rows(run: Audited) -> list[dict[str, Any]]:
    """The figures of each model of a run."""
    facts = run.facts
    checks = [check["passed"] for check in facts["checks"]]
    rows = []
    for model, entry in facts["models"].items():
        rows.append(
            {
                "run": run.name,
                "model": model,
                "measures": facts["measures"],
                "clean": entry["clean"],
                "worst": entry["worst"],
                "train_seconds": facts.get("train_seconds", {}).get(model),
                "checks_held": sum(checks),
                "checks": len(checks),
                "examples": facts["examples"],
                "threat": facts["threat"],
            }
        )
    return rows


def _comparisons(runs: Sequence[Audited]) -> list[dict[str, Any]]:
    """Models of all runs in pairs, sample by sample, where the samples are the same."""
    found = []
    every = [(run, model) for run in runs for model in run.right]
    for (one, first), (other, second) in combinations(every, 2):
        measure = one.facts["measures"][0]
        if one.part != other.part or measure != other.facts["measures"][0]:
            continue
        for row in (CLEAN, WORST):
            if row == WORST and one.facts["threat"] != other.facts["threat"]:
                continue
            a, b = one.right[first][row], other.right[second][row]
            off = Mean(b.double() - a.double())
            found.append(
                {
                    "models": [f"{one.name}/{first}", f"{other.name}/{second}"],
                    "attack": row,
                    "measure": measure[0],
                    "difference": float(off.values.mean()),
                    "interval": percentile_interval(bootstrap({0: off}, len(a))[0]),
                    "p": mcnemar(a, b),
                    "test": "exact McNemar",
                }
            )
    return corrected(found)


def _alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows by what was measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row["measures"]), []).append(row)
    return list(groups.values())


def _table(rows: Sequence[dict[str, Any]], *, intervals: bool) -> list[list[str]]:
    """Head and cells of a table of models that were measured alike.

    Args:
        rows: of `_rows`.
        intervals: whether all measures have theirs, or the headline alone.
    """
    measures = rows[0]["measures"]
    head = ["model", *(f"{title}, {at}" for _, title in measures for at in ("clean", "worst"))]
    table = [[*head, "training", "checks"]]
    for row in rows:
        cells = [f"{row['run']}/{row['model']}"]
        for i, (key, _) in enumerate(measures):
            for at in ("clean", "worst"):
                text = figure(row[at], key)
                cells.append(text if intervals or i == 0 else text.split(" [")[0])
        seconds = row["train_seconds"]
        cells.append("-" if seconds is None else f"{seconds:.0f} s")
        table.append([*cells, f"{row['checks_held']} of {row['checks']} hold"])
    return table


def _lines(
    runs: Sequence[Audited],
    rows: Sequence[dict[str, Any]],
    comparisons: Sequence[dict[str, Any]],
) -> list[str]:
    lines = [
        f"{run.name}: {run.facts['examples']} {run.facts['part'] or ''} examples, "
        f"{threat_words(run.facts)}"
        for run in runs
    ]
    for group in _alike(rows):
        table = _table(group, intervals=False)
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines.append("")
        for row in table:
            cells = [f"{row[0]:<{widths[0]}}"]
            cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
    titles = _titles(runs)
    lines += ["", *(difference_words(one, titles[one["measure"]]) for one in comparisons)]
    return [*lines, *_unpaired(runs)]


def _titles(runs: Sequence[Audited]) -> dict[str, str]:
    return {key: title for run in runs for key, title in run.facts["measures"]}


def _unpaired(runs: Sequence[Audited]) -> list[str]:
    """Why some models were not tested against others."""
    notes = []
    missing = [run.name for run in runs if run.part is None]
    if missing:
        notes.append(
            f"{', '.join(missing)}: {OUTCOMES} is not of this audit, so that nothing is "
            "compared sample by sample; audit again"
        )
    if len({run.part for run in runs if run.part is not None}) > 1:
        notes.append("runs with other test parts are not tested against each other")
    titles = dict.fromkeys(run.facts["measures"][0][1] for run in runs)
    if len(titles) > 1:
        notes.append(
            f"runs that are measured otherwise ({', '.join(titles)}) are not tested against each "
            "other"
        )
    threats = {json.dumps(run.facts["threat"], sort_keys=True) for run in runs}
    if len(threats) > 1:
        notes.append("runs whose attackers may do other things are not compared under attack")
    return notes


def _page(
    runs: Sequence[Audited],
    rows: Sequence[dict[str, Any]],
    comparisons: Sequence[dict[str, Any]],
) -> str:
    """The comparison as a page."""
    names = ", ".join(run.name for run in runs)
    sections = [html.heading("Robustness of several runs", names)]
    for group in _alike(rows):
        head, *cells = _table(group, intervals=True)
        title = f"{group[0]['measures'][0][1].capitalize()}, clean and under the worst attack"
        note = "In brackets 95 % intervals over samples. Worst: the worst attack on each sample."
        sections.append(html.section(title, html.table(head, cells), note=note))
    if comparisons:
        titles = _titles(runs)
        said = [
            html.paragraph(difference_words(one, titles[one["measure"]])) for one in comparisons
        ]
        note = "On the same samples, one by one; p-values are corrected for their number."
        sections.append(html.section("Which models differ", *said, note=note))
    about = [
        [
            run.name,
            str(run.facts["examples"]),
            threat_words(run.facts),
            f"{run.facts['audit_seconds']:.0f} s",
            run.facts["fingerprint"][:16],
        ]
        for run in runs
    ]
    head = ["run", "examples", "attacker", "audit", "fingerprint"]
    notes = [html.paragraph(note) for note in _unpaired(runs)]
    sections.append(html.section("Runs", html.table(head, about, text=[2]), *notes))
    return html.page("Robustness of several runs", sections)
