"""Which routed tokens are kept: regions of requests that wait, turn and come back.

What the recorder holds of served texts, against the static engine: test_engine.py.
"""

from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.scheduler import Job


def test_what_lies_before_a_region_is_not_recorded():
    """A request is computed from an earlier position on once it was preempted."""
    recorder, jobs = Recorder(1, 2, 8), [Job(n, [1] * 20, 4, shard=0) for n in range(2)]
    for job, first in zip(jobs, (0, 6), strict=True):
        recorder.admit(job, first)
        recorder.place(job, first, 4)
    recorder.admit(jobs[1], 2)  # less of it was found
    assert recorder.place(jobs[1], 2, 3).tolist() == [-1] * 3
    assert recorder.place(jobs[1], 5, 4).tolist() == [-1, 8, 9, 10]
    assert recorder.place(jobs[0], 4, 2).tolist() == [4, 5]
    assert len(recorder.tokens()) == 6 + 4


def test_a_text_that_turns_long_is_recorded_anew():
    """Its tokens are routed otherwise, and those found in long blocks not at all."""
    recorder, job = Recorder(1, 2, 8), Job(0, [1] * 20, 4, shard=0)
    recorder.admit(job, 0)
    recorder.place(job, 0, 6)
    job.is_long = True
    recorder.admit(job, 4)
    assert recorder.num_sequences == 0
    assert recorder.place(job, 4, 2).tolist() == [0, 1]
    recorder.admit(job, 5)  # preempted
    assert recorder.place(job, 5, 3).tolist() == [1, 2, 3]
    assert recorder.num_sequences == 1
    assert len(recorder.tokens()) == 4


def test_a_preempted_request_has_one_chance_of_a_region():
    recorder, jobs = Recorder(1, 1, 8), [Job(n, [1] * 8, 4, shard=0) for n in range(2)]
    for _ in range(50):
        for job in jobs:
            recorder.admit(job, 0)
            recorder.place(job, 0, 4)
    assert recorder._seen == [2]
    others = Recorder(2, 4, 8)
    for shard in (0, 1, 0):  # where it holds a region, elsewhere, and back again
        jobs[0].shard = shard
        others.admit(jobs[0], 0)
        others.place(jobs[0], 0, 4)
    assert others.num_sequences == 1
    others.end(jobs[0])
    assert not others._met
