"""Measures speed beside peers and beside the machine's limits: `python tools/bench.py --help`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from apr_jax.commands import bench
from apr_jax.converters.commands import cli

if __name__ == "__main__":
    cli.start(bench.parse, bench.main)
