"""`convert`: HuggingFace checkpoint -> `.apr`, and back, without changing a byte of a tensor unless asked to."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from converters.commands import cli
from converters.errors import printable

if TYPE_CHECKING:
    from converters.conversion import Outcome, Plan
    from converters.streaming import Progress

_EPILOG = """\
Nothing that is not asked for changes: tensors keep their names, types, shapes and bytes; config.json, tokenizer and
other side files, and safetensors' __metadata__, travel in the .apr and come back byte for byte.

outputs
  --to apr -o FILE.apr                   runs with `apr`, and turns back into the very same checkpoint
  --to safetensors -o DIR                a folder as HuggingFace has them: model.safetensors, or shards with an index
  --to safetensors -o FILE.safetensors   one file, side files in its __metadata__

tied heads
  Without --tied-head: a head (lm_head.weight) that the source holds is kept as it is, a copy of the embedding in
  whatever type included, and none is added; a head without data (as `apr import` writes) becomes absent. On the way
  from an .apr that another program made to safetensors, a head with the embedding's values is left out: `apr import`
  had added it.
  --tied-head absent leaves out every head that has the embedding's values.
  --tied-head copy writes the head of a tied model as a copy of the embedding, in the embedding's type.
  A head with values of its own is always kept, whatever the metadata say.

casts
  --cast bf16                            every tensor
  --cast f16 --cast '*norm*=f32'         the last match counts
  To f16, bf16, f32, f64; to nearest even, from the source's type directly; NaN stay NaN. A finite value that would
  become infinite is an error. So is a cast of a tensor that is not plain floating point.

exit codes: 0 done, 2 usage (output exists), 3 file not found, 4 broken container, 5 refused, 7 input or output failed,
  130 interrupted. Whatever happens, the output is complete or absent.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; argv[0] is the program's name."""
    parser = cli.make_parser("convert", "Convert a Qwen2 checkpoint between HuggingFace safetensors and .apr.", _EPILOG)
    parser.add_argument("source", metavar="SRC", help="HuggingFace folder, .safetensors file, index of shards, or .apr")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="file or folder to write")
    parser.add_argument("--to", choices=("apr", "safetensors"), required=True, help="format to write")
    parser.add_argument(
        "--cast",
        metavar="[GLOB=]TYPE",
        action="append",
        default=[],
        help="cast tensors (repeatable)",
    )
    parser.add_argument("--allow-overflow", action="store_true", help="let a cast turn finite values into infinities")
    parser.add_argument("--tied-head", choices=("absent", "copy"), help="how to write a head that is the embedding")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="split a folder's tensors, e.g. 5GB, 500MB, 2GiB")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")
    parser.add_argument("--lenient", action="store_true", help="turn oddities of .apr files into warnings")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from converters import conversion
    from converters.checkpoint import open_checkpoint

    rules = [conversion.CastRule.parse(text) for text in args.cast]
    shard_bytes = None if args.max_shard_size is None else conversion.parse_size(args.max_shard_size)
    with open_checkpoint(args.source, lenient=args.lenient) as checkpoint:
        plan = conversion.plan(
            checkpoint,
            args.output,
            to=args.to,
            cast=rules,
            allow_overflow=args.allow_overflow,
            tied_head=args.tied_head,
            max_shard_bytes=shard_bytes,
        )
        for warning in plan.warnings:
            _say(f"warning: {warning}")
        if args.dry_run:
            conversion.check_output(plan, force=args.force)
            if args.json:
                cli.print_json({"plan": plan.to_json()})
            else:
                _print_plan(plan)
            return 0
        with _progress(plan.bytes_read) as progress:
            outcome = conversion.run(plan, force=args.force, notice=_say, progress=progress)
    if args.json:
        cli.print_json({"plan": plan.to_json(), "outcome": _outcome_json(outcome)})
    else:
        _print_outcome(plan, outcome)
    return 0


def _say(message: str) -> None:
    print(printable(message), file=sys.stderr)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Progress | None]:
    """Yields what reports bytes done to a bar on stderr; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import console, progress

    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


def _print_plan(plan: Plan) -> None:
    from converters.commands.tables import print_table

    rows = [
        (
            printable(tensor.name),
            tensor.source.dtype.name if tensor.cast is None else " -> ".join(tensor.cast),
            "x".join(map(str, tensor.shape)) or "scalar",
            tensor.nbytes,
            printable(tensor.file or os.path.basename(plan.output)),
            tensor.offset,
        )
        for tensor in plan.tensors
    ]
    print_table(("tensor", "type", "shape", "bytes", "file", "offset"), rows, right=(3, 5))
    for name, reason in plan.dropped.items():
        print(f"left out: {printable(name)} ({reason})")
    if plan.carried:
        print(f"side files: {printable(', '.join(plan.carried))}")
    files = ", ".join(f"{printable(file.name or os.path.basename(plan.output))} {file.size}" for file in plan.files)
    print(f"files: {files}")
    print(
        f"{len(plan.tensors)} tensors; {plan.bytes_read} bytes to read, {plan.bytes_written} to write; nothing written"
    )


def _print_outcome(plan: Plan, outcome: Outcome) -> None:
    casts = sum(tensor.cast is not None for tensor in plan.tensors)
    files = f"{len(plan.files)} data {'file' if len(plan.files) == 1 else 'files'}"
    rate = plan.bytes_read / max(outcome.seconds, 1e-9) / 1e9
    print(
        f"wrote {printable(plan.output)}: {len(plan.tensors)} tensors ({casts} cast), {len(plan.carried)} side files, "
        f"{plan.bytes_written} bytes, {files}, {rate:.2f} GB/s"
    )
    for name, reason in plan.dropped.items():
        print(f"left out: {printable(name)} ({reason})")
    for name, damage in outcome.damage.items():
        print(f"{printable(name)}: {damage.overflowed} values became infinite, {damage.vanished} became zero")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "seconds": outcome.seconds,
        "footer_checked": outcome.footer_checked,
        "damage": {
            name: {"overflowed": damage.overflowed, "vanished": damage.vanished}
            for name, damage in outcome.damage.items()
        },
    }
