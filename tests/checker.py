"""What checks the annotations of moe_jax while tests run; see addopts in pyproject.toml."""

from beartype import BeartypeConf, beartype

# as static checkers do: a whole number is a fine real number
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
