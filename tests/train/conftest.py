import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax adds Python and NumPy scalars of other types; everything else stays strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield
