"""`python -m moe_jax.routing`: what it prints, and that it is quick."""

import itertools
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from moe_jax.routing import __main__ as command
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

SECONDS = 5.0  # of processor time for 215,000 tokens x 24 layers x 4 experts


def test_figures_that_are_checked_by_hand(tmp_path, capsys):
    """Two experts used equally, and the next layer's one is known from this one's: 1 bit."""
    ids = np.zeros((40, 2, 1), np.uint8)
    ids[20:] = 1
    trace_lib.save(Trace(ids, 4, np.array([20, 20])), tmp_path / "t.npz")
    assert command.main([str(tmp_path / "t.npz")]) == 0
    text = capsys.readouterr().out
    assert "40 tokens in 2 sequences, 2 layers x 4 experts, top-1" in text
    assert "hottest expert over the mean: 2.000, worst layer 2.000" in text
    assert re.search(r"co-activation .* none", text)
    assert len(re.findall(r"transitions.* 40 counted; 1.000 bits", text)) == 3


@pytest.mark.parametrize(("top_k", "pairs"), [(1, "none"), (2, "14 counted"), (3, "42 counted")])
def test_pairs_of_one_layer_are_counted_once(tmp_path, capsys, top_k, pairs):
    """7 tokens, 2 layers: k (k - 1) / 2 pairs each, so 0, 1 and 3."""
    ids = np.tile(np.arange(top_k, dtype=np.uint8), (7, 2, 1))
    trace_lib.save(Trace(ids, 4, np.array([7])), tmp_path / "t.npz")
    assert command.main([str(tmp_path / "t.npz")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "co-activation" in line]
    assert line.split("s  ")[1].split(";")[0] == pairs


def test_bits_of_pairs_by_hand(tmp_path, capsys):
    """Experts come in the pairs 0 1 and 2 3, as often each: one end tells the other, of 4: 2 bits.

    Of one of them alone, which of the two is which: 1 bit.
    """
    for name, experts, bits in (("two", [[0, 1], [2, 3]], 2), ("one", [[0, 1], [0, 1]], 1)):
        ids = np.array(experts, np.uint8)[:, None]
        trace_lib.save(Trace(ids, 4, np.array([2])), tmp_path / f"{name}.npz")
        assert command.main([str(tmp_path / f"{name}.npz")]) == 0
        assert f"2 counted; {bits}.000 bits that one end tells" in capsys.readouterr().out


@pytest.mark.parametrize(("layers", "top_k"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_figures_are_those_of_loops_over_tokens(tmp_path, capsys, layers, top_k):
    """Layers after a dense one; some tokens with fewer experts."""
    rng = np.random.default_rng(layers)
    chosen = [rng.choice(5, 3, replace=False, p=np.arange(1, 6) / 15) for _ in range(30 * layers)]
    ids = np.array(chosen, np.uint8)[:, :top_k].reshape(30, layers, top_k)
    ids[rng.random(ids.shape) < 0.1] = 255
    trace = Trace(ids, 5, np.array([20, 10]), layer_ids=tuple(range(1, layers + 1)))
    trace_lib.save(trace, tmp_path / "t.npz")
    assert command.main([str(tmp_path / "t.npz")]) == 0
    lines = dict(re.findall(r"(?m)^(\S.*?) +[\d.]+ s  (.*)$", capsys.readouterr().out))

    sides = [[list(at[at != 255]) for at in ids[:, layer]] for layer in range(layers)]
    loads = [[sum(e in at for at in side) for e in range(5)] for side in sides]
    hottest = [max(load) / (sum(load) / 5) for load in loads]
    assert f"{np.mean(hottest):.3f}, worst layer {max(hottest):.3f}" in lines["load"]
    both = [[pair for at in side for pair in itertools.permutations(at, 2)] for side in sides]
    assert lines["co-activation"] == said(both, ways=2)
    for name, first, then in (("best to best", 1, 1), ("best to all", 1, 3), ("all to all", 3, 3)):
        joined = [
            [
                pair
                for here, there in ids[:, layer : layer + 2]
                for pair in itertools.product(here[:first], there[:then])
                if 255 not in pair
            ]
            for layer in range(layers - 1)
        ]
        assert lines[f"transitions, {name}"] == said(joined)


def said(pairs, ways=1):
    """Of each layer's pairs: how many, and the mean information that one end has of the other."""
    if not any(pairs):
        return "none"
    bits = []
    for side in pairs:
        p, first, then = (Counter(ends) for ends in (side, *zip(*side, strict=True)))
        n = len(side)
        bits.append(sum(c / n * np.log2(c * n / first[e] / then[f]) for (e, f), c in p.items()))
    counted = sum(map(len, pairs)) // ways
    return f"{counted:,} counted; {np.mean(bits):.3f} bits that one end tells of the other"


def test_independent_layers_tell_nothing(tmp_path, capsys):
    ids = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(16, 2, 1)
    trace_lib.save(Trace(ids.astype(np.uint8), 4, np.array([16])), tmp_path / "t.npz")
    assert command.main([str(tmp_path / "t.npz")]) == 0
    assert capsys.readouterr().out.count("16 counted; 0.000 bits") == 3


def test_one_layer_and_bad_files(tmp_path, capsys):
    trace_lib.save(Trace(np.zeros((3, 1, 1), np.uint8), 2, np.array([3])), tmp_path / "t.npz")
    assert command.main([str(tmp_path / "t.npz")]) == 0
    assert capsys.readouterr().out.count("none") == 4
    assert command.main([str(tmp_path / "none.npz")]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "does not exist" in captured.err


def test_a_large_trace_with_all_statistics_takes_seconds(tmp_path):
    """As a process of its own, the imports included; without jax."""
    rng = np.random.default_rng(0)
    first = rng.integers(32, size=(215_000, 24, 1), dtype=np.uint8)
    ids = (first + np.array([0, 5, 11, 17], np.uint8)) % 32
    trace_lib.save(Trace(ids, 32, np.full(430, 500, np.int32)), tmp_path / "t.npz")
    program = (
        "import sys, time; from moe_jax.routing import __main__ as m; "
        f"code = m.main([{str(tmp_path / 't.npz')!r}, '--num-experts=32']); "
        "print('jax' in sys.modules, time.process_time()); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    imported, seconds = last.split()
    assert imported == "False"
    assert float(seconds) < SECONDS
