"""The training loop: a run from its work directory to its last checkpoint.

A work directory holds config.json, metrics.jsonl, tensorboard/ and checkpoints/STEP. A run that
finds checkpoints there goes on from the newest good one: model, optimizer, PRNG key, data position
and step are what they were, so the curve is the one of a run that never stopped.

No value is read from a device in the step that made it: metrics are looked at one step late.
"""

import dataclasses
import pathlib
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import checkpoint, data, files, metrics, permute
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.model import parameter, transformer
from moe_jax.model.dispatch.table import Table
from moe_jax.placement import copies
from moe_jax.placement import plan as plan_lib
from moe_jax.train import step as step_lib


@dataclasses.dataclass
class Run:
    """A run between two steps."""

    state: step_lib.TrainState
    batches: grain.DatasetIterator
    step: int


def prepare(config: Config, workdir: pathlib.Path) -> tuple[data.Corpus, plan_lib.Plan]:
    """All checks that need files but no devices. Raises `Refused`; writes nothing."""
    config_lib.check_trainable(config)
    plan = load_plan(config)
    kept = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise Refused("--workdir", str(workdir), "is not a directory", "name another one")
    if kept.exists():
        old = config_lib.from_json(kept.read_text(encoding="utf-8", errors="replace"))
        if config_lib.digest(old) != config_lib.digest(config):
            raise Refused(
                "--workdir",
                str(workdir),
                f"holds a run of another config ({_first_difference(old, config)})",
                "use another --workdir, or the config in its config.json",
            )
    corpus = data.load_corpus(config.data)
    data.held_out_windows(corpus, config.data.seq_len, config.train.eval_sequences)
    return corpus, plan


def load_plan(config: Config) -> plan_lib.Plan:
    """The plan named in the config, checked against the model; contiguous if there is none."""
    model, devices = config.model, config.mesh.expert_devices
    if not config.placement:
        return plan_lib.Plan(
            plan_lib.Placement.contiguous(model.num_layers, model.num_experts, devices)
        )
    plan = plan_lib.Plan.read(config.placement)
    plan_lib.check_fits(
        plan, num_layers=model.num_layers, num_experts=model.num_experts, num_devices=devices
    )
    copies.check_nodes(plan.placement, config.mesh.node)
    return plan


def _first_difference(old: Config, new: Config) -> str:
    before, after = (_flat(dataclasses.asdict(config)) for config in (old, new))
    field = next(key for key in before if before[key] != after[key])
    return f"{field} = {before[field]!r} there, {after[field]!r} here"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def train(config: Config, workdir: pathlib.Path, corpus: data.Corpus, plan: plan_lib.Plan) -> None:
    """Trains until `config.train.num_steps`, resuming if `workdir` has checkpoints.

    Raises:
      Refused: after `max_bad_steps` non-finite steps in a row, with the reason.
    """
    mesh = mesh_lib.of_config(config.mesh)
    table = jax.tree.map(lambda t: mesh_lib.put_replicated(mesh, t), permute.table(plan.placement))
    train_config, data_config = config.train, config.data
    train_step = step_lib.build_step(config, mesh)
    run = _start_or_resume(config, mesh, workdir, corpus, plan)
    if jax.process_index() == 0:
        with files.atomic_write(workdir / "config.json", "w") as file:
            file.write(config_lib.to_json(config))

    held_out = data.held_out_windows(corpus, data_config.seq_len, train_config.eval_sequences)
    held_out_loss = _HeldOut(config, mesh, held_out)
    reporter = Reporter(config, mesh, workdir, run.step, corpus, held_out)
    pending: tuple[int, Any, jax.Array | None] | None = None
    try:
        while run.step < train_config.num_steps:
            window_BS1 = mesh_lib.put_batch(mesh, next(run.batches))
            run.state, step_metrics = train_step(run.state, window_BS1, table)
            run.step += 1
            at_end = run.step == train_config.num_steps
            evaluate = run.step % train_config.eval_every == 0 or at_end
            loss = held_out_loss(run.state.model, table) if evaluate else None
            if pending:
                reporter.report(*pending)
            pending = (run.step, step_metrics, loss)
            if run.step % train_config.checkpoint_every == 0 or at_end:
                reporter.report(*pending)
                pending = None
                save(workdir, run, plan, config)
    finally:
        reporter.close()


class _HeldOut:
    """Held-out loss in nats a token."""

    def __init__(self, config: Config, mesh: Mesh, windows: np.ndarray):
        self._evaluate = step_lib.build_eval(config, mesh)
        self._windows = mesh_lib.put_batch(mesh, windows)

    def __call__(self, model: transformer.Transformer, table: Table) -> jax.Array:
        return self._evaluate(model, self._windows, table)


class Reporter:
    """Turns step metrics into lines; stops a run whose steps stay non-finite."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        workdir: pathlib.Path,
        first_step: int,
        corpus: data.Corpus,
        held_out: np.ndarray,
    ):
        self._config, self._num_devices = config, config.mesh.expert_devices
        self._unigram = data.unigram_loss(corpus, config.model.vocab_size, held_out)
        self._peak = metrics.measured_matmul_rate(mesh, dtype=config.model.dtype)
        self._progress = metrics.Progress(first_step, config.train.num_steps)
        self._held_out: float | None = None
        header = {"unigram_loss": self._unigram, "corpus": corpus.name, "config": config.name}
        first = jax.process_index() == 0
        self._writer: Any = (
            metrics.Writer(workdir, header, first_step + 1) if first else metrics.NoWriter()
        )
        metrics.say(
            f"{config.name}: {transformer.num_parameters(config.model):,} parameters "
            f"({transformer.num_active_parameters(config.model):,} active) on "
            f"{config.mesh.num_devices} devices ({config.mesh}); {corpus.name}: "
            f"{len(corpus.train):,} train and {len(corpus.held_out):,} held-out bytes; "
            f"matmul rate {self._peak / 1e9:.0f} GFLOP/s"
            + (f"; resuming after step {first_step}" if first_step else "")
        )

    def report(self, step: int, step_metrics: step_lib.StepMetrics, held_out: Any) -> None:
        """Writes one step's line; raises `Refused` after too many bad steps in a row."""
        step_metrics = jax.device_get(step_metrics)
        traffic = step_metrics.traffic
        rows = int(traffic.dispatch_MM.sum()) + int(traffic.combine_MM.sum())
        names = ("loss", "load_balance", "z", "grad_norm", "bad_steps")
        values = {name: float(getattr(step_metrics, name)) for name in names}
        computed_LP = np.asarray(traffic.computed_P)
        values["load_imbalance"] = metrics.load_imbalance(computed_LP, self._num_devices)
        values["rows_moved"] = float(rows)
        values["rows_padding"] = float(traffic.padding_MM.sum())
        if self._config.model.capacity_factor:
            values["assignments_dropped"] = float(traffic.dropped_ME.sum())
        if held_out is not None:
            self._held_out = values["heldout_loss"] = float(held_out)
        last = step == self._config.train.num_steps
        if step % self._config.train.log_every == 0 or last:
            self._say(step, values)
        self._writer.write(step, values)
        if step_metrics.bad_in_row >= self._config.train.max_bad_steps:
            raise Refused(
                f"loss at step {step}",
                float(step_metrics.loss),
                f"{int(step_metrics.bad_in_row)} steps in a row were not finite (grad norm "
                f"{float(step_metrics.grad_norm)}); none of them changed the model",
                "lower optimizer.learning_rate, or look at the data of these steps",
            )

    def _say(self, step: int, values: dict[str, float]) -> None:
        data_config = self._config.data
        steps_per_s, left = self._progress.update(step)
        values["tokens_per_s"] = steps_per_s * data_config.global_batch * data_config.seq_len
        flops = transformer.flops_per_token(self._config.model, data_config.seq_len)
        values["flop_utilisation"] = values["tokens_per_s"] * flops / self._peak
        held_out = "      -" if self._held_out is None else f"{self._held_out:7.4f}"
        bad = f"  bad steps {int(values['bad_steps'])}" if values["bad_steps"] else ""
        metrics.say(
            f"step {step:5d}/{self._config.train.num_steps}  loss {values['loss']:7.4f}  "
            f"held-out {held_out} (unigram {self._unigram:.4f})  "
            f"{values['tokens_per_s']:8,.0f} tokens/s  MFU {values['flop_utilisation']:5.1%}  "
            f"load max/mean {values['load_imbalance']:.2f}  rows {int(values['rows_moved']):,}  "
            f"ETA {metrics.clock(left)}{bad}"
        )

    def close(self) -> None:
        self._writer.close()


def _start_or_resume(
    config: Config, mesh: Mesh, workdir: pathlib.Path, corpus: data.Corpus, plan: plan_lib.Plan
) -> Run:
    batches = data.batches(corpus, config.data)
    folder = checkpoint.newest_good_step(workdir / "checkpoints", warn=metrics.fail)
    if folder is None:
        state = step_lib.initial_state(config, mesh)
        logical = plan_lib.Placement.contiguous(
            plan.placement.num_layers, plan.placement.num_experts, plan.placement.num_devices
        )
        if plan.digest != logical.digest:
            state = permute.apply(state, logical, plan.placement)
        return Run(state, batches, 0)
    contents = checkpoint.read_contents(folder)
    abstract = step_lib.abstract_state(config, mesh, plan.placement.num_slots)
    arrays = checkpoint.restore(folder, contents, checkpoint.flatten(abstract), plan.placement)
    batches.set_state(contents.extra["data_state"])
    return Run(checkpoint.unflatten(abstract, arrays), batches, contents.step)


def save(workdir: pathlib.Path, run: Run, plan: plan_lib.Plan, config: Config) -> None:
    """Writes checkpoints/STEP: the state, the plan, the data position."""
    arrays = checkpoint.flatten(run.state)
    axes = checkpoint.flatten(parameter.logical_axes(run.state))
    extra = {"data_state": run.batches.get_state(), "config_digest": config_lib.digest(config)}
    contents = checkpoint.Contents(run.step, checkpoint.describe(arrays, axes), plan, extra)
    checkpoint.save(workdir / "checkpoints", arrays, contents, config.train.checkpoints_kept)
