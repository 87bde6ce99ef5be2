"""From the name of a task in a recipe to its class: one that is built in, or a user's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from embattle.errors import InputError, closest
from embattle.sections import Section
from embattle.tasks.base import Task

#: Name in a recipe -> module and class.
BUILT_IN = {
    "click_through": "embattle.tasks.clicks:ClickThrough",
    "hybrid_ranking": "embattle.tasks.hybrid:HybridRanking",
    "item_ranking": "embattle.tasks.item_ranking:ItemRanking",
    "llm_ranking": "embattle.tasks.llm_ranking:LLMRanking",
    "news_clicks": "embattle.tasks.news:ClicksOnNews",
    "next_item": "embattle.tasks.next_item:NextItem",
    "recbole": "embattle.integrations.recbole:RecBoleTask",
    "text_classification": "embattle.tasks.text:TextClassification",
    "tabular": "embattle.tasks.tabular:Tabular",
}


def find(name: str, *, trust: bool = False) -> type[Task]:
    """Give the class of a task.

    Args:
        name: one of `BUILT_IN`, or the place of a class: `my_file.py:MyTask` (from the working
            directory), `package.module:MyTask`.
        trust: whether code of one's own may be run, which reading its file already does.

    Raises:
        InputError: there is no such task, it is no task, or it may not be run.
    """
    if name in BUILT_IN:
        module, _, kind = BUILT_IN[name].partition(":")
        found: type[Task] = getattr(importlib.import_module(module), kind)
        return found
    place, colon, kind = name.rpartition(":")
    if not colon or not place or not kind.isidentifier():
        raise InputError(
            f"no task is called {name!r}; {closest(name, BUILT_IN)}; or name a class of your own: "
            "my_file.py:MyTask, package.module:MyTask"
        )
    if not trust:
        raise InputError(
            f"{name} is code, and would be run; if you wrote or have read it, say so with "
            "--trust-task"
        )
    module_ = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    own = getattr(module_, kind, None)
    if not isinstance(own, type):
        classes = [key for key, value in vars(module_).items() if isinstance(value, type)]
        raise InputError(f"{place} has no class {kind!r}; {closest(kind, classes)}")
    if not issubclass(own, Task):
        raise InputError(f"{name} is no task: derive it from embattle.tasks.Task")
    lacking = sorted(getattr(own, "__abstractmethods__", ()))
    if lacking:
        raise InputError(f"{name} lacks {', '.join(lacking)}; define it, see embattle.tasks.Task")
    for name_, section in (("Data", own.Data), ("Model", own.Model)):
        if not isinstance(section, type) or not issubclass(section, Section):
            raise InputError(
                f"{name}: {name_} must be a class derived from embattle.tasks.Section, got "
                f"{section!r}"
            )
    return own


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module that is known by its contents: what has not changed runs once."""
    try:
        text = path.expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the task's file {path}: {error.strerror}") from error
    known = hashlib.sha256(str(path.resolve()).encode() + text).hexdigest()[:16]
    name = f"embattle_task_{known}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.expanduser())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # annotations are looked up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(
            f"{path} cannot be run: {type(error).__name__}: {error}; correct the task's file"
        ) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{name} cannot be imported: {type(error).__name__}: {error}; is it installed?"
        ) from error
