"""A Llama in a GGUF file -> a published model's folder, in float32, a tensor at a time.

Values stay what the file's codes mean. Queries and keys are brought back into the published order
of rows: GGUF has the two values that a position turns side by side, published folders half a head
apart.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.hf import config_json, folder, gguf, gguf_tokens, layout, safetensors
from moe_jax.hf.tables import MAX_SIZE

# key of the file -> key of config.json
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_TINY, _LARGEST = (float(value) for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")  # all others are whole numbers
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "vocab_size")
# Keys that may only say what follows from others, or nothing.
_CHECKED = ("rope.dimension_count", "attention.value_length")
_NOTHING = {"rope.scaling.type": ("none",), "expert_count": (0,), "expert_used_count": (0,)}
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TURNED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def convert(path: str | os.PathLike, out: str | os.PathLike) -> None:
    """Writes OUT/config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Args:
      path: a GGUF file of the architecture "llama".
      out: a folder that is not there, or is empty; it appears whole, or not at all.

    Raises:
      Refused: naming file, key or tensor, rule and fix.
    """
    folder.check_new(out)
    file = gguf.read(path)
    plain = config(file)
    with folder.new(out) as made:
        gguf_tokens.write(file, made, plain["vocab_size"])
        with files.atomic_write(made / config_json.NAME, "w") as text:
            json.dump(plain, text, indent=1, sort_keys=True)
        _write_tensors(file, plain, made)


def config(file: gguf.File) -> dict[str, Any]:
    """The keys of config.json. Raises `Refused` for what would be ignored, by name."""
    keys, path = file.keys, file.path
    if (kind := keys.get("general.architecture")) != "llama":
        gguf.refuse(path, "general.architecture", kind, "must be 'llama'", "use another model")
    plain: dict[str, Any] = {"model_type": "llama", "dtype": "float32"}
    for name, value in keys.items():
        if not name.startswith("llama."):
            continue
        key = name.removeprefix("llama.")
        if key in _NOTHING and value in _NOTHING[key]:
            continue
        if key not in _KEYS and key not in _CHECKED:
            rule = "is not known, so what it asks for would be ignored"
            gguf.refuse(path, name, value, rule, "use another model")
        if key in _REAL and not (type(value) in (int, float) and _TINY <= value <= _LARGEST):
            gguf.refuse(path, name, value, "must be a number above 0, of 32 bits")
        if key not in _REAL and (type(value) is not int or not 0 < value <= MAX_SIZE):
            gguf.refuse(path, name, value, f"must be a whole number, 1 to {MAX_SIZE:,}")
        if key in _KEYS:  # 1e-5 in 32 bits is meant, not its digits in 64
            plain[_KEYS[key]] = float(str(np.float32(value))) if type(value) is float else value
    plain.setdefault("rope_theta", 10000.0)
    for key, meant in _KEYS.items():
        if meant not in plain and key not in _OPTIONAL:
            gguf.refuse(path, f"llama.{key}", None, "is required")
    if (layers := plain["num_hidden_layers"]) > len(file.tensors):
        rule = f"must be a number of layers with weights: there are {len(file.tensors)} tensors"
        gguf.refuse(path, "llama.block_count", layers, rule)
    heads = plain["num_attention_heads"]
    if heads % plain.setdefault("num_key_value_heads", heads):
        rule = f"must divide llama.attention.head_count = {heads}"
        gguf.refuse(path, "llama.attention.head_count_kv", plain["num_key_value_heads"], rule)
    width = plain.setdefault("head_dim", plain["hidden_size"] // heads)
    if width % 2 or not width:
        key = "key_length" if "llama.attention.key_length" in keys else "head_count"
        rule = f"makes heads {width} wide: must be even, positions turn pairs of values"
        gguf.refuse(path, f"llama.attention.{key}", keys[f"llama.attention.{key}"], rule)
    for key in _CHECKED:
        if keys.get(f"llama.{key}", plain["head_dim"]) != plain["head_dim"]:
            rule = f"must be the width of a head, {plain['head_dim']}"
            gguf.refuse(path, f"llama.{key}", keys[f"llama.{key}"], rule, "use another model")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        gguf.refuse(path, "token_embd.weight", None, "is missing")
    plain.setdefault("vocab_size", embedding.shape[0])
    plain["tie_word_embeddings"] = "output.weight" not in file.tensors
    plain["bos_token_id"] = next(iter(_tokens(file, ("bos",), plain["vocab_size"])), None)
    # Of a text, a turn, or a message: the first ends documents to learn from.
    ends = _tokens(file, ("eos", "eot", "eom"), plain["vocab_size"])
    plain["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    return plain


def _tokens(file: gguf.File, named: tuple[str, ...], vocab_size: int) -> list[int]:
    """The tokens of these names that the file has."""
    found = {}
    for end in named:
        name = f"tokenizer.ggml.{end}_token_id"
        number = file.keys.get(name)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < vocab_size:
            rule = f"must be a token of the vocabulary, 0 to {vocab_size - 1}"
            gguf.refuse(file.path, name, number, rule)
        found[number] = end
    return list(found)


def _write_tensors(file: gguf.File, plain: dict[str, Any], out: pathlib.Path) -> None:
    published = config_json.read(out)
    wanted = layout.of_family(published.family, "per matrix", published.config.model)
    names, heads = _names(plain)
    if surplus := sorted(file.tensors.keys() - names.values()):
        rule = f"{len(surplus)} not a part of this model"
        gguf.refuse(file.path, "tensors", "; ".join(surplus[:3]), rule, "use another model")
    for name, shape in wanted.shapes.items():
        found = file.tensors.get(names[name])
        if found is None:
            gguf.refuse(file.path, names[name], None, "is missing")
        if found.shape != shape:
            rule = f"must be {list(shape)} by the sizes in this file"
            gguf.refuse(file.path, names[name], list(found.shape), rule)

    def array(name: str) -> np.ndarray:
        values = file.array(names[name])
        return _half_a_head_apart(values, heads[name]) if name in heads else values

    shapes = {name: ("F32", shape) for name, shape in wanted.shapes.items()}
    safetensors.write(out / folder.SINGLE, shapes, array)


def _names(plain: dict[str, Any]) -> tuple[dict[str, str], dict[str, int]]:
    """Published name -> name in the file, and -> heads of what has to be turned back."""
    names, heads = {published: name for name, published in _ENDS.items()}, {}
    for layer in range(plain["num_hidden_layers"]):
        for name, published in _LAYER.items():
            full = f"model.layers.{layer}.{published}.weight"
            names[full] = f"blk.{layer}.{name}.weight"
            if name in _TURNED:
                heads[full] = plain[_TURNED[name]]
    return names, heads


def _half_a_head_apart(weight_RD: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows 0, 2, 4, ... of each head, then rows 1, 3, 5, ..."""
    rows, width = weight_RD.shape
    pairs = weight_RD.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
