"""`make_sample NAME -o DIR`: write a seeded Qwen2 checkpoint as a HuggingFace folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.commands.progress import telling

_EPILOG = """\
The weights are random, with the statistics of Qwen2.5-Coder-0.5B; the same name and seed give the same bytes
everywhere. The tokenizer is a working byte-level BPE with a chat template; what the model says is noise.

examples:
  %(prog)s --list
  %(prog)s gqa_tied_bf16 -o /tmp/tiny
  %(prog)s qwen2_0.5b -o /tmp/qwen2 --seed 1
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, "Write a seeded Qwen2 checkpoint as a HuggingFace folder.", _EPILOG)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which checkpoint; --list names them")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights (default: 0)")
    parser.add_argument(
        "--tokenizer",
        choices=("small", "full"),
        help="283 entries, or 151,643 and 22 added tokens (default: full for the published shapes)",
    )
    parser.add_argument("--list", action="store_true", help="list the names and sizes")
    arguments.add(parser, "--force", "--json")
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    if not args.list and (args.name is None or args.output is None):
        parser.error("NAME and -o DIR are needed (or --list)")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code.

    Raises:
      UsageError: Unknown name, an output that exists, or a tokenizer that does not fit.
      StorageError: The disk.
    """
    from apr_jax.testing import sample

    if args.list:
        _print_list(sample.SAMPLES, args.json)
        return 0
    with telling("writing"):
        written = sample.write_sample(
            args.name, args.output, seed=args.seed, tokenizer=args.tokenizer, force=args.force
        )
    if args.json:
        cli.print_json({"name": args.name, "output": args.output, "seed": args.seed, "files": written})
    else:
        cli.show(
            f"{args.output}: {args.name}, seed {args.seed}, {sum(written.values()):,} bytes in {len(written)} files"
        )
    return 0


def _print_list(samples: Any, as_json: bool) -> None:
    rows = {}
    for name, entry in samples.items():
        config = entry.config
        rows[name] = {
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "tied": config.tie_word_embeddings,
            "dtypes": sorted({entry.matrix_dtype, entry.vector_dtype}),
            "files": entry.shards,
            "weight_bytes": sum(entry.nbytes(tensor) for tensor in config.tensor_shapes()),
        }
    if as_json:
        cli.print_json(rows)
        return
    titles = f"{'name':24}{'hidden':>7}{'layers':>7}{'heads':>8}{'vocab':>8}  {'head':6}{'dtypes':10}"
    print(titles + f"{'files':>6}{'bytes':>16}")
    for name, row in rows.items():
        heads = f"{row['num_heads']}/{row['num_kv_heads']}"
        tied = "tied" if row["tied"] else "own"
        print(
            f"{name:24}{row['hidden_size']:>7}{row['num_layers']:>7}{heads:>8}{row['vocab_size']:>8}  {tied:6}"
            f"{'+'.join(row['dtypes']):10}{row['files']:>6}{row['weight_bytes']:>16,}"
        )
