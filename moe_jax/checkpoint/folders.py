"""The steps of a `checkpoints` directory, and what a kill leaves of those that are not there."""

import os
import pathlib
import shutil


def steps(directory: str | os.PathLike) -> list[int]:
    """Complete steps in a `checkpoints` directory, ascending."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted(int(name) for name in names if is_step(name))


def is_step(name: str) -> bool:
    """Whether a folder of this name is a complete step: "3", but not "03", nor digits elsewhere."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def clean(directory: str | os.PathLike) -> None:
    """Removes what a kill in the middle of a save left; a run calls it before it reads steps.

    A step that was being written again is there under its name, or whole under its old one.
    """
    directory = pathlib.Path(directory)
    for path in directory.glob(".*.old") if directory.is_dir() else ():
        step = path.name[1:].removesuffix(".old")
        if is_step(step) and not (directory / step).exists():
            path.rename(directory / step)
    for kind in ("tmp", "old", "gone"):
        for path in directory.glob(f".*.{kind}") if directory.is_dir() else ():
            if is_step(path.name[1:].removesuffix(f".{kind}")) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def remove(directory: str | os.PathLike, step: int) -> None:
    """Removes a step; what is left of it when that is cut short is no step any more."""
    folder = pathlib.Path(directory) / str(step)
    gone = folder.with_name(f".{step}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    # What a reader holds open on a network file system goes at the next start (`clean`).
    shutil.rmtree(gone, ignore_errors=True)
