"""Text as tokens: a folder of files, split into train and held-out by file, in shuffled windows.

Where files are so few that one split would have too little, every file is split instead: its end
is held out. Tokens are bytes, or those of a tokenizer.
Grain shuffles, repeats and batches the windows; its iterator's state is a small JSON value that
goes into the checkpoint, so that a restarted run sees the batches it would have seen.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.errors import Refused

if TYPE_CHECKING:
    import grain

# Folders of the standard library that are not the library.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst", ".json", ".csv", ".html", ".c", ".h"}
SEPARATOR = 0  # the byte between two files


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The two splits: text in uint8, files joined by `SEPARATOR`, or int32 tokens of it."""

    train: np.ndarray
    held_out: np.ndarray
    name: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of both splits: a position in a text is one in that text alone.

        Takes about a second for a gigabyte.
        """
        digest = hashlib.sha256()
        for tokens in (self.train, self.held_out):
            digest.update(f"{tokens.dtype} {tokens.size} ".encode())
            digest.update(np.ascontiguousarray(tokens).data)
        return digest.hexdigest()


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the text files below `config.path`, in the order of their names' hashes.

    Raises:
      Refused: folder missing, not a folder, without text, or too short for one window a split; a
        file that cannot be read.
    """
    folder, name = _folder(config)
    left_out = set() if config.path else _LEFT_OUT
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix in _TEXT_SUFFIXES
        and not (left_out & set(path.relative_to(folder).parts[:-1]))
        and path.is_file()
    ]
    # By hash, so that a prefix of `max_bytes` is a sample of all folders, the same on every host.
    name_of = {path: path.relative_to(folder).as_posix() for path in files}
    order = sorted(files, key=lambda path: _share("order of " + name_of[path]))
    held_out_files = {path for path in files if _share(name_of[path]) < config.held_out_fraction}
    splits = _split(order, held_out_files, config)
    if any(sum(map(len, parts)) < config.seq_len + 1 for parts in splits.values()):
        splits = _split(order, None, config)
    for held_out, parts in splits.items():
        if sum(map(len, parts)) < config.seq_len + 1:
            raise Refused(
                "data.path",
                str(folder),
                f"must hold text files for the {'held-out' if held_out else 'train'} split, at "
                f"least data.seq_len + 1 = {config.seq_len + 1} bytes (found {len(files)} files)",
                f"add files that end in {', '.join(sorted(_TEXT_SUFFIXES))}",
            )
    train_text, held_out_text = (
        np.frombuffer(b"".join(splits[key]), np.uint8) for key in (False, True)
    )
    return Corpus(train_text, held_out_text, name)


def _split(
    order: list[pathlib.Path], held_out_files: set[pathlib.Path] | None, config: DataConfig
) -> dict[bool, list[bytes]]:
    """Texts by whether they are held out, each split up to its part of `max_bytes`.

    Args:
      order: of all files.
      held_out_files: those that are held out, whole; None: the end of every file.
      config: with the fraction.
    """
    splits: dict[bool, list[bytes]] = {False: [], True: []}
    budget = {True: int(config.max_bytes * config.held_out_fraction)}
    budget[False] = config.max_bytes - budget[True]
    for path in order:
        if held_out_files is not None:
            held_out = path in held_out_files
            parts = {held_out: _read(path, budget[held_out])} if budget[held_out] > 0 else {}
        elif min(budget.values()) > 0:
            text = _read(path, sum(budget.values()))
            cut = len(text) - int(len(text) * config.held_out_fraction)
            parts = {False: text[:cut], True: text[cut:]}
        else:
            break
        for held_out, text in parts.items():
            text = text[: budget[held_out]] + bytes([SEPARATOR])
            budget[held_out] -= len(text)
            splits[held_out].append(text)
    return splits


def tokenised(corpus: Corpus, tokens_of: Callable[[np.ndarray], np.ndarray]) -> Corpus:
    """The corpus in tokens.

    Args:
      tokens_of: int32 tokens of a text in uint8, its documents ending with `SEPARATOR`.
    """
    return Corpus(tokens_of(corpus.train), tokens_of(corpus.held_out), corpus.name)


def check_windows(corpus: Corpus, config: DataConfig) -> None:
    """Refuses a corpus whose text becomes fewer tokens than a window has."""
    for split, tokens in (("train", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) < config.seq_len + 1:
            rule = f"is {len(tokens)} tokens of {split} text: a window has {config.seq_len + 1}"
            raise Refused("data.max_bytes", config.max_bytes, rule, "raise it, or add files")


def _folder(config: DataConfig) -> tuple[pathlib.Path, str]:
    if not config.path:
        stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
        return stdlib, f"python-{sysconfig.get_python_version()}-stdlib"
    folder = pathlib.Path(config.path)
    if not folder.is_dir():
        raise Refused(
            "data.path", config.path, "must be a folder of text files", "correct the path"
        )
    return folder, folder.name


def _read(path: pathlib.Path, limit: int) -> bytes:
    """At most the first `limit` bytes: a file may be larger than memory."""
    try:
        with path.open("rb") as file:
            # A read takes memory for its whole limit.
            return file.read(min(limit, os.fstat(file.fileno()).st_size))
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise Refused("data.path", str(path), rule, "make it readable, or move it away") from None


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, in whatever encoding it is on disk."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


class _Windows:
    """A random-access source of int32 windows of seq_len + 1 tokens, side by side."""

    def __init__(self, text: np.ndarray, seq_len: int):
        self._text, self._seq_len = text, seq_len

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._seq_len

    def __getitem__(self, index: Any) -> np.ndarray:
        start = int(index) * self._seq_len
        return self._text[start : start + self._seq_len + 1].astype(np.int32)


def batches(corpus: Corpus, config: DataConfig) -> "grain.DatasetIterator":
    """Endless shuffled batches, int32 [global_batch, seq_len + 1]; every epoch another order."""
    import grain  # and with it JAX: text is read and checked before

    windows: Any = _Windows(corpus.train, config.seq_len)
    dataset = grain.MapDataset.source(windows).seed(config.seed).shuffle().repeat()
    threads = config.read_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, threads))
    return iter(dataset.to_iter_dataset(options).batch(config.global_batch, drop_remainder=True))


def held_out_windows(corpus: Corpus, seq_len: int, count: int, start: int = 0) -> np.ndarray:
    """`count` held-out windows, int32 [count, seq_len + 1], spread over the split.

    Windows are numbered in a fixed shuffled order; `start` skips that many, so that disjoint
    ranges are disjoint text.
    """
    windows = _Windows(corpus.held_out, seq_len)
    if start < 0 or count < 1:
        raise Refused(
            "held-out windows",
            (start, count),
            "start at 0 or later, and are 1 or more",
            "use 0, 64",
        )
    if start + count > len(windows):
        raise Refused(
            "held-out windows",
            start + count,
            f"the held-out split has {len(windows)} windows of {seq_len} tokens",
            "ask for fewer, or raise data.held_out_fraction or data.max_bytes",
        )
    order = np.random.default_rng(0).permutation(len(windows))
    return np.stack([windows[i] for i in order[start : start + count]])


def unigram_loss(corpus: Corpus, vocab_size: int, windows: np.ndarray) -> float:
    """Mean nats a token of the frequencies of tokens in the train split (plus one) on `windows`."""
    counts = np.bincount(corpus.train, minlength=vocab_size).astype(np.float64) + 1
    return float(-np.log(counts / counts.sum())[windows[:, 1:]].mean())
