"""Prefill and decode compile for pods that are not here, fit, and exchange as often as they say."""

import json

import pytest

from moe_jax.errors import Refused
from moe_jax.infer import compile as compile_lib
from tests import pods, tiny


@pods.needs_libtpu
@pytest.mark.parametrize(
    ("dispatch", "tensor"),
    [
        pytest.param("exchange", 1, id="exchange"),
        pytest.param("coherent", 1, id="coherent"),
        pytest.param("coherent", 2, id="coherent over tensor"),
    ],
)
def test_a_batch_compiles(dispatch, tensor):
    ended = pods.run(
        *(
            "moe_jax.infer.compile",
            "moe_100m",
            "--topology=v5e:4x4",
            f"--config.model.dispatch={dispatch}",
        ),
        *("--config.mesh.data=1", "--config.mesh.fsdp=2"),
        *(f"--config.mesh.expert={8 // tensor}", f"--config.mesh.tensor={tensor}"),
        *("--sequences=32", "--prompt=64", "--answer=16"),
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    made = json.loads(ended.stdout.splitlines()[-1])
    for program in (made["prefill"], made["decode"]):
        assert program["kernels"]
        assert 0 < program["hbm_bytes"] <= made["hbm_limit"]
        ragged, _ = program["collectives"]["ragged-all-to-all"]
        # out and home in each of 6 layers; coherent rows go on to the next layer, and home at last
        assert ragged == {"exchange": 2 * 6, "coherent": 2 * 6 + 1}[dispatch]
        # what `fsdp` splits is gathered layer by layer
        assert program["collectives"]["all-gather"][0] >= 6


def test_batches_that_do_not_fit_are_refused():
    config = tiny.config(mesh={"data": 2, "expert": 4})
    compile_lib.check_sizes(config, 8, 40, 24)
    for sizes, flag, fix in (
        ((12, 40, 24), "--sequences", "use 16"),
        ((8, 0, 24), "--prompt", "positive"),
        ((8, 41, 24), "--prompt", "use 40"),
    ):
        with pytest.raises(Refused, match=f"^{flag} = .*{fix}"):
            compile_lib.check_sizes(config, *sizes)
