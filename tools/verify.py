"""Runs the command `verify` from a checkout; see converters/commands/verify.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from apr_jax.converters.storage.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from apr_jax.converters.commands import cli

    cli.start("apr_jax.converters.commands.verify")
