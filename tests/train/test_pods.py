"""Training steps compile for pods that are not here, fit, and exchange as often as they say."""

import importlib.util
import json

import pytest

from moe_jax import config as config_lib
from moe_jax import pods
from moe_jax.errors import Refused
from moe_jax.model import transformer
from tests import pods as commands
from tests import tiny

needs_libtpu = commands.needs_libtpu


def run(config, topology, **overrides):
    fields = [f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    return commands.run("moe_jax.train.compile", config, f"--topology={topology}", *fields)


def report(config, topology, **overrides):
    ended = run(config, topology, **overrides)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "dispatch", "data"),
    [
        ("v5e:4x4", "exchange", 2),
        # the expert axis takes parts of two axes of the torus
        pytest.param("v5p:4x4x4", "exchange", 8, marks=pytest.mark.slow),
        pytest.param("v5e:4x4", "gathered", 2, marks=pytest.mark.slow),
        pytest.param("v6e:16x16", "exchange", 32, marks=pytest.mark.slow),
    ],
)
def test_a_small_model_compiles(topology, dispatch, data):
    made = report(
        *("moe_100m", topology),
        mesh__data=data,
        data__global_batch=16 * data,
        train__eval_sequences=8 * data,
        model__dispatch=dispatch,
    )
    exchanges = 2 if dispatch == "exchange" else 0
    assert made["exchanges_forward"] == exchanges
    # out and home, forward and backward, in each of 6 layers
    ragged = made["step"]["collectives"].get("ragged-all-to-all", [0])[0]
    assert ragged == 2 * exchanges * 6
    # gate and up, down; backward h of both and its gradient, dx, dw of gate and up, dw of down
    assert made["step"]["kernels"] == 6
    assert 0 < made["step"]["hbm_bytes"] <= made["hbm_limit"]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("config", "topology"),
    [("moe_1b", "v5e:4x4"), ("mixtral_8x7b", "v5p:4x4x4"), ("deepseek_v3", "v5p:8x8x8")],
)
def test_a_pod_holds_the_model(config, topology):
    made = report(config, topology)
    assert made["exchanges_forward"] == 2
    # the backward pass computes each layer again: out and home three times
    layers = {"moe_1b": 16, "mixtral_8x7b": 32, "deepseek_v3": 58}[config]
    assert made["step"]["collectives"]["ragged-all-to-all"][0] == 6 * layers
    assert 0 < made["step"]["hbm_bytes"] <= made["hbm_limit"]


@needs_libtpu
@pytest.mark.slow
def test_a_step_beyond_the_memory_of_a_chip_is_refused():
    ended = run("mixtral_8x7b", "v5e:8x8")
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if "HBM of one chip" in line]
    assert "raise mesh.fsdp" in line


@pytest.mark.parametrize(
    ("topology", "field"),
    [
        ("v5p", "--topology"),
        ("h100:8", "--topology"),
        ("v9x:2x2", "--topology"),
        ("v5e:4x4", "mesh"),
    ],
)
def test_pods_that_do_not_fit_are_refused(topology, field):
    with pytest.raises(Refused, match=f"^{field} = "):
        pods.check_topology(tiny.config(), topology)


def test_errors_of_the_compiler_are_said_with_a_fix():
    memory = pods.refusal("RESOURCE_EXHAUSTED: Used 17.25G of 15.75G hbm.", "v5e:4x4", "take more")
    assert str(memory) == (
        "HBM of one chip = '17.25 GiB': must be at most 15.75 GiB (of 16 GiB). take more."
    )
    links = pods.refusal("not supported in limited ICI routing settings", "v5e:4x8", "take more")
    assert str(links).startswith("--topology = 'v5e:4x8': has links")
    assert type(pods.refusal("another one", "v5e:4x4", "")) is RuntimeError


@pytest.mark.parametrize("name", ["moe_1b", "mixtral_8x7b", "deepseek_v3"])
def test_configs_are_valid_and_have_the_sizes_that_they_name(name):
    spec = importlib.util.spec_from_file_location(name, commands.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_lib.from_config_dict(module.get_config())
    billions = transformer.num_parameters(config.model) / 1e9
    active = transformer.num_active_parameters(config.model) / 1e9
    expected = {"moe_1b": (1.25, 0.194), "mixtral_8x7b": (46.7, 12.9), "deepseek_v3": (671, 37.6)}
    assert (billions, active) == pytest.approx(expected[name], rel=0.02)
