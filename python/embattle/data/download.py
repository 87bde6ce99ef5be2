"""Downloads of pinned wheels that go on where they stopped.

pip says where the wheel is, by its own configuration: indexes, mirrors, folders. The file is then
read into the cache, and what an interrupted download has got stays there for the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.error import HTTPError

from embattle.errors import InputError
from embattle.files import UNFINISHED, sha256

# Tries in one call, each from where the one before stopped; seconds without a byte that end one.
_TRIES = 4
_PATIENCE = 60


@dataclass(frozen=True)
class Wheel:
    """A wheel, pinned, and the members of it that are wanted.

    Attributes:
        requirement: what pip is asked for, with the exact version.
        sha256: hash of the wheel file.
        folder: folder inside the wheel that holds the members.
        members: file name to the SHA-256 of its contents; `a.zip/b` is the file b in the zip
            archive a.zip.
    """

    requirement: str
    sha256: str
    folder: str
    members: Mapping[str, str]


def download(wheel: Wheel, kept: Path, otherwise: str) -> None:
    """Downloads a wheel to `kept`, or what is lacking of it, and checks its hash.

    Processes that want the same wheel at once wait for the one that came first.

    Args:
        wheel: what to get.
        kept: where to.
        otherwise: what the user can do instead, for the message.

    Raises:
        InputError: if it cannot be had, or is not the pinned file.
    """
    path = kept.with_suffix(".part")
    with _locked(path) as part:
        if kept.is_file() and sha256(kept) == wheel.sha256:
            path.unlink(missing_ok=True)
            return
        address = _address(wheel, otherwise)
        found = ""
        for _ in range(2):  # once more from the beginning, if what was there is of another file
            resumed = path.stat().st_size > 0
            _read_on(address, part, wheel, otherwise)
            found = sha256(path)
            if found == wheel.sha256:
                path.replace(kept)
                return
            _empty(part)
            if not resumed:
                break
        path.unlink(missing_ok=True)
    raise InputError(
        f"the file downloaded for {wheel.requirement} has SHA-256 {found[:12]}..., not the "
        f"pinned {wheel.sha256[:12]}..., and was discarded: check pip's package index"
    )


def _locked(path: Path) -> IO[bytes]:
    """The file, open for appending, which no other process has."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.open("ab")
        except OSError as error:
            raise InputError(
                f"cannot write to {path.parent}: {error.strerror}; name another folder in "
                "EMBATTLE_CACHE"
            ) from error
        fcntl.flock(part, fcntl.LOCK_EX)
        # Whoever had it may have moved or removed it meanwhile.
        if path.exists() and os.path.samestat(os.fstat(part.fileno()), path.stat()):
            return part
        part.close()


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"]
    # Nothing of it will run: what Python it is for does not matter.
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--ignore-requires-python"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _address(wheel: Wheel, otherwise: str) -> str:
    """Where pip finds the wheel."""
    done = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", wheel.requirement)
    if done.returncode:
        raise _failed(wheel, done.stderr, otherwise)
    try:
        (item,) = json.loads(done.stdout)["install"]
        return str(item["download_info"]["url"])
    except (ValueError, KeyError) as error:
        raise _failed(wheel, "pip does not say where it is", otherwise) from error


def _read_on(address: str, part: IO[bytes], wheel: Wheel, otherwise: str) -> None:
    """Appends what `part` lacks of a file, on the web or in a folder that pip looks at."""
    reason: Exception | str = ""
    for _ in range(_TRIES):
        have = part.tell()
        request = urllib.request.Request(address, headers={"User-Agent": "embattle"})
        if have and address.startswith("http"):
            request.add_header("Range", f"bytes={have}-")
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                if answer.status != 206:
                    _empty(part)
                    have = 0
                expected = answer.headers.get("Content-Length")
                shutil.copyfileobj(answer, part, 1 << 20)
            part.flush()
            if expected is None or part.tell() == have + int(expected):
                return
            reason = "the connection broke"
        except HTTPError as error:
            if error.code == 416:  # nothing lies beyond what is here
                return
            reason = error
        except (OSError, ValueError) as error:
            reason = error
        part.flush()
        if part.tell() == 0:
            # pip may know a proxy, a certificate or a password that this does not.
            _have_pip_download(wheel, part, otherwise)
            return
    raise InputError(
        f"the download of {wheel.requirement} stopped after {part.tell() / 1e6:.1f} MB: {reason}; "
        f"the same command goes on from there, or {otherwise}"
    )


def _have_pip_download(wheel: Wheel, part: IO[bytes], otherwise: str) -> None:
    """Has pip download the wheel in one go."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=Path(part.name).parent) as scratch:
        done = _pip("download", "--dest", scratch, wheel.requirement)
        files = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(files) != 1:
            raise _failed(wheel, done.stderr, otherwise)
        with files[0].open("rb") as stream:
            shutil.copyfileobj(stream, part)
    part.flush()


def _empty(part: IO[bytes]) -> None:
    part.truncate(0)
    part.seek(0)


def _failed(wheel: Wheel, said: str, otherwise: str) -> InputError:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["pip gave no file"]
    return InputError(
        f"could not download {wheel.requirement}: {lines[-1]}; check the network, or {otherwise}"
    )
