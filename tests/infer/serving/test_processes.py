"""Two processes serve, bit for bit, as one process with as many devices does."""

import json
import sys

from tests.processes import apart_flags, run_all

SERVE = """
import dataclasses, json, sys
from moe_jax import mesh as mesh_lib
devices, processes, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
mesh_lib.initialize("cpu", devices, processes)
import jax
from moe_jax import migrate
from moe_jax.infer.server import run
from moe_jax.infer.serving import broadcast
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.text import Bytes
from tests import tiny
from tests.infer.serving import test_engine
old, new = (tiny.replicated_placement(seed, devices=2, slots=12) for seed in (3, 5))
recorder = Recorder(2, 4, 32)
runner = test_engine.runner(recorder=recorder, placement=old)
if jax.process_index():
    run.follow(runner)
    sys.exit()
engine, answers = Engine(runner, Bytes(), recorder), []
for _, prompt, options in test_engine.traffic(7, 10):
    answers.append([])
    engine.submit(prompt, dataclasses.replace(options, logprobs=2), answers[-1].append)
for _ in range(3):
    engine.step()
way = migrate.route(old, new)
engine.runner.prepare(way)
engine.runner.prepared(wait=True)
for layer in range(tiny.LAYERS):
    engine.adopt(way, layer, layer + 1, migrate.between(old, new, layer + 1))
    engine.step()
running = engine.busy
while engine.step():
    pass
engine.read_counters()
trace = engine.trace()
runner.broadcast.beat()
runner.broadcast.tell(broadcast.END)
said = [[dataclasses.asdict(part) for part in answer] for answer in answers]
stats = engine.stats
with open(out, "w") as file:
    json.dump([running, said, stats.moved, stats.computed_LP.tolist(), trace.digest,
               trace.seq_home.tolist()], file)
"""


def test_two_processes_serve_as_one(tmp_path):
    """And move experts while they answer, count rows and record them."""
    two, one = tmp_path / "two.json", tmp_path / "one.json"
    apart = [flag.partition("=")[2] for flag in apart_flags(2)]
    sizes = [(1, way, two) for way in apart] + [(2, "off", one)]
    run_all([[sys.executable, "-c", SERVE, *size] for size in sizes])
    running, answers, moved, *_ = together = json.loads(one.read_text())
    assert running
    assert moved > 0
    assert all(answer[-1]["finish"] for answer in answers)
    assert json.loads(two.read_text()) == together
