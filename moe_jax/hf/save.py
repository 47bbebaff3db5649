"""Parameters -> a published model's folder, experts in logical order wherever they live.

The same layout and dtypes as were read give the same bytes for every tensor: float32 holds bfloat16
and float16 exactly, and quantised weights that did not change keep the codes of the folder that is
written like (others are quantised anew: mxfp4.py, fp8.py). A file is written tensor by tensor, each
taken from the devices when its turn comes.

Axes: L layers, E experts, R copies.
"""

import json
import math
import os
import pathlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.hf import folder as folder_lib
from moe_jax.hf import safetensors
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
      Refused: `out` is there and not empty, or `like` is not of the layout's quantised weights.
    """
    out, like = folder_lib.check_new(out), pathlib.Path(like)
    named = {name: dtypes if isinstance(dtypes, str) else dtypes[name] for name in layout.shapes}
    codes = None
    if layout.codes:
        codes = _Codes(layout, folder_lib.tensors(like))
        named |= codes.dtypes
    shards = _shards(layout, named, shard_bytes)
    pieces: dict[str, list[tuple[Key, Row]]] = defaultdict(list)
    for key, (name, row) in layout.pieces.items():
        pieces[name].append((key, row))
    source = _Source(arrays, placement)

    def numbers(name: str, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
        stored = np.empty(shape, dtype or source.array(pieces[name][0][0]).dtype)
        for key, row in pieces[name]:
            layout.view(stored, row, key[2])[...] = source.array(key)
        return stored

    def tensor(name: str) -> np.ndarray:
        if codes and name in layout.codes:
            return codes.array(name, lambda base, shape: numbers(base, shape, None))
        return numbers(name, layout.shapes[name], safetensors.WEIGHTS[named[name]])

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
    """Arrays of pieces on the host, a layer of a parameter at a time."""

    def __init__(self, arrays: Mapping[str, Any], placement: Placement):
        self._arrays = arrays
        self._slot_LE = placement.logical_to_physical_LER[:, :, 0]
        self._layer: int | None = None
        self._at_hand: dict[str, np.ndarray] = {}

    def array(self, key: Key) -> np.ndarray:
        name, layer, expert = key
        if layer is None:
            return np.asarray(self._arrays[name])
        if layer != self._layer:
            self._layer, self._at_hand = layer, {}
        if name not in self._at_hand:
            self._at_hand[name] = np.asarray(self._arrays[name][layer])
        of_layer = self._at_hand[name]
        return of_layer if expert is None else of_layer[self._slot_LE[layer, expert]]


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

    def array(self, name: str, numbers: Callable[[str, tuple[int, ...]], np.ndarray]) -> np.ndarray:
        """One tensor of codes.

        Args:
          numbers: the weight by the beginning of its tensors' names, and its shape.
        """
        if name not in self._at_hand:
            base, row = self._base_of[name]
            code = CODES[row.code]
            before = [self._before.codes(base + end) for end in code.PARTS]
            made = code.encode(numbers(base, code.shape(before[0].shape)), *before)
            self._at_hand = dict(zip((base + end for end in code.PARTS), made, strict=True))
        return self._at_hand[name]


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
