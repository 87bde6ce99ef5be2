"""`python -m embattle`: the command line."""

from __future__ import annotations

import io
import sys

_WITHOUT_TYPER = """\
usage: embattle [init FILE | train RECIPE | audit RUN_DIR | tune RECIPE | predict MODEL FILE |
                 export MODEL | poison TABLE | recbole CONFIG | data list|fetch|inspect |
                 doctor]

All but doctor, and the full help, need typer: pip install 'embattle[jobs]'
"""


def main() -> None:
    """Runs the command line; without typer, `doctor` and a short help still work."""
    for stream in (sys.stdout, sys.stderr):
        # What the terminal cannot show is written as an escape, instead of an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from embattle.cli import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        if sys.argv[1:2] == ["doctor"]:
            from embattle.jobs.doctor import examine

            report = examine()
            print("\n".join(report.lines()))
            sys.exit(1 if report.problems else 0)
        asked = not sys.argv[1:] or "--help" in sys.argv
        (sys.stdout if asked else sys.stderr).write(_WITHOUT_TYPER)
        sys.exit(0 if asked else 2)
    app()


if __name__ == "__main__":
    main()
