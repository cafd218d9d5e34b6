"""`show`: what a checkpoint holds: header, metadata, side files, tensors."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.errors import counted, printable

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint
    from apr_jax.converters.checkpoint.tensor import Tensor
    from apr_jax.converters.inspect import html_report
    from apr_jax.converters.inspect.statistics import Statistics

_SHOWN_CHARACTERS = 100
_EPILOG = """\
examples:
  %(prog)s model.apr
  %(prog)s hf_folder --stats --tensors 'model.layers.0.*'
  %(prog)s model.apr --html report.html

exit codes: 0 done, 2 usage, 3 file not found, 4 broken container, 5 refused, 7 input or output failed, 70
internal error, 130 interrupted
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(
        program, "Print what a checkpoint holds: header, metadata, side files and tensors.", _EPILOG
    )
    parser.add_argument("path", metavar="MODEL", help=arguments.MODEL)
    parser.add_argument("--tensors", metavar="GLOB", default="*", help="list only tensors whose name matches")
    parser.add_argument(
        "--stats", action="store_true", help="read every value and print mean, deviation, extremes, zeros, NaN, ..."
    )
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page, with statistics and checks")
    arguments.add(parser, "--force", help="replace a page that exists")
    arguments.add(parser, "--json", help="print everything as one JSON object, metadata unabbreviated")
    arguments.add(parser.add_argument_group("opening checkpoints"), *arguments.OF_CHECKPOINTS)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line; argv[0] is the program's name."""
    return parser_of(argv[0]).parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from apr_jax.converters.errors import UsageError

    with cli.open_from(args, args.path) as checkpoint:
        listed = [tensor for name, tensor in checkpoint.tensors.items() if fnmatch.fnmatchcase(name, args.tensors)]
        if not listed and args.tensors != "*":
            raise UsageError(
                f"no tensor's name matches {args.tensors}",
                code="glob-matches-nothing",
                file=args.path,
                hint="Without --tensors all are listed; * stands for anything",
            )
        found = None
        if args.html is not None:
            found = _write_page(checkpoint, listed, args.html, args.force)
        elif args.stats:
            found = _measure(listed)
        if args.json:
            cli.print_json(_as_json(checkpoint, listed, found))
        elif args.html is None or args.stats:
            _print(checkpoint, listed, found)
    return 0


def _measure(listed: Sequence[Tensor]) -> dict[str, Statistics | str]:
    """Returns name -> statistics, or words that say why there are none."""
    from apr_jax.converters.commands.progress import bar_of
    from apr_jax.converters.errors import RefusedError
    from apr_jax.converters.inspect import statistics

    found: dict[str, Statistics | str] = {}
    with bar_of(sum(tensor.nbytes for tensor in listed)) as progress:
        for tensor in listed:
            try:
                found[tensor.name] = statistics.measure(tensor, progress)
            except RefusedError:
                found[tensor.name] = "not decoded"
    return found


def _write_page(
    checkpoint: Checkpoint, listed: Sequence[Tensor], path: str, force: bool
) -> dict[str, Statistics | str]:
    """Writes the page, unless the output is refused, and returns the statistics in it."""
    import sys

    from apr_jax.converters.inspect import html_report, page
    from apr_jax.converters.storage.output import check_target

    sources = checkpoint.paths
    # Before minutes are spent on reading.
    check_target(path, force=force, sources=sources)
    found = _measure(listed)
    content = html_report.render(_page(checkpoint, listed, found))
    page.write(path, content, force=force, sources=sources, notice=cli.say)
    print(f"wrote {printable(path)}: {counted(len(listed), 'tensor')}, {len(content)} bytes", file=sys.stderr)
    return found


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
        "eras": list(checkpoint.apr.eras),
    }


def _totals(tensors: Sequence[Tensor]) -> dict[str, Any]:
    from apr_jax.converters.formats import dtypes

    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype.name] = by_type.get(tensor.dtype.name, 0) + 1
    return {
        "tensors": len(tensors),
        "elements": sum(dtypes.element_count(tensor.shape) for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "types": by_type,
    }


def _as_json(
    checkpoint: Checkpoint, listed: Sequence[Tensor], found: Mapping[str, Statistics | str] | None
) -> dict[str, Any]:
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
            | ({} if found is None else {"statistics": _statistics_json(found[tensor.name])})
            for tensor in listed
        ],
        "placeholders": {name: list(shape) for name, shape in checkpoint.placeholders.items()},
        "totals": _totals(list(checkpoint.tensors.values())),
        "warnings": checkpoint.warnings,
    }


def _statistics_json(found: Statistics | str) -> dict[str, Any] | None:
    return None if isinstance(found, str) else found.to_json()


def _page(checkpoint: Checkpoint, listed: Sequence[Tensor], found: Mapping[str, Statistics | str]) -> html_report.Page:
    from apr_jax.converters.inspect import html_report
    from apr_jax.converters.inspect.checks import inspect

    measured = {name: statistics for name, statistics in found.items() if not isinstance(statistics, str)}
    header = {name: _short(value) for name, value in _header(checkpoint).items()}
    totals = _totals(listed)
    checks = inspect(checkpoint, measured=measured)
    failed = sum(check.passed is False for check in checks)
    return html_report.Page(
        path=checkpoint.path,
        summary={
            "tensors": f"{totals['tensors']:,}",
            "elements": f"{totals['elements']:,}",
            "bytes": f"{totals['bytes']:,}",
            "types": ", ".join(f"{count} {name}" for name, count in totals["types"].items()) or "none",
            "checks": f"{failed} failed" if failed else "passed",
        },
        header=header,
        metadata={name: _short(value) for name, value in checkpoint.metadata.items()},
        side_files={name: len(content) for name, content in checkpoint.files.items()},
        checks=checks,
        tensors=[
            html_report.TensorRow(tensor.name, tensor.dtype.name, tensor.shape, tensor.nbytes, found[tensor.name])
            for tensor in listed
        ],
        placeholders=checkpoint.placeholders,
    )


def _print(checkpoint: Checkpoint, listed: Sequence[Tensor], found: Mapping[str, Statistics | str] | None) -> None:
    from apr_jax.converters.commands.tables import print_table

    for warning in checkpoint.warnings:
        print(printable(f"warning: {warning}"))
    print(printable(checkpoint.path))
    header = _header(checkpoint)
    files = header.pop("files", {})
    header |= {_within(checkpoint, file): f"{size} bytes" for file, size in files.items()}
    print_table(("header", "value"), [(printable(name), _short(value)) for name, value in header.items()])
    print()
    rows = [(printable(name), _short(value)) for name, value in checkpoint.metadata.items()]
    print_table(("metadata", "value"), rows)
    print()
    sizes = [(printable(name), len(content)) for name, content in checkpoint.files.items()]
    print_table(("side file", "bytes"), sizes, right=(1,))
    print()
    if found is None:
        _print_tensors(checkpoint, listed)
    else:
        _print_statistics(listed, found)
    for name, shape in checkpoint.placeholders.items():
        print(f"{printable(name)} {list(shape)} has no data: it stands for the embedding")
    print()
    totals = _totals(listed)
    types = ", ".join(f"{count} {name}" for name, count in totals["types"].items())
    print(f"{totals['tensors']} tensors ({types}), {totals['elements']} elements, {totals['bytes']} bytes")


def _within(checkpoint: Checkpoint, file: str) -> str:
    """Returns a file's name: within the folder, where it is one (a prepared checkpoint has folders in it)."""
    import os

    return os.path.relpath(file, checkpoint.path) if os.path.isdir(checkpoint.path) else os.path.basename(file)


def _print_tensors(checkpoint: Checkpoint, listed: Sequence[Tensor]) -> None:
    from apr_jax.converters.commands.tables import print_table

    several = len(checkpoint.sources) > 1
    rows = [
        (
            *_description(tensor),
            tensor.offset,
            tensor.nbytes,
            *([printable(_within(checkpoint, tensor.source.path))] if several else []),
        )
        for tensor in listed
    ]
    columns = ("tensor", "type", "shape", "offset", "bytes", *(["file"] if several else []))
    print_table(columns, rows, right=(3, 4))


def _print_statistics(listed: Sequence[Tensor], found: Mapping[str, Statistics | str]) -> None:
    from apr_jax.converters.commands.tables import print_table

    columns = ("mean", "std", "min", "max", "zeros", "NaN", "Inf", "in [0.5, 4)", "dead rows")
    rows = []
    for tensor in listed:
        values = found[tensor.name]
        cells = (values, *[""] * (len(columns) - 1)) if isinstance(values, str) else _cells(values)
        rows.append((*_description(tensor), *cells))
    print_table(("tensor", "type", "shape", *columns), rows, right=range(3, 3 + len(columns)))


def _description(tensor: Tensor) -> tuple[str, str, str]:
    return printable(tensor.name), tensor.dtype.name, "x".join(map(str, tensor.shape)) or "scalar"


def _cells(found: Statistics) -> tuple[object, ...]:
    moments = (f"{value:.4g}" for value in (found.mean, found.std, found.minimum, found.maximum))
    dead = found.dead_rows if found.rows else ""
    return *moments, found.zeros, found.nans, found.infs, f"{found.relabel_share:.2%}", dead


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
