"""Every dispatch against a dense oracle: outputs, all gradients, traffic, bits.

The oracle knows nothing of devices: y_t = sum_k w_tk ffn_{e_tk}(x_t), every expert on every token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.model import moe
from moe_jax.model.dispatch import schemes
from moe_jax.placement.plan import Placement

D, F, E = 16, 24, 16


def oracle(x_TD, expert_TK, weight_TK, gate_EDF, up_EDF, down_EFD):
    hidden_TEF = jax.nn.silu(jnp.einsum("td,edf->tef", x_TD, gate_EDF))
    hidden_TEF = hidden_TEF * jnp.einsum("td,edf->tef", x_TD, up_EDF)
    y_TED = jnp.einsum("tef,efd->ted", hidden_TEF, down_EFD)
    share_TKE = jax.nn.one_hot(expert_TK, E, dtype=x_TD.dtype) * weight_TK[:, :, None]
    return jnp.einsum("tke,ted->td", share_TKE, y_TED)


def problem(seed, num_tokens, top_k, dtype=jnp.float32, routing="random", d_model=D, d_ff=F):
    """Arguments of the oracle; -1 marks positions without a token."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)  # noqa: E731
    expert_TK = np.argsort(rng.random((num_tokens, E)), axis=1)[:, :top_k]
    if routing == "one":
        expert_TK = np.broadcast_to((np.arange(top_k) + 5) % E, (num_tokens, top_k))
    if routing == "few":  # most experts get nothing
        expert_TK = np.argsort(rng.random((num_tokens, top_k)), axis=1) + E - top_k
    if routing == "holes":
        expert_TK = np.where(rng.random((num_tokens, 1)) < 0.3, -1, expert_TK)
    if routing == "none":
        expert_TK = np.full((num_tokens, top_k), -1)
    weight_TK = rng.random((num_tokens, top_k)).astype(np.float32)
    x_TD = jnp.asarray(rng.normal(size=(num_tokens, d_model)), dtype)
    weights = (normal(E, d_model, d_ff), normal(E, d_model, d_ff), normal(E, d_ff, d_model))
    return x_TD, jnp.asarray(expert_TK, jnp.int32), jnp.asarray(weight_TK), *weights


@functools.cache
def program(shape, dispatch, combine="exact", implementation="cpu", **options):
    """(outputs, traffic, gradients of sum(y * cotangent) in everything that has one), jitted."""
    compute = moe.build_dispatch(
        mesh_lib.make(*shape),
        dispatch=dispatch,
        combine=combine,
        implementation=implementation,
        **options,
    )

    def loss(x_TD, expert_TK, weight_TK, gate, up, down, table, cotangent_TD):
        y_TD, traffic = compute(x_TD, expert_TK, weight_TK, table, moe.Experts((gate, up, down)))
        return jnp.sum((y_TD * cotangent_TD).astype(jnp.float32)), (y_TD, traffic)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4, 5), has_aux=True))


def run(shape, dispatch, args, placement=None, combine="exact", **options):
    placement = placement or Placement.contiguous(1, E, shape[1])
    table = jax.tree.map(lambda t: t[0], permute.table(placement))
    slots = placement.physical_to_logical_LP[0]
    x_TD, expert_TK, weight_TK, *weights = args
    cotangent_TD = jnp.cos(jnp.arange(x_TD.size, dtype=jnp.float32)).reshape(x_TD.shape)
    placed = [weight[slots] for weight in weights]
    (_, (y_TD, traffic)), grads = program(shape, dispatch, combine, **options)(
        x_TD, expert_TK, weight_TK, *placed, table, cotangent_TD.astype(x_TD.dtype)
    )
    logical = np.argsort(slots)
    grads = [*grads[:2], *(np.asarray(grad)[logical] for grad in grads[2:])]
    return np.asarray(y_TD), [np.asarray(grad) for grad in grads], traffic


@functools.cache
def _oracle_program():
    def loss(x_TD, weight_TK, gate, up, down, expert_TK, cotangent_TD):
        y_TD = oracle(x_TD, expert_TK, weight_TK, gate, up, down)
        return jnp.sum(y_TD * cotangent_TD), y_TD

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


def run_oracle(args):
    x_TD, expert_TK, weight_TK, *weights = (
        a if jnp.issubdtype(a.dtype, jnp.integer) else a.astype(jnp.float32) for a in args
    )
    cotangent_TD = jnp.cos(jnp.arange(x_TD.size, dtype=jnp.float32)).reshape(x_TD.shape)
    (_, y_TD), grads = _oracle_program()(x_TD, weight_TK, *weights, expert_TK, cotangent_TD)
    return np.asarray(y_TD), [np.asarray(grad) for grad in grads]


def assert_close(actual, expected, tolerance):
    """Relative to the largest entry: sums of up to a few hundred terms of that size."""
    scale = np.abs(expected).max() + 1e-30
    assert np.abs(actual.astype(np.float32) - expected).max() <= tolerance * scale


BOTH = ("gathered", "exchange")
CASES = [
    *(("local", "exact", shape, 2) for shape in [(8, 1), (1, 1)]),
    ("local", "partial", (8, 1), 2),
    *(("gathered", "partial", shape, 2) for shape in [(1, 8), (8, 1)]),
    *(("exchange", "exact", shape, 2) for shape in [(1, 8), (2, 4), (8, 1), (1, 1)]),
    ("exchange", "partial", (2, 4), 2),
    ("local", "reproducible", (8, 1), 2),
    ("exchange", "reproducible", (1, 8), 2),
    ("exchange", "exact", (2, 4), 1),
    ("exchange", "partial", (2, 4), 8),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("gathered", "partial", (2, 4), 2),
            ("exchange", "exact", (4, 2), 2),
            ("exchange", "exact", (2, 4), 8),
            ("exchange", "partial", (1, 8), 2),
            ("gathered", "reproducible", (1, 8), 2),
            ("exchange", "partial", (2, 4), 1),
            *(("exchange", "reproducible", (2, 4), top_k) for top_k in (1, 8)),
            *(
                ("gathered", combine, (2, 4), top_k)
                for combine in schemes.COMBINES
                for top_k in (1, 8)
            ),
        )
    ),
]


@pytest.mark.compiled_quickly
@pytest.mark.parametrize(("dispatch", "combine", "shape", "top_k"), CASES, ids=str)
def test_outputs_and_gradients(dispatch, combine, shape, top_k):
    args = problem(0, 8 * 13, top_k)  # 13 tokens a device: a multiple of nothing
    y_TD, grads, _ = run(shape, dispatch, args, combine=combine)
    expected_TD, expected_grads = run_oracle(args)
    assert_close(y_TD, expected_TD, 3e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-6)


@pytest.mark.parametrize("dispatch", BOTH)
@pytest.mark.parametrize("combine", schemes.COMBINES)
@pytest.mark.parametrize("routing", ["one", "few", "holes", "none"])
def test_uneven_routing(dispatch, combine, routing):
    args = problem(1, 8 * 13, 2, routing=routing)
    y_TD, grads, traffic = run((2, 4), dispatch, args, combine=combine)
    expected_TD, expected_grads = run_oracle(args)
    assert_close(y_TD, expected_TD, 3e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-6)
    counts = np.bincount(np.asarray(args[1])[np.asarray(args[1]) >= 0], minlength=E)
    np.testing.assert_array_equal(traffic.computed_P, counts)


@pytest.mark.compiled_quickly
@pytest.mark.parametrize("dispatch", BOTH)
@pytest.mark.parametrize("combine", schemes.COMBINES)
def test_bfloat16(dispatch, combine):
    args = problem(2, 8 * 13, 2, dtype=jnp.bfloat16)
    y_TD, grads, _ = run((2, 4), dispatch, args, combine=combine)
    expected_TD, expected_grads = run_oracle(args)
    # 8 bits of mantissa; the longest sums are rounded a few times on their way
    assert_close(y_TD, expected_TD, 3e-2)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-2)


@pytest.mark.parametrize(
    ("combine", "wire_dtype"),
    [*((one, "") for one in schemes.COMBINES), ("exact", "float8_e4m3fn")],
)
def test_one_device_copies_no_rows(combine, wire_dtype):
    """Where all experts are at hand every dispatch is the program of `local`."""
    x_TD, expert_TK, weight_TK, *weights = problem(3, 2 * 13, 2)
    table = jax.tree.map(lambda t: t[0], permute.table(Placement.contiguous(1, E, 1)))
    args = x_TD, expert_TK, weight_TK, *weights, table, x_TD
    local, *others = (
        program((2, 1), dispatch, combine, wire_dtype=wire_dtype).lower(*args).as_text()
        for dispatch in ("local", "exchange", "gathered", "hierarchical")
    )
    assert others == [local] * 3


@pytest.mark.parametrize(
    ("dispatch", "shape"), [("exchange", (2, 4)), ("exchange", (1, 8)), ("gathered", (2, 4))]
)
def test_exact_is_bit_identical_under_placements(dispatch, shape):
    args = problem(3, 8 * 13, 2)
    expected_TD, expected_grads, _ = run(shape, dispatch, args)
    rng = np.random.default_rng(0)
    for _ in range(20):
        slots = rng.permutation(E)[None].astype(np.int32)
        y_TD, grads, _ = run(shape, dispatch, args, Placement(slots, E, shape[1]))
        np.testing.assert_array_equal(y_TD, expected_TD)
        for grad, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize("dispatch", BOTH)
def test_partial_differs_between_placements_by_rounding_only(dispatch):
    """Why `partial` promises no bits: its sums are made on the way."""
    args = problem(3, 8 * 13, 8)
    expected_TD, _, _ = run((2, 4), dispatch, args, combine="partial")
    slots = np.random.default_rng(0).permutation(E)[None].astype(np.int32)
    y_TD, _, _ = run((2, 4), dispatch, args, Placement(slots, E, 4), combine="partial")
    assert_close(y_TD, expected_TD, 1e-6)
    assert (y_TD != expected_TD).any()


def count_traffic(expert_TK, placement, data, num_devices):
    """Token by token: who sends what where, by the definition."""
    out, home, distinct = (np.zeros((num_devices, num_devices), int) for _ in range(3))
    per_device = len(expert_TK) // (data * num_devices)
    for token, experts in enumerate(np.asarray(expert_TK)):
        source = token // per_device % num_devices
        devices = [int(placement.device_LE[0, e]) for e in experts if e >= 0]
        for device in set(devices) - {source}:
            out[source, device] += 1
            distinct[source, device] += 1
        for device in devices:
            home[device, source] += device != source
    return out, home, distinct


@pytest.mark.parametrize(
    ("shape", "combine"),
    [
        *(((2, 4), "exact"), ((1, 8), "exact"), ((4, 2), "exact")),
        *(((2, 4), "partial"), ((2, 4), "reproducible")),
    ],
    ids=str,
)
@pytest.mark.parametrize("routing", ["random", "one", "holes"])
def test_exchange_traffic(shape, routing, combine):
    args = problem(4, 8 * 13, 2, routing=routing)
    slots = np.random.default_rng(1).permutation(E)[None].astype(np.int32)
    placement = Placement(slots, E, shape[1])
    _, _, traffic = run(shape, "exchange", args, placement, combine=combine)
    out, home, distinct = count_traffic(args[1], placement, *shape)
    home = home if combine == "exact" else distinct.T
    np.testing.assert_array_equal(traffic.dispatch_MM, out)
    np.testing.assert_array_equal(traffic.combine_MM, home)
    np.testing.assert_array_equal(traffic.distinct_MM, distinct)
    on_wire = out + home > 0
    assert (np.asarray(traffic.padding_MM) >= 0).all()
    assert not np.diag(traffic.padding_MM).any()
    if routing != "one":  # else all pairs of a distance are alike
        assert traffic.padding_MM.sum() > 0
        assert on_wire.any()


@pytest.mark.parametrize("combine", schemes.COMBINES)
def test_gathered_traffic(combine):
    args = problem(4, 8 * 13, 2)
    _, _, traffic = run((2, 4), "gathered", args, combine=combine)
    everything = np.full((4, 4), 2 * 13) * (1 - np.eye(4, dtype=int))
    np.testing.assert_array_equal(traffic.dispatch_MM, everything)
    each = 2 if combine == "exact" else 1
    np.testing.assert_array_equal(traffic.combine_MM, everything * each)
    _, _, distinct = count_traffic(args[1], Placement.contiguous(1, E, 4), 2, 4)
    np.testing.assert_array_equal(traffic.distinct_MM, distinct)
