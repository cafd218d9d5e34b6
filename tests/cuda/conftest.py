"""Every test of this folder fails, with the reason, where JAX cannot compute on CUDA; processes share the GPU."""

import os

import pytest

from tests.cuda import devices

devices.share_memory(os.environ)


@pytest.fixture(scope="session", autouse=True)
def _cuda() -> None:
    if reason := devices.why_not():
        pytest.fail(reason, pytrace=False)
