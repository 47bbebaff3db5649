"""The comparison with transformers, against a child whose answers are known."""

import json
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.hf import __main__ as hf
from moe_jax.hf import synthetic
from moe_jax.infer.peer import __main__ as peer_command
from moe_jax.infer.peer import asked

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
SIZES = {
    "mixtral": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48},
    "olmoe": {**SMALL, "num_key_value_heads": 4, "intermediate_size": 16},
    "deepseek_v3": {
        **{**SMALL, "num_key_value_heads": 4, "intermediate_size": 48},
        **{"moe_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 24},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    },
}
FAKE = """
import json, sys
said = json.load(open(sys.argv[0] + ".json"))
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "prefill":
        answer = {"seconds": 2.0}
    elif asked["do"] == "decode":
        answer = {"seconds": 3.0, "tokens": [row[:asked["steps"] + 1] for row in said]}
    elif asked["do"] == "use":
        answer = {}
    else:
        answer = {"error": "what?"}
    print(json.dumps(answer), flush=True)
"""


@pytest.mark.parametrize("shape", synthetic.SHAPES)
def test_folders_of_published_shapes(shape, tmp_path, capsys):
    """Read like any other; the same seed, the same bytes."""
    count = synthetic.make(shape, tmp_path / "a", **SIZES[shape])
    synthetic.make(shape, tmp_path / "b", **SIZES[shape])
    synthetic.make(shape, tmp_path / "c", seed=1, **SIZES[shape])
    first, same, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")
    )
    assert first == same != other
    assert hf.main(["check", str(tmp_path / "a")]) == 0
    assert f"{4 * count:,} bytes" in capsys.readouterr().out
    with pytest.raises(Refused, match="exists already"):
        synthetic.make(shape, tmp_path / "a")


def test_sizes_are_about_50_million(tmp_path):
    assert 48e6 < synthetic.make("mixtral", tmp_path / "mixtral") < 52e6


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer") / "mixtral"
    synthetic.make("mixtral", folder, **SIZES["mixtral"])
    return peer_command.Ours(str(folder))


def fake(tmp_path, tokens):
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "fake.py.json").write_text(json.dumps(tokens))
    return asked.Peer(sys.executable, tmp_path / "fake.py")


def test_a_table(ours, tmp_path):
    sizes = peer_command.Sizes(batch=2, prompt=8, new=16)
    token_BS = np.random.default_rng(2).integers(0, 256, (2, 8)).astype(np.int32)
    tokens = ours.decode(token_BS, sizes.new)[1]
    with fake(tmp_path, tokens) as child:
        prefill, decode = peer_command.compare(ours, child, sizes, rounds=2)
        with pytest.raises(RuntimeError, match=r"at 'load': what\?"):
            child.ask("load")
    # their rates are those that the child gave: 16 tokens in 2 s, 2 in 3 s
    assert prefill.split()[:2] == ["prefill", "2"]
    assert prefill.split()[3] == "8"
    assert decode.split()[3] == "1"
    assert float(decode.split()[4].replace(",", "")) > 1


def test_other_tokens_are_not_timed(ours, tmp_path):
    sizes = peer_command.Sizes(2, 8, 16)
    with (
        fake(tmp_path, [[7] * 40] * 2) as child,
        pytest.raises(Refused, match="greedy tokens of prompt 0"),
    ):
        peer_command.compare(ours, child, sizes, rounds=1)


def test_a_child_that_ends_is_told(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with (
        asked.Peer(sys.executable, tmp_path / "empty.py") as child,
        pytest.raises(RuntimeError, match="ended with 0 at 'use'"),
    ):
        child.ask("use")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--python=/no/such"], "must be a Python interpreter"),
        (["x", "--batches=1,0"], "numbers of sequences"),
        (["x", "--rounds=0"], "at least 1"),
    ],
)
def test_what_is_refused(arguments, words, capsys):
    assert peer_command.main(arguments) == 1
    assert words in capsys.readouterr().err


def test_an_interpreter_without_torch_is_refused(tmp_path):
    bare = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, check=False)
    if bare.returncode == 0:
        pytest.skip("this interpreter has torch")
    with pytest.raises(Refused, match="must have torch and transformers"):
        asked.check(sys.executable)
