"""The one exception family of the project, and the exit code that each member ends a command with.

Every error says what was found, what was expected, where (file, byte, tensor) and what to do about it. The fields are
machine-readable (`to_json`), the text is for people; names that come from a file are escaped in both messages.

Hints name options as commands spell them, "--as-is converts it all the same": `text` prints that for whoever called a
command, and `str` adds what the argument is called in Python. What stands in backticks is a command line of its own.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


def printable(text: str) -> str:
    """Returns `text` with control, bidirectional and unpaired surrogate characters escaped, safe to print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_OPTION = re.compile(r"--([a-z][a-z-]*)(?=( [A-Z0-9]|=)?)")


# What a hint says of Python by itself.
_IN_PYTHON_ONLY = re.compile(r" \(in Python:.*\)")
# Options whose argument in Python has another name, or None where only a command has such a thing.
_IN_PYTHON = {"max-shard-size": "max_shard_bytes", "adapter": "adapters"} | dict.fromkeys(
    (
        "backward",
        "coordinator",
        "greedy",
        "ignore-generation-config",
        "input-ids",
        "num-processes",
        "positions",
        "process-id",
        "prompt",
        "right-dtype",
        "tensors",
        "trace",
    )
)


def options(hint: str) -> dict[str, str | None]:
    """Returns option -> argument in Python of the options that a hint tells to add to what was called."""
    found = {}
    for name, has_value in _OPTION.findall(re.sub("`[^`]*`", "", hint)):
        argument = _IN_PYTHON.get(name, name.replace("-", "_"))
        found[f"--{name}"] = argument and f"{argument}={'...' if has_value else 'True'}"
    return found


def counted(number: int, noun: str) -> str:
    """Returns "1 tensor", "2 tensors"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class AprJaxError(Exception):
    """Base of all errors that a user can cause or meet.

    Attributes:
      message: One sentence, without the location.
      code: A stable, kebab-case identifier of the kind of error ("header-crc", "tensor-missing", ...).
      file: The file concerned, as the user named it.
      offset: Byte offset in that file.
      tensor: The tensor's name as it stands in the file.
      expected: What should have been there.
      found: What was there.
      hint: What the user can do; where it is None, that is what its class says (`usual_hint`).
    """

    exit_code: ClassVar[int] = 1
    usual_hint: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        code: str,
        file: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        tensor: str | None = None,
        expected: Any = None,
        found: Any = None,
        hint: str | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.code = code
        self.file = None if file is None else os.fspath(file)
        self.offset = offset
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.hint = hint

    @property
    def advice(self) -> str | None:
        """What the user can do, in the words of the command line."""
        return self.hint or self.usual_hint

    def __str__(self) -> str:
        advice = self.advice or ""
        own = _IN_PYTHON_ONLY.search(advice)
        named = ", ".join(filter(None, options(advice).values()))
        return self.text() + (own[0] if own else f" (in Python: {named})" if named else "")

    def text(self) -> str:
        """Returns the message as a command prints it; `str` adds the names of arguments in Python."""
        where = [] if self.file is None else [self.file]
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        if self.tensor is not None:
            where.append(f"tensor '{self.tensor}'")
        text = (", ".join(where) + ": " if where else "") + self.message
        details = [
            f"{label} {value}"
            for label, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        if details:
            text += f" ({', '.join(details)})"
        if self.advice:
            text += f". {_IN_PYTHON_ONLY.sub('', self.advice)}"
        return "\n".join(printable(line) for line in text.split("\n"))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        fields = ("code", "message", "file", "offset", "tensor", "expected", "found")
        values = {name: getattr(self, name) for name in fields} | {"hint": self.advice}
        return {
            name: value if isinstance(value, int | float | str | list | dict) else str(value)
            for name, value in values.items()
            if value is not None
        }


@contextlib.contextmanager
def in_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names a file in errors about what it holds, if they name none."""
    try:
        yield
    except AprJaxError as error:
        error.file = os.fspath(path) if error.file is None else error.file
        raise


class FindingError(AprJaxError):
    """What was given is at fault, not the reading of it: a report may say so and go on."""


class UsageError(FindingError):
    """The request itself is wrong: bad arguments, or an output that exists."""

    exit_code = 2


class NotInstalledError(UsageError, ImportError):
    """A package of an extra is not installed."""


class MissingFileError(FindingError):
    """A file or folder that was named does not exist."""

    exit_code = 3
    usual_hint = "Check the spelling; relative paths start in the current directory"


class BrokenContainerError(FindingError):
    """The bytes are not a valid container."""

    exit_code = 4
    usual_hint = "Download it again or recreate it: what the damaged bytes meant cannot be known"


class RefusedError(FindingError):
    """Well-formed, but not something that can be handled rightly: missing tensors, unsupported config, overflow."""

    exit_code = 5


class DumpError(RefusedError):
    """A dump of another program's forward pass that does not say what it should, or not of this model."""

    usual_hint = "`parity --explain-format` and docs/dumps.md say what a dump looks like; is it this model's?"


class StorageError(AprJaxError):
    """The operating system refused to read or write."""

    exit_code = 7
    usual_hint = "The operating system refused: check disk space, memory and permissions, then run it again"


EXTRAS: Mapping[str, tuple[str, ...]] = {
    "model": ("jax", "jaxlib", "flax", "jinja2", "optax", "orbax", "safetensors", "scipy", "tokenizers"),
    "reference": ("torch", "transformers"),
    "completion": ("shtab",),
    "hub": ("huggingface_hub",),
}
"""Extra of this package -> what can be imported once it is installed."""


def not_installed(what: str, error: ModuleNotFoundError) -> NotInstalledError | None:
    """Returns what to say of a package that `what` needs; None where no extra brings it."""
    package = (error.name or "").split(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            said, hint = f"{what} needs {package}, which is not installed", f"{pip_install(extra)} installs it"
            return NotInstalledError(said, code="not-installed", hint=hint)
    return None


def pip_install(extra: str) -> str:
    """Returns the command, in backticks, that installs an extra from where this package came from.

    That is a folder, a wheel or a repository, as pip noted it (PEP 610); without a note a checkout, else an index.
    """
    import json
    from importlib import metadata
    from urllib import parse

    try:
        origin = json.loads(metadata.distribution("apr-jax").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    source, editable = f"apr-jax[{extra}]", ""
    checkout, url = pathlib.Path(__file__).resolve().parents[1], origin.get("url", "")
    local = pathlib.Path(parse.unquote(parse.urlsplit(url).path)) if url.startswith("file:") else checkout
    if "vcs_info" in origin:
        source += f" @ {origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    elif local.is_file() or (local / "pyproject.toml").is_file():
        source = f"{local}[{extra}]"
        editable = "--editable " if origin.get("dir_info", {}).get("editable") else ""
    return f"`pip install {editable}{shlex.quote(source)}`"
