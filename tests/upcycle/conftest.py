"""A dense model in a file, the run that it becomes, and text to train it on."""

import pytest

from moe_jax.hf import gguf_llama
from moe_jax.upcycle import __main__ as command
from tests.hf import tiny_gguf


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    gguf_llama.convert(tiny_gguf.write(root / "tiny.gguf"), root / "folder")
    return root / "folder"


@pytest.fixture(scope="module")
def upcycled(dense, tmp_path_factory):
    """The command, from the GGUF file on."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    file = dense.parent / "tiny.gguf"
    assert command.main([f"--gguf={file}", f"--workdir={workdir}", "--num-experts=4"]) == 0
    assert [path.name for path in workdir.parent.iterdir()] == ["run"]  # nothing is left beside it
    return workdir


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of small files, about half of them held out."""
    folder_ = tmp_path_factory.mktemp("texts")
    for number in range(24):
        words = " ".join(f"in the 12 th {number * i % 37}" for i in range(40))
        (folder_ / f"{number}.txt").write_text(f"{words} é\n")
    return {"path": str(folder_), "held_out_fraction": 0.5, "seq_len": 16, "global_batch": 8}
