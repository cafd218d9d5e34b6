"""Runs the command `verify` from a checkout; see converters/commands/verify.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from apr_jax.converters.commands import cli, verify

if __name__ == "__main__":
    cli.start(verify.parse, verify.main)
