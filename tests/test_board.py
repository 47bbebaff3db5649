"""TensorBoard files: read back record by record, and given up with a word."""

import struct

from tensorboardX.proto import event_pb2

from moe_jax.board import Board


def events(folder):
    """Of the only file in a folder: records of length, its checksum, bytes, their checksum."""
    (path,) = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[12 + size + 4 :]
    return found


def test_points_are_read_back(tmp_path):
    board = Board(tmp_path / "tensorboard", 4, warn=print)
    board.write(4, {"loss": 2.5, "z": float("nan")})
    board.write(5, {"loss": 2.25})
    board.close()
    head, start, *points = events(tmp_path / "tensorboard")
    assert head.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, event_pb2.SessionLog.START)
    values = [(p.step, p.summary.value[0].tag, p.summary.value[0].simple_value) for p in points]
    assert [value[:2] for value in values] == [(4, "loss"), (4, "z"), (5, "loss")]
    assert (values[0][2], values[2][2]) == (2.5, 2.25)
    assert values[1][2] != values[1][2]


def test_what_cannot_be_written_is_said_once(tmp_path, monkeypatch):
    said: list[str] = []
    board = Board(tmp_path / "tensorboard", 1, warn=said.append)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board._writer, "write_event", full)
    board.write(1, {"loss": 2.5, "z": 0.5})
    board.write(2, {"loss": 2.5})
    board.close()
    assert len(said) == 1
    assert "No space left on device" in said[0]
