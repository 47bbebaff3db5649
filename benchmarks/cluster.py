"""What a placement is worth on a wire: hosts with real, rate-limited links inside this machine.

    python benchmarks/cluster.py [--hosts=2 --devices-per-host=2 --mbit=50,200,1000] [--model=RUN]

Needs root, ip and tc. Without --model a model is trained once, in runs/cluster (about 15 minutes
on two cores). See benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.box import command, links, measure, subject, table, ways, worker
from benchmarks.box.plans import Box
from moe_jax.errors import Refused


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--hosts", type=int, default=2)
    flags.add_argument("--devices-per-host", type=int, default=2)
    flags.add_argument("--mbit", default="200", help="10^6 bits per second; several with commas")
    flags.add_argument("--model", help="work directory of a run; default: trained once")
    flags.add_argument(
        "--dispatch", default="", help="DISPATCH or DISPATCH:COMBINE, with commas; default: all"
    )
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--plan-seconds", type=float, default=20.0, help="per plan of ours")
    for field in dataclasses.fields(subject.Sizes):
        name = "--" + field.name.replace("_", "-")
        flags.add_argument(name, type=int, default=field.default)
    flags.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return flags


def request_of(flags: argparse.Namespace) -> measure.Request:
    """The flags as a checked request; then trains the model if none is named."""
    names = [field.name for field in dataclasses.fields(subject.Sizes)]
    numbers = {name: getattr(flags, name) for name in names}
    counts = {"hosts": flags.hosts, "devices_per_host": flags.devices_per_host, **numbers}
    for name, least in {**dict.fromkeys(counts, 1), "hosts": 2}.items():
        if counts[name] < least:
            flag = "--" + name.replace("_", "-")
            raise Refused(flag, counts[name], f"must be at least {least}", f"use {least}")
    links.check_hosts(flags.hosts)
    if flags.rounds < 1:
        raise Refused("--rounds", flags.rounds, "must be at least 1", "use 5")
    if not 0 <= flags.plan_seconds < float("inf"):
        raise Refused("--plan-seconds", flags.plan_seconds, "seconds, at least 0", "use 20")
    try:
        mbits = tuple(float(word) for word in flags.mbit.split(","))
    except ValueError:
        mbits = ()
    if not mbits or not all(1 <= mbit <= 100_000 for mbit in mbits):
        raise Refused("--mbit", flags.mbit, "numbers from 1 to 100000, with commas", "use 50,200")
    devices = flags.hosts * flags.devices_per_host
    for name in ("prefill_sequences", "decode_sequences"):
        if numbers[name] % devices:
            flag, more = "--" + name.replace("_", "-"), -(-numbers[name] // devices) * devices
            rule = f"must be a multiple of the {devices} devices, which share the sequences"
            raise Refused(flag, numbers[name], rule, f"use {more}")
    box, sizes = Box(flags.hosts, flags.devices_per_host), subject.Sizes(**numbers)
    words = tuple(word for word in flags.dispatch.split(",") if word)
    config = subject.config_of(flags.model)
    subject.check_prompts(config, sizes)
    ways.chosen(list(words), worker.on_box(config, box.hosts, box.devices_per_host))
    run = subject.trained(flags.model)
    return measure.Request(run, box, mbits, words, flags.rounds, flags.plan_seconds, sizes)


def work() -> None:
    """What the flags ask for, on stdout."""
    flags = parser().parse_args()
    links.check_machine()
    request = request_of(flags)
    with tempfile.TemporaryDirectory(prefix="moe_jax-box-") as folder:
        results = measure.run(request, pathlib.Path(folder))
    if flags.json:
        print(json.dumps(dataclasses.asdict(results)))
    else:
        print("\n".join(table.lines(results)))


if __name__ == "__main__":
    sys.exit(command.run("cluster.py", work))
