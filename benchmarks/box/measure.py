"""The measurement: rounds in which every way and plan runs once, one after the other.

Slow changes of the machine (other programs, clocks) meet all of them alike, and speed-ups are taken
within a round. The order of the plans is another one in every round.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.box import plans, subject, ways, worker
from benchmarks.box.hosts import Inputs, Workers
from benchmarks.box.links import Network
from benchmarks.box.plans import Box
from moe_jax.config import Config
from moe_jax.placement.plan import Placement
from moe_jax.routing.trace import Trace

PHASES = ("prefill", "decode")
CALIBRATION_KIB, CALIBRATION_TIMES = 1024, 8


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for; see the flags of cluster.py."""

    run: str
    box: Box
    mbits: tuple[float, ...]
    ways: tuple[str, ...]
    rounds: int
    plan_seconds: float
    sizes: subject.Sizes


@dataclasses.dataclass
class Cell:
    """One way under one plan, one phase, one bandwidth.

    Attributes:
      seconds: [rounds][hosts].
      sent, received: bytes of every host's link, [rounds][hosts].
      rows: between hosts, counted in the program, [from][to]: true rows.
      padded: the same with the rows that carry no token.
      predicted: true rows by the cost module, or None where it has no count.
      all_rows, all_padding: between all devices.
    """

    seconds: list[list[float]] = dataclasses.field(default_factory=list)
    sent: list[list[int]] = dataclasses.field(default_factory=list)
    received: list[list[int]] = dataclasses.field(default_factory=list)
    rows: list[list[int]] | None = None
    padded: list[list[int]] | None = None
    predicted: list[list[int]] | None = None
    all_rows: int = 0
    all_padding: int = 0

    def add(self, answers: Sequence[dict[str, Any]], box: Box) -> None:
        self.seconds.append([one["seconds"] for one in answers])
        self.sent.append([one["sent"] for one in answers])
        self.received.append([one["received"] for one in answers])
        if "padding_MM" in answers[0]:
            there, back, padding = (np.array(answers[0][name]).sum(0) for name in worker.ROWS)
            self.rows = plans.between_hosts(there + back, box).tolist()
            self.padded = plans.between_hosts(there + back + padding, box).tolist()
            self.all_rows, self.all_padding = int((there + back).sum()), int(padding.sum())


@dataclasses.dataclass
class Results:
    """Everything that was measured.

    Attributes:
      machine: words and sizes: cores, load before and after, model, box.
      links: per bandwidth: payload Mbit/s that a bulk transfer reached, bytes per payload byte.
      compile_seconds: per way.
      digests: of the plans, per bandwidth and name.
      cells: [mbit][way][plan][phase].
    """

    machine: dict[str, Any]
    links: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    digests: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    cells: dict[str, dict[str, dict[str, dict[str, Cell]]]] = dataclasses.field(
        default_factory=dict
    )


def run(request: Request, folder: pathlib.Path) -> Results:
    """Builds the box, measures, takes it down again."""
    box, sizes = request.box, request.sizes
    inputs = folder / "inputs.npz"
    subject.write_inputs(request.run, sizes, inputs)
    trace = subject.planning_trace(request.run, folder)
    config, _ = worker.spread(request.run, box.hosts, box.devices_per_host)
    names = ways.chosen(list(request.ways), config)
    load_before = os.getloadavg()[0]
    results = Results(_describe(request, config))
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(box.hosts))
        told = Inputs(request.run, str(inputs), sizes.decode_start, box.devices_per_host)
        hosts = stack.enter_context(Workers(network, told, folder))
        fixed = plans.baselines(trace, box)
        for name, placement in fixed.items():
            hosts.all("place", plan=name, slots=placement.physical_to_logical_LP.tolist())
        for way in names:
            _say(f"compiling {way}")
            answers = hosts.all("compile", way=way, plan="contiguous")
            results.compile_seconds[way] = max(one["seconds"] for one in answers)
        for mbit in request.mbits:
            ours = _plan_ours(request, trace, config, names, mbit)
            for name, placement in ours.items():
                hosts.all("place", plan=name, slots=placement.physical_to_logical_LP.tolist())
            network.limit(mbit)
            results.links[f"{mbit:g}"] = _calibrate(hosts)
            digests = {name: placement.digest for name, placement in {**fixed, **ours}.items()}
            results.digests[f"{mbit:g}"] = digests
            at_mbit = _rounds(request, hosts, names, mbit)
            results.cells[f"{mbit:g}"] = at_mbit
            network.unlimit()
            _predict(request, hosts, at_mbit, {**fixed, **ours})
    results.machine["load_average"] = [load_before, os.getloadavg()[0]]
    return results


def _describe(request: Request, config: Config) -> dict[str, Any]:
    return {
        "run": request.run,
        "model": config.name,
        "layers": config.model.num_moe_layers,
        "experts": config.model.num_experts,
        "top_k": config.model.top_k,
        "row_bytes": plans.row_bytes(config.model),
        "hosts": request.box.hosts,
        "devices_per_host": request.box.devices_per_host,
        "rounds": request.rounds,
        "sizes": dataclasses.asdict(request.sizes),
        "cores": os.cpu_count(),
    }


def of_ours(way: str) -> str:
    """Name of our plan for a way's dispatch."""
    return f"{plans.OURS} for {way.partition(':')[0]}"


def _plan_ours(
    request: Request, trace: Trace, config: Config, names: Sequence[str], mbit: float
) -> dict[str, Placement]:
    tokens = request.sizes.prefill_sequences * request.sizes.prefill_tokens
    made = {}
    for dispatch in dict.fromkeys(way.partition(":")[0] for way in names):
        _say(f"planning for {dispatch} at {mbit:g} Mbit/s")
        made[of_ours(dispatch)] = plans.ours(
            trace, request.box, config.model, dispatch, tokens, mbit, request.plan_seconds
        )
    return made


def _calibrate(hosts: Workers) -> dict[str, float]:
    """What the link does with a bulk transfer: the protocols' overhead, measured once."""
    answers = hosts.all("calibrate", kib=CALIBRATION_KIB, times=CALIBRATION_TIMES)
    payload = answers[0]["payload"]
    seconds = max(one["seconds"] for one in answers)
    sent = np.mean([one["sent"] for one in answers])
    return {"overhead": float(sent / payload), "mbit": payload * 8 / seconds / 1e6}


def _rounds(
    request: Request, hosts: Workers, names: Sequence[str], mbit: float
) -> dict[str, dict[str, dict[str, Cell]]]:
    cells = {
        way: {plan: {phase: Cell() for phase in PHASES} for plan in plans.NAMES} for way in names
    }
    for number in range(request.rounds):
        for way in names:
            for plan in _turned(plans.NAMES, number):
                for phase in PHASES:
                    placed = of_ours(way) if plan == plans.OURS else plan
                    told = {"way": way, "plan": placed, "phase": phase, "rows": number == 0}
                    cells[way][plan][phase].add(hosts.all("step", **told), request.box)
        _say(f"{mbit:g} Mbit/s: round {number + 1}/{request.rounds}")
    return cells


def _turned(names: Sequence[str], by: int) -> Iterator[str]:
    first = by % len(names)
    yield from (*names[first:], *names[:first])


def _predict(request: Request, hosts: Workers, cells: Any, placements: dict[str, Any]) -> None:
    """What the cost module says of the same tokens, for prefill."""
    for way in cells:
        dispatch, _, combine = way.partition(":")
        answer = hosts.all("route", way=way, plan="contiguous")[0]
        expert_LBSK = np.array(answer["expert_LBSK"])
        layers, batch, length, top_k = expert_LBSK.shape
        expert_TLK = expert_LBSK.reshape(layers, batch * length, top_k).swapaxes(0, 1)
        home_T = np.repeat(np.array(answer["home_B"], np.int32), length)
        for plan, phases in cells[way].items():
            placement = placements[of_ours(way) if plan == plans.OURS else plan]
            rows = plans.predicted_between_hosts(
                np.ascontiguousarray(expert_TLK), home_T, placement, request.box, dispatch,
                combine or "exact",
            )  # fmt: skip
            phases["prefill"].predicted = None if rows is None else rows.tolist()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
