"""What transformers computed for tiny models of every family; see tests/golden/make_hf.py and,
for prompts that it padded on the left, make_hf_left.py."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.hf import config_json, folder, layout, load, safetensors
from moe_jax.infer.engine import Engine
from moe_jax.infer.sampling import Sampling
from moe_jax.placement.plan import Placement

ROOT = pathlib.Path(__file__).parents[1] / "golden" / "hf"

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "qwen2_moe",
    "gpt_oss",
    *("deepseek_v2_lite", "deepseek_v2", "deepseek_v3"),
    "granitemoe",
    "phimoe",
)
WINDOWS = ("mixtral_window", "qwen3_moe_window", "qwen2_moe_window")  # families again, with windows
GREEDY = Sampling()
_NONE = np.zeros((0, 0, 0))  # of a model without experts


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt with its continuation, and what transformers says of it (of some: no experts)."""

    prompt: list[int]
    tokens: list[int]
    experts_SLK: np.ndarray
    rows: np.ndarray
    logits_RV: np.ndarray


def texts(family: str) -> tuple[Text, ...]:
    """Each computed alone."""
    return _texts(family, "golden.npz", 2)


def padded_on_the_left(family: str) -> tuple[Text, ...]:
    """Computed in one batch, with a mask."""
    return _texts(family, "left.npz", 3)


@functools.cache
def _texts(family: str, file: str, count: int) -> tuple[Text, ...]:
    found = np.load(ROOT / family / file, allow_pickle=False)
    return tuple(
        Text(
            found[f"prompt_{n}"].tolist(),
            found[f"text_{n}"].tolist()[len(found[f"prompt_{n}"]) :],
            found.get(f"experts_{n}", _NONE).astype(np.int32),
            found[f"rows_{n}"],
            found[f"logits_{n}"],
        )
        for n in range(count)
    )


def config(family: str, devices: int = 4, dispatch: str = "exchange") -> config_lib.Config:
    return config_lib.served(config_json.read(ROOT / family).config, dispatch, str(devices))


def contiguous(family: str, devices: int = 4) -> Placement:
    made = config(family, devices)
    sizes = (made.model.num_plan_layers, made.model.num_experts, made.mesh.expert_devices)
    return Placement.contiguous(*sizes)


def random_placement(family: str, seed: int, devices: int = 4) -> Placement:
    model = config(family, devices).model
    rng = np.random.default_rng(seed)
    slots_LP = np.stack([rng.permutation(model.num_experts) for _ in range(model.num_moe_layers)])
    return Placement(slots_LP.astype(np.int32), model.num_experts, devices)


@functools.cache
def tensors(family: str) -> folder.Tensors:
    return folder.tensors(ROOT / family)


def found_layout(family: str) -> layout.Layout:
    published = config_json.read(ROOT / family)
    return layout.find(published.family, published.config.model, tensors(family))


def model(family: str, placement: Placement, mesh: jax.sharding.Mesh):
    sizes = config(family, 1).model
    silent = lambda line: None  # noqa: E731
    found = found_layout(family)
    return load.parameters(sizes, found, tensors(family), placement, mesh, say=silent)


def engine(family: str, dispatch: str = "exchange", placement: Placement | None = None) -> Engine:
    devices = 1 if dispatch == "local" else 4
    made = config(family, devices, dispatch)
    placement = placement or contiguous(family, devices)
    mesh = mesh_lib.of_config(made.mesh)
    return Engine(made, mesh, model(family, placement, mesh), permute.table(placement))


def deviation(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the range of what is expected."""
    return float(np.abs(actual - expected).max() / np.ptp(expected))


def write(target: pathlib.Path, arrays: dict[str, np.ndarray], *, codes: str) -> None:
    """One file of tensors; bytes are codes of this kind."""
    kinds = {dtype: name for name, dtype in safetensors.WEIGHTS.items()}
    kinds |= {np.dtype(np.uint8): codes}
    named = {name: (kinds[array.dtype], array.shape) for name, array in arrays.items()}
    safetensors.write(target / folder.SINGLE, named, arrays.__getitem__)


def changed(model: pathlib.Path, change, *, codes: str) -> None:
    """The file of a model again, after `change(arrays)`."""
    file = safetensors.read(model / folder.SINGLE)
    arrays = {name: file.codes(name).copy() for name in file.tensors}
    change(arrays)
    write(model, arrays, codes=codes)
