"""What train.py and infer.py share: a wrong word on the command line ends in one line, not a trace.

Exit codes: 0 done, 1 refused, 130 interrupted.

The config is a ml_collections config flag: a file with `get_config(arg)`, fields overridden by
--config.group.field=value. Only the reading of the file is ours, so that what is wrong with it, or
with the name of an override, is said before anything else happens.
"""

import contextlib
import difflib
import os
import pathlib
import re
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, no_type_check

import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags

from moe_jax import config as config_lib
from moe_jax import hugepages
from moe_jax.errors import Refused

T = TypeVar("T")
flags.disclaim_key_flags()  # --config is the program's own, and shown by its --help
_INTERRUPTED = 130
_OTHERS_END_SECONDS = 5.0  # after an error that all processes may have
_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}


def required(flag: str, value: T | None) -> T:
    """The value of a flag that must be given."""
    if value is None or value == "":
        raise Refused(flag, value, "is required", f"give {flag}=...; --help explains every flag")
    return value


def check_output(flag: str, path: str | None, *, suffix: str = "") -> None:
    """Refuses a place that could not be written to after the work; makes nothing.

    Args:
      flag: its name, for the message.
      path: a folder to be, or a file to be that ends in `suffix`; None = not asked for.
      suffix: "" = a folder.
    """
    if path is None:
        return
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        rule = "is the address of a store, not a path of this machine"
        raise Refused(flag, path, rule, "mount the store, and name the folder where it appears")
    target = pathlib.Path(path).absolute()
    if suffix and target.suffix != suffix:
        raise Refused(flag, path, f"must end in {suffix}", f"write {path}{suffix}")
    if suffix and target.is_dir():
        raise Refused(flag, path, "is a directory", "name a file")
    if suffix and target.exists() and not target.is_file():
        raise Refused(flag, path, "is no regular file", "name another")
    if target.exists() and not suffix and not target.is_dir():
        raise Refused(flag, path, "is not a directory", "name another one")
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(target if target.is_dir() else above, os.W_OK):
        raise Refused(flag, path, f"cannot be written below {above}", "name another place")


@no_type_check  # absl finds the program among the callers: no wrapper may stand between
def define_config(help_string: str) -> flags.FlagHolder[Any]:
    """The flag --config; its value is a ConfigDict with every override applied."""
    holder = config_flags.DEFINE_config_file("config", help_string=help_string)
    flags.FLAGS["config"].parser = _ConfigParser()
    return holder


def run(main: Callable[[], Any], description: str | None) -> None:
    """Parses the flags and calls `main`; whatever the user can mend is printed and exits with 1.

    Args:
      main: the program.
      description: what --help says above the flags.
    """
    program = pathlib.Path(sys.argv[0]).name
    try:
        if _HELP & set(sys.argv[1:]):
            print(f"{(description or '').strip()}\n{flags.FLAGS.main_module_help()}")
            sys.exit(0)
        _parse(sys.argv)
        hugepages.start_again()
        main()
    except Refused as error:
        print(f"{program}: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error of one of several processes ends all of them; of one process nothing happens here.

    JAX shuts down when all processes want to, and the others may stand where they wait for this
    one: for minutes. So it says why, gives them a few seconds, and ends; they then fail in what
    they stand in.
    """
    try:
        yield
    except BaseException as error:
        ended_well = isinstance(error, SystemExit) and not error.code
        jax = sys.modules.get("jax")
        if ended_well or jax is None or not jax.distributed.is_initialized():
            raise
        code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        program = pathlib.Path(sys.argv[0]).name
        if isinstance(error, Refused | KeyboardInterrupt):
            print(f"{program}: {_one_line(error) or 'interrupted'}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        ending = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        ending.start()
        ending.join(_OTHERS_END_SECONDS)
        if ending.is_alive():
            os._exit(code)
        raise SystemExit(code) from None


def _parse(argv: list[str]) -> None:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, error.flagvalue) from None
    except flags.IllegalFlagValueError as error:
        # absl wraps every ValueError of a parser, hence our own too.
        raise _refused_within(error) or _illegal_value(error) from None
    except config_flags.FlagOrderError as error:
        raise Refused("--config", _one_line(error), "comes first", "move it to the front") from None
    except flags.Error as error:
        raise Refused("command line", _one_line(error), "is not understood", "see --help") from None
    if len(rest) > 1:
        raise Refused("command line", rest[1], "is not a flag", "write --name=value")


def _unknown_flag(name: str, value: Any) -> Refused:
    if name.startswith("config."):
        return Refused("--config", None, f"is required before --{name}", "give --config=FILE first")
    near = difflib.get_close_matches(name, list(flags.FLAGS), n=1)
    fix = f"did you mean --{near[0]}" if near else "--help shows every flag"
    value = str(value).partition("=")[2]  # absl gives the whole argument
    return Refused(f"--{name}", value, "is not a flag", fix)


def _refused_within(error: BaseException | None) -> Refused | None:
    while error is not None and not isinstance(error, Refused):
        error = error.__context__
    return error


def _illegal_value(error: flags.IllegalFlagValueError) -> Refused:
    found = re.match(r"flag --([^=\s]+)=(.*?): (.*)", str(error), re.DOTALL)
    if not found or found[1] not in flags.FLAGS:
        return Refused("command line", _one_line(error), "is not understood", "see --help")
    kind = flags.FLAGS[found[1]].flag_type()
    return Refused(f"--{found[1]}", found[2], f"must be of type {kind}", f"write it as {kind}")


def read_config(path: str) -> ml_collections.ConfigDict:
    """What FILE[:ARG] returns, every field set. Raises `Refused` for a file that is no config."""
    file, *variant = path.split(":", 1)
    if not pathlib.Path(file).is_file():
        near = _near_file(pathlib.Path(file))
        fix = f"did you mean {near}" if near else "give a file with get_config(arg)"
        raise Refused("--config", path, "is not a file", fix)
    try:
        get_config = runpy.run_path(file, run_name="__config__").get("get_config")
        if not callable(get_config):
            raise Refused("--config", path, "has no get_config(arg)", "define it in the file")
        made = get_config(*variant)
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            "--config",
            path,
            f"the file failed with {type(error).__name__}: {_one_line(error)}",
            f"correct {file}, or what follows the ':'",
        ) from None
    if isinstance(made, Mapping):
        made = ml_collections.ConfigDict(made)
    if not isinstance(made, ml_collections.ConfigDict):
        raise Refused(
            "--config",
            path,
            f"get_config(arg) must return a ConfigDict, not {type(made).__name__}",
            "return ml_collections.ConfigDict(...)",
        )
    config_lib.complete(made)
    return made


class _ConfigParser(flags.ArgumentParser):
    """Reads the file; refuses overrides of fields there are not."""

    def parse(self, path: str) -> ml_collections.ConfigDict:
        made = read_config(path)
        for argument in sys.argv[1:]:
            if override := re.match(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL):
                _check_override(made, override[1], override[2])
        return made.lock()


def _check_override(config: Any, field: str, value: str | None) -> None:
    *groups, name = field.split(".")
    group, prefix = config, ""
    for part in [*groups, name]:
        known = list(group) if isinstance(group, ml_collections.ConfigDict) else []
        if part not in known:
            raise config_lib.unknown_field("--config.", prefix, part, value, known)
        group, prefix = group[part], f"{prefix}{part}."
    if isinstance(group, ml_collections.ConfigDict):
        raise Refused(
            f"--config.{field}",
            value,
            "is a group of fields",
            f"give one of {', '.join(f'--config.{field}.{key}' for key in list(group)[:3])}, ...",
        )


def _near_file(path: pathlib.Path) -> str:
    folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
    names = [other.name for other in folder.glob("*.py")]
    near = difflib.get_close_matches(path.name, [*names, *(n[:-3] for n in names)], n=1)
    return str(folder / near[0].removesuffix(".py")) + ".py" if near else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
