"""Collectives counted in the text of a program: against text that a reader can count."""

from moe_jax import hlo

TEXT = """
HloModule jit_step

%wrapped (p0: bf16[16,8]) -> bf16[16,8] {
  %p0 = bf16[16,8]{1,0} parameter(0)
  ROOT %r = bf16[16,8]{1,0} ragged-all-to-all(%p0, %p0), channel_id=1
}

%inner_condition (c: (s32[], f32[4])) -> pred[] {
  %two = s32[]{:T(128)} constant(2)
  ROOT %lt = pred[] compare(%c0, %two), direction=LT
}

%inner (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[4]{0:T(128)} all-gather(%x), dimensions={0}
}

%condition (c: (s32[], f32[4])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%c0, %three), direction=LT
}

%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = ((bf16[16,8]{1,0}), bf16[16,8]{1,0}, u32[]{:S(8)}) async-start(%x), calls=%wrapped
  %u = ((bf16[16,8]{1,0}), bf16[16,8]{1,0}, u32[]{:S(8)}) async-update(%s), calls=%wrapped
  %d = bf16[16,8]{1,0} async-done(%u), calls=%wrapped
  %w = (s32[], f32[4]) while(%t), condition=%inner_condition, body=%inner
  %p = (f32[2]{0}, f32[2]{0}, u32[]) collective-permute-start(%x), channel_id=2
  %q = f32[2]{0} collective-permute-done(%p)
}

ENTRY %main (a: f32[4]) -> f32[] {
  %w2 = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %loss = (f32[], bf16[10]{0}) all-reduce(%a, %b), to_apply=%add
}
"""


def test_loops_multiply_and_every_form_counts_once():
    assert hlo.collectives(TEXT) == {
        "ragged-all-to-all": (3, 3 * 16 * 8 * 2),
        "all-gather": (6, 6 * 16),
        "collective-permute": (3, 3 * 8),
        "all-reduce": (1, 4 + 20),
    }


BRANCHES = """
HloModule jit_step

%yes (p: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%p), to_apply=%add
}

%no (p: f32[4]) -> f32[4] {
  %s = (f32[64]{0:T(8,128)(2,1)}, f32[16]{0}, u32[]) reduce-scatter-start(%p), to_apply=%add
  ROOT %t = f32[16]{0} reduce-scatter-done(%s)
}

%called (p: f32[4]) -> f32[4] {
  %g = ((f32[4]{0}, f32[8]{0}), (f32[16]{0}, f32[32]{0})) all-gather-start(%p, %q), channel_id=1
  %h = (f32[16]{0}, f32[32]{0}) all-gather-done(%g)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %wrong = f32[] all-to-all(%a, %b)
}

ENTRY %main (a: pred[], p: f32[4]) -> f32[4] {
  %c = f32[4] call(%p), to_apply=%called
  ROOT %b = f32[4] conditional(%a, %p, %p), true_computation=%yes, false_computation=%no
}
"""


def test_branches_and_calls_are_followed_and_starts_count_what_arrives():
    assert hlo.collectives(BRANCHES) == {
        "all-reduce": (1, 16),
        "reduce-scatter": (1, 64),
        "all-gather": (1, 64 + 128),
    }


def test_a_loop_whose_turns_are_not_in_the_text_counts_once():
    unknown = TEXT.replace("s32[] constant(3)", "s32[] parameter(0)")
    assert hlo.collectives(unknown)["ragged-all-to-all"] == (1, 16 * 8 * 2)
