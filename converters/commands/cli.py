"""What every command shares: how it starts and ends, exit codes, and errors without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import math
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.commands import arguments, terminal
from apr_jax.converters.errors import AprJaxError, StorageError, not_installed, printable
from apr_jax.converters.storage.interrupts import EXIT_INTERRUPTED, bounded, termination_as_interrupt

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF))
EXIT_DIFFERS = 1
EXIT_INTERNAL = 70
"""Of BSD's sysexits: an error of the program itself."""


def open_from(args: argparse.Namespace, path: str) -> Checkpoint:
    """Opens a checkpoint as the options `arguments.OF_CHECKPOINTS` say.

    Raises:
      AprJaxError: As `open_checkpoint`; UsageError if --legacy says what cannot be.
    """
    from apr_jax.converters.checkpoint.openers import open_checkpoint

    return open_checkpoint(path, **_opening(args))


def open_dense_from(args: argparse.Namespace, path: str) -> Checkpoint:
    """Opens a checkpoint as a model takes it (`dense.open_dense`), with the adapters that --adapter names."""
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
        warn(warning)


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Prints on stderr what is warned of inside, each thing once."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warn(message)


def print_json(value: Any) -> None:
    """Prints `value` on stdout as `json_text` has it."""
    print(json_text(value))


def json_text(value: Any) -> str:
    """Returns `value` as JSON; NaN and infinities are spelt as strings, since JSON has none."""
    return json.dumps(_spelt(value), indent=2, ensure_ascii=True, allow_nan=False)


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


def warn(message: str) -> None:
    """Prints a warning on stderr, unless --quiet asked for none."""
    if not terminal.manner.quiet:
        _say_under("warning:", terminal.YELLOW, _escaped(message))


def _say_under(kind: str, colour: str, message: str) -> None:
    print(terminal.coloured(kind, colour, sys.stderr), message, file=sys.stderr, flush=True)


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
    if terminal.manner.verbose:
        say("".join(traceback.format_exception(error)))
    say_error(error.text())
    return error.exit_code


def say_error(text: str) -> None:
    """Prints on stderr what ends the command."""
    _say_under("error:", terminal.RED, text)


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
    """Runs a command and ends the process with its exit code, whatever happens in it.

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
    words, started = list(sys.argv if argv is None else argv), time.perf_counter()
    terminal.manner.settle(argparse.Namespace())
    with _ending_on_error(words, check_interrupted):
        module = importlib.import_module(command)
        args: argparse.Namespace = module.parse(words)
        terminal.manner.settle(args)
        code: int = module.main(args)
        check_interrupted()
        if terminal.manner.verbose:
            say(f"took {time.perf_counter() - started:.1f} s and at most {_most_memory()}; {arguments.versions()}")
    sys.exit(code)


def _most_memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6:.0f} MB of memory"


@contextlib.contextmanager
def _ending_on_error(words: Sequence[str], check_interrupted: Callable[[], None]) -> Iterator[None]:
    """Ends the process with one line and the exit code of whatever is raised in the block, or by a full stdout."""
    program, as_json = arguments.called(words[0]), "--json" in words
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
    except ModuleNotFoundError as error:
        needed = not_installed(f"`{program}`", error)
        code = _report_internal(error, as_json) if needed is None else report(needed, as_json)
    except MemoryError:
        code = report(StorageError("there is not enough memory", code="no-memory"), as_json)
    except BaseException as error:
        # Also what native code raises past Exception, as pyo3's panics.
        check_interrupted()
        code = _report_internal(error, as_json)
    sys.exit(code)
