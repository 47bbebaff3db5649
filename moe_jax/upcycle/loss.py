"""Held-out loss of a run's newest step, and of the dense model that it came from, on one text."""

import os
import pathlib

import numpy as np
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import data, permute
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import folder, layout
from moe_jax.hf import load as hf_load
from moe_jax.infer import load
from moe_jax.model.dispatch.table import Table
from moe_jax.placement.plan import Placement
from moe_jax.train import inputs
from moe_jax.train import step as step_lib
from moe_jax.upcycle import make


def compare(workdir: str, dense: str | os.PathLike | None, sequences: int) -> str:
    """Nats a token of the run, of the dense model if there is one, and their difference.

    Args:
      workdir: of an upcycled run.
      dense: folder of the published dense model.
      sequences: held-out windows, the same for both.

    Raises:
      Refused: no run, no good step, too few windows, or a folder that is no dense model of such
        text.
    """
    source = load.find(workdir, None)
    read = None if dense is None else _read(dense, source.config)
    corpus, _ = inputs.prepare(source.config, pathlib.Path(workdir))
    window_BS1 = data.held_out_windows(corpus, source.config.data.seq_len, sequences)
    mesh_lib.initialize(source.config.platform, source.virtual_devices, "off")
    mesh = mesh_lib.of_config(source.config.mesh)
    model = load.parameters(source, mesh)
    table = permute.table(source.contents.plan.placement)
    ours_B = _losses(source.config, mesh, model, table, window_BS1)
    del model
    ours = f"step {source.contents.step}: {_told(ours_B)} nats a token"
    if read is None:
        return ours
    config, tensors, found = read
    mesh, idle = mesh_lib.of_config(config.mesh), Placement.contiguous(1, 1, 1)
    model = hf_load.parameters(config.model, found, tensors, idle, mesh)
    dense_B = _losses(config, mesh, model, permute.table(idle), window_BS1)
    better = int((ours_B < dense_B).sum())
    return (
        f"{ours}\n{dense}: {_told(dense_B)} nats a token\n"
        f"difference {_told(ours_B - dense_B)}; the run is better in {better} of {len(dense_B)} "
        f"windows{' (+- is a standard error over windows)' if len(dense_B) > 1 else ''}"
    )


def _read(
    dense: str | os.PathLike, run: config_lib.Config
) -> tuple[config_lib.Config, folder.Tensors, layout.Layout]:
    """Config and headers of the dense model, if it reads the run's windows. Raises `Refused`."""
    published = make.read_dense(dense)
    theirs, fix = published.config.model, "name the dense model that the run came from"
    if theirs.vocab_size != run.model.vocab_size:
        rule = f"must be the run's model.vocab_size = {run.model.vocab_size}: it reads its tokens"
        raise Refused("--hf", f"vocab_size {theirs.vocab_size}", rule, fix)
    if theirs.max_seq_len < run.data.seq_len:
        rule = f"must be at least the run's data.seq_len = {run.data.seq_len}: it reads its windows"
        raise Refused("--hf", f"max_position_embeddings {theirs.max_seq_len}", rule, fix)
    tensors = folder.tensors(dense)
    found = layout.find(published.family, theirs, tensors)
    return published.config, tensors, found


def _told(value_B: np.ndarray) -> str:
    if len(value_B) == 1:
        return f"{value_B[0]:.4f}"
    return f"{value_B.mean():.4f} +- {value_B.std(ddof=1) / len(value_B) ** 0.5:.4f}"


def _losses(
    config: config_lib.Config, mesh: Mesh, model: object, table: Table, window_BS1: np.ndarray
) -> np.ndarray:
    """Of each window alone, float64 [B]: a batch is one window, for each device that splits it."""
    evaluate = step_lib.build_eval(config, mesh)
    copies = (mesh_lib.size(mesh, mesh_lib.BATCH), 1)
    return np.array(
        [
            float(evaluate(model, mesh_lib.put_batch(mesh, np.tile(one_S1, copies)), table))
            for one_S1 in window_BS1
        ]
    )
