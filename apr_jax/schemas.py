"""JSON Schema (2020-12) of what every command prints with `--json`: the files in schema_files/.

    from apr_jax import schemas

    schemas.load("verify")      # a dict, for any validator

A command has one answer, or several that its arguments choose from (`golden -o`, `golden --check`, ...): its schema has
one alternative in "oneOf" for each, and the error object as the last. Keys that are not described do not occur, except
where "additionalProperties" says what they stand for. docs/json.md lists the main fields.
"""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

ERROR = "error"
"""The schema of what a command prints in place of an answer."""


_FILES = importlib.resources.files("apr_jax") / "schema_files"


def names() -> tuple[str, ...]:
    """Returns the names that `load` takes: those of the commands of `apr-jax`, and `ERROR`; sorted."""
    files = (file.name for file in _FILES.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def load(name: str) -> dict[str, Any]:
    """Returns the schema of a command's output, complete by itself: the error object that it refers to is in "$defs".

    Args:
      name: A command, as `apr-jax NAME` calls it, or `ERROR`.

    Raises:
      KeyError: No command is called that.
    """
    if name not in names():
        raise KeyError(f"no schema is called {name!r}; there are {', '.join(names())}")
    schema = _read(name)
    return schema if name == ERROR else schema | {"$defs": schema["$defs"] | {ERROR: _read(ERROR)}}


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_FILES / f"{name}.json").read_text(encoding="utf-8"))
    return content
