"""How programs end: one of several processes that has an error does not wait for the others."""

import sys

import pytest

from tests.processes import apart_flags, ended

ERRORS = """
import sys
from moe_jax import entry
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
with entry.together():
    mesh_lib.initialize("cpu", 1, sys.argv[1])
    if mesh_lib.first_other(b"12") is None and sys.argv[2] == "refused":
        raise Refused("field", 3, "all of them say so", "use 2")
    import jax
    if jax.process_index() == 1:
        raise KeyboardInterrupt if sys.argv[2] == "interrupted" else ValueError("a bug")
    mesh_lib.in_any_process(False)  # waits for the other
"""


@pytest.mark.parametrize("case", ["refused", "bug", "interrupted"])
def test_processes_that_end_with_an_error_do_not_wait_for_one_another(case):
    """By themselves they would, for minutes; where all have it, each says so and ends by itself."""
    ways = [flag.partition("=")[2] for flag in apart_flags(2)]
    (first, said), (second, says) = ended([[sys.executable, "-c", ERRORS, w, case] for w in ways])
    if case == "refused":
        assert (first, second) == (1, 1)
        assert all("field = 3: all of them say so" in text for text in (said, says))
        return
    assert first != 0
    assert second == {"bug": 1, "interrupted": 130}[case]
    assert {"bug": "ValueError: a bug", "interrupted": "-c: interrupted"}[case] in says
