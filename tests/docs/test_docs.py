"""The site: commands that it names run on small files, and it builds without a warning."""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.placement import __main__ as command_line
from moe_jax.placement.formats import counts as counts_lib
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.plan import Plan
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests import torch_bytes as tb

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PLANNER = "python -m moe_jax.placement "


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    return "".join(blocks(page, "sh")).splitlines()


def sglang_dump(path: pathlib.Path, trace: trace_lib.Trace) -> None:
    """What SGLang's recorder dumps: ids [L, T, K] of one forward pass, and its sequences."""
    ids_LTK = np.ascontiguousarray(trace.expert_ids_TLK.swapaxes(0, 1).astype("<i4"))
    strides = tuple(int(stride) // 4 for stride in ids_LTK.strides)
    storage = tb.STORAGES["i4"]
    tensor = tb.tensor(storage, "0", ids_LTK.size, ids_LTK.shape, strides, 0)
    lengths = tb.list_of(*(tb.number(int(n)) for n in trace.seq_len))
    record = tb.dict_of(topk_ids_of_layer=tensor, extend_seq_lens=lengths)
    path.write_bytes(tb.archive(record, ids_LTK))


def test_commands_for_models_served_elsewhere(tmp_path, monkeypatch, capsys):
    """Record there, plan here, load there: every line of the page, in its order."""
    monkeypatch.chdir(tmp_path)
    trace = synthetic.realistic(
        num_tokens=600, num_layers=2, num_experts=32, top_k=2, seed=0, num_sequences=40
    )
    sglang_dump(tmp_path / "sglang_dump.pt", trace)
    (tmp_path / "expert_statistic").mkdir()
    steps = counts_lib.Counts(np.random.default_rng(0).integers(1, 99, (4, 2, 32)), tuple(range(2)))
    counts_lib.write_safetensors(
        tmp_path / "expert_statistic" / "rank0.safetensors", steps, Hints()
    )
    found = commands("your-model.md")
    assert len(found) == 13
    for line in found:
        assert line.startswith(PLANNER), line
        words = shlex.split(line.removeprefix(PLANNER))
        limit = ["--time-limit=1"] if words[0] in ("solve", "verdict") else []
        code = command_line.main([*words, *limit])
        assert code == 0, f"{line}\n{capsys.readouterr().err}"
    np.testing.assert_array_equal(trace_lib.load("trace.npz").expert_ids_TLK, trace.expert_ids_TLK)
    assert Plan.read("replicas.json").placement.num_slots == 40
    assert "num_slots: 40" in (tmp_path / "plan.yaml").read_text()


def output(answer, **of_prompt) -> types.SimpleNamespace:
    """What vLLM returns for a request: experts of prompt and answer, or of either apart."""
    return types.SimpleNamespace(
        outputs=[types.SimpleNamespace(routed_experts=answer)], **of_prompt
    )


def test_the_snippet_that_writes_a_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = [np.tile(np.arange(n, n + 4, dtype=np.uint8), (n, 2, 1)) for n in (3, 5)]
    [snippet] = blocks("your-model.md", "python")
    together = [output(arrays[0]), output(None), output(arrays[1])]
    exec(snippet, {"outputs": together})
    written = trace_lib.load("trace.npz")
    assert (written.num_tokens, written.num_sequences, written.num_experts) == (8, 2, 32)
    assert written.layer_ids == (0, 1)
    apart = [
        output(None, prompt_routed_experts=arrays[0]),  # an answer of one token has no experts
        output(None, prompt_routed_experts=None),
        output(arrays[1][2:], prompt_routed_experts=arrays[1][:2]),
    ]
    exec(snippet, {"outputs": apart})
    assert trace_lib.load("trace.npz").digest == written.digest
    of_model = [np.concatenate([np.zeros_like(one[:, :1]), one], axis=1) for one in arrays]
    exec(snippet, {"outputs": [output(one) for one in of_model]})  # the first layer is dense
    assert trace_lib.load("trace.npz").layer_ids == (1, 2)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_files_and_programs_that_pages_name_exist(page):
    text = (DOCS / page).read_text("utf-8")
    for name in re.findall(r"\b((?:configs|colab|examples|moe_jax)/[\w./-]+\.\w+)", text):
        assert (ROOT / name).is_file() or "NAME" in name, name
    for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"^::: ([\w.]+)|\]\[(moe_jax[\w.]+)\]", text, re.MULTILINE):
        parts = "".join(module).split(".")
        while (
            not (path := ROOT.joinpath(*parts)).is_dir() and not path.with_suffix(".py").is_file()
        ):
            parts.pop()
        assert len(parts) > 1, module


def test_names_that_pages_link_to_are_in_the_reference():
    """A link to a module that no page of the reference shows fails the strict build."""
    texts = [path.read_text("utf-8") for path in DOCS.rglob("*.md")]
    shown = {name for text in texts for name in re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)}
    linked = {name for text in texts for name in re.findall(r"\]\[(moe_jax[\w.]+)\]", text)}
    assert len(linked) >= 8
    for name in linked:
        module, _, member = name.rpartition(".")
        file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        held = module in shown and re.search(rf"^(class|def) {member}\b", file.read_text(), re.M)
        assert name in shown or held, f"{name} is on no page of docs/api"


def test_flags_of_train_and_infer_exist():
    sources = {
        "infer": ROOT / "moe_jax" / "infer" / "flags.py",
        "train": ROOT / "train.py",
    }
    seen = 0
    for path in DOCS.glob("*.md"):
        for line in commands(path.name):
            program = re.match(r"python (infer|train)\.py ", line)
            for flag in re.findall(r"--([\w.-]+)", line) if program else ():
                top, _, field = flag.partition(".")
                if top == "config":
                    holder = config_lib.Config
                    for name in field.split(".") if field else ():
                        types = {one.name: one.type for one in dataclasses.fields(holder)}
                        holder = types[name]
                else:
                    assert f'"{top}"' in sources[program[1]].read_text("utf-8"), flag
                seen += 1
    assert seen > 10


def test_every_page_of_the_api_is_on_the_map():
    map_ = (ROOT / "mkdocs.yml").read_text("utf-8")
    for path in DOCS.rglob("*.md"):
        assert path.relative_to(DOCS).as_posix() in map_


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    program = shutil.which("zensical", path=str(pathlib.Path(sys.executable).parent))
    if program is None:
        pytest.skip("zensical is not installed")
    for name in ("docs", "moe_jax", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)

    def build() -> subprocess.CompletedProcess:
        words = [program, "build", "--strict", "--clean"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    built = build()
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "concepts.html").stat().st_size > 0
    with (tmp_path / "docs" / "concepts.md").open("a") as file:
        file.write("[nowhere](nowhere.md)\n")
    assert build().returncode != 0
