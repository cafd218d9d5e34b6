"""Lets absltest suites run under pytest, and makes the runs independent of how pytest itself was started."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator

import pytest
from absl import flags

from apr_jax.converters.errors import UsageError

# NumPy's threads beside JAX's on two cores make the NumPy engine of the batteries several times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    # pytest does not parse absl's flags.
    flags.FLAGS.mark_as_parsed()
    # A job in the background of a shell, or behind nohup, starts with these ignored and hands that on to its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # The tools keep compiled programs in the user's cache; those of tests are nobody's. Workers of xdist inherit it.
    if not hasattr(config, "workerinput"):
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="apr_jax_tests_")
    # absl's folders have the names of tests: those of another process, or of another run, are not to be cleared away.
    os.environ["TEST_TMPDIR"] = tempfile.mkdtemp(prefix="apr_jax_tests_")


def pytest_collection_finish() -> None:
    # What a process of the run has compiled, the others load: workers of xdist, and the tools that tests start, which
    # keep their programs in the same place. Tests that need no JAX have not imported it by now and need not.
    if jax := sys.modules.get("jax"):
        from apr_jax.generate import compilation_cache

        compilation_cache.enable()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Makes a test that is refused float16 a skipped one: XLA has none on processors without F16C."""
    report = yield
    error = None if call.excinfo is None else call.excinfo.value
    if isinstance(error, UsageError) and error.code == "float16":
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {error}")
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    shutil.rmtree(os.environ["TEST_TMPDIR"], ignore_errors=True)
