"""`convert`: HuggingFace checkpoint -> `.apr`, and back, without changing a byte of a tensor unless asked to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.errors import UsageError, counted, printable

if TYPE_CHECKING:
    from apr_jax.converters.convert.plan import Plan
    from apr_jax.converters.convert.run import Outcome

FORMATS = ("apr", "safetensors")
_FOREIGN = frozenset((".gguf", ".bin", ".pt", ".pth", ".onnx", ".ckpt", ".npz", ".h5", ".msgpack", ".pb", ".tflite"))
_EPILOG = """\
Nothing changes unless you ask for it: tensors keep their names, types, shapes and bytes; config.json, the tokenizer
and the folder's other text files, and safetensors' __metadata__, are stored in the .apr and come back byte for byte.
Whatever is left behind is named.

examples:
  %(prog)s Qwen2.5-0.5B qwen.apr
  %(prog)s qwen.apr Qwen2.5-0.5B
  %(prog)s Qwen2.5-0.5B -o qwen.apr --to apr --cast bf16

outputs (--to follows from the name unless it is given):
  FILE.apr          runs with `apr`, and converts back into the very same checkpoint
  DIR               a HuggingFace folder: model.safetensors, or shards with an index
  FILE.safetensors  one file, side files in its __metadata__

tied heads:
  --tied-head absent  leaves out every head (lm_head.weight) that has the embedding's values
  --tied-head copy    writes the head of a tied model as a copy of the embedding, in the embedding's type

Without --tied-head, a head that the source holds is kept as it is, even a copy of the embedding in another type, and
none is added; a head without data (as `apr import` writes) becomes absent. Converting another program's .apr to
safetensors leaves out a head that has the embedding's values: `apr import` added it. A head with values of its own is
always kept, whatever the metadata says.

casts:
  --cast bf16                     every tensor
  --cast f16 --cast '*norm*=f32'  the last match wins
  --cast q8, q4, q4k              quantises as `apr import --quantize int8, int4, q4k` does, bit for bit (.apr only):
                                  biases, norms and tensors of fewer than 1024 values become float32 instead; the error
                                  of each tensor is printed

To f16, bf16, f32 and f64, values are rounded to nearest even, directly from the source's type; NaN stay NaN. A finite
value that would become infinite is an error. Quantised tensors are decoded.

names:
  --rename _orig_mod.=                   removes a prefix
  --rename =model.                       adds a prefix to every name
  --rename 'layers.*.attn.=layers.*.a.'  "*" matches anything between two dots, and stands for the same text in TO

FROM is a prefix. If several match a name, the longest is applied, once; --rename lm_head.=lm_head. leaves such a name
alone. verify says which renaming yields HuggingFace's names.

Quantised forms (GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors, torchao, GGML blocks) are carried over bit for bit,
with their configuration. --dequantise decodes them (GPTQ's qweight, scales and zero points become one float32 matrix)
and removes quantization_config from config.json; with --cast bf16 as well, the exact values are rounded once.
--adapter DIR adds a PEFT adapter (LoRA, rslora, DoRA, modules_to_save) in float32 and rounds once, to the type of the
weight that it changes; a quantised base is decoded.

An .apr with outdated dtype ids (2 was bf16, 8 and 9 were q4 and q8; other programs used others) is refused, with a
list of what its ids may mean. --legacy infers the types from the tensors' sizes; --legacy 8=q4_k settles what sizes
cannot. Written as .apr again, it has today's ids and the very same payloads.

A conversion that takes long is begun with --resume. After a kill, an interrupt or a full disk the same command goes on
where it stopped: what is there is checked against checksums that were noted beside it. Another source, other options or
another version are refused. Without --resume nothing is kept, and what is left of a killed run is removed.

exit codes: 0 done, 2 usage (output exists), 3 file not found, 4 broken container, 5 refused, 7 input or output failed,
70 internal error,
130 interrupted. Whatever happens, the output is complete or absent.
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(
        program, "Convert a Qwen2 checkpoint between HuggingFace safetensors and .apr.", _EPILOG
    )
    parser.add_argument("source", metavar="SRC", help=arguments.MODEL)
    parser.add_argument("target", metavar="DST", nargs="?", help="file or folder to write (or -o)")
    parser.add_argument("-o", "--output", metavar="OUT", help="file or folder to write")
    parser.add_argument("--to", choices=FORMATS, help="format to write (default: inferred from the output's name)")
    parser.add_argument(
        "--cast",
        metavar="[GLOB=]TYPE",
        action="append",
        default=[],
        help="cast tensors (repeatable)",
    )
    parser.add_argument(
        "--dequantise", "--dequantize", action="store_true", help="decode quantised tensors and write dense ones"
    )
    parser.add_argument(
        "--allow-overflow", action="store_true", help="allow a cast to turn finite values into infinities"
    )
    parser.add_argument("--tied-head", choices=("absent", "copy"), help="how to write a head that equals the embedding")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="split a folder's tensors, e.g. 5GB, 500MB, 2GiB")
    parser.add_argument(
        "--rename",
        metavar="FROM=TO",
        action="append",
        default=[],
        help="rename tensors: a name that begins with FROM begins with TO instead (repeatable)",
    )
    parser.add_argument(
        "--leave-out",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave out tensors whose name matches (repeatable)",
    )
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="convert the tensors as they are, even if some are missing or do not match config.json",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on where an earlier run with --resume was killed; else begin"
    )
    arguments.add(parser, "--json", "--force")
    arguments.add_opening(parser)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; argv[0] is the program's name."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    if (args.target is None) == (args.output is None):
        parser.error("name one output: DST or -o OUT")
    args.output = args.output or args.target
    args.to = args.to or _format_of(args.output)
    return args


def _format_of(output: str) -> str:
    """The format that an output's name asks for: a folder has no ending, or that of a version as in Qwen2.5."""
    ending = os.path.splitext(output)[1].lower()
    if ending in _FOREIGN:
        raise UsageError(
            f"'{ending}' is not a format that convert writes",
            code="output-format",
            file=output,
            expected="FILE.apr, FILE.safetensors or a folder",
        )
    return "apr" if ending == ".apr" else "safetensors"


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from apr_jax.converters.checkpoint.naming import Rename
    from apr_jax.converters.commands.progress import bar_of
    from apr_jax.converters.convert.plan import CastRule, make_plan, parse_size
    from apr_jax.converters.convert.run import check_output, run

    rules = [CastRule.parse(text) for text in args.cast]
    shard_bytes = None if args.max_shard_size is None else parse_size(args.max_shard_size)
    opener = cli.open_dense_from if args.dequantise or args.adapter else cli.open_from
    with opener(args, args.source) as checkpoint:
        plan = make_plan(
            checkpoint,
            args.output,
            to=args.to,
            cast=rules,
            allow_overflow=args.allow_overflow,
            tied_head=args.tied_head,
            max_shard_bytes=shard_bytes,
            rename=[Rename.parse(text) for text in args.rename],
            leave_out=args.leave_out,
            as_is=args.as_is,
            dequantise=args.dequantise,
        )
        for warning in plan.warnings:
            cli.warn(warning)
        if args.dry_run:
            check_output(plan, force=args.force)
            if args.json:
                cli.print_json({"plan": plan.to_json()})
            else:
                _print_plan(plan)
            return 0
        with bar_of(plan.bytes_read) as progress:
            outcome = run(plan, force=args.force, resume=args.resume, notice=cli.say, progress=progress)
    if args.json:
        cli.print_json({"plan": plan.to_json(), "outcome": _outcome_json(plan, outcome)})
    else:
        _print_outcome(plan, outcome)
    return 0


def _print_plan(plan: Plan) -> None:
    from apr_jax.converters.commands.tables import print_table

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
        f"{counted(len(plan.tensors), 'tensor')}; {plan.bytes_read} bytes to read, {plan.bytes_written} to write; "
        "nothing written"
    )


def _print_outcome(plan: Plan, outcome: Outcome) -> None:
    casts = sum(tensor.cast is not None for tensor in plan.tensors)
    files = counted(len(plan.files), "data file")
    rate = (plan.bytes_read - outcome.kept_bytes) / max(outcome.seconds, 1e-9) / 1e9
    print(
        f"wrote {printable(plan.output)}: {counted(len(plan.tensors), 'tensor')} ({casts} cast), "
        f"{counted(len(plan.carried), 'side file')}, "
        f"{plan.bytes_written} bytes, {files}, {rate:.2f} GB/s"
    )
    if outcome.kept_bytes:
        print(f"{outcome.kept_bytes} of {plan.bytes_read} bytes had been converted by an earlier run")
    for name, reason in plan.dropped.items():
        print(f"left out: {printable(name)} ({reason})")
    for name, damage in outcome.damage.items():
        print(
            f"{printable(name)}: {counted(damage.overflowed, 'value')} became infinite, {damage.vanished} became zero"
        )
    _print_errors(plan, outcome)


def _print_errors(plan: Plan, outcome: Outcome) -> None:
    """Prints what quantising cost, the worst tensor first."""
    if not outcome.quantised:
        return
    from apr_jax.converters.commands.tables import print_table

    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    rows = []
    for name, error in sorted(outcome.quantised.items(), key=lambda item: -item[1].sums.relative_l2):
        begins_at = error.to_json(shapes[name])["worst_block"]["begins_at"]
        figures = (f"{error.sums.relative_l2:.3e}", f"{error.cosine:.6f}", f"{error.sums.max_abs:.3e}")
        rows.append((printable(name), *figures, f"{error.worst_relative_l2:.3e} at {begins_at}"))
    columns = ("quantised tensor", "relative L2", "cosine", "max abs", "worst block")
    print_table(columns, rows, right=(1, 2, 3))


def _outcome_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    return {
        "seconds": outcome.seconds,
        "footer_checked": outcome.footer_checked,
        "kept_bytes": outcome.kept_bytes,
        "damage": {
            name: {"overflowed": damage.overflowed, "vanished": damage.vanished}
            for name, damage in outcome.damage.items()
        },
        "quantised": {name: error.to_json(shapes[name]) for name, error in outcome.quantised.items()},
    }
