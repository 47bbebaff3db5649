"""Everything a user can get wrong, one row each: one clear line, exit code 1, nothing written.

Programs run inside this process with an argv of their own, so that the table stays quick; JAX is
made to fail as soon as anyone asks it for a device.
"""

import dataclasses
import gc
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
from absl import flags
from jax import monitoring

from moe_jax import checkpoint, data
from moe_jax import config as config_lib
from moe_jax import infer as infer_package
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import integrity
from moe_jax.errors import Refused
from moe_jax.infer import run as _infer  # noqa: F401 the clock below starts after imports
from moe_jax.placement import __main__ as placement_main
from moe_jax.placement.plan import MAP, Placement, Plan
from moe_jax.train import inputs, resume
from moe_jax.train import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
HF = "tests/golden/hf/mixtral"
LAYERS, EXPERTS, DEVICES = 2, 16, 4  # of configs/quickstart.py:smoke
SMALL = {
    **{"model.d_model": 16, "model.d_ff": 16, "data.seq_len": 16, "data.global_batch": 8},
    **{"train.eval_sequences": 8, "train.num_steps": 2, "train.checkpoint_every": 1},
}
DEVICE_CALLS = (
    *("devices", "local_devices", "device_count", "local_device_count", "process_index"),
    *("process_count", "default_backend", "device_put", "make_mesh"),
)

COMPILED = "/jax/core/compile/backend_compile_duration"  # said by JAX after each
SLOWEST: list[tuple[float, str]] = []  # CPU seconds of every refusal, and which


@pytest.fixture(scope="module", autouse=True)
def slowest():
    """Says the slowest refusal of this process (`pytest -s`): it is to be below a second."""
    yield
    if SLOWEST:
        seconds, case = max(SLOWEST)
        print(f"\n{len(SLOWEST)} refusals, the slowest {seconds:.2f} s of CPU: {case}")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    out: str
    err: list[str]
    seconds: float  # of this thread: what others do on this machine is not the program's


def call(program: str, arguments: list[str], capfd) -> Ended:
    """Runs train.py, infer.py or the placement command in this process."""
    before, argv = set(flags.FLAGS), sys.argv
    sys.modules.pop("moe_jax.infer.flags", None)  # defines its flags once, as the program runs once
    vars(infer_package).pop("flags", None)
    capfd.readouterr()
    gc.disable()  # the garbage of a thousand other tests
    start = time.thread_time()
    try:
        if program == "placement":
            code = placement_main.main(arguments)
        else:
            sys.argv = [str(ROOT / program), *arguments]
            runpy.run_path(str(ROOT / program), run_name="__main__")
            code = 0
    except SystemExit as error:
        code = error.code
    finally:
        seconds = time.thread_time() - start
        gc.enable()
        sys.argv = argv
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    out, err = capfd.readouterr()
    return Ended(code, out, err.splitlines(), seconds)


def files_below(*folders: pathlib.Path) -> dict[str, tuple[int, int]]:
    found = [path for folder in folders for path in folder.rglob("*")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in found}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> pathlib.Path:
    """A folder of text, enough for both splits."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} green bottles hanging on the wall\n" * 20)
    return folder


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory) -> pathlib.Path:
    """A work directory with checkpoints of steps 1 and 2: of a model that has learned nothing."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    plain = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]("smoke")
    plain.update_from_flattened_dict({**SMALL, "data.path": str(text)})
    config = config_lib.from_config_dict(plain)
    corpus, plan = inputs.prepare(config, workdir)
    mesh = mesh_lib.of_config(config.mesh)
    batches = data.batches(corpus, config.data)
    state = step_lib.initial_state(config, mesh)
    for number in (1, 2):
        saved = resume.saved_arrays(resume.Run(state, batches, number, corpus.digest), plan, config)
        checkpoint.save(workdir / "checkpoints", *saved)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    return workdir


def train_arguments(workdir: object, text: object) -> list[str]:
    start = ["--config=configs/quickstart.py:smoke", f"--workdir={workdir}"]
    return [*start, *(f"--config.{k}={v}" for k, v in {**SMALL, "data.path": text}.items())]


@pytest.fixture
def no_devices(monkeypatch):
    """Makes every way to a device fail, and notes what is compiled: nothing."""

    def reached(*_, **__):
        raise AssertionError("a device was asked for before the input was refused")

    worked: list[str] = []

    def heard(event: str, *_, **__) -> None:
        worked.extend([event] if event == COMPILED else [])

    for name in DEVICE_CALLS:
        monkeypatch.setattr(jax, name, reached)
    monkeypatch.setattr(mesh_lib, "initialize", reached)
    monitoring.register_event_duration_secs_listener(heard)
    yield
    monitoring.unregister_event_duration_listener(heard)
    assert not worked, "a program was made before the input was refused"


# --- what the rows below are made of ---------------------------------------------------------


def config_file(body: str) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """tmp/config.py with this body."""
    return lambda tmp, run: (tmp / "config.py").write_text(body.replace("ROOT", str(ROOT)))


def quickstart_with(change: str) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """tmp/config.py: the quickstart's config, changed by one statement."""
    return config_file(
        "import runpy\n"
        "def get_config(arg=None):\n"
        "    c = runpy.run_path('ROOT/configs/quickstart.py')['get_config']('smoke').unlock()\n"
        f"    {change}\n"
        "    return c\n"
    )


def plan_file(change: Callable[[dict], object] | None = None, layers=LAYERS, experts=EXPERTS,
              devices=DEVICES):  # fmt: skip
    """tmp/plan.json, its JSON changed."""

    def make(tmp: pathlib.Path, run: pathlib.Path) -> None:
        Plan(Placement.contiguous(layers, experts, devices)).write(tmp / "plan.json")
        if change:
            fields = json.loads((tmp / "plan.json").read_text())
            change(fields)
            (tmp / "plan.json").write_text(json.dumps(fields))

    return make


def in_tmp(name: str, content: bytes | None) -> Callable[[pathlib.Path, pathlib.Path], object]:
    """A file in tmp, or a folder (None)."""
    return lambda tmp, run: (
        (tmp / name).mkdir() if content is None else (tmp / name).write_bytes(content)
    )


def truncated(name: str, make: Callable) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """What `make` made, cut in half."""

    def cut(tmp: pathlib.Path, run: pathlib.Path) -> None:
        make(tmp, run)
        (tmp / name).write_bytes((tmp / name).read_bytes()[: (tmp / name).stat().st_size // 2])

    return cut


def damaged_run(*steps: int) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """tmp/run: the trained one with a byte flipped in these steps."""

    def damage(tmp: pathlib.Path, run: pathlib.Path) -> None:
        shutil.copytree(run, tmp / "run")
        for step in steps:
            flip(tmp / "run" / "checkpoints" / str(step))

    return damage


def flip(step: pathlib.Path) -> pathlib.Path:
    """Flips a bit in the middle of the largest file of a step."""
    largest = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return largest


def run_without_checkpoints(tmp: pathlib.Path, run: pathlib.Path) -> None:
    (tmp / "run").mkdir()
    shutil.copyfile(run / "config.json", tmp / "run" / "config.json")


def copied_config(content: bytes) -> Callable[[pathlib.Path, pathlib.Path], None]:
    def make(tmp: pathlib.Path, run: pathlib.Path) -> None:
        shutil.copytree(run, tmp / "run")
        (tmp / "run" / "config.json").write_bytes(content)

    return make


def run_with(**model: object) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """tmp/run: the trained one with other fields of the model, whose parameters are the same."""

    def make(tmp: pathlib.Path, run: pathlib.Path) -> None:
        shutil.copytree(run, tmp / "run")
        config = json.loads((tmp / "run" / "config.json").read_text())
        config["model"] |= model
        (tmp / "run" / "config.json").write_text(json.dumps(config))

    return make


def model_cut_short(tmp: pathlib.Path, run: pathlib.Path) -> None:
    """tmp/m: a published model whose tensors end early."""
    shutil.copytree(ROOT / HF, tmp / "m")
    whole = (tmp / "m" / "model.safetensors").read_bytes()
    (tmp / "m" / "model.safetensors").write_bytes(whole[:-100])


def plan_with_shares_for_two_nodes(tmp: pathlib.Path, run: pathlib.Path) -> None:
    slots_LP = np.tile(np.r_[0:16, 4:16, 0:4], (2, 1))
    Plan(Placement(slots_LP, 16, 4, np.full((2, 3, 32), 32))).write(tmp / "plan.json")


def trace_file(**arrays: object) -> Callable[[pathlib.Path, pathlib.Path], None]:
    """tmp/trace.npz of 8 sequences, with some arrays replaced."""

    def make(tmp: pathlib.Path, run: pathlib.Path) -> None:
        meta = {"format": "moe_jax.trace", "version": 1, "num_experts": 8}
        ids_TLK = np.arange(64 * 2 * 2).reshape(64, 2, 2).astype(np.uint8) % 8
        good = {"expert_ids": ids_TLK, "seq_len": np.full(8, 8, np.int32)}
        np.savez(tmp / "trace.npz", **{**good, "meta": np.array(json.dumps(meta)), **arrays})

    return make


def ids(shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    array = (np.arange(np.prod(shape)).reshape(shape) % 8).astype(np.uint8)
    array.flat[0] = first
    return array


def train(case: str, argument: str, *says: str, make=None):
    """A row: the smoke config with one argument more (the last one wins)."""
    start = ["--config=configs/quickstart.py:smoke", "--workdir={tmp}/new"]
    return row(case, "train.py", [*start, "--config.data.path={text}", *argument.split()],
               *says, make=make)  # fmt: skip


def train_file(case: str, change: str, *says: str):
    """A row: a config file of its own."""
    make = change if callable(change) else quickstart_with(change)
    arguments = ["--config={tmp}/config.py", "--workdir={tmp}/new"]
    return row(f"file, {case}", "train.py", arguments, *says, make=make)


def infer(case: str, arguments: str, *says: str, make=None, workdir="{run}"):
    return row(case, "infer.py", [f"--workdir={workdir}", *arguments.split()], *says, make=make)


def published(case: str, arguments: str, *says: str, make=None):
    return row(f"--hf, {case}", "infer.py", arguments.split(), *says, make=make)


def solve(case: str, make: Callable | None, *says: str):
    arguments = ["solve", "{tmp}/trace.npz", "--devices=4", "--out={tmp}/plan.json"]
    return row(case, "placement", arguments, *says, make=make)


def row(case: str, program: str, arguments: list[str], *says: str, make=None):
    assert len(says) >= 3, "field, value, fix"
    return pytest.param(program, arguments, says, make, id=f"{program.split('.')[0]}: {case}")


TABLE = [
    # The command line. Every row: what is typed, then the field, the value and a word of the fix.
    row("no --config", "train.py", ["--workdir={tmp}/new"], "--config", "None", "give --config="),
    row("no --workdir", "train.py", ["--config=configs/quickstart.py"], "--workdir", "None",
        "give --workdir="),
    row("empty --workdir", "infer.py", ["--workdir="], "--workdir", "''", "give --workdir="),
    train("unknown flag", "--wrkdir=x", "--wrkdir", "'x'", "did you mean --workdir"),
    row("unknown --confg", "train.py", ["--confg=x"], "--confg", "'x'", "did you mean --config"),
    infer("unknown flag", "--temprature=1", "--temprature", "'1'", "did you mean --temperature"),
    train("stray argument", "quickstart", "command line", "'quickstart'", "write --name=value"),
    train("override without a value", "--config.model.top_k", "command line", "top_k", "--help"),
    row("override before --config", "train.py",
        ["--config.model.top_k=1", "--config=configs/quickstart.py"],
        "--config", "top_k=1", "move it to the front"),
    row("override without --config", "train.py", ["--config.model.top_k=1"], "--config", "top_k",
        "give --config=FILE"),
    train("--distributed", "--distributed=host,2", "--distributed", "'host,2'", "localhost:"),
    train("--distributed number", "--distributed=h:1,2,2", "--distributed", "h:1,2,2", "from 0"),
    # Unknown fields and wrong types, on the command line and in the file.
    train("unknown group", "--config.modl.x=1", "--config.modl", "'1'",
          "did you mean --config.model."),
    train("unknown field", "--config.model.topk=1", "--config.model.topk", "'1'",
          "did you mean --config.model.top_k."),
    train("field of a group", "--config.top_k=1", "--config.top_k", "'1'",
          "did you mean --config.model.top_k."),
    train("field below a field", "--config.model.top_k.x=1", "--config.model.top_k.x", "'1'",
          "nothing below it"),
    train("a group", "--config.model=1", "--config.model ", "'1'", "give one of --config.model."),
    train("word for a number", "--config.model.top_k=abc", "--config.model.top_k", "'abc'",
          "write it as int"),
    train("real for whole", "--config.model.top_k=1.5", "--config.model.top_k", "'1.5'",
          "write it as int"),
    train("steps beyond int32", "--config.train.num_steps=2147483648", "train.num_steps",
          "2147483648", "give a smaller number"),
    train("spikes of too many", "--config.train.spike_window=1000001", "train.spike_window",
          "1000001", "give a smaller number"),
    train("learning rate without end", "--config.optimizer.learning_rate=1e300",
          "optimizer.learning_rate", "1e+300", "give a smaller number"),
    train("decay without end", "--config.optimizer.weight_decay=1e300",
          "optimizer.weight_decay", "1e+300", "give a smaller number"),
    train("decay of 1 in 32 bits", "--config.optimizer.b2=0.99999999", "optimizer.b2", "0.99999999",
          "use 0.9"),
    train("not finite", "--config.optimizer.weight_decay=nan", "optimizer.weight_decay", "nan",
          "give a number"),
    train_file("unknown field", "c.model.topk = 1", "model.topk", "1", "did you mean model.top_k"),
    train_file("unknown group", "c.modl = 1", "modl", "1", "did you mean model."),
    train_file("wrong type", "c.model = {**c.model, 'top_k': '2'}", "model.top_k", "'2'",
               "write it as int"),
    train_file("bool for int", "c.model = {**c.model, 'top_k': True}", "model.top_k", "True",
               "write it as int"),
    train_file("number for a group", "c = {**c, 'model': 3}", "model", "3", "see configs/"),
    train_file("missing field", "del c.model.d_ff", "model.d_ff", "None", "set it in the config"),
    train_file("get_config raises", "1 / 0", "--config", "ZeroDivisionError", "correct"),
    train_file("get_config returns None", "c = None", "--config", "NoneType",
               "return ml_collections.ConfigDict"),
    train_file("get_config returns a list", "c = [1]", "--config", "list",
               "return ml_collections.ConfigDict"),
    train_file("no get_config", config_file("x = 1\n"), "--config", "config.py", "define it"),
    train_file("not Python", config_file("def get_config(:\n"), "--config", "SyntaxError",
               "correct"),
    train("no such config", "--config=configs/quickstrt.py", "--config", "quickstrt.py",
          "did you mean configs/quickstart.py"),
    train("config without .py", "--config=configs/quickstart", "--config", "configs/quickstart'",
          "did you mean configs/quickstart.py"),
    train("config is a folder", "--config=configs", "--config", "'configs'", "get_config(arg)"),
    train("unknown variant", "--config=configs/quickstart.py:smok", "--config", "smok'",
          "':smoke'"),
    # Rules between fields.
    train("top_k > num_experts", "--config.model.top_k=17", "model.top_k", "17", "choose 1 to 16"),
    train("top_k = 0", "--config.model.top_k=0", "model.top_k", "0", "give a positive number"),
    train("experts not divisible", "--config.mesh.expert=3", "model.num_experts", "16",
          "mesh.expert 2 or 4, or num_experts 15 or 18"),
    train("experts over nodes", "--config.mesh.node=8", "model.num_experts", "16",
          "mesh.node x mesh.expert 16, or num_experts 32"),
    train("width over fsdp", "--config.mesh.fsdp=3", "mesh.fsdp", "3", "nearest: 2 or 4"),
    train("heads over tensor", "--config.mesh.tensor=4", "mesh.tensor", "4", "nearest: 2"),
    train("shuffled over tensor", "--config.model.dispatch=shuffled --config.mesh.tensor=2",
          "model.num_heads", "4", "8 devices"),
    train("coherent over tensor", "--config.model.dispatch=coherent --config.mesh.tensor=2 "
          "--config.model.qk_norm=all", "mesh.tensor", "2", "mesh.tensor = 1"),
    train("no tensor", "--config.mesh.tensor=0", "mesh.tensor", "0", "give a positive number"),
    train("unknown attention", "--config.mesh.attention=replicate", "mesh.attention",
          "'replicate'", "did you mean 'replicated'"),
    train("unknown pre-activations", "--config.train.pre_activations=keep", "train.pre_activations",
          "'keep'", "must be one of 'recompute', 'store'"),
    train("stored in layers that are computed again",
          "--config.train.pre_activations=store --config.train.remat=layer",
          "train.pre_activations", "'store'", "set train.remat = 'none'"),
    train("unknown remat", "--config.train.remat=layers", "train.remat", "'layers'",
          "did you mean 'layer'"),
    train("mesh larger than devices", "--config.mesh.data=4", "mesh", "data 4 x expert 4",
          "at most 8"),
    train("sequence beyond rotary range", "--config.data.seq_len=257", "data.seq_len", "257",
          "set model.max_seq_len = 257"),
    train("batch not divisible", "--config.data.global_batch=12", "data.global_batch", "12",
          "nearest: 8 or 16"),
    train("evaluation not divisible", "--config.train.eval_sequences=9", "train.eval_sequences",
          "9", "nearest: 8 or 16"),
    train("heads not divisible", "--config.model.num_kv_heads=3", "model.num_kv_heads", "3",
          "nearest: 2 or 4"),
    train("odd head", "--config.model.d_head=7", "model.d_head", "7", "use 8"),
    train("unknown dispatch", "--config.model.dispatch=exchnge", "model.dispatch", "'exchnge'",
          "did you mean 'exchange'"),
    train("coherent", "--config.model.dispatch=coherent", "model.dispatch", "'coherent'",
          "serves only", "infer.py --dispatch=coherent"),
    train("coherent with a capacity", "--config.model.dispatch=coherent "
          "--config.model.capacity_factor=1.5", "model.capacity_factor", "1.5", "use 0.0"),
    train("shuffled with a capacity", "--config.model.dispatch=shuffled "
          "--config.model.capacity_factor=1.5", "model.capacity_factor", "1.5", "use 0.0"),
    train("overlap degree", "--config.model.overlap_degree=3", "model.overlap_degree", "3",
          "nearest: 2"),
    train("unknown kernels", "--config.model.kernels=triton", "model.kernels", "'triton'",
          "one of"),
    train("kernels for 16 bits", "--config.model.kernels=pallas_gpu", "model.kernels",
          "'pallas_gpu'", "set model.dtype = 'bfloat16'"),
    train("unknown wire", "--config.model.wire_dtype=float8", "model.wire_dtype", "'float8'",
          "did you mean 'float8_e4m3fn'"),
    train("local over devices", "--config.model.dispatch=local", "model.dispatch", "'local'",
          "mesh.expert = 1"),
    train("unknown platform", "--config.platform=tpv", "platform", "'tpv'", "did you mean 'tpu'"),
    train("virtual TPUs", "--config.platform=tpu", "virtual_devices", "8", "virtual_devices = 0"),
    train("negative seed", "--config.train.seed=-1", "train.seed", "-1", "use 0"),
    train("vocabulary below a byte", "--config.model.vocab_size=100", "model.vocab_size", "100",
          "use 256"),
    # Data and work directory.
    train("data missing", "--config.data.path={tmp}/none", "data.path", "/none'", "correct"),
    train("data is a file", "--config.data.path={tmp}/a.txt", "data.path", "/a.txt'", "correct",
          make=in_tmp("a.txt", b"text")),
    train("data empty", "--config.data.path={tmp}/empty", "data.path", "found 0 files", "add files",
          make=in_tmp("empty", None)),
    train("too little to evaluate", "--config.train.eval_sequences=80000", "held-out windows",
          "80000", "ask for fewer"),
    train("workdir of another config", "--workdir={run}", "--workdir",
          "model.d_model = 16 there, 32 here", "use another --workdir"),
    train("workdir with a broken config.json", "--workdir={tmp}/run", "config.json", "\\x00",
          "restore it", make=copied_config(b"\0\xff" * 9)),
    train("workdir with a deep config.json", "--workdir={tmp}/run", "config.json", "must be JSON",
          "restore it", make=copied_config(b"[" * 100_000)),
    train("workdir with a long number", "--workdir={tmp}/run", "config.json", "must be JSON",
          "restore it", make=copied_config(b'{"name": ' + b"9" * 5000 + b"}")),
    train("workdir with a huge config.json", "--workdir={tmp}/run", "config.json",
          "at most 16777216 bytes", "restore it", make=copied_config(b"[" * (2**24 + 1))),
    train("workdir with a folder for config.json", "--workdir={tmp}", "config.json",
          "must be a file", "restore it", make=in_tmp("config.json", None)),
    train("workdir in a store", "--workdir=gs://bucket/run", "--workdir", "'gs://bucket/run'",
          "mount the store"),
    train("workdir is a file", "--workdir={tmp}/a.txt", "--workdir", "/a.txt'", "name another",
          make=in_tmp("a.txt", b"text")),
    train("workdir below a file", "--workdir={tmp}/a.txt/run", "--workdir", "/a.txt/run'",
          "name another", make=in_tmp("a.txt", b"text")),
    # Plans, under which a model is trained or computed.
    train("no such machine", "--config.topology=box2x5", "topology", "'box2x5'", "box2x4"),
    train("no file to replay", "--replay= --config.train.eval_sequences=8",
          "--replay", "''", "give --replay="),
    train("plan missing", "--config.placement={tmp}/plan.json", "plan", "plan.json'", "Give"),
    train("plan for other layers", "--config.placement={tmp}/plan.json", "plan layers", "3",
          "Solve", make=plan_file(layers=3)),
    train("plan numbered for another model", "--config.placement={tmp}/plan.json",
          "plan layer_ids", "'1-2'", "Solve", make=plan_file(lambda f: f.update(layer_ids=[1, 2]))),
    train("shares for two nodes", "--config.placement={tmp}/plan.json", "copy_shares", "2 nodes",
          "Use the machine", make=plan_with_shares_for_two_nodes),
    *(
        infer(f"plan {case}", "--prompt=a --placement={tmp}/plan.json", *says, make=make)
        for case, make, *says in (
            ("missing", None, "plan", "plan.json'", "Give the path"),
            ("for other layers", plan_file(layers=3), "plan layers", "3", "Solve a plan"),
            ("numbered for another model", plan_file(lambda f: f.update(layer_ids=[1, 2])),
             "plan layer_ids", "'1-2'", "Solve a plan"),
            ("with layers in another order", plan_file(lambda f: f.update(layer_ids=[1, 0])),
             "plan layer_ids", "'1,0'", "Solve a plan"),
            ("with shares for two nodes", plan_with_shares_for_two_nodes, "copy_shares", "2 nodes",
             "Use the machine"),
            ("for other experts", plan_file(experts=8), "plan num_experts", "8", "Solve a plan"),
            ("for other devices", plan_file(devices=8), "plan num_devices", "8", "Solve a plan"),
            ("with a wrong digest", plan_file(lambda f: f.update(digest="0" * 64)), "digest",
             "'0000", "solve the plan again"),
            ("that was edited", plan_file(lambda f: f[MAP][1].reverse()), "digest", "'",
             "changed or damaged"),
            ("without an expert", plan_file(lambda f: f[MAP][1].__setitem__(5, 4)), f"{MAP}[1]",
             "no slot for expert 5", "Solve the plan again"),
            ("with an expert too high", plan_file(lambda f: f[MAP][0].__setitem__(2, 16)),
             f"{MAP}[0][2]", "16", "Solve the plan again"),
            ("of another version", plan_file(lambda f: f.update(version=2)), "version", "2",
             "Solve the plan again"),
            ("truncated", truncated("plan.json", plan_file()), "plan", "not a whole JSON file",
             "Solve the plan again"),
            ("not JSON", in_tmp("plan.json", b"\x89PNG\xff"), "plan", "not a whole JSON file",
             "Solve the plan again"),
        )
    ),
    # Runs to answer from.
    infer("no such workdir", "--prompt=a", "--workdir", "/none'", "train first",
          workdir="{tmp}/none"),
    infer("no checkpoint", "--prompt=a", "--workdir", "/run'", "train at least",
          make=run_without_checkpoints, workdir="{tmp}/run"),
    infer("broken config.json", "--prompt=a", "config.json", "'{'", "restore it",
          make=copied_config(b"{"), workdir="{tmp}/run"),
    infer("deep config.json", "--prompt=a", "config.json", "must be JSON", "restore it",
          make=copied_config(b"[" * 100_000), workdir="{tmp}/run"),
    infer("measure what is not compared", "--dispatch=shuffled --measure={tmp}/m.npz", "--measure",
          "model.dispatch is exchange or gathered", "--dispatch=exchange"),
    infer("measure what keeps no bits", "--measure={tmp}/m.npz", "--measure",
          "model.combine is exact or reproducible, not 'partial'", "--record",
          make=run_with(combine="partial"), workdir="{tmp}/run"),
    infer("measure with a capacity", "--measure={tmp}/m.npz", "--measure", "capacity_factor = 1.0",
          "--record", make=run_with(capacity_factor=1.0), workdir="{tmp}/run"),
    # Published models; their files are in tests/hf/test_bad_files.py.
    published("no source", "--prompt=a", "--workdir", "None", "give --workdir="),
    published("two sources", f"--hf={HF} --workdir={{run}} --prompt=a", "--hf", "/mixtral'",
              "give one of them"),
    published("no such folder", "--hf={tmp}/none --prompt=a", "--hf", "/none'", "correct the path"),
    published("no config.json", "--hf={tmp} --prompt=a", "{tmp}/config.json", "cannot be read",
              "give the folder"),
    published("unknown family", "--hf={tmp} --prompt=a", "{tmp}/config.json: model_type", "mixtrl",
              "did you mean 'mixtral'", make=in_tmp("config.json", b'{"model_type": "mixtrl"}')),
    published("tensors cut short", "--hf={tmp}/m --prompt=a", "{tmp}/m/model.safetensors",
              "data_offsets", "cut short", make=model_cut_short),
    published("devices that are none", "--workdir={run} --devices=experts=2 --prompt=a",
              "--devices", "AXIS=NUMBER", "node=2,expert=4,tensor=2"),
    published("devices that do not fit a run", "--workdir={run} --devices=expert=2,tensor=3 "
              "--prompt=a", "mesh.tensor", "must divide model.num_heads", "nearest"),
    published("devices that do not divide", f"--hf={HF} --devices=3 --prompt=a",
              "model.num_experts", "8", "mesh.expert 2 or 4"),
    published("plan of another model", f"--hf={HF} --placement={{tmp}}/plan.json --prompt=a",
              "plan num_experts", "16", "this model", make=plan_file()),
    published("plan numbered for another model", f"--hf={HF} --placement={{tmp}}/plan.json "
              "--prompt=a", "plan layer_ids", "'1-2'", "this model",
              make=plan_file(lambda f: f.update(layer_ids=[1, 2]), experts=8)),
    published("plan for other devices", f"--hf={HF} --devices=2 --placement={{tmp}}/plan.json "
              "--prompt=a", "plan num_devices", "4", "this model", make=plan_file(experts=8)),
    published("long prompt", f"--hf={HF} --prompt=" + "a" * 100, "prompt 0 + --max_new_tokens",
              "101 + 64 tokens", "shorten"),
    published("a context that is too long", f"--hf={HF} --serve --port=0 --context=129",
              "--context", "129", "use 128"),
    # Prompts and sampling.
    infer("unknown dispatch", "--prompt=a --dispatch=coherant", "--dispatch", "'coherant'",
          "did you mean 'coherent'"),
    infer("local over devices", "--prompt=a --dispatch=local", "model.dispatch", "'local'",
          "use 'exchange'"),
    infer("no prompt", "", "--prompt", "None", "give --prompt"),
    infer("empty prompt", "--prompt=", "prompt 0", "''", "write some text"),
    infer("a peer for a run", "--benchmark --serve-load --peer_python=python3", "--peer_python",
          "'python3'", "transformers can read", "give --hf=DIR --benchmark"),
    # Flags that nothing would read.
    *(
        infer(f"{flag} {words}", f"{words} {flag}={value}", flag, shown, "leave it out")
        for words, flag, value, shown in (
            ("--prompt=a", "--port", "99999999", "99999999"),
            ("--prompt=a", "--seats", "-1", "-1"),
            ("--record={tmp}/t.npz", "--replan_tokens", "-5", "-5"),
            ("--benchmark --serve-load", "--bearer_token_file", "f", "'f'"),
            ("--serve", "--replan_pins", "9:9:9", "'9:9:9'"),
            ("--serve", "--replan_homes", "false", "False"),
            ("--record={tmp}/t.npz", "--max_new_tokens", "9", "9"),
            ("--serve", "--temperature", "0.9", "0.9"),
            ("--benchmark --serve-load", "--seed", "1", "1"),
            ("--benchmark --serve-load", "--max_new_tokens", "1", "1"),
            ("--prompt=a --record={tmp}/t.npz", "--held_out", "8", "8"),
            ("--benchmark --serve-load", "--held_out_start", "8", "8"),
            ("--prompt=a", "--topology", "no_such_machine", "'no_such_machine'"),
            ("--benchmark", "--trace", "/no/such.npz", "'/no/such.npz'"),
            ("--benchmark --serve-load", "--trace", "/no/such.npz", "'/no/such.npz'"),
        )
    ),
    infer("a load and a recording", "--benchmark --serve-load --record={tmp}/t.npz",
          "--serve-load", "True", "leave them out"),
    infer("long prompt", "--prompt=" + "a" * 200, "prompt 0 + --max_new_tokens",
          "200 + 64 tokens", "shorten"),
    infer("prompts missing", "--prompts={tmp}/none", "--prompts", "/none'", "correct"),
    infer("prompts not UTF-8", "--prompts={tmp}/p", "--prompts", "UTF-8", "convert it",
          make=in_tmp("p", b"\xff\xfe\xff")),
    infer("prompts empty", "--prompts={tmp}/p", "--prompts", "/p'", "write one prompt a line",
          make=in_tmp("p", b"\n \n")),
    infer("temperature", "--prompt=a --temperature=-1", "--temperature", "-1.0", "0 = greedy"),
    infer("temperature as a word", "--prompt=a --temperature=hot", "--temperature", "'hot'",
          "write it as float"),
    infer("top_p", "--prompt=a --top_p=0", "--top_p", "0.0", "1 keeps every token"),
    infer("seed", "--prompt=a --seed=-1", "--seed", "-1", "use 0"),
    infer("max_new_tokens", "--prompt=a --max_new_tokens=-1", "--max_new_tokens", "-1", "use 64"),
    infer("nothing to decode", "--benchmark --max_new_tokens=1", "--max_new_tokens", "1",
          "at least 2 with --benchmark", "use 64"),
    infer("a context that is too long", "--serve --port=0 --context=999", "--context", "999",
          "model.max_seq_len"),
    infer("a load over processes", "--benchmark --serve-load --distributed=localhost:1,2,0",
          "--distributed", "measures one process", "leave it out"),
    infer("processes that are not counted", "--prompt=a --distributed=localhost:1,2",
          "--distributed", "'localhost:1,2'", "localhost:12345,2,0"),
    infer("tokens of no trace", "--record_tokens", "--record_tokens", "none is written",
          "give --record"),
    infer("record suffix", "--record={tmp}/t.json", "--record", "/t.json'", "t.json.npz"),
    infer("measure suffix", "--measure={tmp}/t", "--measure", "/t'", "t.npz"),
    infer("record is a folder", "--record={tmp}/t.npz", "--record", "/t.npz'", "name a file",
          make=in_tmp("t.npz", None)),
    infer("record is a pipe", "--record={tmp}/t.npz", "--record", "/t.npz'", "name another",
          make=lambda tmp, run: os.mkfifo(tmp / "t.npz")),
    infer("record below a file", "--record={tmp}/a/t.npz", "--record", "/a/t.npz'", "name another",
          make=in_tmp("a", b"")),
    infer("measure with a prompt", "--prompt=a --measure={tmp}/m.npz", "--measure", "/m.npz'",
          "leave out --prompt"),
    infer("held_out", "--benchmark --held_out=0", "--held_out", "0", "use 64"),
    infer("held_out_start", "--benchmark --held_out_start=-1", "--held_out_start", "-1", "use 0"),
    infer("held_out too many", "--record={tmp}/t.npz --held_out=80000", "held-out windows",
          "80000", "ask for fewer"),
    # Traces.
    solve("trace missing", None, "trace", "trace.npz'", "Give the path"),
    solve("ids out of range", trace_file(expert_ids=ids((64, 2, 2), 9)), "expert_ids[0][0][0]",
          "9", "num_experts"),
    solve("wrong rank", trace_file(expert_ids=ids((64, 4))), "expert_ids shape", "(64, 4)",
          "Reshape to [T, L, K]"),
    solve("real ids", trace_file(expert_ids=np.zeros((64, 2, 2))), "expert_ids dtype", "float64",
          "Convert them"),
    solve("lengths that disagree", trace_file(seq_len=np.full(8, 7)), "sum(seq_len)", "56",
          "Record the trace again"),
    solve("pickled", trace_file(expert_ids=np.array([{}, []], object)), "expert_ids.npy",
          "object", "Save plain integer"),
    solve("truncated", truncated("trace.npz", trace_file()), "trace", "trace.npz'",
          "Record it again"),
    solve("no whole zip", in_tmp("trace.npz", b"PK\x03\x04"), "trace", "trace.npz'",
          "Record it again"),
    row("devices that do not divide", "placement",
        ["solve", "{tmp}/trace.npz", "--devices=3", "--out={tmp}/plan.json"],
        "num_devices", "3", "2 or 4", make=trace_file()),
    row("checkpoint to permute missing", "placement",
        ["apply", "{tmp}/plan.json", "{tmp}/none", "{tmp}/out"],
        "CHECKPOINT_IN", "/none'", "train first", make=plan_file()),
]  # fmt: skip


@pytest.mark.parametrize(("program", "arguments", "says", "make"), TABLE)
def test_refused_in_one_line(
    program, arguments, says, make, trained, text, tmp_path, no_devices, monkeypatch, capfd
):
    monkeypatch.chdir(ROOT)
    if make:
        make(tmp_path, trained)
    before = files_below(tmp_path, trained)
    places = {"tmp": tmp_path, "run": trained, "text": text}
    arguments = [argument.format(**places) for argument in arguments]

    ended = call(program, arguments, capfd)

    assert len(ended.err) == 1, "\n".join(ended.err)
    line = ended.err[0]
    assert line.startswith(f"{program}: " if program.endswith(".py") else "refused: ")
    says = [said.format(**places) if "{tmp}" in said else said for said in says]
    for said in says:
        assert said in line
    assert line.split(": ", 1)[1].startswith(says[0].strip()), "the field comes first"
    assert ended.code == 1
    assert ended.out == ""
    assert files_below(tmp_path, trained) == before
    SLOWEST.append((ended.seconds, f"{program} {says[0]}"))


# Forks, so that Python starts once. Each says its exit code, whether it has JAX, and its seconds.
ALONE = """
import json, os, runpy, sys, time
for arguments in json.load(sys.stdin):
    if not os.fork():
        sys.argv, code = ["train.py", *arguments], 0
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as error:
            code = error.code
        print(json.dumps([code, "jax" in sys.modules, time.process_time()]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_train_refuses_before_it_imports_jax(trained, text, tmp_path):
    """In processes of their own: JAX alone takes longer than a refusal may."""
    cases, commands = [], []
    for number, case in enumerate(TABLE):
        program, arguments, _, make = case.values
        if program == "train.py":
            (tmp := tmp_path / str(number)).mkdir()
            if make:
                make(tmp, trained)
            places = {"tmp": tmp, "run": trained, "text": text}
            commands.append([argument.format(**places) for argument in arguments])
            cases.append(case.id)
    ended = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=json.dumps(commands),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(said) == len(ended.stderr.splitlines()) == len(cases) >= 40
    assert not [case for case, (code, _, _) in zip(cases, said, strict=True) if code != 1]
    assert not [case for case, (_, has_jax, _) in zip(cases, said, strict=True) if has_jax]
    seconds, case = max((seconds, case) for case, (_, _, seconds) in zip(cases, said, strict=True))
    print(f"\n{len(cases)} refusals of train.py, the slowest {seconds:.2f} s of CPU: {case}")


def test_a_mesh_beyond_the_real_devices_is_refused(tmp_path, text, capfd, monkeypatch):
    """Only JAX knows how many there are; nothing is made of them, or written."""
    monkeypatch.chdir(ROOT)
    arguments = [*train_arguments(tmp_path / "new", text), "--config.virtual_devices=0"]
    arguments += ["--config.mesh.data=4", "--config.data.global_batch=16"]
    arguments += ["--config.train.eval_sequences=16"]
    ended = call("train.py", arguments, capfd)
    assert ended.code == 1
    assert len(ended.err) == 1
    assert "mesh = 'data 4 x expert 4': needs 16 devices, but there are 8" in ended.err[0]
    assert not (tmp_path / "new").exists()


def test_other_virtual_devices_in_a_process_that_has_some_are_refused(
    tmp_path, text, capfd, monkeypatch
):
    monkeypatch.chdir(ROOT)
    arguments = [*train_arguments(tmp_path / "new", text), "--config.virtual_devices=16"]
    ended = call("train.py", arguments, capfd)
    assert ended.code == 1
    assert "virtual_devices = 16: this process has made its 8 devices" in ended.err[0]
    assert not (tmp_path / "new").exists()


def test_a_damaged_step_is_named_and_the_one_before_answers(trained, tmp_path, capfd):
    damaged_run(2)(tmp_path, trained)
    arguments = [f"--workdir={tmp_path / 'run'}", "--prompt=green", "--max_new_tokens=1"]
    ended = call("infer.py", arguments, capfd)
    assert ended.code == 0
    assert ended.out.startswith("green")
    (line,) = ended.err
    assert line.startswith("skipping checkpoint 2: checkpoint file = ")
    assert "SHA-256" in line


def test_infer_has_begun_to_hash_when_it_looks_for_a_step(trained, capfd, monkeypatch):
    """Digests are computed once, from before JAX is imported."""
    made = []

    class Counted(integrity.Digests):
        def __init__(self, *arguments):
            made.append(sys._getframe(1).f_code.co_name)
            super().__init__(*arguments)

    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    monkeypatch.setattr(integrity, "Digests", Counted)
    arguments = [f"--workdir={trained}", "--prompt=green", "--max_new_tokens=1"]
    assert call("infer.py", arguments, capfd).code == 0
    assert made == ["digests_ahead"]


def test_a_run_whose_steps_are_all_damaged_is_refused(trained, tmp_path, capfd, no_devices):
    damaged_run(1, 2)(tmp_path, trained)
    ended = call("infer.py", [f"--workdir={tmp_path / 'run'}", "--prompt=green"], capfd)
    assert ended.code == 1
    assert [line.split(":")[0] for line in ended.err] == [
        *("skipping checkpoint 2", "skipping checkpoint 1", "infer.py")
    ]
    assert "checkpoints = " in ended.err[-1]
    assert ended.err[-1].endswith("every step is damaged. restore one, or start anew.")


def test_every_single_byte_counts(trained, tmp_path):
    """The manifest covers each file of a step: whichever is changed, the step is not used."""
    step = trained / "checkpoints" / "2"
    for path in [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]:
        copy = tmp_path / "2"
        shutil.copytree(step, copy)
        target = copy / path.relative_to(step)
        content = bytearray(target.read_bytes())
        content[0] ^= 1
        target.write_bytes(content)
        with pytest.raises(Refused, match=str(target)):
            checkpoint.read_contents(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("train.py", ("--config=configs/quickstart.py", "--workdir", "--config.model.top_k=4")),
        ("infer.py", ("--prompt", "--placement", "--max_new_tokens", "greedy")),
    ],
)
@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull"])
def test_help_teaches(program, shown, flag, capfd, no_devices):
    ended = call(program, [flag], capfd)
    assert ended.code == 0
    assert not ended.err
    for words in shown:
        assert words in ended.out


# In a process of its own, where the platform does not exist: any device asked for is a traceback.
@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        (
            "train.py",
            ["--config=configs/quickstart.py", "--config.model.topk=4"],
            "train.py: --config.model.topk = '4': is not a config field. "
            "did you mean --config.model.top_k.",
        ),
        (
            "infer.py",
            ["--workdir={run}", "--prompt=a", "--placement={tmp}/none.json"],
            "infer.py: plan = '{tmp}/none.json': the file does not exist. "
            "Give the path of a plan .json.",
        ),
    ],
)
def test_end_to_end(program, arguments, line, trained, tmp_path):
    places = {"tmp": tmp_path, "run": trained}
    command = [sys.executable, program, *(argument.format(**places) for argument in arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stderr.splitlines() == [line.format(**places)]
    assert (ended.returncode, ended.stdout) == (1, "")
