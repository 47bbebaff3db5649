"""A tiny Llama as a GGUF file, written here by the format's own rules."""

import struct

import ml_dtypes
import numpy as np

SIZES = {"V": 264, "L": 2, "D": 32, "H": 4, "G": 2, "F": 64}
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are tiny<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def alphabet():
    """The printable characters that stand for bytes, in the order of GPT-2's own table."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(rest))]


def keys(**changes):
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet(), "Ġt", "Ġth", "12", "in"]
    made = {
        "general.architecture": "llama",
        "general.alignment": 64,
        "llama.block_count": SIZES["L"],
        "llama.context_length": 128,
        "llama.embedding_length": SIZES["D"],
        "llama.feed_forward_length": SIZES["F"],
        "llama.attention.head_count": SIZES["H"],
        "llama.attention.head_count_kv": SIZES["G"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1000.0,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(words) - 3),
        "tokenizer.ggml.merges": ["Ġ t", "Ġt h", "1 2", "i n"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    made |= changes
    return {name: value for name, value in made.items() if value is not None}


def weights(seed=0, *, tied=True):
    """By their names in a published folder, values that 16 bits hold."""
    size, rng = SIZES, np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (size["V"], size["D"]), "model.norm.weight": (32,)}
    if not tied:
        shapes["lm_head.weight"] = (size["V"], size["D"])
    for layer in range(size["L"]):
        of_layer = {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (64, 32),
            "mlp.up_proj": (64, 32),
            "mlp.down_proj": (32, 64),
        }
        shapes |= {f"model.layers.{layer}.{n}.weight": shape for n, shape in of_layer.items()}
    made = {}
    for name, shape in shapes.items():
        noise = rng.normal(size=shape) * (0.3 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5)
        values = 1 + noise if len(shape) == 1 else noise * (8 if "embed" in name else 1)
        made[name] = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return made


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(of=None):
    """(name, GGUF type, array as it is stored) of every weight."""
    made = []
    for name, values in (weights() if of is None else of).items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stored = f"blk.{layer}.{NAMES[part]}.weight"
            heads = {"self_attn.q_proj": SIZES["H"], "self_attn.k_proj": SIZES["G"]}.get(part)
            if heads:  # as converters to this format turn them
                rows, width = values.shape
                halves = values.reshape(heads, 2, rows // heads // 2, width)
                values = halves.swapaxes(1, 2).reshape(rows, width)
        else:
            stored = f"{NAMES[stem]}.weight"
        if "ffn_up" in stored:
            made.append((stored, 30, values.astype(ml_dtypes.bfloat16)))
        else:
            made.append((stored, 0, values.astype("<f4")))
    return made


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value):
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + np.array(value, "<i4").tobytes()


def write(path, of_keys=None, of_tensors=None, alignment=64):
    of_keys, of_tensors = of_keys or keys(), of_tensors or tensors()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(of_tensors), len(of_keys))
    for name, value in of_keys.items():
        head += _string(name) + _value(value)
    data = b""
    for name, number, values in of_tensors:
        head += _string(name) + struct.pack("<I", values.ndim)
        head += struct.pack(f"<{values.ndim}Q", *values.shape[::-1])
        head += struct.pack("<IQ", number, len(data))
        data += values.tobytes()
        data += b"\0" * (-len(data) % alignment)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data)
    return path
