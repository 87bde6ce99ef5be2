"""What a GPU issues in a kernel's hot loops, read from the machine code that cuobjdump lists.

A hot loop is the smallest one around a 128-bit access. Of the ways through it the shortest that
makes the access is taken: rare cases (edges, masks, other dtypes) are branches off it.
"""

from __future__ import annotations

import heapq
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
    "store": re.compile(r"^ST(G|\.E)?[\w.]*\.128|^STG[\w.]*\.128"),
    "copy": re.compile(r"^LDGSTS[\w.]*\.128"),
    "load": re.compile(r"^LDG\.[\w.]*\.128"),
    "shared": re.compile(r"^LDS?\.[\w.]*128"),  # LD: the compiler could not tell where from
}
CALL = 10_000  # what a call costs where a way around it is looked for


@dataclass(frozen=True)
class Instruction:
    """One of a function's instructions."""

    name: str
    predicated: bool
    target: int | None  # the index of where it may branch to
    falls: bool  # whether the next one may follow


@dataclass(frozen=True)
class Loop:
    """The shortest way once around a loop that makes an access."""

    access: str  # a key of ACCESSES
    accesses: Mapping[str, int]  # how many of each on the way
    names: Counter[str]  # of the instructions on the way

    @property
    def length(self) -> int:
        return sum(self.names.values())


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


def _cost(instruction: Instruction) -> int:
    return CALL if instruction.name.startswith("CALL") else 1


def _shortest(
    code: list[Instruction], body: set[int], start: int, end: int, last: int
) -> list[int] | None:
    """The cheapest way inside a loop's body, both ends included; it does not go on from `last`."""
    best = {start: _cost(code[start])}
    came: dict[int, int] = {}
    heap = [(best[start], start)]
    while heap:
        cost, i = heapq.heappop(heap)
        if i == end:
            way = [i]
            while way[-1] != start:
                way.append(came[way[-1]])
            return way[::-1]
        if cost > best[i] or i == last:
            continue
        for j in _next(code, i):
            if j in body and cost + _cost(code[j]) < best.get(j, 1 << 60):
                best[j] = cost + _cost(code[j])
                came[j] = i
                heapq.heappush(heap, (best[j], j))
    return None


def _through(
    code: list[Instruction], loop: tuple[int, int, set[int]], body: set[int], places: list[int]
) -> list[int] | None:
    """Once around a loop by the first of the places, and those of the others on the way."""
    first, last, _ = loop
    way = _shortest(code, body, first, places[0], last)
    for place in [*places[1:], last]:
        on = way and _shortest(code, body, way[-1], place, last)
        if way and on:
            way = way + on[1:]
    return way if way and way[-1] == last else None


def _access(name: str) -> str | None:
    return next((kind for kind, pattern in ACCESSES.items() if pattern.search(name)), None)


def hot_loops(code: list[Instruction]) -> list[Loop]:
    """The ways around the smallest loops with 128-bit accesses, one for each kind of access.

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
