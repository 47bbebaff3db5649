"""The newest good step, read while its digests are computed, by one process or several.

What was read is given out when every file is known to be the one that was saved; until then it is
only bytes in memory. Each process reads by itself, and verifies its share of the files; they meet
before and after, so that what fails in one of them fails in all, and nobody waits for ever.
"""

import dataclasses
import gc
import os
import pathlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.checkpoint import integrity
from moe_jax.checkpoint.contents import Contents, read_contents
from moe_jax.checkpoint.newest import Search
from moe_jax.errors import Refused

T = TypeVar("T")
NONE, FAILURE = -1, -2  # in place of a step's number
READ, DAMAGED, FAILED = range(3)  # what came of reading, in one process


@dataclasses.dataclass(frozen=True)
class Restored(Generic[T]):
    """A step that is good.

    Attributes:
      contents: what it holds beside its arrays.
      value: what was made of it.
      read_seconds: that making it took.
      waited_seconds: for its digests, after that.
    """

    folder: pathlib.Path
    contents: Contents
    value: T
    read_seconds: float
    waited_seconds: float


def restore_newest(
    directory: str | os.PathLike,
    read: Callable[[pathlib.Path, Contents], T],
    warn: Callable[[str], None],
    *,
    verify: bool = True,
    move_bad: bool = False,
    before: int | None = None,
    ahead: integrity.Digests | None = None,
) -> Restored[T] | None:
    """`newest_good`, with what `read` makes of that step; every process calls this.

    Args:
      directory: of the steps.
      read: makes something of a folder that may yet turn out to be damaged; without collectives.
      warn: takes a line; called in the first process.
      verify, move_bad, before: as for `newest_good`.
      ahead: from `digests_ahead`; used if this step and this process are those that they are of.

    Raises:
      Refused: all steps are damaged, or (with `move_bad`) all that the run made. What `read` raised
        of a step that is not.
    """
    directory = pathlib.Path(directory)
    first = jax.process_index() == 0
    search = Search(directory, warn, verify=verify, move_bad=move_bad, before=before)
    while found := _next(directory, search if first else None):
        folder, contents = found
        started = time.perf_counter()
        value, failure, digests = None, None, None
        try:
            if verify:
                share = (jax.process_index(), jax.process_count())
                digests = integrity.digests(folder, share, begun=ahead)
            contents = contents or read_contents(folder, verify=False)
            value = read(folder, contents)
        except Exception as error:  # of any kind, where files are damaged
            failure = error
        done = time.perf_counter()
        refused = _agreed(folder, digests, failure, verify)
        if refused is None:
            if first:
                search.good()
            seconds = (done - started, time.perf_counter() - done)
            return Restored(folder, cast(Contents, contents), cast(T, value), *seconds)
        if not isinstance(refused, integrity.Damaged):
            raise refused
        if first:
            search.bad(folder, refused)
        del value, failure, refused
        gc.collect()  # what was half read is held in circles, on the devices too
    return None


def _next(
    directory: pathlib.Path, search: Search | None
) -> tuple[pathlib.Path, Contents | None] | None:
    """The step that the first process finds next, for all; its contents in the first alone."""
    step, found, failure = NONE, None, None
    if search:
        try:
            found = search.next()
            step = int(found[0].name) if found else NONE
        except Exception as error:  # of any kind: the others wait for the answer
            step, failure = FAILURE, error
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == FAILURE:
        rule = "have no step that can be read"
        raise failure or Refused("checkpoints", str(directory), rule, "see what process 0 says")
    if step == NONE:
        return None
    return found or (directory / str(step), None)


def _agreed(
    folder: pathlib.Path,
    digests: integrity.Digests | None,
    failure: Exception | None,
    verify: bool,
) -> Exception | None:
    """What is wrong with a step, `Damaged` in all processes or in none; waits for the digests."""
    wrong = digests.first_wrong() if digests else None
    # Nobody has said that these bytes are those that were saved: what cannot read them may say so.
    unreadable = not verify and not isinstance(failure, Refused)
    if isinstance(failure, integrity.Damaged) or (failure and unreadable):
        outcome = DAMAGED
    else:
        outcome = FAILED if failure else READ
    told = np.asarray([[NONE if wrong is None else wrong, outcome]], np.int32)
    if jax.process_count() > 1:
        told = np.asarray(multihost_utils.process_allgather(told[0]))
    wrong_files = told[told[:, 0] != NONE, 0]
    if len(wrong_files):
        number = int(wrong_files.min())
        return digests.refusal(number) if digests else integrity.damaged(folder, "is damaged")
    if DAMAGED in told[:, 1]:
        if isinstance(failure, integrity.Damaged):
            return failure
        why = " ".join(str(failure or "by another process").split())[:200]
        return integrity.damaged(folder, f"cannot be read ({why})")
    if FAILED in told[:, 1]:
        rule = "could not be read by another process"
        return failure or Refused("checkpoint", str(folder), rule, "see what that one says")
    return None
