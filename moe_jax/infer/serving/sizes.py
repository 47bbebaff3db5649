"""Sizes of an engine that suit a model and a mesh."""

from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.errors import Refused
from moe_jax.infer.serving.scheduler import Limits

BLOCK_SIZE, CHUNK = 16, 16
_CONTEXT = 4096  # where nothing is said, at most
_SEATS = 64  # over all shards, at least
_CHUNK_ROWS, _LEAST_CHUNK_ROWS = 16, 4  # over all shards; on each, at least


def limits(
    model: ModelConfig,
    mesh: Mesh,
    *,
    context: int | None = None,
    seats: int | None = None,
    cache_tokens: int | None = None,
    budget: int | None = None,
) -> Limits:
    """Args:
    context: tokens of prompt and answer together; None = the model's, at most 4,096, or what the
      cache has room for.
    seats: requests that run at once, over all shards, rounded up to the same number on each.
    cache_tokens: positions over all shards; None = room for half of all seats at full context.
    budget: tokens in a step; None = every row of a step may be used.
    """
    shards = mesh_lib.size(mesh, mesh_lib.BATCH)
    max_len = min(model.max_seq_len, _CONTEXT) if context is None else context
    for flag, value in (("--context", context), ("--seats", seats), ("--token_budget", budget)):
        if value is not None and value < 1:
            raise Refused(flag, value, "must be at least 1", "leave it out")
    seats_each = -(-(_SEATS if seats is None else seats) // shards)
    longest = -(-max_len // BLOCK_SIZE)
    blocks = max(longest, seats_each * longest // 2)
    if cache_tokens is not None:
        blocks = cache_tokens // (shards * BLOCK_SIZE)
        if blocks < 1:
            least = shards * BLOCK_SIZE
            raise Refused("--cache_tokens", cache_tokens, f"must be at least {least}", "raise it")
        if context is not None and context > (room := blocks * BLOCK_SIZE):
            rule = (
                f"must be at most {room}: of --cache_tokens={cache_tokens} each of {shards} shards "
                f"has as many, in whole blocks of {BLOCK_SIZE}, and a request stays on one"
            )
            enough = longest * shards * BLOCK_SIZE
            raise Refused("--context", context, rule, f"use {room}, or --cache_tokens={enough}")
    chunk_rows = max(_LEAST_CHUNK_ROWS, -(-_CHUNK_ROWS // shards))
    all_rows = shards * (seats_each + chunk_rows * CHUNK)
    return Limits(
        shards=shards,
        seats=seats_each,
        blocks=blocks,
        block_size=BLOCK_SIZE,
        chunk=CHUNK,
        chunk_rows=chunk_rows,
        budget=all_rows if budget is None else budget,
        max_len=max_len,
        long_from=long_from(model),
    )


def long_from(model: ModelConfig) -> int | None:
    """The first position of a text that has the long factors of LongRoPE; None: it has none."""
    return model.rope.original_seq_len if model.rope.long_factor else None
