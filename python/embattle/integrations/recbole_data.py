"""RecBole's configuration and data, read without running anything that a file says."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embattle.errors import InputError, need
from embattle.perturb.random_state import preserved_random_state

#: Models that are not built at all.
REFUSED = {
    "KD_DAGFM": "it evaluates text of the configuration as code",
    "LDiffRec": "it reads pickles",
}
#: Types of models, as RecBole calls them, that there is no attack or no training for.
_TYPES = {
    "TRADITIONAL": "it is not trained by gradients",
    "DECISIONTREE": "it is not trained by gradients",
    "KNOWLEDGE": "it is trained on a knowledge graph with a second loss, which is not covered",
}
# Files that RecBole would unpickle.
_PICKLES = ("dataset_save_path", "dataloaders_save_path")
_WANTED = "sequential models, general ones trained by gradients, context-aware ones"


def library(name: str) -> Any:
    """Import a module of RecBole.

    Raises:
        InputError: RecBole, or what it needs, is not installed here.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        # Under numpy 2 its import fails on names that numpy no longer has.
        raise InputError(
            f"{name} cannot be imported ({error}); RecBole needs numpy < 2, and so an environment "
            "of its own: `make recbole` makes .venv-recbole, docs/integrations.md says more"
        ) from error


@dataclass(frozen=True)
class Prepared:
    """What RecBole makes of a configuration.

    Attributes:
        config: its `Config`.
        datasets: its data sets `train`, `validation` and `test`.
        loader: its loader of training samples, whose `collate_fn` draws negatives.
    """

    config: Any
    datasets: Mapping[str, Any]
    loader: Any

    @property
    def family(self) -> str:
        """`general`, `context` or `sequential`."""
        name: str = self.config["MODEL_TYPE"].name.lower()
        return name


def merged(files: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge configuration files, later ones over earlier ones, and changes over all.

    They are read by YAML's safe loader, with numbers as RecBole understands them (`1e-3`).

    Raises:
        InputError: a file cannot be read, or is no mapping.
    """
    yaml = need("yaml")
    found: dict[str, Any] = {}
    for name in files:
        try:
            values = yaml.load(Path(name).read_text(encoding="utf-8"), Loader=_loader())
        except OSError as error:
            raise InputError(f"cannot read RecBole's file {name}: {error.strerror}") from error
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{name} is not plain YAML: {reason}; correct it") from error
        if values is not None and not isinstance(values, dict):
            raise InputError(f"{name} must be a YAML mapping, such as model: BPR")
        found |= values or {}
    found |= changes
    for key in _PICKLES:
        if found.get(key):
            raise InputError(f"RecBole's {key} names a pickle, which is never loaded; leave it out")
    for key in ("model", "dataset"):
        if not isinstance(found.get(key), str) or not found[key]:
            raise InputError(f"RecBole's configuration names no {key}; add {key}: NAME")
    return found


def make_config(values: Mapping[str, Any]) -> Any:
    """Give RecBole's `Config` of merged values.

    Raises:
        InputError: RecBole knows no such model, it is one that cannot be served, or a value is
            wrong.
    """
    name = values["model"]
    if name in REFUSED:
        raise InputError(f"RecBole's {name} is not served: {REFUSED[name]}; choose another model")
    # It would evaluate texts that are given in any other way than in a file.
    with tempfile.TemporaryDirectory() as folder, _alone():
        path = Path(folder) / "config.yaml"
        path.write_text(need("yaml").safe_dump(dict(values)), encoding="utf-8")
        config_class = library("recbole.config").Config
        try:
            config = config_class(config_file_list=[str(path)])
        except ImportError as error:
            # Among those of other libraries it looks last.
            raise InputError(
                f"RecBole has no model {name!r} that needs no further library ({error.name}); it "
                "spells them as in BPR, LightGCN, DeepFM, SASRec"
            ) from error
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _wrong("the configuration", error) from error
    config["device"] = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why = _TYPES.get(config["MODEL_TYPE"].name)
    if why is not None:
        raise InputError(f"RecBole's {name} is not served: {why}; there are: {_WANTED}")
    return config


def prepare(values: Mapping[str, Any]) -> Prepared:
    """Read and divide the data as RecBole does, by its own seed.

    Raises:
        InputError: see `make_config`; or the data is not there, or not divided in three.
    """
    config = make_config(values)
    folder = Path(config["data_path"])
    if not folder.is_dir():
        raise InputError(
            f"RecBole's data_path: there is no folder {folder}; put the data set's atomic files "
            "there (nothing is downloaded)"
        )
    if (config["train_neg_sample_args"] or {}).get("dynamic"):
        raise InputError(
            "RecBole's train_neg_sample_args.dynamic asks the model for negatives, which is not "
            "covered; set it to false"
        )
    data = library("recbole.data.utils")
    # What lies in its folder of checkpoints it would unpickle.
    with tempfile.TemporaryDirectory() as empty, seeded(config["seed"]), quiet():
        config["checkpoint_dir"] = empty
        config["save_dataset"] = False
        try:
            dataset = data.create_dataset(config)
            built = dataset.build()
            if len(built) != 3:
                raise ValueError(f"eval_args.split gives {len(built)} parts; three are needed")
            samplers = data.create_samplers(config, dataset, built)
            make = data.get_dataloader(config, "train")
            loader = make(config, built[0], samplers[0], shuffle=False)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _wrong(f"the data in {folder}", error) from error
    return Prepared(config, dict(zip(("train", "validation", "test"), built, strict=True)), loader)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all that RecBole draws random numbers from; afterwards it is as it was."""
    with preserved_random_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what RecBole prints and logs, and its warnings about pandas and numpy."""
    log = logging.getLogger()  # the root is the one it writes to
    level = log.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep the command line from RecBole, which evaluates it, and the visible GPUs as they are."""
    arguments, visible = sys.argv, os.environ.get("CUDA_VISIBLE_DEVICES")
    sys.argv = arguments[:1] or [""]
    try:
        with quiet():
            yield
    finally:
        sys.argv = arguments
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _loader() -> Any:
    """YAML's safe loader, to which 1e-3 is a number, as it is to RecBole."""
    yaml = need("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        pass

    number = re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _wrong(what: str, error: Exception) -> InputError:
    """RecBole's complaint as an error of the user."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"RecBole refuses {what}: {type(error).__name__}: {reason}; correct it")
