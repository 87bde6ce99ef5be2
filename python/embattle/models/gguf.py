"""Models in GGUF files: converted once to safetensors, which later loads read from the cache."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from torch import Tensor

from embattle.data.fetch import cache_folder
from embattle.errors import InputError, first_line, need
from embattle.files import UNFINISHED, remove_unfinished, sha256
from embattle.progress import say


def find_gguf(place: Path) -> Path | None:
    """The GGUF file that a place names: itself, or the only one in a folder of nothing else.

    A folder that has a `config.json` is a model in transformers' own format, whatever else it has.

    Args:
        place: a file or a folder, which need not exist.

    Returns:
        The file; None where there is none.

    Raises:
        InputError: the folder holds several.
    """
    if place.suffix.lower() == ".gguf" and place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(
            f"model.pretrained: {place} holds {len(files)} GGUF files ({names}); name one of them: "
            f"{files[0]}"
        )
    return files[0] if files else None


def converted(file: Path) -> Path:
    """A folder with the model and tokenizer of a GGUF file, its weights in safetensors.

    Blocks of quantised weights are unpacked once for each file, by its hash, and each release of
    transformers, which does it.

    Args:
        file: of an architecture whose GGUF files transformers reads.

    Returns:
        The folder, inside `$EMBATTLE_CACHE`.

    Raises:
        InputError: the file cannot be read, `gguf` is not installed, or there is no room.
    """
    transformers = need("transformers")
    place = cache_folder() / "gguf"
    folder = place / f"{file.stem}-{sha256(file)[:16]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    need("gguf", "llm")
    remove_unfinished(place, older_than=3600)
    try:
        place.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=place))
    except OSError as error:
        raise InputError(
            f"cannot write to {place}: {error.strerror}; name another folder in EMBATTLE_CACHE"
        ) from error
    try:
        _convert(file, part)
        os.replace(part, folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise InputError(
            f"model.pretrained: cannot convert {file} in {place}: {error.strerror or error}; make "
            "room, or name another folder in EMBATTLE_CACHE"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write what `converted` promises into an empty folder.

    Raises:
        InputError: transformers cannot read the file.
        OSError: the folder cannot be written to.
    """
    transformers, safetensors = need("transformers"), need("safetensors.torch")
    say(f"converting {file.name}, once")
    read = file
    if file.suffix != ".gguf":  # transformers takes no other for one of these files
        read = folder / "model.gguf"
        read.symlink_to(file.resolve())
    given = {"gguf_file": read.name, "local_files_only": True}
    try:
        with redirect_stderr(io.StringIO()):  # its bar knows no other way to be off
            config = transformers.AutoConfig.from_pretrained(read.parent, **given)
            two = getattr(config, "is_encoder_decoder", False)
            auto = transformers.AutoModelForSeq2SeqLM if two else transformers.AutoModelForCausalLM
            tokenizer = transformers.AutoTokenizer.from_pretrained(read.parent, **given)
            model = auto.from_pretrained(read.parent, **given)
    except Exception as error:
        # The reader of a damaged or unknown file may raise anything.
        first = first_line(error)
        raise InputError(
            f"model.pretrained: transformers cannot read {file}: {first}; give a model that it "
            "reads, or a folder with config.json, model.safetensors and a tokenizer"
        ) from error
    if read != file:
        read.unlink()
    # The weights are plain numbers now: what says they are quantised would keep them from loading.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    # Tied weights once, by the first name: that of the input embeddings, which a body without its
    # head has too.
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in model.state_dict().items():
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            tensors[name] = weight.contiguous()
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
