"""Runs the command `convert` from a checkout; see converters/commands/convert.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from apr_jax.converters.commands import cli, convert

if __name__ == "__main__":
    cli.start(convert.parse, convert.main)
