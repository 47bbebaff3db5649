"""Folders that the commands write: in a place that can take them, and whole or not at all."""

import errno
import os
import pathlib
import signal

import pytest

from moe_jax.errors import Refused
from moe_jax.hf import __main__ as hf_main
from moe_jax.hf import folder, gguf_tokens
from tests.hf import tiny_gguf


def test_places_of_new_folders(tmp_path, monkeypatch):
    """What could not take its name in the end is refused at the start."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(inside)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    real = os.path.ismount
    mounted = lambda path: str(path) == str(tmp_path / "mounted") or real(path)  # noqa: E731
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", mounted)
    monkeypatch.chdir(inside)
    for out, rule in (
        ("../file", "exists already"),
        ("../file/out", f"cannot be written below {tmp_path / 'file'}"),
        ("../link", "is a link"),
        ("../dangling", "is a link"),
        ("../mounted", "is a mount point"),
        (".", "is the folder that this runs in"),
        (inside, "is the folder that this runs in"),
    ):
        with pytest.raises(Refused, match=f"OUT = .*{rule}"):
            folder.check_new(out)
    (inside / "empty").mkdir()
    for out in ("new/deeper", "empty", "../inside/empty/../other"):
        with folder.new(out) as made:
            (made / "x").write_text("")
        assert [path.name for path in pathlib.Path(out).iterdir()] == ["x"]
    assert sorted(path.name for path in inside.iterdir()) == ["empty", "new", "other"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left"), 1, "refused: OUT = {out!r}: could not be written"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_full_disk_and_an_interruption_are_a_line(
    error, code, says, tmp_path, capsys, monkeypatch
):
    def write(*_):
        raise error

    monkeypatch.setattr(gguf_tokens, "write", write)
    file, out = str(tiny_gguf.write(tmp_path / "m.gguf")), str(tmp_path / "new" / "deep" / "out")
    assert hf_main.main(["from-gguf", file, out]) == code
    assert capsys.readouterr().err.startswith(says.format(out=out))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_folder_that_others_write_stays_and_other_errors_are_not_of_the_disk(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="nowhere"),
        folder.new(tmp_path / "out"),
    ):
        pathlib.Path("/nowhere/model.safetensors").read_bytes()
    theirs = tmp_path / f".out.{os.getpid()}.tmp"  # a number that a process elsewhere may have, too
    theirs.mkdir()
    (theirs / "half").write_text("")
    with pytest.raises(FileExistsError), folder.new(tmp_path / "out"):
        pytest.fail("never begins")
    assert [path.name for path in theirs.iterdir()] == ["half"]


def test_a_sigterm_leaves_nothing_half_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_tokens, "write", lambda *_: signal.raise_signal(signal.SIGTERM))
    file = tiny_gguf.write(tmp_path / "m.gguf")
    deaf = signal.signal(signal.SIGTERM, lambda *_: None)  # in place of the end of these tests
    try:
        ours = signal.getsignal(signal.SIGTERM)
        assert hf_main.main(["from-gguf", str(file), str(tmp_path / "out")]) == 130
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, deaf)
    assert capsys.readouterr().err == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
