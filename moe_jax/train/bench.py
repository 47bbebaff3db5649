"""What each dispatch costs on this machine: one layer on one device, and whole training steps.

    python -m moe_jax.train.bench --config=configs/quickstart.py [--seconds=20] [--ways=A,B]

Two tables, each measured interleaved in this process; milliseconds are the best of all rounds,
ratios the median over rounds of the ratio within one round.

1. The MoE layer on one device, forward, against what it cannot do without: the experts on rows that
   lie sorted already, and a copy of the rows that sorting them and putting them back touches.
2. The training step of the config under each dispatch/combine, against the first of them, with the
   time to trace and compile it, and rows moved per token and layer (random weights, random bytes).

CPU devices share this machine's cores and memory, so rows cost no wire there: the second table
says what the code costs, not what a placement saves.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from moe_jax import auto, entry
from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused

WAYS = (
    "exchange/exact",
    "exchange/partial",
    "exchange/reproducible",
    "gathered/partial",
    "gathered/exact",
    "hierarchical/exact",
    "shuffled/exact",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
      milliseconds: best round.
      ratio: to the table's reference, median over rounds.
      compile_seconds, rows: of a training step; None elsewhere.
    """

    name: str
    milliseconds: float
    ratio: float
    compile_seconds: float | None = None
    rows: float | None = None


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """Seconds of each call, one per round over all of them, for at least three rounds."""
    import jax

    def timed(call):
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    for call in calls.values():
        timed(call)  # compiles
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        rounds.append([timed(call) for call in calls.values()])
    return dict(zip(calls, np.asarray(rounds).T, strict=True))


def layer_lines(config: Config, seconds: float) -> list[Line]:
    """The first table: `local` dispatch of the tokens that one device of the config has."""
    import jax
    import jax.numpy as jnp

    from moe_jax import mesh as mesh_lib
    from moe_jax.kernels import grouped_matmul
    from moe_jax.model import moe, router, transformer

    model = config.model
    tokens = config.data.global_batch * config.data.seq_len
    rows = tokens * model.top_k
    keys = jax.random.split(jax.random.key(0), 2)
    scheme = router.scheme_of(model)
    layer = moe.build(mesh_lib.make(), dispatch="local", combine="exact", scheme=scheme)
    weights = moe.MoE(
        keys[0], d_model=model.d_model, d_ff=model.d_ff, num_experts=model.num_experts
    )
    x_BSD = jax.random.normal(
        keys[1], (config.data.global_batch, config.data.seq_len, model.d_model)
    )
    table = jax.tree.map(
        lambda t: jnp.asarray(t[0]), transformer.identity_table(1, model.num_experts)
    )
    real_BS, turn_BS = jnp.ones(x_BSD.shape[:2], bool), jnp.zeros(x_BSD.shape[:2], jnp.int32)
    whole = jax.jit(lambda x_BSD, weights: layer(x_BSD, weights, turn_BS, real_BS, table))
    sizes_E = whole(x_BSD, weights)[1].traffic.computed_P

    parts = [param[...] for param in (weights.gate_PDF, weights.up_PDF, weights.down_PFD)]
    rows_AD = jnp.tile(x_BSD.reshape(tokens, -1), (model.top_k, 1))
    implementation = grouped_matmul.default_implementation()
    experts = jax.jit(functools.partial(grouped_matmul.grouped_ffn, implementation=implementation))
    # Rows are read and written on their way in (T -> A), and on their way out (A -> T).
    moved = jnp.zeros((rows + tokens, model.d_model))
    copy = jax.jit(lambda a: a + 1.0)
    calls = {
        "layer": lambda: whole(x_BSD, weights),
        "experts": lambda: experts(rows_AD, *parts, sizes_E),
        "copy": lambda: copy(moved),
    }
    times = interleaved(calls, seconds)
    least = times["experts"] + times["copy"]
    times = {"layer": times["layer"], "experts + copy": least, **times}
    return [
        Line(name, 1e3 * float(t.min()), float(np.median(t / least))) for name, t in times.items()
    ]


def step_lines(config: Config, ways: list[str], seconds: float) -> list[Line]:
    """The second table."""
    import jax

    from moe_jax import mesh as mesh_lib
    from moe_jax.model import transformer
    from moe_jax.train import step as step_lib

    mesh = mesh_lib.of_config(config.mesh)
    rng = np.random.default_rng(0)
    shape = (config.data.global_batch, config.data.seq_len + 1)
    window_BS1 = mesh_lib.put_batch(mesh, rng.integers(0, 256, shape).astype(np.int32))
    table = transformer.identity_table(config.model.num_plan_layers, config.model.num_experts)
    table = jax.tree.map(lambda t: mesh_lib.put_replicated(mesh, t), table)
    calls: dict[str, Callable[[], Any]] = {}
    compiling, moved = {}, {}
    for way in ways:
        one = with_way(config, way)
        state = step_lib.initial_state(one, mesh)
        start = time.perf_counter()
        program: Any = step_lib.build_step(one, mesh)
        compiled = program.lower(state, window_BS1, table).compile()
        compiling[way] = time.perf_counter() - start
        held = [state]

        def call(compiled=compiled, held=held):
            held[0], metrics = compiled(held[0], window_BS1, table)
            return metrics

        calls[way] = call
        traffic = call().traffic
        rows = int(traffic.dispatch_MM.sum()) + int(traffic.combine_MM.sum())
        moved[way] = rows / (
            config.data.global_batch * config.data.seq_len * len(table.num_replicas_E)
        )
    times = interleaved(calls, seconds)
    first = times[ways[0]]
    return [
        Line(way, 1e3 * float(t.min()), float(np.median(t / first)), compiling[way], moved[way])
        for way, t in times.items()
    ]


def with_way(config: Config, way: str) -> Config:
    """The config with another dispatch/combine; refuses what the config cannot have."""
    dispatch, slash, combine = way.partition("/")
    if not slash:
        raise Refused("--ways", way, "must be dispatch/combine", "for example exchange/exact")
    model = dataclasses.replace(config.model, dispatch=dispatch, combine=combine)
    changed = dataclasses.replace(config, model=model)
    config_lib.validate(changed)
    config_lib.check_trainable(changed)
    return auto.resolve_unplanned(changed, config_lib.check_trainable)[0]


def text(title: str, reference: str, lines: list[Line]) -> str:
    """A table to read."""
    head = f"{title:<24} {'ms':>9} {reference:>16}"
    if lines[0].rows is not None:
        head += f" {'compile s':>10} {'rows/token/layer':>17}"
    body = []
    for line in lines:
        row = f"{line.name:<24} {line.milliseconds:9.2f} {line.ratio:16.3f}"
        if line.rows is not None:
            row += f" {line.compile_seconds:10.1f} {line.rows:17.3f}"
        body.append(row)
    return "\n".join([head, *body])


def main() -> None:
    """Prints both tables."""
    config = config_lib.from_config_dict(entry.required("--config", CONFIG.value))
    ways = WAYS_FLAG.value
    if not ways:
        raise Refused("--ways", "", "names at least one dispatch/combine", "leave it out")
    for way in ways:
        with_way(config, way)
    from moe_jax import mesh as mesh_lib

    mesh_lib.initialize(config.platform, config.virtual_devices, "off")
    config_lib.check_devices(config, mesh_lib.num_devices())
    layer = layer_lines(config, SECONDS.value)
    steps = step_lines(config, ways, SECONDS.value)
    if JSON.value:
        tables = {"layer": layer, "step": steps}
        print(json.dumps({k: [dataclasses.asdict(line) for line in v] for k, v in tables.items()}))
        return
    print(text("one layer, one device", "/(experts+copy)", layer))
    print()
    print(text(f"step, {config.mesh}", f"/{ways[0]}", steps))


if __name__ == "__main__":
    # here, so that a program that imports this module may have flags of its own
    CONFIG = entry.define_config("As for train.py.")
    SECONDS = flags.DEFINE_float("seconds", 20.0, "Measuring time of each table.")
    WAYS_FLAG = flags.DEFINE_list("ways", list(WAYS), "dispatch/combine of the second table.")
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the tables.")
    entry.run(main, __doc__)
