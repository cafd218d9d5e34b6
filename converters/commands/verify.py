"""`verify`: whether two checkpoints hold the same weights, and what happened if not; or whether one file is sound."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.commands.terminal import has_colours
from apr_jax.converters.errors import printable

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint
    from apr_jax.converters.inspect.checks import Check
    from apr_jax.converters.verify.comparison import Comparison
    from apr_jax.converters.verify.tensor_pairs import TensorComparison

_ROWS = 20
_TIED = "tie_word_embeddings"

_EPILOG = """\
With two checkpoints, A is the original and B the one in question. Both are streamed, and every difference is traced
to its cause: a wrong dtype tag, a cast, a transpose, a permutation, swapped tensors, a shift, quantisation, ...

verdicts (and exit codes):
  identical     (0) every byte of every tensor
  equal-values  (0) every value is equal; types differ, and all casts are exact
  close         (1) every tensor is within a relative L2 distance of 1e-3
  different     (1) anything else, including missing tensors and checkpoints with nothing in common

A tied head may be absent, without data, or a copy of the embedding: that is no difference. Equal weights are not
enough where something else changes the answer: a configuration that gives other logits, another tokenizer, chat
template or generation setting, a broken file among these, names that programs will not find (a prefix on all of
them). Each is named, and the verdict is "different" (with --json, "weights" holds that of the weights alone).
Bookkeeping (transformers_version, torch_dtype, spelling) and files that one side lacks do not count.

Published quantised forms (GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors, torchao) are compared by what they decode
to, and named. --adapter DIR adds a PEFT adapter to A: `verify BASE MERGED --adapter DIR` says whether MERGED is BASE
with that adapter.

With one checkpoint: structure, checksums, sizes against shapes, configuration against shapes, names, side files,
vocabulary, and whether the values look like weights (bf16 bytes tagged f16 do not). Exit code 1 if a check fails.

other exit codes: 2 usage, 3 file not found, 4 broken container, 5 refused, 7 input failed, 70 internal error,
130 interrupted
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, "Compare two checkpoints and say what happened, or check one.", _EPILOG)
    parser.add_argument("a", metavar="A", help=arguments.MODEL)
    parser.add_argument("b", metavar="B", nargs="?", help="the checkpoint to compare with A")
    opening = parser.add_argument_group("opening checkpoints")
    arguments.add(opening, "--adapter", help="add a PEFT adapter (LoRA, DoRA) to A (repeatable: one after the other)")
    arguments.add(opening, *arguments.OF_CHECKPOINTS)
    arguments.add(parser, "--json")
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; argv[0] is the program's name."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    if args.adapter and args.b is None:
        parser.error("--adapter belongs to a comparison: give B too")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if args.b is None:
        return _inspect(args)
    return _compare(args)


def _compare(args: argparse.Namespace) -> int:
    from apr_jax.converters.commands.progress import phases
    from apr_jax.converters.verify.comparison import compare

    opener = cli.open_dense_from if args.adapter else cli.open_from
    with opener(args, args.a) as a, cli.open_from(args, args.b) as b:
        _warn(a, b)
        with phases() as progress:
            comparison = compare(a, b, progress)
    if args.json:
        cli.print_json(comparison.to_json())
    else:
        _print(comparison)
    return comparison.exit_code


def _inspect(args: argparse.Namespace) -> int:
    from apr_jax.converters.commands.progress import bar_of
    from apr_jax.converters.inspect.checks import inspect

    with (
        cli.open_from(args, args.a) as checkpoint,
        bar_of(sum(source.size for source in checkpoint.sources)) as progress,
    ):
        checks = inspect(checkpoint, progress=progress)
    failed = sum(check.passed is False for check in checks)
    if args.json:
        cli.print_json({"verdict": "failed" if failed else "passed", "checks": [check.to_json() for check in checks]})
    else:
        _print_checks(checks, failed)
    return cli.EXIT_DIFFERS if failed else 0


def _print_checks(checks: Sequence[Check], failed: int) -> None:
    passed = sum(check.passed is True for check in checks)
    colour, plain = _colours(failed)
    verdict = f"{failed} of {passed + failed} checks failed" if failed else f"{passed} checks passed"
    print(f"{colour}{'failed' if failed else 'passed'}{plain}: {verdict}")
    # What is wrong first, then what is odd, then the rest.
    order = ("failure", "note", "ok", "skipped")
    for check in sorted(checks, key=lambda check: order.index(check.severity)):
        print(printable(f"{check.severity:8} {check.name}: {check.sentence}"))


def _warn(*checkpoints: Checkpoint) -> None:
    for checkpoint in checkpoints:
        for warning in checkpoint.warnings:
            print(printable(f"warning: {checkpoint.path}: {warning}"), file=sys.stderr)


def _print(comparison: Comparison) -> None:
    print(_headline(comparison))
    for line in _lines(comparison):
        print(printable(f"- {line}"))
    verdicts = [tensor.verdict for tensor in comparison.tensors]
    wrong = [tensor for tensor in comparison.unequal if tensor.verdict in ("close", "different")]
    if wrong:
        print()
        _print_tensors(comparison, wrong)
    for verdict, words in (("equal-values", "equal in value, types differ"), ("identical", "equal byte for byte")):
        if verdict in verdicts:
            print(f"{verdicts.count(verdict)} tensors: {words}")


def _lines(comparison: Comparison) -> Iterator[str]:
    naming = comparison.naming
    if naming is not None:
        after = f": programs do not find them; `convert {naming.options}` names them as A does" if naming.hides else ""
        yield f"B's names are not A's: {naming.sentence}{after}"
    yield from (finding.sentence for finding in comparison.findings)
    for label, names in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if names:
            yield f"only in {label}: {', '.join(names[:5])}" + (f", ... ({len(names)})" if len(names) > 5 else "")
    yield from comparison.notes
    attributes = [found for found in comparison.metadata_differences if found.attribute not in ("config", _TIED)]
    if attributes:
        listed = ", ".join(f"{found.attribute} {found.a} in A, {found.b} in B" for found in attributes)
        yield f"the configurations disagree: {listed}"
    yield from (found.sentence for found in comparison.metadata_differences if found not in attributes)
    yield from (found.sentence for found in comparison.side_files)


def _headline(comparison: Comparison) -> str:
    compared, unequal = comparison.compared, comparison.unequal
    wrong = sum(tensor.verdict in ("close", "different") for tensor in unequal)
    text = "nothing was compared"
    if compared.tensors:
        text = f"{compared.tensors} tensors compared, {compared.elements} elements, {compared.bytes} bytes; "
        text += f"{wrong or 'none'} {'differs' if wrong == 1 else 'differ'}"
    elsewhere = comparison.answers_differ_by
    if elsewhere:
        others = " and ".join(elsewhere)
        text = f"{text}; so do {others}" if wrong else f"{text}; the weights are {comparison.weights}, but not {others}"
    elif comparison.metadata_differences:
        text += "; the configurations do" if not wrong else "; so do the configurations"
    colour, plain = _colours(comparison.exit_code)
    return f"{colour}{comparison.verdict}{plain}: {printable(text)}"


def _colours(exit_code: int) -> tuple[str, str]:
    if not has_colours(sys.stdout):
        return "", ""
    return ("\x1b[1;31m" if exit_code else "\x1b[1;32m"), "\x1b[0m"


def _print_tensors(comparison: Comparison, unequal: Sequence[TensorComparison]) -> None:
    from apr_jax.converters.commands.tables import print_table

    causes = {name: finding.cause for finding in comparison.findings for name in finding.tensors}
    rows = [
        (
            printable(tensor.name),
            _both(*tensor.dtypes),
            _both(*("x".join(map(str, shape)) or "scalar" for shape in tensor.shapes)),
            *_figures(tensor),
            causes.get(tensor.name, ""),
        )
        for tensor in unequal[:_ROWS]
    ]
    columns = ("tensor", "type", "shape", "differing", "relative L2", "cosine", "max abs", "cause")
    print_table(columns, rows, right=(3, 4, 5, 6))
    if len(unequal) > _ROWS:
        print(f"and {len(unequal) - _ROWS} tensors less far apart (--json lists all)")


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} -> {b}"


def _figures(tensor: TensorComparison) -> tuple[str, ...]:
    sums = tensor.sums
    if sums is None:
        return ("", "", "", "")
    cosine = "" if sums.cosine is None else f"{sums.cosine:.6f}"
    share = f"{100 * sums.differing / max(sums.elements, 1):.3g} %"
    return share, f"{sums.relative_l2:.2e}", cosine, f"{sums.max_abs:.3e}"
