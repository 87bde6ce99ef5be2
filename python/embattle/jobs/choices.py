"""Sections that a recipe has one of several kinds of, with options of the library's classes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, Discriminator, Tag, create_model, model_validator

from embattle.data.account import listed
from embattle.sections import Section


class Option(Section):
    """A section that stands for an object of the library.

    Attributes:
        kind: which class of the library.
        made: that class.
    """

    kind: str
    made: ClassVar[type[Any]]


class PlainOption(Option):
    """The same, where the object needs nothing else; the class's own checks are the section's."""

    def make(self) -> Any:
        """The object."""
        return self.made(**self.model_dump(exclude={"kind"}))

    @model_validator(mode="after")
    def _can_be_made(self) -> PlainOption:
        self.make()
        return self


def section_of(
    base: type[Option],
    kind: str,
    made: type[Any],
    *,
    without: Collection[str] = (),
    own: Mapping[str, tuple[Any, Any]] = types.MappingProxyType({}),
) -> type[Any]:
    """The section for one of the library's dataclasses: its fields are the section's.

    Args:
        base: what the section derives from.
        kind: the section's name, as recipes write it.
        made: the dataclass.
        without: fields that recipes do not give.
        own: type and default of fields that recipes give in another way.
    """
    hints = typing.get_type_hints(made)
    options: dict[str, Any] = {"kind": (Literal[kind], kind)}
    for field in dataclasses.fields(made):
        if not field.init or field.name in without or field.name in own:
            continue
        default = ... if field.default is dataclasses.MISSING else field.default
        options[field.name] = (hints[field.name], default)
    options.update(own)
    section: type[Any] = create_model(f"{made.__name__}Recipe", __base__=base, **options)
    section.made = made
    return section


def choice(members: Mapping[str, type[Any]], key: str, default: str | None = None) -> Any:
    """The type of a section that is one of several, told apart by a key of theirs.

    Args:
        members: the sections by the key's value.
        key: the key.
        default: its value where a recipe leaves it out.
    """

    def tag(value: Any) -> Any:
        found = value.get(key, default) if isinstance(value, Mapping) else getattr(value, key, None)
        return found if found is None or isinstance(found, str) else repr(found)

    tag.__name__ = key  # pydantic names it in its errors
    tagged = tuple(Annotated[member, Tag(name)] for name, member in members.items())
    return Annotated[Union[tagged], Discriminator(tag)]  # noqa: UP007


def laid_over(
    kind: Any,
    base: Mapping[str, Any],
    changes: Mapping[str, Any],
    left: list[str] | None = None,
    at: str = "",
) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; lists are replaced.

    A section that is one of several begins anew where `changes` name another one than `base` is:
    what was written for the one is not meant for the other.

    Args:
        kind: the type that both are of.
        base: what is changed.
        changes: what changes it.
        left: gets a sentence about each section that begins anew and leaves keys out.
        at: where in the recipe both are.
    """
    told = _discriminator(kind)
    if told is not None:
        which = told(base)
        if told.__name__ in changes and told(changes) != which:
            gone = [repr(key) for key in base if key not in changes]
            if left is not None and gone:
                left.append(f"{at} begins anew as {told(changes)}, without {listed(gone)}")
            return dict(changes)
        kind, _ = _inside(kind, str(which))
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            inside = f"{at}.{key}" if at else key
            value = laid_over(_inside(kind, key)[0], old, value, left, inside)
        merged[key] = value
    return merged


def locate(kind: Any, spot: Sequence[int | str]) -> tuple[str, list[str], str]:
    """Where in a recipe one of pydantic's errors is.

    Args:
        kind: the recipe's class.
        spot: the place in pydantic's words, with the tags of sections that are told apart by a key.

    Returns:
        The dotted key; the keys that are known at the place; and which of several sections it is,
        "" where there is one.
    """
    shown: list[str] = []
    which = ""
    for step in spot:
        kind, said = _inside(kind, step)
        which = "" if said else str(step)
        if said:
            shown.append(str(step))
    kind = _plain(kind)
    known = list(kind.model_fields) if _is_section(kind) else []
    return ".".join(shown), known, which


def _inside(kind: Any, step: int | str) -> tuple[Any, bool]:
    """What is at a step inside of a type, and whether the step is one of the recipe's own."""
    kind = _plain(kind)
    inner = typing.get_args(kind)
    if _is_section(kind):
        field = kind.model_fields.get(step)
        if field is None:
            return None, True
        # Pydantic keeps what tells several sections apart beside the field's type.
        whole: Any = (field.annotation, None, *field.metadata)
        return Annotated[whole], True
    for member in inner:
        if any(isinstance(x, Tag) and x.tag == step for x in getattr(member, "__metadata__", ())):
            return member, False
    # A list's or a mapping's entry; of other unions the member that is a section.
    return (inner[-1] if inner and not _is_union(kind) else kind), True


def _discriminator(kind: Any) -> Any:
    """What tells the sections apart of which a type is one; None where it is not one of several."""
    while kind is not None:
        for said in getattr(kind, "__metadata__", ()):
            if isinstance(said, Discriminator):
                return said.discriminator
        kind = _within(kind)
    return None


def _plain(kind: Any) -> Any:
    """A type without annotations, and without None."""
    while (within := _within(kind)) is not None:
        kind = within
    return kind


def _within(kind: Any) -> Any:
    """The type in a type's outermost annotation, or beside its None; None where there is none."""
    inner = [x for x in typing.get_args(kind) if x is not types.NoneType]
    annotated = typing.get_origin(kind) is Annotated
    return inner[0] if annotated or (_is_union(kind) and len(inner) == 1) else None


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
