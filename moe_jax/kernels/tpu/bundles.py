"""How many instruction bundles of a TPU a compiled kernel takes: read from the compiler's dump.

A TensorCore issues one bundle a cycle, and the compiler schedules all of them: bundles of a loop
times its turns are cycles, unless memory is late. Nothing here has been compared with hardware.

    with dumped() as folder:            # before libtpu is loaded, in a process of its own
        compile a program
        kernels = read(folder)          # and again after the next program
"""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

_LINE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)")


class Bundles(NamedTuple):
    """Of one kernel, in bundles.

    Attributes:
      step: what every step of the grid costs beside its products.
      whole: the products of a chunk of a tile inside its group, and what follows them.
      part: the same of a chunk of a part of a tile, at a group's edge.
      group: what is done once for a group (sums that are zeroed and written).
    """

    step: int
    whole: int
    part: int
    group: int


@contextlib.contextmanager
def dumped() -> Iterator[pathlib.Path]:
    """The folder into which libtpu, loaded inside, writes the schedules of what it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{options} --xla_jf_dump_llo_pass_label_regex=final"
        yield pathlib.Path(folder)


def read(folder: pathlib.Path) -> dict[str, Bundles]:
    """Kernels by name, without "grouped_"; empties the folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = re.search(r"grouped_(\w+?)_*(?:\.\w+)*-\d+-final_bundles\.txt$", path.name)
        if match:
            found[match[1]] = parse(path.read_text())
        path.unlink()
    return found


class _Segment(NamedTuple):
    depth: int  # of the loop; 1 is the grid's
    bundles: int
    products: int


def parse(text: str) -> Bundles:
    """Kernels have a tile inside its group first, then parts at an edge, each with products."""
    loop = [s for s in _segments(text) if s.depth > 0]
    with_products = [i for i, s in enumerate(loop) if s.products]
    if len(with_products) < 2:
        raise ValueError(f"expected two pieces with products in the loop, found {with_products}")
    first, second = with_products[0], with_products[1]
    before, after = loop[:first], loop[second + 1 :]
    # pieces without a label of their own follow one that has: a product that is cut is one piece
    middle = loop[first + 1 : second]
    outside = [s.bundles for s in (*before, *middle, *after) if s.depth == 1]
    # zeroing, writing and the rows of no group are long; what every step does is short
    step = sum(size for size in outside if size < 200)
    group = sum(size for size in outside if size >= 200)
    deeper = sum(s.bundles for s in middle if s.depth > 1)
    return Bundles(step, loop[first].bundles + deeper, loop[second].bundles, group)


def _segments(text: str) -> list[_Segment]:
    """Runs of bundles between labels and changes of depth."""
    found: list[list[int]] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        label, depth, body = match[1], len(match[2]), match[3]
        if found and not depth and body.strip() == "}":
            depth = found[-1][0]  # an empty bundle says nothing of its loop
        if not found or label or depth != found[-1][0]:
            found.append([depth, 0, 0])
        found[-1][1] += 1
        found[-1][2] += body.count("vmatmul")
    return [_Segment(*s) for s in found]
