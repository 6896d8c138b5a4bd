"""What every test runs under: fixed seeds, and fresh memory filled with NaN so that an unwritten
output fails."""

import pytest
import torch

from fastgen.ops import _library


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory():
    # Deterministic mode fills fresh memory with NaN, in C++ as well.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of threads for a test; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def isa():
    """Forces an instruction set of the CPU kernels: isa("avx2") is False where it is missing."""
    before = torch.ops.fastgen.cpu_isa()

    def force(name):
        try:
            torch.ops.fastgen.force_cpu_isa(_library.CPU_ISAS.index(name))
        except RuntimeError:
            return False
        return True

    yield force
    torch.ops.fastgen.force_cpu_isa(before)


def pytest_configure(config):
    # torch's own: dynamo instantiates a Function, the batched fallback is announced, pynvml is old.
    for line in (
        "ignore:.*should not be instantiated.*:DeprecationWarning",
        "ignore:.*torch.jit.*:DeprecationWarning",
        "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
