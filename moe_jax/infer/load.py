"""A trained model from its work directory, its experts where a plan wants them.

A source, this one or that of a published model (published.py), is what is known before any device
work: `config`, `plan`, `text`, `virtual_devices`, and `model(mesh)`, which reads the parameters.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax import checkpoint, files, metrics, permute
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import integrity
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer import published
from moe_jax.infer import text as text_lib
from moe_jax.infer.engine import Engine
from moe_jax.infer.prepared import prepared
from moe_jax.infer.text import Bytes, Text
from moe_jax.model import transformer
from moe_jax.model.parameter import logical_axes, with_slots
from moe_jax.placement import copies
from moe_jax.placement import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a run before any device work.

    Attributes:
      config: the run's, with the dispatch to serve with.
      folder: the step directory.
      contents: what it holds.
      plan: the placement to compute under.
      text: bytes, or the run's tokenizer.
    """

    config: Config
    folder: pathlib.Path
    contents: checkpoint.Contents
    plan: plan_lib.Plan
    text: Text = dataclasses.field(default_factory=Bytes)

    @property
    def version(self) -> str:
        """What processes compare besides config and plan."""
        return files.sha256_file(self.folder / integrity.MANIFEST)  # the digests of all its files

    @property
    def virtual_devices(self) -> int:
        """Those of all the processes that trained, in one; 0 = devices are real."""
        made = self.config.virtual_devices
        return made and max(made, self.config.mesh.num_devices)

    def model(self, mesh: Mesh) -> transformer.Transformer:
        """Reads the parameters, permutes them if another plan was asked for."""
        stored = self.contents.plan.placement
        model = parameters(self, mesh)
        if stored.digest != self.plan.digest:
            metrics.say(
                f"moving experts: stored as plan {stored.digest[:12]}, "
                f"computing under {self.plan.digest[:12]}"
            )
            model = permute.apply(model, stored, self.plan.placement)
        return model


def find(
    workdir: str,
    placement: str | None,
    dispatch: str | None = None,
    devices: str | None = None,
    ahead: integrity.Digests | None = None,
) -> Source:
    """Reads config, newest good step and plan. Raises `Refused`; touches no device.

    Args:
      workdir: of a training run.
      placement: plan to compute under; None = the one stored with the step; where that does not go
        with the mesh, contiguous.
      dispatch: to serve with; None = the one of the run's config.
      devices: as `config.served`; None = the mesh of the run's config.
      ahead: digests of a step that have begun already.
    """
    root = pathlib.Path(workdir)
    kept = root / "config.json"
    if not kept.is_file():
        raise Refused(
            "--workdir",
            workdir,
            "must be the work directory of a training run (it has no config.json)",
            "train first: python train.py --config=configs/quickstart.py --workdir=DIR",
        )
    config = config_lib.served(config_lib.read(kept), dispatch, devices)
    verify = config.train.checkpoints_verified
    found = checkpoint.newest_good(root / "checkpoints", _warn, verify=verify, ahead=ahead)
    if found is None:
        raise Refused("--workdir", workdir, "has no checkpoint", "train at least one interval")
    folder, contents = found
    if not verify:
        _warn(
            f"step {contents.step}: its digests were not compared "
            "(train.checkpoints_verified = False in the run's config.json)"
        )
    slots, holders = contents.plan.placement.num_slots, config.mesh.expert_devices
    if slots % holders:
        raise Refused(
            "mesh",
            str(config.mesh),
            f"splits experts over {holders} devices, which do not divide the {slots} slots that "
            "the step has them in",
            "choose --devices that do, or move them to a plan for these devices first: "
            "python -m moe_jax.placement apply PLAN WORKDIR OUT",
        )
    plan = plan_lib.Plan.read(placement) if placement else _here(contents.plan, config)
    plan_lib.check_fits(
        plan,
        num_layers=config.model.num_plan_layers,
        num_experts=config.model.num_experts,
        num_devices=holders,
    )
    ids = config.model.moe_layer_ids
    # The step's arrays lie as its plan says, whatever it calls their layers.
    plan = plan_lib.of_model(plan, ids) if placement else dataclasses.replace(plan, layer_ids=ids)
    copies.check_nodes(plan.placement, config.mesh.node)
    return Source(config, folder, contents, plan, text_lib.of_run(root, config))


def on_devices(config: Config, num_devices: int) -> Config:
    """The config on so many devices: without its data-parallel axes where all are not there.

    They split batches and the storage of weights; what experts are split over is the plan's.
    """
    if config.mesh.num_devices <= num_devices:
        return config
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=1)
    if mesh.num_devices > num_devices:
        return config  # `check_devices` says what is missing
    metrics.say(f"{num_devices} devices, where the run had {config.mesh.num_devices}: {mesh}")
    return dataclasses.replace(config, mesh=mesh)


def _here(stored: plan_lib.Plan, config: Config) -> plan_lib.Plan:
    """The stored order of experts on the devices that the config has now.

    These are others where --devices asks for them, and where a run was started on another mesh: it
    has config.json of that one before it saves a step. Shares of copies are a node's, so they go
    with its number of nodes. Two copies that would meet on a device leave contiguous experts.
    """
    old, devices = stored.placement, config.mesh.expert_devices
    share_LNP, nodes = old.share_LNP, old.share_nodes or config.mesh.node
    if (old.num_devices, nodes) == (devices, config.mesh.node):
        return stored
    if nodes != config.mesh.node:
        share_LNP = None
    slots_LP = old.physical_to_logical_LP
    try:
        placement = plan_lib.Placement(slots_LP, old.num_experts, devices, share_LNP)
    except Refused as error:
        _warn(f"the step's plan is not for {config.mesh}: contiguous experts ({error.rule})")
        sizes = (old.num_layers, old.num_experts, devices)
        return plan_lib.Plan(plan_lib.Placement.contiguous(*sizes), stored.layer_ids)
    if nodes != config.mesh.node:
        rule = f"not {config.mesh.node}: the copy rule is `local` here"
        _warn(f"the step's plan shares copies between {nodes} node(s), {rule}")
    return plan_lib.Plan(placement, stored.layer_ids)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)  # metrics.fail would ask JAX which process this is


def engine(source: Source | published.Source, mesh: Mesh) -> Engine:
    """Reads the parameters, to where the source's plan wants them."""
    table = permute.table(source.plan.placement)
    return Engine(source.config, mesh, model(source, mesh), table)


def model(source: Source | published.Source, mesh: Mesh) -> transformer.Transformer:
    """The parameters for inference, where the source's plan wants them; see prepared.py."""
    return prepared(source.config.model, mesh, source.model(mesh), use_up=True)


def parameters(source: Source, mesh: Mesh) -> transformer.Transformer:
    """The model as it is stored."""
    config = source.config
    shapes = jax.eval_shape(lambda: transformer.Transformer(jax.random.key(0), config.model))
    shapes = with_slots(shapes, source.contents.plan.placement.num_slots)
    axes = logical_axes(shapes)

    def target(shape: Any, names: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        placed = mesh_lib.sharding(mesh, *names)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)

    abstract = jax.tree.map(target, shapes, axes)
    named = {f"model.{name}": leaf for name, leaf in checkpoint.flatten(abstract).items()}
    arrays = checkpoint.restore(source.folder, source.contents, named, None)
    return checkpoint.unflatten(
        abstract, {name.removeprefix("model."): array for name, array in arrays.items()}
    )
