"""Messages between the processes of a server, with a list in the place of the devices."""

import numpy as np
import pytest

from moe_jax.infer.serving import crew


@pytest.mark.parametrize("num_words", [40, 64, 1 << 12])
def test_messages_come_as_they_were_told(num_words, monkeypatch):
    """In one broadcast or in many; beats are not heard."""
    sent = []

    def told(self, words):
        assert len(words) <= num_words
        sent.append(np.pad(words, (0, num_words - len(words))))

    first, other = crew.Crew(num_words), crew.Crew(num_words)
    monkeypatch.setattr(crew.Crew, "is_alone", False)
    monkeypatch.setattr(crew.Crew, "_broadcast", told)
    packed = np.arange(300, dtype=np.int32).reshape(2, 150) - 7
    share = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    first.tell("run", 3, packed)
    first.tell(crew.BEAT)
    first.tell("take_counters")
    first.tell("move", share, True)
    assert (len(sent) > 4) == (num_words < 400)
    monkeypatch.setattr(crew.Crew, "_broadcast", lambda self, words: sent.pop(0))
    name, (number, found) = other.hear()
    assert (name, number) == ("run", 3)
    np.testing.assert_array_equal(found, packed)
    assert found.dtype == packed.dtype
    assert other.hear() == ("take_counters", [])
    name, (found, flag) = other.hear()
    assert (name, bool(flag)) == ("move", True)
    np.testing.assert_array_equal(found, share)
    assert not sent
