"""Adopt or not: planted routing whose answer is known."""

import dataclasses

import numpy as np
import pytest

from moe_jax import auto, migrate, replan
from moe_jax.errors import Refused
from moe_jax.placement import replication
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.seconds import Work
from moe_jax.train import step as step_lib
from tests import tiny

LAYERS, EXPERTS, DEVICES, K = 3, 16, 4, 4
HERE = Placement.contiguous(LAYERS, EXPERTS, DEVICES)


def setting(**changes):
    plain = replan.Setting(
        topology=topology_lib.flat(DEVICES),
        work=Work(d_model=256, d_ff=64, batch_tokens=4096),
        dispatch="exchange",
        combine="partial",
        passes=2,
        interval=1000,
        expert_bytes=1000,
        time_limit=1.0,
        devices_per_node=DEVICES,
    )
    return dataclasses.replace(plain, **changes)


def planted(seed, tokens=512, noise=0.1):
    """Tokens whose experts are one residue class modulo 4: each class fits one device."""
    rng = np.random.default_rng(seed)
    group_TL1 = rng.integers(0, DEVICES, (tokens, LAYERS, 1))
    ids_TLK = group_TL1 + DEVICES * np.arange(K)
    ids_TLK = np.where(rng.random((tokens, LAYERS, 1)) < noise, _uniform(rng, tokens), ids_TLK)
    return _trace(ids_TLK)


def uniform(seed, tokens=512):
    return _trace(_uniform(np.random.default_rng(seed), tokens))


def _uniform(rng, tokens):
    return np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=-1)[..., :K]


def _trace(ids_TLK):
    # layers, sequences of 64, experts
    expert_LBSK = ids_TLK.reshape(-1, 64, LAYERS, K).transpose(2, 0, 1, 3).astype(np.int16)
    return replan.trace_of(expert_LBSK, sized(LAYERS, EXPERTS))


def sized(num_layers, num_experts, dense=0):
    return tiny.config(
        model__num_layers=dense + num_layers,
        model__num_dense_layers=dense,
        model__d_ff_dense=8 * (dense > 0),
        model__num_experts=num_experts,
        mesh={"data": 1, "expert": 1},
    )


def test_the_trace_of_a_step_is_its_tokens_in_order():
    expert_LBSK = np.arange(2 * 3 * 4 * 1).reshape(2, 3, 4, 1).astype(np.int16)
    expert_LBSK[:, 1, 2] = -1
    trace = replan.trace_of(expert_LBSK, sized(2, 24, dense=3))
    assert list(trace.layer_ids) == [3, 4]
    assert trace.seq_len.tolist() == [4, 4, 4]
    for b in range(3):
        for s in range(4):
            wanted = expert_LBSK[:, b, s]
            found = trace.expert_ids_TLK[4 * b + s]
            assert (found == np.where(wanted < 0, trace.no_expert, wanted)).all()


def test_traces_with_homes_are_joined():
    one, other = (dataclasses.replace(planted(n), seq_home=np.full(8, n, np.int32)) for n in (0, 1))
    both = replan.joined([one, other])
    assert both.num_sequences == 16
    for trace, start in ((one, 0), (other, one.num_tokens)):
        part = both.expert_ids_TLK[start : start + trace.num_tokens]
        np.testing.assert_array_equal(part, trace.expert_ids_TLK)


def test_a_planted_placement_is_found_and_adopted():
    decision = replan.decide(setting(), HERE, [planted(seed) for seed in range(6)])
    assert decision.adopt, decision.reason
    # one device of 4 in place of all 4, homes uniform: 2 x 3/4 against 2 x 3
    assert decision.rows_before > 2 * decision.rows_after
    assert decision.seconds_after < decision.seconds_before
    assert list(decision.plan.layer_ids) == list(range(LAYERS))
    assert decision.plan.provenance["moved_bytes"] == decision.move.bytes > 0


def test_the_older_half_plans_and_the_newer_judges():
    steps = [planted(0), planted(1), planted(2), planted(3, noise=0.5)]
    chosen = setting()
    decision = replan.decide(chosen, HERE, steps)
    assert decision.plan.provenance["trace_digest"] == replan.joined(steps[:2]).digest

    def seconds(trace, placement):
        option = auto.judge(
            *("exchange", trace.expert_ids_TLK, placement, chosen.topology),
            work=chosen.work,
            combine="partial",
            devices_per_node=chosen.devices_per_node,
        )
        return option.seconds

    saved = [seconds(t, HERE) - seconds(t, decision.plan.placement) for t in steps[2:]]
    mean, half = sum(saved) / 2, abs(saved[0] - saved[1]) / 2
    assert half > 0.01 * mean
    # the standard error of two values is half their difference; all layers, both passes
    assert decision.saved_low == pytest.approx((mean - 2 * half) * LAYERS * 2, rel=1e-9)


def test_layers_keep_their_numbers():
    steps = [dataclasses.replace(planted(seed), layer_ids=(2, 3, 4)) for seed in range(4)]
    assert list(replan.decide(setting(), HERE, steps).plan.layer_ids) == [2, 3, 4]


def test_what_a_model_asks_for():
    """An expert that is cut over fsdp and tensor moves in parts, each over a link of its own."""
    config = tiny.config(mesh={"fsdp": 2, "expert": 2, "tensor": 2}, model__combine="partial")
    mover = migrate.Mover(tiny.mesh(config), step_lib.abstract_state(config, tiny.mesh(config)))
    made = replan.setting_of(
        config, mover, batch_tokens=77, passes=2, interval=9, time_limit=1.0, min_gain=0.0
    )
    # half of the tokens for each of the two sets of experts, which compute at the same time
    assert (made.work.batch_tokens, made.dispatch, made.combine) == (38, "exchange", "partial")
    assert made.widths == (1.0, 1.0)
    assert made.expert_bytes == 3 * 3 * config.model.d_model * config.model.d_ff * 4 // 4
    assert made.topology.num_devices == 2


def test_the_same_again_moves_nothing():
    steps = [planted(seed) for seed in range(6)]
    first = replan.decide(setting(time_limit=0.0), HERE, steps)
    again = replan.decide(setting(time_limit=0.0), first.plan.placement, steps)
    assert not again.adopt
    assert again.move.experts == 0
    assert "best one found" in again.reason


def test_a_little_better_is_not_worth_a_move():
    steps = [planted(seed) for seed in range(6)]
    first = replan.decide(setting(), HERE, steps)
    again = replan.decide(setting(expert_bytes=10**12), first.plan.placement, steps)
    assert not again.adopt


def test_pins_are_kept_and_a_plan_that_breaks_them_is_refused():
    plan = Plan(HERE, (2, 3, 4))
    pins = replan.pins_of("replan.pins", "*:0:0, 3:5:1", plan)
    steps = [planted(seed) for seed in range(4)]
    free, held = (replan.decide(setting(pins=p), HERE, steps) for p in (None, pins))
    assert free.adopt
    assert held.adopt
    device_LE = held.plan.placement.device_LE
    assert (device_LE[:, 0].tolist(), int(device_LE[1, 5])) == ([0, 0, 0], 1)
    assert replan.pins_of("replan.pins", "", plan) is None
    with pytest.raises(Refused, match="breaks 1 of these pins"):
        replan.pins_of("replan.pins", "*:0:0,3:5:2", plan)
    with pytest.raises(Refused, match="1:0:0': experts are in the layers 2 to 4"):  # of no trace
        replan.pins_of("replan.pins", "1:0:0", plan)


def test_a_plan_that_is_slower_is_called_so():
    """One step's whims plan, and others judge."""
    steps = [planted(seed) for seed in range(6)]
    best = replan.decide(setting(), HERE, steps).plan.placement
    worse = replan.decide(setting(), best, [uniform(n) for n in range(2)] + steps[:2])
    assert not worse.adopt
    assert "on newer steps a layer takes" in worse.reason
    assert worse.seconds_after > worse.seconds_before


def test_no_structure_is_not_worth_a_move():
    for seed in range(3):
        steps = [uniform(10 * seed + n) for n in range(8)]
        decision = replan.decide(setting(expert_bytes=10**8), HERE, steps)
        assert not decision.adopt, decision.reason


@pytest.mark.parametrize("change", [{"interval": 1}, {"expert_bytes": 10**12}])
def test_a_move_that_does_not_pay_is_not_made(change):
    steps = [planted(seed) for seed in range(6)]
    decision = replan.decide(setting(**{"expert_bytes": 10**9} | change), HERE, steps)
    assert not decision.adopt
    assert "no more than the move" in decision.reason
    assert decision.saved_low > 0


def test_a_least_gain_can_be_asked_for():
    steps = [planted(seed) for seed in range(6)]
    assert not replan.decide(setting(min_gain=0.99), HERE, steps).adopt


def test_routing_that_has_changed_is_judged_on_the_newer_steps():
    """Planned on structure that is gone: the plan would not help the steps that judge."""
    steps = [planted(seed) for seed in range(3)] + [uniform(seed) for seed in range(3)]
    decision = replan.decide(setting(expert_bytes=10**8), HERE, steps)
    assert decision.move.experts > 0
    assert not decision.adopt, decision.reason


def test_copies_keep_their_number():
    load_LE = np.random.default_rng(0).random((LAYERS, EXPERTS))
    before = replication.balanced_slots(load_LE, 20, DEVICES)
    decision = replan.decide(setting(), before, [planted(seed) for seed in range(4)])
    assert decision.plan.placement.num_slots == 20


def test_too_few_steps_are_refused():
    with pytest.raises(Refused, match="two steps plan and two judge"):
        replan.decide(setting(), HERE, [planted(0)] * 3)


def test_a_search_in_the_background_comes_out_once():
    background = replan.Background()
    assert background.take() is None
    background.start(setting(), HERE, [planted(seed) for seed in range(4)])
    assert background.running
    background._thread.join()
    assert isinstance(background.take(), replan.Decision)
    assert background.take() is None
    assert not background.running


def test_a_search_that_fails_is_a_result():
    background = replan.Background()
    background.start(setting(), HERE, [planted(0)])
    background._thread.join()
    assert isinstance(background.take(), Refused)


def test_a_search_can_be_ended():
    background = replan.Background()
    background.start(setting(time_limit=1000.0), HERE, [planted(seed) for seed in range(8)])
    background.close()
    assert not background._thread.is_alive()
