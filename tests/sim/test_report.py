"""The command as a whole: equality is demanded of every entry, and anything else is loud."""

import json
import sys

import numpy as np
import pytest

from moe_jax.errors import UNSAID
from moe_jax.placement.plan import Placement, Plan


def test_equal_runs_give_a_table_three_plots_and_a_page(case, capsys):
    assert case.run() == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "Bit-identical answers: yes" in printed
    assert "Measured = predicted rows: yes" in printed
    assert "a unigram model has 3.300" in printed
    for name in ("loss", "traffic", "load"):
        path = case.folder / "out" / "plots" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert str(path) in printed
    assert str(case.folder / "out" / "report.html") in printed
    left_over = [p for p in (case.folder / "out").rglob("*") if p.suffix == ".tmp"]
    assert left_over == []


def test_figures_are_those_of_the_token_by_token_count(case, capsys, no_plots):
    assert case.run("--json") == 0
    printed = json.loads(capsys.readouterr().out)
    routed = (case.before["expert_ids"] != 255).any(-1).sum()
    for side in ("before", "after"):
        arrays, column = getattr(case, side), {k: f[side] for k, f in printed["figures"].items()}
        out, back = arrays["dispatch_LMM"].sum(), arrays["combine_LMM"].sum()
        assert column["rows_out"] == out / routed
        assert column["rows_back"] == back / routed
        assert column["rows"] == (out + back) / routed
        assert column["rows_deduplicated"] == 2 * out / routed
        assert column["padding"] == 3 * 3 * 4 * 4 / routed
        load_LM = arrays["computed_LP"].reshape(3, 4, 2).sum(-1)
        worst_L = load_LM.max(1) / load_LM.mean(1)
        assert column["load_mean"] == pytest.approx(worst_L.mean(), rel=1e-12)
        assert column["load_worst"] == worst_L.max()
    change = printed["figures"]["rows_out"]["change"]
    assert change == pytest.approx(case.after["dispatch_LMM"].sum() / out_before(case) - 1)
    assert printed["ok"]
    assert printed["bit_identical"]
    assert printed["measured_equals_predicted"]


SHAPES = [
    (layers, top_k, *how)
    for layers, top_k in ((1, 1), (1, 2), (3, 1))
    for how in (("exchange", "exact"), ("hierarchical", "exact"), ("hierarchical", "reproducible"))
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_page_holds_what_tokens_moved_one_by_one(shaped, capsys, shape):
    """One expert a token, one layer, a dense layer first: figures from ids, homes and slots."""
    case = shaped(*shape)
    assert case.run() == 0
    text = capsys.readouterr().out
    page = (case.folder / "out" / "report.html").read_text()
    ids_TLK, home_T = case.before["expert_ids"], case.before["token_home"]
    contiguous = Placement.contiguous(shape[0], 8, 4)
    sides = [figures(ids_TLK, home_T, p, *shape[2:]) for p in (contiguous, case.plan.placement)]
    for label, before, after in zip(LABELS, *sides, strict=True):
        cells = f"{before:.3f}", f"{after:.3f}", f"{100 * (after / before - 1):+.1f} %"
        (line,) = [line for line in text.splitlines() if line.startswith(label)]
        assert " ".join(line.split()).endswith(" ".join(cells))
        row = page[page.index(f'<th scope="row">{label}') :].split("</tr>")[0]
        assert row.endswith("".join(f"<td>{cell}</td>" for cell in cells))


LABELS = (
    "rows out to the experts",
    "rows back home",
    "both ways",
    "one row per device out and back",
    "load, max / mean: mean",
    "load, max / mean: worst",
)


def figures(ids_TLK, home_T, placement, dispatch, combine):
    """Of LABELS, token by token; two nodes of two devices."""
    out = back = direct = routed = 0
    load_LM = np.zeros((ids_TLK.shape[1], 4))
    for t, layer in np.ndindex(*ids_TLK.shape[:2]):
        slots = list(placement.physical_to_logical_LP[layer])
        at = [slots.index(e) // 2 for e in ids_TLK[t, layer] if e != 255]
        home, away = home_T[t], {d for d in at if d != home_T[t]}
        np.add.at(load_LM[layer], at, 1)
        routed += bool(at)
        direct += 2 * len(away)
        way = dict.fromkeys(away, 1)
        if dispatch == "hierarchical":
            relay_of = {d: d // 2 * 2 + home % 2 for d in away if d // 2 != home // 2}
            way = {d: 2 if relay_of.get(d, d) != d else 1 for d in away}
            shared = {d // 2 for d in relay_of}  # to each node once, then to others than the relay
            out += len(shared) + sum(relay_of.get(d) != d for d in away)
        else:
            out += len(away)
        back += sum(way[d] for d in at if d != home)
    back = back if combine == "exact" else out
    worst_L = load_LM.max(1) / load_LM.mean(1)
    rows = [rows / routed for rows in (out, back, out + back, direct)]
    return [*rows, worst_L.mean(), worst_L.max()]


def out_before(case) -> int:
    return case.before["dispatch_LMM"].sum()


def one_row(arrays, entry, index, by=1):
    changed = arrays[entry].copy()
    changed[index] += by
    arrays[entry] = changed


def one_bit(arrays):
    bits = arrays["logits"].view(np.uint32).copy()
    bits[1, 4, 10] ^= 1
    arrays["logits"] = bits.view(np.float32)


def a_sign_of_zero(case):
    case.before["logits"][0, 2, 3], case.after["logits"][0, 2, 3] = 0.0, -0.0


def another_expert(arrays):
    arrays["expert_ids"] = arrays["expert_ids"].copy()
    arrays["expert_ids"][59, 2] = arrays["expert_ids"][59, 2][::-1]


def shorter_text(arrays):
    arrays["text_ids"] = arrays["text_ids"][:, :-1]


MISMATCHES = {
    "a row out before": (
        lambda case: one_row(case.before, "dispatch_LMM", (1, 2, 3)),
        "rows out, before: layer 1, source device 2, destination device 3",
    ),
    "a row out after": (
        lambda case: one_row(case.after, "dispatch_LMM", (0, 0, 1)),
        "rows out, after: layer 0, source device 0, destination device 1",
    ),
    "a row back before": (
        lambda case: one_row(case.before, "combine_LMM", (2, 3, 0)),
        "rows back, before: layer 2, source device 3, destination device 0",
    ),
    "a row back after": (
        lambda case: one_row(case.after, "combine_LMM", (2, 3, 0)),
        "rows back, after: layer 2, source device 3, destination device 0",
    ),
    "rows swapped, same total": (
        lambda case: case.after.update(combine_LMM=case.after["combine_LMM"].swapaxes(1, 2)),
        "rows back, after: layer 0",
    ),
    "a computed row": (
        lambda case: one_row(case.after, "computed_LP", (2, 7)),
        "rows computed, after: layer 2, slot 7",
    ),
    "a computed row before": (
        lambda case: one_row(case.before, "computed_LP", (0, 0)),
        "rows computed, before: layer 0, slot 0",
    ),
    "one bit of a logit": (
        lambda case: one_bit(case.after),
        "logits: sequence 1, position 4, vocabulary entry 10",
    ),
    "the sign of a zero": (a_sign_of_zero, "logits: sequence 0, position 2, vocabulary entry 3"),
    "the digest of all logits": (
        lambda case: case.after["meta"].update(logits_digest="cd" * 32),
        "digest of all logits: SHA-256 abab",
    ),
    "a text id": (
        lambda case: one_row(case.after, "text_ids", (1, 8)),
        "greedy text: sequence 1, position 8",
    ),
    "the length of the text": (
        lambda case: shorter_text(case.after),
        "greedy text: shape (2, 9) before, (2, 8) after",
    ),
    "an expert id": (
        lambda case: another_expert(case.after),
        "expert ids: token 59, layer 2, choice 0",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_every_mismatch_is_named_and_fails(case, capsys, no_plots, name):
    change, words = MISMATCHES[name]
    change(case)
    assert case.run() == 1
    printed, errors = capsys.readouterr()
    assert errors.startswith("FAILED: 1 of 10 checks")
    assert words in errors
    assert ": NO." in printed


def test_what_differs_is_in_a_layer_of_the_model(case, capsys, no_plots):
    case.plan = Plan(case.plan.placement, layer_ids=(1, 2, 5))  # 0, 3 and 4 are dense
    one_row(case.after, "dispatch_LMM", (2, 0, 1))
    another_expert(case.after)
    assert case.run() == 1
    errors = capsys.readouterr().err
    assert "rows out, after: layer 5, source device 0, destination device 1" in errors
    assert "expert ids: token 59, layer 5, choice 0" in errors


def test_a_failed_run_still_shows_what_it_found(case, capsys):
    one_row(case.after, "dispatch_LMM", (0, 0, 1))
    assert case.run("--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["ok"]
    assert printed["bit_identical"]
    assert not printed["measured_equals_predicted"]
    text = (case.folder / "out" / "report.html").read_text()
    assert "FAILED: 1 of 10 checks do not hold" in text
    assert "(1 of 48 entries differ)" in text


def test_equal_runs_are_no_failure_where_stdout_is_full(case, capsys, no_plots, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert case.run() == UNSAID
    assert "not printed" in capsys.readouterr().err


def test_gathered_rows_are_predicted_too(gathered_case, capsys, no_plots):
    assert gathered_case.run() == 0
    assert "the same rows moved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("combine", "back", "words"),
    [("exact", 5, "one per assignment"), ("reproducible", 3, "each a sum")],
)
def test_rows_over_relays_count_once_a_hop(made, capsys, no_plots, combine, back, words):
    """From device 0 to two experts of device 3, past 2, and one of device 1."""
    ids_TLK = np.full((2, 3, 2), 255, np.uint8)
    ids_TLK[0], ids_TLK[1, :, 0] = (6, 7), 2
    plan = Plan(Placement.contiguous(3, 8, 4))
    case = made(ids_TLK, np.zeros(2, np.int32), plan, "hierarchical", combine)
    assert case.run("--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"]["rows_out"]["before"] == 3 / 2
    assert printed["figures"]["rows_back"]["before"] == back / 2
    note, direct = printed["notes"][:2]
    assert "counts once a hop, out and back" in note
    assert words in note
    assert "without relays" in direct
    assert case.run() == 0
    assert "rows out to the experts, of every hop, measured" in capsys.readouterr().out


def test_no_saving_is_called_so(case, capsys, no_plots):
    case.after, case.plan = case.before, Plan(Placement.contiguous(3, 8, 4))
    assert case.run() == 0
    assert "this plan saves no traffic" in capsys.readouterr().out


# experts of tokens whose home is device 0, slots of the plan; what the headline says
HEADLINES = {
    "fewer back alone": (
        [[2, 3]],  # from one other device to home and another: 1 + 2 rows, 1 + 1
        [2, 1, 0, 3, 4, 5, 6, 7],
        "and 33.3 % fewer rows both ways (out +0.0 %, back -50.0 %).",
    ),
    "fewer out, as many more back": (
        [[2, 4], [0, 6]],  # 2 + 2 and 1 + 1 rows, then 1 + 2 each
        [1, 3, 2, 4, 5, 7, 0, 6],
        "but no fewer rows both ways (out -33.3 %, back +33.3 %): this plan saves no traffic.",
    ),
    "fewer out and both ways": (
        [[2, 4]],
        [1, 3, 2, 4, 5, 7, 0, 6],
        "and 25.0 % fewer rows both ways (out -50.0 %, back +0.0 %).",
    ),
}


@pytest.mark.parametrize("name", HEADLINES)
def test_the_headline_goes_by_both_ways(made, capsys, no_plots, name):
    experts_TK, slots_P, words = HEADLINES[name]
    ids_TLK = np.repeat(np.array(experts_TK, np.uint8)[:, None], 3, axis=1)
    plan = Plan(Placement(np.array([slots_P] * 3), 8, 4))
    case = made(ids_TLK, np.zeros(len(ids_TLK), np.int32), plan)
    assert case.run("--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["headline"] == f"The same answers in every bit, {words}"


def test_the_plan_before_may_be_given(case, capsys, no_plots):
    case.before, case.after = case.after, case.before
    shuffled, case.plan = case.plan, Plan(Placement.contiguous(3, 8, 4))
    assert case.run() == 1  # without it, the contiguous plan is taken, which is not what ran
    assert "--plan-before: digest" in capsys.readouterr().err
    shuffled.write(case.folder / "first.json")
    assert case.run(f"--plan-before={case.folder}/first.json") == 0


REFUSALS = {
    "another model": (
        lambda case: case.after["meta"].update(model="another"),
        "--after: meta.model = 'another'",
    ),
    "another number of layers": (
        lambda case: case.after.update(
            {n: case.after[n][:2] for n in case.after if n.endswith(("_LMM", "_LP"))},
            expert_ids=case.after["expert_ids"][:, :2],
        ),
        "--after: layers = 2",
    ),
    "another plan": (
        lambda case: case.after["meta"].update(plan_digest="0" * 64),
        "ran with the plan 0000",
    ),
    "a plan for more experts": (
        lambda case: setattr(case, "plan", Plan(Placement.contiguous(3, 16, 4))),
        "plan num_experts = 16",
    ),
    "no metrics": (
        lambda case: (case.folder / "metrics.jsonl").unlink(),
        "--metrics = ",
    ),
    "a file where the folder should be": (
        lambda case: (case.folder / "out").write_text(""),
        "--out = ",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_one_line(case, capsys, name):
    change, words = REFUSALS[name]
    change(case)
    assert case.run("--json") == 1
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("refused: ")
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert not (case.folder / "out").is_dir()


def test_text_of_files_stays_text(case, capsys):
    """Lone surrogates, which JSON may hold, and what would colour a terminal."""
    bad = "bad \ud800 \x1b[31m\n"
    for side in (case.before, case.after):
        side["meta"].update(model=bad, machine=bad)
    case.plan = Plan(case.plan.placement, provenance={bad: {"x": bad}})
    method = {"name": bad, "rows": {"exchange": 2}}
    compared = {"objective_name": bad, "unit": bad, "methods": [method]}
    (case.folder / "compare.json").write_text(json.dumps(compared))
    assert case.run(f"--compare={case.folder}/compare.json") == 0
    printed = capsys.readouterr().out
    assert r"bad \ud800 \x1b[31m\n" in printed
    for text in (printed, (case.folder / "out" / "report.html").read_text(encoding="utf-8")):
        assert all(c.isprintable() or c == "\n" for c in text)


def test_missing_flags_are_a_usage_error():
    from moe_jax.sim import report

    with pytest.raises(SystemExit) as stopped:
        report.main(["--before=a.npz"])
    assert stopped.value.code == 2
