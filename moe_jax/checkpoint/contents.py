"""What a step holds beside its arrays: meta.json and plan.json."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401 NumPy knows bfloat16 by it
import numpy as np

from moe_jax import files
from moe_jax.checkpoint import integrity
from moe_jax.checkpoint.folders import is_step
from moe_jax.errors import Refused
from moe_jax.placement import plan as plan_lib

FORMAT, VERSION = "moe_jax.checkpoint", 1
ONLY = "only"  # in the `extra` of a step that the run did not make, and cannot make again
NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # of an array: no path, wherever a store looks for it


class OtherVersion(Refused):
    """A step that another version of this program wrote: not damaged, and not for this one."""


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """Shape, dtype name, and the logical name of each dimension ("" where it has none)."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a step holds beside its arrays.

    Attributes:
      step: batches consumed.
      arrays: by name.
      plan: where the experts lie.
      extra: JSON data of the caller (data iterator state, config digest).
    """

    step: int
    arrays: dict[str, ArrayInfo]
    plan: plan_lib.Plan
    extra: dict[str, Any]


def describe(
    arrays: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, ArrayInfo]:
    """`ArrayInfo` of every array."""
    return {
        name: ArrayInfo(tuple(array.shape), str(array.dtype), tuple(axes[name]))
        for name, array in arrays.items()
    }


def write(folder: pathlib.Path, contents: Contents) -> None:
    """Both files. Raises `OSError`."""
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "step": contents.step,
        "plan_digest": contents.plan.digest,
        "arrays": {name: dataclasses.asdict(info) for name, info in contents.arrays.items()},
        "extra": contents.extra,
    }
    with files.atomic_write(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    contents.plan.write(folder / "plan.json")


def read_contents(folder: str | os.PathLike, *, verify: bool = True) -> Contents:
    """Everything but the arrays.

    Args:
      folder: a step directory.
      verify: check the manifest; False where another process has.

    Raises:
      OtherVersion: the step is of another version than this program reads.
      Refused: naming the bad file.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise Refused("checkpoint", str(folder), "is not a directory", "give a step directory")
    if verify:
        integrity.check(folder)
    meta = integrity.read_json(folder / "meta.json")
    try:
        if meta["format"] != FORMAT or type(meta["version"]) is not int:
            raise ValueError(f"format {meta['format']!r}, version {meta['version']!r}")
        if meta["version"] != VERSION:
            raise OtherVersion(
                "checkpoint",
                str(folder),
                f"is of version {meta['version']}, and this program reads version {VERSION}",
                "use the program that wrote it, or move the step away",
            )
        arrays = {_named(name): _array_info(info) for name, info in meta["arrays"].items()}
        step, extra = int(meta["step"]), dict(meta["extra"])
        digest = meta.get("plan_digest")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, Refused):
            raise
        rule = f"is not a checkpoint's ({error!r})"
        raise integrity.damaged(folder / "meta.json", rule) from None
    if is_step(folder.name) and folder.name != str(step):
        raise integrity.damaged(folder / "meta.json", f"is of step {step}")
    plan = plan_lib.Plan.read(folder / "plan.json")
    if digest not in (None, plan.digest):
        rule = "is not the plan that the arrays were saved under"
        raise integrity.damaged(folder / "plan.json", rule)
    _check_plan(folder / "plan.json", plan.placement, arrays)
    return Contents(step, arrays, plan, extra)


def _check_plan(
    path: pathlib.Path, placement: plan_lib.Placement, arrays: Mapping[str, ArrayInfo]
) -> None:
    """Its sizes are those of the arrays, which are compared with the model's when they are read."""
    sizes = {
        "layer": (placement.num_layers, "layers"),
        "expert": (placement.num_slots, "slots"),
        "router": (placement.num_experts, "experts"),
    }
    for name, info in arrays.items():
        if not {"expert", "router"} & set(info.axes):
            continue  # dense layers have no place in a plan
        for axis, size in zip(info.axes, info.shape, strict=True):
            planned, what = sizes.get(axis, (size, ""))
            if size != planned:
                rule = f"has {planned} {what}, and {name} of meta.json {size}"
                raise integrity.damaged(path, rule)


def _named(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"array name {name!r}")
    return name


def _array_info(info: Any) -> ArrayInfo:
    shape, dtype = tuple(info["shape"]), info["dtype"]
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape}")
    if not (isinstance(dtype, str) and dtype.isidentifier()):  # NumPy parses more than names
        raise ValueError(f"dtype {dtype!r}")
    np.dtype(dtype)  # TypeError: none
    axes = tuple(info["axes"])
    if not all(isinstance(axis, str) for axis in axes) or len(axes) not in (0, len(shape)):
        raise ValueError(f"axes {axes}")
    return ArrayInfo(shape, dtype, axes)
