"""What is measured: a trained run (trained first where there is none), its trace, its prompts.

Held-out windows are numbered once and for all (data.held_out_windows). The first PLANNING of them
are planned on, the next ones are judged: disjoint text.
"""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np

from moe_jax import config as config_lib
from moe_jax import data
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer import text as text_lib
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG, RUN = "configs/cluster.py", "runs/cluster"
PLANNING = 512  # held-out sequences


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sequences x tokens of prefill; sequences, tokens in the cache and steps of decode."""

    prefill_sequences: int = 32
    prefill_tokens: int = 128
    decode_sequences: int = 512
    decode_start: int = 24
    decode_steps: int = 8


def config_of(run: str | None) -> Config:
    """The config of a run; None: of the one that would be trained."""
    if run is None:
        return config_lib.from_config_dict(runpy.run_path(str(ROOT / CONFIG))["get_config"]())
    path = pathlib.Path(run) / "config.json"
    if not path.is_file():
        raise Refused(
            "--model",
            run,
            "must be the work directory of a training run (it has no config.json)",
            "train first: python train.py --config=configs/quickstart.py --workdir=DIR",
        )
    return config_lib.from_json(path.read_text(encoding="utf-8"))


def check_prompts(config: Config, sizes: Sizes) -> None:
    """Refuses prompts that are longer than held-out windows."""
    longest = max(sizes.prefill_tokens, sizes.decode_start + sizes.decode_steps)
    if longest > config.data.seq_len:
        raise Refused(
            "prompt tokens",
            longest,
            f"held-out windows of this run have data.seq_len = {config.data.seq_len} tokens",
            "ask for shorter prompts",
        )


def trained(run: str | None) -> str:
    """The work directory to measure; the model is trained there if none was named."""
    if run is not None:
        return str(pathlib.Path(run).resolve())  # for processes that start elsewhere
    # A run that is complete ends at once; one that was cut short goes on.
    _python("train.py", f"--config={CONFIG}", f"--workdir={RUN}")
    return str(ROOT / RUN)


def planning_trace(run: str, folder: pathlib.Path) -> Trace:
    """The routing of the planning prompts, with homes left out: they were another machine's."""
    path = folder / "planning.npz"
    _python("infer.py", f"--workdir={run}", f"--record={path}", f"--held_out={PLANNING}")
    return dataclasses.replace(trace_lib.load(path), seq_home=None)


def write_inputs(run: str, sizes: Sizes, path: pathlib.Path) -> None:
    """The judged prompts as `prefill_BS` and `decode_BS`."""
    config, length = config_of(run), sizes.decode_start + sizes.decode_steps
    corpus = data.load_corpus(config.data)
    text = text_lib.of_run(pathlib.Path(run), config)
    corpus = dataclasses.replace(corpus, held_out=text.corpus(corpus.held_out))
    count = sizes.prefill_sequences + sizes.decode_sequences
    windows_BS = data.held_out_windows(corpus, config.data.seq_len, count, PLANNING)
    prefill_BS = windows_BS[: sizes.prefill_sequences, : sizes.prefill_tokens]
    decode_BS = windows_BS[sizes.prefill_sequences :, :length]
    np.savez(path, prefill_BS=prefill_BS.astype(np.int32), decode_BS=decode_BS.astype(np.int32))


def _python(program: str, *flags: str) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, program, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise Refused(
            "command", " ".join(command[1:]), f"ended with {done.returncode}", "see what it says"
        )
