"""Find where another forward pass of the same checkpoint departs from the right one, and name the mistake."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.commands import meshes, processes
from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.commands.progress import telling
from apr_jax.converters.errors import MissingFileError, RefusedError, UsageError

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.adapters import LowRank
    from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
    from apr_jax.model.language_model import LanguageModel
    from apr_jax.parity.diagnose import Diagnosis
    from apr_jax.parity.dumps import Dump
    from apr_jax.parity.findings import Finding
    from apr_jax.trace.inputs import Inputs

_SIDES = ("cpu", "cuda", "hf")
_COMPUTED = ("float32", "bfloat16", "float16")
_EPILOG = """\
examples:
  %(prog)s model.apr --right dump/                     a dump of your engine (docs/dumps.md) and the model in JAX
  %(prog)s model.apr --right golden.safetensors        a golden file with stages (golden --trace)
  %(prog)s model.apr --left cpu --right cuda           both backends in one process
  %(prog)s model/ --right hf                           HuggingFace transformers (extra: reference)
  %(prog)s model.apr --right steps/ --positions 64-71  rows of eight decoding steps; the token ids are those of 0-71
  %(prog)s model.apr --right gradients.safetensors --backward
                                                       gradients of parameters (torch's .grad), and of stages if given

Every stage is recomputed in float64 from the other side's own inputs, so that a mistake shows up where it is made,
and stacked mistakes show up one by one. How much rounding may do is measured on the left side, in the other side's
dtype. --explain-format lists the dumps that can be read; docs/dumps.md says more. In Python, a dump of a PyTorch or
Flax model is two lines: `with apr_jax.capture.torch(model, "dump/"): model(input_ids)`.

exit codes: 0 equal or rounding, 1 a mistake, 2 usage, 3 file not found, 4 broken container, 5 refused, 7 I/O failed,
70 internal error,
130 interrupted
"""


class _ExplainFormat(argparse.Action):
    """Answers as --help does, whatever else is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from apr_jax.parity import dumps

        print(dumps.explain(parser.prog))
        parser.exit()


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help=arguments.MODEL)
    parser.add_argument(
        "--right",
        metavar="cpu|cuda|hf|DUMP",
        required=True,
        help="the forward pass to examine: a device, HuggingFace, or a dump",
    )
    parser.add_argument(
        "--left", choices=("cpu", "cuda"), default="cpu", help="device on which rounding is measured (default: cpu)"
    )
    processes.add(parser)
    arguments.add(
        parser,
        "--dtype",
        choices=_COMPUTED,
        default=None,
        help="type that --right cpu, cuda and hf compute in: float32, bfloat16 or float16 (default: float32)",
    )
    parser.add_argument(
        "--right-dtype",
        metavar="DTYPE",
        type=arguments.dtype,
        choices=(*_COMPUTED, "float64"),
        help="type that the dump was computed in (default: what the dump says, or inferred from its values)",
    )
    parser.add_argument(
        "--input-ids",
        metavar="FILE",
        help="tokens that were run: a JSON list of lists, a golden file, or a folder of golden --export-inputs",
    )
    parser.add_argument(
        "--positions",
        metavar="LIST|FILE",
        help="positions that the dump holds, if not all: 64-71 or 0,64-71, both ends included, or a JSON file",
    )
    parser.add_argument(
        "--backward", action="store_true", help="also examine the dump's gradients, of parameters and of stages"
    )
    parser.add_argument(
        "--explain-format", action=_ExplainFormat, nargs=0, help="print which dumps can be read, and exit"
    )
    parser.add_argument(
        "--check-upload", action="store_true", help="read every parameter back from the device and compare it"
    )
    parser.add_argument(
        "--budget",
        metavar="[STAGE=]FACTOR",
        action="append",
        default=[],
        help="multiply every budget, or one stage's, by FACTOR; the answer says so",
    )
    parser.add_argument("--html", metavar="FILE", help="also write the answer as one self-contained page")
    arguments.add(parser, "--force", help="replace a page that exists")
    arguments.add(parser, "--json")
    arguments.add_opening(parser)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    processes.check(parser, args)
    try:
        args.widened = _widened(args.budget)
    except ValueError as error:
        parser.error(f"--budget: {error}")
    computed = args.right in _SIDES
    if args.backward and computed:
        parser.error("--backward is for dumps; `golden --gradients` writes one")
    if args.backward and args.positions is not None:
        parser.error("--backward needs values of all positions: leave --positions out")
    for given, applies, to in (
        ("dtype", computed, "--right cpu, cuda and hf; a dump's is --right-dtype"),
        ("right_dtype", not computed, "dumps; for --right cpu, cuda and hf it is --dtype"),
        ("positions", not computed, "dumps"),
    ):
        if getattr(args, given) is not None and not applies:
            parser.error(f"--{given.replace('_', '-')} is for {to}")
    return args


def _widened(given: Sequence[str]) -> dict[str, float]:
    """Stage -> how many times its budget is applied, one where it is not named; ValueError says what is wrong."""
    from apr_jax.trace.stages import LAYER_STAGES

    known = ("embedding", *LAYER_STAGES, "final_norm", "logits")
    every, single = {}, {}
    for text in given:
        stage, equals, number = text.rpartition("=")
        if equals and stage not in known:
            raise ValueError(f"no stage is called {stage!r}; they are {', '.join(known)}")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf:
            raise ValueError(f"{number!r} is not a positive number")
        if equals:
            single[stage] = factor
        else:
            every = dict.fromkeys(known, factor)
    return every | single


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    with processes.joined(args):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from apr_jax.converters.checkpoint.hub import located
    from apr_jax.converters.inspect import page
    from apr_jax.converters.storage.output import check_target
    from apr_jax.generate import compilation_cache
    from apr_jax.model.parameters import DTYPES
    from apr_jax.parity import excerpts
    from apr_jax.parity.localise import infer_dtype

    compilation_cache.enable()
    args.model = located(args.model)
    with cli.open_dense_from(args, args.model) as checkpoint:
        config = checkpoint.model_config()
        cli.say_warnings(checkpoint)
        sources = [*checkpoint.paths, *_files(args.right)]
    if args.html is not None:
        # Before minutes are spent on what goes into it.
        check_target(args.html, force=args.force, sources=sources)
    dump = _right(args, config)
    dump.inputs.check_vocabulary(config.vocab_size)
    dtype = args.right_dtype or dump.dtype or infer_dtype(dump.values or dump.gradients)
    if dtype not in DTYPES:
        raise UsageError(
            "a dump of this dtype cannot be judged",
            code="dtype",
            file=args.right,
            found=dtype,
            hint="Say with --right-dtype which dtype to judge it as.",
        )
    with telling("loading the model") as tell:
        # Excerpts of a long sequence are many: they are judged where rounding is.
        exact = _load(args, "float64", args.left if excerpts.needed(config, dump.inputs) else "cpu")
        same = _load(args, dtype, args.left)
        tell("running the model")
        if dump.summaries and not dump.values and not dump.gradients:
            answer, show = _of_summaries(args, dump, exact, same), _print_summaries
        else:
            answer, show = _of_values(args, dump, exact, same, tell), _print
    answer["sides"] = _sides(args, dump, same)
    if args.html is not None and processes.is_first():
        from apr_jax.parity import web_page

        page.write(args.html, web_page.render(answer), force=args.force, sources=sources, notice=cli.say)
    if args.json:
        cli.print_json(answer)
    else:
        show(answer)
    return cli.EXIT_DIFFERS if answer["verdict"] == "mistake" else 0


def _of_values(
    args: argparse.Namespace, dump: Dump, exact: LanguageModel, same: LanguageModel, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Judges a dump of values."""
    from apr_jax.parity.diagnose import diagnose, nothing
    from apr_jax.parity.report import report

    notes = _notes(args, dump, exact)
    dump, of_ranks = _put_together(dump, exact, same.dtype)
    if dump.values:
        diagnosis = diagnose(exact, same, dump.inputs, dump.values, dump.columns, tell, args.widened)
    else:
        diagnosis = nothing(exact, dump.inputs, same.dtype)
    if dump.ranks:
        from apr_jax.parity import ranks

        alone = (ranks.attributed(finding, dump.ranks, exact.config) for finding in diagnosis.findings)
        diagnosis = dataclasses.replace(diagnosis, findings=(*of_ranks, *alone))
    diagnosis = _without_expected(args, diagnosis, notes)
    if args.check_upload:
        diagnosis = _with_upload(args, same.dtype, diagnosis, notes)
    answer = report(diagnosis, dump, exact, notes)
    if args.backward:
        answer = _with_gradients(args, answer, diagnosis, dump, exact, same, tell)
    if answer["logits"] is not None:
        answer["logits"] |= _texts(args, answer["logits"])
    return answer


def _with_gradients(
    args: argparse.Namespace,
    answer: dict[str, Any],
    diagnosis: Diagnosis,
    dump: Dump,
    exact: LanguageModel,
    same: LanguageModel,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Judges the dump's gradients, too: of the backward pass that follows the forward pass as it was found to be."""
    from apr_jax.parity.backward.diagnose import diagnose_backward, undumped_values
    from apr_jax.parity.report import with_gradients

    if diagnosis.replay is None or dump.columns is not None:
        raise RefusedError(
            "the gradients of this dump cannot be examined",
            code="backward",
            file=args.right,
            found="layers in another order, a long sequence judged by excerpts, or values of some positions only",
            expected="values of all positions of a batch, the layers in their order",
            hint="Without --backward the forward pass alone is examined",
        )
    counted = None if dump.labels is None else dump.labels >= 0
    adapter = _low_rank(args, dump)
    back = diagnose_backward(
        diagnosis.replay,
        diagnosis.explained,
        dump.gradients,
        counted,
        same.dtype,
        undumped_values(same, diagnosis.replay),
        adapter,
        tell,
    )
    return with_gradients(answer, back, exact)


def _low_rank(args: argparse.Namespace, dump: Dump) -> dict[str, LowRank]:
    """What the adapter adds to each weight; refuses a dump of an adapter's gradients that does not fit it."""
    from apr_jax.converters.checkpoint.adapters import low_rank_parts

    given = {key: dump.gradients[key].shape for key in dump.gradients if ".lora_" in key}
    if given and len(args.adapter) != 1:
        raise UsageError(
            "the dump holds gradients of an adapter",
            code="adapter",
            file=args.right,
            found=next(iter(given)),
            hint="Name the one adapter that was trained: --adapter DIR.",
        )
    parts = low_rank_parts(args.adapter[0]) if given else {}
    for key, shape in given.items():
        name, _, side = key.removeprefix("grad.").partition(".lora_")
        expected = None if name not in parts else (parts[name].a if side == "A" else parts[name].b).shape
        if shape != expected:
            raise UsageError(
                "a gradient does not fit the adapter",
                code="adapter",
                file=args.right,
                tensor=key,
                found=list(shape),
                expected="no such matrix" if expected is None else list(expected),
            )
    return parts


def _texts(args: argparse.Namespace, logits: dict[str, Any]) -> dict[str, str | None]:
    """The texts of the worst token and of the one that it was to follow; none without a tokenizer."""
    from apr_jax.converters.errors import AprJaxError
    from apr_jax.generate.tokenizer import Tokenizer

    with cli.open_dense_from(args, args.model) as checkpoint:
        try:
            tokenizer = Tokenizer.of(checkpoint)
        except AprJaxError:  # says nothing about the logits
            tokenizer = None
    wanted = {"worst_text": logits["worst_token"], "worst_input_text": (logits["worst"] or {}).get("input_id", -1)}
    if tokenizer is None or logits["worst"] is None:
        return dict.fromkeys(wanted)
    # A token may be a part of a character.
    return {name: tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for name, token in wanted.items()}


def _files(path: str) -> list[str]:
    """The files of a dump; none of what is computed here."""
    if path in _SIDES:
        return []
    if os.path.isdir(path):
        return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in sorted(names)]
    return [path] if os.path.isfile(path) else []


def _sides(args: argparse.Namespace, dump: Dump, same: LanguageModel) -> dict[str, dict[str, str]]:
    """Where both sides come from: name -> text of each."""
    import importlib.metadata
    import platform

    from apr_jax.trace.positions import shown_positions

    def listed(files: Sequence[str]) -> str:
        sizes = [os.path.getsize(file) for file in files]
        named = ", ".join(map(os.path.basename, files[:_LISTED])) + (", ..." if len(files) > _LISTED else "")
        return f"{len(files)} ({sum(sizes)} bytes): {named}"

    with cli.open_dense_from(args, args.model) as checkpoint:
        types = sorted({tensor.dtype.name for tensor in checkpoint.tensors.values()})
        reference = {
            "checkpoint": checkpoint.path,
            "files": listed(checkpoint.paths),
            "tensors": f"{len(checkpoint.tensors)} ({', '.join(types)})",
        }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    reference |= {
        "computed in": "float64 on the CPU",
        "rounding measured in": f"{same.dtype} on {same.device.platform} ({same.device.device_kind})",
        "versions": ", ".join(f"{name} {v}" for name, v in (versions | {"python": platform.python_version()}).items()),
    }
    files = _files(args.right)
    theirs = {"examined": args.right, "form": dump.form or "computed here"}
    theirs |= {"files": listed(files)} if files else {}
    theirs |= {"dtype declared": dump.dtype or "not said", "judged as": same.dtype, **dump.origin}
    held = "all" if dump.columns is None else shown_positions(dump.inputs, dump.columns)
    rows, length = dump.inputs.input_ids.shape
    theirs |= {
        "tokens": f"{dump.inputs.tokens} in {rows} x {length} positions",
        "positions held": held,
        "stages held": str(len(dump.values or dump.summaries)),
    }
    return {"reference": reference, "theirs": theirs}


def _put_together(dump: Dump, exact: LanguageModel, dtype: str) -> tuple[Dump, list[Finding]]:
    """Puts the stages of tensor-parallel ranks together as they should have been, and says what was wrong."""
    from apr_jax.parity import ranks

    if not dump.ranks:
        return dump, []
    values, findings = ranks.judge(exact, dump.inputs, dump.ranks, dump.columns, dtype)
    return dataclasses.replace(dump, values=values), findings


def _of_summaries(args: argparse.Namespace, dump: Dump, exact: LanguageModel, same: LanguageModel) -> dict[str, Any]:
    """Judges a dump that holds a few numbers of each stage only."""
    from apr_jax.parity import summaries
    from apr_jax.parity.report import of_summaries

    if dump.inputs.tokens != dump.inputs.input_ids.size:
        raise UsageError("numbers over padding mean nothing", code="padding", file=args.right, hint="Dump row by row.")
    answer = summaries.judge(exact, same, dump.inputs, dump.summaries, args.widened)
    return of_summaries(answer, dump, same.dtype, args.widened)


def _print_summaries(report: dict[str, Any]) -> None:
    stages, judged = report["compared"]["stages"], report["dtype"] + _budgets_said(report["widened"])
    if not report["first"]:
        print(f"rounding: the numbers of all {stages} stages are those of a right run in {judged}")
        return
    first = report["first"][0]
    print(
        f"mistake: {first['key']} is the first stage that differs; {stages - 1} before it are right, judged as {judged}"
    )
    for one in report["first"]:
        print(
            f"  {one['kind']} {_number(one['theirs'])}, right is {_number(one['right'])}"
            f" (up to {_number(one['allowed'], '.1e')} is rounding)"
        )
    print("  it may be: " + ("; ".join(report["shortlist"]) or "nothing that is known"))
    print("Values tell more than numbers: docs/dumps.md says how to dump them.")


def _number(value: float | None, form: str = ".7g") -> str:
    """A number of the answer, in which None is what is not finite."""
    return "not finite" if value is None else format(value, form)


def _budgets_said(widened: dict[str, float]) -> str:
    """Says which budgets were applied more than once, or less; nothing where rounding alone decides."""
    if not widened:
        return ""
    groups: dict[float, list[str]] = {}
    for stage, factor in widened.items():
        groups.setdefault(factor, []).append(stage)
    said = [
        f"{factor:g} times for {'most stages' if len(stages) > _LISTED else ', '.join(stages)}"
        for factor, stages in groups.items()
    ]
    return f", budgets applied {' and '.join(said)}"


def _load(args: argparse.Namespace, dtype: str, device: str) -> LanguageModel:
    from apr_jax.load.load_model import load_model

    with cli.open_dense_from(args, args.model) as checkpoint:
        if dtype == "float64" and args.coordinator is not None:
            # What is replayed from it each process does on its own, in an order of its own.
            return load_model(checkpoint, dtype, device)
        return load_model(checkpoint, dtype, meshes.placement(args, device))


_LISTED = 4
"""As many files or stages are named in a line."""


def _without_expected(args: argparse.Namespace, diagnosis: Diagnosis, notes: list[str]) -> Diagnosis:
    """Takes out what belongs to a quantised file: engines round activations beside Q4_K weights, by design."""
    from apr_jax.parity.faults.table import FAULTS

    with cli.open_dense_from(args, args.model) as checkpoint:
        quantised = any(tensor.dtype.is_block for tensor in checkpoint.tensors.values())
    by_design = [finding for finding in diagnosis.findings if FAULTS[finding.fault].beside_blocks]
    if not quantised or not by_design:
        return diagnosis
    notes += [f"no mistake beside quantised weights: {finding.sentence}" for finding in by_design]
    findings = tuple(finding for finding in diagnosis.findings if finding not in by_design)
    return dataclasses.replace(
        diagnosis, findings=findings, by_design=frozenset(finding.fault for finding in by_design)
    )


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
        return dumps.read(args.right, config, batch, positions, args.backward)
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
            hint="`convert` makes one.",
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
    if dump.unread:
        notes.append(f"{dump.unread} gradients in the dump were not examined: --backward does that")
    if dump.values and not any(stages.Key(key).is_inner for key in dump.values):
        notes.append(
            "no stages were dumped, only what comes out of all layers: mistakes are looked for in all of them and in"
            " single ones; several that are made in different layers are not named"
        )
    if dump.strangers:
        notes.append(f"not read, no stage of this model: {', '.join(dump.strangers[:8])}")
    if dump.gradients and all(stages.Key(key).of_parameter for key in dump.gradients):
        notes.append(
            "gradients of parameters alone: a mistake is named at the first one that shows it. Gradients of stages show"
            " where it is made (docs/dumps.md)"
        )
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

    from apr_jax.model.sharding import to_host
    from apr_jax.parity.faults.seen import UPLOAD
    from apr_jax.parity.findings import Finding

    device = args.right if args.right in ("cpu", "cuda") else args.left
    there = jax.tree.leaves(_load(args, dtype, device).parameters)
    alone = argparse.Namespace(**vars(args) | {"mesh": None})
    here = jax.tree.leaves(_load(alone, dtype, "cpu").parameters)
    same = sum(to_host(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(there, here, strict=True))
    text = f"upload to {device}: {same} of {len(here)} parameters read back bit for bit"
    notes.append(text)
    if same == len(here):
        return diagnosis
    wrong = Finding(UPLOAD.name, (), "", {"different": len(here) - same}, float("nan"), None, (), "certain", text)
    return dataclasses.replace(diagnosis, findings=(wrong, *diagnosis.findings))


def _print(report: dict[str, Any]) -> None:
    from apr_jax.parity.faults.table import FAULTS
    from apr_jax.parity.localise import STANDINGS

    for note in report["notes"]:
        cli.say(f"note: {note}")
    compared, dtype = report["compared"], report["dtype"]
    standings = [stage["standing"] for stage in report["stages"]]
    mistakes = sum(FAULTS[finding["fault"]].mistake for finding in report["findings"])
    by_design = report["verdict"] != "mistake" and STANDINGS[2] in standings
    words = {
        "equal": "equal: every stage is bit for bit what float64 gives",
        "rounding": f"rounding: every stage is within the budget of {dtype}"
        + (", but for what the file asks for (see the notes)" if by_design else ""),
        "mistake": f"mistake: {mistakes} found",
    }
    print(
        f"{words[report['verdict']]} ({compared['stages']} stages, {compared['elements']} elements,"
        f" {compared['positions']} positions compared, judged as {dtype}{_budgets_said(report['widened'])})"
    )
    counts = [f"{standings.count(standing)} {standing}" for standing in STANDINGS]
    print(f"beside float64 the stages are: {', '.join(counts)}")
    for finding in report["findings"]:
        also = f" [or: {', '.join(finding['alternatives'])}]" if finding["alternatives"] else ""
        cli.show(f"  - {finding['sentence']}{also}")
    if report["unexamined"]:
        shown = ", ".join(report["unexamined"][:6])
        more = f" and {len(report['unexamined']) - 6} more" if len(report["unexamined"]) > 6 else ""
        cli.show(f"not examined on their own: {shown}{more}")
    _print_grid(report["stages"])
    _print_first_wrong(report["first_wrong"])
    if report["logits"]:
        _print_logits(report["logits"])
    _print_gradients(report["stages"])


def _print_gradients(sites: Sequence[dict[str, Any]]) -> None:
    """Layers by gradients, of stages and of parameters: '.' right, 'X' wrong, ' ' not there or not judged."""
    from apr_jax.parity.localise import STANDINGS
    from apr_jax.trace.stages import GRADIENT

    found = [site for site in sites if site["key"].startswith(GRADIENT)]
    if not found:
        return
    marks = {(site["stage"], site["layer"]): "X" if site["standing"] == STANDINGS[2] else "." for site in found}
    layers = sorted({layer for _, layer in marks if layer is not None})
    names = list(dict.fromkeys(stage for stage, _ in marks))
    width = max(map(len, names))
    print(f"\n{'gradients, layer':{width}}    " + " ".join(f"{layer:>2}" for layer in layers))
    for name in names:
        print(
            f"{name:{width}} {marks.get((name, None), ' '):2} "
            + " ".join(f"{marks.get((name, layer), ' '):>2}" for layer in layers)
        )


_LATE = 64
"""A mistake that shows before this position is made from the beginning."""


def _print_first_wrong(first_wrong: Mapping[str, Mapping[str, Any]]) -> None:
    """Where stages are right up to some position far in: which is the first wrong one, stage by stage."""
    if all(where["right_before"] is None or where["position"] < _LATE for where in first_wrong.values()):
        return
    print("\nfirst wrong position (the last right one before it that was dumped)")
    for key, where in first_wrong.items():
        before = "" if where["right_before"] is None else f" ({where['right_before']})"
        row = f"row {where['row']} position " if where["row"] else ""
        print(f"  {key:32} {row}{where['position']}{before}")


def _print_logits(found: dict[str, Any]) -> None:
    """The statistics of `apr parity`, with its limits, and how the ranks agree."""
    print()
    if not found["positions"]:
        print(f"logits: none of {found['not_finite']} positions is finite")
        return
    from apr_jax.converters.errors import counted

    beyond = [name for name, limit in found["limits"].items() if not limit["within"]]
    said = f"beyond apr parity's limits: {', '.join(beyond)}" if beyond else "within all limits of apr parity"
    unfinished = f", {found['not_finite']} more are not finite" if found["not_finite"] else ""
    print(f"logits from the tokens on, {counted(found['positions'], 'position')}{unfinished}: {said}")
    print(
        f"  cosine {_number(found['cosine_min'], '.9f')} or more, KL {_number(found['kl_max'], '.1e')} nats or less,"
        f" max abs {_number(found['max_abs'], '.1e')}, sigma {_number(found['sigma_min'], '.3g')} or more,"
        f" Cpk {_number(found['cpk_min'], '.3g')} or more"
    )
    print(
        f"  in common: top-1 {_number(found['top1'], '.1%')}, top-5 {_number(found['top5'], '.1%')},"
        f" top-10 {_number(found['top10'], '.1%')}; ranks of the top 50 (means):"
        f" Kendall {_number(found['kendall_mean'], '.4f')}, Spearman {_number(found['spearman_mean'], '.4f')}"
    )
    worst, texts = found["worst"], (found["worst_text"], found["worst_input_text"])
    token, after = (f" '{text}'" if text is not None else "" for text in texts)
    cli.show(
        f"  worst: token {found['worst_token']}{token} has {_number(found['worst_judged'], '.6g')}, right is"
        f" {_number(found['worst_reference'], '.6g')}, at row {worst['row']} position {worst['position']}"
        f" (behind token {worst['input_id']}{after})"
    )


def _print_grid(sites: Sequence[dict[str, Any]]) -> None:
    """Layers by stages: '.' right, 'X' wrong, '?' not finite before it already, ' ' not dumped."""
    from apr_jax.parity.localise import STANDINGS
    from apr_jax.trace import stages

    by_key = {site["key"]: site for site in sites}
    layers = sorted({site["layer"] for site in sites if site["layer"] is not None})

    def mark(key: stages.Key) -> str:
        if key not in by_key:
            return " "
        return "?" if not by_key[key]["elements"] else ("X" if by_key[key]["standing"] == STANDINGS[2] else ".")

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
