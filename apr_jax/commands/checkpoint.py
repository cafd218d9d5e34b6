"""`checkpoint save`, `restore` and `show`: a model's parameters, cast, fused or spread over a mesh, kept by Orbax."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.commands.progress import telling
from apr_jax.converters.errors import counted, printable

if TYPE_CHECKING:
    from apr_jax.converters.convert.plan import Plan
    from apr_jax.converters.formats.prepared_format import Description

_EPILOG = """\
save writes the parameters of a model, cast to --dtype and with --fused as few large matrices, by Orbax, with
config.json, the tokenizer's files and prepared.json, which says where they came from: path, hashes, versions. With
--mesh the model is spread over several devices, and each writes its own parts. DIR then stands for the model wherever
one is opened (golden, parity, generate, show, convert, load_model), on any mesh or on one device, and any program
restores DIR/parameters with Orbax alone (docs/checkpoints.md). It is written completely or not at all: a
save that is killed leaves what DIR held before.

restore puts the parameters of DIR on a device, or over another mesh, and compares the CRC-32 of each one there with
what was saved. With -o it writes the model that was saved instead, as it was: names, types, bytes, configuration and
tokenizer. Values that were widened to be saved are narrowed again, which is exact. A tied head that the source had as a
copy of the embedding is not written.

show says what is in DIR.

examples:
  %(prog)s save Qwen2.5-Coder-0.5B prepared --dtype bfloat16 --fused
  %(prog)s save Qwen2.5-7B prepared --dtype bfloat16 --device cuda --mesh model=4
  %(prog)s restore prepared --device cuda --mesh data=2,model=2
  %(prog)s restore prepared -o Qwen2.5-7B.apr
  %(prog)s show prepared
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(
        program, "Save a model for a fast start, restore it, or show what was saved.", _EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="save|restore|show")
    save = commands.add_parser("save", help="write a prepared checkpoint", add_help=False)
    save.add_argument("model", metavar="MODEL", help=arguments.MODEL)
    save.add_argument("folder", metavar="DIR", help="folder to write")
    arguments.add_dtype(save, ("float32", "bfloat16", "float64"), "type of weights and computation")
    save.add_argument("--fused", action="store_true", help="one matrix for q, k and v, and one for gate and up")
    arguments.add_device(save)
    arguments.add(save, "--mesh", "--force", *arguments.OF_CHECKPOINTS, "--adapter")
    said = "restore one on a device or a mesh and compare it with what was saved, or write its source again"
    restore = commands.add_parser("restore", help=said, add_help=False)
    restore.add_argument("folder", metavar="DIR", help="what save wrote")
    restore.add_argument("-o", "--output", metavar="OUT", help="FILE.apr, FILE.safetensors or folder to write")
    restore.add_argument("--max-shard-size", metavar="SIZE", help="split a folder's tensors, e.g. 5GB, 500MB, 2GiB")
    arguments.add_device(restore, default=None)
    arguments.add(restore, "--mesh", "--force", "--ignore-config")
    show = commands.add_parser("show", help="say what is in one", add_help=False)
    show.add_argument("folder", metavar="DIR", help="what save wrote")
    for each in (save, restore, show):
        arguments.add(each, "--json")
        arguments.complete(each)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    if args.command == "restore":
        if args.output is None and (args.max_shard_size is not None or args.force):
            parser.error("--force and --max-shard-size belong to what is written: name it with -o OUT")
        if args.output is not None and (args.mesh is not None or args.device is not None):
            parser.error("-o OUT writes files, and nothing is put on a device: leave --device and --mesh out")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code.

    Raises:
      AprJaxError: As `apr_jax.load.prepared`'s functions and `converters.convert.restoring.restore`.
    """
    started = time.perf_counter()
    doing, run = {
        "save": ("saving", _save),
        "restore": ("restoring and comparing", _restore),
        "show": ("reading", _show),
    }[args.command]
    with telling(doing):
        description, done = run(args)
    result = _summary(description) | {"folder": args.folder, "seconds": round(time.perf_counter() - started, 3)}
    if args.json:
        cli.print_json(result)
        return 0
    print("\n".join(map(printable, _lines(result, description, f"{args.folder}: {done}"))))
    if args.command == "show":
        _print_parameters(description)
    return 0


def _save(args: argparse.Namespace) -> tuple[Description, str]:
    from apr_jax.commands.meshes import placement
    from apr_jax.load import prepared

    device = placement(args, args.device)
    with cli.open_dense_from(args, args.model) as checkpoint:
        description = prepared.save(
            checkpoint, args.folder, dtype=args.dtype, fused=args.fused, device=device, force=args.force, notice=cli.say
        )
        cli.say_warnings(checkpoint)
    return description, "saved"


def _restore(args: argparse.Namespace) -> tuple[Description, str]:
    if args.output is not None:
        return _export(args)
    from apr_jax.load import prepared

    device = args.device
    if args.mesh is not None:
        import jax

        from apr_jax.commands.meshes import placement

        device = placement(args, args.device or jax.default_backend())
    return prepared.check(args.folder, device, args.ignore_config), "restored, every parameter as it was saved"


def _export(args: argparse.Namespace) -> tuple[Description, str]:
    from apr_jax.converters.convert import restoring
    from apr_jax.converters.convert.plan import parse_size

    shard_bytes = None if args.max_shard_size is None else parse_size(args.max_shard_size)
    description, plan = restoring.restore(
        args.folder, args.output, force=args.force, max_shard_bytes=shard_bytes, notice=cli.say
    )
    for warning in plan.warnings:
        cli.warn(warning)
    return description, f"restored to {args.output}, {_as_it_was(plan, description)}"


def _as_it_was(plan: Plan, description: Description) -> str:
    other = sum(tensor.dtype.name != description.types.get(tensor.name) for tensor in plan.tensors)
    if not other:
        return f"{counted(len(plan.tensors), 'tensor')} as in the source"
    return f"{other} of {counted(len(plan.tensors), 'tensor')} in the type that they were saved in, not the source's"


def _show(args: argparse.Namespace) -> tuple[Description, str]:
    from apr_jax.converters.formats import prepared_format

    return prepared_format.describe(args.folder), "a prepared checkpoint"


def _lines(result: dict[str, Any], description: Description, first: str) -> Iterator[str]:
    spread = f", from {counted(description.devices, 'device')}" if description.devices > 1 else ""
    yield f"{first} ({result['seconds']:.1f} s)"
    yield (
        f"  {result['parameters']} parameters of {result['tensors']} tensors, {result['bytes']:,} bytes,"
        f" {description.dtype}, {'fused' if description.fused else 'not fused'}{spread}"
    )
    yield (
        f"  from {description.source['path']} ({description.source['kind']}),"
        f" weights' SHA-256 {description.source['weights_sha256']}"
    )
    yield "  by " + ", ".join(f"{name} {version}" for name, version in description.versions.items())


def _print_parameters(description: Description) -> None:
    from apr_jax.converters.commands.tables import print_table

    rows = [
        (
            printable(parameter.name),
            "x".join(map(str, parameter.shape)),
            description.stored.nbytes(parameter.shape),
            ", ".join(sorted({description.types.get(name, "unknown") for name in parameter.tensors})),
            parameter.crc32,
        )
        for parameter in description.parameters
    ]
    print_table(("parameter", "shape", "bytes", "type in the source", "CRC-32"), rows, right=(2,))


def _summary(description: Description) -> dict[str, Any]:
    stored = description.stored
    return {
        "dtype": description.dtype,
        "fused": description.fused,
        "devices": description.devices,
        "parameters": len(description.parameters),
        "tensors": sum(len(parameter.tensors) for parameter in description.parameters),
        "bytes": sum(stored.nbytes(parameter.shape) for parameter in description.parameters),
        "source": dict(description.source),
        "versions": dict(description.versions),
    }
