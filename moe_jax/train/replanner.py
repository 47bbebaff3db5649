"""New plans while a model trains: routing is recorded, a thread plans, the experts move between
steps.

Every process records and moves; the first one plans. It says that it has a plan worth its move in
the agreement of a step, and all of them move between the same two steps. The curve is that of a run
whose experts stayed (in `exact` and `reproducible` combine, without replicas).

A plan that was adopted is in WORKDIR/plans/STEP.json (unless the disk takes no more, which is said
and ends nothing), and in every checkpoint from there on. A run that ends before its next checkpoint
goes on from the last one, under the plan of that; plans that were adopted after it are removed.
"""

import dataclasses
import pathlib
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax import metrics, migrate, replan
from moe_jax.config import Config
from moe_jax.model.dispatch.table import Table
from moe_jax.placement.plan import Placement, Plan
from moe_jax.train import resume
from moe_jax.train.step import StepMetrics

# A backward pass moves the rows of a forward pass again and computes more; under `exact` it moves a
# row for every assignment, of which placement saves none.
PASSES = {"exact": 1, "partial": 2, "reproducible": 2}


class Replanner:
    """Makes and adopts plans for one run; nothing happens where `config.replan.every` is 0.

    Attributes:
      plan: where the experts are.
    """

    def __init__(
        self, config: Config, mesh: Mesh, workdir: pathlib.Path, run: resume.Run, plan: Plan
    ):
        self.plan = plan
        self._config, self._mesh, self._workdir = config, mesh, workdir
        self._background = replan.Background()
        self._arriving: jax.Array | None = None
        self._recorded: list[np.ndarray] = []
        self._decision: replan.Decision | None = None
        if not config.replan.every:
            return
        if jax.process_index() == 0:
            _drop_from(run.step, workdir / "plans", kept=config.placement)
        pins = replan.pins_of("replan.pins", config.replan.pins, plan)
        self._mover = migrate.Mover(mesh, run.state)
        here = migrate.route(plan.placement, plan.placement)
        # compiled beside the first steps, so that the first move does not wait for it
        threading.Thread(target=self._mover.prepare, args=(here,), daemon=True).start()
        self._sampled = _sampler(config, mesh)
        self._setting = replan.setting_of(
            config,
            self._mover,
            passes=PASSES[config.model.combine],
            interval=config.replan.every,
            time_limit=config.replan.seconds,
            min_gain=config.replan.min_gain,
            pins=pins,
        )

    def record(self, step: int, found: StepMetrics) -> None:
        """After every step: keeps its routing if a plan is due soon, and begins to plan if it is.

        What a step chose is read when the next one has begun.
        """
        every, last = self._config.replan.every, self._config.replan.record_steps
        if not every:
            return
        if self._arriving is not None:
            self._recorded.append(np.asarray(self._arriving.addressable_data(0)))
            self._arriving = None
        if (step - 1) % every == 0 and step > 1:
            self._begin(step)
        if (step - 1) % every >= every - last:
            self._arriving = self._sampled(found.expert_LBSK)

    def _begin(self, step: int) -> None:
        recorded, self._recorded = self._recorded, []
        busy = self._background.running or self._decision  # being made, or waiting to be adopted
        left = self._config.train.num_steps - step
        if jax.process_index() or busy or len(recorded) < replan.LEAST_STEPS or left < 1:
            return  # others plan; the last plan is not in use yet; the run has just begun, or ends
        traces = [replan.trace_of(expert_LBSK, self._config) for expert_LBSK in recorded]
        setting = dataclasses.replace(self._setting, interval=min(self._setting.interval, left))
        self._background.start(setting, self.plan.placement, traces, seed=step)

    def found(self) -> bool:
        """True once for every plan that is worth its move."""
        if self._decision:  # several processes agree on it a step later
            return False
        found = self._background.take()
        if isinstance(found, Exception):
            metrics.fail(f"no new plan ({found}); training goes on under the one in use")
        if not isinstance(found, replan.Decision):
            return False
        kept = "" if found.adopt else "; experts stay"
        metrics.say(f"plan made in {found.planning_seconds:.1f} s: {found.reason}{kept}")
        self._decision = found if found.adopt else None
        return found.adopt

    def adopt(self, run: resume.Run) -> dict[str, float]:
        """Moves the experts; every process calls this between the same two steps. What it cost."""
        old, decision = self.plan.placement, self._decision
        new_LP = decision.plan.placement.physical_to_logical_LP if decision else None
        if jax.process_count() > 1:
            zeros_LP = np.zeros_like(old.physical_to_logical_LP)
            new_LP = multihost_utils.broadcast_one_to_all(zeros_LP if new_LP is None else new_LP)
        assert new_LP is not None
        placement = Placement(np.asarray(new_LP, np.int32), old.num_experts, old.num_devices)
        way = migrate.route(old, placement)
        jax.block_until_ready(run.state)
        started = time.perf_counter()
        run.state = jax.block_until_ready(self._mover(run.state, way))
        pause, moved = time.perf_counter() - started, int(way.moved_L.sum())
        self.plan = Plan(placement, self.plan.layer_ids)
        num_bytes = moved * self._mover.expert_bytes
        if decision:
            self.plan, self._decision = decision.plan, None
            path = self._workdir / "plans" / f"{run.step}.json"
            try:
                self.plan.write(path)
            except OSError as error:
                metrics.fail(f"{path}: {error}; training goes on, the next checkpoint has the plan")
            spent = decision.seconds_before * 1e6, decision.seconds_after * 1e6
            metrics.say(
                f"after step {run.step}: {moved} of {old.num_layers * old.num_slots} experts moved "
                f"({num_bytes / 1e6:.1f} MB), training stood still for {pause:.2f} s; predicted: "
                f"{decision.rows_before:.3f} -> {decision.rows_after:.3f} rows per token and "
                f"layer, {spent[0]:.3g} -> {spent[1]:.3g} us a layer forward"
            )
        return {"moved_experts": moved, "moved_bytes": num_bytes, "move_seconds": pause}

    def table(self) -> Table:
        """The plan in use as the model takes it."""
        return resume.put_table(self._mesh, self.plan)

    def close(self) -> None:
        """Ends a search that is running."""
        self._background.close()


def _drop_from(step: int, folder: pathlib.Path, kept: str) -> None:
    """Removes plans that were adopted after `step`, where the run goes on, by one that was cut.

    Args:
      step: of the checkpoint, 0 without any.
      folder: of the run's plans.
      kept: the file that the config names, if it does.
    """
    for path in folder.glob("*.json"):
        of_run = path.stem.isdecimal() and int(path.stem) >= step
        if not of_run or (kept and path.resolve() == pathlib.Path(kept).resolve()):
            continue
        try:
            path.unlink()
            metrics.say(f"{path}: removed, adopted after step {step}, where the run goes on")
        except OSError as error:
            metrics.fail(f"{path}: {error}; it is of a run that was cut there")


def _sampler(config: Config, mesh: Mesh):
    """`(expert_LBSK) -> int16 [L, b, S, K]` on every device: sequences evenly out of the batch."""
    batch, sequence = config.data.global_batch, config.data.seq_len
    most = max(1, replan.MOST_TOKENS // (config.replan.record_steps * sequence))
    chosen_b = np.unique(np.linspace(0, batch - 1, min(batch, most)).astype(int))
    whole = mesh_lib.sharding(mesh)
    return jax.jit(lambda ids: ids[:, chosen_b].astype(np.int16), out_shardings=whole)
