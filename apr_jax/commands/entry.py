"""The console script `apr-jax COMMAND ...`: the same code as `python tools/COMMAND.py ...`."""

from __future__ import annotations

import sys

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.storage.interrupts import end_at_once

COMMANDS = {
    "convert": ("apr_jax.converters.commands.convert", "convert between .apr and safetensors, bit for bit"),
    "show": ("apr_jax.converters.commands.show", "print header, metadata, side files and tensors of a checkpoint"),
    "verify": ("apr_jax.converters.commands.verify", "compare two checkpoints and say what happened, or check one"),
    "golden": ("apr_jax.commands.golden", "write reference logits and stages, or compare a model with them"),
    "parity": ("apr_jax.commands.parity", "find and name mistakes in another forward pass of the same checkpoint"),
    "generate": ("apr_jax.commands.generate", "generate text with a model"),
    "loss": ("apr_jax.commands.loss", "compute the loss on text, or name what is wrong with another engine's"),
    "checkpoint": (
        "apr_jax.commands.checkpoint",
        "save a model for a fast start, restore it, or show what was saved",
    ),
    "bench": ("apr_jax.commands.bench", "measure speed beside peers and beside the machine's limits"),
    "make-sample": ("apr_jax.commands.make_sample", "write a seeded Qwen2 checkpoint"),
}
# What is about the commands themselves, and opens no model.
_OWN = {"completion": ("apr_jax.commands.completion", "print a script that makes a shell complete these words")}


def run() -> None:
    """Runs the command that sys.argv names."""
    end_at_once()
    commands = COMMANDS | _OWN
    name, *words = sys.argv[1:] or ["--help"]
    if name == "help" and words:
        name, words = words[0], ["--help"]
    if name in ("-h", "--help", "help"):
        print(description())
    elif name == "--version":
        print(arguments.versions())
    elif name in commands:
        cli.start(commands[name][0], [f"apr-jax {name}", *words])
    else:
        meant = arguments.nearest(name, commands)
        hint = f"did you mean `apr-jax {meant}`?" if meant else "`apr-jax --help` lists them."
        cli.say(f"error: no command '{name}'; {hint}")
        sys.exit(2)


def description() -> str:
    """Returns the list of commands, as wide as the terminal."""
    rows = "\n".join(f"  {command:12}  {summary}" for command, (_, summary) in (COMMANDS | _OWN).items())
    epilog = f"{rows}\n\n`%(prog)s help COMMAND` describes a command, `%(prog)s --version` prints the version."
    parser = arguments.make_parser("apr-jax", "Check a Qwen2 model file, and the program that runs it.", epilog)
    parser.usage = "%(prog)s COMMAND [ARGUMENT ...]"
    return parser.format_help().rstrip()
