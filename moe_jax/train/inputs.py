"""What a run is made from, checked before any device work: config, plan, text, work directory.

JAX is not imported here: what is wrong is said within a second, and the files of the checkpoint
that a run goes on from are being hashed while Python imports what it trains with.
"""

import dataclasses
import pathlib
from typing import Any

from moe_jax import auto, checkpoint, data
from moe_jax import config as config_lib
from moe_jax.checkpoint import integrity
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.hf import config_json
from moe_jax.hf.tokens import Tokenizer
from moe_jax.placement import copies
from moe_jax.placement import plan as plan_lib
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.train.bad_batch import BadBatch


def choose_dispatch(config: Config, workdir: pathlib.Path) -> tuple[Config, str]:
    """The config with a dispatch in the place of "auto", and what to tell people about it.

    A run that goes on keeps the one that it was started with. Raises `Refused`; writes nothing.
    """
    kept = workdir / "config.json"
    started = config_lib.read(kept) if kept.exists() else None
    if config.topology and started is None:  # one that goes on may have lost a file it needs not
        topology_lib.preset(config.topology)
    return auto.resolve(
        config,
        load_plan(config).placement,
        config_lib.check_trainable,
        fixed=started.model.dispatch if started else None,
    )


def digests_ahead(
    config: Config, workdir: pathlib.Path, share: tuple[int, int]
) -> integrity.Digests | None:
    """Begins to verify the step that `start_or_resume` will look at first, if it is to be verified.

    Args:
      config: of the run.
      workdir: with checkpoints or without.
      share: number of this process, and how many there are.
    """
    if not config.train.checkpoints_verified:
        return None
    return checkpoint.digests_ahead(workdir / "checkpoints", share)


def prepare(config: Config, workdir: pathlib.Path) -> tuple[data.Corpus, plan_lib.Plan]:
    """All checks that need files but no devices. Raises `Refused`; writes nothing."""
    config_lib.check_trainable(config)
    plan = load_plan(config)
    sizes = plan.placement.num_experts, plan.placement.num_devices, plan.layer_ids
    # whether the plan keeps them is asked where it is known: that of a step goes before this one
    pins_lib.listed("replan.pins", config.replan.pins, *sizes)
    if workdir.exists() and not workdir.is_dir():
        raise Refused("--workdir", str(workdir), "is not a directory", "name another one")
    check_same_run(config, workdir)
    corpus = data.load_corpus(config.data)
    if config.data.tokenizer:
        tokenizer = Tokenizer(workdir / config.data.tokenizer, config.model.vocab_size)
        ends = config_json.ends(workdir / config.data.tokenizer, config.model.vocab_size)
        corpus = data.tokenised(corpus, lambda text: tokenizer.corpus(text, data.SEPARATOR, ends))
        data.check_windows(corpus, config.data)
    data.held_out_windows(corpus, config.data.seq_len, config.train.eval_sequences)
    return corpus, plan


def check_same_run(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a work directory that holds a run of another config."""
    kept = workdir / "config.json"
    if not kept.exists():
        return
    old = config_lib.read(kept)
    if checkpoint.steps(workdir / "checkpoints") == [0]:  # no step was trained
        old = _with_settings(old, config)
    if config_lib.digest(old) != config_lib.digest(config):
        raise Refused(
            "--workdir",
            str(workdir),
            f"holds a run of another config ({_first_difference(old, config)})",
            "use another --workdir, or the config in its config.json",
        )


def bad_batch(config: Config, path: pathlib.Path) -> BadBatch:
    """The batch of --replay, checked against the config. Raises `Refused`."""
    shape = (config.data.global_batch, config.data.seq_len + 1)
    return BadBatch.read(path, shape, config.model.vocab_size)


def _with_settings(old: Config, new: Config) -> Config:
    """What `old` says of the weights and of their tokens, with the training that `new` says."""
    weights = {name: getattr(new.model, name) for name in config_lib.BESIDE_WEIGHTS}
    return dataclasses.replace(
        new,
        name=old.name,
        model=dataclasses.replace(old.model, **weights),
        data=dataclasses.replace(new.data, tokenizer=old.data.tokenizer),
    )


def load_plan(config: Config) -> plan_lib.Plan:
    """The plan named in the config, checked against the model; contiguous if there is none."""
    model, devices = config.model, config.mesh.expert_devices
    if not config.placement:
        sizes = (model.num_plan_layers, model.num_experts, devices)
        return plan_lib.Plan(plan_lib.Placement.contiguous(*sizes), model.moe_layer_ids)
    plan = plan_lib.Plan.read(config.placement)
    plan_lib.check_fits(
        plan, num_layers=model.num_plan_layers, num_experts=model.num_experts, num_devices=devices
    )
    copies.check_nodes(plan.placement, config.mesh.node)
    return plan_lib.of_model(plan, model.moe_layer_ids)


def _first_difference(old: Config, new: Config) -> str:
    """Of the fields that make the two another run: others may differ as well."""
    before, after = (_flat(dataclasses.asdict(config)) for config in (old, new))
    named = _flat(config_lib.identity(old)) | _flat(config_lib.identity(new))
    field = next(key for key in before if key in named and before[key] != after[key])
    return f"{field} = {before[field]!r} there, {after[field]!r} here"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
