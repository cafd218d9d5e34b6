"""Lets absltest suites run under pytest, which does not parse absl's flags."""

import os

# NumPy's threads beside JAX's on two cores make the NumPy engine of the batteries several times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags


def pytest_configure() -> None:
    flags.FLAGS.mark_as_parsed()
