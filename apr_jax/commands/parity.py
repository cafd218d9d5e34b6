"""parity: find where another forward pass of the same checkpoint parts from the right one, and name the mistake."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.commands import cli
from apr_jax.converters.errors import MissingFileError, UsageError

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
    from apr_jax.model.language_model import LanguageModel
    from apr_jax.parity.diagnose import Diagnosis
    from apr_jax.parity.dumps import Dump
    from apr_jax.parity.findings import Finding
    from apr_jax.trace.inputs import Inputs

_SIDES = ("cpu", "cuda", "hf")
_EPILOG = """\
examples:
  parity.py model.apr --right dump/                 a dump of your engine (docs/dumps.md) against the model in JAX
  parity.py model.apr --right golden.safetensors    a golden file with stages (golden.py --trace)
  parity.py model.apr --left cpu --right cuda       both backends in one process
  parity.py model/ --right hf                       HuggingFace transformers (extra: reference)
  parity.py model.apr --right steps/ --positions 64-71
                                                    rows of eight decoding steps; the token ids are those of 0-71

Every stage is recomputed in float64 from the other side's own inputs, so that a mistake shows where it is made and
stacked ones show one by one. Rounding is judged by what the left side itself loses in the other side's dtype.
--explain-format lists the dumps that are read, ours and those of others: docs/dumps.md. In Python, a dump of a PyTorch
or Flax model is two lines: `with apr_jax.capture.torch(model, "dump/"): model(input_ids)`.

exit codes: 0 equal or rounding, 1 a mistake, 2 usage, 3 file not found, 4 broken container, 5 refused, 7 I/O,
  130 interrupted
"""


class _ExplainFormat(argparse.Action):
    """Answers as --help does, whatever else is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from apr_jax.parity import dumps

        print(dumps.explain())
        parser.exit()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = cli.make_parser(argv[0], __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help=cli.CHECKPOINT_HELP)
    parser.add_argument("--right", metavar="cpu|cuda|hf|DUMP", required=True, help="what is examined")
    parser.add_argument(
        "--left", choices=("cpu", "cuda"), default="cpu", help="where rounding is measured (default: cpu)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of --right cpu, cuda and hf (default: float32)"
    )
    parser.add_argument(
        "--right-dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="what the dump was computed in (default: what it says, else inferred from its values)",
    )
    parser.add_argument(
        "--input-ids",
        metavar="FILE",
        help="tokens that were run: a JSON list of lists, a golden file, or a folder of golden.py --export-inputs",
    )
    parser.add_argument(
        "--positions",
        metavar="LIST|FILE",
        help="positions whose rows the dump holds, where it does not hold all: 64-71 or 0,64-71, both ends included,"
        " or a JSON file",
    )
    parser.add_argument("--explain-format", action=_ExplainFormat, nargs=0, help="print which dumps are read, and exit")
    parser.add_argument("--check-upload", action="store_true", help="read every parameter back and compare it")
    cli.add_checkpoint_arguments(parser)
    cli.add_adapter_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv[1:])
    computed = args.right in _SIDES
    for given, applies, to in (
        ("dtype", computed, "--right cpu, cuda and hf; a dump's is --right-dtype"),
        ("right_dtype", not computed, "dumps; for --right cpu, cuda and hf it is --dtype"),
        ("positions", not computed, "dumps"),
    ):
        if getattr(args, given) is not None and not applies:
            parser.error(f"--{given.replace('_', '-')} is for {to}")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from apr_jax.converters.checkpoint.hub import located
    from apr_jax.generate import compilation_cache
    from apr_jax.model.parameters import DTYPES
    from apr_jax.parity import excerpts
    from apr_jax.parity.diagnose import diagnose
    from apr_jax.parity.localise import infer_dtype

    compilation_cache.enable()
    args.model = located(args.model)
    with cli.open_dense_from(args, args.model) as checkpoint:
        config = checkpoint.model_config()
        cli.say_warnings(checkpoint)
    dump = _right(args, config)
    dump.inputs.check_vocabulary(config.vocab_size)
    # Excerpts of a long sequence are many: they are judged where rounding is.
    exact = _load(args, "float64", args.left if excerpts.needed(config, dump.inputs) else "cpu")
    dtype = args.right_dtype or dump.dtype or (infer_dtype(dump.values) if dump.values else "float32")
    if dtype not in DTYPES:
        raise UsageError(
            "dumps of this dtype cannot be judged",
            code="dtype",
            file=args.right,
            found=dtype,
            hint="Say with --right-dtype as what it shall be judged.",
        )
    same = _load(args, dtype, args.left)
    if dump.summaries and not dump.values:
        return _summaries(args, dump, exact, same)
    notes = _notes(args, dump, exact)
    dump, of_ranks = _put_together(dump, exact)
    diagnosis = diagnose(exact, same, dump.inputs, dump.values, dump.columns, _told())
    diagnosis = dataclasses.replace(diagnosis, findings=(*of_ranks, *diagnosis.findings))
    diagnosis = _without_expected(args, diagnosis, notes)
    if args.check_upload:
        diagnosis = _with_upload(args, dtype, diagnosis, notes)
    report = _report(diagnosis, dump, exact, dtype, notes)
    if args.json:
        cli.print_json(report)
    else:
        _print(report, diagnosis)
    return cli.EXIT_DIFFERS if report["verdict"] == "mistake" else 0


def _put_together(dump: Dump, exact: LanguageModel) -> tuple[Dump, list[Finding]]:
    """Puts the stages of tensor-parallel ranks together as they should have been, and says what was wrong."""
    from apr_jax.parity import ranks

    if not dump.ranks:
        return dump, []
    values, findings = ranks.judge(exact, dump.inputs, dump.ranks, dump.columns)
    return dataclasses.replace(dump, values=values), findings


def _summaries(args: argparse.Namespace, dump: Dump, exact: LanguageModel, same: LanguageModel) -> int:
    """Judges a dump that holds a few numbers of each stage only."""
    from apr_jax.parity import summaries

    if dump.inputs.tokens != dump.inputs.input_ids.size:
        raise UsageError("numbers over padding mean nothing", code="padding", file=args.right, hint="Dump row by row.")
    answer = summaries.judge(exact, same, dump.inputs, dump.summaries)
    report = {
        "verdict": "mistake" if answer.differences else "rounding",
        "compared": {
            "stages": len(answer.compared),
            "numbers": sum(len(dump.summaries[k].numbers) for k in answer.compared),
        },
        "dtype": same.dtype,
        "first": [dataclasses.asdict(difference) for difference in answer.differences],
        "shortlist": list(answer.shortlist),
    }
    if args.json:
        cli.print_json(report)
    elif not answer.differences:
        print(f"rounding: the numbers of all {len(answer.compared)} stages are those of a right run in {same.dtype}")
    else:
        first = answer.differences[0]
        print(f"mistake: {first.key} is the first stage that differs; {len(answer.compared) - 1} before it are right")
        for one in answer.differences:
            print(f"  {one.kind} {one.theirs:.7g}, right is {one.right:.7g} (up to {one.allowed:.1e} is rounding)")
        print("  it may be: " + ("; ".join(answer.shortlist) or "nothing that is known"))
        print("Values tell more than numbers: docs/dumps.md says how to dump them.")
    return cli.EXIT_DIFFERS if answer.differences else 0


def _load(args: argparse.Namespace, dtype: str, device: str) -> LanguageModel:
    from apr_jax.load.load_model import load_model

    with cli.open_dense_from(args, args.model) as checkpoint:
        return load_model(checkpoint, dtype, device)


_FIRST, _BETWEEN = 5.0, 5.0
"""Seconds before the first word of progress, and from one to the next."""


def _told() -> Callable[[str], None]:
    """Returns what says on stderr what is going on: not at once, and not often."""
    due = time.monotonic() + _FIRST

    def say(text: str) -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            due = now + _BETWEEN
            cli.say(f"... {text}")

    return say


def _without_expected(args: argparse.Namespace, diagnosis: Diagnosis, notes: list[str]) -> Diagnosis:
    """Takes out what belongs to a quantised file: engines round activations beside Q4_K weights, by design."""
    from apr_jax.parity.diagnose import Diagnosis
    from apr_jax.parity.faults.table import FAULTS

    with cli.open_dense_from(args, args.model) as checkpoint:
        quantised = any(tensor.dtype.is_block for tensor in checkpoint.tensors.values())
    by_design = [finding for finding in diagnosis.findings if FAULTS[finding.fault].beside_blocks]
    if not quantised or not by_design:
        return diagnosis
    notes += [f"no mistake beside quantised weights: {finding.sentence}" for finding in by_design]
    findings = tuple(finding for finding in diagnosis.findings if finding not in by_design)
    return Diagnosis(findings, diagnosis.localisation, frozenset(finding.fault for finding in by_design))


def _right(args: argparse.Namespace, config: Qwen2Config) -> Dump:
    """Reads or computes what is examined."""
    from apr_jax.parity import dumps
    from apr_jax.trace import golden, inputs
    from apr_jax.trace.positions import parse_positions

    batch = golden.read_inputs(args.input_ids) if args.input_ids else None
    if args.right not in _SIDES:
        if not os.path.exists(args.right):
            raise MissingFileError(
                "no such dump",
                code="file-missing",
                file=args.right,
                expected=f"{', '.join(_SIDES)}, a file or a folder",
            )
        positions = None if args.positions is None else parse_positions(args.positions)
        return dumps.read(args.right, config, batch, positions)
    batch = batch or inputs.seeded(config.vocab_size)
    batch.check_vocabulary(config.vocab_size)
    dtype = args.dtype or "float32"
    if args.right == "hf":
        values = _huggingface(args, batch, dtype)
    else:
        values = golden.stored(_load(args, dtype, args.right).trace(batch))
    return dumps.Dump(batch, values, dtype)


def _huggingface(args: argparse.Namespace, batch: Inputs, dtype: Any) -> dict[str, Any]:
    from apr_jax.trace import hf_reference

    if not os.path.isdir(args.model):
        raise UsageError(
            "--right hf needs a HuggingFace folder",
            code="hf-folder",
            file=args.model,
            hint="Convert it with convert.py.",
        )
    return hf_reference.run(
        args.model, batch.input_ids, batch.attention_mask, batch.position_ids, dtype=dtype, trace=True
    )


def _notes(args: argparse.Namespace, dump: Dump, exact: LanguageModel) -> list[str]:
    """What the reader of the answer has to know: what this comparison cannot see."""
    from apr_jax.trace import golden, stages
    from apr_jax.trace.positions import shown_positions

    notes, length = [], int(dump.inputs.positions().max()) + 1
    if length == 1:
        notes.append(
            "one token at position 0: RoPE is the identity there, and neither masking nor attention over several keys"
            " is seen. Use at least 64 positions."
        )
    elif length < 64:
        notes.append(f"only {length} positions: mistakes that need more of them are not seen")
    if dump.columns is not None:
        notes.append(
            f"only positions {shown_positions(dump.inputs, dump.columns)} were dumped: what earlier ones left in the"
            " cache of keys and values is taken to be right but for the mistakes that are found, and was not examined"
        )
    if not any(stages.Key(key).is_inner for key in dump.values):
        notes.append(
            "no stages were dumped, only what comes out of all layers: mistakes are looked for in all of them and in"
            " single ones; several that are made in different layers are not named"
        )
    if dump.strangers:
        notes.append(f"not read, no stage of this model: {', '.join(dump.strangers[:8])}")
    if beyond := set(dump.values) - set(stages.trace_keys(exact.config.num_layers)):
        notes.append(f"the dump has a layer more than the model ({len(beyond)} stages)")
    if dump.weights_sha256 is not None:
        with cli.open_dense_from(args, args.model) as checkpoint:
            if golden.weights_sha256(checkpoint) != dump.weights_sha256:
                notes.append("the golden file was made from other weights than this model's (dtype, shape or bytes)")
    return notes


def _with_upload(args: argparse.Namespace, dtype: str, diagnosis: Diagnosis, notes: list[str]) -> Diagnosis:
    """Reads every parameter back from the device; one that differs is a finding."""
    import jax
    import numpy as np

    from apr_jax.parity.faults.seen import UPLOAD
    from apr_jax.parity.findings import Finding

    device = args.right if args.right in ("cpu", "cuda") else args.left
    there = jax.tree.leaves(_load(args, dtype, device).parameters)
    here = jax.tree.leaves(_load(args, dtype, "cpu").parameters)
    same = sum(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(there, here, strict=True))
    text = f"upload to {device}: {same} of {len(here)} parameters read back bit for bit"
    notes.append(text)
    if same == len(here):
        return diagnosis
    wrong = Finding(UPLOAD.name, (), "", {"different": len(here) - same}, float("nan"), None, (), "certain", text)
    return dataclasses.replace(diagnosis, findings=(wrong, *diagnosis.findings))


def _report(diagnosis: Diagnosis, dump: Dump, exact: LanguageModel, dtype: str, notes: Sequence[str]) -> dict[str, Any]:
    from apr_jax.parity.faults.table import FAULTS

    sites = [site for site in diagnosis.localisation.sites if site.elements]
    mistakes = [finding for finding in diagnosis.findings if FAULTS[finding.fault].mistake]
    exactly = all(site.error == 0 for site in sites)
    unexplained = any(site.wrong for site in sites) and not diagnosis.by_design
    verdict = "mistake" if mistakes or unexplained else ("equal" if exactly else "rounding")
    return {
        "verdict": verdict,
        "compared": {
            "stages": len(sites),
            "elements": sum(site.elements for site in sites),
            "positions": _compared_positions(diagnosis, dump),
        },
        "dtype": dtype,
        "unexamined": _unexamined(diagnosis, dump, exact),
        "findings": [_to_json(finding) for finding in diagnosis.findings],
        "first_wrong": _first_wrong(diagnosis, dump),
        "notes": list(notes),
    }


def _first_wrong(diagnosis: Diagnosis, dump: Dump) -> dict[str, dict[str, Any]]:
    """Each wrong stage -> its first wrong position, and the last one before that was dumped and so is right."""
    import numpy as np

    from apr_jax.trace.positions import dumped_tokens

    found: dict[str, dict[str, Any]] = {}
    for site in diagnosis.localisation.sites:
        if not site.wrong or site.first is None:
            continue
        row, column = site.first
        tokens = dumped_tokens(dump.inputs, diagnosis.localisation.columns.get(site.key))[row]
        before, positions = np.flatnonzero(tokens[:column]), dump.inputs.position_ids[row]
        last = int(positions[before[-1]]) if len(before) else None
        found[site.key] = {"row": row, "position": int(positions[column]), "right_before": last}
    return found


def _compared_positions(diagnosis: Diagnosis, dump: Dump) -> int:
    """The number of positions of which some stage was compared."""
    import numpy as np

    from apr_jax.trace.positions import dumped_tokens

    partial, seen = diagnosis.localisation.columns, np.zeros(dump.inputs.input_ids.shape, bool)
    for site in diagnosis.localisation.sites:
        if site.elements:
            seen = seen | dumped_tokens(dump.inputs, partial.get(site.key))
    return int(seen.sum())


def _unexamined(diagnosis: Diagnosis, dump: Dump, exact: LanguageModel) -> list[str]:
    """Stages that were not dumped, or only behind a value that is not finite; positions that were not dumped."""
    import numpy as np

    from apr_jax.trace import stages
    from apr_jax.trace.positions import shown_positions

    judged = {site.key for site in diagnosis.localisation.sites if site.elements}
    keys: list[str] = [key for key in stages.trace_keys(exact.config.num_layers) if key not in judged]
    if dump.columns is None:
        return keys
    others = np.delete(np.arange(dump.inputs.input_ids.shape[1]), np.unique(dump.columns))
    missing = shown_positions(dump.inputs, np.tile(others, (len(dump.columns), 1)))
    return [*keys, f"positions {missing}"] if missing else keys


def _to_json(finding: Finding) -> dict[str, Any]:
    values = dataclasses.asdict(finding)
    values["parameters"] = {k: list(v) if isinstance(v, tuple) else v for k, v in finding.parameters.items()}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _print(report: dict[str, Any], diagnosis: Diagnosis) -> None:
    from apr_jax.parity.faults.table import FAULTS

    for note in report["notes"]:
        cli.say(f"note: {note}")
    compared, dtype = report["compared"], report["dtype"]
    mistakes = sum(FAULTS[finding["fault"]].mistake for finding in report["findings"])
    words = {
        "equal": "equal: every stage is bit for bit what float64 gives",
        "rounding": f"rounding: every stage is as right as {dtype} can be"
        + (", but for what the file asks for (see the notes)" if diagnosis.by_design else ""),
        "mistake": f"mistake: {mistakes} found",
    }
    print(
        f"{words[report['verdict']]} ({compared['stages']} stages, {compared['elements']} elements,"
        f" {compared['positions']} positions compared, judged as {dtype})"
    )
    for finding in report["findings"]:
        also = f" [or: {', '.join(finding['alternatives'])}]" if finding["alternatives"] else ""
        cli.show(f"  - {finding['sentence']}{also}")
    if report["unexamined"]:
        shown = ", ".join(report["unexamined"][:6])
        more = f" and {len(report['unexamined']) - 6} more" if len(report["unexamined"]) > 6 else ""
        cli.show(f"not examined on their own: {shown}{more}")
    _print_grid(diagnosis)
    _print_first_wrong(report["first_wrong"], len(set(diagnosis.localisation.columns)) > 0)


_LATE = 64
"""A mistake that shows before this position is made from the beginning."""


def _print_first_wrong(first_wrong: Mapping[str, Mapping[str, Any]], partial: bool) -> None:
    """Where stages are right up to some position far in: which is the first wrong one, stage by stage."""
    if all(where["right_before"] is None or where["position"] < _LATE for where in first_wrong.values()):
        return
    print("\nfirst wrong position" + (" (the last right one before it that was dumped)" if partial else ""))
    for key, where in first_wrong.items():
        before = "" if where["right_before"] is None or not partial else f" ({where['right_before']})"
        row = f"row {where['row']} position " if where["row"] else ""
        print(f"  {key:32} {row}{where['position']}{before}")


def _print_grid(diagnosis: Diagnosis) -> None:
    """Layers by stages: '.' right, 'X' wrong, '?' not finite before it already, ' ' not dumped."""
    from apr_jax.trace import stages

    by_key = {site.key: site for site in diagnosis.localisation.sites}
    layers = sorted({site.layer for site in by_key.values() if site.layer is not None})

    def mark(key: stages.Key) -> str:
        if key not in by_key:
            return " "
        return "?" if not by_key[key].elements else ("X" if by_key[key].wrong else ".")

    names = stages.LAYER_STAGES
    print()
    print(f"embedding {mark(stages.EMBEDDING)}   final_norm {mark(stages.FINAL_NORM)}   logits {mark(stages.LOGITS)}")
    width = max(map(len, names))
    if layers:
        print(f"{'layer':{width}} " + " ".join(f"{layer:>2}" for layer in layers))
    for name in names:
        cells = [f"{mark(stages.Key.of(layer, name)):>2}" for layer in layers]
        if any(cell.strip() for cell in cells):
            print(f"{name:{width}} " + " ".join(cells))
