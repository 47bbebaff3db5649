"""What a run says of each step: its line, its metrics, and its end when steps stay bad.

The batch of a bad step is kept in bad_steps/STEP.npz, for `train.py --replay=FILE`.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import data, metrics
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.model import transformer
from moe_jax.train import bad_batch
from moe_jax.train import step as step_lib


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
        self._workdir = workdir
        self._unigram = data.unigram_loss(corpus, config.model.vocab_size, held_out)
        self._peak = metrics.measured_matmul_rate(mesh, dtype=config.model.dtype)
        self._progress = metrics.Progress(first_step, config.train.num_steps)
        self._held_out: float | None = None
        self._beside: dict[int, dict[str, float]] = {}
        header = {"unigram_loss": self._unigram, "corpus": corpus.name, "config": config.name}
        first = jax.process_index() == 0
        self._writer: Any = (
            metrics.Writer(workdir, header, first_step + 1) if first else metrics.NoWriter()
        )
        metrics.say(
            f"{config.name}: {transformer.num_parameters(config.model):,} parameters "
            f"({transformer.num_active_parameters(config.model):,} active) on "
            f"{config.mesh.num_devices} devices ({config.mesh}); {corpus.name}: "
            f"{len(corpus.train):,} train and {len(corpus.held_out):,} held-out tokens; "
            f"matmul rate {self._peak / 1e9:.0f} GFLOP/s"
            + (f"; resuming after step {first_step}" if first_step else "")
        )

    def beside(self, step: int, values: dict[str, float]) -> None:
        """Has these values written with those of a step that is not yet reported."""
        self._beside[step] = self._beside.get(step, {}) | values

    def report(
        self,
        step: int,
        step_metrics: step_lib.StepMetrics,
        held_out: Any,
        window_BS1: np.ndarray,
    ) -> str:
        """Writes one step's line; returns the gist. Raises `Refused` after too many bad steps."""
        step_metrics = jax.device_get(dataclasses.replace(step_metrics, expert_LBSK=None))
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
        values |= self._beside.pop(step, {})
        if held_out is not None:
            self._held_out = values["heldout_loss"] = float(held_out)
        last = step == self._config.train.num_steps
        if step % self._config.train.log_every == 0 or last:
            self._say(step, values)
        self._writer.write(step, values)
        if step_metrics.bad_in_row:
            self._bad(step, step_metrics, window_BS1)
        return f"step {step}, loss {values['loss']:.4f}, grad norm {values['grad_norm']:.4f}"

    def _bad(self, step: int, found: step_lib.StepMetrics, window_BS1: np.ndarray) -> None:
        in_row, most = int(found.bad_in_row), self._config.train.max_bad_steps
        batch = bad_batch.BadBatch(
            step, window_BS1, float(found.loss), float(found.grad_norm), float(found.loss_limit)
        )
        path = batch.write(self._workdir) if jax.process_index() == 0 else None
        kept = f"replay it: python train.py ... --replay={path}" if path else "not kept"
        metrics.fail(f"step {step} changed nothing: {batch.why()}; {kept}")
        if in_row >= most:
            raise Refused(
                f"loss at step {step}",
                float(found.loss),
                f"{in_row} steps in a row were not finite or spikes, the last one: {batch.why()}; "
                "none of them changed the model",
                "lower optimizer.learning_rate, or look at the data of these steps (--replay)",
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
