"""`model.dispatch = "auto"`: the dispatch that the cost model finds fastest on mesh and topology.

What runs is decided once, before any device work, and said with the figures it was decided by.
Rows are those of the plan on a recorded trace (`config.trace`) or, without one, on tokens that
choose their experts uniformly; seconds are those of placement/seconds.py on `config.topology`.

`shuffled` is not among the candidates, and the choice says so: it splits attention by heads over
the expert axis, for which the activations of every layer are gathered and scattered (the bytes of
`gathered`, placement or not) before a row goes to an expert. It is worth its bytes only where
attention has to be split, and that is not this model's to decide.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.placement import cost
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Placement
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.routing import trace as trace_lib

# In the order of preference where seconds are equal.
CANDIDATES = ("local", "exchange", "hierarchical", "gathered", "coherent")
SAMPLE = 4096  # tokens that rows are counted on
SPLITS = (
    "shuffled: it splits attention too, which gathers and scatters every layer's activations; "
    "where attention has to be split, name it"
)


@dataclasses.dataclass(frozen=True)
class Option:
    """What the cost model says of one dispatch.

    Attributes:
      dispatch: its name.
      rows_out, rows_back: per token and layer, over all links.
      slow: of both, between nodes.
      seconds: a MoE layer forward, mean over layers.
    """

    dispatch: str
    rows_out: float
    rows_back: float
    slow: float
    seconds: float


def resolve(
    config: Config,
    placement: Placement,
    check: Callable[[Config], None] | None = None,
    fixed: str | None = None,
) -> tuple[Config, str]:
    """The config with a dispatch in the place of "auto", and what to tell people about it.

    Args:
      config: validated; returned as it is (and "") where it names its dispatch.
      placement: that the model runs under.
      check: raises `Refused` of a dispatch that this run cannot have; None = it can have any.
      fixed: the dispatch of a run that goes on: kept, not chosen again.

    Returns:
      The config, and lines to print: rows, seconds, the choice, and what was not asked and why.

    Raises:
      Refused: a topology or a trace that does not fit the mesh or the model; no dispatch is left.
    """
    if config.model.dispatch != config_lib.AUTO:
        return config, ""
    if fixed is not None:
        return config_lib.with_dispatch(
            config, fixed
        ), f"dispatch {fixed}: this run was started with it"
    topology = topology_of(config)
    ids_TLK, routing = _routing(config, placement)
    options, reasons, refusals = [], [SPLITS], {}
    for dispatch in CANDIDATES:
        try:
            tried = config_lib.with_dispatch(config, dispatch)
            if check:
                check(tried)
        except Refused as refused:
            refusals[dispatch] = refused
            if dispatch != "local":
                reasons.append(f"{dispatch}: {refused.field} = {refused.value!r} {refused.rule}")
            continue
        if dispatch == "local":
            return tried, "dispatch local: every expert is on the device of its tokens"
        if dispatch == "hierarchical" and config.mesh.node == 1:
            reasons.append("hierarchical: the mesh has one node (mesh.node = 1)")
            continue
        option = judge(
            *(dispatch, ids_TLK, placement, topology),
            work=work_of(config),
            combine=config.model.combine,
            devices_per_node=config.mesh.expert,
            widths=widths_of(config),
        )
        options.append(option)
    if not options:  # it is the model that is refused, in any dispatch
        raise refusals["exchange"]
    best = min(options, key=lambda option: option.seconds)  # the first of equal ones
    return config_lib.with_dispatch(config, best.dispatch), _text(
        config, topology, routing, options, best, reasons
    )


def resolve_unplanned(
    config: Config, check: Callable[[Config], None] | None = None
) -> tuple[Config, str]:
    """`resolve` under the contiguous placement."""
    model, devices = config.model, config.mesh.expert_devices
    contiguous = Placement.contiguous(model.num_plan_layers, model.num_experts, devices)
    return resolve(config, contiguous, check)


def topology_of(config: Config) -> Topology:
    """The machine that experts are split over: `config.topology`, or common links of the platform.

    Raises:
      Refused: one of other sizes than the mesh.
    """
    mesh = config.mesh
    devices = mesh.expert_devices
    if not config.topology:
        made = topology_lib.nodes_by_devices(mesh.node, devices)
        if config.platform != "cpu":
            return made
        fast, slow = topology_lib.preset("cpu8"), topology_lib.preset("box2x4")
        return dataclasses.replace(
            made, fast=fast.fast, slow=slow.slow, device_flops=fast.device_flops
        )
    found = topology_lib.preset(config.topology)
    if found.num_devices != devices or (mesh.node > 1 and found.devices_per_node != mesh.expert):
        raise Refused(
            "topology",
            config.topology,
            f"has {found.shape} devices, and experts are split over {mesh.node} x {mesh.expert} "
            "(mesh.node x mesh.expert)",
            "name a topology of these sizes, a .json of your own, or set topology = ''",
        )
    return found


def work_of(config: Config) -> Work:
    """Sizes of a MoE layer for the tokens that one copy of all experts serves.

    Over `tensor` one device's part: its columns of experts, keys and values of its heads. Latent
    rows are not split.
    """
    model, mesh = config.model, config.mesh
    tokens = config.data.global_batch * config.data.seq_len
    return Work(
        d_model=model.d_model,
        d_ff=model.d_ff // mesh.tensor,
        num_shared_experts=int(model.d_ff_shared > 0),
        d_ff_shared=model.d_ff_shared // mesh.tensor,
        value_bytes=2 if model.dtype == "bfloat16" else 4,
        kv_values=model.kv_values // (1 if model.latent.kv_rank else mesh.tensor),
        batch_tokens=max(tokens // (mesh.data * mesh.fsdp), 1),
    )


def widths_of(config: Config) -> tuple[float, float]:
    """Bytes of a row on its way to its experts and home in a forward pass, in `Work.row_bytes`."""
    model = config.model
    row_bytes = work_of(config).row_bytes
    out = model.d_model + 4 if model.wire_dtype else row_bytes  # quantise.py: and a scale
    back = 4 * model.d_model if model.combine == "reproducible" else row_bytes
    return out / row_bytes, back / row_bytes


def judge(
    dispatch: str,
    ids_TLK: np.ndarray,
    placement: Placement,
    topology: Topology,
    *,
    work: Work,
    combine: str,
    devices_per_node: int,
    widths: tuple[float, float] = (1.0, 1.0),
) -> Option:
    """Rows and seconds of one dispatch on these tokens, whose homes are taken as uniform.

    Args:
      dispatch: of CANDIDATES, not "local"; or "shuffled".
      ids_TLK: experts of T tokens in every layer.
      placement: of as many devices as the topology has.
      topology: links and device speed.
      work: sizes of a layer and a step.
      combine: where rows are summed.
      devices_per_node: of the mesh, by which a program takes near copies.
      widths: of rows, as `widths_of`.
    """
    where = (devices_per_node, None, work.batch_tokens)
    rows = cost.rows(ids_TLK, placement, dispatch, None, combine, *where)
    computed_LM = cost.computed_LM(ids_TLK, placement, dispatch, None, *where)
    sizes = (topology, work, dispatch, len(ids_TLK))
    spent = seconds_lib.seconds(rows, computed_LM, *sizes, widths=widths)
    each = ids_TLK.shape[0] * ids_TLK.shape[1]
    return Option(
        dispatch,
        float(rows.dispatch_LMM.sum()) / each,
        float(rows.combine_LMM.sum()) / each,
        float((rows.total_LMM * ~topology.nodes.same_MM).sum()) / each,
        float(spent.total_L.mean()),
    )


def _routing(config: Config, placement: Placement) -> tuple[np.ndarray, str]:
    """Experts of some tokens [T, L, K], and where they come from."""
    model = config.model
    if not config.trace:
        rng = np.random.default_rng(0)
        shape = (min(SAMPLE, 2**24 // (model.num_plan_layers * model.num_experts)) or 1,)
        score_TLE = rng.random((*shape, model.num_plan_layers, model.num_experts), np.float32)
        ids_TLK = np.argpartition(score_TLE, model.top_k - 1, axis=-1)[..., : model.top_k]
        return ids_TLK, "experts chosen uniformly (config.trace = '')"
    trace = trace_lib.load(config.trace, model.num_experts)
    found = (trace.num_layers, trace.num_experts, trace.top_k)
    wanted = (placement.num_layers, model.num_experts, model.top_k)
    if found != wanted:
        raise Refused(
            "trace",
            config.trace,
            "has {} layers, {} experts, top {}; the model has {}, {}, {}".format(*found, *wanted),
            "record one of this model: python infer.py --workdir=DIR --record=TRACE.npz",
        )
    every = max(trace.num_tokens // SAMPLE, 1)
    return trace.expert_ids_TLK[::every], f"routing of {config.trace}"


def _text(config, topology, routing, options, best, reasons) -> str:
    lines = [
        f"dispatch auto on {topology.name} ({topology.shape} devices), {routing}, combine "
        f"{config.model.combine}; predicted, forward:",
        "  dispatch      rows out   back  between nodes  a layer",
    ]
    for option in options:
        chosen = "  <- chosen" if option is best else ""
        lines.append(
            f"  {option.dispatch:12} {option.rows_out:9.3f} {option.rows_back:6.3f} "
            f"{option.slow:14.3f}  {option.seconds * 1e3:.3g} ms{chosen}"
        )
    return "\n".join([*lines, *(f"  not {reason}" for reason in reasons)])
