"""What a GPU issues in a kernel's hot loops, read from the machine code that cuobjdump lists.

A hot loop is the smallest one around a 128-bit access. Of the ways round it that make the access
the longest is taken that calls no function and has no narrower access to global memory, where
there is one: those are for edges, masks and other dtypes. The shortest would often do nothing, as
what a pass is for is asked inside the loop. So it is an upper bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")
#: How 128-bit accesses are told apart, by what an instruction is called.
ACCESSES = {
    "store": re.compile(r"^ST(G|\.E)[\w.]*\.128"),
    "copy": re.compile(r"^LDGSTS[\w.]*\.128"),
    "load": re.compile(r"^LDG\.[\w.]*\.128"),
    "shared": re.compile(r"^LDS?\.[\w.]*128"),  # LD: the compiler could not tell where from
}


@dataclass(frozen=True)
class Instruction:
    """One of a function's instructions."""

    name: str
    predicated: bool
    target: int | None  # the index of where it may branch to
    falls: bool  # whether the next one may follow


@dataclass(frozen=True)
class Loop:
    """The longest way once round a loop that makes an access."""

    access: str  # a key of ACCESSES
    accesses: Mapping[str, int]  # how many of each on the way
    names: Counter[str]  # of the instructions on the way

    @property
    def length(self) -> int:
        return sum(self.names.values())

    @property
    def widened(self) -> int:
        """Conversions from float to double."""
        return sum(n for name, n in self.names.items() if name.startswith("F2F.F64"))


def functions(listing: str) -> dict[tuple[str, str], str]:
    """The parts of a listing, by mangled name and architecture."""
    found = {}
    for part in re.split(r"^\s*code for ", listing, flags=re.MULTILINE)[1:]:
        arch = part.split(None, 1)[0]
        for text in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            found[text.split(None, 1)[0], arch] = text
    return found


def instructions(text: str) -> list[Instruction]:
    """A function's instructions in order."""
    rows = [(int(at, 16), guard, name, rest) for at, guard, name, rest in INSTRUCTION.findall(text)]
    places = {at: i for i, (at, *_) in enumerate(rows)}
    result = []
    for _, guard, name, rest in rows:
        kind = name.split(".")[0]
        target = TARGET.search(rest)
        # BRA.DIV leads to code for lanes that are apart, and back.
        jumps = kind == "BRA" and ".DIV" not in name and target is not None
        conditional = bool(guard) or (kind == "BRA" and "P" in rest.split("0x")[0])
        ends = kind in ("EXIT", "RET", "BRX", "JMX", "KILL", "TRAP") or jumps
        result.append(
            Instruction(
                name,
                bool(guard),
                places.get(int(target[1], 16)) if jumps and target else None,
                conditional or not ends,
            )
        )
    return result


def _next(code: list[Instruction], i: int) -> Iterable[int]:
    if code[i].falls and i + 1 < len(code):
        yield i + 1
    target = code[i].target
    if target is not None:
        yield target


def _bodies(code: list[Instruction]) -> list[tuple[int, int, set[int]]]:
    """(first, last, all) of each loop, the smallest first."""
    before: list[list[int]] = [[] for _ in code]
    for i in range(len(code)):
        for j in _next(code, i):
            before[j].append(i)
    found = []
    for last, instruction in enumerate(code):
        first = instruction.target
        if first is None or first > last:
            continue
        body, todo = {first, last}, [last]
        while todo:
            i = todo.pop()
            if i == first:
                continue
            for j in before[i]:
                if j not in body:
                    body.add(j)
                    todo.append(j)
        if 0 in body and first != 0:  # entered from elsewhere: no loop of its own
            continue
        found.append((first, last, body))
    return sorted(found, key=lambda loop: len(loop[2]))


def _worth(instruction: Instruction) -> int:
    """How much a way is preferred for an instruction on it."""
    name = instruction.name
    if name.startswith("CALL"):
        return 1 if instruction.predicated else -10_000  # predicated ones are far jumps
    if name.startswith(("LDG", "STG")) and ".128" not in name:
        return -500
    return 100 if _access(name) else 1


def _longest(
    code: list[Instruction], body: set[int], start: int, end: int, last: int
) -> list[int] | None:
    """The longest way inside a loop's body, both ends included; it does not go on from `last`.

    No instruction comes twice: what leads back to one that is on the way is left out.
    """
    onward: dict[int, list[int]] = {}
    on_the_way, done = [start], []
    entered, left = {start}, set[int]()
    while on_the_way:
        i = on_the_way[-1]
        if i not in onward:
            goes_on = i not in (end, last)
            onward[i] = [j for j in _next(code, i) if j in body] if goes_on else []
        ahead = next((j for j in onward[i] if j not in entered), None)
        if ahead is not None:
            entered.add(ahead)
            on_the_way.append(ahead)
            continue
        onward[i] = [j for j in onward[i] if j in left]
        left.add(i)
        done.append(on_the_way.pop())
    best: dict[int, int] = {end: _worth(code[end])}
    for i in done:  # those ahead come first
        ahead_of = [best[j] for j in onward[i] if j in best]
        if i != end and ahead_of:
            best[i] = _worth(code[i]) + max(ahead_of)
    if start not in best:
        return None
    way = [start]
    while way[-1] != end:
        way.append(max((j for j in onward[way[-1]] if j in best), key=lambda j: best[j]))
    return way


def _through(
    code: list[Instruction], loop: tuple[int, int, set[int]], body: set[int], places: list[int]
) -> list[int] | None:
    """Once round a loop, by the first of the places that a way leads to."""
    first, last, _ = loop
    for place in places:
        there = _longest(code, body, first, place, last)
        back = _longest(code, body, place, last, last)
        if there and back:
            return there + back[1:]
    return None


def _access(name: str) -> str | None:
    return next((kind for kind, pattern in ACCESSES.items() if pattern.search(name)), None)


def hot_loops(code: list[Instruction]) -> list[Loop]:
    """The ways round the smallest loops with 128-bit accesses, one for each kind of access.

    A way for one kind avoids the kinds that come before it in ACCESSES where it can: a pass that
    only reads is not counted as the one that also stores.
    """
    bodies = _bodies(code)
    kinds = [_access(i.name) for i in code]
    order = list(ACCESSES)
    places: dict[tuple[int, str], list[int]] = {}  # by loop and kind
    for place, kind in enumerate(kinds):
        loop = next((n for n, (*_, body) in enumerate(bodies) if place in body), None)
        if kind is not None and loop is not None:
            places.setdefault((loop, kind), []).append(place)
    ways: list[tuple[str, list[int]]] = []
    for (n, kind), here in places.items():
        body = bodies[n][2]
        allowed = {i for i in body if kinds[i] not in order[: order.index(kind)]}
        way = _through(code, bodies[n], allowed, here) or _through(code, bodies[n], body, here)
        if way:
            ways.append((kind, way))
    return [
        Loop(
            kind,
            Counter(k for i in way if (k := kinds[i]) is not None),
            Counter(code[i].name for i in way),
        )
        for kind, way in ways
    ]


def cycles(names: Mapping[str, int], fp64_rate: float) -> dict[str, float]:
    """SM cycles that a warp's instructions keep each pipe busy for, as NVIDIA documents the rates.

    Args:
        names: of instructions, and how often.
        fp64_rate: warp instructions a cycle of an SM.
    """
    pipes = {"issue": 0.0, "integer": 0.0, "fp64": 0.0, "conversion": 0.0, "load and store": 0.0}
    for name, times in names.items():
        kind = name.split(".")[0]
        pipes["issue"] += times / 4
        if kind in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
            pipes["fp64"] += times / fp64_rate
        elif kind in ("F2F", "F2I", "I2F", "MUFU", "POPC", "FRND"):
            pipes["conversion"] += times * 2
        elif kind.startswith(("LD", "ST")) and not kind.startswith(("LDC", "LDGDEPBAR")):
            pipes["load and store"] += times * (4 if name.endswith("128") or ".128" in name else 1)
        elif not kind.startswith(("F", "HADD", "HMUL", "HFMA", "BRA", "BS", "MOV", "U", "NOP")):
            pipes["integer"] += times / 2
    return pipes
