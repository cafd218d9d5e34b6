"""`show`: what a checkpoint holds: header, metadata, side files, tensors."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converters.commands import cli
from converters.errors import printable

if TYPE_CHECKING:
    from converters.checkpoint import Checkpoint, Tensor

_SHOWN_CHARACTERS = 100


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; argv[0] is the program's name."""
    parser = cli.make_parser("show", "Print what a checkpoint holds: header, metadata, side files and tensors.")
    parser.add_argument("path", metavar="PATH", help="HuggingFace folder, .safetensors file, index of shards, or .apr")
    parser.add_argument("--tensors", metavar="GLOB", default="*", help="list only tensors whose name matches")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, metadata unabbreviated")
    parser.add_argument("--lenient", action="store_true", help="turn oddities of .apr files into warnings")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from converters.checkpoint import open_checkpoint
    from converters.errors import UsageError

    with open_checkpoint(args.path, lenient=args.lenient) as checkpoint:
        listed = [tensor for name, tensor in checkpoint.tensors.items() if fnmatch.fnmatchcase(name, args.tensors)]
        if not listed and args.tensors != "*":
            raise UsageError(f"no tensor's name matches {args.tensors}", code="glob-matches-nothing", file=args.path)
        if args.json:
            cli.print_json(_as_json(checkpoint, listed))
        else:
            _print(checkpoint, listed)
    return 0


def _header(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the fields of the container's header, and what follows from them."""
    fields: dict[str, Any] = {"kind": checkpoint.kind}
    if checkpoint.apr is None:
        fields["files"] = {source.path: source.size for source in checkpoint.sources}
        return fields
    header = checkpoint.apr.header
    return fields | {
        "file_bytes": checkpoint.sources[0].size,
        "magic": header.magic.decode("latin-1"),
        "version": ".".join(map(str, header.version)),
        "flags": f"{header.flags:#06x}",
        "flag_names": header.flag_names,
        "tensor_count": header.tensor_count,
        "metadata_offset": header.metadata_offset,
        "metadata_size": header.metadata_size,
        "index_offset": header.index_offset,
        "data_offset": header.data_offset,
        "data_end": checkpoint.apr.data_end,
        "checksum": f"{header.checksum:#010x}",
        "footer": checkpoint.apr.has_footer,
    }


def _totals(tensors: Sequence[Tensor]) -> dict[str, Any]:
    from converters import dtypes

    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype.name] = by_type.get(tensor.dtype.name, 0) + 1
    return {
        "tensors": len(tensors),
        "elements": sum(dtypes.element_count(tensor.shape) for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "types": by_type,
    }


def _as_json(checkpoint: Checkpoint, listed: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "path": checkpoint.path,
        "header": _header(checkpoint),
        "metadata": checkpoint.metadata,
        "side_files": {name: len(content) for name, content in checkpoint.files.items()},
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "file": tensor.source.path,
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
            }
            for tensor in listed
        ],
        "placeholders": {name: list(shape) for name, shape in checkpoint.placeholders.items()},
        "totals": _totals(list(checkpoint.tensors.values())),
        "warnings": checkpoint.warnings,
    }


def _print(checkpoint: Checkpoint, listed: Sequence[Tensor]) -> None:
    import os

    from converters.commands.tables import print_table

    for warning in checkpoint.warnings:
        print(printable(f"warning: {warning}"))
    print(printable(checkpoint.path))
    header = _header(checkpoint)
    files = header.pop("files", {})
    header |= {os.path.basename(file): f"{size} bytes" for file, size in files.items()}
    print_table(("header", "value"), [(printable(name), _short(value)) for name, value in header.items()])
    print()
    rows = [(printable(name), _short(value)) for name, value in checkpoint.metadata.items()]
    print_table(("metadata", "value"), rows)
    print()
    sizes = [(printable(name), len(content)) for name, content in checkpoint.files.items()]
    print_table(("side file", "bytes"), sizes, right=(1,))
    print()
    several = len(checkpoint.sources) > 1
    tensors = [
        (
            printable(tensor.name),
            tensor.dtype.name,
            "x".join(map(str, tensor.shape)) or "scalar",
            tensor.offset,
            tensor.nbytes,
            *([printable(os.path.basename(tensor.source.path))] if several else []),
        )
        for tensor in listed
    ]
    columns = ("tensor", "type", "shape", "offset", "bytes", *(["file"] if several else []))
    print_table(columns, tensors, right=(3, 4))
    for name, shape in checkpoint.placeholders.items():
        print(f"{printable(name)} {list(shape)} has no data: it stands for the embedding")
    print()
    totals = _totals(listed)
    types = ", ".join(f"{count} {name}" for name, count in totals["types"].items())
    print(f"{totals['tensors']} tensors ({types}), {totals['elements']} elements, {totals['bytes']} bytes")


def _short(value: Any) -> str:
    """Returns a value on one line, long ones abbreviated."""
    import json

    if isinstance(value, list) and len(value) > 8:
        text = f"{len(value)} items: " + json.dumps(value[:8], ensure_ascii=False)[:-1] + ", ...]"
    elif isinstance(value, dict) and len(str(value)) > _SHOWN_CHARACTERS:
        text = f"{len(value)} keys: {', '.join(map(str, value))}"
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"
    return printable(text)
