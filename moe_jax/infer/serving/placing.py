"""Placement in the loop: plans from served traffic, moved between steps, proven or withdrawn.

    recording  the engine's reservoir fills; a window ends every `rules.tokens` served tokens
    planning   two windows are there: a thread plans on the older, judges on the newer (replan.py)
    moving     the plan is worth it: once a thread has compiled what its route needs, a group of
               layers moves before every step, as many as fit in `rules.most_pause` by what the
               groups before took, at least one; without steps while there are no requests
    proving    one more window under the new plan. Its rows are counted by the dispatch itself:
               if there are more than predicted by the margin, the experts move back

Each window also teaches where a request should run (homes.py), for the plan in use and then for
the one that is coming.

A request never notices: its answer keeps every bit, and it is never dropped (Engine.adopt).
A plan that was withdrawn is not adopted again.

The rows that are predicted are those of the newer window's tokens, which the reservoir sampled;
what is counted are all tokens of the window after the move. Both are rows per token and MoE layer.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable

import numpy as np

from moe_jax import auto, migrate, replan
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer.serving import homes as homes_lib
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

PARTS = 4  # of a window: each plans or judges as a step does in training
LEAST_SEQUENCES = 8 * PARTS  # requests of a window, or it is made longer

STATES = RECORDING, PLANNING, MOVING, PROVING = "recording", "planning", "moving", "proving"


@dataclasses.dataclass(frozen=True)
class Rules:
    """When to plan, and what is asked of a plan.

    Attributes:
      tokens: served in a window.
      pays_within: tokens within which a plan has to have paid for its move.
      time_limit: seconds of a search.
      most_pause: seconds that steps may be held up by one group of layers; one layer always may.
      margin: share by which counted rows may exceed the predicted ones.
      min_gain: share of a layer's predicted time that has to be saved.
      homes: requests run where the experts of their tokens are.
      pins: experts that no plan moves away from their devices.
    """

    tokens: int = 50_000
    pays_within: int = 1_000_000
    time_limit: float = 10.0
    most_pause: float = 0.05
    margin: float = 0.05
    min_gain: float = 0.0
    homes: bool = True
    pins: Pins | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "pays_within"):
            if getattr(self, name) < 1:
                rule = "must be at least 1 token"
                raise Refused(f"replan.{name}", getattr(self, name), rule, "use 50000")
        for name in ("time_limit", "most_pause", "margin", "min_gain"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise Refused(f"replan.{name}", getattr(self, name), "at least 0", "use 0.05")


@dataclasses.dataclass
class Report:
    """What has happened, for metrics.

    Attributes:
      state: of the four.
      plans, adopted, proven, withdrawn: made; moved to; found as good as predicted; taken back.
      rows_predicted, rows_counted: of the newest adopted plan, per token and layer; 0 = not yet.
      rows_before: counted in the window before it was adopted.
      pause, total_pause: longest group of layers so far, and all of them, in seconds.
      moved_experts, moved_bytes: over links, so far.
      homes: times that homes were learned.
      said: the newest line that people were told.
    """

    state: str = RECORDING
    plans: int = 0
    adopted: int = 0
    proven: int = 0
    withdrawn: int = 0
    rows_predicted: float = 0.0
    rows_counted: float = 0.0
    rows_before: float = 0.0
    pause: float = 0.0
    total_pause: float = 0.0
    moved_experts: int = 0
    moved_bytes: int = 0
    homes: int = 0
    said: str = ""


def check(config: Config) -> None:
    """Refuses models whose experts cannot move, and topologies of other sizes than the mesh."""
    if config.mesh.expert_devices == 1:
        rule = "must be 0: experts are on one device, and there is nothing to plan"
        raise Refused("--replan_tokens", "given", rule, "leave it out, or serve on several devices")
    auto.topology_of(config)


class Placing:
    """Keeps the experts of one engine where its traffic wants them.

    Attributes:
      plan: where the experts are, or are going.
      report: what has happened.
      newest: the last window that has ended, with identities of its tokens; None before any has.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        rules: Rules,
        topology: Topology | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        """Args:
        engine: with a recorder.
        plan: where its experts are.
        topology: of its devices; None = what the config names.
        say: is told what happens, a line each time.

        Raises:
          Refused: an engine without a recorder, or see `check`.
        """
        check(engine.config)
        if engine.recorder is None:
            fix = "give the engine a recorder"
            raise Refused("recorder", None, "nothing is recorded to plan from", fix)
        self.plan, self.report = plan, Report()
        self.newest: Trace | None = None
        self._engine, self._rules, self._tell = engine, rules, say
        self._topology = topology or auto.topology_of(engine.config)
        self._background = replan.Background()
        self._windows: list[Trace] = []
        self._newest_rows = 0.0  # counted in the newest of them
        self._withdrawn: set[str] = set()
        self._before = plan
        self._decision: replan.Decision | None = None
        self._moved_layers, self._layer_seconds = 0, 0.0
        self._learned_from: list[Trace] = []
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "placing")
        self._homes: concurrent.futures.Future[homes_lib.Homes] | None = None
        self._why_anywhere = ""
        engine.runner.prepare(migrate.route(plan.placement, plan.placement))
        engine.runner.prepared(wait=True)
        self._restart()

    @property
    def works(self) -> bool:
        """Something goes on that needs no steps: a search, a move, or homes are learned."""
        return self.report.state in (PLANNING, MOVING) or self._homes is not None

    def between_steps(self) -> None:
        """To be called after every step, by who calls the steps, and now and then while it `works`
        and there are none."""
        self._take_homes()
        state = self.report.state
        if state == RECORDING and self._is_full():
            self._window_ended()
        elif state == PLANNING:
            self._take()
        elif state == MOVING:
            self._move()
        elif state == PROVING and self._is_full():
            self._prove()

    def close(self) -> None:
        """Ends a search that is running."""
        self._background.close()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _say(self, line: str) -> None:
        self.report.said = line
        self._tell(line)

    # --- recording ------------------------------------------------------------------------

    @property
    def _served(self) -> int:
        return self._engine.stats.tokens - self._tokens

    def _is_full(self) -> bool:
        """The window has its tokens, of enough requests."""
        recorder = self._engine.recorder
        assert recorder is not None
        # Asked at every step: without a trace, for which all of the buffer is fetched.
        return self._served >= self._rules.tokens and recorder.num_sequences >= LEAST_SEQUENCES

    def _restart(self) -> None:
        """A new window: the reservoir is empty, rows are counted from here."""
        engine = self._engine
        old = engine.recorder
        assert old is not None
        engine.recorder = Recorder(old.shards, old.regions, old.span, seed=engine.stats.steps)
        engine.read_counters()
        self._tokens, self._steps, self._rows = (
            engine.stats.tokens,
            engine.stats.steps,
            engine.stats.moved,
        )

    def _rows_per_token(self) -> float:
        """Counted in this window, per token and MoE layer."""
        self._engine.read_counters()
        layers = self.plan.placement.num_layers
        return (self._engine.stats.moved - self._rows) / max(self._served * layers, 1)

    def _fetch(self) -> Trace:
        """The window that has ended, before the recorder forgets it."""
        trace, recorder = self._engine.trace(), self._engine.recorder
        assert trace is not None
        assert recorder is not None
        self.newest = dataclasses.replace(trace, token_ids_T=recorder.tokens())
        return self.newest

    def _window_ended(self) -> None:
        trace = self._fetch()
        self._newest_rows = self._rows_per_token()
        steps, served = self._engine.stats.steps - self._steps, self._served
        self._learn_from(trace)
        self._windows = [*self._windows[-1:], trace]
        self._restart()
        if len(self._windows) == 2:
            recorded = [part for window in self._windows for part in parts(window)]
            setting = self._setting(max(served // max(steps, 1), 1))
            self._background.start(setting, self.plan.placement, recorded, seed=self.report.plans)
            self.report.state = PLANNING

    def _setting(self, tokens_per_step: int) -> replan.Setting:
        rules = self._rules
        return replan.setting_of(
            self._engine.config,
            self._engine.runner.mover,
            topology=self._topology,
            batch_tokens=tokens_per_step,
            passes=1,
            interval=max(rules.pays_within // tokens_per_step, 1),
            time_limit=rules.time_limit,
            min_gain=rules.min_gain,
            pins=rules.pins,
        )

    # --- homes ----------------------------------------------------------------------------

    def _learn_from(self, window: Trace) -> None:
        """For the plan in use, of this window and the one before it."""
        self._learned_from = [*self._learned_from[-1:], window]
        self._learn(self.plan.placement)

    def _learn(self, placement: Placement) -> None:
        """Begins; an older lesson that is not done counts no more."""
        if not self._rules.homes or not self._learned_from:
            return
        traces = self._learned_from
        model, limits = self._engine.config.model, self._engine.limits

        def work() -> homes_lib.Homes:
            joined = replan.joined(traces)
            problem = Problem(joined, self._topology, "seconds", model.dispatch)
            tokens = [t.token_ids_T for t in traces if t.token_ids_T is not None]  # all have them
            slack, token_T = homes_lib.slack(limits.seats), np.concatenate(tokens)
            return homes_lib.learn(problem, token_T, placement, model.vocab_size, slack)

        self._homes = self._worker.submit(work)

    def _take_homes(self) -> None:
        if self._homes is None or not self._homes.done():
            return
        learned, self._homes = self._homes, None
        scheduler = self._engine.scheduler
        try:
            scheduler.homes = learned.result()
            self.report.homes += 1
        except Exception as error:  # requests are served wherever they run
            scheduler.homes = None
            if str(error) != self._why_anywhere:  # once, not every window
                self._why_anywhere = str(error)
                self._say(f"requests run anywhere: {error}")

    # --- planning and moving --------------------------------------------------------------

    def _take(self) -> None:
        found = self._background.take()
        if found is None:
            return
        self.report.state = RECORDING
        if isinstance(found, Exception):
            self._say(f"no new plan: {found}")
            return
        self.report.plans += 1
        made = f"plan made in {found.planning_seconds:.1f} s: {found.reason}"
        if found.adopt and (refused := self._refused(found.plan)):
            self._say(f"{made}; experts stay: {refused}")
        elif found.adopt and found.plan.digest in self._withdrawn:
            self._say(f"{made}; it was withdrawn before, experts stay")
        elif not found.adopt:
            self._say(f"{made}; experts stay")
        else:
            self._say(f"{made}; {found.move.experts} experts move")
            self._decision = found
            self._begin(found.plan)

    def _refused(self, plan: Plan) -> Refused | None:
        """Why the engine cannot take a plan."""
        try:
            self._engine.runner.table_of(plan.placement)
        except Refused as refused:
            return refused
        return None

    def _begin(self, plan: Plan) -> None:
        self._before, self.plan = self.plan, plan
        self._way = migrate.route(self._before.placement, plan.placement)
        self._moved_layers, self.report.state = 0, MOVING
        # With copies a route may be longer than those before: another program.
        self._engine.runner.prepare(self._way)
        self._learn(plan.placement)

    def _move(self) -> None:
        """The next layers, as many as fit in the pause by what the slowest took so far."""
        if not self._moved_layers and not self._engine.runner.prepared():
            return
        report, layers = self.report, self.plan.placement.num_layers
        count = 1
        if self._layer_seconds:
            count = max(1, int(self._rules.most_pause / self._layer_seconds))
        first, last = self._moved_layers, min(self._moved_layers + count, layers)
        here = migrate.between(self._before.placement, self.plan.placement, last)
        seconds = self._engine.adopt(self._way, first, last, here)
        if first or self._layer_seconds:  # the very first group takes longer than others will
            self._layer_seconds = max(self._layer_seconds, seconds / (last - first))
        moved = int(self._way.moved_L[first:last].sum())
        report.pause, report.total_pause = max(report.pause, seconds), report.total_pause + seconds
        report.moved_experts += moved
        report.moved_bytes += moved * self._engine.runner.mover.expert_bytes
        self._moved_layers = last
        if last == layers:
            self._moved()

    def _moved(self) -> None:
        self._windows, decision = [], self._decision
        self._restart()
        self._engine.stats.plan_changed(self.plan.digest)  # `_restart` has read the rows
        if decision is None:  # back where they were
            self.report.state = RECORDING
            return
        self.report.state = PROVING
        self.report.adopted += 1
        self.report.rows_before = self._newest_rows
        self.report.rows_predicted, self.report.rows_counted = decision.rows_after, 0.0
        self._say(
            f"plan {self.plan.digest[:12]} is in use; longest pause {self.report.pause:.3f} s"
        )

    # --- proving --------------------------------------------------------------------------

    def _prove(self) -> None:
        report, rules = self.report, self._rules
        report.rows_counted = self._rows_per_token()
        self._learn_from(self._fetch())
        gist = (
            f"{report.rows_counted:.3f} rows per token and layer counted, "
            f"{report.rows_predicted:.3f} predicted, {report.rows_before:.3f} before"
        )
        self._decision = None
        if report.rows_counted <= report.rows_predicted * (1 + rules.margin):
            report.proven += 1
            report.state = RECORDING
            self._say(f"plan {self.plan.digest[:12]} is proven: {gist}")
            self._restart()
            return
        report.withdrawn += 1
        self._withdrawn.add(self.plan.digest)
        self._say(f"plan {self.plan.digest[:12]} is withdrawn: {gist}")
        self._begin(self._before)


def parts(window: Trace) -> list[Trace]:
    """A window's requests in `PARTS` parts of as many requests."""
    return [window.select(np.arange(n, window.num_sequences, PARTS)) for n in range(PARTS)]
