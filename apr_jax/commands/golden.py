"""Write reference logits and stages of a model, or compare a model with such a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.commands import golden_optimizer, meshes, processes
from apr_jax.converters.commands import arguments, cli, tables
from apr_jax.converters.commands.progress import telling
from apr_jax.converters.errors import RefusedError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from apr_jax.converters.checkpoint.checkpoint import Checkpoint
    from apr_jax.trace.compare import Comparison
    from apr_jax.trace.golden import Golden
    from apr_jax.trace.inputs import Inputs

DEFAULT_BATCH, DEFAULT_LENGTH = 2, 64
_WORST_SHOWN = 24
_DTYPES = ("bfloat16", "float32", "float64")  # the coarsest first

_EPILOG = """\
examples:
  %(prog)s model.apr -o golden.safetensors --hidden-states     reference values, 2 x 64 seeded tokens
  %(prog)s hf_folder -o golden.safetensors --reference hf      the same from HuggingFace (extra: reference)
  %(prog)s model.apr -o dump --to aprt --trace --prompt "What is 2+2?"
                                                               every stage as APRT files, as `apr trace` writes them
  %(prog)s model.apr --check golden.safetensors                recompute with the file's inputs and compare
  %(prog)s model.apr --check dump/                             the same with a dump of another engine
  %(prog)s model.apr --export-inputs inputs/                   token ids and positions as plain files, for an engine
  %(prog)s model.apr --optimizer adamw --lr 1e-4 --steps 3 -o after.safetensors   parameters after 3 steps
  %(prog)s model.apr --optimizer adamw --lr 1e-4 --steps 3 --check theirs.safetensors
                                                               name what is wrong with another engine's parameters

exit codes: 0 fine, 1 outside the bars, 2 usage, 3 file not found, 4 broken container, 5 refused, 7 I/O failed, 70
internal error, 130 interrupted
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help=arguments.MODEL)
    mode = parser.add_argument_group("what to do (one of these)").add_mutually_exclusive_group(required=True)
    mode.add_argument("-o", "--output", metavar="OUT", help="golden file, or folder of APRT files, to write")
    mode.add_argument("--check", metavar="GOLDEN", help="golden file or APRT folder to compare with")
    mode.add_argument(
        "--export-inputs",
        metavar="DIR",
        help="folder to write input_ids, attention_mask and position_ids to, as raw integers and as JSON",
    )
    parser.add_argument(
        "--to",
        choices=("safetensors", "aprt"),
        help="format to write: a safetensors file, or a folder of APRT files, which needs --trace (default: aprt if OUT"
        " is a folder or ends with /)",
    )
    parser.add_argument(
        "--reference", choices=("jax", "hf"), default="jax", help="implementation to compute with (default: jax)"
    )
    arguments.add_device(parser)
    processes.add(parser)
    arguments.add_dtype(parser, _DTYPES[1:] + _DTYPES[:1], "type of weights and computation")
    tokens = parser.add_argument_group("tokens (at most one of these)").add_mutually_exclusive_group()
    tokens.add_argument(
        "--input-ids", metavar="FILE", help="JSON list of lists of token ids, a golden file, or a folder of inputs"
    )
    tokens.add_argument("--prompt", metavar="TEXT", action="append", help="text to tokenize (repeatable)")
    parser.add_argument("--hidden-states", action="store_true", help="also store the input of every layer")
    parser.add_argument("--trace", action="store_true", help="also store every stage")
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="also store the gradients of the loss, with --trace those of stages too",
    )
    golden_optimizer.add_arguments(parser)
    arguments.add(parser, "--json", "--force")
    arguments.add_opening(parser)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    processes.check(parser, args)
    golden_optimizer.check_arguments(parser, args)
    if args.to and (args.output is None or args.optimizer):
        parser.error("--to says what -o writes of a model's values: leave it out")
    if args.optimizer:
        return args
    if args.check and (args.hidden_states or args.trace or args.gradients or args.prompt or args.force):
        parser.error(
            "--check takes everything from GOLDEN: leave out --prompt, --hidden-states, --trace, --gradients, --force"
        )
    if args.mesh is not None and (args.reference == "hf" or args.export_inputs):
        parser.error("--mesh is for what JAX computes: leave --reference hf and --export-inputs out")
    if args.export_inputs and (args.hidden_states or args.trace or args.gradients):
        parser.error("--export-inputs computes nothing: leave --hidden-states, --trace and --gradients out")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    with processes.joined(args):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from apr_jax.converters.checkpoint.hub import located
    from apr_jax.generate import compilation_cache

    compilation_cache.enable()
    args.model = located(args.model)
    if args.export_inputs is not None:
        return _export(args)
    if args.optimizer is not None:
        with cli.open_dense_from(args, args.model) as checkpoint:
            inputs = _inputs(args, checkpoint, batch=DEFAULT_BATCH)
            inputs.check_vocabulary(checkpoint.model_config().vocab_size)
        return (golden_optimizer.make if args.check is None else golden_optimizer.check)(args, inputs, _labels(args))
    return _check(args) if args.check is not None else _make(args)


# --- Writing ---------------------------------------------------------------------------------------------------------


def _make(args: argparse.Namespace) -> int:
    from apr_jax.converters.storage.output import check_target
    from apr_jax.trace import aprt, golden, stages
    from apr_jax.trace.inputs import paths_of

    named_folder = args.output.endswith(os.sep) or os.path.isdir(args.output)
    as_dump = args.to == "aprt" if args.to else named_folder
    if named_folder and not as_dump:
        raise UsageError(
            "a safetensors file cannot be a folder", code="golden-folder", found=args.output, hint="Name a file."
        )
    if as_dump and args.gradients:
        raise UsageError("a folder of APRT files holds no gradients", code="aprt-gradients", hint="Name a file.")
    if as_dump and not args.trace:
        raise UsageError("a folder of APRT files holds stages", code="aprt-trace", hint="Add --trace.")
    with cli.open_dense_from(args, args.model) as checkpoint:
        sources = [*checkpoint.paths, *paths_of(args.input_ids)]
        # Before minutes are spent on computing.
        check_target(args.output, folder=aprt.DUMP if as_dump else None, force=args.force, sources=sources)
        config = checkpoint.model_config()
        cli.say_warnings(checkpoint)
        inputs = _inputs(args, checkpoint, batch=1 if as_dump else DEFAULT_BATCH)
        inputs.check_vocabulary(config.vocab_size)
        with telling("computing"):
            made = _compute(args, checkpoint, inputs, _labels(args))
    summary = golden.summary(made.values[stages.LOGITS], inputs, config)
    if not processes.is_first():
        return 0
    if as_dump:
        written = {key: value for key, value in made.values.items() if not stages.Key(key).is_hidden}
        aprt.write(args.output, inputs, written, force=args.force, sources=sources, notice=cli.say)
    else:
        written = dict(made.values)
        golden.write(args.output, made, force=args.force, sources=sources, notice=cli.say)
    if args.json:
        cli.print_json(
            {"output": args.output, "tensors": len(written), "loss": summary, "metadata": dict(made.metadata)}
        )
    else:
        rows, length = inputs.input_ids.shape
        cli.show(
            f"{args.output}: {len(made.values)} tensors of {rows} x {length} positions, {inputs.tokens} of them tokens"
        )
        if summary:
            print(_loss_line(summary))
    return 0


def _export(args: argparse.Namespace) -> int:
    from apr_jax.trace import inputs

    with cli.open_dense_from(args, args.model) as checkpoint:
        # One sequence, as most engines run: the first row of what a golden file is made from by default.
        batch = _inputs(args, checkpoint, batch=1)
        batch.check_vocabulary(checkpoint.model_config().vocab_size)
        sources = [*checkpoint.paths, *inputs.paths_of(args.input_ids)]
    inputs.write_plain(args.export_inputs, batch, force=args.force, sources=sources, notice=cli.say)
    rows, length = batch.input_ids.shape
    if args.json:
        cli.print_json({"output": args.export_inputs, "shape": [rows, length], "tokens": batch.tokens})
    else:
        cli.show(f"{args.export_inputs}: {rows} x {length} positions, {batch.tokens} of them tokens")
    return 0


def _labels(args: argparse.Namespace) -> np.ndarray | None:
    """Returns the labels that come with the inputs: those of a golden file."""
    from apr_jax.trace import golden

    if args.input_ids is None or not args.input_ids.endswith(".safetensors"):
        return None
    return golden.read(args.input_ids).labels


def _compute(args: argparse.Namespace, checkpoint: Checkpoint, inputs: Inputs, labels: np.ndarray | None) -> Golden:
    from apr_jax.trace import golden

    counted = None if labels is None else labels != golden.IGNORED
    values, device, precision = (_run_hf if args.reference == "hf" else _run_jax)(args, checkpoint, inputs, counted)
    witness = {"hf": "huggingface", "jax": "jax"}[args.reference]
    config = checkpoint.model_config()
    metadata = golden.provenance(checkpoint, config, witness, args.dtype, device, precision)
    return golden.Golden(inputs, golden.stored(values), metadata, labels=labels)


def _run_jax(
    args: argparse.Namespace, checkpoint: Checkpoint, inputs: Inputs, counted: np.ndarray | None
) -> tuple[dict[str, np.ndarray], str, str]:
    from apr_jax.load.load_model import load_model
    from apr_jax.trace import golden, stages

    model = load_model(checkpoint, args.dtype, meshes.placement(args, args.device))
    layers = model.config.num_layers
    keys: set[str] = set(stages.trace_keys(layers)) if args.trace else {stages.LOGITS}
    if args.hidden_states:
        keys |= set(stages.hidden_sources(layers).values())
    trace = model.trace(inputs, keys)
    values = {key: trace[key] for key in trace if args.trace or key == stages.LOGITS}
    if args.hidden_states:
        hidden = golden.with_hidden_states(trace, layers)
        values |= {key: hidden[key] for key in hidden if stages.Key(key).is_hidden}
    if args.gradients:
        from apr_jax.model.gradients import gradients

        values |= gradients(model, inputs, counted, with_stages=args.trace)[1]
    return values, f"{model.device.platform} ({model.device.device_kind})", "dots HIGHEST, no excess precision"


def _run_hf(
    args: argparse.Namespace, checkpoint: Checkpoint, inputs: Inputs, counted: np.ndarray | None
) -> tuple[dict[str, np.ndarray], str, str]:
    from apr_jax.converters.checkpoint.dense import is_computed
    from apr_jax.converters.checkpoint.naming import check_names
    from apr_jax.trace import hf_reference

    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    check_names(checkpoint.path, checkpoint.model_config(), shapes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint.path
        if checkpoint.kind != "safetensors" or not os.path.isdir(folder) or is_computed(checkpoint):
            from apr_jax.converters.convert.plan import make_plan
            from apr_jax.converters.convert.run import run

            folder = os.path.join(scratch, "hf")
            run(make_plan(checkpoint, folder, to="safetensors", dequantise=True))
        # Its three casts to float32 would leave float64 a name (and give NaN behind padding on the left).
        whole = hf_reference.float64_patched() if args.dtype == "float64" else contextlib.nullcontext()
        with whole:
            values = hf_reference.run(
                folder,
                inputs.input_ids,
                inputs.attention_mask,
                inputs.position_ids,
                dtype=args.dtype,
                hidden_states=args.hidden_states,
                trace=args.trace,
                device=args.device,
            )
            if args.gradients:
                values |= _hf_gradients(args, checkpoint, folder, inputs, counted)
    precision = "eager attention" + (", casts to float32 removed" if args.dtype == "float64" else "")
    return values, args.device, precision


def _hf_gradients(
    args: argparse.Namespace, checkpoint: Checkpoint, folder: str, inputs: Inputs, counted: np.ndarray | None
) -> dict[str, np.ndarray]:
    from apr_jax.trace import hf_reference, stages
    from apr_jax.trace.positions import predicted_pairs

    predicted = predicted_pairs(inputs, counted)
    batch = (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
    _, found = hf_reference.gradients(folder, *batch, predicted, args.dtype, args.trace, args.device)
    return {stages.GRADIENT + key: value for key, value in found.items()}


def _inputs(args: argparse.Namespace, checkpoint: Checkpoint, batch: int) -> Inputs:
    from apr_jax.trace import golden, inputs

    if args.input_ids is not None:
        return golden.read_inputs(args.input_ids)
    if args.prompt:
        return inputs.Inputs.of(_encode(checkpoint, args.prompt))
    return inputs.seeded(checkpoint.model_config().vocab_size, batch, DEFAULT_LENGTH)


def _encode(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[list[int]]:
    from apr_jax.generate import tokenizer_files
    from apr_jax.generate.tokenizer import Tokenizer

    tokenizer = Tokenizer.of(checkpoint)
    if tokenizer is None:
        raise tokenizer_files.missing(checkpoint.path)
    for warning in tokenizer.warnings:
        cli.warn(warning)
    return [tokenizer.encode(prompt) for prompt in prompts]


# --- Checking --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Report:
    comparisons: Sequence[Comparison]
    ours: dict[str, Any] | None
    theirs: dict[str, Any] | None
    warnings: Sequence[str]

    @property
    def within(self) -> bool:
        return all(comparison.within for comparison in self.comparisons)


def _check(args: argparse.Namespace) -> int:
    report = _compare(args)
    for warning in report.warnings:
        cli.warn(warning)
    if args.json:
        cli.print_json(
            {
                "within": report.within,
                "compared": len(report.comparisons),
                "elements": sum(comparison.elements for comparison in report.comparisons),
                "tensors": [comparison.to_json() for comparison in report.comparisons],
                "ours": report.ours,
                "theirs": report.theirs,
                "warnings": list(report.warnings),
            }
        )
    else:
        _print_report(report)
    return 0 if report.within else cli.EXIT_DIFFERS


def _compare(args: argparse.Namespace) -> _Report:
    from apr_jax.trace import compare, golden, stages
    from apr_jax.trace.positions import find_columns

    with cli.open_dense_from(args, args.model) as checkpoint:
        config = checkpoint.model_config()
        reference = _reference(args, checkpoint)
        inputs = reference.inputs
        inputs.check_vocabulary(config.vocab_size)
        warnings = checkpoint.warnings + _warnings(reference, checkpoint)
        columns = None if reference.positions is None else find_columns(reference.positions, inputs)
        with telling("computing again"):
            ours = _recompute(args, args.dtype, reference)
            comparisons = compare.compare(ours, reference.values, inputs, _bar(args, reference), columns, config)
    ours_summary, theirs_summary = (
        golden.summary(values.get(stages.LOGITS), inputs, config) for values in (ours, reference.values)
    )
    return _Report(comparisons, ours_summary, theirs_summary, warnings)


def _bar(args: argparse.Namespace, reference: Golden) -> Callable[[str], float]:
    """Returns what each tensor's relative L2 may be, by the coarser of the two sides' dtypes."""
    from apr_jax.trace import compare, tolerances
    from apr_jax.trace.stages import Key

    theirs = reference.metadata.get("dtype", "float32")
    if theirs not in _DTYPES:
        raise RefusedError(
            "the golden file was computed in an unknown dtype",
            code="golden-dtype",
            found=theirs,
            hint="Write it again: `golden MODEL -o FILE`",
        )
    coarser = min(args.dtype, theirs, key=_DTYPES.index)
    has_gradients = any(Key(key).is_gradient for key in reference.values)
    own: dict[str, float] = {}
    if coarser == "bfloat16" or has_gradients:
        fine_dtype = "float64" if has_gradients else "float32"
        coarse, fine = (_recompute(args, dtype, reference) for dtype in (coarser, fine_dtype))
        own = {c.key: c.relative_l2 for c in compare.compare(coarse, fine, reference.inputs, bar=lambda key: 0.0)}

    def bar(key: str) -> float:
        if Key(key).is_gradient:
            return tolerances.gradient(coarser, own[key])
        if coarser == "bfloat16":
            return tolerances.bfloat16(own[key])
        return tolerances.relative_l2(coarser, reference.inputs.input_ids.shape[1])

    return bar


def _reference(args: argparse.Namespace, checkpoint: Checkpoint) -> Golden:
    from apr_jax.trace import aprt, golden

    given = _inputs(args, checkpoint, batch=1) if args.input_ids else None
    if os.path.isdir(args.check):
        inputs, values = aprt.read(args.check, checkpoint.model_config(), given)
        if unknown := aprt.unknown_files(args.check, checkpoint.model_config()):
            cli.warn(f"not compared, no stage of this model: {', '.join(unknown[:8])}")
        return golden.Golden(inputs, values, {})
    if given is not None:
        raise UsageError("a golden file brings its own inputs", code="input-ids", hint="Leave --input-ids out.")
    return golden.read(args.check)


def _recompute(args: argparse.Namespace, dtype: str, reference: Golden) -> dict[str, np.ndarray]:
    from apr_jax.trace.stages import Key

    settings = argparse.Namespace(**vars(args) | {"dtype": dtype})
    keys = [Key(key) for key in reference.values]
    settings.trace = any(key.is_inner or (key.is_gradient and not key.of_parameter) for key in keys)
    settings.hidden_states = any(key.is_hidden for key in keys)
    settings.gradients = any(key.is_gradient for key in keys)
    with cli.open_dense_from(args, args.model) as checkpoint:
        run = _run_hf if args.reference == "hf" else _run_jax
        values, _, _ = run(settings, checkpoint, reference.inputs, reference.counted)
    return values


def _warnings(reference: Golden, checkpoint: Checkpoint) -> list[str]:
    from apr_jax.trace import golden

    recorded = reference.metadata.get("weights_sha256")
    if recorded is not None and recorded != golden.weights_sha256(checkpoint):
        return ["the golden file was made from other weights than this model's (dtype, shape or bytes)"]
    return []


def _print_report(report: _Report) -> None:
    worst = sorted(report.comparisons, key=lambda c: (c.within, -_share(c)))[:_WORST_SHOWN]
    shown = [comparison for comparison in report.comparisons if comparison in worst]
    headers = ["tensor", "max abs", "rel L2", "bar", "cosine", "KL", "top-1", "top-5", ""]
    tables.print_table(headers, [_row(comparison) for comparison in shown], right=range(1, 8))
    if hidden := len(report.comparisons) - len(shown):
        print(f"... and {hidden} more, within their bars and farther from them than those above")
    for name, summary in (("ours", report.ours), ("theirs", report.theirs)):
        if summary:
            print(f"{name + ':':8}{_loss_line(summary)}")
    outside = sum(not comparison.within for comparison in report.comparisons)
    total = sum(comparison.elements for comparison in report.comparisons)
    verdict = "agree: every tensor is within its bar" if report.within else f"differ: {outside} outside the bar"
    print(f"{len(report.comparisons)} tensors, {total} elements compared; {verdict}")


def _row(c: Comparison) -> list[str]:
    logits = c.logits
    of_logits = [] if logits is None else [f"{logits.kl_max:.1e}", f"{logits.top1:.3f}", f"{logits.top5:.3f}"]
    verdict = ("ok" if c.within else "OUTSIDE") + (f" ({c.note})" if c.note else "")
    numbers = [f"{c.max_abs:.2e}", f"{c.relative_l2:.2e}", f"{c.bar:.0e}", f"{c.cosine:.9f}"]
    return [c.key, *numbers, *(of_logits or ["", "", ""]), verdict]


def _share(comparison: Comparison) -> float:
    share = comparison.relative_l2 / comparison.bar if comparison.bar else float("inf")
    return share if share == share else float("inf")


def _loss_line(summary: dict[str, Any]) -> str:
    return (
        f"loss {summary['loss_nats']:.6f} nats = {summary['loss_bits']:.6f} bits a token"
        f" (uniform: {summary['uniform_nats']:.6f} nats = {summary['uniform_bits']:.6f} bits)"
    )
