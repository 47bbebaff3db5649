"""The training loop: a run from its work directory to its last checkpoint.

A work directory holds config.json, metrics.jsonl, tensorboard/, checkpoints/STEP and .lock: one run
at a time. A run that finds checkpoints there goes on from the newest good one: model, optimizer,
PRNG key, data position and step are what they were, so the curve is the one of a run that never
stopped.

No value is read from a device in the step that made it: metrics are looked at one step late.
Checkpoints are written while training goes on. SIGTERM: the step at hand is saved, exit code 0.
"""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import data, files, metrics
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import integrity
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.model import transformer
from moe_jax.model.dispatch.table import Table
from moe_jax.placement import plan as plan_lib
from moe_jax.train import inputs, preemption, resume, watchdog
from moe_jax.train import step as step_lib
from moe_jax.train.only_run import only_run
from moe_jax.train.replanner import Replanner
from moe_jax.train.reporter import Reporter
from moe_jax.train.stragglers import Stragglers


def train(
    config: Config,
    workdir: pathlib.Path,
    corpus: data.Corpus,
    plan: plan_lib.Plan,
    ahead: integrity.Digests | None = None,
) -> None:
    """Trains until `config.train.num_steps`, or SIGTERM; resumes if `workdir` has checkpoints.

    Args:
      config: as `prepare` checked it.
      workdir: of the run.
      corpus: from `prepare`.
      plan: from `prepare`; where the config names none, that of the checkpoint goes before it.
      ahead: from `inputs.digests_ahead`, begun before `prepare`.

    Raises:
      Refused: after `max_bad_steps` bad steps in a row, or when a step cannot be saved.
    """
    train_config = config.train
    with contextlib.ExitStack() as stack:
        notice = stack.enter_context(preemption.Notice())
        mesh = mesh_lib.of_config(config.mesh)
        stack.enter_context(only_run(workdir))
        _check_same_run(config, workdir)
        resume.check_text(corpus)
        train_step = step_lib.build_step(config, mesh)
        run, plan = resume.start_or_resume(config, mesh, workdir, corpus, plan, ahead=ahead)
        replanning = Replanner(config, mesh, workdir, run, plan)
        stack.callback(replanning.close)
        table = replanning.table()
        if jax.process_index() == 0:
            _keep(config, workdir)
        windows = data.held_out_windows(corpus, config.data.seq_len, train_config.eval_sequences)
        held_out_loss = _HeldOut(config, mesh, windows)
        hang = watchdog.Watchdog(
            train_config.hang_seconds, workdir, exit_after=train_config.hang_exit
        )
        stack.enter_context(hang)
        checkpoints = stack.enter_context(resume.Checkpoints(config, workdir, run, plan))
        stack.callback(hang.waits_for_saves)
        reporter = Reporter(config, mesh, workdir, run.step, corpus, windows)
        stack.callback(reporter.close)
        stragglers = Stragglers(config, mesh)
        agree = preemption.Agreement(mesh, ("stop", "save_failed", "new_plan"))
        pending: tuple[int, Any, jax.Array | None, np.ndarray] | None = None
        while run.step < train_config.num_steps:
            agreed = agree(
                stop=notice.given, save_failed=checkpoints.failed, new_plan=replanning.found()
            )
            if agreed["save_failed"]:
                checkpoints.wait()
            if agreed["stop"]:
                break
            if agreed["new_plan"]:
                reporter.beside(run.step + 1, replanning.adopt(run))
                checkpoints.plan, table = replanning.plan, replanning.table()
            window_BS1 = next(run.batches)
            run.state, step_metrics = train_step(
                run.state, mesh_lib.put_batch(mesh, window_BS1), table
            )
            run.step += 1
            replanning.record(run.step, step_metrics)
            reporter.beside(run.step, stragglers.look(run.step, run.state))
            at_end = run.step == train_config.num_steps
            save = run.step % train_config.checkpoint_every == 0 and not at_end
            evaluate = run.step % train_config.eval_every == 0 or at_end
            evaluate |= save and train_config.checkpoints_kept_best > 0  # by their held-out loss
            loss = held_out_loss(run.state.model, table) if evaluate else None
            if pending:
                hang.beat(reporter.report(*pending))
            pending = (run.step, step_metrics, loss, window_BS1)
            if save:
                hang.beat(reporter.report(*pending))
                pending = None
                with hang.saving():
                    checkpoints.save(run, loss)
        if pending:
            hang.beat(reporter.report(*pending))
        with hang.saving():
            checkpoints.save_last(run, pending[2] if pending else None)
        if run.step < train_config.num_steps:
            metrics.say(f"stopped by SIGTERM after step {run.step}: the same command goes on there")


def _check_same_run(config: Config, workdir: pathlib.Path) -> None:
    """Again: a run that this one has waited for may have begun here since `prepare` looked."""
    refused = None
    if jax.process_index() == 0:
        try:
            inputs.check_same_run(config, workdir)
        except Refused as error:
            refused = error
    if mesh_lib.in_any_process(refused is not None):
        rule = "holds a run of another config"
        raise refused or Refused("--workdir", str(workdir), rule, "see what process 0 says")


def _keep(config: Config, workdir: pathlib.Path) -> None:
    try:
        with files.atomic_write(workdir / "config.json", "w") as file:
            file.write(config_lib.to_json(config))
    except OSError as error:
        rule = f"could not be written ({error.strerror})"
        raise Refused("--workdir", str(workdir), rule, "free space, or use another place") from None


class _HeldOut:
    """Held-out loss in nats a token."""

    def __init__(self, config: Config, mesh: Mesh, windows: np.ndarray):
        self._evaluate = step_lib.build_eval(config, mesh)
        self._windows = mesh_lib.put_batch(mesh, windows)

    def __call__(self, model: transformer.Transformer, table: Table) -> jax.Array:
        return self._evaluate(model, self._windows, table)
