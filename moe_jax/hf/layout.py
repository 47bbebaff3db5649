"""Which tensor of a checkpoint holds which part of which parameter: a family's rows, counted out.

Axes: L layers, P physical experts, E experts; letters of rows as in tables.py.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import checkpoint
from moe_jax.config import ModelConfig
from moe_jax.errors import Refused
from moe_jax.hf import fp8, mxfp4
from moe_jax.hf.folder import Tensors
from moe_jax.hf.pieces import Piece
from moe_jax.hf.tables import Family, Row
from moe_jax.model import transformer
from moe_jax.model.parameter import logical_axes

# Ways to write quantised weights, by `Row.code`.
CODES: Mapping[str, Any] = {"mxfp4": mxfp4, "fp8": fp8}
# Frequencies that old checkpoints hold beside the weights: config.json says them.
_SAID_BY_CONFIG = ".rotary_emb.inv_freq"
# (parameter, layer, logical expert), one layer's, one expert's array; None: it has no such axis
Key = tuple[str, int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of writing a model's checkpoint.

    Attributes:
      name: of the way, as in `Family.layouts`.
      sizes: of each letter, by parameter.
      shapes: of every tensor, in the order of layers.
      beside: tensors of a part of the model that is not run: they are not read, and not written.
      pieces: the tensor that holds each piece of each parameter, and the row that says how; of one
        in codes the beginning of both names. Plain tuples: there are tens of thousands.
      codes: the tensors of quantised weights, and the dtypes that each may have.
    """

    name: str
    sizes: dict[str, dict[str, int]]
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[Key, tuple[str, Row]]
    codes: dict[str, tuple[str, ...]]
    beside: tuple[str, ...] = ()

    def view(self, stored: np.ndarray, row: Row, expert: int | None) -> np.ndarray:
        """The array of a piece as the parameter has it: a view of its tensor, to fill."""
        stored, letters = self._part(stored, row, expert)
        sizes = self.sizes[row.parameter]
        view = stored.reshape([sizes[letter] for letter in letters])
        return view.transpose([letters.index(letter) for letter in row.axes])

    def piece(self, tensors: Tensors, key: Key) -> Piece:
        """Where a piece is, with nothing of it read."""
        name, row = self.pieces[key]
        code = CODES[row.code] if row.code else None
        parts, letters = [], ""
        # Rows of codes ask for a part of a tensor only along axes that have no blocks.
        for end in code.PARTS if code else ("",):
            stored = tensors.codes(name + end) if code else tensors.array(name)
            part, letters = self._part(stored, row, key[2])
            parts.append(part)
        blamed = name if name in self.shapes else f"{name}{mxfp4.SCALES}"
        sizes = [self.sizes[row.parameter][letter] for letter in letters]
        order = [letters.index(letter) for letter in row.axes]
        return Piece(tensors.file_of[blamed], blamed, parts, code, sizes, order)

    def _part(self, stored: np.ndarray, row: Row, expert: int | None) -> tuple[np.ndarray, str]:
        """The part of a tensor that a row speaks of, and the letters of its axes in order."""
        groups = row.stored.split()
        if groups[0] in ("E", "1") and "E" not in row.axes:
            stored, groups = stored[expert or 0], groups[1:]
        for axis, group in enumerate(groups):
            if group[0] == "2":
                width = self.sizes[row.parameter][group[1:]]
                where = slice(row.part * width, (row.part + 1) * width)
            elif group[-1] == "2":
                where = slice(row.part, None, 2)
            else:
                continue
            stored = stored[(slice(None),) * axis + (where,)]
        return stored, "".join(letter for letter in "".join(groups) if letter.isalpha())


def abstract(config: ModelConfig) -> Any:
    """The model's shapes, without an array."""
    return jax.eval_shape(lambda: transformer.Transformer(jax.random.key(0), config))


def of_family(family: Family, name: str, config: ModelConfig) -> Layout:
    """Counts the rows of a family out over layers and experts."""
    model = abstract(config)
    shapes, axes = checkpoint.flatten(model), checkpoint.flatten(logical_axes(model))
    rows = [row for row in family.layouts[name] if row.parameter in shapes]
    named = {row.parameter for row in rows} | set(family.made)
    assert named == set(shapes), (family.model_type, named ^ set(shapes))
    sizes = {
        row.parameter: dict(
            zip(row.axes, shapes[row.parameter].shape[-len(row.axes) :], strict=True)
        )
        for row in rows
    }
    shape_of = {row: _shape(row, {"E": config.num_experts, **sizes[row.parameter]}) for row in rows}
    layout = Layout(name, sizes, {}, {}, {})

    def count_out(of_layer: list[Row], layer: int | None, number: int | None) -> None:
        """`layer` is counted in its stack, `number` in the whole model."""
        for row in of_layer:
            of_expert = "expert" in axes[row.parameter]
            for expert in range(config.num_experts) if of_expert else (None,):
                tensor = row.tensor.format(layer=number, expert=expert)
                if row.code:
                    code = CODES[row.code]
                    parts = code.shapes(shape_of[row])
                    named = {tensor + end: shape for end, shape in parts.items()}
                    layout.codes.update({tensor + end: code.PARTS[end] for end in parts})
                else:
                    named = {tensor: shape_of[row]}
                layout.shapes.update(named)
                layout.pieces[row.parameter, layer, expert] = (tensor, row)

    count_out([row for row in rows if "layer" not in axes[row.parameter]], None, None)
    dense = config.num_dense_layers
    for stack, first, count in (
        ("dense_blocks.", 0, dense),
        ("blocks.", dense, config.num_moe_layers),
    ):
        of_stack = [row for row in rows if row.parameter.startswith(stack)]
        for layer in range(count):
            count_out(of_stack, layer, first + layer)
    return layout


def _shape(row: Row, sizes: dict[str, int]) -> tuple[int, ...]:
    """Of the row's tensor."""

    def size(group: str) -> int:
        return math.prod(int(c) if c.isdigit() else sizes[c] for c in group)

    return tuple(size(group) for group in row.stored.split())


def find(family: Family, config: ModelConfig, tensors: Tensors) -> Layout:
    """The layout of a folder; every tensor is accounted for (frequencies by config.json).

    Raises:
      Refused: tensors that are missing, that nobody knows, or of another shape than config.json
        says, the first three of them by name; or one of a dtype that is not read as a weight; or
        a width that is not whole groups of codes.
    """
    layouts = [of_family(family, name, config) for name in family.layouts]
    layout = max(layouts, key=lambda layout: len(layout.shapes.keys() & tensors.file_of.keys()))
    if layout.name == "mxfp4":
        for key, width in (("hidden_size", config.d_model), ("intermediate_size", config.d_ff)):
            if width % mxfp4.GROUP:
                rule = f"must be a multiple of {mxfp4.GROUP}, the values that share a scale"
                field = f"{tensors.folder / 'config.json'}: {key}"
                raise Refused(field, width, rule, "use the config.json of this checkpoint")
    source = f"{tensors.folder}: tensors"
    there = tensors.file_of.keys()
    if missing := [name for name in layout.shapes if name not in there]:
        rule = f"{_count(missing)} missing from the checkpoint"
        fix = "download all of its files; config.json must be the one that belongs to them"
        raise Refused(source, _first(missing), rule, fix)
    starts = tuple(start.format(layers=config.num_layers) for start in family.beside)
    beside = [name for name in there - layout.shapes.keys() if name.startswith(starts)]
    unknown = there - layout.shapes.keys() - set(beside)
    if surplus := sorted(name for name in unknown if not name.endswith(_SAID_BY_CONFIG)):
        rule = f"{_count(surplus)} not a part of this model ({family.model_type})"
        fix = "config.json must be the one that belongs to it; nothing is left out silently"
        raise Refused(source, _first(surplus), rule, fix)
    wrong = [
        f"{name}: {list(tensors.shape(name))} in the file, {list(shape)} by config.json"
        for name, shape in layout.shapes.items()
        if tensors.shape(name) != shape
    ]
    if wrong:
        rule = f"{_count(wrong)} of another shape"
        raise Refused(source, _first(wrong), rule, "use the config.json of this checkpoint")
    for name in layout.shapes:
        file = tensors.file_of[name]
        dtypes = layout.codes.get(name)
        file.check_codes(name, dtypes) if dtypes else file.check_weight(name)
    return dataclasses.replace(layout, beside=tuple(sorted(beside)))


def _count(names: list[str]) -> str:
    return "1 is" if len(names) == 1 else f"{len(names):,} are"


def _first(names: Iterable[str]) -> str:
    return "; ".join(list(names)[:3])
