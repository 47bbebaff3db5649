"""The long fault campaign: python -m tests.faults.campaign [TEST...]; its lines go to campaign.log.

Every start adds its date, machine and versions, then one line a fault; `make faults` runs them all,
the short forms of the default tests included: some faults have no other.
"""

import datetime
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
LINE = re.compile(r"^[\w, \-()x.+]+: \d+ faults, \d+ lost, identical (yes|no)$")


def main(arguments: list[str]) -> int:
    import jax
    import orbax.checkpoint as ocp

    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    head = (
        f"{today}, commit {_commit()}, {platform.system()} {platform.machine()}, {_processor()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}, orbax "
        f"{ocp.__version__}"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "", "-p", "no:cacheprovider"]
    started = time.monotonic()
    lines = [head]
    print(head)
    process = subprocess.Popen(
        [*command, *(arguments or [str(HERE)])],
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    for line in process.stdout:
        print(line, end="", flush=True)
        if LINE.match(line.strip()):
            lines.append(f"  {line.strip()}")
    code = process.wait()
    lines.append(
        f"  {'all held' if code == 0 else 'NOT ALL HELD'}, {time.monotonic() - started:.0f} s"
    )
    with open(HERE / "campaign.log", "a", encoding="utf-8") as log:
        log.write("\n".join(lines) + "\n")
    return code


def _commit() -> str:
    """Of the sources that are tried; with a + where something in them is not committed."""
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def _processor() -> str:
    """As Linux names it."""
    about = pathlib.Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown processor"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
