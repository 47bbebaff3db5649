"""Answers prompts with a model: python infer.py --workdir=DIR --prompt="def main("."""

from absl import flags

from moe_jax import entry
from moe_jax.infer import flags as of_infer

flags.adopt_module_key_flags(of_infer)  # shown by --help


def main() -> None:
    ahead = of_infer.digests_ahead()  # while JAX is imported
    request = of_infer.request()
    from moe_jax.infer import run

    with entry.together():
        run.run(request, ahead)


if __name__ == "__main__":
    entry.run(main, __doc__)
