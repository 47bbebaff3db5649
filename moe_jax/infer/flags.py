"""The flags of infer.py, and what they ask for. JAX is not imported for --help."""

import pathlib
from typing import Any

from absl import flags

from moe_jax import checkpoint, entry
from moe_jax import config as config_lib
from moe_jax.checkpoint import integrity
from moe_jax.errors import Refused

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a training run.")
HF = flags.DEFINE_string("hf", None, "Folder of a published model, in place of --workdir.")
DEVICES = flags.DEFINE_string(
    "devices", None, "Split experts over so many, or all over axes: 'node=2,expert=4,tensor=2' "
    "(of data, fsdp, node, expert, tensor). Default: the mesh of the run; with --hf the devices of "
    "the plan, or one."
)  # fmt: skip
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "off",
    "Join other processes: 'auto' (Cloud TPU pod, Slurm, MPI: the same command on every host), "
    "'HOST:PORT,NUM_PROCESSES,PROCESS_ID', or 'off'. The first of them writes, and listens.",
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "File with one prompt a line.")
CHAT = flags.DEFINE_bool("chat", False, "Each prompt is what a user says to an assistant.")
PLACEMENT = flags.DEFINE_string(
    "placement", None, "Plan to compute under; the experts are moved there as they are loaded. "
    "Default: the plan stored with the checkpoint."
)  # fmt: skip
DISPATCH = flags.DEFINE_string("dispatch", None, "As model.dispatch. Default: as in training.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "Machine that 'auto' and plans go by: a name in placement/topologies, or a .json.",
)
TRACE = flags.DEFINE_string("trace", "", "Recorded routing that 'auto' counts rows on.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens after each prompt.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = greedy.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus: the smallest set of tokens of this mass.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
RECORD = flags.DEFINE_string("record", None, "Write the routing of all tokens to this .npz trace.")
RECORD_TOKENS = flags.DEFINE_bool(
    "record_tokens", False, "With --record: also which token each was, for homes by what a prompt "
    "says. The text can be read back from them."
)  # fmt: skip
MEASURE = flags.DEFINE_string(
    "measure", None, "Write outputs and counted rows on held-out text to this .npz."
)
BENCHMARK = flags.DEFINE_bool(
    "benchmark", False, "Print tokens/s and rows moved per token, of the first 32 sequences."
)
HELD_OUT = flags.DEFINE_integer("held_out", 64, "Held-out sequences, where no prompt is given.")
HELD_OUT_START = flags.DEFINE_integer("held_out_start", 0, "Number of the first of them.")
SERVE = flags.DEFINE_bool("serve", False, "Answer over HTTP, as OpenAI's API does.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "With --serve: where to listen.")
PORT = flags.DEFINE_integer("port", 8000, "With --serve: 0 = any free one.")
CONTEXT = flags.DEFINE_integer("context", None, "With --serve: tokens of prompt and answer.")
SEATS = flags.DEFINE_integer("seats", None, "With --serve: requests that run at once.")
CACHE_TOKENS = flags.DEFINE_integer("cache_tokens", None, "With --serve: of keys and values.")
MAX_QUEUE = flags.DEFINE_integer("max_queue", 1024, "With --serve: requests that may wait.")
BEARER_TOKEN_FILE = flags.DEFINE_string("bearer_token_file", None, "With --serve: a secret.")
REPLAN_TOKENS = flags.DEFINE_integer(
    "replan_tokens", 0, "With --serve: after every so many tokens, a plan is made from the traffic "
    "and adopted if it pays. 0 = experts stay. --topology names the links."
)  # fmt: skip
REPLAN_PAUSE = flags.DEFINE_float(
    "replan_pause",
    0.05,
    "With --replan_tokens: seconds that a step may wait for moving experts, of one layer at least.",
)
REPLAN_HOMES = flags.DEFINE_bool(
    "replan_homes", True, "With --replan_tokens: requests run on the device whose experts the "
    "tokens of their prompts are sent to."
)  # fmt: skip
REPLAN_PINS = flags.DEFINE_string(
    "replan_pins", "", "With --replan_tokens: experts that stay on a device, as "
    "LAYER:EXPERT:DEVICE with commas between, or files of such lines."
)  # fmt: skip
SERVE_LOAD = flags.DEFINE_bool("serve-load", False, "With --benchmark: requests that arrive.")
PEER_PYTHON = flags.DEFINE_string(
    "peer_python", None, "With --serve-load and --hf: an interpreter that has torch and "
    "transformers, which then serves the same requests by generate."
)  # fmt: skip


def digests_ahead() -> integrity.Digests | None:
    """Begins to verify the newest step of --workdir; None where there is nothing to verify.

    What is wrong with the run is said later.
    """
    root = pathlib.Path(WORKDIR.value or "")
    if not WORKDIR.value or not (root / "config.json").is_file():
        return None
    try:
        config = config_lib.read(root / "config.json")
    except Refused:
        return None
    verified = config.train.checkpoints_verified
    return checkpoint.digests_ahead(root / "checkpoints") if verified else None


def _check_read() -> None:
    """Refuses flags that were given and that nothing would read."""
    batch = bool(MEASURE.value) or (BENCHMARK.value and not SERVE_LOAD.value)
    prompts = bool(PROMPT.value or PROMPTS.value)
    held_out = (batch or bool(RECORD.value)) and not (prompts or SERVE.value or SERVE_LOAD.value)
    of_server = (HOST, PORT, CONTEXT, SEATS, CACHE_TOKENS, MAX_QUEUE, BEARER_TOKEN_FILE)
    for is_read, by, given in (
        (SERVE.value, "with --serve", (*of_server, REPLAN_TOKENS)),
        (
            SERVE.value and REPLAN_TOKENS.value,
            "with --serve --replan_tokens=50000",
            (REPLAN_PAUSE, REPLAN_HOMES, REPLAN_PINS),
        ),
        (
            (prompts or batch) and not SERVE.value,
            "with --prompt, --measure or --benchmark, without --serve and --serve-load",
            (MAX_NEW_TOKENS, TEMPERATURE, TOP_P, SEED),
        ),
        (
            held_out,
            "with --record, --measure or --benchmark, without --prompt, --serve and --serve-load",
            (HELD_OUT, HELD_OUT_START),
        ),
    ):
        for flag in given:
            if flag.present and not is_read:
                rule = f"is only read {by}"
                raise Refused(f"--{flag.name}", flag.value, rule, "leave it out, or ask for that")


def request() -> Any:
    """The `run.Request` of the command line; refuses files that could not be written."""
    _check_read()
    entry.check_output("--record", RECORD.value, suffix=".npz")
    entry.check_output("--measure", MEASURE.value, suffix=".npz")
    from moe_jax.infer import run
    from moe_jax.infer.sampling import Sampling
    from moe_jax.infer.server import settings

    return run.Request(
        workdir=WORKDIR.value,
        hf=HF.value,
        devices=DEVICES.value,
        distributed=DISTRIBUTED.value,
        placement=PLACEMENT.value,
        dispatch=DISPATCH.value,
        topology=TOPOLOGY.value,
        trace=TRACE.value,
        prompts=run.read_prompts(PROMPT.value, PROMPTS.value),
        chat=CHAT.value,
        held_out=HELD_OUT.value,
        held_out_start=HELD_OUT_START.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=Sampling(TEMPERATURE.value, TOP_P.value, SEED.value),
        record=RECORD.value,
        record_tokens=RECORD_TOKENS.value,
        measure=MEASURE.value,
        benchmark=BENCHMARK.value,
        serve_load=SERVE_LOAD.value,
        peer_python=PEER_PYTHON.value,
        serve=settings.Settings(
            host=HOST.value,
            port=PORT.value,
            context=CONTEXT.value,
            seats=SEATS.value,
            cache_tokens=CACHE_TOKENS.value,
            max_queue=MAX_QUEUE.value,
            bearer_token_file=BEARER_TOKEN_FILE.value,
            record=RECORD.value,
            record_tokens=RECORD_TOKENS.value,
            replan_tokens=REPLAN_TOKENS.value,
            replan_pause=REPLAN_PAUSE.value,
            replan_homes=REPLAN_HOMES.value,
            replan_pins=REPLAN_PINS.value,
        )
        if SERVE.value
        else None,
    )
