"""parity: find where another forward pass of the same checkpoint parts from the right one, and name the mistake."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converters.commands import cli
from converters.errors import UsageError

if TYPE_CHECKING:
    from apr_jax.dumps import Dump
    from apr_jax.explain import Diagnosis, Finding
    from apr_jax.inputs import Inputs
    from apr_jax.model import LanguageModel

_SIDES = ("cpu", "cuda", "hf")
_EPILOG = """\
examples:
  parity.py model.apr --right dump/                 a dump of your engine (docs/dumps.md) against the model in JAX
  parity.py model.apr --right golden.safetensors    a golden file with stages (golden.py --trace)
  parity.py model.apr --left cpu --right cuda       both backends in one process
  parity.py model.apr --right hf                    HuggingFace transformers (extra: reference)

Every stage is recomputed in float64 from the other side's own inputs, so that a mistake shows where it is made and
stacked ones show one by one. Rounding is judged by what the left side itself loses in the other side's dtype.

exit codes: 0 equal or rounding, 1 a mistake, 2 usage, 3 file not found, 4 broken container, 5 refused, 7 I/O,
  130 interrupted
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = cli.make_parser(argv[0], __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help="an .apr file, a HuggingFace folder or a .safetensors file")
    parser.add_argument("--left", choices=("cpu", "cuda"), default="cpu", help="where the right values are computed")
    parser.add_argument("--right", metavar="cpu|cuda|hf|DUMP", required=True, help="what is examined")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="for --right cpu, cuda, hf")
    parser.add_argument(
        "--right-dtype",
        choices=("float32", "bfloat16", "float64"),
        help="what the dump was computed in (default: inferred)",
    )
    parser.add_argument("--input-ids", metavar="FILE", help="JSON list of lists of token ids, or a golden file")
    parser.add_argument("--check-upload", action="store_true", help="read every parameter back and compare it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from apr_jax.explain import diagnose
    from apr_jax.localise import infer_dtype
    from apr_jax.model import load_model

    exact = load_model(args.model, "float64", "cpu")
    dump = _right(args, exact)
    dump.inputs.check_vocabulary(exact.config.vocab_size)
    dtype = args.right_dtype or dump.dtype or infer_dtype(dump.values)
    same = load_model(args.model, dtype, args.left)
    notes = _notes(args, dump, exact)
    if args.check_upload:
        notes.append(_check_upload(args, dtype))
    diagnosis = diagnose(exact, same, dump.inputs, dump.values)
    diagnosis = _without_expected(args, diagnosis, notes)
    report = _report(diagnosis, dump, exact, dtype, notes)
    if args.json:
        cli.print_json(report)
    else:
        _print(report, diagnosis)
    return cli.EXIT_DIFFERS if report["verdict"] == "mistake" else 0


def _without_expected(args: argparse.Namespace, diagnosis: Diagnosis, notes: list[str]) -> Diagnosis:
    """Takes out what belongs to a quantised file: engines round activations beside Q4_K weights, by design."""
    from apr_jax.explain import Diagnosis
    from converters.checkpoint import open_checkpoint

    with open_checkpoint(args.model) as checkpoint:
        quantised = any(tensor.dtype.is_block for tensor in checkpoint.tensors.values())
    by_design = [finding for finding in diagnosis.findings if finding.fault == "activations-quantised"]
    if not quantised or not by_design:
        return diagnosis
    notes += [f"no mistake beside quantised weights: {finding.sentence}" for finding in by_design]
    findings = tuple(finding for finding in diagnosis.findings if finding not in by_design)
    return Diagnosis(findings, diagnosis.localisation, frozenset({"activations-quantised"}))


def _right(args: argparse.Namespace, exact: LanguageModel) -> Dump:
    from apr_jax import dumps, golden, inputs

    batch: Inputs | None = None
    if args.input_ids:
        from_golden = args.input_ids.endswith(".safetensors")
        batch = golden.read(args.input_ids).inputs if from_golden else inputs.from_json(args.input_ids)
    if args.right not in _SIDES:
        return dumps.read(args.right, exact.config, batch)
    batch = batch or inputs.seeded(exact.config.vocab_size)
    if args.right == "hf":
        values = _huggingface(args, batch)
    else:
        from apr_jax.model import load_model

        values = golden.stored(load_model(args.model, args.dtype, args.right).trace(batch))
    return dumps.Dump(batch, values, args.dtype)


def _huggingface(args: argparse.Namespace, batch: Inputs) -> dict[str, Any]:
    from apr_jax import hf_reference

    if not os.path.isdir(args.model):
        raise UsageError(
            "--right hf needs a HuggingFace folder",
            code="hf-folder",
            file=args.model,
            hint="Convert it with convert.py.",
        )
    return hf_reference.run(
        args.model, batch.input_ids, batch.attention_mask, batch.position_ids, dtype=args.dtype, trace=True
    )


def _notes(args: argparse.Namespace, dump: Dump, exact: LanguageModel) -> list[str]:
    notes = []
    if int(dump.inputs.positions().max()) == 0:
        notes.append(
            "one token at position 0: RoPE is the identity there, and neither masking nor attention over several keys"
            " is seen. Use at least 64 positions."
        )
    elif dump.inputs.input_ids.shape[1] < 64:
        notes.append(f"only {dump.inputs.input_ids.shape[1]} positions: mistakes that need more of them are not seen")
    if not any(key.startswith("stage.") for key in dump.values):
        notes.append("no stages were dumped: the mistake cannot be named from logits or layer outputs alone yet")
    del args, exact
    return notes


def _check_upload(args: argparse.Namespace, dtype: str) -> str:
    import jax
    import numpy as np

    from apr_jax.model import load_model

    device = args.right if args.right in ("cpu", "cuda") else args.left
    there = jax.tree.leaves(load_model(args.model, dtype, device).parameters)
    here = jax.tree.leaves(load_model(args.model, dtype, "cpu").parameters)
    same = sum(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(there, here, strict=True))
    return f"upload to {device}: {same} of {len(here)} parameters read back bit for bit" + (
        "" if same == len(here) else " - THE UPLOAD IS WRONG"
    )


def _report(diagnosis: Diagnosis, dump: Dump, exact: LanguageModel, dtype: str, notes: Sequence[str]) -> dict[str, Any]:
    from apr_jax import stages

    sites = diagnosis.localisation.sites
    mistakes = [finding for finding in diagnosis.findings if finding.fault != "layout"]
    exactly = all(site.error == 0 for site in sites)
    unexplained = any(site.wrong for site in sites) and not diagnosis.by_design
    verdict = "mistake" if mistakes or unexplained else ("equal" if exactly else "rounding")
    return {
        "verdict": verdict,
        "compared": {
            "stages": len(sites),
            "elements": sum(site.elements for site in sites),
            "positions": dump.inputs.tokens,
        },
        "dtype": dtype,
        "unexamined": [key for key in stages.trace_keys(exact.config.num_layers) if key not in dump.values],
        "findings": [_to_json(finding) for finding in diagnosis.findings],
        "notes": list(notes),
    }


def _to_json(finding: Finding) -> dict[str, Any]:
    values = dataclasses.asdict(finding)
    values["parameters"] = {k: list(v) if isinstance(v, tuple) else v for k, v in finding.parameters.items()}
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _print(report: dict[str, Any], diagnosis: Diagnosis) -> None:
    for note in report["notes"]:
        print(f"note: {note}", file=sys.stderr)
    compared = report["compared"]
    words = {
        "equal": "equal: every stage is bit for bit what float64 gives",
        "rounding": f"rounding: every stage is as right as {report['dtype']} can be",
        "mistake": f"mistake: {len(report['findings'])} found",
    }
    print(
        f"{words[report['verdict']]} ({compared['stages']} stages, {compared['elements']} elements,"
        f" {compared['positions']} positions compared, judged as {report['dtype']})"
    )
    for finding in report["findings"]:
        also = f" [or: {', '.join(finding['alternatives'])}]" if finding["alternatives"] else ""
        print(f"  - {finding['sentence']}{also}")
    if report["unexamined"]:
        shown = ", ".join(report["unexamined"][:6])
        more = f" and {len(report['unexamined']) - 6} more" if len(report["unexamined"]) > 6 else ""
        print(f"not dumped, so not examined on their own: {shown}{more}")
    _print_grid(diagnosis)


def _print_grid(diagnosis: Diagnosis) -> None:
    """Layers by stages: '.' right, 'X' wrong, ' ' not dumped."""
    from apr_jax import stages

    by_key = {site.key: site for site in diagnosis.localisation.sites}
    layers = sorted({site.layer for site in by_key.values() if site.layer is not None})

    def mark(key: str) -> str:
        return " " if key not in by_key else ("X" if by_key[key].wrong else ".")

    names = stages.LAYER_STAGES
    print()
    print(f"embedding {mark(stages.EMBEDDING)}   final_norm {mark(stages.FINAL_NORM)}   logits {mark(stages.LOGITS)}")
    width = max(map(len, names))
    if layers:
        print(f"{'layer':{width}} " + " ".join(f"{layer:>2}" for layer in layers))
    for name in names:
        cells = [f"{mark(stages.layer_key(layer, name)):>2}" for layer in layers]
        if any(cell.strip() for cell in cells):
            print(f"{name:{width}} " + " ".join(cells))
