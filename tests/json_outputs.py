"""Whether what a command prints with `--json` is what its schema in apr_jax/schemas describes."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence

import jsonschema

from apr_jax import schemas
from apr_jax.converters.commands.cli import EXIT_DIFFERS
from apr_jax.converters.storage.interrupts import EXIT_INTERRUPTED

_ANSWERS = (0, EXIT_DIFFERS, EXIT_INTERRUPTED)
_ANSWERED_IN_WORDS = frozenset(("-h", "--help", "--version", "--explain-format"))


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """Returns what judges the outputs of a command, called as `apr-jax NAME`, or error objects ("error")."""
    return jsonschema.Draft202012Validator(schemas.load(name))


def wrong(name: str, value: object) -> str | None:
    """Says what is wrong with an output, and where in it; None if it is as described."""
    error = next(validator(name).iter_errors(value), None)
    while error is not None and error.context:
        # Of several alternatives the one was meant that fits but for the fewest errors.
        alternatives = itertools.groupby(error.context, key=lambda inner: inner.schema_path[0])
        error = min((list(errors) for _, errors in alternatives), key=len)[0]
    return None if error is None else f"{error.json_path}: {error.message[:500]}"


def check(name: str, arguments: Sequence[str], code: int, stdout: str) -> None:
    """Fails where a command was asked for JSON and printed anything else than one value that its schema describes.

    Args:
      name: Of the command, as `apr-jax NAME` calls it.
      arguments: Behind it.
      code: What it ended with: with 0 and 1 an answer is due, with 2 to 7 and 70 the error object; with 130 only
        `generate` prints what it has.
      stdout: What it printed.

    Raises:
      AssertionError: Says which command, where, and what is wrong.
    """
    if "--json" not in arguments or not _ANSWERED_IN_WORDS.isdisjoint(arguments):
        return
    if code == EXIT_INTERRUPTED and not stdout:
        return
    called = f"{name} {' '.join(arguments)} (exit code {code})"
    try:
        value = json.loads(stdout, parse_constant=lambda spelt: _refuse(f"{spelt} is no JSON"))
    except ValueError as error:
        raise AssertionError(f"{called} printed no JSON: {error}\n{stdout[:500]}") from error
    said = wrong(name if code in _ANSWERS else schemas.ERROR, value)
    if said is not None:
        raise AssertionError(f"{called} printed what its schema does not describe: {said}")
    if code in _ANSWERS and wrong(schemas.ERROR, value) is None:
        raise AssertionError(f"{called} printed an error with the exit code of an answer")


def _refuse(said: str) -> None:
    raise ValueError(said)
