"""Checkpoints: Orbax array data with its plan and a manifest, whole or absent.

    STEP/state/          arrays, written by Orbax
    STEP/meta.json       format version, step, every array's shape, dtype and axes, the data state
    STEP/plan.json       the placement the experts lie in
    STEP/integrity.json  size and SHA-256 of every other file

A step is written under a temporary name and renamed when the manifest is inside, so a directory
that is named like a step is complete. Restore checks the manifest, then names, shapes and dtypes
(Orbax casts silently and does not checksum), then the plan's digest. Arrays travel as a flat dict
of names like "model.blocks.moe.gate_PDF".
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement import plan as plan_lib

FORMAT, VERSION = "moe_jax.checkpoint", 1
MANIFEST = "integrity.json"


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


def flatten(tree: Any) -> dict[str, Any]:
    """A pytree as {"path.with.dots": leaf}; NNX parameters appear under their own name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): leaf for path, leaf in leaves}


def unflatten(tree: Any, arrays: Mapping[str, Any]) -> Any:
    """The tree with its leaves replaced by name: inverse of `flatten`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    return jax.tree.unflatten(structure, [arrays[_name(path)] for path, _ in paths])


def _name(path: tuple[Any, ...]) -> str:
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    # An nnx.Param is a node with one child, "value".
    return ".".join(part for part in parts if part != "value")


def steps(directory: str | os.PathLike) -> list[int]:
    """Complete steps in a `checkpoints` directory, ascending."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def newest_good_step(
    directory: str | os.PathLike, warn: Callable[[str], None]
) -> pathlib.Path | None:
    """The newest step whose manifest holds; each bad one is named to `warn`. None if there is none.

    Raises:
      Refused: there are steps, and all of them are damaged.
    """
    directory = pathlib.Path(directory)
    found = steps(directory)
    for step in reversed(found):
        try:
            read_contents(directory / str(step))
        except Refused as error:
            warn(f"skipping checkpoint {step}: {error}")
            continue
        return directory / str(step)
    if found:
        raise Refused(
            "checkpoints", str(directory), "every step is damaged", "restore one, or start anew"
        )
    return None


def save(
    directory: str | os.PathLike,
    arrays: Mapping[str, jax.Array | np.ndarray],
    contents: Contents,
    keep: int | None = None,
) -> pathlib.Path:
    """Writes directory/STEP; every process calls this.

    Args:
      directory: the run's `checkpoints` directory.
      arrays: global arrays (or host arrays, in a single process), by name.
      contents: what goes beside them; `contents.arrays` must describe `arrays`.
      keep: number of newest steps to leave; None = all.
    """
    final = pathlib.Path(directory).absolute() / str(contents.step)
    temporary = final.with_name(f".{final.name}.tmp")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier(f"make {temporary}")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary / "state", dict(arrays))
        checkpointer.wait_until_finished()
    if first:
        _write_meta(temporary, contents)
        contents.plan.write(temporary / "plan.json")
        _write_manifest(temporary)
        _replace(temporary, final)
        for old in steps(directory)[: -keep if keep else 0]:
            shutil.rmtree(final.with_name(str(old)))
    _barrier(f"rename {final}")
    return final


def _replace(temporary: pathlib.Path, final: pathlib.Path) -> None:
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _write_meta(folder: pathlib.Path, contents: Contents) -> None:
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "step": contents.step,
        "arrays": {name: dataclasses.asdict(info) for name, info in contents.arrays.items()},
        "extra": contents.extra,
    }
    with files.atomic_write(folder / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)


def describe(
    arrays: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, ArrayInfo]:
    """`ArrayInfo` of every array."""
    return {
        name: ArrayInfo(tuple(array.shape), str(array.dtype), tuple(axes[name]))
        for name, array in arrays.items()
    }


def read_contents(folder: str | os.PathLike) -> Contents:
    """Everything but the arrays; checks the manifest. Raises `Refused` naming the bad file."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise Refused("checkpoint", str(folder), "is not a directory", "give a step directory")
    _check_manifest(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        known = meta["format"] == FORMAT and meta["version"] == VERSION
        arrays = {
            name: ArrayInfo(tuple(info["shape"]), info["dtype"], tuple(info["axes"]))
            for name, info in meta["arrays"].items()
        }
        step, extra = int(meta["step"]), dict(meta["extra"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder / "meta.json", f"is not a checkpoint's ({error!r})") from None
    if not known:
        raise _damaged(folder / "meta.json", f"must be {FORMAT} version {VERSION}")
    return Contents(step, arrays, plan_lib.Plan.read(folder / "plan.json"), extra)


def restore(
    folder: str | os.PathLike,
    contents: Contents,
    target: Mapping[str, Any],
    placement: plan_lib.Placement | None,
) -> dict[str, jax.Array]:
    """Reads the arrays into the shardings of `target`.

    Args:
      contents: from `read_contents` of the same folder.
      target: `ShapeDtypeStruct`s with shardings, by name; may name fewer arrays than there are.
      placement: what the caller computes with; refused if the experts lie otherwise. None: the
        caller takes `contents.plan` as it is.

    Raises:
      Refused: other arrays than expected (the first three, both shapes), or another placement.
    """
    if placement is not None and placement.digest != contents.plan.digest:
        raise Refused(
            "placement",
            placement.digest[:12],
            f"the checkpoint's experts lie as plan {contents.plan.digest[:12]} says",
            "permute it first: python -m moe_jax.placement apply PLAN CHECKPOINT_IN CHECKPOINT_OUT",
        )
    _check_arrays(contents, target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            pathlib.Path(folder).absolute() / "state",
            args=ocp.args.PyTreeRestore(
                item=dict(target),
                restore_args=ocp.checkpoint_utils.construct_restore_args(dict(target)),
                partial_restore=True,
            ),
        )
    return restored


def restore_numpy(folder: str | os.PathLike, contents: Contents) -> dict[str, np.ndarray]:
    """All arrays of a step on the host."""
    names = dict.fromkeys(contents.arrays, 0)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            pathlib.Path(folder).absolute() / "state",
            args=ocp.args.PyTreeRestore(item=names, restore_args=restore_args),
        )


def _check_arrays(contents: Contents, target: Mapping[str, Any]) -> None:
    wrong = []
    for name, wanted in target.items():
        info = contents.arrays.get(name)
        want = f"{wanted.dtype}{list(wanted.shape)}"
        have = f"{info.dtype}{list(info.shape)}" if info else "absent"
        if have != want:
            wrong.append(f"{name}: {have} in the checkpoint, {want} in the model")
    if wrong:
        raise Refused(
            "checkpoint arrays",
            "; ".join(wrong[:3]),
            f"{len(wrong)} arrays differ from the model's",
            "use the config that the checkpoint was trained with, or another workdir",
        )


def _write_manifest(folder: pathlib.Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": files.sha256_file(path),
        }
        for path in paths
    }
    with files.atomic_write(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)


def _check_manifest(folder: pathlib.Path) -> None:
    """Every file listed, none more, each with its size and digest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / MANIFEST, f"is missing or unreadable ({error})") from None
    present = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    }
    for name in sorted(listed.keys() ^ present.keys()):
        verb = "is missing" if name in listed else "does not belong there"
        raise _damaged(folder / name, verb)
    for name, path in present.items():
        if path.is_symlink() or path.stat().st_size != listed[name][0]:
            raise _damaged(path, f"must be a file of {listed[name][0]} bytes")
        if files.sha256_file(path) != listed[name][1]:
            raise _damaged(path, "has another SHA-256 than integrity.json says")


def _damaged(path: pathlib.Path, rule: str) -> Refused:
    return Refused("checkpoint file", str(path), rule, "use another step, or restore the file")
