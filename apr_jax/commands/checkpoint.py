"""`checkpoint save MODEL DIR` and `checkpoint restore DIR`: a model prepared once, cast and fused, kept by Orbax."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.commands.progress import telling
from apr_jax.converters.errors import printable

if TYPE_CHECKING:
    from apr_jax.converters.formats.prepared_format import Description

_EPILOG = """\
save writes the parameters of a model, cast to --dtype and with --fused as few large matrices, by Orbax, with
config.json, the tokenizer's files and prepared.json, which says where they came from: path, hashes, versions. DIR can
then be given wherever a model is opened (golden, parity, generate, show, load_model); it is written completely or not
at all.

restore puts the parameters of DIR on the device and compares the SHA-256 of each one there with what was saved.
`convert --to safetensors DIR -o OUT` turns DIR back into safetensors.

examples:
  %(prog)s save Qwen2.5-Coder-0.5B prepared --dtype bfloat16 --fused
  %(prog)s restore prepared --device cuda
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(
        program, "Prepare a model for a fast start, or check one that was prepared.", _EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="save|restore")
    save = commands.add_parser("save", help="write a prepared checkpoint", add_help=False)
    save.add_argument("model", metavar="MODEL", help=arguments.MODEL)
    save.add_argument("folder", metavar="DIR", help="folder to write")
    arguments.add_dtype(save, ("float32", "bfloat16", "float64"), "type of weights and computation")
    save.add_argument("--fused", action="store_true", help="one matrix for q, k and v, and one for gate and up")
    arguments.add(save, "--force", *arguments.OF_CHECKPOINTS, "--adapter")
    said = "restore one on a device and compare it with what was saved"
    restore = commands.add_parser("restore", help=said, add_help=False)
    restore.add_argument("folder", metavar="DIR", help="what save wrote")
    arguments.add_device(restore, default=None)
    arguments.add(restore, "--ignore-config")
    for each in (save, restore):
        arguments.add(each, "--json")
        arguments.complete(each)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    return parser_of(argv[0]).parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code.

    Raises:
      AprJaxError: As `apr_jax.load.prepared.save` and `check`.
    """
    from apr_jax.load import prepared

    started = time.perf_counter()
    if args.command == "save":
        with cli.open_dense_from(args, args.model) as checkpoint, telling("saving"):
            description = prepared.save(
                checkpoint, args.folder, dtype=args.dtype, fused=args.fused, force=args.force, notice=cli.say
            )
            cli.say_warnings(checkpoint)
        done = "saved"
    else:
        with telling("restoring and comparing"):
            description = prepared.check(args.folder, args.device, args.ignore_config)
        done = "restored, every parameter as it was saved"
    result = _summary(description) | {"folder": args.folder, "seconds": round(time.perf_counter() - started, 3)}
    if args.json:
        cli.print_json(result)
        return 0
    lines = (
        f"{args.folder}: {done} ({result['seconds']:.1f} s)",
        f"  {result['parameters']} parameters of {result['tensors']} tensors, {result['bytes']:,} bytes,"
        f" {description.dtype}, {'fused' if description.fused else 'not fused'}",
        f"  from {description.source['path']} ({description.source['kind']}),"
        f" weights' SHA-256 {description.source['weights_sha256']}",
        "  by " + ", ".join(f"{name} {version}" for name, version in description.versions.items()),
    )
    print("\n".join(map(printable, lines)))
    return 0


def _summary(description: Description) -> dict[str, Any]:
    stored = description.stored
    return {
        "dtype": description.dtype,
        "fused": description.fused,
        "parameters": len(description.parameters),
        "tensors": sum(len(parameter.tensors) for parameter in description.parameters),
        "bytes": sum(stored.nbytes(parameter.shape) for parameter in description.parameters),
        "source": dict(description.source),
        "versions": dict(description.versions),
    }
