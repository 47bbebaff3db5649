"""Parameters -> a published model's folder, experts in logical order wherever they live.

The same layout and dtypes as were read give the same bytes for every tensor: float32 holds bfloat16
and float16 exactly, and quantised weights that did not change keep the codes of the folder that is
written like (others are quantised anew: mxfp4.py, fp8.py). A file is written tensor by tensor, each
taken from the devices an expert at a time when its turn comes: what is held beside the parameters
is the tensor that is written, and one expert's array of it.

Axes: L layers, E experts, R copies.
"""

import json
import math
import os
import pathlib
import shutil
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.hf import folder as folder_lib
from moe_jax.hf import pieces, safetensors
from moe_jax.hf.layout import CODES, Key, Layout
from moe_jax.hf.tables import Row
from moe_jax.placement.plan import Placement

SHARD_BYTES = 5_000_000_000  # of a file, at most, unless one tensor is larger
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer


def export(
    arrays: Mapping[str, Any],
    layout: Layout,
    placement: Placement,
    out: str | os.PathLike,
    *,
    dtypes: Mapping[str, str] | str,
    like: str | os.PathLike,
    shard_bytes: int = SHARD_BYTES,
) -> list[pathlib.Path]:
    """Writes a folder that reads back as the same model. For one process.

    Args:
      arrays: parameters by their path in the model (`checkpoint.flatten`), on devices or the host.
      layout: of the names to write (`layout.of_family`, or the one that was read).
      placement: where the model's experts lie; of copies the first is written.
      out: a folder that is not there, or is empty; it appears whole, or not at all.
      dtypes: of every tensor, or one for all: a name in `safetensors.WEIGHTS`. Those of codes are
        as in `like`.
      like: the folder of the published model: its config.json and tokenizer are copied, and the
        codes of weights that are what they were there.
      shard_bytes: of arrays in one file, at most.

    Returns:
      The safetensors files.

    Raises:
      Refused: `out` is there and not empty, `like` is not of the layout's quantised weights, or a
        value is NaN, infinite, or beyond its tensor's dtype: nothing would read it back.
    """
    out, like = folder_lib.check_new(out), pathlib.Path(like)
    named = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in layout.shapes}
    codes = None
    if layout.codes:
        codes = _Codes(layout, folder_lib.tensors(like))
        named |= codes.dtypes
    shards = _shards(layout, named, shard_bytes)
    source = _Source(arrays, layout, placement)

    def tensor(name: str) -> np.ndarray:
        if codes and name in layout.codes:
            return codes.array(name, source)
        stored = np.empty(layout.shapes[name], safetensors.WEIGHTS[named[name]])
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            source.fill(stored, name)
        _check_finite(stored, name, named[name])
        return stored

    written = []
    with folder_lib.new(out) as made:
        for number, names in enumerate(shards):
            single = len(shards) == 1
            file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            written.append(folder_lib.SINGLE if single else file)
            listed = {name: (named[name], layout.shapes[name]) for name in names}
            safetensors.write(made / written[-1], listed, tensor)
        if len(shards) > 1:
            _write_index(made, layout, named, shards, written)
        for pattern in _BESIDE:
            for path in like.glob(pattern):
                if path.name != folder_lib.INDEX:
                    shutil.copyfile(path, made / path.name)
    return [out / file for file in written]


class _Source:
    """The numbers of tensors, an array of one layer and one expert at a time on the host."""

    def __init__(self, arrays: Mapping[str, Any], layout: Layout, placement: Placement):
        self._arrays, self._layout = arrays, layout
        self._slot_LE = placement.logical_to_physical_LER[:, :, 0]
        self._pieces: dict[str, list[tuple[Key, Row]]] = defaultdict(list)
        for key, (name, row) in layout.pieces.items():
            self._pieces[name].append((key, row))

    def fill(self, stored: np.ndarray, name: str) -> None:
        """A whole tensor."""
        for key, row in self._pieces[name]:
            self._put(key, self._layout.view(stored, row, key[2]))

    def parts(self, name: str) -> list[int | None]:
        """What `values` is asked for: the experts of a tensor that has several, or None = all."""
        experts = dict.fromkeys(key[2] for key, _ in self._pieces[name])
        return list(experts) if len(experts) > 1 else [None]

    def values(self, name: str, shape: tuple[int, ...], expert: int | None) -> np.ndarray:
        """A tensor, or that part of it, [1, ...], which is one expert's; dtype of the parameter."""
        of_part = [piece for piece in self._pieces[name] if expert in (None, piece[0][2])]
        stored = np.empty(shape, self._arrays[of_part[0][0][0]].dtype)
        for key, row in of_part:
            where = key[2] if expert is None else 0
            self._put(key, self._layout.view(stored, row, where))
        return stored

    def _put(self, key: Key, target: np.ndarray) -> None:
        name, layer, expert = key
        index: tuple[int, ...] = () if layer is None else (layer,)
        if layer is not None and expert is not None:
            index = (layer, int(self._slot_LE[layer, expert]))
        _copy(self._arrays[name], index, target)


def _copy(array: Any, index: tuple[int, ...], target: np.ndarray) -> None:
    """target[...] = array[index], bit for bit.

    Each device cuts its own part: an index into an array that is split over devices becomes a sum
    of what they have, in which -0 + 0 = 0.
    """
    if not isinstance(array, jax.Array):
        target[...] = array[index]
        return
    for shard in array.addressable_shards:
        ranges = [
            range(*part.indices(size)) for part, size in zip(shard.index, array.shape, strict=True)
        ]
        if shard.replica_id == 0 and all(map(range.__contains__, ranges, index)):
            local = tuple(map(range.index, ranges, index))
            target[shard.index[len(index) :]] = shard.data[local] if local else shard.data


class _Codes:
    """Quantised weights: those of a folder, where they still mean what the model holds."""

    def __init__(self, layout: Layout, before: folder_lib.Tensors):
        if missing := [name for name in layout.codes if name not in before.file_of]:
            rule = "must hold the quantised weights that are written like"
            fix = "export like the folder that was read"
            raise Refused("--like", f"{before.folder} without {missing[0]}", rule, fix)
        self._before = before
        self.dtypes = {name: before.dtype(name) for name in layout.codes}
        self._base_of = {
            name + end: (name, row)
            for name, row in layout.pieces.values()
            if row.code
            for end in CODES[row.code].PARTS
        }
        self._at_hand: dict[str, np.ndarray] = {}

    def array(self, name: str, source: _Source) -> np.ndarray:
        """One tensor of codes; those of the same weight are made together."""
        if name not in self._at_hand:
            self._at_hand = {}  # those before are written
            base, row = self._base_of[name]
            self._at_hand = self._made(base, CODES[row.code], source)
        return self._at_hand.pop(name)

    def _made(self, base: str, code: Any, source: _Source) -> dict[str, np.ndarray]:
        """All tensors of a weight, coded expert by expert where it has several."""
        mapped = {base + end: self._before.codes(base + end) for end in code.PARTS}
        made = {name: np.empty(view.shape, view.dtype) for name, view in mapped.items()}
        for expert in source.parts(base):
            rows = slice(None) if expert is None else slice(expert, expert + 1)
            # Read, not touched where it is mapped: a page that was touched stays in memory.
            before = [
                pieces.fetch(self._before.file_of[name], view[rows])
                for name, view in mapped.items()
            ]
            values = source.values(base, code.shape(before[0].shape), expert)
            _check_finite(values, base, str(values.dtype))
            for name, codes in zip(made, code.encode(values, *before), strict=True):
                made[name][rows] = codes
        return made


def _check_finite(values: np.ndarray, name: str, dtype: str) -> None:
    """A block at a time: what tells which are finite takes memory, too."""
    for rows in pieces.blocks(len(values), values.nbytes // max(len(values), 1)):
        if not pieces.finite(values[rows]):
            rule = f"would hold NaN or infinity in {dtype}, which no folder is read with"
            fix = "write a step before it, or like a folder of a wider dtype"
            raise Refused(name, "NaN or inf", rule, fix)


def _bytes(layout: Layout, dtypes: Mapping[str, str], name: str) -> int:
    return math.prod(layout.shapes[name]) * safetensors.BITS[dtypes[name]] // 8


def _shards(layout: Layout, dtypes: Mapping[str, str], shard_bytes: int) -> list[list[str]]:
    """Names of each file's tensors, in the order of layers."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in layout.shapes:
        size = _bytes(layout, dtypes, name)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_index(
    out: pathlib.Path,
    layout: Layout,
    dtypes: Mapping[str, str],
    shards: list[list[str]],
    written: list[str],
) -> None:
    index = {
        "metadata": {"total_size": sum(_bytes(layout, dtypes, name) for name in layout.shapes)},
        "weight_map": {
            name: file for names, file in zip(shards, written, strict=True) for name in names
        },
    }
    with files.atomic_write(out / folder_lib.INDEX, "w") as file:
        json.dump(index, file, indent=1)
