"""The MoE layer: route (logical), dispatch (inside one `shard_map`), experts, combine.

Axes: B batch, S sequence, T = B * S tokens, D d_model, F d_ff, E experts, P physical experts,
K top_k, M devices on the expert axis, A rows computed on one device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.kernels import grouped_matmul
from moe_jax.model import parameter, router, shared
from moe_jax.model.dispatch import capacity as capacity_lib
from moe_jax.model.dispatch import chunks, schemes, wire
from moe_jax.model.dispatch.table import Home, Table, slots_of
from moe_jax.model.dispatch.traffic import Traffic
from moe_jax.pytree import Leaf

# of gate, up and down, and of their biases
EXPERT_AXES = (
    *(("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")),
    *(("expert", "mlp"), ("expert", "mlp"), ("expert", "embed")),
)


class MoE(nnx.Module):
    """Router [D, E] (logical) and the experts' gate and up [P, D, F] and down [P, F, D].

    `shared` is the expert of all tokens, or None; so are biases [E], [P, F], [P, F] and [P, D].
    `correction_E` moves the choice of experts (see router.py), or is None. Without a gradient and
    without decay training leaves it as it is.
    """

    def __init__(
        self,
        key: jax.Array,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        d_ff_shared: int = 0,
        shared_gate: bool = False,
        correction: bool = False,
        router_bias: bool = False,
        expert_bias: bool = False,
    ):
        r, g, u, d = jax.random.split(key, 4)
        gate, up, down, *of_biases = EXPERT_AXES
        self.router_DE = parameter.normal(r, ("embed", "router"), (d_model, num_experts), d_model)
        self.correction_E = parameter.zeros(("router",), (num_experts,)) if correction else None
        self.gate_PDF = parameter.normal(g, gate, (num_experts, d_model, d_ff), d_model)
        self.up_PDF = parameter.normal(u, up, (num_experts, d_model, d_ff), d_model)
        self.down_PFD = parameter.normal(d, down, (num_experts, d_ff, d_model), d_ff)
        self.shared = (
            shared.SharedExpert(
                jax.random.fold_in(key, 0),
                d_model=d_model,
                d_ff=d_ff_shared,
                has_gate=shared_gate,
            )
            if d_ff_shared
            else None
        )
        self.router_bias_E = parameter.zeros(("router",), (num_experts,)) if router_bias else None
        widths = (d_ff, d_ff, d_model)
        self.gate_bias_PF, self.up_bias_PF, self.down_bias_PD = (
            parameter.zeros(axes, (num_experts, width)) if expert_bias else None
            for axes, width in zip(of_biases, widths, strict=True)
        )


def experts_of(weights: MoE, dtype: Any) -> tuple[jax.Array | None, ...]:
    """Gate, up and down as they are computed with, then their biases in float32, or None."""
    matrices = (weights.gate_PDF, weights.up_PDF, weights.down_PFD)
    biases = (weights.gate_bias_PF, weights.up_bias_PF, weights.down_bias_PD)
    return (
        *(param[...].astype(dtype) for param in matrices),
        *map(parameter.value, biases),
    )


def compute_experts(
    rows_AD: jax.Array, weights: tuple[jax.Array | None, ...], group_sizes_e: jax.Array, **how: Any
) -> jax.Array:
    """The rows of the experts here.

    Args:
      weights: as of `experts_of`.
      how: activation and implementation of `grouped_ffn`.
    """
    *matrices, gate_bias_eF, up_bias_eF, down_bias_eD = weights
    with jax.named_scope("experts"):
        return grouped_matmul.grouped_ffn(
            *(rows_AD, *matrices, group_sizes_e),
            bias_gate_GF=gate_bias_eF,
            bias_up_GF=up_bias_eF,
            bias_down_GD=down_bias_eD,
            **how,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What a MoE layer reports; XLA drops what nobody reads.

    Attributes:
      expert_BSK: int32 logical ids, descending weight; -1 at positions without a token.
      traffic: rows moved and computed.
      load_balance, z: the router's losses, scalars; None where they are not computed.
      home_BS: int32 the device that held each token here, where that is not its sequence's home.
      apart: what moved beside `traffic`, see coherent.py; None for other dispatches.
    """

    expert_BSK: Leaf
    traffic: Traffic
    load_balance: Leaf
    z: Leaf
    home_BS: Leaf | None = None
    apart: Leaf | None = None


def idle_record(shape: tuple[int, ...], num_slots: int, devices: int) -> LayerRecord:
    """Of one layer that routes nothing, with the axis of layers in front.

    Args:
      shape: B, S, K.
      num_slots: P.
      devices: M.
    """
    pairs_LMM = jnp.zeros((1, devices, devices), jnp.int32)
    traffic = Traffic(
        *(pairs_LMM, pairs_LMM, pairs_LMM, pairs_LMM),
        computed_P=jnp.zeros((1, num_slots), jnp.int32),
        dropped_ME=jnp.zeros((1, devices, num_slots), jnp.int32),
    )
    expert_LBSK = jnp.full((1, *shape), -1, jnp.int32)
    return LayerRecord(expert_LBSK, traffic, load_balance=jnp.zeros(1), z=jnp.zeros(1))


MoELayer = Callable[[jax.Array, MoE, jax.Array, jax.Array, Table], tuple[jax.Array, LayerRecord]]


def build(mesh: Mesh, *, scheme: router.Scheme, **how: Any) -> MoELayer:
    """Chooses routing, dispatch and kernels once.

    Args:
      scheme: how tokens choose.
      how: rows travel and are computed: the arguments of `build_dispatch`.

    Returns:
      `layer(x_BSD, weights, turn_BS, real_BS, table) -> (y_BSD, LayerRecord)`; turns are table.py's
      `rule_position` of the tokens.
    """
    compute = build_dispatch(mesh, **how)
    by_token = mesh_lib.spec("batch", None)
    choose = jax.shard_map(
        router.chooser(scheme),
        mesh=mesh,
        in_specs=(by_token, PartitionSpec()),
        out_specs=(by_token, by_token),
    )

    def layer(x_BSD, weights, turn_BS, real_BS, table):
        batch, sequence, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        router_DE = mesh_lib.gather(weights.router_DE[...], mesh, "embed", "router")
        with jax.named_scope("route"):
            real_T = real_BS.reshape(-1)
            bias_E = parameter.value(weights.router_bias_E)
            how = (scheme, correction(weights), choose, bias_E)
            routing = router.route(x_TD, router_DE, real_T, *how)
        y_TD, traffic = compute(
            x_TD,
            routing.expert_TK,
            routing.weight_TK,
            table,
            *experts_of(weights, x_BSD.dtype),
            position_T=turn_BS.reshape(-1),
        )
        if weights.shared is not None:  # where the token is: its row does not travel
            with jax.named_scope("shared_expert"):
                whole = parameter.gathered(weights.shared, mesh, x_TD.dtype)
                y_TD = y_TD + shared.compute(x_TD, whole)
        expert_BSK = routing.expert_TK.reshape(batch, sequence, scheme.top_k)
        record = LayerRecord(expert_BSK, traffic, routing.load_balance, routing.z)
        return y_TD.reshape(x_BSD.shape), record

    return layer


def correction(weights: MoE) -> jax.Array | None:
    """What is added to the scores of experts for the choice, [E]."""
    return None if weights.correction_E is None else weights.correction_E[...]


def build_dispatch(
    mesh: Mesh,
    *,
    dispatch: str,
    combine: str,
    capacity_factor: float = 0.0,
    overlap_degree: int = 1,
    wire_dtype: str = "",
    activation: str = "swiglu",
    implementation: str | None = None,
) -> Callable[..., tuple[jax.Array, Traffic]]:
    """The part of the layer that knows where experts live, as a function of global arrays.

    Args:
      dispatch: a name in `schemes.SCHEMES`.
      combine: one of `schemes.COMBINES`.
      capacity_factor: see dispatch/capacity.py; 0 = nothing is dropped.
      overlap_degree: see dispatch/chunks.py; 1 = all tokens of a device at once.
      wire_dtype: of rows on their way to the experts: a name in quantise.DTYPES, or "" = x's.
      activation: of experts: a name in kernels/activation.py.
      implementation: of the grouped matmul; None = by platform.

    Returns:
      `compute(x_TD, expert_TK, weight_TK, table, gate_PDF, up_PDF, down_PFD, gate_bias_PF=None,
      up_bias_PF=None, down_bias_PD=None, position_T=None) -> (y_TD, Traffic)`; T is a multiple of
      the devices, P of the expert axis; positions are what copies of experts take turns by, by
      default the index.
    """
    scheme = schemes.SCHEMES[dispatch]
    # The mesh decides, not the machine: programs for a pod are also compiled elsewhere.
    platform = mesh.devices.flat[0].platform
    transport = wire.transport_of(mesh)
    axes = mesh_lib.EXPERT
    implementation = implementation or grouped_matmul.default_implementation(platform)
    vary_over = lambda axis: functools.partial(jax.lax.pcast, axis_name=axis, to="varying")  # noqa: E731
    vary_over_data, vary_over_tensor = vary_over(mesh_lib.DATA), vary_over(mesh_lib.TENSOR)
    replicas = (mesh_lib.DATA, mesh_lib.FSDP)

    def on_device(x_TD, expert_TK, weight_TK, position_T, table, *weights):
        # Weights are equal on all replicas, rows are not. Saying so here makes this the line at
        # which the gradients of the weights are summed over `data`; over `fsdp` the gradient of a
        # gather is a reduce-scatter. Each device of `tensor` computes a part of every row's result
        # from its columns of the experts, so there the gradients of tokens and weights are summed.
        weights = tuple(map(on_replica, weights, EXPERT_AXES))
        x_TD, weight_TK = vary_over_tensor(x_TD), vary_over_tensor(weight_TK)
        table = jax.tree.map(vary_over(mesh_lib.BATCH), table)

        def experts_fn(rows_AD, group_sizes_e):
            how = {"activation": activation, "implementation": implementation}
            return compute_experts(rows_AD, weights, group_sizes_e, **how)

        num_devices, num_experts = jax.lax.axis_size(axes), table.num_replicas_E.shape[0]
        capacity = capacity_lib.of_factor(
            capacity_factor, num_assignments=expert_TK.size * num_devices, num_experts=num_experts
        )
        setting = schemes.Setting(
            axes,
            num_physical=weights[0].shape[0] * num_devices,
            transport=transport,
            combine=combine,
            capacity=capacity if capacity_factor > 0 else None,
            wire_dtype=wire_dtype,
        )
        with jax.named_scope("dispatch"):
            expert_TK, dropped_E = capacity_lib.keep_within(
                expert_TK, capacity, num_experts=num_experts, axis=axes
            )
            way = chunks.in_chunks(
                lambda x_TD, slot_TK, weight_TK: scheme(
                    x_TD, slot_TK, weight_TK, experts_fn, setting
                ),
                overlap_degree,
            )
            home = Home(
                jax.lax.axis_index(axes), jax.lax.axis_size(mesh_lib.DEVICE), setting.num_local
            )
            y_TD, traffic = way(x_TD, slots_of(expert_TK, position_T, table, home), weight_TK)
        # At home, T rows, not A: and so after the sum over the experts of a token.
        y_TD = jax.lax.psum(y_TD, mesh_lib.TENSOR)
        traffic = dataclasses.replace(traffic, dropped_ME=dropped_E[None])
        return y_TD, jax.tree.map(lambda rows: jax.lax.psum(rows, replicas), traffic)

    def on_replica(weight, names):
        if weight is None:
            return None
        weight = vary_over_data(weight)
        if names == EXPERT_AXES[-1]:  # what is added to whole sums is added by one of their parts
            weight = jnp.where(jax.lax.axis_index(mesh_lib.TENSOR) == 0, weight, 0)
        if "embed" not in names:
            return jax.lax.pcast(weight, axis_name=mesh_lib.FSDP, to="varying")
        if mesh_lib.size(mesh, mesh_lib.FSDP) == 1:
            return weight  # XLA would copy on CPU what it gathers from one: transposed, and back
        return jax.lax.all_gather(weight, mesh_lib.FSDP, axis=names.index("embed"), tiled=True)

    tokens = mesh_lib.spec("batch", None)
    experts = tuple(mesh_lib.spec(*names) for names in EXPERT_AXES)
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, mesh_lib.spec("batch"), PartitionSpec(), *experts),
        out_specs=(tokens, PartitionSpec(mesh_lib.EXPERT)),
    )

    def compute(x_TD, expert_TK, weight_TK, table, *weights, position_T=None):
        if position_T is None:
            position_T = jnp.arange(len(x_TD), dtype=jnp.int32)
        weights += (None,) * (len(EXPERT_AXES) - len(weights))
        return sharded(x_TD, expert_TK, weight_TK, position_T, table, *weights)

    return compute
