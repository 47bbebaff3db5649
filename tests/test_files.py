"""Files that are whole or absent: never where a link points, or in the place of a device."""

import os

import pytest

from moe_jax import files


def write(path, text):
    with files.atomic_write(path, "w") as file:
        file.write(text)


def test_what_a_link_points_to_stays(tmp_path):
    """Else a folder from elsewhere could say which file of this machine is replaced."""
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("before")
    link.symlink_to("real.txt")
    write(link, "after")
    assert (real.read_text(), link.read_text(), link.is_symlink()) == ("before", "after", False)


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
