"""Windows of layers, from every way in which config.json says them."""

import pathlib

import pytest

from moe_jax.hf import window_json
from moe_jax.hf.families import FAMILIES

FULL, SLIDING = "full_attention", "sliding_attention"
CASES = [
    ("mixtral", 4, {}, ()),
    ("mixtral", 4, {"sliding_window": None}, ()),
    ("mixtral", 4, {"sliding_window": 8}, (8,)),
    ("qwen3_moe", 4, {"sliding_window": 8, "use_sliding_window": False}, ()),
    ("qwen3_moe", 4, {"sliding_window": 8}, ()),
    ("qwen3_moe", 4, {"sliding_window": 8, "use_sliding_window": True}, (8,)),
    # transformers 5: every other layer of the first `max_window_layers`
    ("qwen2_moe", 4, {"sliding_window": 8, "use_sliding_window": True}, (8, 0)),
    ("qwen2_moe", 4, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
     (8, 0, 0, 0)),
    ("qwen2_moe", 4, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, ()),
    ("qwen2_moe", 4, {"sliding_window": 8, "use_sliding_window": True,
                      "layer_types": [FULL, SLIDING, SLIDING, FULL]}, (0, 8, 8, 0)),
    ("qwen2_moe", 4, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": None},
     (8, 0)),
    ("qwen2_moe", 4, {"sliding_window": 8, "max_window_layers": None}, ()),
    ("gpt_oss", 4, {"sliding_window": 8, "max_window_layers": None}, (8, 0)),
    ("qwen2_moe", 4, {"sliding_window": 8, "layer_types": [SLIDING] * 4}, ()),
    ("gpt_oss", 4, {"sliding_window": 8}, (8, 0)),
    ("gpt_oss", 5, {"sliding_window": 8}, (8, 0, 8, 0, 8)),
    ("gpt_oss", 6, {"sliding_window": 8, "layer_types": [FULL, FULL, SLIDING] * 2}, (0, 0, 8)),
    ("gpt_oss", 4, {"sliding_window": None, "layer_types": [FULL] * 4}, ()),
    ("gpt_oss", "many", {"sliding_window": 8}, ()),  # the rules of the config refuse it
]  # fmt: skip


@pytest.mark.parametrize(("family", "num_layers", "plain", "windows"), CASES)
def test_windows(family, num_layers, plain, windows):
    keys = FAMILIES[family].windows
    assert keys is not None
    assert window_json.read(pathlib.Path("x"), plain, keys, num_layers) == windows
