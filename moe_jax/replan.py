"""Is another placement worth its move now? Decided while a model trains or serves, from fresh
routing.

What was recorded is a trace per step. The first half of them is planned on, the others judge: each
says what a step under the plan in use and under the new one would take, so that the saving has a
spread. A plan is adopted if the saving's lower end (mean less two standard errors over the judging
steps), over the steps until the next plan is made, is more than the seconds in which the links
carry the experts. Pauses and the search itself are not counted; both are reported.

Seconds are those of the cost model, with rows as the dispatch and the combine in use really move
them (the search counts one row per device both ways, which under `exact` is true of the way out
only, and all rows as wide as activations), and copies as the mesh's nodes have them taken (the
search goes by the topology's). A backward pass counts as forward ones, widths of rows included.

The search runs in a thread (`Background`): a step is dispatched by Python in a fraction of the time
it takes, and no device waits for the search.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax import auto, migrate
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.placement import move as move_lib
from moe_jax.placement import solve
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import holds_LEM
from moe_jax.placement.move import Move
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.solution import Progress
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

MOST_TOKENS = 2**17  # that a plan and its judgement are made from; more are sampled by sequence
LEAST_STEPS = 4  # recorded ones: two plan, two judge


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a decision depends on besides the routing.

    Attributes:
      topology: links and devices that experts are split over.
      work: sizes of a layer and a step.
      dispatch, combine: in use.
      passes: forward passes that a step is worth: what is saved in a forward pass counts so often.
      interval: steps that a plan is expected to serve.
      expert_bytes: that move with an expert of a layer, over the link of one device.
      time_limit: seconds of the search.
      devices_per_node, widths: see `auto.judge`.
      min_gain: share of a layer's time that has to be saved at least.
      pins: experts that no plan moves away from their devices.
    """

    topology: Topology
    work: Work
    dispatch: str
    combine: str
    passes: int
    interval: int
    expert_bytes: int
    time_limit: float
    devices_per_node: int
    widths: tuple[float, float] = (1.0, 1.0)
    min_gain: float = 0.0
    pins: Pins | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was found.

    Attributes:
      adopt: the plan is worth its move.
      reason: in a sentence.
      plan: the new one, with device numbers that move least.
      rows_before, rows_after: per token and layer, both ways, on the judging steps.
      seconds_before, seconds_after: of a layer's forward pass, mean over layers and judging steps.
      saved_low: lower end of what one step saves, all layers and passes.
      move: what it costs.
      planning_seconds: wall time of the search and the judgement.
    """

    adopt: bool
    reason: str
    plan: Plan
    rows_before: float
    rows_after: float
    seconds_before: float
    seconds_after: float
    saved_low: float
    move: Move
    planning_seconds: float


def setting_of(
    config: Config,
    mover: migrate.Mover,
    *,
    topology: Topology | None = None,
    batch_tokens: int | None = None,
    passes: int,
    interval: int,
    time_limit: float,
    min_gain: float,
    pins: Pins | None = None,
) -> Setting:
    """That of a model which trains or serves.

    Args:
      mover: of everything that moves with its experts.
      topology: None = what the config names.
      batch_tokens: of a step of the whole mesh; None = as the config says.
    """
    work = auto.work_of(config)
    if batch_tokens is not None:
        groups = config.mesh.data * config.mesh.fsdp  # each with all experts, at the same time
        work = dataclasses.replace(work, batch_tokens=max(batch_tokens // groups, 1))
    split = config.mesh.fsdp * config.mesh.tensor  # devices that an expert is cut over
    return Setting(
        topology=topology or auto.topology_of(config),
        work=work,
        dispatch=config.model.dispatch,
        combine=config.model.combine,
        passes=passes,
        interval=interval,
        expert_bytes=-(-mover.expert_bytes // split),
        time_limit=time_limit,
        min_gain=min_gain,
        pins=pins,
        devices_per_node=config.mesh.expert,
        widths=auto.widths_of(config),
    )


def pins_of(field: str, words: str, plan: Plan) -> Pins | None:
    """The pins of a run that begins under `plan`, which has to keep them; None without any.

    Args:
      field: the option's name, for errors.
      words: LAYER:EXPERT:DEVICE triples and files of them, with commas between.
    """
    placement = plan.placement
    sizes = (placement.num_experts, placement.num_devices, plan.layer_ids)
    if (pins := pins_lib.listed(field, words, *sizes)) is None:
        return None
    if broken := pins.broken(holds_LEM(placement)):
        rule = f"the plan that the run begins with breaks {broken} of these pins"
        fix = (
            "make one that keeps them (moe_jax.placement solve --pin) and begin with it; where "
            "there are steps already, put them under it (moe_jax.placement apply)"
        )
        raise Refused(field, words, rule, fix)
    return pins


def trace_of(expert_LBSK: np.ndarray, config: Config) -> Trace:
    """One step's routing as a trace; ids below 0 mean no expert."""
    num_experts = config.model.num_experts
    layers, batch, sequence, top_k = expert_LBSK.shape
    dtype, none = (np.uint8, 255) if num_experts < 255 else (np.uint16, 65535)
    ids_TLK = expert_LBSK.transpose(1, 2, 0, 3).reshape(-1, layers, top_k)
    ids_TLK = np.where(ids_TLK < 0, none, ids_TLK).astype(dtype)
    return Trace(
        *(ids_TLK, num_experts, np.full(batch, sequence, np.int32)),
        layer_ids=config.model.moe_layer_ids,
        model=config.name,
    )


def decide(
    setting: Setting,
    before: Placement,
    recorded: Sequence[Trace],
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Decision:
    """Plans on the first half of the recorded steps and judges on the others.

    Raises:
      Refused: fewer than `LEAST_STEPS` steps, or what `solve` refuses.
    """
    started = time.monotonic()
    if len(recorded) < LEAST_STEPS:
        rule = f"two steps plan and two judge: {LEAST_STEPS} are needed"
        raise Refused("recorded steps", len(recorded), rule, "record more of them")
    half = len(recorded) // 2
    problem = Problem(
        joined(recorded[:half]),
        setting.topology,
        "seconds",
        setting.dispatch,
        setting.work,
        num_slots=before.num_slots if before.has_replicas else None,
        pins=setting.pins,
    )
    solution = solve.unproven(problem, seed, setting.time_limit, progress)
    after = move_lib.relabelled(problem, before, solution.placement)
    move = move_lib.move(before, after, setting.topology, setting.expert_bytes)

    def judged(placement: Placement) -> list[auto.Option]:
        return [
            auto.judge(
                *(setting.dispatch, trace.expert_ids_TLK, placement, setting.topology),
                work=setting.work,
                combine=setting.combine,
                devices_per_node=setting.devices_per_node,
                widths=setting.widths,
            )
            for trace in recorded[half:]
        ]

    old, new = judged(before), judged(after)
    before_N, after_N = (np.array([option.seconds for option in side]) for side in (old, new))
    saved_N = before_N - after_N
    low = float(saved_N.mean() - 2 * saved_N.std(ddof=1) / math.sqrt(len(saved_N)))
    saved_low = low * before.num_layers * setting.passes
    needed = setting.min_gain * float(before_N.mean())
    adopt = saved_low * setting.interval > move.seconds and low >= needed and move.experts > 0
    share = f"{100 * saved_N.mean() / before_N.mean():.1f} %"
    total = f"{saved_low * setting.interval:.3g} s in {setting.interval:,} steps (lower end)"
    if not move.experts:
        reason = "the plan in use is the best one found"
    elif saved_N.mean() < 0:
        slower = -100 * saved_N.mean() / before_N.mean()
        reason = f"on newer steps a layer takes {slower:.1f} % longer under the plan found"
    elif low <= 0:
        reason = f"{share} of a layer's time would be saved, which is within the spread of steps"
    elif low < needed:
        reason = f"{share} of a layer's time saved is less than {100 * setting.min_gain:g} %"
    else:
        relation = "more" if adopt else "no more"
        reason = (
            f"{share} of a layer's time, {total}: {relation} than the move's {move.seconds:.3g} s"
        )
    rows_before, rows_after = (
        float(np.mean([option.rows_out + option.rows_back for option in side]))
        for side in (old, new)
    )
    report = solution.report
    provenance: dict[str, Any] = {
        "solver": "replan",
        "trace_digest": problem.trace.digest,
        "tokens": problem.trace.num_tokens,
        "dispatch": problem.dispatch,
        "objective": report.objective,
        "unit": report.unit,
        "rows_before": rows_before,
        "rows_after": rows_after,
        "saved_seconds_per_step_low": saved_low,
        "moved_bytes": move.bytes,
    }
    return Decision(
        adopt,
        reason,
        Plan(after, problem.trace.layer_ids, setting.topology.to_json(), provenance),
        rows_before,
        rows_after,
        float(before_N.mean()),
        float(after_N.mean()),
        saved_low,
        move,
        time.monotonic() - started,
    )


def joined(traces: Sequence[Trace]) -> Trace:
    """Their sequences, one trace after the other; names, weights and homes are left out."""
    return Trace(
        np.concatenate([trace.expert_ids_TLK for trace in traces]),
        traces[0].num_experts,
        np.concatenate([trace.seq_len for trace in traces]),
        layer_ids=traces[0].layer_ids,
        model=traces[0].model,
    )


class Cancelled(Exception):
    """Ends a search whose result nobody waits for."""


class Background:
    """One decision at a time, in a thread that ends with the program.

    Attributes:
      running: a decision is being made.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._found: Decision | Exception | None = None
        self._cancelled = threading.Event()

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self, setting: Setting, before: Placement, recorded: Sequence[Trace], seed: int = 0):
        """Begins; not while one is `running`."""
        assert self._thread is None

        def noticed(_: Progress) -> None:
            if self._cancelled.is_set():
                raise Cancelled

        def work() -> None:
            try:
                self._found = decide(setting, before, recorded, seed, noticed)
            except Exception as error:  # a run must not end because a search did
                self._found = error

        self._thread = threading.Thread(target=work, name="replan", daemon=True)
        self._thread.start()

    def take(self) -> Decision | Exception | None:
        """What came out, once; None while it is being made or was not begun."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        found, self._found, self._thread = self._found, None, None
        return found

    def close(self) -> None:
        """Ends a running search at its next step."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
