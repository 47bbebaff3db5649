"""One bad step again: train.py ... --replay=bad_steps/STEP.npz, on the state that it met.

The state is that of the newest good checkpoint before the step, brought up to it with the run's
own batches (a fresh one, if there is none); bad steps change nothing, so on the mesh of the run it
has the bits that it had. Nothing is written.
"""

import pathlib

import jax
import numpy as np

from moe_jax import checkpoint, data, metrics
from moe_jax import mesh as mesh_lib
from moe_jax.config import Config
from moe_jax.placement import plan as plan_lib
from moe_jax.train import resume
from moe_jax.train import step as step_lib
from moe_jax.train.bad_batch import BadBatch
from moe_jax.train.resume import put_table


def replay(
    config: Config,
    workdir: pathlib.Path,
    corpus: data.Corpus,
    plan: plan_lib.Plan,
    batch: BadBatch,
) -> bool:
    """Runs the step and says what came of it; whether loss and gradient norm have the old bits."""
    mesh = mesh_lib.of_config(config.mesh)
    run, plan = resume.start_or_resume(config, mesh, workdir, corpus, plan, before=batch.step)
    table = put_table(mesh, plan)
    train_step = step_lib.build_step(config, mesh)
    metrics.say(f"step {batch.step} again, from step {run.step} on")
    for _ in range(run.step + 1, batch.step):
        window_BS1 = mesh_lib.put_batch(mesh, next(run.batches))
        run.state, _ = train_step(run.state, window_BS1, table)
    own = np.array_equal(next(run.batches), batch.window_BS1)
    window_BS1 = mesh_lib.put_batch(mesh, batch.window_BS1)
    blame = step_lib.build_blame(config, mesh)(run.state.model, window_BS1, table)
    _, found = jax.device_get(train_step(run.state, window_BS1, table))
    again = BadBatch(
        batch.step,
        batch.window_BS1,
        float(found.loss),
        float(found.grad_norm),
        float(found.loss_limit),
    )
    same = np.array_equal(
        [batch.loss, batch.grad_norm], [again.loss, again.grad_norm], equal_nan=True
    )
    metrics.say(f"then: {batch.why()}\nnow:  {again.why() if found.bad_in_row else 'a good step'}")
    metrics.say(f"loss {again.loss!r}, grad norm {again.grad_norm!r}, limit {again.loss_limit!r}")
    metrics.say(f"the batch is the one that the data has for this step: {_word(own)}")
    metrics.say(f"loss and grad norm have the bits that they had: {_word(same)}")
    for line in _not_finite(blame):
        metrics.say(line)
    return same


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def _not_finite(blame) -> list[str]:
    """A line for each of the first gradients that are not finite, and their number."""
    counts = {name: int(count) for name, count in checkpoint.flatten(blame).items()}
    bad = [name for name, count in counts.items() if count]
    lines = [f"  {name}: {counts[name]} values are not finite" for name in bad[:5]]
    return [f"gradients that are not finite: {len(bad)} of {len(counts)} arrays", *lines]
