"""python -m moe_jax.upcycle: a dense model as a mixture of experts, ready to train.

    --gguf=FILE | --hf=DIR, --workdir=DIR   a Llama -> a work directory
    --distance --workdir=DIR                how far a run's experts are from each other
    --loss --workdir=DIR [--hf=DIR]         held-out loss of a run, beside that of its dense model
    --export=OUT --workdir=DIR              a run's newest step as a published folder (a Mixtral)

Exit codes: 0 done, 1 refused, 2 usage, 3 done but not printed, 130 interrupted.
"""

import argparse
import pathlib
import sys
import tempfile
from typing import Any

from moe_jax import errors
from moe_jax.errors import Refused

# What is read beside --workdir, by the flag that asks for something; without one a model is made.
_READ = {
    "distance": (),
    "loss": ("hf", "sequences"),
    "export": (),
    "": ("gguf", "hf", "num_experts", "top_k", "first_dense", "seed"),
}
_NUMBERS = {  # flag -> default, what it is
    "num_experts": (8, "of a layer"),
    "top_k": (2, "experts of a token"),
    "first_dense": (0, "so many layers stay dense"),
    "seed": (0, "of the router"),
    "sequences": (64, "held-out windows of --loss"),
}


def upcycle(given: argparse.Namespace) -> str:
    """Writes a work directory; says what it holds. Raises `Refused`."""
    from moe_jax import mesh as mesh_lib
    from moe_jax.hf import folder, gguf_llama
    from moe_jax.upcycle import make

    if bool(given.gguf) == bool(given.hf):
        rule = "is required, or --hf=DIR, and not both"
        raise Refused("--gguf", given.gguf, rule, "name the dense model")
    wanted = make.Wanted(given.num_experts, given.top_k, given.first_dense, given.seed)
    out = folder.check_new(given.workdir, "--workdir")
    if given.hf:
        mesh_lib.initialize("", 0, "off")
        return make.told(given.workdir, make.make(given.hf, given.workdir, wanted))
    above = next(place for place in out.parents if place.exists())  # with room for the result
    with tempfile.TemporaryDirectory(prefix=".dense-", dir=above) as scratch:
        dense = pathlib.Path(scratch) / "dense"
        gguf_llama.convert(given.gguf, dense)
        mesh_lib.initialize("", 0, "off")
        return make.told(given.workdir, make.make(dense, given.workdir, wanted))


def distance(workdir: str) -> str:
    """The experts' relative distance in each MoE layer. Raises `Refused`."""
    import numpy as np

    from moe_jax import checkpoint
    from moe_jax import mesh as mesh_lib
    from moe_jax.infer import load
    from moe_jax.model import moe
    from moe_jax.upcycle import distance as of_experts

    source = load.find(workdir, None)
    if not source.config.model.num_moe_layers:
        raise Refused("--workdir", workdir, "has no experts", "upcycle it first")
    mesh_lib.initialize(source.config.platform, source.virtual_devices, "off")
    model = load.parameters(source, mesh_lib.of_config(source.config.mesh))
    named = checkpoint.flatten(model)
    found_L = of_experts.relative_L(
        {name: np.asarray(named[f"blocks.moe.{name}"]) for name in moe.MATRICES}
    )
    of_layers = [
        f"layer {layer:3}   {value:.3e}\n"
        for layer, value in zip(source.config.model.moe_layer_ids, found_L, strict=True)
    ]
    return "".join(of_layers) + (
        f"step {source.contents.step}: distance of an expert from its layer's mean, over that "
        f"mean's norm: median {np.median(found_L):.3e}, {found_L.min():.3e} to {found_L.max():.3e}"
    )


def loss(given: argparse.Namespace) -> str:
    """Held-out losses. Raises `Refused`."""
    from moe_jax.upcycle import loss as of_run

    return of_run.compare(given.workdir, given.hf, given.sequences)


def export(given: argparse.Namespace) -> str:
    """Writes a published folder. Raises `Refused`."""
    from moe_jax.upcycle import export as of_run

    if not given.export:
        raise Refused("--export", given.export, "must be a path", "name a new folder")
    return of_run.export(given.workdir, given.export)


def _check_read(given: dict[str, Any]) -> str:
    """What is asked for: a key of `_READ`. Raises `Refused` for flags that it would not read."""
    first, *more = [name for name in _READ if name in given] or [""]
    if more:
        rule = f"asks for something else than --{first}"
        raise Refused(f"--{more[0]}", given[more[0]], rule, "give one of them")
    for name, value in given.items():
        if name not in ("workdir", first, *_READ[first]):
            readers = [reader for reader, names in _READ.items() if name in names]
            by = " and ".join(f"with --{one}" if one else "to make a model" for one in readers)
            flag, rule = f"--{name.replace('_', '-')}", f"is only read {by}"
            raise Refused(flag, value, rule, "leave it out, or ask for that")
    return first


def run(given: dict[str, Any]) -> str:
    """Does what the flags that were given ask for; says what came of it. Raises `Refused`."""
    asked = _check_read(given)
    defaults = {"gguf": None, "hf": None, **{name: _NUMBERS[name][0] for name in _NUMBERS}}
    flags = argparse.Namespace(**(defaults | given))
    if asked == "distance":
        return distance(flags.workdir)
    if asked == "loss":
        return loss(flags)
    if asked == "export":
        return export(flags)
    return upcycle(flags)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="moe_jax.upcycle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--gguf", help="a Llama in a GGUF file")
    parser.add_argument("--hf", help="folder of a published Llama")
    parser.add_argument("--workdir", required=True, help="a new folder; with --distance a run's")
    for name, (default, about) in _NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help=f"{about} (default {default})")
    parser.add_argument("--distance", action="store_true", help="measure, and make nothing")
    parser.add_argument("--loss", action="store_true", help="measure, and make nothing")
    parser.add_argument("--export", metavar="OUT", help="a new folder: the run, published")
    given = vars(parser.parse_args(argv))
    return errors.exit_code(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
