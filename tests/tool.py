"""Runs a command of tools/ as a user does, but within the process of the tests: importing JAX and Flax takes seconds.

What only a process has (its own streams, signals, the environment at its start) is for `subprocess`.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import signal
import subprocess
import unittest

from apr_jax.converters.commands import cli
from tests import json_outputs

_OF_CONVERTERS = ("convert", "show", "verify")


def run(name: str, *args: object, cwd: pathlib.Path | str = ".") -> subprocess.CompletedProcess[str]:
    """Returns what `python tools/NAME.py ARGS` does when it is run in the folder `cwd`.

    Args:
      name: Of the script, without ".py".
      *args: Of the command line; each becomes a string.
      cwd: Where relative paths start.

    Returns:
      Exit code, and what was printed on stdout and stderr.

    Raises:
      AssertionError: With --json among `args` it printed what its schema does not describe.
    """
    room = "apr_jax.converters.commands" if name in _OF_CONVERTERS else "apr_jax.commands"
    argv = [f"{name}.py", *map(str, args)]
    out, err = io.StringIO(), io.StringIO()
    # A command ends its process and leaves signals ignored; this process goes on.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd):
            cli.start(f"{room}.{name}", argv)
    except SystemExit as ended:
        code = ended.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    json_outputs.check(name.replace("_", "-"), argv[1:], code or 0, out.getvalue())
    return subprocess.CompletedProcess(argv, code or 0, out.getvalue(), err.getvalue())


def ran(
    test: unittest.TestCase, name: str, *args: object, code: int = 0, cwd: pathlib.Path | str = "."
) -> subprocess.CompletedProcess[str]:
    """Runs a command as `run` does; fails `test` unless it ends with `code`, and without a traceback."""
    done = run(name, *args, cwd=cwd)
    test.assertEqual(done.returncode, code, done.stdout + done.stderr)
    test.assertNotIn("Traceback", done.stderr)
    return done
