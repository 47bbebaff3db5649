"""Checkpoints: Orbax array data with its plan and a manifest, whole or absent.

    STEP/state/          arrays, written by Orbax
    STEP/meta.json       format version, step, every array's shape, dtype and axes, the data state
    STEP/plan.json       the placement the experts lie in
    STEP/integrity.json  size and SHA-256 of every other file
    bad/STEP-TIME/       steps that were found damaged, moved aside, with the reason in why.txt

A step is written under a temporary name and renamed when the manifest is inside, so a directory
that is named like a step is complete. Restore checks the manifest, then names, shapes and dtypes
(Orbax casts silently and does not checksum), then the plan's digest. Arrays travel as a flat dict
of names like "model.blocks.moe.gate_PDF". A directory is untrusted: see integrity.py.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import files, integrity
from moe_jax import saver as saver_lib
from moe_jax.errors import Refused
from moe_jax.placement import plan as plan_lib

FORMAT, VERSION = "moe_jax.checkpoint", 1


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
    names = [path.name for path in directory.iterdir()]
    return sorted(int(name) for name in names if _is_step(name))


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def newest_good(
    directory: str | os.PathLike,
    warn: Callable[[str], None],
    *,
    move_bad: bool = False,
    before: int | None = None,
) -> tuple[pathlib.Path, Contents] | None:
    """The newest step whose manifest holds, and what it holds; None if there are no steps.

    Each bad one is named to `warn`.

    Args:
      move_bad: move bad steps to directory/bad, so that no later start stumbles over them. Never
        the last one: a run whose steps are all damaged must not start anew without being told.
      before: only look at steps below this number.

    Raises:
      Refused: there are steps, and all of them are damaged.
    """
    directory = pathlib.Path(directory)
    found = [step for step in steps(directory) if before is None or step < before]
    bad: list[tuple[int, str]] = []
    for step in reversed(found):
        try:
            contents = read_contents(directory / str(step))
        except Refused as error:
            warn(f"skipping checkpoint {step}: {error}")
            bad.append((step, str(error)))
            continue
        for bad_step, reason in bad if move_bad else ():
            warn(_move_aside(directory, bad_step, reason))
        return directory / str(step), contents
    if found:
        raise Refused(
            "checkpoints", str(directory), "every step is damaged", "restore one, or start anew"
        )
    return None


def newest_good_step(
    directory: str | os.PathLike, warn: Callable[[str], None]
) -> pathlib.Path | None:
    """The folder of `newest_good`."""
    found = newest_good(directory, warn)
    return found[0] if found else None


def _move_aside(directory: pathlib.Path, step: int, reason: str) -> str:
    """Moves a bad step into `bad`; says so."""
    target = directory / "bad" / f"{step}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    try:
        target.parent.mkdir(exist_ok=True)
        (directory / str(step)).rename(target)
        if target.is_dir() and not target.is_symlink():
            (target / "why.txt").write_text(reason + "\n", encoding="utf-8")
    except OSError as error:
        return f"checkpoint {step} stays where it is: {error}"
    return f"moved checkpoint {step} to {target}"


def clean(directory: str | os.PathLike) -> None:
    """Removes what a kill in the middle of a save left; a run calls it before it reads steps.

    A step that was being written again is there under its name, or whole under its old one.
    """
    directory = pathlib.Path(directory)
    for path in directory.glob(".*.old") if directory.is_dir() else ():
        step = path.name[1:].removesuffix(".old")
        if _is_step(step) and not (directory / step).exists():
            path.rename(directory / step)
    for kind in ("tmp", "old", "gone"):
        for path in directory.glob(f".*.{kind}") if directory.is_dir() else ():
            if _is_step(path.name[1:].removesuffix(f".{kind}")) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def save(
    directory: str | os.PathLike,
    arrays: Mapping[str, jax.Array | np.ndarray],
    contents: Contents,
    keep: int | None = None,
) -> pathlib.Path:
    """Writes directory/STEP and returns when it is there; every process calls this.

    Args:
      directory: the run's `checkpoints` directory.
      arrays: global arrays (or host arrays, in a single process), by name.
      contents: what goes beside them; `contents.arrays` must describe `arrays`.
      keep: number of newest steps to leave; None = all.
    """

    def prune(where: pathlib.Path) -> None:
        for step in steps(where)[: -keep if keep else 0]:
            remove(where, step)

    with saver_lib.Saver(pathlib.Path(directory), prune) as saver:
        start_save(saver, arrays, contents)
    return pathlib.Path(directory).absolute() / str(contents.step)


def start_save(
    saver: saver_lib.Saver, arrays: Mapping[str, jax.Array | np.ndarray], contents: Contents
) -> None:
    """`save` in the background: returns when the arrays may change."""

    def finish(folder: pathlib.Path) -> None:
        _write_meta(folder, contents)
        contents.plan.write(folder / "plan.json")

    saver.start(contents.step, arrays, finish)


def remove(directory: str | os.PathLike, step: int) -> None:
    """Removes a step; what is left of it when that is cut short is no step any more."""
    folder = pathlib.Path(directory) / str(step)
    gone = folder.with_name(f".{step}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _write_meta(folder: pathlib.Path, contents: Contents) -> None:
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


def describe(
    arrays: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]
) -> dict[str, ArrayInfo]:
    """`ArrayInfo` of every array."""
    return {
        name: ArrayInfo(tuple(array.shape), str(array.dtype), tuple(axes[name]))
        for name, array in arrays.items()
    }


def read_contents(folder: str | os.PathLike, *, verify: bool = True) -> Contents:
    """Everything but the arrays. Raises `Refused` naming the bad file.

    Args:
      folder: a step directory.
      verify: check the manifest; False where another process has.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise Refused("checkpoint", str(folder), "is not a directory", "give a step directory")
    if verify:
        integrity.check(folder)
    meta = integrity.read_json(folder / "meta.json")
    try:
        known = meta["format"] == FORMAT and meta["version"] == VERSION
        arrays = {name: _array_info(info) for name, info in meta["arrays"].items()}
        step, extra = int(meta["step"]), dict(meta["extra"])
        digest = meta.get("plan_digest")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        rule = f"is not a checkpoint's ({error!r})"
        raise integrity.damaged(folder / "meta.json", rule) from None
    if not known:
        rule = f"must be {FORMAT} version {VERSION}"
        raise integrity.damaged(folder / "meta.json", rule)
    if _is_step(folder.name) and folder.name != str(step):
        raise integrity.damaged(folder / "meta.json", f"is of step {step}")
    plan = plan_lib.Plan.read(folder / "plan.json")
    if digest not in (None, plan.digest):
        rule = "is not the plan that the arrays were saved under"
        raise integrity.damaged(folder / "plan.json", rule)
    return Contents(step, arrays, plan, extra)


def _array_info(info: Any) -> ArrayInfo:
    shape, dtype = tuple(info["shape"]), info["dtype"]
    if not all(type(size) is int and 0 <= size < 2**48 for size in shape) or len(shape) > 32:
        raise ValueError(f"shape {shape}")
    jnp.dtype(dtype)  # TypeError: none
    return ArrayInfo(shape, dtype, tuple(info["axes"]))


def restore(
    folder: str | os.PathLike,
    contents: Contents,
    target: Mapping[str, Any],
    placement: plan_lib.Placement | None,
) -> dict[str, jax.Array]:
    """Reads the arrays into the shardings of `target`.

    Args:
      contents: from `read_contents` of the same folder.
      target: `ShapeDtypeStruct`s with shardings, by name; may leave out groups of arrays
        ("opt_state"), but none of a group that it names.
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
    _check_stored(folder, contents)
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
    """All arrays of a step on the host. Raises `Refused` if they could not fit its memory."""
    _check_stored(folder, contents)
    needed = sum(
        math.prod(info.shape) * jnp.dtype(info.dtype).itemsize for info in contents.arrays.values()
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise Refused(
            "checkpoint",
            str(folder),
            f"has {needed:,} bytes of arrays, this machine {memory:,} of memory",
            "use a larger machine",
        )
    names = dict.fromkeys(contents.arrays, 0)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            pathlib.Path(folder).absolute() / "state",
            args=ocp.args.PyTreeRestore(item=names, restore_args=restore_args),
        )


def _check_stored(folder: str | os.PathLike, contents: Contents) -> None:
    """What Orbax's files hold is what meta.json says: Orbax would cast, or allocate, silently."""
    path = pathlib.Path(folder).absolute() / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise integrity.damaged(path, f"is no data of Orbax ({error})") from None
    stored = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in tree.items()}
    claimed = {name: (info.shape, info.dtype) for name, info in contents.arrays.items()}
    integrity.check_stored(path, claimed, stored)


def _check_arrays(contents: Contents, target: Mapping[str, Any]) -> None:
    groups = {name.partition(".")[0] for name in target}
    extra = [name for name in contents.arrays if name.partition(".")[0] in groups]
    wrong = []
    for name in dict.fromkeys([*target, *extra]):
        wanted, info = target.get(name), contents.arrays.get(name)
        want = f"{wanted.dtype}{list(wanted.shape)}" if wanted is not None else "absent"
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
