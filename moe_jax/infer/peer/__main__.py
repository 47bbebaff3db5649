"""python -m moe_jax.infer.peer DIR...: prefill and decode beside transformers, in one run.

    python -m moe_jax.hf make mixtral DIR                 # 50 M parameters, random
    python -m moe_jax.infer.peer DIR... --python=PYTHON   # one that has torch and transformers

Both sides read the same published folder in float32, use all cores, and take turns; nobody computes
while the other is timed. First 16 greedy tokens have to be the same. Then the peer is timed in
every way of computing experts and both caches, and what counts is its fastest: medians over rounds.
Ours is engine.py on one device, the next token chosen and brought to the host in every step, as is
theirs.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable

import numpy as np

from moe_jax import errors
from moe_jax.errors import Refused
from moe_jax.infer.peer import asked

CHECKED = 16  # greedy tokens
# (experts, cache). A prompt in "batched_mm" copies the weights of every token's experts.
PREFILL_WAYS = (("eager", "dynamic"), ("grouped_mm", "dynamic"))
DECODE_WAYS = tuple(
    (experts, cache)
    for experts in ("eager", "grouped_mm", "batched_mm")
    for cache in ("dynamic", "static")
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed."""

    batch: int
    prompt: int
    new: int


class Ours:
    """The same two questions, answered by this package."""

    def __init__(self, folder: str):
        from moe_jax import mesh as mesh_lib
        from moe_jax.infer import load, published

        source = published.find(folder, None)
        self.config = source.config
        self._engine = load.engine(source, mesh_lib.of_config(source.config.mesh))

    def prefill(self, token_BS: np.ndarray) -> float:
        """Seconds until the next tokens are on the host."""
        started = time.perf_counter()
        self._prompt(token_BS, token_BS.shape[1])
        return time.perf_counter() - started

    def decode(self, token_BS: np.ndarray, steps: int) -> tuple[float, list[list[int]]]:
        """Seconds of a step after the first token, and the tokens of every sequence."""
        chosen_B, cache = self._prompt(token_BS, token_BS.shape[1] + steps + 1)
        length, found = token_BS.shape[1], [chosen_B]
        started = time.perf_counter()
        for step in range(steps):
            position_B = np.full(len(token_BS), length + step, np.int32)
            logits_BV, cache, _ = self._engine.decode(chosen_B, position_B, cache)
            chosen_B = self._choose(logits_BV, position_B + 1)
            found.append(chosen_B)
        return (time.perf_counter() - started) / steps, np.stack(found, axis=1).tolist()

    def _prompt(self, token_BS: np.ndarray, capacity: int):
        batch, length = token_BS.shape
        cache = self._engine.empty_cache(batch, capacity)
        length_B = np.full(batch, length, np.int32)
        _, logits_BV, cache, _ = self._engine.prefill(token_BS, length_B, cache)
        return self._choose(logits_BV, length_B), cache

    def _choose(self, logits_BV, position_B: np.ndarray) -> np.ndarray:
        from moe_jax.infer.sampling import Sampling

        return self._engine.choose(logits_BV, position_B, Sampling()).astype(np.int32)


def compare(ours: Ours, peer: asked.Peer, sizes: Sizes, rounds: int) -> list[str]:
    """A line for prefill and one for decode.

    Raises:
      Refused: both sides do not say the same.
      RuntimeError: transformers failed.
    """
    rng = np.random.default_rng(sizes.batch)
    token_BS = rng.integers(0, 256, (sizes.batch, sizes.prompt)).astype(np.int32)
    tokens = token_BS.tolist()
    peer.ask("use", experts="eager", cache="dynamic")
    theirs = peer.ask("decode", tokens=tokens, steps=CHECKED - 1)["tokens"]
    mine = ours.decode(token_BS, CHECKED - 1)[1]
    if mine != theirs:
        row = next(n for n, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
        rule = f"must be {theirs[row]}, as in transformers: what differs is not compared"
        raise Refused(f"greedy tokens of prompt {row}", mine[row], rule, "use another model")

    def ask(do: str, way: tuple[str, str], **more: int) -> float:
        peer.ask("use", experts=way[0], cache=way[1])
        return peer.ask(do, tokens=tokens, **more)["seconds"]

    def timed(name: str, one: Callable[[], float], do: str, ways, per: int, **more: int) -> str:
        one()  # compiles
        mine: list[float] = []
        theirs: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for way in ways:
            ask(do, way, **more)  # warms up
        for _ in range(rounds):
            mine.append(one())
            for way in ways:
                theirs[way].append(ask(do, way, **more))
        best = min(ways, key=lambda way: float(np.median(theirs[way])))
        ratios = np.divide(theirs[best], mine)
        return (
            f"{name:<8} {sizes.batch:>5} {per / np.median(mine):>12,.0f} "
            f"{per / np.median(theirs[best]):>14,.0f} {np.median(ratios):>7.2f} "
            f"{f'{ratios.min():.2f} .. {ratios.max():.2f}':>15}  {' '.join(best)}"
        )

    return [
        timed(
            *("prefill", lambda: ours.prefill(token_BS), "prefill", PREFILL_WAYS),
            sizes.batch * sizes.prompt,
        ),
        timed(
            *("decode", lambda: ours.decode(token_BS, sizes.new)[0], "decode", DECODE_WAYS),
            sizes.batch,
            steps=sizes.new,
        ),
    ]


HEAD = (
    f"{'':<8} {'batch':>5} {'ours, tok/s':>12} {'theirs, tok/s':>14} {'ratio':>7} "
    f"{'of all rounds':>15}  their fastest"
)


def run(folder: str, python: str, batches: list[int], prompt: int, new: int, rounds: int) -> None:
    """Prints the table of one folder."""
    ours = Ours(folder)
    if prompt + max(new, CHECKED) + 1 > ours.config.model.max_seq_len:
        rule = f"--prompt and --new together must be below {ours.config.model.max_seq_len}"
        raise Refused("--prompt", prompt, rule, "lower one of them")
    with asked.Peer(python) as peer:
        told = peer.ask("load", folder=folder, threads=os.cpu_count())
        print(
            f"{folder}: {told['parameters']:,} parameters, float32; transformers "
            f"{told['transformers']}, torch {told['torch']}, {told['threads']} threads; prompts of "
            f"{prompt}, {new} tokens decoded, {rounds} rounds, load {os.getloadavg()[0]:.1f}"
        )
        print(HEAD, flush=True)
        for batch in batches:
            for line in compare(ours, peer, Sizes(batch, prompt, new), rounds):
                print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """0 done, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.infer.peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="+", help="of a published model, or of moe_jax.hf make")
    parser.add_argument("--python", default=sys.executable, help="default: this interpreter")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    return errors.exit_code(lambda: _compare_all(options))


def _compare_all(options: argparse.Namespace) -> None:
    for name in ("prompt", "new", "rounds"):
        if getattr(options, name) < 1:
            raise Refused(f"--{name}", getattr(options, name), "must be at least 1", "raise it")
    try:
        batches = [int(part) for part in options.batches.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        rule = "must be numbers of sequences, with commas"
        raise Refused("--batches", options.batches, rule, "use 1,16")
    asked.check(options.python)
    from moe_jax import mesh as mesh_lib

    mesh_lib.initialize("cpu", 1, "off")
    for folder in options.folder:
        run(folder, options.python, batches, options.prompt, options.new, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
