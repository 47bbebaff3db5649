"""What happened inside the program, as files: a routing trace and a measurement.

A trace holds the logical experts of every token, sequence by sequence; a measurement holds, for
one run under one placement, its outputs and the rows that the dispatch counted while it ran.
Both come from the same `Generation`s.
"""

import dataclasses
import hashlib
import json
import os
import platform

import jax
import numpy as np

from moe_jax import files
from moe_jax import mesh as mesh_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer.engine import Generation, StepRecord
from moe_jax.placement.plan import Plan
from moe_jax.routing.trace import Trace

MEASUREMENT_FORMAT, MEASUREMENT_VERSION = "moe_jax.measurement", 2


def check(config: Config, flag: str, value: object) -> None:
    """Refuses what asks for the routing of a model that routes nothing."""
    if not config.model.num_moe_layers:
        rule = "needs layers with experts, and all layers of this model are dense"
        fix = "leave it out"
        raise Refused(flag, value, rule, fix)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Every token that was routed, sequences in order and contiguous.

    Attributes:
      expert_TLK: uint8 or uint16 logical experts.
      home_T: int32 expert-axis coordinate of the device that held the token.
      position_T: int32 what copies of experts take turns by: row in its batch + position.
      seq_len: int32 tokens routed of each sequence.
    """

    expert_TLK: np.ndarray
    home_T: np.ndarray
    position_T: np.ndarray
    seq_len: np.ndarray


def routed_tokens(generations: list[Generation], num_experts: int) -> Tokens:
    """Gathers the experts of all tokens of all sequences, in the order of their positions.

    Tokens that were routed again (`Engine.generate`, LongRoPE) are there again, from position 0 on.
    """
    dtype = np.uint8 if num_experts < 255 else np.uint16
    experts, homes, positions, lengths = [], [], [], []
    for generation in generations:
        for b in range(len(generation.tokens)):
            parts = [_of_sequence(record, b) for record in generation.records]
            expert_TLK = np.concatenate([ids for ids, _ in parts]).astype(dtype)
            positions.append(b + np.concatenate([at for _, at in parts]))
            experts.append(expert_TLK)
            homes.append(np.full(len(expert_TLK), generation.home_B[b], np.int32))
            lengths.append(len(expert_TLK))
    return Tokens(
        np.concatenate(experts),
        np.concatenate(homes),
        np.concatenate(positions).astype(np.int32),
        np.array(lengths, np.int32),
    )


def _of_sequence(record: StepRecord, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts [S, L, K] and positions [S] of the tokens that were there."""
    expert_SLK = record.expert_LBSK[:, sequence].swapaxes(0, 1)
    real_S = expert_SLK[:, 0, 0] >= 0
    return expert_SLK[real_S], record.position_BS[sequence][real_S]


def trace(
    generations: list[Generation],
    config: Config,
    corpus: str,
    prompts: list[list[int]] | None = None,
) -> Trace:
    """The routing trace of a run; `seq_home` says where each sequence was held.

    Args:
      generations: of all sequences, with their records.
      config: of the model.
      corpus: the text, for people.
      prompts: given where the identities of tokens are to be recorded too.
    """
    tokens = routed_tokens(generations, config.model.num_experts)
    token_ids_T = None
    if prompts is not None:
        answers = [answer for generation in generations for answer in generation.tokens]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        rows = [b for generation in generations for b in range(len(generation.tokens))]
        parts = np.split(tokens.position_T, np.cumsum(tokens.seq_len)[:-1])
        # the last token of an answer has been routed nowhere
        routed = [np.array(t)[at_T - b] for t, at_T, b in zip(texts, parts, rows, strict=True)]
        token_ids_T = np.concatenate(routed).astype(np.int32)
    start = np.cumsum(tokens.seq_len) - tokens.seq_len
    return Trace(
        expert_ids_TLK=tokens.expert_TLK,
        num_experts=config.model.num_experts,
        seq_len=tokens.seq_len,
        seq_home=tokens.home_T[start],
        token_ids_T=token_ids_T,
        layer_ids=config.model.moe_layer_ids,
        model=config.name,
        corpus=corpus,
    )


def write_measurement(
    path: str | os.PathLike,
    generations: list[Generation],
    prompts: list[list[int]],
    config: Config,
    plan: Plan,
) -> None:
    """Writes outputs and counted rows (.npz); all prompts have one length. Every process calls
    this, and the first one writes.

    `logits` are those of all prompts' positions; the digest in `meta` is over the same bytes.
    """
    tokens = routed_tokens(generations, config.model.num_experts)
    longest = max(map(len, prompts))
    logits = np.concatenate([_prompt_logits(g)[: len(g.tokens), :longest] for g in generations])
    continued = [token for g in generations for token in g.tokens]
    meta = {
        "format": MEASUREMENT_FORMAT,
        "version": MEASUREMENT_VERSION,
        "model": config.name,
        "num_experts": config.model.num_experts,
        "top_k": config.model.top_k,
        "num_devices": config.mesh.expert_devices,
        "num_nodes": config.mesh.node,
        "dispatch": config.model.dispatch,
        "combine": config.model.combine,
        "plan_digest": plan.digest,
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
        "logits_digest": hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest(),
    }
    counted = {
        name: sum(getattr(record, name) for g in generations for record in g.records)
        for name in ("dispatch_LMM", "combine_LMM", "padding_LMM", "computed_LP")
    }
    if jax.process_index():
        return
    with files.atomic_write(path) as file:
        np.savez(
            file,
            meta=np.array(json.dumps(meta)),
            logits=logits,
            text_ids=np.array([p + c for p, c in zip(prompts, continued, strict=True)], np.int32),
            expert_ids=tokens.expert_TLK,
            token_home=tokens.home_T,
            token_position=tokens.position_T,
            **counted,
        )


def _prompt_logits(generation: Generation) -> np.ndarray:
    assert generation.logits_BSV is not None  # `all_logits` of Engine.generate
    return mesh_lib.fetch(generation.logits_BSV)
