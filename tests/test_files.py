"""Files that are whole or absent: where links point, and never in the place of a device."""

import os

import pytest

from moe_jax import files


def write(path, text):
    with files.atomic_write(path, "w") as file:
        file.write(text)


@pytest.mark.parametrize("there", ["before", None])
def test_links_stay_and_what_they_point_to_is_written(there, tmp_path):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    if there is not None:
        real.write_text(there)
    link.symlink_to("real/a.txt")
    write(link, "after")
    assert os.readlink(link) == "real/a.txt"
    assert not real.is_symlink()
    assert real.read_text() == "after"
    assert sorted(tmp_path.rglob("*")) == [link, real.parent, real]


@pytest.mark.parametrize("name", ["pipe", "link", "folder", "loop"])
def test_what_is_no_regular_file_stays(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = {path: path.lstat().st_ino for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match=r"is no regular file|symbolic links"):
        write(tmp_path / name, "after")
    assert {path: path.lstat().st_ino for path in tmp_path.iterdir()} == before
