"""Moves experts from one placement to another: parameters, optimizer state, checkpoints.

A model that knows nothing of plans holds its experts in slots [P] on the dimension named "expert".
Going from one placement to another is, per layer, a gather along that dimension, and the same
gather for everything shaped like the parameters. Values are copied, never computed with, so going
and coming back restores every bit; the logical -> physical table changes with them.
"""

import functools
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint
from moe_jax import config as config_lib
from moe_jax.checkpoint.folders import is_step
from moe_jax.errors import Refused
from moe_jax.model import parameter
from moe_jax.model.dispatch.table import Table
from moe_jax.placement import plan as plan_lib
from moe_jax.placement.plan import Placement


def table(placement: Placement) -> Table:
    """The argument through which a plan reaches a model, stacked over layers."""
    slot_LER, share_LNP = placement.logical_to_physical_LER, placement.share_LNP
    end_LXER = None
    if share_LNP is not None:
        share_LXER = np.stack(
            [
                np.where(slot_ER < 0, 0, share_XP[:, slot_ER])
                for slot_ER, share_XP in zip(slot_LER, share_LNP, strict=True)
            ]
        )
        end_LXER = share_LXER.cumsum(axis=3, dtype=np.int32)
    return Table(slot_LER.copy(), placement.num_replicas_LE.copy(), end_LXER)


def source_slots(old: Placement, new: Placement) -> np.ndarray:
    """int32 [L, P_new]: the slot of `old` whose expert belongs into each slot of `new`.

    A copy on the same device is taken where there is one, else the first.
    """
    same = (old.num_layers, old.num_experts) == (new.num_layers, new.num_experts)
    if not same:
        raise Refused(
            "placement",
            f"{new.num_layers} layers x {new.num_experts} experts",
            f"the experts lie in {old.num_layers} layers x {old.num_experts} experts",
            "use a plan of this model",
        )
    source_LP = np.empty(new.physical_to_logical_LP.shape, np.int32)
    for layer, expert_P in enumerate(new.physical_to_logical_LP):
        copies_PR = old.logical_to_physical_LER[layer][expert_P]
        device_P1 = (np.arange(new.num_slots) // new.slots_per_device)[:, None]
        here_PR = (copies_PR // old.slots_per_device == device_P1) & (copies_PR >= 0)
        best_P = np.where(here_PR.any(1), here_PR.argmax(1), 0)
        source_LP[layer] = np.take_along_axis(copies_PR, best_P[:, None], axis=1)[:, 0]
    return source_LP


def apply(tree: Any, old: Placement, new: Placement) -> Any:
    """The tree with its experts moved from `old` to `new`, in the shardings it had.

    Args:
      tree: a model, or anything with arrays shaped like its parameters (optimizer state).
    """
    source_LP = source_slots(old, new)
    axes = jax.tree.leaves(parameter.logical_axes(tree))
    leaves, structure = jax.tree.flatten(tree)
    moved = [i for i, names in enumerate(axes) if "expert" in names]
    assert all(axes[i][:2] == ("layer", "expert") for i in moved), axes

    experts = [leaves[i] for i in moved]
    gather = _gather(tuple(array.sharding for array in experts))
    for i, array in zip(moved, gather(experts, source_LP), strict=True):
        leaves[i] = array
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _gather(shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    """Compiled once per model and mesh, whatever the placements."""

    def gather(arrays, source_LP):
        rows = jnp.arange(len(source_LP))[:, None]
        return [array[rows, source_LP] for array in arrays]

    return jax.jit(gather, out_shardings=list(shardings))


def apply_to_arrays(
    arrays: Mapping[str, np.ndarray],
    infos: Mapping[str, checkpoint.ArrayInfo],
    old: Placement,
    new: Placement,
) -> dict[str, np.ndarray]:
    """`apply` for named host arrays."""
    source_LP = source_slots(old, new)
    rows = np.arange(len(source_LP))[:, None]
    return {
        name: array[rows, source_LP] if "expert" in infos[name].axes else array
        for name, array in arrays.items()
    }


def apply_to_checkpoint(
    plan_path: str | os.PathLike,
    checkpoint_in: str | os.PathLike,
    checkpoint_out: str | os.PathLike,
) -> str:
    """Writes a checkpoint with its experts where the plan says; the input stays as it is.

    Args:
      plan_path: the plan to apply.
      checkpoint_in: a step directory, or a work directory (its newest step is taken).
      checkpoint_out: what to make: a step directory, or a work directory if the input was one. A
        run goes on there: it has the config and the tokenizer of the old one. A step that is named
        by a number has its own.

    Returns:
      A sentence for people: what was moved.

    Raises:
      Refused: a plan of another model, an output that is there or cannot be written, a damaged
        step, a run whose config or tokenizer cannot come along; nothing is left of the output.
    """
    plan = plan_lib.Plan.read(plan_path)
    source, workdir = _step_folder(pathlib.Path(checkpoint_in))
    target = pathlib.Path(checkpoint_out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refused("CHECKPOINT_OUT", str(target), "exists already", "name a new directory")
    beside = _beside(workdir, target) if workdir else []
    contents = checkpoint.read_contents(source)
    if not workdir and is_step(target.name) and target.name != str(contents.step):
        rule = f"is named like step {target.name}, and {source} is step {contents.step}"
        fix = f"name {target.with_name(str(contents.step))}"
        raise Refused("CHECKPOINT_OUT", str(target), rule, fix)
    old = contents.plan.placement
    plan_lib.check_fits(
        plan,
        num_layers=old.num_layers,
        num_experts=old.num_experts,
        num_devices=plan.placement.num_devices,
    )
    plan = plan_lib.of_model(plan, _layer_ids(contents))
    arrays = checkpoint.restore_numpy(source, contents)
    moved = apply_to_arrays(arrays, contents.arrays, old, plan.placement)
    infos = checkpoint.describe(moved, {name: info.axes for name, info in contents.arrays.items()})
    new_contents = checkpoint.Contents(contents.step, infos, plan, contents.extra)
    try:
        if workdir:
            written = _write_run(target, moved, new_contents, workdir, beside)
        else:
            written = _write_step(target, moved, new_contents)
    except OSError as error:
        rule, fix = f"could not be written ({error})", "make room or name another place"
        raise Refused("CHECKPOINT_OUT", str(target), rule, fix) from None
    changed = int((source_slots(old, plan.placement) != np.arange(plan.placement.num_slots)).sum())
    return (
        f"{written}: {changed} of {plan.placement.num_layers * plan.placement.num_slots} expert "
        f"slots changed, in {sum('expert' in i.axes for i in infos.values())} arrays; "
        f"plan {old.digest[:12]} -> {plan.digest[:12]}"
    )


def _layer_ids(contents: checkpoint.Contents) -> range:
    """The model's numbers of its MoE layers: they follow the dense ones, if there are any."""
    stacks = [
        info.shape[0]
        for name, info in contents.arrays.items()
        if name.startswith("model.dense_blocks.") and info.axes[:1] == ("layer",)
    ]
    first = max(stacks, default=0)
    return range(first, first + contents.plan.placement.num_layers)


def _write_step(
    target: pathlib.Path, arrays: Mapping[str, np.ndarray], contents: checkpoint.Contents
) -> pathlib.Path:
    """A step of any name, whole or absent."""
    half = target.with_name(f".{target.name}.step")
    shutil.rmtree(half, ignore_errors=True)  # what a kill left
    try:
        return checkpoint.save(half, arrays, contents).rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _write_run(
    target: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    contents: checkpoint.Contents,
    workdir: pathlib.Path,
    beside: list[pathlib.Path],
) -> pathlib.Path:
    """A work directory of one step, with files of the one that it was read from. The step."""
    try:
        written = checkpoint.save(target / "checkpoints", arrays, contents)
        for path in beside:
            copied = target / path.relative_to(workdir)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return written


def _beside(workdir: pathlib.Path, target: pathlib.Path) -> list[pathlib.Path]:
    """The files of a work directory, beside its checkpoints, that a run in `target` needs.

    Raises:
      Refused: config.json cannot be read, or the tokenizer it names is not there or stays behind.
    """
    config_json = workdir / "config.json"
    if not config_json.is_file():
        raise Refused(
            "CHECKPOINT_IN",
            str(workdir),
            "is a work directory without a config.json",
            "restore the file, or name one of its steps: checkpoints/STEP",
        )
    found = [config_json]
    if (workdir / "config.py").is_file():
        found.append(workdir / "config.py")
    name = config_lib.read(config_json).data.tokenizer
    if not name or pathlib.Path(name).is_absolute():
        return found
    if ".." not in pathlib.Path(name).parts:
        files = sorted(path for path in (workdir / name).glob("*") if path.is_file())
        if not files:
            rule = f"is the run's tokenizer, and there is none in {workdir / name}"
            raise Refused("data.tokenizer", name, rule, "restore it")
        return found + files
    if (workdir / name).resolve() != (target / name).resolve():
        raise Refused(
            "data.tokenizer",
            name,
            f"lies beside {workdir}, and not beside {target}",
            "name a CHECKPOINT_OUT in the folder of CHECKPOINT_IN",
        )
    return found


def _step_folder(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
    """(step directory, the work directory it was named by or None)."""
    if (path / "meta.json").exists():
        return path, None
    found = checkpoint.steps(path / "checkpoints")
    if not found:
        raise Refused(
            "CHECKPOINT_IN",
            str(path),
            "must be a step directory or a work directory with checkpoints/STEP",
            "train first: python train.py --config=... --workdir=...",
        )
    return path / "checkpoints" / str(found[-1]), path
