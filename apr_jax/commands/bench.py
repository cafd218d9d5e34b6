"""Measure how fast a model runs, beside its peers and beside what the machine can do."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from apr_jax.converters.commands import arguments, cli

_EPILOG = """\
MODEL is a shape, 0.5b, 1.5b or 7b, which gets random weights, or a checkpoint.

cases:
  prefill-BxT  B prompts of T tokens go through the model; logits of the last ones
  decode-BxS   a token for each of B rows, S tokens before it
  start-up     whole processes, to the first token: compilation cache empty, then filled (needs a checkpoint, or writes
               one of the shape to --scratch)

Peers, where they are installed: HuggingFace on the same arrays, as it is and through torch.compile with a static
cache; on a CPU llama.cpp (llama-cpp-python and gguf; one row; bf16 and Q4_K_M of the same weights), and the genuine apr
where $APR_BIN names it (one row, short prompt). A shape has its matrices in bfloat16 there, computed in float32, beside
float32 ones and Q4_K; APR_JAX_CPU_KERNELS=off leaves float32 alone. The limit is the larger of arithmetic at
the rate of a large product of matrices and bytes (weights and cache once) at the rate of a large copy or sum, both
measured in the same run. Contestants take turns. A turn makes calls back to back and waits for the last; on CUDA the
median turn counts, on a CPU, which others use as well, the fastest.

examples:
  %(prog)s 0.5b                             on the CPU, float32
  %(prog)s 7b --device cuda --dtype bf16 --cases decode-1x128,prefill-4x2048 -o 7b.json
  %(prog)s model.apr --cases start-up --json

exit codes: 0 fine, 1 apr_jax and HuggingFace do not compute the same, 2 usage, 3 file not found, 4 broken container, 5
refused, 7 I/O failed, 70 internal error,
130 interrupted
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="0.5b, 1.5b, 7b, or a checkpoint: path or OWNER/NAME")
    parser.add_argument("--cases", metavar="LIST", help="comma-separated; default: a set for the device")
    arguments.add_device(parser)
    arguments.add(parser, "--mesh")
    arguments.add_dtype(parser, ("float32", "bfloat16"), "type of weights and computation")
    parser.add_argument("--no-peers", action="store_true", help="measure apr_jax and the machine's limits alone")
    parser.add_argument(
        "--compiled",
        metavar="LIST",
        help="cases that HuggingFace is compiled for (default: all on CUDA, none on a CPU)",
    )
    parser.add_argument("--seconds", metavar="S", type=float, help="start no case after S seconds")
    parser.add_argument("--quick", action="store_true", help="one short turn each, as a smoke test")
    parser.add_argument("--scratch", metavar="DIR", help="folder for checkpoints made for a shape (default: /tmp)")
    arguments.add(parser, "--ignore-config")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the results as JSON, after every case")
    parser.add_argument("--svg", metavar="FILE", help="draw the roofline picture")
    arguments.add(parser, "--force", "--json")
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    if args.mesh is not None and "start-up" in (args.cases or "").split(","):
        parser.error("start-up measures processes of one device: leave it or --mesh out")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    # Peers use the same GPU; JAX would take three quarters of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from apr_jax.bench import report, roofline, session
    from apr_jax.converters.checkpoint.hub import located
    from apr_jax.converters.storage import output

    args.model = located(args.model)
    sources = _sources(args)
    for path in filter(None, (args.output, args.svg)):
        output.check_target(path, force=args.force, sources=sources)

    def write(path: str, text: str) -> None:
        # What an earlier case left, or what --force was said of.
        with output.atomic_file(path, len(text.encode()), force=True, sources=sources, notice=cli.say) as file:
            file.write_at(text.encode(), 0)

    def keep(results: dict[str, Any]) -> None:
        if args.output:
            write(args.output, cli.json_text(results) + "\n")

    def say(line: str) -> None:
        (cli.say if args.json else cli.show)(line)
        sys.stdout.flush()

    results = session.run(_settings(args), say, keep)
    if args.json:
        cli.print_json(results)
    else:
        for table in (report.cases(results), report.start_up(results)):
            if table:
                say("\n" + report.text(table))
    if args.svg and results["cases"]:
        write(args.svg, roofline.svg(results))
    return 0 if session.agrees(results) else cli.EXIT_DIFFERS


def _sources(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the files that the model consists of; a shape has none."""
    from apr_jax.bench import session
    from apr_jax.converters.checkpoint.openers import open_checkpoint

    if args.model in session.SHAPES:
        return ()
    with open_checkpoint(args.model, ignore_config=args.ignore_config) as checkpoint:
        return checkpoint.paths


def _settings(args: argparse.Namespace) -> Any:
    from apr_jax.bench import session
    from apr_jax.bench.cases import ALL, CPU, Case

    cuda = args.device.startswith("cuda")
    names = args.cases.split(",") if args.cases else [case.name for case in (ALL if cuda else CPU)]
    cases = tuple(Case.parse(name) for name in names if name != session.START_UP)
    compiled = cases if cuda else ()
    if args.compiled is not None:
        compiled = tuple(Case.parse(name) for name in args.compiled.split(",") if name)
    return session.Settings(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        cases=cases,
        start_up=session.START_UP in names,
        peers=not args.no_peers,
        compiled=compiled,
        seconds=args.seconds,
        quick=args.quick,
        scratch=args.scratch,
        ignore_config=tuple(args.ignore_config),
        mesh=args.mesh,
    )
