"""`completion SHELL`: print what makes a shell complete the words of `apr-jax`, made of the commands' parsers."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence

from apr_jax.commands import entry
from apr_jax.converters.commands import arguments

SHELLS = ("bash", "zsh", "fish", "tcsh")
_EPILOG = """\
Put it where your shell looks for such files, once; a new shell knows it.

examples:
  %(prog)s bash > ~/.local/share/bash-completion/completions/apr-jax
  %(prog)s zsh > ~/.zfunc/_apr-jax                   needs a folder of $fpath
  %(prog)s fish > ~/.config/fish/completions/apr-jax.fish
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, "Print a script that makes a shell complete apr-jax commands.", _EPILOG)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}")
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    return parser_of(argv[0]).parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    import shtab

    whole = _whole()
    for action in filter(arguments.is_path, _actions(whole)):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, args.shell))
    return 0


def _whole() -> argparse.ArgumentParser:
    """All commands under one parser; a command line is never parsed with it."""
    whole = argparse.ArgumentParser(prog="apr-jax")
    commands = whole.add_subparsers(parser_class=_parser_of)  # type: ignore[call-overload]
    for name, (_, summary) in entry.COMMANDS.items():
        commands.add_parser(name, help=summary)
    return whole


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)


def _parser_of(prog: str) -> argparse.ArgumentParser:
    module, _ = entry.COMMANDS[prog.split()[-1]]
    parser: argparse.ArgumentParser = importlib.import_module(module).parser_of(prog)
    return parser
