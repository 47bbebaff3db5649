"""A published model from its folder, its experts read straight to where a plan wants them."""

import dataclasses
import pathlib

from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import metrics
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.hf import config_json, folder, layout, load
from moe_jax.infer import prepared
from moe_jax.infer.text import Text, of_folder
from moe_jax.model import transformer
from moe_jax.placement import copies
from moe_jax.placement import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a published model before any device work.

    Attributes:
      config: with the dispatch and the mesh to serve with.
      plan: the placement to compute under.
      text: its tokenizer.
      virtual_devices: to make where the platform is the CPU.
      layout: where every parameter is in `tensors`.
      tensors: headers of its files.
    """

    config: Config
    plan: plan_lib.Plan
    text: Text
    virtual_devices: int
    layout: layout.Layout
    tensors: folder.Tensors

    @property
    def version(self) -> str:
        """What processes compare besides config and plan."""
        return self.tensors.sampled_digest()

    def model(self, mesh: Mesh) -> transformer.Transformer:
        """The parameters under the plan, as inference reads them (prepared.py)."""
        shapes = prepared.shapes(mesh, layout.abstract(self.config.model))
        model = load.parameters(
            *(self.config.model, self.layout, self.tensors, self.plan.placement, mesh),
            shapes=shapes,
        )
        metrics.say(
            f"{self.tensors.folder}: {len(self.layout.shapes):,} tensors, "
            f"{self.tensors.num_bytes:,} bytes, on {self.config.mesh}, "
            f"plan {self.plan.digest[:12]}"
        )
        if self.layout.beside:
            metrics.say(
                f"not read: {len(self.layout.beside):,} tensors of a part that is not run "
                f"({self.layout.beside[0]}, ...)"
            )
        return model


def _devices(placement: plan_lib.Placement) -> str:
    """Those of a plan: its shares of copies say how many nodes there are."""
    devices, nodes = placement.num_devices, placement.share_nodes or 1
    if nodes == 1 or devices % nodes:
        return str(devices)
    return f"node={nodes},expert={devices // nodes}"


def find(
    path: str, placement: str | None, dispatch: str | None = None, devices: str | None = None
) -> Source:
    """Reads config, plan, headers and tokenizer. Raises `Refused`; touches no device.

    Args:
      path: the model's folder.
      placement: plan to compute under; None = contiguous.
      dispatch: None = "exchange".
      devices: as `config.served`; None = those of the plan, or one.
    """
    if not pathlib.Path(path).is_dir():
        raise Refused("--hf", path, "must be the folder of a published model", "correct the path")
    plan = plan_lib.Plan.read(placement) if placement else None
    published = config_json.read(path)
    if devices is None:
        devices = _devices(plan.placement) if plan else "1"
    config = config_lib.served(published.config, dispatch, devices)
    expert_devices = config.mesh.expert_devices
    sizes = (config.model.num_plan_layers, config.model.num_experts, expert_devices)
    if plan is None:
        plan = plan_lib.Plan(plan_lib.Placement.contiguous(*sizes), config.model.moe_layer_ids)
    plan_lib.check_fits(plan, num_layers=sizes[0], num_experts=sizes[1], num_devices=sizes[2])
    plan = plan_lib.of_model(plan, config.model.moe_layer_ids)
    copies.check_nodes(plan.placement, config.mesh.node)
    tensors = folder.tensors(path)
    found = layout.find(published.family, config.model, tensors)
    text = of_folder(path, config.model.vocab_size, published.ends)
    return Source(config, plan, text, config.mesh.num_devices, found, tensors)
