"""What every command shares: absl's start-up, exit codes, and errors without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.errors import AprJaxError, StorageError, printable
from apr_jax.converters.storage.interrupts import EXIT_INTERRUPTED, bounded, termination_as_interrupt

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF))
EXIT_DIFFERS = 1
EXIT_INTERNAL = 70
"""Of BSD's sysexits: an error of the program itself."""
CHECKPOINT_HELP = "HuggingFace folder, .safetensors file, index of shards, .apr, or OWNER/NAME[@REVISION] on the Hub"


def make_parser(program: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser that accepts absl's flags beside the command's own and keeps the epilog's line breaks.

    Args:
      program: What the command was called by: a path, of which the name is shown, or "apr-jax COMMAND".
      description: What it does.
      epilog: More about it; "%(prog)s" stands for its name.
    """
    from absl.flags import argparse_flags

    class Parser(argparse_flags.ArgumentParser):
        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            known, rest = super().parse_known_args(None if args is None else list(_without_guessing(args)), namespace)
            for action in self._actions:
                if _is_path(action) and getattr(known, action.dest, None) in ("", [""]):
                    self.error(
                        f"argument {'/'.join(action.option_strings) or action.metavar}: a name is needed, not ''"
                    )
            return known, rest

        def _print_message(self, message: str, file: Any = None) -> None:
            # argparse's own takes a full disk for a success.
            if message:
                (file or sys.stderr).write(message)

    return Parser(
        prog=os.path.basename(program),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


_PATHS = frozenset(("FILE", "DIR", "OUT", "PATH", "DUMP", "GOLDEN", "SRC", "MODEL", "A", "B"))


def _is_path(action: argparse.Action) -> bool:
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


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how checkpoints are opened; `open_from` obeys them."""
    parser.add_argument("--lenient", action="store_true", help="turn oddities of .apr files into warnings")
    parser.add_argument(
        "--legacy",
        metavar="ID=TYPE",
        nargs="?",
        const="",
        action="append",
        default=[],
        help="read dtype ids of older .apr files, by size; with ID=TYPE where the size does not decide (repeatable)",
    )
    parser.add_argument("--follow-links", action="store_true", help="open links that lead out of a checkpoint's folder")
    add_configuration_arguments(parser)


def add_configuration_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how the configuration of a model is read."""
    parser.add_argument(
        "--ignore-config",
        metavar="KEY",
        action="append",
        default=[],
        help="go on as if the configuration had no such key: it changes nothing (repeatable)",
    )


def open_from(args: argparse.Namespace, path: str) -> Checkpoint:
    """Opens a checkpoint as the options of `add_checkpoint_arguments` say.

    Raises:
      AprJaxError: As `open_checkpoint`; UsageError if --legacy says what cannot be.
    """
    from apr_jax.converters.checkpoint.openers import open_checkpoint

    return open_checkpoint(path, **_opening(args))


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names PEFT adapters; `open_dense_from` obeys it."""
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="add a PEFT adapter (LoRA, DoRA) to the weights (repeatable: one after the other)",
    )


def open_dense_from(args: argparse.Namespace, path: str) -> Checkpoint:
    """Opens a checkpoint as a model takes it (`dense.open_dense`), as the options of both functions above say."""
    from apr_jax.converters.checkpoint.dense import open_dense

    return open_dense(path, adapters=args.adapter, **_opening(args))


def _opening(args: argparse.Namespace) -> dict[str, Any]:
    from apr_jax.converters.formats.dtypes import parse_legacy

    return {
        "lenient": args.lenient,
        "legacy": parse_legacy(args.legacy),
        "follow_links": args.follow_links,
        "ignore_config": args.ignore_config,
    }


def say_warnings(checkpoint: Checkpoint) -> None:
    """Prints on stderr what a checkpoint was opened in spite of."""
    for warning in checkpoint.warnings:
        say(f"warning: {warning}")


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Prints on stderr what is warned of inside, each thing once."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        say(f"warning: {message}")


def print_json(value: Any) -> None:
    """Prints `value` as one JSON object on stdout; NaN and infinities are spelt as strings, since JSON has none."""
    print(json.dumps(_spelt(value), indent=2, ensure_ascii=True, allow_nan=False))


def _spelt(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(item) for item in value]
    return value


def say(message: str) -> None:
    """Prints a message that may hold names from files, and lines of its own, on stderr."""
    print(_escaped(message), file=sys.stderr, flush=True)


def show(message: str) -> None:
    """Prints a part of the result, which may hold names from files, and lines of its own, on stdout."""
    print(_escaped(message))


def _escaped(message: str) -> str:
    return "\n".join(map(printable, message.split("\n")))


def report(error: AprJaxError, as_json: bool) -> int:
    """Prints `error` (text on stderr, or JSON on stdout) and returns the command's exit code."""
    if as_json:
        # Where the error is that nothing can be written to stdout, this cannot be either.
        with contextlib.suppress(OSError):
            print_json({"error": error.to_json()})
    print(f"error: {error.text()}", file=sys.stderr)
    return error.exit_code


def _report_internal(error: BaseException, as_json: bool) -> int:
    """Says that the program itself is wrong, and where the traceback is; it stands for no verdict."""
    said = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    cause = "Not all that apr_jax needs is installed" if isinstance(error, ImportError) else "A mistake in apr_jax"
    text = f"{sys.argv}\n\n{''.join(traceback.format_exception(error))}"
    log = None
    try:
        with tempfile.NamedTemporaryFile("w", prefix="apr-jax-", suffix=".log", delete=False, errors="replace") as file:
            file.write(text)
        log, kept = file.name, f"the traceback is in {file.name}"
    except OSError as failed:
        kept = f"the traceback could not be kept ({failed.strerror}): set TMPDIR to a folder with room"
    if as_json:
        with contextlib.suppress(OSError):
            print_json({"error": {"code": "internal", "message": said, "log": log}})
    say(f"internal error: {said}. {cause}; {kept}")
    return EXIT_INTERNAL


def start(command: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command under absl and ends the process with its exit code, whatever happens in it.

    Args:
      command: The module of it, which is imported here. `parse(argv)` takes the command line, program name first, and
        returns the parsed arguments; `main(args)` takes them and returns the exit code, or raises AprJaxError.
      argv: The command line, program name first; None means sys.argv.
    """
    _prepare_streams()
    try:
        with termination_as_interrupt(last=True) as check_interrupted, bounded():
            _run(command, argv, check_interrupted)
    except KeyboardInterrupt as error:
        say("\n".join(["interrupted", *getattr(error, "__notes__", ())]))
        sys.exit(EXIT_INTERRUPTED)


def _prepare_streams() -> None:
    """Gives a closed stdout or stderr a place to go, and escapes what a stream cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = io.TextIOWrapper(
            _Unfailing(sys.stderr.fileno(), "w", closefd=False),
            encoding=sys.stderr.encoding,
            errors="backslashreplace",
            write_through=True,
        )


class _Unfailing(io.FileIO):
    """Where messages go: one that cannot be written is lost, and changes no exit code."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def _run(command: str, argv: Sequence[str] | None, check_interrupted: Callable[[], None]) -> None:
    def parse(words: list[str]) -> argparse.Namespace:
        with _ending_on_error("--json" in words, check_interrupted):
            args: argparse.Namespace = module.parse(words)
            return args

    def main(args: argparse.Namespace) -> int:
        # Other packages' notes on what they did not find are no output of ours.
        logging.set_verbosity(logging.WARNING)
        with _ending_on_error(bool(getattr(args, "json", False)), check_interrupted):
            code: int = module.main(args)
            check_interrupted()
            return code

    with _ending_on_error("--json" in (argv or sys.argv), check_interrupted):
        from absl import app, logging

        module = importlib.import_module(command)
    app.run(main, argv=None if argv is None else list(argv), flags_parser=parse)


@contextlib.contextmanager
def _ending_on_error(as_json: bool, check_interrupted: Callable[[], None]) -> Iterator[None]:
    """Ends the process with one line and the exit code of whatever is raised in the block, or by a full stdout."""
    try:
        try:
            yield
        except SystemExit:
            # After --help.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return
    except (SystemExit, KeyboardInterrupt):
        raise
    except AprJaxError as error:
        code = report(error, as_json)
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`): nothing is wrong, and nothing can be said any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        said, file = error.strerror or str(error), error.filename
        if file is None and error.errno in _FULL:
            # What is still to be written cannot be either, and would be tried at the end of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            said, file = f"the output cannot be written: {said}", "stdout"
        code = report(StorageError(said, code="os-error", file=file), as_json)
    except MemoryError:
        code = report(StorageError("there is not enough memory", code="no-memory"), as_json)
    except BaseException as error:
        # Also what native code raises past Exception, as pyo3's panics.
        check_interrupted()
        code = _report_internal(error, as_json)
    sys.exit(code)
