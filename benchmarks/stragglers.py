"""Is what is slow found in a real run, and named rightly? Hosts and links are slowed, one by one.

    python benchmarks/stragglers.py [--hosts=4 --mbit=200 --times=3]

A small model trains on hosts with limited links inside this machine (`train.py --distributed`, a
process a host), `train.probe_every=1`. First nothing is slow and every word is a false alarm; then
a host computes, receives or sends slowly, or one link is slow, each for a while. The table says
what the run said of it, after how many probes, and when it said that it was over. Needs root.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.box import links
from benchmarks.box.hosts import PORT, Failed
from moe_jax import metrics
from moe_jax.errors import Refused

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAID = re.compile(r"^step (\d+): (.+ slow.*|.+: [\d.]+ x)$", re.MULTILINE)
OVER = "nobody is slow any more"
TURN_SECONDS = 0.02  # of a host that gets a part of each
MOST_PROBES = 60  # until something has to be said
AFTER_PROBES = 10  # that it goes on, and that nothing else is said
START_SECONDS = 300.0
MODEL = {
    **{"model.num_layers": 1, "model.d_model": 16, "model.d_ff": 16, "data.seq_len": 16},
    **{"data.global_batch": 8, "data.max_bytes": 100_000, "train.eval_sequences": 8},
    **{"train.eval_every": 10**6, "train.log_every": 10**6, "train.checkpoint_every": 10**6},
    **{"train.num_steps": 10**6, "train.probe_every": 1, "virtual_devices": 1, "mesh.data": 1},
}


class Run:
    """A training run, one process a host; a context manager."""

    def __init__(self, network: links.Network, folder: pathlib.Path):
        self._workdir, self._log = folder / "run", folder / "h0.log"
        hosts = network.hosts
        fields = {**MODEL, "mesh.expert": len(hosts), "model.num_experts": 2 * len(hosts)}
        words = [
            *(sys.executable, str(ROOT / "train.py"), "--config=configs/quickstart.py:smoke"),
            *(f"--workdir={self._workdir}", *(f"--config.{k}={v}" for k, v in fields.items())),
        ]
        self._processes = []
        cores = sorted(os.sched_getaffinity(0))
        self._hosts_per_core = max(1, len(hosts) / len(cores))
        for number, host in enumerate(hosts):
            to = f"--distributed={hosts[0].name}:{PORT},{len(hosts)},{number}"
            with open(folder / f"h{number}.log", "wb") as said:
                self._processes.append(
                    subprocess.Popen(
                        host.command("taskset", "-c", str(cores[number % len(cores)]), *words, to),
                        cwd=ROOT,
                        env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
                        stdout=said,
                        stderr=said,
                        start_new_session=True,
                    )
                )

    def step(self) -> int:
        """The last one of the metrics: as many probes there were."""
        if any(process.poll() is not None for process in self._processes):
            raise Failed(f"a host ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        found = metrics.read(self._workdir / "metrics.jsonl")[1]
        return found[-1]["step"] if found else 0

    def said(self, after: int) -> list[tuple[int, str]]:
        """(step, words) that the run has said of slow hosts and links in later steps."""
        found = SAID.findall(self._log.read_text(errors="replace"))
        return [(int(step), words) for step, words in found if int(step) > after]

    def seconds(self, name: str) -> list[float]:
        """Of every host, in the last step."""
        row = metrics.read(self._workdir / "metrics.jsonl")[1][-1]
        return [row[f"host_{p}_{name}_seconds"] for p in range(len(self._processes))]

    def wait(self, until: Callable[[], bool], seconds: float = 3600.0) -> None:
        """Raises `Failed` if a process ends first."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise Failed(f"no step:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    @contextlib.contextmanager
    def slowed(self, host: int, times: float) -> Iterator[None]:
        """A host that runs for a part of every turn only, like one that others use too."""
        process, over = self._processes[host], threading.Event()
        part = 1 / times / self._hosts_per_core  # what it leaves is taken by those on its core

        def take_turns() -> None:
            while not over.is_set():
                process.send_signal(signal.SIGSTOP)
                time.sleep(TURN_SECONDS * (1 - part))
                process.send_signal(signal.SIGCONT)
                time.sleep(TURN_SECONDS * part)

        taking = threading.Thread(target=take_turns)
        taking.start()
        try:
            yield
        finally:
            over.set()
            taking.join()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


@contextlib.contextmanager
def limited(network: links.Network, mbit: float, limit: Callable[[], None]) -> Iterator[None]:
    """Some limit; afterwards all links are as before."""
    limit()
    try:
        yield
    finally:
        network.limit(mbit)


def faults(
    network: links.Network, run: Run, mbit: float, times: float
) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
    """(what the run should say of it, the fault while it is entered)."""
    slow, hosts = mbit / times, len(network.hosts)
    made: list[tuple[str, contextlib.AbstractContextManager[None]]] = []
    for host in (0, hosts - 1):
        made.append((f"host {host} computes slowly", run.slowed(host, times)))
    if hosts > 2:  # of two hosts, a link and an end are one
        for kind, limit in (
            ("receives", network.limit_receiving),
            ("sends", network.limit_sending),
        ):
            for host in (0, hosts - 2):
                fault = limited(network, mbit, functools.partial(limit, host, slow))
                made.append((f"host {host} {kind} slowly", fault))
    for a, b in ((0, 1), (hosts - 1, hosts // 2 - 1)):
        fault = limited(network, mbit, functools.partial(network.limit_link, a, b, slow, mbit))
        made.append((f"the link from host {a} to {b}", fault))
    return made


def watched(run: Run, fault: contextlib.AbstractContextManager[None]) -> tuple[list[str], str, str]:
    """(all that was said while it lasted, probes until the first word, and until it was over)."""
    began = max([run.step(), *(step for step, _ in run.said(0))])  # metrics come a step late
    with fault:
        run.wait(lambda: bool(run.said(began)) or run.step() > began + MOST_PROBES)
        until = run.step() + AFTER_PROBES
        run.wait(lambda: run.step() > until)
        heard = run.said(began)
    ended = run.step()
    words = [words for _, words in heard]
    if not heard:
        return words, "-", "-"
    over = lambda: [step for step, said in run.said(ended) if said == OVER]  # noqa: E731
    run.wait(lambda: bool(over()) or run.step() > ended + MOST_PROBES)
    probes_over = str(over()[0] - ended) if over() else f"not in {MOST_PROBES}"
    return words, str(heard[0][0] - began), probes_over


def named(words: str) -> set[str]:
    """What is slow, without how slow."""
    return {part.rpartition(":")[0] for part in words.split("; ")}


def measure(hosts: int, mbit: float, times: float, quiet: int, folder: pathlib.Path) -> list[str]:
    """The lines of the report."""
    with links.Network(hosts) as network, Run(network, folder) as run:
        network.limit(mbit)
        run.wait(lambda: run.step() > 5, START_SECONDS)
        began = run.step()
        metrics.say(f"nothing is slow: {quiet} probes")
        run.wait(lambda: run.step() > began + quiet)
        alarms = [words for _, words in run.said(0) if words != OVER]
        lines = [
            f"{hosts} hosts, links of {mbit:g} Mbit/s, slowed {times:g} times; "
            f"{os.cpu_count()} cores",
            "a matmul {:.2f} to {:.2f} ms, a message {:.1f} to {:.1f} ms, where nothing is slow"
            "".format(
                *(1e3 * f(run.seconds(n)) for n in ("matmul", "message") for f in (min, max))
            ),
            f"nothing slow, {quiet} probes: {len(alarms)} alarms {'; '.join(alarms)}".rstrip(),
            "",
            f"{'slowed':32} {'named':>6} {'after':>7} {'over':>10}  last said",
        ]
        right = 0
        made = faults(network, run, mbit, times)
        for number, (expected, fault) in enumerate(made):
            metrics.say(f"{number + 1} of {len(made)}: {expected}")
            words, after, over = watched(run, fault)
            last = words[-1] if words else "nothing"
            held = named(last) == {expected}
            right += held
            lines.append(
                f"{expected:32} {'yes' if held else 'NO':>6} {after:>7} {over:>10}  {last}"
            )
        lines.append(f"{right} of {len(made)} named, and nothing else with them")
    return lines


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--hosts", type=int, default=4)
    flags.add_argument("--mbit", type=float, default=200.0, help="10^6 bits per second of a link")
    flags.add_argument("--times", type=float, default=3.0, help="as slow as before")
    flags.add_argument("--quiet", type=int, default=200, help="probes with nothing slow")
    return flags


def check(flags: argparse.Namespace) -> None:
    """Raises `Refused`."""
    for flag, value, least in (
        *(("--hosts", flags.hosts, 2), ("--mbit", flags.mbit, 1)),
        *(("--times", flags.times, 1.1), ("--quiet", flags.quiet, 1)),
    ):
        if not value >= least:
            raise Refused(flag, value, f"must be at least {least}", f"use {least} or more")


def main(words: Sequence[str] | None = None) -> int:
    flags = parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check(flags)
        links.check_machine()
        with tempfile.TemporaryDirectory(prefix="moe_jax-box-") as folder:
            sizes = (flags.hosts, flags.mbit, flags.times, flags.quiet)
            print("\n".join(measure(*sizes, pathlib.Path(folder))))
    except (Refused, Failed) as error:
        print(f"stragglers.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stragglers.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
