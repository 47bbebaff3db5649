"""Arrays by name: trees as flat dicts and back, read into the shards of a target or to the host.

Orbax casts dtypes and allocates what it is told to; what its files hold is checked first.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.checkpoint import integrity, late
from moe_jax.checkpoint.contents import Contents
from moe_jax.errors import Refused
from moe_jax.placement import plan as plan_lib

STORE = "manifest.ocdbt"  # of the store that holds all arrays of a step
_UNDECODED = ("FAILED_PRECONDITION", "DATA_LOSS", "INVALID_ARGUMENT")  # as tensorstore says it


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


def restore(
    folder: str | os.PathLike,
    contents: Contents,
    target: Mapping[str, Any],
    placement: plan_lib.Placement | None,
) -> dict[str, jax.Array]:
    """Reads the arrays into the shardings of `target`; each process its own part, by itself.

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
    with _reader() as checkpointer, _decoded(folder):
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
    with _reader() as checkpointer, _decoded(folder):
        return checkpointer.restore(
            pathlib.Path(folder).absolute() / "state",
            args=ocp.args.PyTreeRestore(item=names, restore_args=restore_args),
        )


def _reader() -> ocp.Checkpointer:
    """Orbax's, for this process alone: where it fails, no other waits for it."""
    late.silence()
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=options)


@contextlib.contextmanager
def _decoded(folder: str | os.PathLike) -> Iterator[None]:
    """Chunks that tensorstore cannot decode are damage, whatever their digests say."""
    try:
        yield
    except ValueError as error:
        why = " ".join(str(error).split())
        if not why.startswith(_UNDECODED):
            raise
        rule = f"cannot be read ({why[:200]})"
        raise integrity.damaged(pathlib.Path(folder) / "state", rule) from None


def _check_stored(folder: str | os.PathLike, contents: Contents) -> None:
    """What Orbax's files hold is what meta.json says: Orbax would cast, or allocate, silently."""
    path = pathlib.Path(folder).absolute() / "state"
    if not (path / STORE).is_file():  # else names of arrays would be names of folders
        raise integrity.damaged(path / STORE, "is missing")
    if others := sorted(_stored_names(path) ^ contents.arrays.keys()):
        raise integrity.damaged(path, f"and meta.json do not both hold {others[0]!r}")
    with _reader() as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
            stored = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in tree.items()}
        except MemoryError:
            raise
        except Exception as error:  # of every kind, by what is written there
            raise integrity.damaged(path, f"is no data of Orbax ({error})") from None
    claimed = {name: (info.shape, info.dtype) for name, info in contents.arrays.items()}
    for name in sorted(claimed.keys() | stored.keys()):
        if claimed.get(name) != stored.get(name):
            here, there = (_text(of.get(name)) for of in (stored, claimed))
            raise integrity.damaged(path, f"holds {name} as {here}, but meta.json says {there}")
    for name, leaf in tree.items():
        chunk = tuple(leaf.storage.chunk_shape) if leaf.storage else ()
        within = len(chunk) == len(leaf.shape) and all(
            part <= max(size, 1) for part, size in zip(chunk, leaf.shape, strict=True)
        )
        if not within:  # a chunk is allocated whole
            rule = f"holds {name}, of shape {list(leaf.shape)}, in chunks of {list(chunk)}"
            raise integrity.damaged(path, rule)


def _stored_names(path: pathlib.Path) -> set[str]:
    """Arrays that Orbax would look for, before it does."""
    metadata = integrity.read_json(path / "_METADATA")
    try:
        leaves = metadata["tree_metadata"].values()
        return {".".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in leaves}
    except (KeyError, TypeError, AttributeError) as error:
        raise integrity.damaged(path / "_METADATA", f"is not Orbax's ({error!r})") from None


def _text(info: tuple[tuple[int, ...], str] | None) -> str:
    return f"{info[1]}{list(info[0])}" if info else "absent"


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
