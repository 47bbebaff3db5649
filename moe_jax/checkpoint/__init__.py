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

    contents.py      what a step holds beside its arrays
    arrays.py        arrays by name, read into the shards that are wanted
    integrity.py     a folder whose manifest says what each of its files must be
    folders.py       the steps of a directory, and what a kill leaves there
    newest.py        the newest good step; damaged ones moved aside
    restored.py      the same, read while it is verified, by one process or several
    late.py          no tracebacks of reads and writes that had begun when another failed
    saver.py         a step in the background, whole or absent
    preservation.py  which steps stay
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_jax.checkpoint.contents import ArrayInfo, Contents, describe, read_contents
from moe_jax.checkpoint.folders import clean, remove, steps
from moe_jax.checkpoint.newest import digests_ahead, newest_good

if TYPE_CHECKING:
    from moe_jax.checkpoint.arrays import flatten, restore, restore_numpy, unflatten
    from moe_jax.checkpoint.restored import Restored, restore_newest
    from moe_jax.checkpoint.saver import save, start_save

# What needs JAX and Orbax is imported when it is first named: a start checks its files before.
_LATE = {
    **dict.fromkeys(("flatten", "restore", "restore_numpy", "unflatten"), "arrays"),
    **dict.fromkeys(("Restored", "restore_newest"), "restored"),
    **dict.fromkeys(("save", "start_save"), "saver"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)


__all__ = [
    "ArrayInfo",
    "Contents",
    "Restored",
    "clean",
    "describe",
    "digests_ahead",
    "flatten",
    "newest_good",
    "read_contents",
    "remove",
    "restore",
    "restore_newest",
    "restore_numpy",
    "save",
    "start_save",
    "steps",
    "unflatten",
]
