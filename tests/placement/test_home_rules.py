"""Rules for homes: what they learn, how they are judged, the file, the command."""

import dataclasses
import itertools
import json
import pathlib
import time

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, cost, paired, topology, windows
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.evidence import Figure
from moe_jax.placement.homes import assign, identities, joint, report, ridge, rules, tally
from moe_jax.placement.homes.file import HomeRules
from moe_jax.placement.homes.judge import Arrivals, Bench
from moe_jax.placement.homes.report import Study
from moe_jax.placement.paired import Gain
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests.placement.test_homes import made, topical

FOUR = topology.flat(4)


def halves_of_topics() -> tuple[Problem, Trace, np.ndarray]:
    trace = speaking(topical(4, sequences=48, length=12)[0])
    plan, judge = trace_lib.split(trace, 0)
    problem = Problem(plan, FOUR, "rows")
    start_LE = baselines.random(3, 16, 4, 1)
    seat_len_S = plan.seq_len.astype(np.int64)
    slack = assign.least_slack(seat_len_S, 4) + 0.2
    both = joint.solve(
        problem,
        start_LE,
        0,
        time.monotonic() + 1e6,
        lambda cost_SM: assign.within_tokens(cost_SM, seat_len_S, slack),
    )
    return problem, judge, both.device_LE


def speaking(trace: Trace, names: int = 5) -> Trace:
    """The same, every topic with words of its own: the first field of a name, times `names`."""
    topic_S = np.array([int(name[5]) for name in trace.seq_name or ()])
    word_T = np.random.default_rng(0).integers(names, size=trace.num_tokens)
    token_ids_T = 1000 * np.repeat(topic_S, trace.seq_len) + word_T
    return dataclasses.replace(trace, token_ids_T=token_ids_T.astype(np.int32))


SMALL = Study(prefill=(3,), name_fields=1, tokens=(1, 4), arrivals=Arrivals(batch=24, imbalance=24))


def test_topics_are_found_by_every_rule():
    """Planted: a topic's experts on one device, so a home that knows the topic saves every row."""
    problem, judge, device_LE = halves_of_topics()
    before_LE = baselines.contiguous(3, 16, 4).astype(np.int64)
    found = report.study(problem, judge, before_LE, device_LE, SMALL)
    by_rule = {(one.rule, one.arrival): one for one in found.judged}
    counts_G = np.bincount([int(name[5]) for name in judge.seq_name or ()], minlength=4)
    misplaced = np.maximum(counts_G - 6, 0).sum()  # equal numbers on devices, uneven topics
    for rule in ("name", "oracle", "1 tokens", "4 tokens", "prefill 3", "prefill 3, learned"):
        one = by_rule[rule, "batches"]
        assert one.hits.value == pytest.approx(1 - misplaced / 24)
        assert one.reached.value == pytest.approx(1 - misplaced / 24 / 0.75)
        assert one.helps
    assert by_rule["name", "one by one"].rows.after == 0  # 24 ahead: room for all
    assert found.best is not None
    assert found.best.rule != "none"
    assert "Best rule" in report.summary(found)


def test_few_sequences_and_slower_steps_recommend_no_rule():
    """The same planted saving, seen in 19 and in 20 sequences, and in steps that take longer."""
    problem, judge, device_LE = halves_of_topics()
    before_LE = baselines.contiguous(3, 16, 4).astype(np.int64)

    def found(sequences):
        some = judge.select(np.arange(sequences))
        return report.study(problem, some, before_LE, device_LE, SMALL)

    few = found(19)
    assert few.best is None
    assert report.summary(few).startswith("Only 19 sequences judge, and at least 20 are needed")
    enough = found(20)
    assert "Best rule" in report.summary(enough)
    slower = Gain(1.0, 2.0, Figure(-1.0, -1.2, -0.8))
    judged = tuple(dataclasses.replace(one, seconds=slower) for one in enough.judged)
    assert dataclasses.replace(enough, judged=judged).best is None


def test_without_affinity_no_rule_helps_and_the_report_says_so():
    trace = windows.without_affinity(speaking(topical(4, sequences=160, length=12)[0]), 1)
    plan, judge = trace_lib.split(trace, 0)
    device_LE = baselines.random(3, 16, 4, 1)
    nothing = report.study(Problem(plan, FOUR, "rows"), judge, device_LE, device_LE, SMALL)
    able = [one for one in nothing.judged if one.rule != "oracle"]
    assert all(one.hits.value == pytest.approx(one.chance, abs=0.03) for one in able)
    assert nothing.best is None
    assert "does not matter" in report.summary(nothing)


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical"])
def test_figures_are_those_counted_token_by_token(dispatch):
    machine = topology.nodes_by_devices(2, 4)
    trace = made(1, num_tokens=400)
    problem = Problem(trace, machine, "seconds", dispatch)
    before_LE, after_LE = (baselines.random(3, 8, 4, seed).astype(np.int64) for seed in (1, 2))
    bench = Bench(problem, before_LE, after_LE, 7, Arrivals(batch=4, seed=None))
    one = bench.round_robin()
    rest = tally.tokens_between(trace, 7)
    home_S = np.arange(rest.num_sequences) % 4
    figures = []
    for device_LE, home_T in ((before_LE, None), (after_LE, np.repeat(home_S, rest.seq_len))):
        placement = Placement.from_device_LE(device_LE, 4)
        rows = cost.rows(rest.expert_ids_TLK, placement, dispatch, home_T, devices_per_node=2)
        load_LM = cost.computed_LM(rest.expert_ids_TLK, placement)
        took = seconds_lib.seconds(
            rows, load_LM, machine, problem.work, dispatch, rest.num_tokens
        ).total_L.mean()
        figures.append((rows.total_LMM, took))
    active = (rest.expert_ids_TLK != rest.no_expert).any(axis=2).sum()
    slow_MM = machine.node_M[:, None] != machine.node_M
    for (total_LMM, took), at in zip(figures, ("before", "after"), strict=True):
        assert getattr(one.rows, at) == pytest.approx(total_LMM.sum() / active, rel=1e-12)
        slow = (total_LMM * slow_MM).sum() / active
        assert getattr(one.slow_rows, at) == pytest.approx(slow, rel=1e-12)
        assert getattr(one.seconds, at) == pytest.approx(took, rel=1e-12)
    uniform = paired.sample(
        dataclasses.replace(problem, trace=rest),
        Placement.from_device_LE(before_LE, 4),
        paired.weights(rest.num_sequences, 0),
    )
    assert one.seconds.before == pytest.approx(uniform.seconds_B[0], rel=1e-12)
    assert one.sequences == (trace.seq_len > 7).sum()


def test_identities_cost_what_their_tokens_do_and_unknown_ones_nothing():
    trace = made(3, num_tokens=300)
    words_T = 2 * np.random.default_rng(0).integers(40, size=trace.num_tokens)
    trace = dataclasses.replace(trace, token_ids_T=words_T)
    device_LE = baselines.random(3, 8, 4, 0).astype(np.int64)
    problem = Problem(trace, FOUR, "rows")
    short, long = rules.learn_tokens(problem, device_LE, (2, 1000))
    np.testing.assert_array_equal(short.token_F, np.unique(trace.token_ids_T))
    cost_TM = np.stack(
        [
            tally.cost_SM(tally.count(one, device_LE, FOUR), tally.prices(FOUR, "exchange"))[0]
            for one in (Trace(ids_LK[None], 8, np.array([1])) for ids_LK in trace.expert_ids_TLK)
        ]
    )
    cost_TM -= cost_TM.mean(axis=1, keepdims=True)
    expected_TM = np.stack(
        [
            cost_TM[trace.token_ids_T == token].sum(axis=0)
            / ((trace.token_ids_T == token).sum() + identities.PRIOR)
            for token in trace.token_ids_T
        ]
    )
    end_S = np.cumsum(trace.seq_len)
    for known, rule in ((2, short), (1000, long)):
        wanted_SM = [
            expected_TM[end - length : end][:known].mean(axis=0)
            for end, length in zip(end_S, trace.seq_len, strict=True)
        ]
        largest = np.abs(expected_TM).max()  # costs have six digits
        np.testing.assert_allclose(rule.cost_SM(trace), wanted_SM, rtol=0, atol=1e-5 * largest)
    other = dataclasses.replace(trace, token_ids_T=trace.token_ids_T + 1)  # between those
    assert not long.cost_SM(other).any()
    with pytest.raises(Refused, match="has none"):
        rules.learn_tokens(dataclasses.replace(problem, trace=made(3)), device_LE, (2,))
    with pytest.raises(Refused, match="has none"):
        long.cost_SM(made(3))


def test_prefills_are_not_judged_on_what_they_saw():
    """Changing the first tokens changes homes, never the rows of given homes."""
    trace, device_LE = made(2, num_tokens=400), baselines.random(3, 8, 4, 0)
    problem, price = Problem(trace, FOUR, "rows"), tally.prices(FOUR, "exchange")
    raw = rules.raw_prefill(trace, device_LE, FOUR, price, 5)
    first = tally.tokens_between(trace.select(np.flatnonzero(trace.seq_len > 5)), 0, 5)
    wanted_SM = tally.cost_SM(tally.count(first, device_LE, FOUR), price)
    np.testing.assert_allclose(raw.cost_SM(trace), wanted_SM)
    oracle = rules.oracle(trace, device_LE, FOUR, price, 5)
    after = tally.tokens_between(trace, 5)
    rows_SM = tally.cost_SM(tally.count(after, device_LE, FOUR), price)
    np.testing.assert_allclose(oracle.cost_SM(trace), rows_SM)
    bench = Bench(problem, device_LE, device_LE, 5, Arrivals(batch=1000))
    judged = {one.arrival: one for one in bench.rule(oracle)}
    assert judged["batches"].tokens == after.num_tokens


def test_the_oracle_is_the_limit_where_lengths_differ():
    """No equal assignment of a batch moves fewer rows: all are tried, rows counted one by one."""
    rng = np.random.default_rng(0)
    lengths = np.array([2, 40, 3, 25, 2, 3])
    ids_TLK = np.argsort(rng.random((lengths.sum(), 2, 6)), axis=2)[:, :, :2].astype(np.uint8)
    trace, two = Trace(ids_TLK, 6, lengths.astype(np.int32)), topology.flat(2)
    device_LE = baselines.random(2, 6, 2, 0)
    cost_SM = np.zeros((len(lengths), 2))
    for sequence, ids_tLK in enumerate(np.split(ids_TLK, np.cumsum(lengths)[:-1])):
        for layer, ids_tK in enumerate(ids_tLK.swapaxes(0, 1)):
            for ids_K in ids_tK:
                for home in range(2):
                    cost_SM[sequence, home] += 2 * len({*device_LE[layer, ids_K]} - {home})
    least = min(
        sum(cost_SM[s, int(s not in first)] for s in range(6))
        for first in itertools.combinations(range(6), 3)
    )
    rule = rules.oracle(trace, device_LE, two, tally.prices(two, "exchange"), 0)
    home_S = assign.in_batches(rule.cost_SM(trace), 6)
    assert np.bincount(home_S).tolist() == [3, 3]
    np.testing.assert_allclose(cost_SM[range(6), home_S].sum(), least)


def test_ridge_finds_a_line_and_gives_up_on_noise():
    rng = np.random.default_rng(0)
    x_SF, truth_FM = rng.standard_normal((60, 5)), rng.standard_normal((5, 3))
    y_SM = 2.0 + x_SF @ truth_FM
    found = ridge.fit(x_SF, y_SM, np.ones(60), 0)
    np.testing.assert_allclose(found.weight_FM, truth_FM, atol=1e-3)
    np.testing.assert_allclose(found.mean_M, 2.0, atol=1e-3)
    noise = ridge.fit(x_SF, rng.standard_normal((60, 3)), np.ones(60), 0)
    assert np.abs(noise.weight_FM).max() < 0.2
    centred_SF = x_SF - x_SF.mean(axis=0)
    size = (centred_SF**2).sum(axis=1).mean()
    dual = ridge._fits(x_SF, y_SM, np.ones(60), [1 / size])[0]
    covariance_FF = centred_SF.T @ centred_SF
    primal_FM = np.linalg.solve(covariance_FF + np.eye(5), centred_SF.T @ (y_SM - y_SM.mean(0)))
    np.testing.assert_allclose(dual.weight_FM, primal_FM, rtol=1e-9)


def test_rounding_keeps_six_digits():
    values = np.array([0.0, 1.23456789, -123456.789, 1.23456789e-7])
    np.testing.assert_allclose(
        ridge.rounded(values), [0.0, 1.23457, -123457.0, 1.23457e-7], rtol=1e-12
    )


def test_unseen_fields_of_a_name_add_nothing():
    trace, _ = topical(2, sequences=24)
    device_LE = baselines.contiguous(3, 8, 2).astype(np.int64)
    machine = topology.flat(2)
    rule = rules.learn_name(trace, device_LE, machine, tally.prices(machine, "exchange"), 1, 0)
    assert rule.words == ("0:topic0", "0:topic1")
    np.testing.assert_array_equal(rule.for_names(["other/1"])[0], rule.linear.mean_M)
    known = rule.for_names(["topic1|x", "topic1/99"])
    np.testing.assert_array_equal(known[0], known[1])
    assert not np.array_equal(known[0], rule.linear.mean_M)
    with pytest.raises(Refused, match="from 1 to 8"):
        rules.learn_name(trace, device_LE, machine, tally.prices(machine, "exchange"), 0, 0)


def learned() -> HomeRules:
    trace = speaking(topical(2, sequences=12, length=6, layers=2)[0])
    device_LE = baselines.contiguous(2, 8, 2).astype(np.int64)
    machine, price = topology.flat(2), tally.prices(topology.flat(2), "exchange")
    return HomeRules(
        "0" * 64,
        2,
        2,
        8,
        "exchange",
        rules.learn_name(trace, device_LE, machine, price, 1, 0),
        rules.learn_tokens(Problem(trace, machine, "rows"), device_LE, (2, 4)),
        (rules.learn_prefill(trace, device_LE, machine, price, 2, 0),),
        {"seed": 0},
    )


def test_rules_come_back_as_they_were_written(tmp_path):
    before = learned()
    trace = speaking(topical(2, sequences=6, length=6, layers=2, seed=9)[0], 9)  # some unknown
    before.write(tmp_path / "h.json")
    after = HomeRules.read(tmp_path / "h.json")
    assert after.digest == before.digest
    assert after.provenance == {"seed": 0}
    pairs = [(before.name, after.name), (before.prefill[0], after.prefill[0])]
    for old, new in (*pairs, *zip(before.tokens, after.tokens, strict=True)):
        assert old is not None
        assert new is not None
        np.testing.assert_array_equal(new.cost_SM(trace), old.cost_SM(trace))
        np.testing.assert_array_equal(new.price_M, old.price_M)
    without = dataclasses.replace(before, name=None, tokens=(), prefill=())
    without.write(tmp_path / "h.json")
    assert HomeRules.read(tmp_path / "h.json").name is None
    assert HomeRules.read(tmp_path / "h.json").tokens == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "moe_jax.placement", "version 2 is read"),
        (("version",), 1, "version 2 is read"),
        (("dispatch",), "coherent", "one of exchange"),
        (("plan_digest",), 7, "64 hexadecimal"),
        (("num_devices",), 0, "whole number from 1"),
        (("num_devices",), 3, "numbers of shape"),
        (("name", "mean"), [1.0], "numbers of shape"),
        (("name", "fields"), 9, "at most 8"),
        (("name", "effects"), {"0:a": [1.0, "x"]}, "finite numbers"),
        (("name", "effects"), {"0:a": [1.0, True]}, "finite numbers"),
        (("name", "price"), [1e300, 0], "finite numbers"),
        (("tokens",), [], "JSON object"),
        (("tokens", "prices"), {}, "from 1 to 16"),
        (("tokens", "prices"), {"0": [1.0, 2.0]}, "from 1, ascending"),
        (("tokens", "prices"), {"4": [1.0, 2.0], "2": [1.0, 2.0]}, "ascending, none twice"),
        (("tokens", "costs"), {"-1": [1.0, 2.0]}, "from 0, ascending"),
        (("tokens", "costs"), {"01": [1.0, 2.0]}, "from 0, ascending"),
        (("tokens", "costs"), {"9" * 10: [1.0, 2.0]}, "from 0, ascending"),
        (("tokens", "costs"), {"7": [1.0]}, "numbers of shape"),
        (("prefill",), {}, "a list of at most"),
        (("prefill", 0, "tokens"), 0, "whole number from 1"),
        (("prefill", 0, "weights"), [[1.0]], "numbers of shape"),
        (("provenance",), [], "JSON object"),
        (("more",), 1, "no such field"),
        (("name", "mean"), [1.0, 2.0], "the contents have"),
        (("digest",), "0" * 64, "the contents have"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, path, value, message):
    learned().write(tmp_path / "h.json")
    fields = json.loads((tmp_path / "h.json").read_text())
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "h.json").write_text(json.dumps(fields))
    with pytest.raises(Refused, match=message):
        HomeRules.read(tmp_path / "h.json")


def test_mutated_files_are_refused_or_whole(tmp_path):
    """2,000 mutations: a refusal, or rules whose digest is that of their contents."""
    learned().write(tmp_path / "h.json")
    whole, rng = (tmp_path / "h.json").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        mutated = bytearray(whole)
        kind, at = rng.integers(3), int(rng.integers(len(whole)))
        if kind == 0:
            mutated[at] = int(rng.integers(256))
        elif kind == 1:
            del mutated[at : at + int(rng.integers(1, 40))]
        else:
            mutated[at:at] = bytes(rng.choice(list(b'[]{}",:019.eE-nN '), 3).tolist())
        (tmp_path / "m.json").write_bytes(bytes(mutated))
        try:
            assert HomeRules.read(tmp_path / "m.json").digest in mutated.decode()
        except Refused:
            refused += 1
    assert refused > 1500


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


@pytest.fixture
def trace_path(tmp_path) -> pathlib.Path:
    trace = speaking(topical(4, sequences=48, length=12)[0])
    trace_lib.save(trace, tmp_path / "t.npz")
    return tmp_path / "t.npz"


def test_the_command_plans_jointly_and_writes_both_files(trace_path, tmp_path, capsys):
    plan, homes = tmp_path / "p.json", tmp_path / "h.json"
    words = ("homes", trace_path, "--devices=4", "--objective=rows", "--prefill=2,50")
    assert run(*words, "--time-limit=4", f"--out={homes}", f"--out-plan={plan}", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    written, read = Plan.read(plan), HomeRules.read(homes)
    assert written.digest == answer["plan_digest"] == read.plan_digest
    told = written.provenance["homes"]
    assert told["value"] == pytest.approx(written.provenance["objective"])
    assert sum(told["sequences_per_device"]) == 24
    assert "prefill 50: no sequence is that long" in answer["notes"]
    assert [rule.first for rule in read.prefill] == [2]
    assert [rule.known for rule in read.tokens] == [16, 64, 256]
    assert answer["best"] is not None
    assert all(rule["rows"]["share"]["low"] <= 1 for rule in answer["rules"])


def test_the_command_judges_a_plan_as_it_is(trace_path, tmp_path, capsys):
    plan = tmp_path / "p.json"
    start = Placement.contiguous(3, 16, 4)
    Plan(start, topology=topology.nodes_by_devices(2, 4).to_json()).write(plan)
    again = tmp_path / "again.json"
    words = ("homes", trace_path, f"--plan={plan}", "--dispatch=hierarchical", "--prefill=2")
    assert run(*words, "--batch=8", "--arrival=file", f"--out-plan={again}") == 0
    text = capsys.readouterr().out
    assert "on 2x2" in text
    assert "between nodes" in text
    assert "8 together" in text
    assert "Experts and homes together" not in text
    assert Plan.read(again).digest == start.digest


@pytest.mark.parametrize("devices", [4, 3])  # three do not divide the experts
def test_a_plan_with_copies_is_refused_as_slots_are(devices, trace_path, tmp_path, capsys):
    each = 16 // devices + 1
    slots_P = np.arange(devices * each) % 16
    Plan(Placement(np.tile(slots_P, (3, 1)), 16, devices)).write(tmp_path / "p.json")
    assert run("homes", trace_path, f"--plan={tmp_path / 'p.json'}") == 1
    error = capsys.readouterr().err
    assert error.startswith("refused: plan = ")
    assert "homes are planned without replicas" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dispatch=coherent",), "do not return"),
        (("--prefill=a",), "whole numbers from 1"),
        (("--prefill=0",), "whole numbers from 1"),
        (("--tokens=0",), "whole numbers from 1"),
        (("--batch=0",), "at least 1"),
        (("--imbalance=0",), "at least 1"),
        (("--name-fields=0",), "from 1 to 8"),
    ],
)
def test_bad_options_are_refused(trace_path, tmp_path, capsys, words, message):
    out = tmp_path / "h.json"
    assert run("homes", trace_path, "--devices=4", "--time-limit=1", f"--out={out}", *words) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
