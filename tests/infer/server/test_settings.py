"""What is refused before a model is read: flags of the server, its port, its token."""

import contextlib
import socket
import time

import pytest

from moe_jax.errors import Refused
from moe_jax.infer.server import settings


def test_two_servers_on_one_port():
    with contextlib.closing(settings.listen("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(Refused, match=f"127.0.0.1:{port}.*cannot be listened on"):
            settings.listen("127.0.0.1", port)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not on this platform")
def test_a_connection_whose_client_takes_nothing_ends():
    with (
        contextlib.closing(settings.listen("127.0.0.1", 0, send_seconds=0.5)) as bound,
        socket.create_connection(bound.getsockname()[:2]),
        bound.accept()[0] as connection,
    ):
        connection.settimeout(0.1)
        end, ended = time.monotonic() + 20, False
        while not ended and time.monotonic() < end:
            try:
                connection.send(bytes(1 << 20))
            except TimeoutError:  # of this socket object, or once of the connection
                pass
            except BrokenPipeError:
                ended = True
        assert ended


def plain_settings(**fields):
    names = ("context", "seats", "cache_tokens", "bearer_token_file", "record")
    plain = {"host": "127.0.0.1", "port": 0, "max_queue": 9, **dict.fromkeys(names), **fields}
    return settings.Settings(**plain)


def test_settings(tmp_path):
    assert plain_settings().check() == ""
    (tmp_path / "token").write_text("secret\n")
    assert plain_settings(bearer_token_file=str(tmp_path / "token")).check() == "secret"
    (tmp_path / "empty").write_text(" \n")
    for fields, match in (
        ({"port": 70000}, "--port"),
        ({"context": 0}, "--context"),
        ({"seats": 0}, "--seats"),
        ({"cache_tokens": -16}, "--cache_tokens"),
        ({"max_queue": -1}, "--max_queue"),
        ({"replan_tokens": -1}, "--replan_tokens"),
        ({"replan_pause": float("nan")}, "--replan_pause"),
        ({"host": "no.such.host.invalid"}, "--host"),
        ({"bearer_token_file": str(tmp_path / "empty")}, "one word"),
        ({"bearer_token_file": str(tmp_path / "missing")}, "readable"),
    ):
        with pytest.raises(Refused, match=match):
            plain_settings(**fields).check()
