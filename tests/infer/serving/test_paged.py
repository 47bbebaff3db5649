"""Attention over blocks: the bits of a token are its own, and its values those of a dense softmax.

Axes: as in paged.py; P positions of one text.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.infer.serving import paged

_POSITIONS, _LAYERS = 150, 2
# query heads, key/value heads, d_head, whether keys are the values (latent)
_SHAPES = {
    "multi_head": (4, 4, 16, False),
    "grouped": (8, 2, 32, False),
    "wide": (4, 1, 128, False),
    "narrow": (4, 2, 4, False),
    "latent": (4, 1, 80, True),
    "many_heads_latent": (16, 1, 48, True),
}


@jax.jit
def _mix(query_AJHQ, position_AJ, pages, table_AW, extra, window):
    layer = jnp.int32(1)
    return paged.mix(query_AJHQ, position_AJ, pages, layer, table_AW, 3.0, window, extra)


class _Text:
    """One text, written to blocks in a random order, and questions to it."""

    def __init__(self, shape: str, block_size: int, seed: int):
        self.heads, self.groups, width, latent = _SHAPES[shape]
        self.rng = rng = np.random.default_rng(seed)
        normal = functools.partial(rng.standard_normal, dtype=np.float32)
        self.query_PHQ = normal((_POSITIONS, self.heads, width))
        self.key_PGQ = normal((_POSITIONS, self.groups, width))
        self.value_PGQ = self.key_PGQ if latent else normal((_POSITIONS, self.groups, width))
        width_of_table = paged.table_width(_POSITIONS, block_size)
        blocks = width_of_table + 5
        self.table_W = rng.permutation(blocks)[:width_of_table].astype(np.int32)
        key = jnp.full((_LAYERS, blocks, self.groups, block_size, width), np.nan)
        pages = paged.Pages(key, None if latent else key.swapaxes(3, 4))
        zeros = [None if p is None else jnp.zeros(p.shape) for p in (key, pages.value_LNGQC)]
        self.pages, self.block_size = paged.Pages(*zeros), block_size
        self.write(np.arange(_POSITIONS), self.key_PGQ, self.value_PGQ)

    def write(self, at_P, key_PGQ, value_PGQ):
        self.pages = paged.write(
            self.pages,
            jnp.int32(1),
            jnp.asarray(key_PGQ),
            None if self.pages.value_LNGQC is None else jnp.asarray(value_PGQ),
            jnp.asarray(self.table_W[at_P // self.block_size]),
            jnp.asarray(at_P % self.block_size, jnp.int32),
        )

    def ask(self, position_AJ, sink_H=None, window=None):
        """What is mixed for these positions, NumPy [A, J, H, Q]; -1 is nobody."""
        query_AJHQ = self.query_PHQ[np.maximum(position_AJ, 0)]
        table_AW = np.repeat(self.table_W[None], len(position_AJ), axis=0)
        given = map(jnp.asarray, (query_AJHQ, position_AJ.astype(np.int32)))
        window = None if window is None else jnp.int32(window)
        return np.asarray(_mix(*given, self.pages, jnp.asarray(table_AW), sink_H, window))

    def dense(self, sink_H=None, window=None):
        """The oracle: float64 [P, H, Q], one softmax over all positions."""
        of_head = np.arange(self.heads) // (self.heads // self.groups)
        key_PHQ, value_PHQ = (x[:, of_head].astype(float) for x in (self.key_PGQ, self.value_PGQ))
        logits_HPS = np.einsum("phq,shq->hps", self.query_PHQ, key_PHQ) / 3
        back_PS = np.arange(_POSITIONS)[:, None] - np.arange(_POSITIONS)
        seen_PS = (back_PS >= 0) & (back_PS < (window or _POSITIONS))
        share_HPS = np.where(seen_PS, np.exp(logits_HPS), 0)
        sums_HP = share_HPS.sum(2) + (0 if sink_H is None else np.exp(sink_H)[:, None])
        return np.einsum("hps,shq->phq", share_HPS / sums_HP[:, :, None], value_PHQ)


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        *((shape, 16) for shape in _SHAPES if shape != "many_heads_latent"),
        ("latent", 32),
        pytest.param("grouped", 64, marks=pytest.mark.slow),
        pytest.param("many_heads_latent", 16, marks=pytest.mark.slow),
    ],
)
def test_bits_of_a_token_are_its_own(shape, block_size):
    text = _Text(shape, block_size, seed=len(shape))
    expected_PHQ = text.dense()
    at_P = np.arange(_POSITIONS)
    by_chunks = {}
    for chunk in (16, 5):
        padded = np.pad(at_P, (0, -_POSITIONS % chunk), constant_values=-1).reshape(-1, chunk)
        mixed = text.ask(padded).reshape(-1, *expected_PHQ.shape[1:])
        assert not mixed[_POSITIONS:].any()
        by_chunks[chunk] = mixed[:_POSITIONS]
    np.testing.assert_allclose(by_chunks[16], expected_PHQ, atol=2e-5)
    np.testing.assert_array_equal(by_chunks[5], by_chunks[16])
    for count in (1, 3, 64):  # tokens that run alone, beside others
        asked = text.rng.permutation(at_P)[:count]
        np.testing.assert_array_equal(text.ask(asked[:, None])[:, 0], by_chunks[16][asked])


def test_in_bfloat16():
    """Nothing is promoted, and what is mixed is what rounded queries, keys and values give."""
    text = _Text("grouped", 16, seed=3)
    rounded = [x.astype(ml_dtypes.bfloat16) for x in (text.query_PHQ, text.key_PGQ, text.value_PGQ)]
    text.query_PHQ, text.key_PGQ, text.value_PGQ = (x.astype(np.float32) for x in rounded)
    expected_PHQ = text.dense()
    text.query_PHQ = rounded[0]
    text.pages = jax.tree.map(lambda pages: pages.astype(jnp.bfloat16), text.pages)
    mixed_PHQ = text.ask(np.arange(_POSITIONS)[:, None])[:, 0]
    assert mixed_PHQ.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(mixed_PHQ.astype(float), expected_PHQ, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("window", [0, 1, 40])
def test_windows_and_sinks(window):
    text = _Text("grouped", 16, seed=1)
    sink_H = text.rng.standard_normal(text.heads).astype(np.float32)
    mixed = text.ask(np.arange(_POSITIONS)[:, None], jnp.asarray(sink_H), window)[:, 0]
    np.testing.assert_allclose(mixed, text.dense(sink_H, window), atol=2e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("shape", ["grouped", "latent"])
def test_what_is_no_number_stays_with_its_request(shape, number):
    """It is left in blocks that are used again, or pad a table."""
    text = _Text(shape, 16, seed=3)
    own_A1 = np.arange(20)[:, None]
    expected_A1HQ = text.ask(own_A1)
    left = np.full_like(text.key_PGQ[20:], number)
    text.write(np.arange(20, _POSITIONS), left, left)
    np.testing.assert_array_equal(text.ask(own_A1), expected_A1HQ)
