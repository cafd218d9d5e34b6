"""Lets absltest suites run under pytest, which does not parse absl's flags."""

from absl import flags


def pytest_configure() -> None:
    flags.FLAGS.mark_as_parsed()
