"""Peak memory of one import and one export, in a process of its own:

    python -m tests.hf.memory DIR DEVICES OUT

Prints bytes: by how much the peak of resident memory grew in the import, in the export of what was
imported, the parameters, the largest tensor of the file. What is resident before is measured once a
small model was read, or this one written; the peak is the kernel's own (VmHWM), mapped files
included, and set back when import or export begins. `NO_POOL` is for the environment.
"""

import json
import pathlib
import sys
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np

from moe_jax import checkpoint
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.hf import config_json, folder, layout, load, safetensors, save
from moe_jax.placement.plan import Placement
from tests.hf import golden

# What is freed goes back to the system, and is not there for the next to take unseen.
NO_POOL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SIZES = {
    **{"hidden_size": 1024, "vocab_size": 32768, "intermediate_size": 1024, "head_dim": 64},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 2},
}
FP8 = {
    "quantization_config": {
        **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"},
        "weight_block_size": [128, 128],
    },
    **{"moe_intermediate_size": 1024, "first_k_dense_replace": 1, "num_key_value_heads": 16},
}
# family, way of writing, dtype computed with, what config.json says otherwise
CASES = {
    "per expert": ("mixtral", "per expert", "bfloat16", {}),
    "widened": ("mixtral", "per expert", "float32", {}),
    "fused": ("gpt_oss", "fused", "bfloat16", {}),
    "mxfp4": (
        *("gpt_oss", "mxfp4", "bfloat16"),
        {"quantization_config": {"quant_method": "mxfp4"}},
    ),
    "fp8": ("deepseek_v3", "fp8", "bfloat16", FP8),
}


def write(case: str, out: pathlib.Path) -> None:
    """A model of 100 to 200 MB, each number the same."""
    family, way, dtype, says = CASES[case]
    said = json.loads((golden.ROOT / family / "config.json").read_text())
    out.mkdir()
    (out / "config.json").write_text(json.dumps({**said, **SIZES, "dtype": dtype, **says}))
    published = config_json.read(out)
    found = layout.of_family(published.family, way, published.config.model)
    named = {name: (found.codes.get(name, ["BF16"])[0], s) for name, s in found.shapes.items()}

    def array(name: str) -> np.ndarray:
        dtype, shape = named[name]
        if dtype in ("U8", "F8_E4M3"):
            return np.full(shape, 120, np.uint8)
        return np.full(shape, 0.5, np.float32 if dtype == "F32" else ml_dtypes.bfloat16)

    safetensors.write(out / folder.SINGLE, named, array)


class Model:
    """A folder that was imported."""

    def __init__(self, path: pathlib.Path, devices: int):
        published = config_json.read(path)
        config = config_lib.served(published.config, devices=str(devices))
        model = config.model
        self._path, self._tensors = path, folder.tensors(path)
        self._layout = layout.find(published.family, model, self._tensors)
        self._placement = Placement.contiguous(model.num_plan_layers, model.num_experts, devices)
        mesh = mesh_lib.of_config(config.mesh)
        where = (self._tensors, self._placement, mesh)
        made = load.parameters(model, self._layout, *where, say=lambda line: None)
        self.arrays = jax.block_until_ready(checkpoint.flatten(made))

    def largest(self) -> int:
        """Bytes of the largest tensor of the file."""
        named = self._layout.shapes
        entries = (self._tensors.file_of[name].tensors[name] for name in named)
        return max(entry.stop - entry.start for entry in entries)

    def export(self, out: pathlib.Path) -> None:
        """As the folder is written."""
        dtypes = {name: self._tensors.dtype(name) for name in self._layout.shapes}
        how = {"dtypes": dtypes, "like": self._path}
        save.export(self.arrays, self._layout, self._placement, out, **how)


def status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split() for line in lines if line.startswith(f"{field}:"))
    return int(found[1]) * 1024


def grown(do: Callable[[], object]) -> tuple[object, int]:
    """What a call returns, and by how much the peak grew meanwhile."""
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    made = do()
    return made, status("VmHWM") - before


def main(path: str, devices: str, out: str) -> None:
    Model(golden.ROOT / "mixtral", int(devices))
    model, imported = grown(lambda: Model(pathlib.Path(path), int(devices)))
    # Once before it is measured: 20 programs that cut arrays are 25 to 50 MB, of any model.
    model.export(pathlib.Path(out) / "before")
    _, exported = grown(lambda: model.export(pathlib.Path(out) / "after"))
    parameters = sum(array.nbytes for array in model.arrays.values())
    print(json.dumps([imported, exported, parameters, model.largest()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
