"""The newest step that is good; damaged ones are named, and moved aside."""

import os
import pathlib
import time
from collections.abc import Callable

from moe_jax.checkpoint.contents import Contents, read_contents
from moe_jax.checkpoint.folders import steps
from moe_jax.errors import Refused


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
