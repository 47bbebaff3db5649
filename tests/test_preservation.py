"""Which steps stay, against lists that a reader can count."""

import datetime
import itertools

from moe_jax.checkpoint import preservation

LOSSES = {2: 3.0, 4: 2.0, 6: None, 8: 2.5, 10: 1.9, 12: 2.1}
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def stay(**kept):
    infos = [
        preservation._Info(step, None if loss is None else {preservation.LOSS: loss}, NOW)
        for step, loss in LOSSES.items()
    ]
    surplus = preservation.Kept(**kept).surplus(infos)
    return [step for step in LOSSES if step not in surplus]


def test_the_newest_stay():
    assert stay(newest=2) == [10, 12]
    assert stay(newest=9) == list(LOSSES)


def test_every_so_many_steps_stay():
    assert stay(newest=1, every=4) == [4, 8, 12]
    assert stay(newest=1, every=5) == [10, 12]


def test_the_best_stay_and_those_without_a_loss_do_not():
    assert stay(newest=1, best=2) == [4, 10, 12]
    assert stay(newest=1, best=1) == [10, 12]


def test_what_no_run_can_make_again_stays():
    infos = [preservation._Info(step, None, NOW, only=step == 0) for step in (0, 2, 4)]
    assert preservation.Kept(1).surplus(infos) == [2]
    assert preservation.Kept(2).surplus(infos) == []


def test_a_step_0_that_cannot_be_read_stays(tmp_path):
    for step in (0, 2, 4):
        (tmp_path / str(step)).mkdir()
    infos = [preservation._Info.of(tmp_path, step) for step in (0, 2, 4)]
    assert preservation.Kept(1).surplus(infos) == [2]


def test_a_loss_that_is_not_finite_is_none(tmp_path):
    """NaN, beside which no loss is the lowest; a number too large for one; a word."""
    for text in ("NaN", "Infinity", "1" + "0" * 400, '"2.5"', "2.5"):
        (tmp_path / "2").mkdir(exist_ok=True)
        extra = f'{{"{preservation.LOSS}": {text}}}'
        (tmp_path / "2" / "meta.json").write_text(f'{{"extra": {extra}}}')
        metrics = preservation._Info.of(tmp_path, 2).metrics
        assert metrics == ({preservation.LOSS: 2.5} if text == "2.5" else None)


def test_all_together_is_the_union():
    for newest, every, best in itertools.product((1, 2), (0, 4, 6), (0, 1, 3)):
        together = set(stay(newest=newest, every=every, best=best))
        apart = (stay(newest=newest), stay(newest=1, every=every), stay(newest=1, best=best))
        assert together == set().union(*apart)
