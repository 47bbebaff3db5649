"""Coherent dispatch against the model on one device: logits, routing, rows, bits; its parts alone.

Every case prefills prompts of different lengths (one device starts without a token) and decodes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.errors import Refused
from moe_jax.infer.engine import homes
from moe_jax.model import cache as cache_lib
from moe_jax.model import coherent, transformer
from moe_jax.model.dispatch import stay
from moe_jax.model.dispatch.wire import LINKS, Wire
from moe_jax.placement import cost
from tests import tiny
from tests.model.test_parts import shaken

LATENT = {
    "model__latent": {"kv_rank": 6, "d_rope": 4, "d_value": 3, "query_rank": 8},
    "model__num_kv_heads": 4,
    "model__d_head": 5,
    "model__rope": {"kind": "yarn", "factor": 4.0, "original_seq_len": 8, "interleaved": True},
    "model__num_layers": 3,
    "model__num_dense_layers": 1,
    "model__d_ff_dense": 20,
    "model__d_ff_shared": 12,
}
LENGTH = np.array([12, 5, 0, 1, 7, 9, 2, 3])
CAPACITY, STEPS = 16, 2
TEXT_BS = tiny.tokens(8, CAPACITY)
REAL_BS = np.arange(12)[None] < LENGTH[:, None]


@dataclasses.dataclass(frozen=True)
class Case:
    data: int = 2
    fsdp: int = 1
    node: int = 1
    expert: int = 4
    top_k: int = 2
    combine: str = "exact"
    dtype: str = "float32"
    latent: bool = False  # attention, and a layer without experts before the others
    tensor: int = 1

    def __str__(self):
        return repr(self).replace(", tensor=1", "").replace(", latent=False", "")

    def config(self, dispatch="coherent"):
        return tiny.config(
            **(LATENT if self.latent else {}),
            mesh={
                "data": self.data,
                "fsdp": self.fsdp,
                "node": self.node,
                "expert": self.expert,
                "tensor": self.tensor,
            },
            model__dispatch=dispatch,
            model__top_k=self.top_k,
            model__combine=self.combine,
            model__dtype=self.dtype,
        )


LOCAL = Case(data=1, expert=1)
MAIN = Case()
TOP_1 = pytest.param(Case(data=1, node=2, expert=2, top_k=1), marks=pytest.mark.slow)
CASES = [
    MAIN,
    Case(data=1, fsdp=2, node=2, expert=2),
    Case(latent=True),
    pytest.param(Case(data=1, fsdp=2, node=2, expert=2, latent=True), marks=pytest.mark.slow),
    pytest.param(Case(data=1, expert=8, top_k=8, latent=True), marks=pytest.mark.slow),
    pytest.param(Case(expert=4, top_k=1, latent=True), marks=pytest.mark.slow),
    TOP_1,
    pytest.param(Case(data=1, expert=8, top_k=8, combine="partial"), marks=pytest.mark.slow),
    pytest.param(Case(data=1, expert=8, top_k=2), marks=pytest.mark.slow),
    pytest.param(Case(data=2, node=2, expert=2, top_k=2), marks=pytest.mark.slow),
    pytest.param(Case(data=4, expert=2, top_k=8), marks=pytest.mark.slow),
    pytest.param(Case(data=2, expert=4, combine="partial"), marks=pytest.mark.slow),
    pytest.param(Case(data=8, expert=1), marks=pytest.mark.slow),
    Case(data=2, expert=2, tensor=2),
    Case(data=1, expert=4, tensor=2, latent=True),
    pytest.param(Case(data=1, node=2, expert=2, top_k=1, tensor=2), marks=pytest.mark.slow),
    pytest.param(
        Case(data=1, fsdp=2, expert=2, combine="partial", tensor=2), marks=pytest.mark.slow
    ),
]


@functools.cache
def programs(case, dispatch):
    """(prefill, decode), jitted; without donation, so that one prefill serves many tests."""
    config = case.config(dispatch)
    mesh = tiny.mesh(config)
    kind = coherent if dispatch == "coherent" else transformer
    forward = kind.build_forward(config.model, mesh)
    empty = cache_lib.empty(kind.abstract_cache(config.model, len(LENGTH), CAPACITY, mesh))

    def prefill(model, table):
        token_BS, real_BS = jnp.asarray(TEXT_BS[:, :12]), jnp.asarray(REAL_BS)
        return forward(model, token_BS, table, real_BS=real_BS, cache=empty)

    def decode(model, table, token_B, position_B, cache):
        real_BS = (position_B > 0)[:, None]  # the sequence of length 0 stays empty
        return forward(
            model, token_B[:, None], table, position_BS=position_B[:, None],
            real_BS=real_BS, cache=cache,
        )  # fmt: skip

    return jax.jit(prefill), jax.jit(decode)


def run(case, dispatch, model, table, steps=STEPS):
    """Logits [B, ...] of real positions and the records, of the prefill and each decode step."""
    prefill, decode = programs(case, dispatch)
    output = prefill(model, table)
    logits, records = [np.asarray(output.logits_BSV)[REAL_BS]], [output.record]
    for step in range(steps):
        position_B = np.where(LENGTH > 0, LENGTH + step, 0).astype(np.int32)
        token_B = TEXT_BS[np.arange(8), position_B]
        output = decode(model, table, token_B, position_B, output.cache)
        logits.append(np.asarray(output.logits_BSV)[LENGTH > 0, 0])
        records.append(output.record)
    return np.concatenate(logits), records


@functools.cache
def model_of(latent):
    """On one device."""
    if not latent:
        return tiny.model(1, 1)
    return shaken(transformer.Transformer(jax.random.key(1), Case(latent=True).config().model))


@functools.cache
def oracle(top_k, even=True, latent=False):
    """(logits, records) on one device."""
    model = model_of(latent) if even else without_router(tiny.model(1, 1))
    case = dataclasses.replace(LOCAL, top_k=top_k, latent=latent)
    return run(case, "local", model, tiny.table(tiny.contiguous(1)))


def without_router(model):
    """Every token goes to the first top_k experts: equal logits are taken in their order."""
    graph = jax.tree.map(lambda leaf: leaf, model)
    graph.blocks.moe.router_DE[...] = jnp.zeros_like(graph.blocks.moe.router_DE[...])
    return graph


def placed(case, seed, model=None):
    """(model, table, placement); seed None = contiguous."""
    devices = case.node * case.expert
    contiguous = tiny.contiguous(devices)
    placement = contiguous if seed is None else tiny.random_placement(seed, devices)
    model = model_of(case.latent) if model is None else model
    # On the host: every mesh takes it.
    model = jax.tree.map(np.asarray, permute.apply(model, contiguous, placement))
    return model, tiny.table(placement), placement


def tokens_of(records, case):
    """Expert ids [T, L, K] of all tokens that had one, and their homes [T]."""
    home_B = homes(len(LENGTH), tiny.mesh(case.config()))
    ids, home = [], []
    for record in records:
        expert_LBSK = np.asarray(record.expert_BSK)
        real_BS = expert_LBSK[0, :, :, 0] >= 0
        ids.append(expert_LBSK[:, real_BS].swapaxes(0, 1))
        home.append(np.broadcast_to(home_B[:, None], real_BS.shape)[real_BS])
    return np.concatenate(ids), np.concatenate(home)


def assert_rows_predicted(records, case, placement):
    ids_TLK, home_T = tokens_of(records, case)
    predicted = cost.rows(ids_TLK, placement, "coherent", home_T=home_T, combine=case.combine)
    counted = lambda name: sum(np.asarray(getattr(r.traffic, name)) for r in records)  # noqa: E731
    np.testing.assert_array_equal(counted("dispatch_MM"), predicted.dispatch_LMM)
    np.testing.assert_array_equal(counted("combine_MM"), predicted.combine_LMM)
    computed_LP = cost.computed_LP(ids_TLK, placement, "coherent", home_T)
    np.testing.assert_array_equal(counted("computed_P"), computed_LP)
    assert (counted("padding_MM") >= 0).all()

    # Keys and values of each token go from where it is to all others; at the end rows return.
    steps = list(cost.walk(ids_TLK, placement, "coherent", home_T))
    size = placement.num_devices
    for layer, step in enumerate(steps):
        tokens_M = np.bincount(step.home_T, minlength=size)
        expected_MM = tokens_M[:, None] * (1 - np.eye(size, dtype=int))
        shared_MM = sum(np.asarray(r.apart.shared_LMM)[layer] for r in records)
        np.testing.assert_array_equal(shared_MM, expected_MM)
    expected_MM = np.zeros((size, size), int)
    np.add.at(expected_MM, (steps[-1].next_T, home_T), 1)
    np.fill_diagonal(expected_MM, 0)
    np.testing.assert_array_equal(sum(np.asarray(r.apart.home_MM) for r in records), expected_MM)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_model_on_one_device(case):
    expected, expected_records = oracle(case.top_k, latent=case.latent)
    # Latent rows are attended to as they are, in prefill too; the bound is that of test_latent.py.
    bound = 3e-5 if case.latent else 1e-5
    for seed in (None, 0):
        model, table, placement = placed(case, seed)
        logits, records = run(case, "coherent", model, table)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)
        for record, expected_record in zip(records, expected_records, strict=True):
            np.testing.assert_array_equal(record.expert_BSK, expected_record.expert_BSK)
        assert_rows_predicted(records, case, placement)


@pytest.mark.parametrize(
    "case",
    [
        MAIN,
        Case(latent=True),
        pytest.param(Case(expert=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exact_is_bit_identical_under_20_placements_and_rows_are_predicted(case):
    model, table, _ = placed(case, None)
    expected, _ = run(case, "coherent", model, table)
    moved = set()
    for seed in range(20):
        model, table, placement = placed(case, seed)
        logits, records = run(case, "coherent", model, table)
        np.testing.assert_array_equal(logits, expected)
        assert_rows_predicted(records, case, placement)
        moved.add(int(sum(np.asarray(r.traffic.dispatch_MM).sum() for r in records)))
    assert len(moved) > 5


@pytest.mark.slow
def test_reproducible_is_bit_identical_and_sends_a_row_from_each_device():
    case = dataclasses.replace(MAIN, top_k=3, combine="reproducible")
    model, table, _ = placed(case, None)
    expected, _ = run(case, "coherent", model, table, steps=0)
    alone, _ = run(dataclasses.replace(LOCAL, top_k=3), "local", tiny.model(1, 1),
                   tiny.table(tiny.contiguous(1)), steps=0)  # fmt: skip
    np.testing.assert_allclose(expected, alone, rtol=0, atol=1e-5)
    for seed in range(10):
        model, table, placement = placed(case, seed)
        logits, records = run(case, "coherent", model, table, steps=0)
        np.testing.assert_array_equal(logits, expected)
        assert_rows_predicted(records, case, placement)


@pytest.mark.parametrize("case", [MAIN, TOP_1], ids=str)
def test_all_tokens_to_the_same_experts(case):
    """After the first layer one device has all tokens, the others none."""
    expected, _ = oracle(case.top_k, even=False)
    answers = []
    for seed in (None, 0, 1):
        model, table, placement = placed(case, seed, without_router(tiny.model(1, 1)))
        logits, records = run(case, "coherent", model, table)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        assert_rows_predicted(records, case, placement)
        answers.append(logits)
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    shared_MM = np.asarray(records[0].apart.shared_LMM)[1]
    assert (shared_MM > 0).any(axis=1).sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True])
def test_bfloat16(latent):
    expected, _ = oracle(2, latent=latent)
    case = dataclasses.replace(MAIN, dtype="bfloat16", latent=latent)
    model, table, placement = placed(case, 3)
    logits, records = run(case, "coherent", model, table)
    assert_rows_predicted(records, case, placement)
    # Routing differs here and there: a token that another expert answers is off by more.
    assert np.median(np.abs(logits - expected)) < 0.02


def test_kernels_are_those_of_the_config():
    config = tiny.config(model__dispatch="coherent", model__kernels="hopper")
    with pytest.raises(Refused, match="hopper"):
        coherent.build_forward(config.model, tiny.mesh(config))


def test_one_exchange_a_layer_with_top_1():
    """And one home: counted in the program, in which the layers stand once."""
    sent = {}
    for top_k in (1, 2):
        config = dataclasses.replace(MAIN, top_k=top_k).config()
        forward = coherent.build_forward(config.model, tiny.mesh(config))
        shapes = jax.eval_shape(
            lambda c=config: transformer.Transformer(jax.random.key(0), c.model)
        )
        table = tiny.table(tiny.contiguous())
        program = str(jax.make_jaxpr(forward)(shapes, jnp.asarray(TEXT_BS), table))
        sent[top_k] = program.count("ppermute[")
    assert sent[1] > 0
    assert sent[1] * 3 == sent[2] * 2  # with top 2: out, on, home


# --- the parts -------------------------------------------------------------------------------

M, T = 8, 6


@functools.cache
def shared_program(replicas=1):
    """`share` of [replicas, X, 3] values, given where tokens are: each device packs its own."""
    axes = mesh_lib.EXPERT

    def share(value_1XZ, at_1X):
        value_XZ, at_X = value_1XZ[0], at_1X[0]
        residence = stay.Residence.of(at_X, axes, len(at_X) + 4)
        value_RZ = value_XZ[residence.token_R]
        shared_XZ = stay.share(value_RZ, residence, axes, T)
        return shared_XZ[None, None], stay.shared_padding_M(residence, T)[None, None]

    of_replica = PartitionSpec(mesh_lib.DATA)
    return jax.jit(
        jax.shard_map(
            share,
            mesh=mesh_lib.make(replicas, M // replicas),
            in_specs=(of_replica, of_replica),
            out_specs=PartitionSpec(mesh_lib.DATA, axes),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("fullest", [6, 7, 8, 10, 12, 13, 48])
def test_share(dtype, fullest):
    """At every step of the ladder, and beyond it: all rows, in every bit, on every device."""
    rng = np.random.default_rng(fullest)
    at_X = np.repeat(np.arange(M), T)
    at_X[:fullest] = 3
    at_X[fullest:][at_X[fullest:] == 3] = -1 if fullest % 2 else 5
    at_X = np.where(np.arange(M * T) < fullest, at_X, np.where(np.arange(M * T) % 7, at_X, -1))
    at_X = rng.permutation(at_X).astype(np.int32)
    value_XZ = np.round(rng.normal(size=(M * T, 3)) * 4) / (1 if dtype == "int32" else 4)
    value_XZ = jnp.asarray(value_XZ, dtype)  # some are 0, some -0
    (shared_MXZ,), (padding_MM,) = shared_program()(value_XZ[None], at_X[None])
    expected_XZ = np.where((at_X >= 0)[:, None], np.asarray(value_XZ).astype(np.float64), 0)
    for shared_XZ in np.asarray(shared_MXZ).astype(np.float64):
        np.testing.assert_array_equal(shared_XZ, expected_XZ)
        np.testing.assert_array_equal(np.signbit(shared_XZ), np.signbit(expected_XZ))
    count_M = np.bincount(at_X[at_X >= 0], minlength=M)
    sent = next((c for c in (6, 7, 8, 9, 11) if c >= count_M.max()), 12)
    np.testing.assert_array_equal(padding_MM, np.broadcast_to((sent - count_M)[:, None], (M, M)))


def test_replicas_share_as_the_fullest_of_them_needs():
    """Even in one replica, all on one device in the other: both take the other's step."""
    devices = M // 2
    at_RX = np.repeat(np.arange(devices), T)[None].repeat(2, axis=0).astype(np.int32)
    at_RX[1] = 2
    value_RXZ = np.arange(2 * devices * T * 3, dtype=np.float32).reshape(2, -1, 3)
    shared_RMXZ, padding_RMM = shared_program(2)(value_RXZ, at_RX)
    for device in range(devices):
        np.testing.assert_array_equal(np.asarray(shared_RMXZ)[:, device], value_RXZ)
    np.testing.assert_array_equal(np.asarray(padding_RMM)[0], 2 * T - T)  # by a sum over all


@pytest.mark.parametrize(("chunk", "near"), [(1, 2), (5, 2), (1, 8)])
def test_leg(chunk, near):
    """Items with nowhere to come from or to go to stay away; the others arrive once."""
    axes, num_items = mesh_lib.EXPERT, 40
    rng = np.random.default_rng(0)
    source_N, target_N = rng.integers(-1, M, (2, num_items)).astype(np.int32)
    value_ND = rng.normal(size=(num_items, 3)).astype(np.float32)

    def move(value_ND, source_N, target_N):
        leg = stay.Leg.of(source_N, target_N, Wire(axes, LINKS, chunk, 2, near), num_items)
        me = jax.lax.axis_index(axes)

        def rows_of(item_W):  # nonsense for what is not here
            return jnp.where((source_N[item_W] == me)[:, None], value_ND[item_W], jnp.nan)

        rows_RD = leg.move(rows_of, num_items, like_ZZ=value_ND, tile=4)
        came_ND = jnp.take(rows_RD, leg.position_N, axis=0, mode="fill", fill_value=0)
        return came_ND[None], leg.rows_M()[None]

    came_MND, rows_MM = jax.jit(
        jax.shard_map(
            move,
            mesh=mesh_lib.make(1, M),
            in_specs=(PartitionSpec(),) * 3,
            out_specs=PartitionSpec(axes),
            check_vma=False,
        )
    )(value_ND, source_N, target_N)
    for device in range(M):
        came_N = (source_N >= 0) & (target_N == device)
        expected_ND = np.where(came_N[:, None], value_ND, 0)
        np.testing.assert_array_equal(came_MND[device], expected_ND)
    expected_MM = np.zeros((M, M), int)
    real_N = (source_N >= 0) & (target_N >= 0) & (source_N != target_N)
    np.add.at(expected_MM, (source_N[real_N], target_N[real_N]), 1)
    np.testing.assert_array_equal(rows_MM, expected_MM)
