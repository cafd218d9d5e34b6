"""What every command shares: absl's start-up, exit codes, and errors without a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from converters.errors import AprJaxError, StorageError

EXIT_DIFFERS = 1
EXIT_INTERRUPTED = 130


def make_parser(prog: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser that accepts absl's flags beside the command's own and keeps the epilog's line breaks."""
    from absl.flags import argparse_flags

    return argparse_flags.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def print_json(value: Any) -> None:
    """Prints `value` as one JSON object on stdout; NaN and infinities are spelt as strings, since JSON has none."""
    print(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False))


def report(error: AprJaxError, as_json: bool) -> int:
    """Prints `error` (text on stderr, or JSON on stdout) and returns the command's exit code."""
    if as_json:
        print_json({"error": error.to_json()})
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def start(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    main: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a command under absl and ends the process with its exit code.

    Args:
      parse: Takes argv (program name first) and returns the parsed arguments.
      main: Takes the arguments, returns the exit code; may raise AprJaxError.
      argv: The command line, program name first; None means sys.argv.
    """
    from absl import app, logging

    def guarded(args: argparse.Namespace) -> int:
        as_json = bool(getattr(args, "json", False))
        # Other packages' notes on what they did not find are no output of ours.
        logging.set_verbosity(logging.WARNING)
        try:
            code = main(args)
            sys.stdout.flush()
            return code
        except AprJaxError as error:
            return report(error, as_json)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # The reader of a pipe went away (`| head`): nothing is wrong, and nothing can be said any more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            return report(StorageError(error.strerror or str(error), code="os-error", file=error.filename), as_json)

    app.run(guarded, argv=None if argv is None else list(argv), flags_parser=parse)
