"""Damaged and lying checkpoints: refused with file, tensor, rule and fix before arrays are made."""

import dataclasses
import json
import pathlib
import re
import resource
import shutil
import struct

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.config import RopeConfig
from moe_jax.errors import Refused
from moe_jax.hf import __main__ as hf_main
from moe_jax.hf import config_json, folder, layout, load, safetensors
from moe_jax.hf.tokens import Tokenizer
from moe_jax.infer import published
from tests.hf import golden

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def container(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def with_entry(**changes) -> bytes:
    return container({"w": {**GOOD, **changes}})


HEADERS = {
    "empty": (b"", "must start with the size"),
    "seven bytes": (b"\0" * 7, "must start with the size"),
    "size beyond the file": (container({"w": GOOD}, length=1 << 40), "inside the file"),
    "size of all bits": (container({"w": GOOD}, length=(1 << 64) - 1), "inside the file"),
    "not JSON": (container(b"{{"), "must be JSON"),
    "not UTF-8": (container(b"\xff\xfe{}"), "must be JSON"),
    "nested without end": (container(b"[" * 100_000), "must be JSON"),
    "a list": (container([]), "must be a JSON object"),
    "a name twice": (container(b'{"w":{},"w":{}}'), "only once"),
    "no shape": (container({"w": {"dtype": "F32"}}), "must have dtype, shape"),
    "an entry that is a number": (container({"w": 3}), "must have dtype, shape"),
    "unknown dtype": (with_entry(dtype="F31"), "dtype must be one of"),
    "dtype that is a list": (with_entry(dtype=["F32"]), "dtype must be one of"),
    "negative size": (with_entry(shape=[-2]), "whole numbers"),
    "true as a size": (with_entry(shape=[True]), "whole numbers"),
    "real size": (with_entry(shape=[2.0]), "whole numbers"),
    "sizes beyond 64 bits": (with_entry(shape=[1 << 64]), "whole numbers"),
    "product beyond 64 bits": (with_entry(shape=[1 << 62, 1 << 62]), "takes"),
    "too many dimensions": (with_entry(shape=[1] * 99), "at most 16"),
    "offsets backwards": (with_entry(data_offsets=[8, 0]), "first <= end"),
    "three offsets": (with_entry(data_offsets=[0, 4, 8]), "first <= end"),
    "too few bytes": (with_entry(shape=[3]), "takes 12 bytes, not 8"),
    "cut short": (container({"w": GOOD}, data=b"\0" * 7), "must lie inside the 7 bytes"),
    "more than it says": (container({"w": GOOD}, data=b"\0" * 9), "must end where its last"),
    "a hole": (
        container({"w": {**GOOD, "data_offsets": [8, 16]}}, data=b"\0" * 16),
        "leave a hole after the header",
    ),
    "overlap": (
        container({"w": GOOD, "v": {**GOOD, "data_offsets": [4, 12]}}, data=b"\0" * 12),
        "overlap w",
    ),
}


@pytest.mark.parametrize(("content", "rule"), HEADERS.values(), ids=HEADERS.keys())
def test_containers(content, rule, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"model\.safetensors") as refused:
        safetensors.read(path)
    assert rule in str(refused.value)
    assert "again" in str(refused.value)


def test_the_good_container_is_read(tmp_path):
    (tmp_path / "x").write_bytes(container({"__metadata__": {"a": "b"}, "w": GOOD}))
    assert safetensors.read(tmp_path / "x").array("w").tolist() == [0, 0]


def test_every_cut_and_many_flips_are_refused_or_read(tmp_path):
    """Nothing but `Refused` comes out, and memory does not follow what a header says."""
    whole = (golden.ROOT / "mixtral" / folder.SINGLE).read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    rng, refused = np.random.default_rng(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / folder.SINGLE
    for case in range(300):
        content = bytearray(whole)
        if case % 3 == 0:
            content = content[: int(rng.integers(0, len(whole)))]
        else:
            for _ in range(case % 5 + 1):
                content[int(rng.integers(0, first))] = int(rng.integers(0, 256))
        path.write_bytes(content)
        try:
            safetensors.read(path)
        except Refused:
            refused += 1
    assert refused > 200
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # kB


# --- folders -----------------------------------------------------------------------------------


def copied(tmp_path: pathlib.Path, family: str = "mixtral") -> pathlib.Path:
    return pathlib.Path(shutil.copytree(golden.ROOT / family, tmp_path / "model"))


def rewrite(path: pathlib.Path, change) -> None:
    """The file with its arrays changed: {name: array} -> {name: array}."""
    file = safetensors.read(path)
    arrays = change({name: file.array(name).copy() for name in file.tensors})
    kinds = {dtype: name for name, dtype in safetensors.WEIGHTS.items()}
    names = {name: (kinds[array.dtype], array.shape) for name, array in arrays.items()}
    safetensors.write(path, names, arrays.__getitem__)


def without(name):
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
TENSORS = {
    "missing": (without(ROUTER), (ROUTER, "1 is missing")),
    "surplus": (
        lambda arrays: {**arrays, "model.extra": np.zeros(3, np.float32)},
        ("model.extra", "1 is not a part of this model (mixtral)"),
    ),
    "misshapen": (
        lambda arrays: {**arrays, ROUTER: arrays[ROUTER][:7]},
        (ROUTER, "[7, 32] in the file, [8, 32] by config.json"),
    ),
}


@pytest.mark.parametrize(("change", "says"), TENSORS.values(), ids=TENSORS.keys())
def test_every_tensor_is_accounted_for(change, says, tmp_path):
    model = copied(tmp_path)
    rewrite(model / folder.SINGLE, change)
    known = config_json.read(model)
    with pytest.raises(Refused) as refused:
        layout.find(known.family, known.config.model, folder.tensors(model))
    for said in says:
        assert said in str(refused.value)


def test_frequencies_in_a_checkpoint_are_those_of_config_json(tmp_path):
    """Old Llama files hold them as a buffer of each layer, beside the weights."""
    model = copied(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(model / folder.SINGLE, lambda arrays: {**arrays, name: np.ones(4, np.float32)})
    known, tensors = config_json.read(model), folder.tensors(model)
    assert name in tensors.file_of
    assert name not in layout.find(known.family, known.config.model, tensors).shapes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_no_number(bad, dtype, tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.5.w2.weight"
    model = copied(tmp_path)

    def spoil(arrays):
        arrays[name][3, 4] = bad
        return arrays

    rewrite(model / folder.SINGLE, spoil)
    known = config_json.read(model)
    sizes = dataclasses.replace(known.config.model, dtype=dtype)
    tensors = folder.tensors(model)
    found = layout.find(known.family, sizes, tensors)
    placement = golden.contiguous("mixtral")
    mesh = mesh_lib.make(expert=4)
    with pytest.raises(Refused, match="NaN or infinity") as refused:
        load.parameters(sizes, found, tensors, placement, mesh, say=lambda line: None)
    assert f"{model / folder.SINGLE}: {name}" in str(refused.value)


def test_quantised_weights_are_named(tmp_path):
    model = copied(tmp_path)
    path = model / folder.SINGLE
    raw = path.read_bytes().replace(b'"dtype":"BF16"', b'"dtype":"I16" ', 1)
    path.write_bytes(raw)
    name = next(n for n, t in safetensors.read(path).tensors.items() if t.dtype == "I16")
    with pytest.raises(Refused, match="F32, F16, BF16") as refused:
        folder.tensors(model).array(name)
    assert name in str(refused.value)
    known = config_json.read(model)
    with pytest.raises(
        Refused, match=re.escape(f"{path}: {name} = 'I16'")
    ):  # before anything is loaded
        layout.find(known.family, known.config.model, folder.tensors(model))


def indexed(model: pathlib.Path, weight_map: object) -> None:
    (model / folder.INDEX).write_text(json.dumps({"weight_map": weight_map}))


INDEXES = {
    "no map": (lambda names: None, "needs weight_map"),
    "numbers": (lambda names: {"a": 3}, "needs weight_map"),
    "missing shard": (
        lambda names: {**names, "x": "model-00002-of-00002.safetensors"},
        "model-00002-of-00002.safetensors = None: is named in",
    ),
    "out of the folder": (lambda names: {"a": "../x.safetensors"}, "without folders"),
    "absolute": (lambda names: {"a": "/etc/x.safetensors"}, "without folders"),
    "a pickle": (lambda names: {"a": "pytorch_model.bin"}, ".safetensors files"),
    "a tensor that is not there": (
        lambda names: {**names, "x": folder.SINGLE},
        "does not hold it",
    ),
    "a tensor it does not name": (
        lambda names: {name: file for name, file in names.items() if name != ROUTER},
        "says nothing of it",
    ),
}


@pytest.mark.parametrize(("change", "rule"), INDEXES.values(), ids=INDEXES.keys())
def test_indexes(change, rule, tmp_path):
    model = copied(tmp_path)
    names = dict.fromkeys(safetensors.read(model / folder.SINGLE).tensors, folder.SINGLE)
    indexed(model, change(names))
    with pytest.raises(Refused) as refused:
        folder.tensors(model)
    assert rule in str(refused.value)


def test_a_file_beside_an_index_of_others(tmp_path):
    """A fine-tune saved over an older model in several files."""
    model = copied(tmp_path)
    shard = "model-00001-of-00001.safetensors"
    shutil.copyfile(model / folder.SINGLE, model / shard)
    indexed(model, dict.fromkeys(safetensors.read(model / shard).tensors, shard))
    with pytest.raises(Refused, match=r"/model\.safetensors = None: is there as well"):
        folder.tensors(model)
    (model / folder.SINGLE).unlink()
    assert folder.tensors(model).file_of.keys() == golden.tensors("mixtral").file_of.keys()


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(Refused, match="pickle, which could run code"):
        folder.tensors(tmp_path)


# --- config.json -------------------------------------------------------------------------------

SCALED = {"type": "yarn", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
CONFIGS = [
    ("mixtral", {"model_type": "mixtrl"}, "model_type", "did you mean 'mixtral'"),
    ("mixtral", {"model_type": None}, "model_type", "must be one of"),
    ("mixtral", {"model_type": ["x"]}, "model_type", "must be one of"),
    ("mixtral", {"hidden_size": None}, "hidden_size", "is required"),
    ("mixtral", {"max_position_embeddings": "many"}, "model.max_seq_len", "write it as int"),
    ("mixtral", {"hidden_size": "32"}, "model.d_model", "write it as int"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act", "must be 'silu'"),
    ("mixtral", {"sliding_window": 0}, "sliding_window", "the number of positions"),
    ("mixtral", {"sliding_window": "16"}, "sliding_window", "the number of positions"),
    ("mixtral", {"num_experts_per_tok": 9}, "model.top_k", "choose 1 to 8"),
    ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config",
     "quantised weights that are not supported here: none is read"),
    ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config",
     "quantised weights that are not supported here: 'mxfp4'"),
    ("gpt_oss", {"quantization_config": {}}, "quantization_config", "'mxfp4'"),
    ("gpt_oss", {"quantization_config": ["mxfp4"]}, "quantization_config", "'mxfp4'"),
    ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit", "another limit"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha", "another slope"),
    ("phimoe", {"router_jitter_noise": 0.1}, "router_jitter_noise", "another width"),
    ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok", "another number of experts"),
    ("granitemoe", {"residual_multiplier": 0}, "model.residual_scale", "must be above 0"),
    ("granitemoe", {"attention_multiplier": -1.0}, "model.attention_scale", "at least 0"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window", "the number of positions"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types", "num_hidden_layers = 2"),
    ("gpt_oss", {"layer_types": "full_attention"}, "layer_types", "num_hidden_layers = 2"),
    ("gpt_oss", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types[1]",
     "others are not supported"),
    ("gpt_oss", {"layer_types": ["full_attention", {}]}, "layer_types[1]", "must be one of"),
    ("mixtral", {"dtype": ["x"]}, "dtype", "convert the checkpoint"),
    ("mixtral", {"dtype": "float8"}, "dtype", "convert the checkpoint"),
    ("mixtral", {"rope_scaling": SCALED}, "rope_parameters.rope_type", "is 'yarn' elsewhere"),
    ("mixtral", {"rope_scaling": SCALED, "rope_parameters": {**SCALED, "rope_theta": 1e5}},
     "rope_parameters.rope_theta", "is not in rope_scaling"),
    ("mixtral", {"rope_scaling": SCALED, "rope_theta": 1e6,
                 "rope_parameters": {**SCALED, "rope_theta": 1e5}},
     "rope_parameters.rope_theta", "is not in rope_scaling"),
    ("mixtral", {"rope_scaling": SCALED, "rope_parameters": {**SCALED, "beta_fast": 16}},
     "rope_parameters.beta_fast", "is not in rope_scaling"),
    ("mixtral", {"rope_scaling": {"factor": 4.0}, "rope_parameters": SCALED},
     "rope_parameters.type", "is not in rope_scaling"),
    ("mixtral", {"rope_parameters": DYNAMIC}, "rope_parameters.rope_type", "'dynamic'"),
    ("mixtral", {"rope_parameters": None, "rope_scaling": DYNAMIC}, "rope_scaling", "'dynamic'"),
    ("mixtral", {"rope_parameters": {**SCALED, "mrope_section": [2]}}, "mrope_section", "ignored"),
    ("deepseek_v3", {"rope_parameters": {**SCALED, "type": "linear", "mscale_all_dim": 1}},
     "config.json: rope_parameters.mscale_all_dim", "as 'linear' says"),
    ("mixtral", {"rope_parameters": {**SCALED, "factor": 0.5}, "rope_theta": 1e4},
     "model.rope.factor", "at least 1"),
    ("mixtral", {"rope_parameters": {**SCALED, "type": "longrope", "short_mscale": 1.2,
                                     "long_mscale": 1.3, "rope_theta": 1e4}},
     "short_mscale", "the same number"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "a part of each head"),
    ("mixtral", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor", "a part of each head"),
    ("mixtral", {"eos_token_id": [2, 264]}, "eos_token_id", "0 to 263"),
    ("mixtral", {"eos_token_id": "</s>"}, "eos_token_id", "0 to 263"),
    ("mixtral", {"rope_parameters": 3}, "rope_parameters", "must be an object"),
    ("mixtral", {"rope_parameters": "default"}, "rope_parameters", "must be an object"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv", "clipped"),
    ("olmoe", {"norm_topk_prob": "yes"}, "norm_topk_prob", "true or false"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method", "one of 'greedy', 'group_lim"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob", "normalised weights"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func", "must be 'softmax'"),
    ("deepseek_v2", {"topk_group": 1, "num_experts_per_tok": 3}, "model.top_k", "the 1 x 2 exp"),
    ("deepseek_v2_lite", {"n_group": 4}, "model.router_groups", "among all experts"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method", "another choice of experts"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias", "biases in latent attention"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq", "dense layers among"),
    ("deepseek_v3", {"n_shared_experts": "two"}, "n_shared_experts", "moe_intermediate_size = 16"),
    ("deepseek_v3", {"first_k_dense_replace": 5}, "model.num_dense_layers", "choose 0 to 4"),
    ("deepseek_v3", {"first_k_dense_replace": 4}, "model.num_experts", "fewer dense layers"),
    ("deepseek_v3", {"first_k_dense_replace": "x"}, "model.num_dense_layers", "write it as int"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank", "is required"),
    ("deepseek_v3", {"v_head_dim": 0}, "model.latent.d_value", "above 0"),
    ("deepseek_v3", {"rope_interleave": "no"}, "rope_interleave", "true or false"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers", "dense layers"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step", "dense layers"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None, "layer_types": None},
     "sliding_window", "the number of positions"),
    ("qwen2_moe", {"use_sliding_window": "yes"}, "use_sliding_window", "true or false"),
    ("qwen2_moe", {"max_window_layers": "all"}, "max_window_layers", "a number of layers"),
    ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers", "at most 4,096"),
    ("mixtral", {"num_hidden_layers": 10**9, "sliding_window": 4096}, "num_hidden_layers",
     "at most 4,096"),
    ("gpt_oss", {"num_hidden_layers": 10**9}, "num_hidden_layers", "at most 4,096"),
    ("mixtral", {"num_attention_heads": 10**12, "num_key_value_heads": 7}, "num_attention_heads",
     "at most 16,777,216"),
    ("mixtral", {"num_local_experts": 10**9}, "num_local_experts", "at most 16,777,216"),
    ("mixtral", {"num_local_experts": 10**5}, "layers x experts", "2 x 100,000"),
    ("deepseek_v3", {"n_shared_experts": 10**4000, "moe_intermediate_size": 10**4000},
     "moe_intermediate_size", "at most 16,777,216"),
    ("deepseek_v3", {"n_shared_experts": 2**21}, "n_shared_experts x moe_intermediate_size",
     "at most 16,777,216"),
    ("mixtral", {"sliding_window": 10**400}, "sliding_window", "the number of positions"),
    ("mixtral", {"rms_norm_eps": -(10**400)}, "model.norm_eps", "must be finite"),
    ("mixtral", {"rope_parameters": {"rope_theta": 10**400}}, "model.rope_theta", "be finite"),
    ("mixtral", {"rope_parameters": {**SCALED, "rope_theta": 1e4,
                                     "original_max_position_embeddings": 10**400}},
     "original_max_position_embeddings", "at most 16,777,216"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "field", "says"), CONFIGS)
def test_configs(family, changes, field, says, tmp_path):
    model = copied(tmp_path, family)
    plain = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**plain, **changes}))
    with pytest.raises(Refused) as refused:
        config_json.read(model)
    assert field in refused.value.field
    assert says in str(refused.value)


def test_divisors_of_large_numbers_are_found_at_once():
    config = golden.config("mixtral")
    for heads, nearest in ((10**12, "5 or 8"), (2**200, "4 or 8"), (12, "6 or 12")):
        model = dataclasses.replace(config.model, num_heads=heads, num_kv_heads=7)
        with pytest.raises(Refused, match=f"model.num_kv_heads = 7: .*nearest: {nearest}"):
            config_lib.validate(dataclasses.replace(config, model=model))


def test_config_json_that_is_none(tmp_path):
    with pytest.raises(Refused, match=r"config\.json.*cannot be read"):
        config_json.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match="must be JSON"):
        config_json.read(tmp_path)


def test_both_ways_to_write_rotary_positions(tmp_path):
    model = copied(tmp_path)
    plain = json.loads((model / "config.json").read_text())
    plain.pop("rope_parameters", None)
    (model / "config.json").write_text(json.dumps({**plain, "rope_theta": 5e5}))
    assert config_json.read(model).config.model.rope_theta == 5e5
    group = {"rope_theta": 6e5, "rope_type": "default"}
    (model / "config.json").write_text(json.dumps({**plain, "rope_parameters": group}))
    assert config_json.read(model).config.model.rope_theta == 6e5


@pytest.mark.parametrize("more", [{"rope_scaling": {**SCALED, "rope_theta": 6e5}},
                                  {"rope_scaling": SCALED, "rope_theta": 6e5},
                                  {"rope_scaling": {}}])  # fmt: skip
def test_both_objects_of_rotary_positions(more, tmp_path):
    model = copied(tmp_path)
    plain = json.loads((model / "config.json").read_text())
    plain["rope_parameters"] = {**SCALED, "rope_theta": 6e5, "beta_fast": None}
    (model / "config.json").write_text(json.dumps(plain | more))
    assert config_json.read(model).config.model.rope_theta == 6e5


@pytest.mark.parametrize(
    ("said", "interleaved"),
    [({}, True), ({"rope_interleave": True}, True), ({"rope_interleave": None}, False)],
)
def test_null_interleaves_no_positions(said, interleaved, tmp_path):
    """As in transformers, where only a key that is not there is true."""
    model = copied(tmp_path, "deepseek_v3")
    plain = json.loads((model / "config.json").read_text())
    plain.pop("rope_interleave")
    (model / "config.json").write_text(json.dumps(plain | said))
    assert config_json.read(model).config.model.rope.interleaved is interleaved


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": None}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": None, "torch_dtype": None}, "float32"),
    ],
)
def test_a_key_that_is_null_is_none(said, dtype, tmp_path):
    model = copied(tmp_path)
    plain = json.loads((model / "config.json").read_text())
    stretched = {**SCALED, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    plain |= {"rope_parameters": stretched, "original_max_position_embeddings": None}
    (model / "config.json").write_text(json.dumps(plain | said))
    found = config_json.read(model).config.model
    assert found.dtype == dtype
    assert found.rope == RopeConfig(kind="yarn", factor=4.0, original_seq_len=32)


@pytest.mark.parametrize(
    "beside", [{}, {"original_max_position_embeddings": 32}, {"beta_fast": 8.0, "truncate": False}]
)
def test_numbers_of_other_kinds_of_positions_mean_nothing(beside, tmp_path):
    model = copied(tmp_path)
    plain = json.loads((model / "config.json").read_text())
    plain["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, **beside}
    (model / "config.json").write_text(json.dumps(plain))
    assert config_json.read(model).config.model.rope == RopeConfig(kind="linear", factor=2.0)


@pytest.mark.parametrize("none", [{}, {"rope_scaling": None}, {"rope_parameters": None}])
def test_gpt_oss_stretches_positions_without_being_told(none, tmp_path):
    model = copied(tmp_path, "gpt_oss")
    plain = json.loads((model / "config.json").read_text())
    plain = {key: value for key, value in plain.items() if not key.startswith("rope_")}
    (model / "config.json").write_text(json.dumps(plain | none))
    found = config_json.read(model).config.model
    stretched = {"kind": "yarn", "factor": 32.0, "original_seq_len": 4096, "truncate": False}
    assert found.rope == RopeConfig(**stretched)
    assert found.rope_theta == 1.5e5
    plain["rope_parameters"] = {"rope_type": "default"}
    (model / "config.json").write_text(json.dumps(plain))
    assert config_json.read(model).config.model.rope == RopeConfig()


@pytest.mark.parametrize(
    ("family", "theta"),
    [("llama", 1e4), ("olmoe", 1e4), ("mixtral", 1e6), ("phimoe", 1e6), ("gpt_oss", 1.5e5)],
)
def test_a_base_that_is_not_there_is_that_of_the_family(family, theta, tmp_path):
    """Llama 2's published config.json has none."""
    model = copied(tmp_path, family)
    plain = json.loads((model / "config.json").read_text())
    plain.pop("rope_theta", None)
    for base in ({}, {"rope_theta": None}):
        (plain.get("rope_parameters") or {}).pop("rope_theta", None)
        (model / "config.json").write_text(json.dumps(plain | base))
        assert config_json.read(model).config.model.rope_theta == theta


# --- tokenizer and the command -----------------------------------------------------------------


def test_tokenizers(tmp_path):
    model = copied(tmp_path)
    path = model / "tokenizer.json"
    assert Tokenizer(model, 264).encode("ab") == [256, 64, 65]
    with pytest.raises(Refused, match="must be UTF-8"):
        Tokenizer(model, 264).encode("a\udcff")  # a byte of the command line that is no text
    with pytest.raises(Refused, match=r"has a token 257, and the model's vocabulary has 257"):
        Tokenizer(model, 257)
    path.write_text("{}")
    with pytest.raises(Refused, match="is not a tokenizer"):
        Tokenizer(model, 264)
    path.unlink()
    with pytest.raises(Refused, match="is missing"):
        Tokenizer(model, 264)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds(seed, tmp_path, capsys):
    assert hf_main.main(["make", "mixtral", str(tmp_path / "out"), f"--seed={seed}"]) == 1
    assert capsys.readouterr().err.startswith(f"refused: --seed = {seed}: must lie in [0, 2^31)")
    assert not [*tmp_path.iterdir()]


def test_find_refuses_before_any_device_work(tmp_path):
    with pytest.raises(Refused, match=r"--hf.*must be the folder"):
        published.find(str(tmp_path / "none"), None)
    with pytest.raises(Refused, match="num_experts"):
        published.find(str(golden.ROOT / "mixtral"), None, devices="3")
    with pytest.raises(Refused, match="--devices"):
        published.find(str(golden.ROOT / "mixtral"), None, devices="0")
