"""Lets absltest suites run under pytest, and makes the runs independent of how pytest itself was started."""

import os
import signal

from absl import flags

# NumPy's threads beside JAX's on two cores make the NumPy engine of the batteries several times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_configure() -> None:
    # pytest does not parse absl's flags.
    flags.FLAGS.mark_as_parsed()
    # A job in the background of a shell, or behind nohup, starts with these ignored and hands that on to its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
