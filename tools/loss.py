"""Computes the loss of a Qwen2 model on text, or checks the losses of another engine: `python tools/loss.py --help`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from apr_jax.converters.storage.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()
    from apr_jax.converters.commands import cli

    cli.start("apr_jax.commands.loss")
