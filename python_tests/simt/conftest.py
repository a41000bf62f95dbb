"""The kernels that test the emulator itself."""

import numpy as np
import pytest

from . import build


@pytest.fixture(scope="session")
def kernels():
    return build.load("simt_kernels", build.HERE / "bindings.cpp")


@pytest.fixture(scope="session")
def matrix_kernels():
    return build.load("simt_matrix_kernels", build.HERE / "matrix_bindings.cpp")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
