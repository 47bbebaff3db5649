"""Bytes as tokens."""

import os
import pathlib
import subprocess
import sys

from moe_jax.infer.text import Bytes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_bytes_are_those_of_utf8_whatever_the_locale():
    given = b"h\xc3\xa9\xff\xe2\x82\xac"
    assert Bytes().encode(given.decode("utf-8", "surrogateescape")) == list(given)
    program = "from moe_jax.infer.text import Bytes; print(Bytes().encode('h\\xe9'))"
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "utf8=0", "-c", program]
    said = subprocess.check_output(command, env={**os.environ, **plain}, text=True)
    assert said.split("\n")[-2] == str(list("h\xe9".encode()))
