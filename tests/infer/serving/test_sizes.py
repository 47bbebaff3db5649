"""Sizes of an engine, and what the server's first line says of them."""

import pytest

from moe_jax.errors import Refused
from moe_jax.infer.server import run
from moe_jax.infer.serving import sizes
from tests import tiny

CONFIG = tiny.config(model__max_seq_len=256)  # on 8 devices of tokens


def limits(**asked):
    return sizes.limits(CONFIG.model, tiny.mesh(CONFIG), **asked)


def test_the_context_is_what_the_cache_has_room_for():
    """Where nothing was asked; more than there is room for is never served."""
    assert "context 256, cache 8,192 tokens" in run._sizes(limits())
    assert "context 64, cache 512 tokens" in run._sizes(limits(cache_tokens=512))
    rule = r"--context = 65: must be at most 64.*use 64, or --cache_tokens=640"
    with pytest.raises(Refused, match=rule):
        limits(context=65, cache_tokens=512)
    assert limits(context=65, cache_tokens=640).room == 65
    assert limits(context=64, cache_tokens=512).room == 64
