"""Messages between the processes of a server, with a list in the place of the devices."""

import numpy as np
import pytest

from moe_jax.infer.serving import broadcast


@pytest.mark.parametrize("num_words", [40, 64, 1 << 12])
def test_messages_come_as_they_were_told(num_words, monkeypatch):
    """In one broadcast or in many; beats are not heard."""
    sent = []

    def told(self, words):
        assert len(words) <= num_words
        sent.append(np.pad(words, (0, num_words - len(words))))

    first, other = broadcast.Broadcast(num_words), broadcast.Broadcast(num_words)
    monkeypatch.setattr(broadcast.Broadcast, "is_alone", False)
    monkeypatch.setattr(broadcast.Broadcast, "_send", told)
    packed = np.arange(300, dtype=np.int32).reshape(2, 150) - 7
    share = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    first.tell("run", 3, packed)
    first.tell(broadcast.BEAT)
    first.tell("take_counters")
    first.tell("move", share, True)
    assert (len(sent) > 4) == (num_words < 400)
    monkeypatch.setattr(broadcast.Broadcast, "_send", lambda self, words: sent.pop(0))
    name, (number, found) = other.hear()
    assert (name, number) == ("run", 3)
    np.testing.assert_array_equal(found, packed)
    assert found.dtype == packed.dtype
    assert other.hear() == ("take_counters", [])
    name, (found, flag) = other.hear()
    assert (name, bool(flag)) == ("move", True)
    np.testing.assert_array_equal(found, share)
    assert not sent
