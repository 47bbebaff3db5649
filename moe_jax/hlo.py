"""Reads the text of a compiled program: its collectives, how often each runs, what each carries.

The text lists computations; a loop's body is listed once. It runs as often as the constant says
that its condition compares the counter with (`lax.scan`: from 0); loops without one count once. A
collective may stand in three forms: itself; a pair `KIND-start`, `KIND-done`; or inside a
computation that an `async-start` calls. Each counts once.
"""

import collections
import math
import re

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # others name theirs: s32, u8
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+)(?:[a-z0-9]*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation)=%([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r" while\(.*condition=%([\w.-]+)")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%[\w.-]+ = (.*?) ([a-z][a-z0-9-]*)\(")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """kind -> (operations in one run, bytes of all their results on one device)."""
    bodies, entry = _computations(text)
    runs: collections.Counter[str] = collections.Counter()
    _count_runs(bodies, entry, 1, runs)
    found: dict[str, tuple[int, int]] = {}
    for name, times in runs.items():
        for line in bodies[name]:
            match = _OPERATION.match(line)
            kind = match[2].removesuffix("-start") if match else ""
            if match and kind in KINDS:
                # An all-reduce's start has results alone, that of others operands and results.
                alone = match[2] in (kind, "all-reduce-start")
                size = sum(_sizes(match[1] if alone else _elements(match[1])[1]))
                operations, total = found.get(kind, (0, 0))
                found[kind] = (operations + times, total + times * size)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the one that a run starts with."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%([\w.-]+) .*\{$", line)
        if head:
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _count_runs(
    bodies: dict[str, list[str]], name: str, times: int, runs: collections.Counter[str]
) -> None:
    runs[name] += times
    for line in bodies[name]:
        if "-done(" in line or "-update(" in line:  # the same computation as its start
            continue
        condition = _CONDITION.search(line)
        inner = times * (_trips(bodies[condition[1]]) if condition else 1)
        for role, callee in _CALLS.findall(line):
            follows = role != "to_apply" or " call(" in line  # others apply sums and the like
            if follows and callee in bodies:
                _count_runs(bodies, callee, inner, runs)
        for branches in _BRANCHES.findall(line):
            for callee in re.findall(r"%([\w.-]+)", branches):
                _count_runs(bodies, callee, times, runs)


def _trips(condition: list[str]) -> int:
    """Turns of a loop that counts from 0 up to a constant; 1 where the condition shows none."""
    limits = [int(found[1]) for line in condition if (found := _CONSTANT.search(line))]
    counts = len(limits) == 1 and any("direction=LT" in line for line in condition)
    return limits[0] if counts else 1


def _elements(shape: str) -> list[str]:
    """Of a tuple, which may hold tuples."""
    found, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def _sizes(shapes: str) -> list[int]:
    """Bytes of every array named in a piece of text."""
    return [
        math.prod(int(side) for side in sides.split(",") if side) * _bits(kind) // 8
        for kind, sides in _ARRAY.findall(shapes)
    ]


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)
