"""Files are known by what they hold, and what is none of the known ones by what it looks like.

Mutations under foreign names: test_fuzz.py.
"""

import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from moe_jax.errors import Refused
from tests.placement.test_formats import check_sglang, npz_bytes, read, run, topk_LTK


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


# What is none of the known files: name -> (file name, content, what it looks like).
OTHERS = {
    "gzip": ("t.npz", gzip.compress(b"{}"), "a gzip archive"),
    "page": ("t.json", b"<!DOCTYPE html><html></html>", "a page"),
    "pointer": ("t.npz", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "UTF-16": ("t.dat", "{}".encode("utf-16"), "UTF-16 text"),
    "pickle": ("t.npz", pickle.dumps({}), "never read"),
    "old pickle": ("t.pkl", pickle.dumps({}, 0), "never read"),
    "text": ("t", b"Expert Node", "text that begins with 'Expert Node'"),
    "text in the name of arrays": ("t.npz", b"Expert Node", "text that begins with 'Expert Node'"),
    "bytes": ("t.dat", b"\x00\x01\x02", "bytes that begin with 00 01 02"),
    "nothing": ("t", b"", "an empty file"),
    "half a zip": ("t.json", npz_bytes(a=np.zeros(3))[:-30], "cut short or damaged"),
    "zip of texts": ("t.dat", zip_of("a.txt", "dump/data"), "a zip archive without arrays"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_of_the_known_files_is_named(name, tmp_path, capsys):
    file_name, content, looks = OTHERS[name]
    with pytest.raises(Refused) as refused:
        read(tmp_path, file_name, content)
    assert looks in str(refused.value)
    assert "\n" not in str(refused.value)
    assert run("solve", tmp_path / file_name, "--devices=2", f"--out={tmp_path / 'p.json'}") == 1
    assert looks in capsys.readouterr().err


def test_lines_of_objects_and_one_object_are_told_apart(tmp_path):
    """The same bytes whatever the name; one record alone is one object, and a trace as well."""
    record = {"step": 0, "layer": 0, "rank": 0, "num_tokens": 1, "top_indices": [[0, 1]]}
    one = json.dumps(record)
    for text, tokens in ((one, 1), (f"\n{one}\n\n{one.replace('0,', '1,', 1)}\n", 2)):
        for name in ("a.json", "a.jsonl", "a"):
            assert read(tmp_path, name, text).num_tokens == tokens
    dump = {"records": [{"topk_ids_of_layer": topk_LTK().tolist()}]}
    for indent in (None, 0, 1):
        for name in ("a.jsonl", "a.csv"):
            check_sglang(read(tmp_path, name, json.dumps(dump, indent=indent)))
