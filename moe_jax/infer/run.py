"""The command behind infer.py: answer prompts, record routing, measure, benchmark."""

import dataclasses
import hashlib
import pathlib
import sys
import time

import jax
import numpy as np

from moe_jax import auto, data, metrics
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax import processes as processes_lib
from moe_jax.checkpoint import integrity
from moe_jax.errors import Refused
from moe_jax.infer import load, published, record
from moe_jax.infer.engine import Engine, Generation, check_prompts
from moe_jax.infer.peer import asked
from moe_jax.infer.sampling import Sampling
from moe_jax.infer.server.settings import Settings
from moe_jax.infer.serving import placing, serve_load, supported
from moe_jax.infer.text import Text
from moe_jax.routing import trace as trace_lib

BATCH = 32  # held-out sequences at once, and of a benchmark (which flags.py says, too)


@dataclasses.dataclass(frozen=True)
class Request:
    """What infer.py was asked for; see its flags."""

    workdir: str | None
    hf: str | None
    devices: str | None
    placement: str | None
    dispatch: str | None
    topology: str
    trace: str
    prompts: list[str]
    held_out: int
    held_out_start: int
    max_new_tokens: int
    sampling: Sampling
    record: str | None
    measure: str | None
    benchmark: bool
    distributed: str = "off"
    record_tokens: bool = False
    chat: bool = False
    serve_load: bool = False
    peer_python: str | None = None
    serve: Settings | None = None


def run(request: Request, ahead: integrity.Digests | None = None) -> None:
    """Checks everything, then runs. Raises `Refused` before any device work.

    Args:
      request: what was asked for.
      ahead: digests of a step of its work directory that have begun already.
    """
    _check_flags(request)
    source: load.Source | published.Source
    where = (request.placement, request.dispatch, request.devices)
    if request.hf is not None:
        source = published.find(request.hf, *where)
    else:
        assert request.workdir is not None  # by `_check_flags`
        source = load.find(request.workdir, *where, ahead)
    _check_machine(source.config, request)
    serves = request.serve is not None or request.serve_load
    config, note = auto.resolve(
        dataclasses.replace(source.config, topology=request.topology, trace=request.trace),
        source.plan.placement,
        supported.check_dispatch if serves else None,
    )
    source = dataclasses.replace(source, config=config)
    _check_routing(config, request)
    if serves:
        _serve(source, request, note)
        return
    if request.measure:
        _check_measured(config, request.measure)
    if request.measure and config.model.capacity_factor:
        raise Refused(
            "--measure",
            request.measure,
            f"counted rows are compared with predicted ones, which know nothing of the assignments "
            f"that model.capacity_factor = {config.model.capacity_factor} drops",
            "use --record or --benchmark, or a run with model.capacity_factor = 0",
        )
    if request.prompts:
        prompts = [_encoded(source.text, prompt, request.chat) for prompt in request.prompts]
        corpus_name = "prompts"
    else:
        corpus = data.load_corpus(config.data)
        corpus = dataclasses.replace(corpus, held_out=source.text.corpus(corpus.held_out))
        windows = data.held_out_windows(
            corpus, config.data.seq_len, request.held_out, request.held_out_start
        )
        prompts, corpus_name = windows[:, :-1].tolist(), f"{corpus.name} held-out"
    check_prompts(prompts, _new_tokens(request), config.model.max_seq_len)

    source = _on_devices(source, request, prompts)
    config = source.config
    if note:
        metrics.say(note)
    mesh = mesh_lib.of_config(config.mesh)
    engine = load.engine(source, mesh)
    if request.prompts:
        generations = [_answer(engine, prompts, request, source.text)]
    elif request.record or request.measure:
        generations = _in_batches(engine, prompts, request)
    if request.record:
        texts = prompts if request.record_tokens else None
        trace = record.trace(generations, config, corpus_name, texts)
        if jax.process_index() == 0:
            trace_lib.save(trace, request.record)
        metrics.say(
            f"{request.record}: {trace.num_tokens:,} tokens of {trace.num_sequences} sequences, "
            f"{trace.num_layers} layers, top {trace.top_k} of {trace.num_experts}; "
            f"digest {trace.digest[:12]}"
        )
    if request.measure:
        record.write_measurement(request.measure, generations, prompts, config, source.plan)
        metrics.say(f"{request.measure}: plan {source.plan.digest[:12]}, {_rows(generations)}")
    if request.benchmark:
        _benchmark(engine, prompts, request)


def _serve(source: load.Source | published.Source, request: Request, note: str) -> None:
    config = source.config
    supported.check_model(config)
    if request.serve:
        first = request.distributed != "auto" and _processes(request)[1] == 0
        request.serve.check(listens=first)  # of "auto" nobody knows yet
        if request.serve.context:
            supported.check_context(config.model, request.serve.context)
        if request.serve.replan_tokens:
            placing.check(config)
    source = _on_devices(source, request, [])
    if note:
        metrics.say(note)
    if request.serve:
        from moe_jax.infer.server import run as server_run  # its packages are an extra

        server_run.serve(source, request.serve)
    else:
        serve_load.run(source, request.peer_python)


def _processes(request: Request) -> tuple[int, int]:
    """How many are started, and which this is, as far as the command line says."""
    _, count, number = processes_lib.parse(request.distributed) or ("", 1, 0)
    return count, number


def _on_devices(
    source: load.Source | published.Source, request: Request, prompts: list[list[int]]
) -> load.Source | published.Source:
    """Joins the other processes and takes the devices of the mesh.

    Raises:
      Refused: there are too few, or another process has found other files or was asked otherwise.
    """
    config, (count, _) = source.config, _processes(request)
    virtual = source.virtual_devices
    if virtual and count > 1:  # made in each; all of the mesh
        if config.mesh.num_devices % count:
            rule = f"must divide the mesh's {config.mesh.num_devices} devices among its processes"
            raise Refused("--distributed", request.distributed, rule, "start another number")
        virtual = config.mesh.num_devices // count
    mesh_lib.initialize(config.platform, virtual, request.distributed)
    if request.devices is None:
        config = load.on_devices(config, mesh_lib.num_devices())
    config_lib.check_devices(config, mesh_lib.num_devices())
    source = dataclasses.replace(source, config=config)
    if jax.process_count() == 1:
        return source
    found = repr((config, source.plan.digest, source.version, prompts, _asked(request)))
    other = mesh_lib.first_other(hashlib.sha256(found.encode()).digest())
    if other is not None:
        name = "--workdir" if request.hf is None else "--hf"
        rule = (
            f"has another config, plan, model or text, or was asked otherwise, in process "
            f"{other} than in process 0"
        )
        raise Refused(
            name,
            request.hf or request.workdir,
            rule,
            "give every host the same files and the same command",
        )
    return source


def _asked(request: Request) -> str:
    """What all processes have to be asked alike; where files are may differ."""
    fields = dataclasses.asdict(request)
    serve = fields["serve"] or {}
    for name in ("distributed", "workdir", "hf", "placement", "trace", "peer_python"):
        del fields[name]
    for name in ("host", "port", "bearer_token_file"):
        serve.pop(name, None)
    for group in (fields, serve):
        group |= {name: bool(group.get(name)) for name in ("record", "measure")}
    return repr(fields)


def _check_flags(request: Request) -> None:
    """Rules between flags, before a checkpoint is read (and its files compared with their sums)."""
    if request.workdir and request.hf is not None:
        raise Refused("--hf", request.hf, "excludes --workdir", "give one of them")
    if not request.workdir and request.hf is None:
        rule = "is required, or --hf=DIR"
        fix = "give --workdir=...; --help explains every flag"
        raise Refused("--workdir", request.workdir, rule, fix)
    processes_lib.parse(request.distributed)
    if request.serve_load and request.distributed != "off":
        rule = "is not there with --serve-load, which measures one process"
        raise Refused("--distributed", request.distributed, rule, "leave it out")
    if request.record_tokens and not request.record:
        rule = "says what a trace holds, and none is written"
        raise Refused("--record_tokens", True, rule, "give --record=TRACE.npz")
    of_held_out = request.record or request.measure or request.benchmark
    if request.prompts and request.measure:
        raise Refused("--measure", request.measure, "runs held-out text", "leave out --prompt")
    if request.chat and not request.prompts:
        raise Refused("--chat", True, "is a way to read prompts", "give --prompt or --prompts")
    if request.peer_python:
        if not request.serve_load or request.hf is None:
            rule = "is for --serve-load of a published model, which transformers can read"
            fix = "give --hf=DIR --benchmark --serve-load, or leave it out"
            raise Refused("--peer_python", request.peer_python, rule, fix)
        asked.check(request.peer_python, "--peer_python")
    if request.serve_load and not request.benchmark:
        raise Refused("--serve-load", True, "is a kind of --benchmark", "give --benchmark, too")
    if request.serve_load and (request.prompts or request.record or request.measure):
        rule = "answers requests of its own, and excludes --prompt, --record and --measure"
        raise Refused("--serve-load", True, rule, "leave them out")
    if request.serve and (request.prompts or request.measure or request.benchmark):
        rule = "answers requests, and excludes --prompt, --measure and --benchmark"
        raise Refused("--serve", True, rule, "leave them out")
    if not request.prompts and not of_held_out and not request.serve:
        raise Refused(
            "--prompt", None, "is required", "give --prompt, --prompts, --record or --benchmark"
        )
    for flag, value, least, fix in (
        ("--held_out", request.held_out, 1, "use 64"),
        ("--held_out_start", request.held_out_start, 0, "use 0"),
        ("--max_new_tokens", request.max_new_tokens, 0, "use 64"),
    ):
        if value < least:
            raise Refused(flag, value, f"must be at least {least}", fix)
    if request.benchmark and not request.serve_load and request.max_new_tokens < 2:
        rule = "must be at least 2 with --benchmark: the first token comes from the prompt"
        raise Refused("--max_new_tokens", request.max_new_tokens, rule, "use 64")


def _check_machine(config: config_lib.Config, request: Request) -> None:
    """Refuses what a dispatch or plans would go by, where neither is looked for."""
    is_auto = config.model.dispatch == config_lib.AUTO
    plans = request.serve_load or (request.serve and request.serve.replan_tokens)
    for flag, value, is_read, by in (
        ("--topology", request.topology, is_auto or plans, ", --replan_tokens or --serve-load"),
        ("--trace", request.trace, is_auto, ""),
    ):
        if value and not is_read:
            rule = f"is only read with --dispatch=auto{by}"
            raise Refused(flag, value, rule, "leave it out, or ask for that")


def _check_routing(config: config_lib.Config, request: Request) -> None:
    serve = request.serve
    for flag, value in (
        ("--record", request.record),
        ("--measure", request.measure),
        ("--replan_tokens", serve.replan_tokens if serve else 0),
    ):
        if value:
            record.check(config, flag, value)


def _check_measured(config: config_lib.Config, path: str) -> None:
    """Refuses what no report could compare, before it is measured."""
    for name, known, fix in (
        ("dispatch", config_lib.MEASURED_DISPATCHES, "give --dispatch=exchange"),
        ("combine", config_lib.MEASURED_COMBINES, "measure a run with one of them"),
    ):
        if (value := getattr(config.model, name)) not in known:
            rule = f"is compared where model.{name} is {' or '.join(known)}, not {value!r}"
            raise Refused("--measure", path, rule, f"{fix}, or use --record")


def _new_tokens(request: Request) -> int:
    """The most tokens that will follow a prompt."""
    answers = request.prompts or request.measure or request.benchmark
    return request.max_new_tokens if answers else 0


def read_prompts(texts: list[str], path: str | None) -> list[str]:
    """The prompts of --prompt and of the lines of --prompts."""
    prompts = list(texts)
    if path:
        if not pathlib.Path(path).is_file():
            raise Refused("--prompts", path, "must be a text file, one prompt a line", "correct it")
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise Refused("--prompts", path, f"must be UTF-8 ({error})", "convert it") from None
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise Refused("--prompts", path, "holds no prompt", "write one prompt a line")
    return prompts


def _encoded(text: Text, prompt: str, is_chat: bool) -> list[int]:
    return text.chat([{"role": "user", "content": prompt}]) if is_chat else text.encode(prompt)


def _answer(engine: Engine, prompts: list[list[int]], request: Request, text: Text) -> Generation:
    """Streams a single answer as it is made; several are printed one after the other."""
    alone = len(prompts) == 1

    def write(part: bytes) -> None:
        if jax.process_index():
            return
        sys.stdout.buffer.write(part)
        sys.stdout.flush()

    follow = text.stream(prompts[0], write) if alone else lambda _: None
    generation = engine.generate(
        *(prompts, request.max_new_tokens, request.sampling),
        lambda _, token: follow(token),
        ends=text.ends,
        all_logits=False,
    )
    follow(None)
    if not alone:
        for number, (prompt, tokens) in enumerate(zip(prompts, generation.tokens, strict=True)):
            metrics.say(f"--- prompt {number}\n{text.join(prompt, tokens)}")
    metrics.say(f"\n--- {_rows([generation])}")
    return generation


def _in_batches(engine: Engine, prompts: list[list[int]], request: Request) -> list[Generation]:
    """Held-out sequences, a batch at a time, with progress on stderr."""
    generations: list[Generation] = []
    new_tokens = request.max_new_tokens if request.measure else 0
    start = time.perf_counter()
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        generations.append(
            engine.generate(batch, new_tokens, request.sampling, all_logits=bool(request.measure))
        )
        done = first + len(batch)
        elapsed = time.perf_counter() - start
        left = elapsed * (len(prompts) - done) / done
        metrics.progress(f"{done}/{len(prompts)} sequences, ETA {metrics.clock(left)}")
    return generations


def _rows(generations: list[Generation]) -> str:
    records = [record for generation in generations for record in generation.records]
    out = sum(int(record.dispatch_LMM.sum()) for record in records)
    home = sum(int(record.combine_LMM.sum()) for record in records)
    layers = len(records[0].expert_LBSK)
    routed = sum(int((record.expert_LBSK[..., 0] >= 0).sum()) for record in records)
    per = max(routed, 1)
    return (
        f"{routed // layers:,} tokens; rows moved per token and layer: "
        f"{out / per:.3f} out, {home / per:.3f} back"
    )


def _benchmark(engine: Engine, asked: list[list[int]], request: Request) -> None:
    """Tokens/s of prefill and decode of a batch, best of 3 after one round that compiles."""
    prompts, new_tokens = asked[:BATCH], request.max_new_tokens
    engine.generate(prompts, new_tokens, request.sampling, all_logits=False)
    prefill, decode = [], []
    for round_ in range(3):
        generation = engine.generate(prompts, new_tokens, request.sampling, all_logits=False)
        prefill.append(generation.records[0].seconds)
        decode.append(float(np.median([r.seconds for r in generation.records[1:]])))
        metrics.progress(f"round {round_ + 1}/3")
    lengths = [len(prompt) for prompt in prompts]
    few = f" of {len(asked)}" if len(prompts) < len(asked) else ""
    span = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else f"{lengths[0]}"
    metrics.say(
        f"{len(prompts)}{few} sequences of {span} + {new_tokens} tokens: "
        f"prefill {sum(lengths) / min(prefill):,.0f} tokens/s, "
        f"decode {len(prompts) / min(decode):,.0f} tokens/s; {_rows([generation])}"
    )
