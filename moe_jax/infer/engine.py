"""Prefill and decode of a batch of prompts on the mesh, with the routing and traffic of each step.

Prompts are padded on the right to a common power of two, and the batch to the number of devices;
padding is routed nowhere, moves nothing, and its keys are overwritten before anyone attends to
them. Programs are compiled once per (batch, length).

LongRoPE turns queries and keys another way once a text is longer than those of pre-training. Where
a text grows beyond, the batch is prefilled anew with all that was said, as transformers does.

Axes: B sequences, S positions at hand, C cache capacity, L layers, K top_k, V vocabulary.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer import sampling as sampling_lib
from moe_jax.infer.prepared import prepared
from moe_jax.model import cache as cache_lib
from moe_jax.model import coherent, transformer
from moe_jax.model.dispatch.table import Table


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one prefill or decode step reported, on the host.

    Attributes:
      expert_LBSK: logical experts; -1 at positions without a token.
      position_BS: position of each token in its sequence.
      dispatch_LMM, combine_LMM, distinct_LMM, padding_LMM: rows on the wire, see `Traffic`.
      computed_LP: rows computed by each slot.
      seconds: from choosing the token (or from the prompt) until the logits were there.
    """

    expert_LBSK: np.ndarray
    position_BS: np.ndarray
    dispatch_LMM: np.ndarray
    combine_LMM: np.ndarray
    distinct_LMM: np.ndarray
    padding_LMM: np.ndarray
    computed_LP: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """Attributes:
    tokens: per prompt, the tokens that followed it.
    logits_BSV: float32 prefill logits of the padded batch, on the devices; see `mesh.fetch`. None
      if they were not asked for.
    records: the prefill's, then one per decode step.
    home_B: the device, as plans count, that holds each sequence.
    """

    tokens: list[list[int]]
    logits_BSV: jax.Array | None
    records: list[StepRecord]
    home_B: np.ndarray


class Programs:
    """Prefill and decode step of a model on a mesh, jitted, and the cache that they want.

    Attributes:
      prefill: (model, table, token_BS, length_B, cache, *, all_logits) -> (logits_BSV or None,
        logits_BV of the last tokens, cache, record)
      decode: (model, table, token_B, position_B, cache) -> (logits_BV, cache, record); the cache is
        used up.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self._config, self._mesh = config.model, mesh
        # In coherent dispatch tokens stay away between layers: another way through the same model.
        apart = config.model.dispatch == "coherent"
        self._layers: Any = coherent if apart else transformer
        attention_batch = mesh_lib.attention_batch(config.mesh)
        self._split = {} if apart else {"attention_batch": attention_batch}
        forward = self._layers.build_forward(config.model, mesh, **self._split)

        @functools.partial(jax.jit, static_argnames="all_logits")
        def prefill(model, table, token_BS, length_B, cache, *, all_logits):
            real_BS = jnp.arange(token_BS.shape[1])[None] < length_B[:, None]
            last_B = jnp.maximum(length_B - 1, 0)
            wanted_B = None if all_logits else last_B
            output = forward(model, token_BS, table, real_BS=real_BS, cache=cache, last_B=wanted_B)
            logits_BSV = output.logits_BSV
            if not all_logits:
                return None, logits_BSV[:, 0], output.cache, output.record
            last_BV = jnp.take_along_axis(logits_BSV, last_B[:, None, None], axis=1)[:, 0]
            return logits_BSV, last_BV, output.cache, output.record

        @functools.partial(jax.jit, donate_argnums=4)
        def decode(model, table, token_B, position_B, cache):
            output = forward(
                model,
                jnp.maximum(token_B, 0)[:, None],
                table,
                position_BS=position_B[:, None],
                real_BS=(token_B >= 0)[:, None],
                cache=cache,
            )
            return output.logits_BSV[:, 0], output.cache, output.record

        self.prefill, self.decode = prefill, decode

    def abstract_cache(self, batch: int, capacity: int) -> transformer.Cache:
        """For `capacity` positions of `batch` sequences: shapes, dtypes and shardings."""
        return self._layers.abstract_cache(self._config, batch, capacity, self._mesh, **self._split)


class Engine:
    """Compiled prefill and decode of one model under one placement."""

    def __init__(self, config: Config, mesh: Mesh, model: transformer.Transformer, table: Table):
        self._config, self._mesh = config, mesh
        self._model = prepared(config.model, mesh, model)
        self._table = jax.tree.map(lambda t: mesh_lib.put_replicated(mesh, t), table)
        self._programs = Programs(config, mesh)
        self._choose = jax.jit(sampling_lib.choose, static_argnums=2)
        rope = config.model.rope  # the first position of a text that has other factors
        self._long_from = rope.original_seq_len if rope.long_factor else None

    def placed(self, model: transformer.Transformer, table: Table) -> "Engine":
        """An engine for the same model under another placement; shares the compiled programs."""
        other = copy.copy(self)
        other._model = prepared(self._config.model, self._mesh, model)
        other._table = jax.tree.map(lambda t: mesh_lib.put_replicated(self._mesh, t), table)
        return other

    def empty_cache(self, batch: int, capacity: int) -> transformer.Cache:
        """For `capacity` positions of `batch` sequences, placed as this engine's programs want."""
        return cache_lib.empty(self._programs.abstract_cache(batch, capacity))

    def prefill(
        self,
        token_BS: np.ndarray,
        length_B: np.ndarray,
        cache: transformer.Cache,
        *,
        all_logits: bool = False,
    ) -> Any:
        """One prefill step, left on the devices.

        Args:
          token_BS: int32, on the host; sequences of length 0 are padding.
          length_B: int32, tokens of each sequence.
          cache: empty, for at least S positions.
          all_logits: those of all positions are wanted as well.

        Returns:
          (logits_BSV or None, logits_BV of the last tokens, cache, `LayerRecord` of all layers)
        """
        put = functools.partial(mesh_lib.put_batch, self._mesh)
        args = self._model, self._table, put(token_BS), put(length_B), cache
        return self._programs.prefill(*args, all_logits=all_logits)

    def decode(self, token_B: np.ndarray, position_B: np.ndarray, cache: transformer.Cache) -> Any:
        """One decode step, left on the devices; `cache` is used up.

        With LongRoPE no text may grow beyond the short factors in it: `generate` prefills there.

        Args:
          token_B: int32, on the host; -1 where there is no sequence.
          position_B: int32, the position of each token in its sequence.
          cache: of the positions before.

        Returns:
          (logits_BV, cache, `LayerRecord` of all layers)
        """
        put = functools.partial(mesh_lib.put_batch, self._mesh)
        args = self._model, self._table, put(token_B), put(position_B), cache
        return self._programs.decode(*args)

    def choose(
        self, logits_BV: jax.Array, position_B: np.ndarray, how: sampling_lib.Sampling
    ) -> np.ndarray:
        """The next token of every sequence, on the host; positions are those of these tokens."""
        put = functools.partial(mesh_lib.put_batch, self._mesh)
        return mesh_lib.fetch(self._choose(logits_BV, put(position_B), how))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: sampling_lib.Sampling,
        on_token: Callable[[int, int], Any] = lambda sequence, token: None,
        ends: Collection[int] = (),
        all_logits: bool = True,
    ) -> Generation:
        """Continues every prompt, up to a token that ends its text.

        Args:
          prompts: token ids.
          max_new_tokens: tokens after each prompt.
          sampling: how they are chosen.
          on_token: called with (prompt number, token) as soon as a token is on the host.
          ends: tokens after which a sequence says nothing more; none is computed or routed then.
            (With LongRoPE the tokens of all that go on are routed again where one grows long.)
          all_logits: of the prompts, in the result; without them a prompt costs less.
        """
        check_prompts(prompts, max_new_tokens, self._config.model.max_seq_len)
        token_BS, length_B = _pad(prompts, mesh_lib.size(self._mesh, mesh_lib.BATCH))
        batch, padded = token_BS.shape
        capacity = _power_of_two(padded + max_new_tokens)
        cache = self.empty_cache(batch, capacity)

        start = time.perf_counter()
        logits_BSV, logits_BV, cache, record = self.prefill(
            token_BS, length_B, cache, all_logits=all_logits
        )
        tokens: list[list[int]] = [[] for _ in prompts]
        going_B = length_B > 0
        position_BS = np.broadcast_to(np.arange(padded), token_BS.shape)
        records = [_on_host(record, position_BS, logits_BV, start)]
        for i in range(max_new_tokens):
            # The token at position `length + i`, decided from the logits before it.
            position_B = length_B + i
            start = time.perf_counter()
            chosen_B = self.choose(logits_BV, position_B, sampling)
            for sequence in np.flatnonzero(going_B).tolist():
                tokens[sequence].append(int(chosen_B[sequence]))
                on_token(sequence, tokens[sequence][-1])
            going_B &= ~np.isin(chosen_B, list(ends))
            if i + 1 == max_new_tokens or not going_B.any():
                break
            if (going_B & (position_B == self._long_from)).any():
                said = zip(prompts, tokens, going_B[: len(prompts)], strict=True)
                texts = [[*prompt, *answer] if going else [] for prompt, answer, going in said]
                again_BS, again_B = _pad(texts, batch)
                del cache  # its room is needed
                cache = self.empty_cache(batch, capacity)
                _, logits_BV, cache, record = self.prefill(again_BS, again_B, cache)
                at_BS = np.broadcast_to(np.arange(again_BS.shape[1]), again_BS.shape)
            else:
                fed_B = np.where(going_B, chosen_B, -1).astype(np.int32)
                logits_BV, cache, record = self.decode(fed_B, position_B.astype(np.int32), cache)
                at_BS = position_B[:, None]
            records.append(_on_host(record, at_BS, logits_BV, start))
        return Generation(tokens, logits_BSV, records, homes(batch, self._mesh))


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    """Refuses what cannot be run."""
    if max_new_tokens < 0:
        raise Refused("--max_new_tokens", max_new_tokens, "must be at least 0", "use 64")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise Refused(f"prompt {number}", "", "must not be empty", "write some text")
        if len(prompt) + max_new_tokens > max_seq_len:
            raise Refused(
                f"prompt {number} + --max_new_tokens",
                f"{len(prompt)} + {max_new_tokens} tokens",
                f"must be at most model.max_seq_len = {max_seq_len}, the rotary range",
                "shorten one of them",
            )


def homes(batch: int, mesh: Mesh) -> np.ndarray:
    """The device, as plans count, that holds each sequence of a batch, int32 [B]."""
    shard_B = np.arange(batch) // (batch // mesh_lib.size(mesh, mesh_lib.BATCH))
    return (shard_B % mesh_lib.size(mesh, mesh_lib.EXPERT)).astype(np.int32)


def _pad(prompts: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, S] and lengths [B]; sequences of length 0 fill the batch up."""
    batch = -(-len(prompts) // multiple) * multiple
    padded = _power_of_two(max(map(len, prompts)))
    token_BS = np.zeros((batch, padded), np.int32)
    length_B = np.zeros(batch, np.int32)
    for row, prompt in enumerate(prompts):
        token_BS[row, : len(prompt)] = prompt
        length_B[row] = len(prompt)
    return token_BS, length_B


def _power_of_two(size: int) -> int:
    return 1 << max(3, (size - 1).bit_length())


def _on_host(record: Any, position_BS: np.ndarray, logits: jax.Array, start: float) -> StepRecord:
    logits.block_until_ready()
    seconds = time.perf_counter() - start
    traffic = record.traffic
    return StepRecord(
        expert_LBSK=mesh_lib.fetch(record.expert_BSK),
        position_BS=position_BS,
        dispatch_LMM=mesh_lib.fetch(traffic.dispatch_MM).astype(np.int64),
        combine_LMM=mesh_lib.fetch(traffic.combine_MM).astype(np.int64),
        distinct_LMM=mesh_lib.fetch(traffic.distinct_MM).astype(np.int64),
        padding_LMM=mesh_lib.fetch(traffic.padding_MM).astype(np.int64),
        computed_LP=mesh_lib.fetch(traffic.computed_P).astype(np.int64),
        seconds=seconds,
    )
