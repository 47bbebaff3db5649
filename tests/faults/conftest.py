import jax
import pytest

from tests.faults import harness


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax adds Python and NumPy scalars of other types; everything else stays strict."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def start():
    """Starts training processes."""
    with harness.starter() as made:
        yield made


@pytest.fixture(scope="session")
def whole(start, tmp_path_factory):
    """Work directories of runs that nothing happened to, by number of steps."""
    made = {}

    def of(num_steps):
        if num_steps not in made:
            workdir = tmp_path_factory.mktemp("whole") / str(num_steps)
            assert start(workdir, num_steps).wait() == 0, harness.log_of(workdir).read_text()
            made[num_steps] = workdir
        return made[num_steps]

    return of
