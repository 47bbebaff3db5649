"""Starts training processes without importing everything anew: a parent that forks itself.

    python tests/faults/zygote.py        then, on stdin, lines {"arguments": [...], "log": FILE}

Each line is answered by the number of a process that runs train.py with these arguments, stdout
and stderr at the end of FILE; when it ends, by its number and exit status (negative: the signal).
No backend is made before the fork, so the processes share nothing.
"""

import json
import os
import pathlib
import runpy
import sys
import threading

import moe_jax.entry
import moe_jax.train.loop
import moe_jax.train.replay  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[2]


def child(arguments: list[str], log: int) -> None:
    """Becomes train.py; never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, said: int, path: str, answer) -> None:
    """Writes down what the process says (what limits its files does not limit this one)."""
    with open(path, "ab", buffering=0) as log:
        while text := os.read(said, 65536):
            log.write(text)
    os.close(said)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answer({"pid": pid, "ended": status})


def main() -> None:
    lock, out = threading.Lock(), os.fdopen(os.dup(1), "w")

    def answer(message: dict[str, int]) -> None:
        with lock:
            print(json.dumps(message), file=out, flush=True)

    for line in sys.stdin:
        wanted = json.loads(line)
        said, log = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(wanted["arguments"], log)
        os.close(log)
        answer({"pid": pid})
        arguments = (pid, said, wanted["log"], answer)
        threading.Thread(target=wait, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
