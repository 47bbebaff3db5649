"""An upcycled model as a published folder: it has the shape of Mixtral, whose layers all route.

Written in float32, as runs keep parameters, so that it reads back bit for bit.
"""

import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.errors import Refused
from moe_jax.hf import config_json, folder, layout, rope_json, run, save


def export(workdir: str | os.PathLike, out: str | os.PathLike) -> str:
    """Writes the newest step with config.json and the run's tokenizer; says so.

    Args:
      workdir: of an upcycled run.
      out: a folder that is not there, or is empty; it appears whole, or not at all.

    Raises:
      Refused: no run, no good step, or parts that Mixtral does not have, by name.
    """
    folder.check_new(out, "--export")
    config = run.config(workdir)
    check(config.model)
    with tempfile.TemporaryDirectory() as scratch:
        like = pathlib.Path(scratch)
        if config.data.tokenizer:
            shutil.copytree(pathlib.Path(workdir) / config.data.tokenizer, like, dirs_exist_ok=True)
        (like / "config.json").write_text(json.dumps(_said(config.model), indent=1) + "\n")
        published = config_json.read(like)
        run.check_same(config, published.config, "--workdir", "a Mixtral")
        step, arrays = run.arrays(workdir)
        way = layout.of_family(published.family, "per expert", published.config.model)
        files = save.export(arrays, way, step.plan.placement, out, dtypes="F32", like=like)
    return f"{out}: step {step.step}, {len(files)} file(s) of tensors, as a Mixtral"


def check(model: ModelConfig) -> None:
    """Raises `Refused` for what a dense model can bring along and a Mixtral does not have."""
    if model.num_dense_layers:
        rule = "must be 0: no published family with plain attention has dense layers before others"
        fix = "upcycle without --first-dense"
        raise Refused("model.num_dense_layers", model.num_dense_layers, rule, fix)
    if model.attention_bias:
        rule = "must be '': a Mixtral's attention has no biases"
        fix = "upcycle a Llama without attention_bias"
        raise Refused("model.attention_bias", model.attention_bias, rule, fix)


def _said(model: ModelConfig) -> dict[str, Any]:
    """config.json; parts that it does not name are refused by `run.check_same`."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.d_model,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.d_head,
        "intermediate_size": model.d_ff,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.top_k,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        **rope_json.written(model.rope, model.rope_theta),
        "tie_word_embeddings": model.tied_output,
        "router_aux_loss_coef": model.load_balance_coef,
        "sliding_window": None,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }
