"""A dense Llama -> a work directory whose step 0 is the same function, as a mixture of experts.

    DIR/checkpoints/0/   parameters alone (train/resume.py)
    DIR/config.json      of the run
    DIR/config.py        the same, for train.py --config
    DIR/tokenizer/       the model's own tokenizer and end tokens (`data.tokenizer`)

Every expert of a layer is a copy of the layer's one MLP, and the router is the only thing that is
made: seeded, normal. Weights of the chosen experts are scaled to sum 1, so a sum of equal outputs
is that output, whatever the router says: the logits are those of the dense model within rounding.

Sparse Upcycling: Komatsuzaki et al., arXiv 2212.05055, section 2, figure 1 (their decoders choose
top 2 and normalise as well); training state begins fresh, where they carry the optimizer's over.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax import checkpoint, files, metrics
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.hf import config_json, folder, layout, load, tokens
from moe_jax.hf.families import LLAMA, UPCYCLED
from moe_jax.hf.tables import MAX_EXPERTS
from moe_jax.model.parameter import logical_axes
from moe_jax.placement import plan as plan_lib
from moe_jax.train import resume
from moe_jax.upcycle import export

TOKENIZER, CONFIG_PY = "tokenizer", "config.py"
ROUTER = "blocks.moe.router_DE"
_CONFIG_PY = '''"""The run of this folder: python train.py --config={path} --workdir={workdir}

What config.json beside this file says; until a step is trained, training settings may be changed
with --config.optimizer.learning_rate=... and the like.
"""

import json
import pathlib

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError("this config has no variants")
    kept = pathlib.Path(__file__).with_name("config.json").read_text(encoding="utf-8")
    return ml_collections.ConfigDict(json.loads(kept))
'''


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to make of a dense model.

    Attributes:
      num_experts: of each MoE layer.
      top_k: experts that a token visits.
      first_dense: the first so many layers stay as they are.
      seed: of the router.
    """

    num_experts: int = 8
    top_k: int = 2
    first_dense: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        config_lib.check_seed("--seed", self.seed)


def config(dense: Config, wanted: Wanted) -> Config:
    """The upcycled model's config, with settings for a short run on one device.

    Raises:
      Refused: naming the flag, or the field of the config that does not fit.
    """
    layers = dense.model.num_layers
    if not 0 <= wanted.first_dense < layers:
        rule = f"must leave a layer of {layers} to become a MoE layer"
        raise Refused("--first-dense", wanted.first_dense, rule, f"use 0 to {layers - 1}")
    for flag, value, least in (
        ("--num-experts", wanted.num_experts, 2),
        ("--top-k", wanted.top_k, 1),
    ):
        if value < least:
            raise Refused(flag, value, f"must be at least {least}", f"use {max(least, 2)}")
    most = MAX_EXPERTS // (layers - wanted.first_dense)
    if wanted.num_experts > most:
        rule = (
            f"must be at most {most:,}: {MAX_EXPERTS:,} in all layers, as published models may have"
        )
        raise Refused("--num-experts", wanted.num_experts, rule, "choose fewer")
    if wanted.top_k > wanted.num_experts:
        rule = f"must be at most --num-experts = {wanted.num_experts}"
        raise Refused("--top-k", wanted.top_k, rule, "choose fewer")
    model = dataclasses.replace(
        dense.model,
        num_experts=wanted.num_experts,
        top_k=wanted.top_k,
        num_dense_layers=wanted.first_dense,
        d_ff_dense=dense.model.d_ff_dense if wanted.first_dense else 0,
        router_weights="normalised",
    )
    return config_lib.from_config_dict(
        {
            "name": f"upcycled-{dense.name}",
            "model": dataclasses.asdict(model),
            "data": {
                "seq_len": min(128, model.max_seq_len),
                "global_batch": 4,
                "max_bytes": 4_000_000,
                "tokenizer": TOKENIZER,
            },
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 10, "weight_decay": 0.01},
            "train": {
                "num_steps": 100,
                "eval_every": 50,
                "eval_sequences": 8,
                "checkpoint_every": 50,
                "checkpoints_kept": 1,
            },
        }
    )


def parameters(
    dense: str | os.PathLike,
    made: Config,
    mesh: jax.sharding.Mesh,
    placement: plan_lib.Placement,
    seed: int,
) -> Any:
    """The upcycled model's parameters, in float32 as runs keep them: each dense tensor is read once
    for every expert.

    Raises:
      Refused: tensors of the folder that are missing, surplus, misshapen or not finite.
    """
    published = config_json.read(dense)
    tensors = folder.tensors(dense)
    layout.find(published.family, published.config.model, tensors)  # as itself, all accounted for
    model = dataclasses.replace(made.model, dtype="float32")
    (name,) = UPCYCLED.layouts
    return load.parameters(
        model,
        layout.of_family(UPCYCLED, name, model),
        tensors,
        placement,
        mesh,
        made={ROUTER: _router(seed)},
    )


def _router(seed: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Normal with variance 1 / D, as a router that is trained from the start has."""

    def values(shape_LDE: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.standard_normal(shape_LDE, np.float32) / np.float32(shape_LDE[1] ** 0.5)

    return values


def read_dense(dense: str | os.PathLike) -> config_json.Published:
    """config.json of a dense Llama. Raises `Refused` for any other folder."""
    if not pathlib.Path(dense).is_dir():
        raise Refused("--hf", str(dense), "must be a folder", "name that of a published model")
    published = config_json.read(dense)
    if published.family is not LLAMA:
        rule = "is not a dense model that can be upcycled: must be 'llama'"
        raise Refused("--hf", published.family.model_type, rule, "use a dense Llama")
    return published


def make(dense: str | os.PathLike, workdir: str | os.PathLike, wanted: Wanted) -> Config:
    """Writes the work directory, whole or not at all; returns its config.

    Args:
      dense: the folder of a published Llama.
      workdir: a folder that is not there, or is empty.

    Raises:
      Refused: naming file or flag, rule and fix.
    """
    folder.check_new(workdir, "--workdir")
    published = read_dense(dense)
    made = config(published.config, wanted)
    tokens.Tokenizer(dense, made.model.vocab_size)  # there, and whole
    layers = (made.model.num_plan_layers, made.model.num_experts)
    plan = plan_lib.Plan(plan_lib.Placement.contiguous(*layers, 1), made.model.moe_layer_ids)
    with folder.new(workdir, "--workdir") as out:
        model = parameters(dense, made, mesh_lib.of_config(made.mesh), plan.placement, wanted.seed)
        arrays = {f"model.{name}": leaf for name, leaf in checkpoint.flatten(model).items()}
        axes = {f"model.{n}": a for n, a in checkpoint.flatten(logical_axes(model)).items()}
        extra = {resume.ONLY: resume.MODEL, "config_digest": config_lib.digest(made)}
        infos = checkpoint.describe(arrays, axes)
        checkpoint.save(out / "checkpoints", arrays, checkpoint.Contents(0, infos, plan, extra))
        _copy_tokenizer(pathlib.Path(dense), out / TOKENIZER, published.ends)
        with files.atomic_write(out / "config.json", "w") as file:
            file.write(config_lib.to_json(made))
        with files.atomic_write(out / CONFIG_PY, "w") as file:
            file.write(_CONFIG_PY.format(path=f"DIR/{CONFIG_PY}", workdir="DIR"))
    try:
        export.check(made.model)
    except Refused as refused:
        metrics.fail(f"{workdir} cannot be published with --export: {refused}")
    return made


def _copy_tokenizer(dense: pathlib.Path, out: pathlib.Path, ends: tuple[int, ...]) -> None:
    out.mkdir()
    for name in (tokens.NAME, tokens.CONFIG, tokens.TEMPLATE):
        if (dense / name).is_file():
            shutil.copyfile(dense / name, out / name)
    said = {"eos_token_id": list(ends)} if ends else {}
    with files.atomic_write(out / config_json.GENERATION, "w") as file:
        file.write(f"{json.dumps(said)}\n")


def told(workdir: str | os.PathLike, made: Config) -> str:
    """What a work directory of `make` holds, and what to do with it."""
    from moe_jax.model import transformer

    total = transformer.num_parameters(made.model)
    active = transformer.num_active_parameters(made.model)
    return (
        f"{workdir}: {made.model.num_moe_layers} of {made.model.num_layers} layers with "
        f"{made.model.num_experts} experts, top {made.model.top_k}; {total:,} parameters, "
        f"{active:,} active\n"
        f"python infer.py --workdir={workdir} --chat --prompt=...\n"
        f"python train.py --config={workdir}/{CONFIG_PY} --workdir={workdir}"
    )
