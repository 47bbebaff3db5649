"""Strict runtime for every test: 8 virtual CPU devices, no silent rank or dtype promotion."""

import atexit
import os
import pathlib
import shutil
import tempfile
import time

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu is installed to compile only: do not look for a TPU
# A program that several tests (or processes of one test) compile is compiled once a session.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the first process made
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="moe_jax-compiled-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs are mapped into memory in many pieces, and a process may have 65,530."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--for",
        dest="seconds",
        type=float,
        help="begin no test after so many seconds: those that are left are skipped, and counted",
    )


def pytest_configure(config):
    global _begins_until
    if config.option.seconds is not None:
        _begins_until = time.monotonic() + config.option.seconds


_begins_until = float("inf")
_quickly = False  # how programs are compiled now: jax.config takes this flag, but does not show it


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tests marked `compiled_quickly` compile with few optimizations, in less time.

    For comparisons within a tolerance with an oracle of another form. Whatever is said of bits, of
    time or of memory is said of programs as users compile them: those tests go without the mark.
    """
    global _quickly
    if time.monotonic() > _begins_until:
        pytest.skip("the time of --for is over")
    wanted = item.get_closest_marker("compiled_quickly") is not None
    if wanted != _quickly:
        jax.clear_caches()  # compiled the other way
        jax.config.update("jax_disable_most_optimizations", wanted)
        _quickly = wanted


# Folders whose files have few tests that take long. They go first, so that the last file of a run
# of several processes is a short one (`--dist loadfile --no-loadscope-reorder`).
HERE = pathlib.Path(__file__).parent
FIRST = ("faults", "train", "infer", "model", "hf", "kernels")


LEFT_OUT = HERE / "further.txt"


def leave_out(config, items):
    """Marks as `further` what further.txt names; a line that names nothing is an error."""
    ids = {item.nodeid: item for item in items}
    files = {one.partition("::")[0] for one in ids}
    whole_files = not any("::" in argument for argument in config.args)
    for line in LEFT_OUT.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        found = [
            one for one in ids if one == line or (line[-1] == "*" and one.startswith(line[:-1]))
        ]
        for one in found:
            ids[one].add_marker("further")
        if not found and whole_files and line.partition("::")[0] in files:
            raise pytest.UsageError(
                f"{LEFT_OUT.name}: no test is called {line}. Rename it there too"
            )


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Whole files change places: the tests of one stay together, in their order."""

    def turn(item):
        folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=turn)
    leave_out(config, items)
