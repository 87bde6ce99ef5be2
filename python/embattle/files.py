"""Files that are either complete or absent."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embattle.errors import InputError, first_line, need

# Unfinished files begin with this, so that what a killed process left can be told from all else.
UNFINISHED = ".embattle-part-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write to, and renames it to `path` once the block is through.

    Args:
        path: the file to create or to replace; its folder is created where it is missing.

    Yields:
        The sibling. If the block raises, the sibling is removed and `path` stays as it was.

    Raises:
        InputError: if the file cannot be written: no permission, no space.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=UNFINISHED, suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent}: {error.strerror}; choose another folder"
        ) from error
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_mask())
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary sibling folder that becomes `path` once the block is through.

    Args:
        path: the folder to create, or to replace with all that is in it.

    Yields:
        The sibling. If the block raises, the sibling is removed and `path` stays as it was.

    Raises:
        InputError: if the folder cannot be written: no permission, no space.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent}: {error.strerror}; choose another folder"
        ) from error
    before = part.with_name(f"{part.name}-before")
    try:
        yield part
        part.chmod(0o777 & ~_mask())
        if path.exists():
            path.rename(before)
        try:
            part.rename(path)
        except OSError:
            if before.exists():
                before.rename(path)
            raise
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


class _Patient(io.BufferedWriter):
    """A file whose first failure is kept, and after which nothing more is written."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        if self.failure is None:
            try:
                super().flush()
            except OSError as error:
                self.failure = error


@contextmanager
def patient(path: Path) -> Iterator[io.BufferedWriter]:
    """Gives a file to writers that do not survive a failure: torch's of archives ends the process.

    Raises:
        OSError: at the end of the block, if the file could not be written.
    """
    with _Patient(io.FileIO(path, "w")) as stream:
        yield stream
    if stream.failure is not None:
        raise stream.failure


def _mask() -> int:
    """What the process leaves out of the permissions of what it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) to `path`, all of it or nothing."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def writable(text: str) -> bool:
    """Whether a text can be written as UTF-8; a lone surrogate cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def save_tensors(path: Path, save: Callable[[str], None]) -> None:
    """Has `save` write a safetensors file, all of it or nothing.

    Raises:
        InputError: if it cannot be written, for instance on a full disk.
    """
    failure = need("safetensors").SafetensorError
    try:
        with replacing(path) as part:
            save(str(part))
    except failure as error:
        reason = str(error).split("I/O error: ")[-1]
        raise InputError(
            f"cannot write {path}: {reason}; make room and go on with --resume"
        ) from error


def remove_unfinished(folder: Path, *, older_than: float = 0.0) -> int:
    """Removes what a killed process left half-written in a folder and below it.

    Args:
        folder: the folder; it need not exist.
        older_than: seconds that a file must not have been touched for; in a folder that other
            processes write to, a younger one may still be wanted.

    Returns:
        How many files and folders were removed.
    """
    count = 0
    for path in [*folder.rglob(f"{UNFINISHED}*")]:
        try:
            if time.time() - path.lstat().st_mtime < older_than:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            count += 1
        except FileNotFoundError:
            continue
    return count


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_finite(model: Any) -> None:
    """Raises ValueError if a weight of an `nn.Module` is no finite number."""
    wrong = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if wrong:
        raise ValueError(f"{wrong[0]} holds values that are no finite numbers")


def broken(folder: Path, error: Exception) -> InputError:
    """The error about a folder that does not hold a trained model."""
    return InputError(
        f"{folder} does not hold a trained model: {first_line(error)}; train it with "
        "`embattle train`"
    )
