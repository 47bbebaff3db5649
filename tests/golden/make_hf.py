"""Makes tests/golden/hf/: tiny random models of every family, and what transformers computes.

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch transformers tokenizers
    /tmp/reference/bin/python tests/golden/make_hf.py [FAMILY ... | rope | mxfp4]

Needs torch (on the CPU); the tests do not. For each family a folder with config.json,
model.safetensors (bfloat16 values, computed with in float32) and tokenizer.json, as
`save_pretrained` writes them, and golden.npz:

    prompt_N     int32 [S]         a prompt
    text_N       int32 [S + 64]    with its greedy continuation, cached
    experts_N    uint8 [S + 63, L, K]  experts of every token that was fed, best first; not of Llama
    rows_N       int32 [R]         positions of `logits_N`: the prompt's, and the last ones
    logits_N     float32 [R, V]

tests/golden/hf_mxfp4.npz has codes of quantised weights and the numbers that they mean.
tests/golden/hf_rope.json has frequencies and scales of rotary positions alone, for many settings.

Seeds are tried until no choice is close: the best token leads by 1e-3 of the logits' range, and
neighbours among the K + 1 best experts differ by 1e-4 of the router's logits' range (DeepSeek: 50
random changes of that size turn no choice), so that no rounding can turn one. Written with torch
2.13.0 and transformers 5.x (golden.npz says which).
"""

import copy
import json
import pathlib
import shutil
import sys

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HERE = pathlib.Path(__file__).parent / "hf"
NEW_TOKENS, LAST = 64, 8
VOCABULARY = 264
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}
_DEEPSEEK = {  # 12 + 64 positions are more than the 32 of its "pre-training"
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
}
FAMILIES = {
    "mixtral": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 4,
    },
    "deepseek_v2_lite": {
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "q_lora_rank": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "first_k_dense_replace": 2,
        "num_hidden_layers": 4,
        "q_lora_rank": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    },
    "llama": {
        "intermediate_size": 40,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    "granitemoe": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 6.0,
    },
    # Texts stay below the positions of pre-training: beyond them this class of transformers 5.24
    # goes on with the short factors, unlike the published code and its own functions of LongRoPE.
    "phimoe": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 40,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "short_mscale": 1.25,
            "long_mscale": 1.25,
            "original_max_position_embeddings": 100,
        },
    },
    # Both widths are multiples of 32, as MXFP4 wants them; texts are longer than the window and
    # than the positions that YaRN starts from.
    "gpt_oss": {
        "intermediate_size": 32,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
}
# The same families where their config.json asks for windows.
WINDOWS = {
    "mixtral_window": {**FAMILIES["mixtral"], "sliding_window": 9},
    "qwen3_moe_window": {**FAMILIES["qwen3_moe"], "use_sliding_window": True, "sliding_window": 9},
    "qwen2_moe_window": {
        **FAMILIES["qwen2_moe"],
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
    },
}
FAMILIES |= {
    name: {"model_type": name.removesuffix("_window"), **config} for name, config in WINDOWS.items()
}


# Rotary positions: what config.json says of them, beside the width of a head.
_YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
_FACTORS = np.linspace(1, 30, 48).round(3).tolist()
ROPES = {
    "plain": (128, {"rope_type": "default", "rope_theta": 1e6}),
    "plain of 96": (96, {"rope_type": "default", "rope_theta": 1e4}),
    "linear": (64, {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}),
    "yarn": (128, {**_YARN, "rope_theta": 1e6, "factor": 4.0}),
    "yarn of DeepSeek-V3": (
        64,
        {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    ),
    "yarn with two slopes": (64, {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.4}),
    "yarn with one slope": (64, {**_YARN, "mscale": 0.707}),
    "yarn with a scale": (64, {**_YARN, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}),
    "yarn of gpt-oss": (
        64,
        {**_YARN, "factor": 32.0, "rope_theta": 150000.0, "truncate": False},
    ),
    "yarn of few positions": (16, {**_YARN, "original_max_position_embeddings": 16}),
    "yarn by the positions": (64, {**_YARN, "factor": None}),
    "llama3": (
        128,
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "longrope": (
        96,
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 24 + _FACTORS[:24],
            "long_factor": _FACTORS,
            "original_max_position_embeddings": 4096,
        },
    ),
    "longrope with a factor": (
        16,
        {
            "rope_type": "longrope",
            "factor": 8.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ),
}
POSITIONS = 131072


def make_ropes() -> None:
    """Frequencies of transformers' own functions."""
    made = {}
    for name, (width, group) in ROPES.items():
        group = {"rope_theta": 1e4, **group}
        config = transformers.LlamaConfig(
            hidden_size=2 * width,
            num_attention_heads=2,
            head_dim=width,
            max_position_embeddings=POSITIONS,
            rope_parameters=dict(group),
        )
        kind = group["rope_type"]
        if kind == "default":
            find = lambda config, device, seq_len: (  # noqa: E731
                LlamaRotaryEmbedding.compute_default_rope_parameters(config)
            )
        else:
            find = ROPE_INIT_FUNCTIONS[kind]
        frequency_F, scale = find(config, None, seq_len=1)
        long_F, _ = find(config, None, seq_len=POSITIONS)
        made[name] = {
            "config": {"max_position_embeddings": POSITIONS, "rope_parameters": group},
            "width": width,
            "frequency": frequency_F.tolist(),
            "long_frequency": long_F.tolist(),
            "scale": float(scale),
        }
    path = HERE.parent / "hf_rope.json"
    path.write_text(
        json.dumps(made, indent=None, separators=(",", ":")).replace("},", "},\n") + "\n"
    )
    print(f"{path.name}: {len(made)} settings, {path.stat().st_size:,} bytes")


def make_mxfp4() -> None:
    """Codes of all kinds, and what transformers makes of them; no scale that means NaN."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 16, 8, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 253, (3, 16, 8), generator=generator, dtype=torch.uint8)
    blocks[0] = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 16)
    decoded = convert_moe_packed_tensors(blocks, scales).transpose(1, 2).contiguous()
    path = HERE.parent / "hf_mxfp4.npz"
    np.savez_compressed(
        path,
        blocks=blocks.numpy(),
        scales=scales.numpy(),
        bfloat16_bits=decoded.view(torch.uint16).numpy(),
    )
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Values that bfloat16 holds, large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        corrections = [
            (name, buffer) for name, buffer in model.named_buffers() if "correction" in name
        ]
        for name, parameter in (*model.named_parameters(), *corrections):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                values = 1 + 0.3 * noise
            elif name.endswith("bias"):
                values = 0.3 * noise
            elif "embed_tokens" in name:
                values = noise
            elif "gate_up_proj" in name and model.config.model_type == "gpt_oss":
                values = noise * 3 / parameter.shape[1] ** 0.5  # so that some are cut off
            else:
                values = noise * 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(values.to(torch.bfloat16).float())


def run(model: torch.nn.Module, prompt: list[int]) -> tuple[dict[str, np.ndarray], float]:
    """What transformers computes, and how far from a tie its closest choice was (see above)."""
    text, cache = list(prompt), None
    fed, margin = list(prompt), np.inf
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache, last = out.past_key_values, out.logits[0, -1]
            best = torch.topk(last, 2)
            margin = min(
                margin, float((best.values[0] - best.values[1]) / np.ptp(last.numpy())) / 1e-3
            )
            fed = [int(best.indices[0])]
            text += fed
        if margin <= 1:
            return {}, margin
        choices: list[tuple[torch.Tensor, ...]] = []
        hooks = [
            module.register_forward_hook(lambda module, x, out: choices.append((module, *out)))
            for name, module in model.named_modules()
            if name.endswith("mlp.gate") and model.config.model_type.startswith("deepseek")
        ]
        routes = {} if model.config.model_type == "llama" else {"output_router_logits": True}
        whole = model(torch.tensor([text[:-1]]), use_cache=False, **routes)
        for hook in hooks:
            hook.remove()
    chosen = []
    for gate, logits, weights, experts in choices:
        order = torch.argsort(weights, dim=-1, descending=True)
        experts = torch.gather(experts, 1, order)
        chosen.append(experts.numpy().astype(np.uint8))
        margin = min(margin, steadiness(gate, logits, experts))
    for scores in () if choices or not routes else whole.router_logits:
        top = torch.topk(scores, model.config.num_experts_per_tok + 1)
        gaps = -np.diff(top.values.numpy(), axis=-1)
        margin = min(margin, float(gaps.min() / np.ptp(scores.numpy())) / 1e-4)
        chosen.append(top.indices[:, :-1].numpy().astype(np.uint8))
    logits = whole.logits[0].numpy()
    again = logits[len(prompt) - 1 :].argmax(-1)  # without a cache
    assert again.tolist() == text[len(prompt) :]
    rows = np.r_[: len(prompt), len(logits) - LAST : len(logits)].astype(np.int32)
    return {
        "prompt": np.array(prompt, np.int32),
        "text": np.array(text, np.int32),
        **({"experts": np.stack(chosen, axis=1)} if chosen else {}),
        "rows": rows,
        "logits": logits[rows],
    }, margin


def steadiness(gate: torch.nn.Module, logits: torch.Tensor, experts: torch.Tensor) -> float:
    """2 if no small change of the router's logits changes its choice or their order, else 0.

    `gate` is asked again with an identity as its weight, so that its input is the logits.
    """
    again, spread = copy.deepcopy(gate), 1e-4 * float(np.ptp(logits.numpy()))
    again.weight = torch.nn.Parameter(torch.eye(logits.shape[-1]), requires_grad=False)
    again.hidden_dim = logits.shape[-1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        noise = spread * (2 * torch.rand(logits.shape, generator=generator) - 1)
        _, weights, found = again(logits + noise)
        found = torch.gather(found, 1, torch.argsort(weights, dim=-1, descending=True))
        if not torch.equal(found, experts):
            return 0.0
    return 2.0


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes as tokens, in the format of a published tokenizer; <s> in front of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    return made


def make(family: str) -> None:
    asked = {"model_type": family, **COMMON, **FAMILIES[family]}
    config = transformers.AutoConfig.for_model(asked.pop("model_type"), **asked)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size).tolist() for size in (12, 7)]
    for seed in range(1000):
        randomise(model, seed)
        ran = []
        while len(ran) < len(prompts) and (not ran or ran[-1][1] > 1):
            ran.append(run(model, prompts[len(ran)]))
        if ran[-1][1] > 1:
            break
    else:
        raise SystemExit(f"{family}: every seed has a close choice")
    golden = {
        f"{key}_{n}": value for n, (found, _) in enumerate(ran) for key, value in found.items()
    }
    folder = HERE / family
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    written = json.loads((folder / "config.json").read_text())
    written["dtype"] = "float32"  # what the golden logits were computed in
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, seed {seed}"
    np.savez_compressed(folder / "golden.npz", made_with=np.array(versions), **golden)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{family}: {versions}; {size:,} bytes")


if __name__ == "__main__":
    others = {"rope": make_ropes, "mxfp4": make_mxfp4}
    for name in sys.argv[1:] or (*FAMILIES, *others):
        others[name]() if name in others else make(name)
