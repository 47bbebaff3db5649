"""The MoE layer: route (logical), dispatch (inside one `shard_map`), experts, combine.

Axes: B batch, S sequence, T = B * S tokens, D d_model, F d_ff, E experts, P physical experts,
K top_k, M devices on the expert axis, A rows computed on one device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.kernels import grouped_matmul
from moe_jax.model import parameter, router
from moe_jax.model.dispatch import schemes
from moe_jax.model.dispatch.traffic import Traffic


class MoE(nnx.Module):
    """Router [D, E] (logical) and the experts' gate and up [P, D, F] and down [P, F, D]."""

    def __init__(self, key: jax.Array, *, d_model: int, d_ff: int, num_experts: int):
        r, g, u, d = jax.random.split(key, 4)
        up = ("expert", "embed", "mlp")
        self.router_DE = parameter.normal(r, ("embed", "router"), (d_model, num_experts), d_model)
        self.gate_PDF = parameter.normal(g, up, (num_experts, d_model, d_ff), d_model)
        self.up_PDF = parameter.normal(u, up, (num_experts, d_model, d_ff), d_model)
        self.down_PFD = parameter.normal(
            d, ("expert", "mlp", "embed"), (num_experts, d_ff, d_model), d_ff
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What a MoE layer reports; XLA drops what nobody reads.

    Attributes:
      expert_BSK: int32 logical ids, descending weight; -1 at positions without a token.
      traffic: rows moved and computed.
      load_balance, z: the router's losses, scalars.
    """

    expert_BSK: jax.Array
    traffic: Traffic
    load_balance: jax.Array
    z: jax.Array


MoELayer = Callable[[jax.Array, MoE, jax.Array, schemes.Table], tuple[jax.Array, LayerRecord]]


def build(mesh: Mesh, *, dispatch: str, top_k: int, implementation: str | None = None) -> MoELayer:
    """Chooses routing, dispatch and kernels once.

    Args:
      dispatch: a name in `schemes.SCHEMES`.
      implementation: of the grouped matmul; None = by platform.

    Returns:
      `layer(x_BSD, weights, real_BS, table) -> (y_BSD, LayerRecord)`.
    """
    scheme = schemes.SCHEMES[dispatch]

    def on_device(x_TD, expert_TK, weight_TK, table, gate_eDF, up_eDF, down_eFD):
        # Weights are equal on all data replicas, rows are not: say so once, here, so that the
        # gradients of the weights are summed over `data` at this line.
        vary = functools.partial(jax.lax.pcast, axis_name=mesh_lib.DATA, to="varying")
        gate_eDF, up_eDF, down_eFD = vary(gate_eDF), vary(up_eDF), vary(down_eFD)
        table = jax.tree.map(lambda t: _vary_over_all(t), table)

        def experts_fn(rows_AD, group_sizes_e):
            with jax.named_scope("experts"):
                return grouped_matmul.grouped_ffn(
                    rows_AD,
                    gate_eDF,
                    up_eDF,
                    down_eFD,
                    group_sizes_e,
                    implementation=implementation,
                )

        num_physical = gate_eDF.shape[0] * jax.lax.axis_size(mesh_lib.EXPERT)
        y_TD, traffic = scheme(
            x_TD,
            expert_TK,
            weight_TK,
            table,
            experts_fn,
            num_physical=num_physical,
            axis=mesh_lib.EXPERT,
        )
        return y_TD, jax.tree.map(lambda rows: jax.lax.psum(rows, mesh_lib.DATA), traffic)

    tokens = mesh_lib.spec("batch", None)
    experts = mesh_lib.spec("expert", None, None)
    from_source = PartitionSpec(mesh_lib.EXPERT)
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, PartitionSpec(), experts, experts, experts),
        out_specs=(tokens, from_source),
    )

    def layer(x_BSD, weights, real_BS, table):
        batch, sequence, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        with jax.named_scope("route"):
            routing = router.route_top_k(x_TD, weights.router_DE[...], real_BS.reshape(-1), top_k)
        with jax.named_scope("dispatch"):
            cast = functools.partial(_cast, dtype=x_BSD.dtype)
            y_TD, traffic = sharded(
                x_TD,
                routing.expert_TK,
                routing.weight_TK,
                table,
                cast(weights.gate_PDF),
                cast(weights.up_PDF),
                cast(weights.down_PFD),
            )
        expert_BSK = routing.expert_TK.reshape(batch, sequence, top_k)
        record = LayerRecord(expert_BSK, traffic, routing.load_balance, routing.z)
        return y_TD.reshape(x_BSD.shape), record

    return layer


def _cast(param: Any, dtype: jnp.dtype) -> jax.Array:
    return param[...].astype(dtype)


def _vary_over_all(array: jax.Array) -> jax.Array:
    return jax.lax.pcast(array, mesh_lib.AXES, to="varying")
