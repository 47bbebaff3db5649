"""What train.py and infer.py share: a wrong word on the command line ends in one line, not a trace.

Exit codes: 0 done, 1 refused, 130 interrupted.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from moe_jax.errors import Refused

T = TypeVar("T")


def required(flag: str, value: T | None) -> T:
    """The value of a flag that must be given."""
    if value is None:
        raise Refused(flag, None, "is required", f"give {flag}=...; --help explains every flag")
    return value


def run(main: Callable[[list[str]], Any], app: Any) -> None:
    """Parses the flags and calls `main`; whatever the user can mend is printed and exits with 1."""
    from absl import flags

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = app.parse_flags_with_usage(argv)
        except flags.Error as error:
            raise Refused("command line", str(error), "is not understood", "see --help") from None
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            # config_flags loads the file and applies the overrides while it parses.
            raise Refused("--config", _one_line(error), "cannot be used", "correct it") from None
        if len(rest) > 1:
            raise Refused("command line", rest[1], "is not a flag", "write --name=value")
        return rest

    try:
        argv = parse(sys.argv)
        main(argv)
    except Refused as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
