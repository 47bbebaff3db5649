"""Overlap: the tokens of a device in a few chunks, each with a way of its own.

While the rows of one chunk travel, the experts of another compute: the compiler may do so because
chunks do not depend on one another. The degree is Tutel's (arXiv 2206.03382, section 3.3; FSMoE,
arXiv 2501.10714, chooses it from a model of the machine).

Every token goes to the same experts as without chunks and its row meets the same weights; what
differs is how many rows an expert sees at a time, and in which parts its gradient is added up. So
outputs and gradients of tokens are the same to the bit where a kernel gives a row the same bits
among few rows as among many, as the one for CPUs does, else within its rounding; the gradients of
weights are the same within rounding.

Axes: T tokens here, K top_k, D d_model.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from moe_jax.model.dispatch.traffic import Traffic

# (x_TD, slot_TK, weight_TK) -> (y_TD, Traffic)
Way = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Traffic]]


def in_chunks(way: Way, degree: int) -> Way:
    """The same way for `degree` consecutive chunks of tokens, of sizes that differ by one at most.

    No chunk is empty: fewer tokens than that go one by one.
    """

    def whole(*per_token: jax.Array) -> tuple[jax.Array, Traffic]:
        parts = [
            way(*(array[start:stop] for array in per_token))
            for start, stop in _bounds(len(per_token[0]), degree)
        ]
        rows, traffic = zip(*parts, strict=True)
        return jnp.concatenate(rows), jax.tree.map(lambda *counts: sum(counts), *traffic)

    return whole


def _bounds(num_tokens: int, degree: int) -> Iterator[tuple[int, int]]:
    count = max(1, min(degree, num_tokens))
    for i in range(count):
        yield i * num_tokens // count, (i + 1) * num_tokens // count
