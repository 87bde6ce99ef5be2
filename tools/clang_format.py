"""Formats the native sources with clang-format; --check only tells."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENDINGS = {".cpp", ".h", ".cu", ".cuh"}
files = sorted(
    str(path)
    for folder in ("csrc", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in ENDINGS
)
options = ["--dry-run", "--Werror"] if "--check" in sys.argv else ["-i"]
command = [str(Path(sys.executable).parent / "clang-format"), *options, *files]
sys.exit(subprocess.run(command, check=False).returncode)
