"""The newest step that is good; damaged ones are named, and moved aside."""

import os
import pathlib
import time
from collections.abc import Callable

from moe_jax.checkpoint import integrity
from moe_jax.checkpoint.contents import ONLY, Contents, OtherVersion, read_contents
from moe_jax.checkpoint.folders import steps
from moe_jax.errors import Refused


class Search:
    """Steps from the newest down, until one is found to be good."""

    def __init__(
        self,
        directory: pathlib.Path,
        warn: Callable[[str], None],
        *,
        verify: bool = True,
        move_bad: bool = False,
        before: int | None = None,
    ):
        """Args: as `newest_good`."""
        self._directory, self._warn = directory, warn
        self._verify, self._move_bad = verify, move_bad
        self._left = [step for step in steps(directory) if before is None or step < before]
        self._bad: list[tuple[int, str]] = []

    def next(self) -> tuple[pathlib.Path, Contents] | None:
        """The next step down that has all its files, none wrong but maybe a large one.

        None: there are no steps.

        Raises:
          OtherVersion: the next one is of another version: it is not a bad one.
          Refused: there are steps, and all of them are damaged, or all that the run made.
        """
        while self._left:
            folder = self._directory / str(self._left.pop())
            try:
                integrity.check_listed(folder, digests=self._verify)
                contents = read_contents(folder, verify=False)
            except OtherVersion:
                raise
            except Refused as error:
                self.bad(folder, error)
                continue
            if self._bad and self._move_bad and ONLY in contents.extra:
                raise Refused(
                    "checkpoints",
                    str(self._directory),
                    f"every step is damaged but {folder.name}, which the run began with",
                    "restore one, or move them away to begin anew",
                )
            return folder, contents
        if not self._bad:
            return None
        raise Refused(
            "checkpoints",
            str(self._directory),
            "every step is damaged",
            "restore one, or start anew",
        )

    def bad(self, folder: pathlib.Path, error: Refused) -> None:
        """The step that was found is not good."""
        self._warn(f"skipping checkpoint {folder.name}: {error}")
        self._bad.append((int(folder.name), str(error)))

    def good(self) -> None:
        """The step that was found is good: those that were not may go."""
        for step, reason in self._bad if self._move_bad else ():
            self._warn(_move_aside(self._directory, step, reason))


def newest_good(
    directory: str | os.PathLike,
    warn: Callable[[str], None],
    *,
    verify: bool = True,
    move_bad: bool = False,
    before: int | None = None,
    ahead: integrity.Digests | None = None,
) -> tuple[pathlib.Path, Contents] | None:
    """The newest step whose manifest holds, and what it holds; None if there are no steps.

    Each bad one is named to `warn`. (`restored.restore_newest` verifies while it reads.)

    Args:
      directory: of the steps.
      warn: takes a line.
      verify: compare digests; False = names, sizes and structure alone.
      move_bad: move bad steps to directory/bad, so that no later start stumbles over them. Never
        the last one: a run whose steps are all damaged must not start anew without being told.
      before: only look at steps below this number.
      ahead: from `digests_ahead`; used if this step is the one that they are of.

    Raises:
      OtherVersion: the newest that is whole is of another version than this program reads.
      Refused: there are steps, and all of them are damaged; or, with `move_bad`, all that the run
        made, and what it began with is whole.
    """
    search = Search(pathlib.Path(directory), warn, verify=verify, move_bad=move_bad, before=before)
    while found := search.next():
        try:
            if verify:
                integrity.digests(found[0], begun=ahead).check()
        except Refused as error:
            search.bad(found[0], error)
            continue
        search.good()
        return found
    return None


def digests_ahead(
    directory: str | os.PathLike, share: tuple[int, int] = (0, 1)
) -> integrity.Digests | None:
    """The digests of the newest step, computed from now on, beside what has to be done before.

    None if there is no step, or its files are not those that its manifest lists: `restore_newest`
    will name what is wrong. Makes nothing, and says nothing.

    Args:
      directory: of the steps.
      share: number of this process, and how many there are.
    """
    directory = pathlib.Path(directory)
    try:
        newest = directory / str(steps(directory)[-1])
        integrity.check_listed(newest, digests=False)
        cores = os.cpu_count() or 1  # one of them is left to what is done meanwhile
        return integrity.Digests(newest, share, max(1, min(integrity.HASHERS, cores - 1)))
    except (IndexError, OSError, Refused):
        return None


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
