"""The parser that every command has, and the options that several share, each written once."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from apr_jax.converters.errors import UsageError

MODEL = "HuggingFace folder, .safetensors file, index of shards, .apr, or OWNER/NAME[@REVISION] on the Hub"
DTYPES: Mapping[str, str] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
"""How types of computation may be spelt besides their names."""
_AXES = ("data", "model")
_DEVICE = re.compile(r"(cpu|cuda)(:[0-9]+)?")
_PATHS = frozenset(("FILE", "DIR", "OUT", "PATH", "DUMP", "GOLDEN", "SRC", "DST", "MODEL", "A", "B"))
_ALL = "`{} --help` describes all of them"
_WIDEST, _NARROWEST = 120, 40
"""Columns of a help text: longer lines are hard to read, and shorter ones hold no option."""


class _Version(argparse.Action):
    """Prints the versions that a bug report needs, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(versions())
        parser.exit()


def versions() -> str:
    """Returns the versions of this package and of what it computes with, on one line; imports none of them."""
    import platform
    from importlib import metadata

    found = [f"apr_jax {_version('apr-jax', metadata)}", f"Python {platform.python_version()}"]
    return ", ".join([*found, *(f"{name} {_version(name, metadata)}" for name in ("jax", "flax", "numpy"))])


def _version(name: str, metadata: Any) -> str:
    try:
        return str(metadata.version(name))
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a device: cpu or cuda, or one of several by number, as cuda:1"
        )
    return text


def _mesh(text: str) -> dict[str, int]:
    """Reads "data=2,model=4"; an axis that is missing has one device."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if not equals or not re.fullmatch("[1-9][0-9]{0,5}", size) or axis in sizes:
            raise argparse.ArgumentTypeError(f"'{text}' is no mesh: data=2,model=4, say, each axis at most once")
        if axis not in _AXES:
            meant = nearest(axis, _AXES)
            said = f"did you mean {meant}?" if meant else "they are data (rows of a batch) and model (weights)"
            raise argparse.ArgumentTypeError(f"a mesh has no axis '{axis}'; {said}")
        sizes[axis] = int(size)
    return sizes


def _coordinator(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text != "auto" and not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"'{text}' is no address: HOST:PORT, or auto in a job of SLURM or Open MPI")
    return text


def dtype(text: str) -> str:
    """Returns the name of a type of computation, which may be spelt short."""
    return DTYPES.get(text, text)


SHARED: Mapping[str, Mapping[str, Any]] = {
    "--device": {"metavar": "DEVICE", "type": _device, "default": "cpu"},
    "--mesh": {
        "metavar": "data=D,model=M",
        "type": _mesh,
        "default": None,
        "help": "spread rows of a batch over D devices and weights over M, D times M in all (docs/meshes.md)",
    },
    "--coordinator": {
        "metavar": "HOST:PORT",
        "type": _coordinator,
        "default": None,
        "help": "run as one of several processes, the first of which is to be found there; auto asks SLURM or Open MPI",
    },
    "--process-id": {"metavar": "I", "type": int, "default": None, "help": "which process this is, from 0 on"},
    "--num-processes": {"metavar": "N", "type": int, "default": None, "help": "how many processes there are"},
    "--dtype": {"metavar": "DTYPE", "type": dtype, "default": "float32"},
    "--lenient": {"action": "store_true", "help": "warn about oddities in .apr files instead of refusing them"},
    "--legacy": {
        "metavar": "ID=TYPE",
        "nargs": "?",
        "const": "",
        "action": "append",
        "default": [],
        "help": "accept the dtype ids of older .apr files, inferred from the tensors' sizes; ID=TYPE settles"
        " what sizes cannot (repeatable)",
    },
    "--follow-links": {"action": "store_true", "help": "follow symbolic links that lead out of a checkpoint's folder"},
    "--ignore-config": {
        "metavar": "KEY",
        "action": "append",
        "default": [],
        "help": "ignore this key of the configuration (repeatable)",
    },
    "--adapter": {
        "metavar": "DIR",
        "action": "append",
        "default": [],
        "help": "add a PEFT adapter (LoRA, DoRA) to the weights (repeatable, applied in order)",
    },
    "--force": {"action": "store_true", "help": "replace an output that exists"},
    "--json": {"action": "store_true", "help": "print the result as one JSON object"},
    "--quiet": {"action": "store_true", "help": "print no warnings and no progress"},
    "--verbose": {
        "action": "store_true",
        "help": "print time, memory, versions, progress without a terminal, and the traceback of an error",
    },
    "--color": {
        "choices": ("auto", "always", "never"),
        "default": "auto",
        "help": "color the output (default: auto, on a terminal unless NO_COLOR is set)",
    },
    "--version": {"action": _Version, "nargs": 0, "help": "print the version and exit"},
}
"""What commands share, by option: the arguments of `add_argument`. How it reads is decided here alone."""
OF_ALL = ("--quiet", "--verbose", "--color", "--version")
"""What each command has, without asking for it."""
OF_PROCESSES = ("--coordinator", "--process-id", "--num-processes")
"""How several processes find each other; `apr_jax.commands.processes.joined` obeys them."""
OF_CHECKPOINTS = ("--lenient", "--legacy", "--follow-links", "--ignore-config")
"""How checkpoints are opened; `cli.open_from` obeys them."""


def add(parser: argparse._ActionsContainer, *options: str, **changes: Any) -> None:
    """Adds shared options.

    Args:
      parser: A parser, or a group of one.
      *options: Keys of `SHARED`.
      **changes: What differs for this command, for all of `options`.
    """
    for option in options:
        parser.add_argument(option, **{**SHARED[option], **changes})


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Adds how a model is opened, as a group; `cli.open_dense_from` obeys it."""
    add(parser.add_argument_group("opening checkpoints"), *OF_CHECKPOINTS, "--adapter")


def add_device(parser: argparse._ActionsContainer, default: str | None = "cpu") -> None:
    """Adds --device; a default of None is JAX's own choice."""
    said = "JAX's own choice" if default is None else default
    add(parser, "--device", default=default, help=f"device to run on: cpu, cuda, or cuda:1 (default: {said})")


def add_dtype(parser: argparse._ActionsContainer, names: Sequence[str], what: str, default: str = "float32") -> None:
    """Adds --dtype with the types that a command computes in; short spellings will do for each."""
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    add(parser, "--dtype", choices=tuple(names), default=default, help=f"{what}: {listed} (default: {default})")


def make_parser(program: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Returns a command's parser; `complete` adds what every command has, behind its own.

    Args:
      program: What the command was called by: the path of a script, or "apr-jax COMMAND".
      description: What it does, one sentence.
      epilog: More about it; "%(prog)s" stands for its name. Paragraphs are filled; a line that is indented by two is
        a row of a table, its columns two spaces or more apart, or a command if it begins with the name.
    """
    return Parser(prog=called(program), description=description, epilog=epilog, add_help=False)


def complete(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what every command has, as a group behind the command's own; returns the parser."""
    group = parser.add_argument_group("common options")
    group.add_argument("-h", "--help", action="help", help="print this help text and exit")
    add(group, *OF_ALL)
    parser.usage = " ".join(["%(prog)s [OPTION ...]", *_needed(parser)])
    return parser


def _needed(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What a command does not run without, as its usage shows it; what there is to choose from is in a group."""
    for action in sorted(parser._actions, key=lambda action: not action.option_strings):
        name = str(action.metavar or action.dest)
        if action.option_strings and action.required:
            yield f"{action.option_strings[0]} {name}"
        elif not action.option_strings:
            yield f"[{name}]" if action.nargs == "?" else name


def called(program: str) -> str:
    """Returns how a command was called: a script by Python."""
    return f"python {program}" if program.endswith(".py") else program


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that name what was meant, and without guessing at abbreviations."""

    def __init__(self, **settings: Any):
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = super().parse_known_args(None if args is None else list(_without_guessing(args)), namespace)
        for action in self._actions:
            if is_path(action) and getattr(known, action.dest, None) in ("", [""]):
                self.error(f"argument {'/'.join(action.option_strings) or action.metavar}: the name is empty")
        return known, rest

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with what was meant, where something is like it."""
        said = message.replace("the following arguments are required:", "missing:")
        said = re.sub(r"^unrecognized arguments: (?=.*(?<!\S)-)", "no such option: ", said)
        said = said.replace("unrecognized arguments:", "more arguments than expected:")
        meant = self._meant(message)
        hint = f"Did you mean {meant}? " if meant else ""
        raise UsageError(said, code="usage", hint=hint + _ALL.format(self.prog))

    def _meant(self, message: str) -> str | None:
        if found := re.match(r"unrecognized arguments: .*?(?<!\S)(--?[\w-]+)", message):
            return nearest(found[1], self._option_string_actions)
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            return nearest(found[1], [*re.findall(r"[^', ]+", found[2]), *DTYPES])
        return None

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own takes a full disk for a success.
        import sys

        (file or sys.stderr).write(message)


def nearest(word: str, words: Any) -> str | None:
    """Returns the one of some words that somebody who wrote `word` most likely meant; None if none is like it."""
    begun = [each for each in words if len(word) > 3 and each.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)), None)


def is_path(action: argparse.Action) -> bool:
    """Whether an argument names a file or a folder, by what its help calls it."""
    return isinstance(action.metavar, str) and not _PATHS.isdisjoint(action.metavar.split("|"))


def _without_guessing(args: Sequence[str]) -> Iterator[str]:
    """Yields the arguments, --legacy joined with an ID=TYPE after it; argparse would take any argument for one."""
    rest = iter(range(len(args)))
    for at in rest:
        if args[at] == "--":
            yield from args[at:]
            return
        if args[at] != "--legacy":
            yield args[at]
            continue
        said = args[at + 1] if at + 1 < len(args) and re.fullmatch(r"[0-9]+=\S+", args[at + 1]) else None
        yield f"--legacy={said or ''}"
        if said is not None:
            next(rest)


class _Formatter(argparse.HelpFormatter):
    """Help that fits the terminal: paragraphs are filled, rows of tables keep their columns where there is room."""

    def __init__(self, prog: str, **settings: Any):
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, **{"width": min(max(columns, _NARROWEST), _WIDEST) - 1, **settings})

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        if usage is None:
            return super()._format_usage(usage, actions, groups, prefix)
        called = f"usage: {usage % {'prog': self._prog}}"
        return "\n".join(textwrap.wrap(called, self._width, subsequent_indent=" " * 9, break_on_hyphens=False)) + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = re.split(r"\n\s*\n", text.strip("\n"))
        return "\n\n".join("\n".join(self._block(block.split("\n"), width)) for block in blocks)

    def _block(self, lines: Sequence[str], width: int) -> Iterator[str]:
        """Lines of prose, and rows of a table among them."""
        rows, prose = list[tuple[str, str]](), list[str]()
        for line in lines:
            if rows and line.startswith(" " * 12):
                rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}".strip())
            elif line.startswith("  "):
                yield from self._prose(prose, width)
                prose = []
                left, *right = re.split(r" {2,}", line.strip(), maxsplit=1)
                rows.append((left, right[0] if right else ""))
            else:
                yield from self._rows(rows, width)
                rows = []
                prose.append(line)
        yield from self._prose(prose, width)
        yield from self._rows(rows, width)

    def _prose(self, lines: Sequence[str], width: int) -> list[str]:
        return textwrap.wrap(" ".join(lines), width, break_on_hyphens=False) if lines else []

    def _rows(self, rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
        """Rows [left, right]: side by side where the right side has room, else below each other."""
        left = max((len(row[0]) for row in rows if row[1]), default=0) + 4
        for name, text in rows:
            if text and left <= width // 2 + 10 and len(name) + 4 <= left:
                first, *more = textwrap.wrap(text, width - left, break_on_hyphens=False)
                yield f"  {name:{left - 2}}{first}"
                yield from (f"{'':{left}}{line}" for line in more)
            else:
                yield from _command(name, width) if name.startswith(self._prog) else _wrapped(name, width, 2)
                yield from _wrapped(text, width, 6)


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    return [
        f"{'':{indent}}{line}"
        for line in textwrap.wrap(text, width - indent, break_on_hyphens=False, break_long_words=False)
    ]


def _command(text: str, width: int) -> Iterator[str]:
    """A command in lines that a shell joins."""
    lines = textwrap.wrap(text, width - 4, break_on_hyphens=False, break_long_words=False, subsequent_indent="    ")
    yield from (f"  {line} \\" for line in lines[:-1])
    yield from (f"  {line}" for line in lines[-1:])
