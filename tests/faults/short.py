"""Short forms of all faults in two processes, and a SIGTERM of the quickstart, with seconds.

    python -m tests.faults.short        # make faults-short

Goals: 240 s for the short forms together, 10 s from the signal to the end. Both are printed, and
neither is asserted: they are this machine's.
"""

import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from tests.faults import harness

HERE = pathlib.Path(__file__).resolve().parent
FORMS, SIGNAL = 240, 10  # seconds


def term(folder: pathlib.Path) -> tuple[int, float]:
    """(exit code, seconds) of a quickstart that gets a SIGTERM after its third step."""
    workdir, log = folder / "run", folder / "log"
    command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
    with open(log, "wb") as said:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=harness.ROOT, stdout=said, stderr=said
        )
    try:
        metrics = workdir / "metrics.jsonl"
        while not metrics.exists() or harness.last_step(workdir) < 3:
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.05)
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        seconds = time.monotonic() - sent
    finally:
        process.kill()
    if harness.newest_step(workdir) != harness.last_step(workdir):
        raise SystemExit("a step was lost:\n" + log.read_text())
    return code, seconds


def main() -> int:
    """Returns pytest's exit code."""
    started = time.monotonic()
    shown = ["-q", "-rP", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    all_short = ["-m", "not slow and not faults"]  # those of tests/further.txt, too
    # the watchdog's and the processes' are short forms, too
    files = [str(HERE), str(HERE.parent / "train" / "test_watchdog.py")]
    held = subprocess.run(
        [sys.executable, "-m", "pytest", *shown, *all_short, *files], cwd=harness.ROOT, check=False
    ).returncode
    seconds = time.monotonic() - started
    print(f"short forms together: {seconds:.0f} s (goal {FORMS})", flush=True)
    with tempfile.TemporaryDirectory(prefix="moe_jax-term-") as folder:
        code, seconds = term(pathlib.Path(folder))
    print(f"SIGTERM, quickstart: exit code {code} after {seconds:.1f} s (goal {SIGNAL})")
    return held or code


if __name__ == "__main__":
    sys.exit(main())
