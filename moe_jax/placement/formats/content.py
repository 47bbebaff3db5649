"""What a file is, by its content: its first bytes, its first line, the names in a zip archive.

The suffix decides nothing that the content says. It is asked where a file is too damaged or too
short to say anything, and its reader then names what is wrong; a suffix that the content
contradicts is not asked. What is none of the known files is refused by what it looks like.
"""

import codecs
import pathlib
import zipfile

from moe_jax.errors import Refused
from moe_jax.placement.formats import plans, raw, trtllm
from moe_jax.routing import npz

_HEAD = 1 << 16  # bytes that are looked at
_SUFFIXES = {
    ".npz": "npz",
    ".pt": "torch",
    ".pth": "torch",
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".json": "json",
    ".jsonl": "jsonl",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".csv": "csv",
    ".pkl": "pickle",
    ".pickle": "pickle",
}
_ZIPS = ("npz", "torch")
_TEXTS = ("json", "jsonl", "yaml", "csv", "pickle")  # the oldest pickles are text
_PICKLE = "a pickle"
_OTHERS = (
    *((bytes([0x80, protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"PAR1", "a Parquet table"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF model"),
    (b"\x89PNG", "a picture"),
    (b"%PDF", "a PDF"),
    (b"<", "a page (HTML or XML)"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (b"\xff\xfe", "UTF-16 text (UTF-8 is read)"),
    (b"\xfe\xff", "UTF-16 text (UTF-8 is read)"),
)


def kind_of(path: pathlib.Path) -> str:
    """One of npz, torch, npy, safetensors, json, jsonl, yaml, csv."""
    with raw.existing_file(path).open("rb") as file:
        head = file.read(_HEAD)
    return _kind_of_bytes(path, head) or _kind_of_text(path, head) or _by_suffix(path, head)


def _kind_of_bytes(path: pathlib.Path, head: bytes) -> str | None:
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    length = int.from_bytes(head[:8], "little")  # of the header, a JSON object
    if 2 <= length <= path.stat().st_size - 8 and head[8:].lstrip().startswith(b"{"):
        return "safetensors"
    return None


def _kind_of_text(path: pathlib.Path, head: bytes) -> str | None:
    if head.lstrip().startswith((b"{", b"[")):
        return "jsonl" if _has_objects_on_lines(path, len(head) - len(head.lstrip())) else "json"
    text = head.decode("utf-8", "replace")
    if trtllm.begins(text):
        return "yaml"
    return "csv" if text.splitlines()[:1] == [plans.CSV_HEAD] else None


def _has_objects_on_lines(path: pathlib.Path, begin: int) -> bool:
    """A line ends with `}` and the next one begins with `{`, which no whole JSON text has."""
    with path.open("rb") as file:
        file.seek(begin)
        line = file.readline(raw.MAX_TEXT)
        return line.rstrip().endswith(b"}") and file.read(_HEAD).lstrip().startswith(b"{")


def _by_suffix(path: pathlib.Path, head: bytes) -> str:
    """What the content does not tell, or only after a look at a directory at its end."""
    looks, among = _looks_like(head)
    if zipfile.is_zipfile(path):
        looks, among = "a zip archive without arrays (.npy) and without data.pkl", _ZIPS
        if (kind := _kind_of_zip(path)) is not None:
            return kind
    kind = _SUFFIXES.get(path.suffix.lower())
    if looks == _PICKLE or (kind == "pickle" and kind in among):
        raise Refused(
            "in",
            str(path),
            "pickled files can run programs and are never read",
            "Save its arrays where it was made: numpy.savez(out, topk_ids_of_layer=...)",
        )
    if kind is None or kind not in among:
        raise Refused(
            "in",
            str(path),
            f"looks like {looks}, which is not read",
            "Give a plan, a trace or counts as json, jsonl, yaml, csv, npy, npz, pt or safetensors",
        )
    return kind


def _kind_of_zip(path: pathlib.Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except npz.BROKEN:
        return None
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    return "npz" if any(name.endswith(".npy") for name in names) else None


def _looks_like(head: bytes) -> tuple[str, tuple[str, ...]]:
    """In words, and the kinds that a damaged file of this look may be."""
    every = tuple(_SUFFIXES.values())
    if not head.strip():
        return "an empty file", every
    for magic, words in _OTHERS:
        if head.startswith(magic):
            return words, ()
    if head.startswith(b"PK"):
        return "a zip archive that is cut short or damaged", _ZIPS
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # may end inside a character
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return f"bytes that begin with {head[:8].hex(' ')}", every
    return f"text that begins with {text[:30]!r}", _TEXTS
