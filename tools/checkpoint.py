"""Saves a model for a fast start, restores it, or shows what was saved: `python tools/checkpoint.py --help`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from apr_jax.converters.storage.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from apr_jax.converters.commands import cli

    cli.start("apr_jax.commands.checkpoint")
