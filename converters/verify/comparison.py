"""Whether two checkpoints hold the same weights: names and shapes, bytes, values, closeness; and what happened if not.

A is the original, B the one in question. Both are streamed: memory does not grow with their size. Where bytes are
equal nothing is decoded; where they are not, values are compared, so that an exact cast is known for what it is; and
where values differ, `diagnosis.search` looks for the cause.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint.decoded import ADAPTER, DecodedTensor
from apr_jax.converters.checkpoint.naming import Naming, recognise
from apr_jax.converters.checkpoint.packed_forms import dense_view, packed_forms
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD
from apr_jax.converters.checkpoint.tied_heads import same_values
from apr_jax.converters.convert import streaming
from apr_jax.converters.errors import BrokenContainerError, FindingError, counted
from apr_jax.converters.formats import dtypes
from apr_jax.converters.verify.configurations import Difference, compare_configurations
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.findings import Finding
from apr_jax.converters.verify.side_files import SideFileDifference, compare_side_files
from apr_jax.converters.verify.tensor_pairs import (
    CLOSE,
    DIFFERENT,
    EQUAL_VALUES,
    IDENTICAL,
    VERDICTS,
    Meter,
    Pair,
    Progress,
    TensorComparison,
    compare_bytes,
    compare_values,
    in_threads,
)

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint

EXACT_CAST = "exact-cast"
DIFFERENT_WEIGHTS = "different-weights"


@dataclasses.dataclass(frozen=True)
class Counts:
    """What was compared: tensors that both sides have, their elements, and their bytes in A."""

    tensors: int
    elements: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
      compared: How much was compared.
      tensors: Every tensor that both sides have, by name.
      only_in_a, only_in_b: Names; a head that equals its side's embedding is not listed.
      findings: What happened, worst first.
      metadata_differences: What the configurations disagree about.
      side_files: What tokenizer, chat template and generation settings disagree about, and what is broken.
      notes: What else is worth a line.
      naming: How B's names differ from A's, where they follow rules; tensors are called as in A.
    """

    compared: Counts
    tensors: tuple[TensorComparison, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    findings: tuple[Finding, ...]
    metadata_differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    naming: Naming | None = None
    side_files: tuple[SideFileDifference, ...] = ()

    @property
    def weights(self) -> str:
        """One of `VERDICTS`, the worst of all tensors; comparing nothing is "different"."""
        if self.only_in_a or self.only_in_b or not self.tensors:
            return DIFFERENT
        return max((tensor.verdict for tensor in self.tensors), key=VERDICTS.index)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`: that of the weights, unless something else changes what the model answers."""
        return DIFFERENT if self.answers_differ_by else self.weights

    @property
    def answers_differ_by(self) -> tuple[str, ...]:
        """What changes the answer, beside weights: "configuration", "names", or side files by their names."""
        found = []
        if any(difference.changes_logits for difference in self.metadata_differences):
            found.append("configuration")
        if self.naming is not None and self.naming.hides:
            found.append("names")
        return (*found, *(difference.name for difference in self.side_files if difference.changes_answer))

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict in (IDENTICAL, EQUAL_VALUES) else 1

    @property
    def unequal(self) -> list[TensorComparison]:
        """Tensors that are not equal byte for byte, the worst first."""
        listed = [tensor for tensor in self.tensors if tensor.verdict != IDENTICAL]
        return sorted(listed, key=lambda tensor: (-VERDICTS.index(tensor.verdict), -tensor.distance, tensor.name))

    def to_json(self) -> dict[str, Any]:
        """Returns the stable JSON object, and beside it details that may grow."""
        verdicts = [tensor.verdict for tensor in self.tensors]
        return {
            "verdict": self.verdict,
            "compared": dataclasses.asdict(self.compared),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "findings": [finding.to_json() for finding in self.findings],
            "levels": {
                "names_and_shapes": sum(tensor.shapes[0] == tensor.shapes[1] for tensor in self.tensors),
                "bytes": verdicts.count(IDENTICAL),
                "values": verdicts.count(IDENTICAL) + verdicts.count(EQUAL_VALUES),
                "close": len(verdicts) - verdicts.count(DIFFERENT),
            },
            "metadata_differences": [dataclasses.asdict(difference) for difference in self.metadata_differences],
            "weights": self.weights,
            "answers_differ_by": list(self.answers_differ_by),
            "side_files": [dataclasses.asdict(difference) for difference in self.side_files],
            "names": None if self.naming is None else self.naming.to_json(),
            "notes": list(self.notes),
            "tensors": [tensor.to_json() for tensor in self.unequal],
        }


def compare(a: Checkpoint, b: Checkpoint, progress: Progress | None = None, *, diagnose: bool = True) -> Comparison:
    """Compares two checkpoints.

    Args:
      a: The original.
      b: The one in question.
      progress: Told what is being done.
      diagnose: Whether to search for causes.

    Returns:
      What was found.

    Raises:
      StorageError: A file cannot be read, or changed meanwhile.
    """
    a, b, packed = _decoded(a, b)
    naming = recognise(b.tensors, a.tensors)
    if naming is not None:
        b = b.renamed(naming.names)
    pairs = [Pair(a.tensors[name], b.tensors[name]) for name in a.tensors if name in b.tensors]
    compare_bytes(pairs, progress)
    unequal = [pair for pair in pairs if not pair.identical and pair.same_shape]
    if unequal:
        compare_values(unequal, progress)
    only_in_a, only_in_b, notes = _compare_names(a, b)
    notes = packed + notes
    findings = _exact_casts(pairs)
    findings += _merged_adapters([pair for pair in unequal if pair.verdict != IDENTICAL])
    wrong = [pair for pair in pairs if pair.verdict in (CLOSE, DIFFERENT)]
    if diagnose and wrong:
        findings += _diagnose(a, b, wrong, progress)
    if diagnose and only_in_a and only_in_b:
        more, said = _diagnose_names(a, b, only_in_a, only_in_b)
        findings, notes = findings + more, notes + said
    if wrong:
        notes += _footer_notes(a, b)
    for source in (*a.sources, *b.sources):
        source.check_unchanged()
    return Comparison(
        compared=Counts(
            len(pairs), sum(dtypes.element_count(pair.a.shape) for pair in pairs), sum(pair.a.nbytes for pair in pairs)
        ),
        tensors=tuple(pair.result() for pair in pairs),
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        findings=_worst_first(findings, pairs),
        metadata_differences=tuple(compare_configurations(a, b)),
        notes=tuple(notes),
        naming=naming,
        side_files=tuple(compare_side_files(a, b)),
    )


# --- published quantised forms


def _decoded(a: Checkpoint, b: Checkpoint) -> tuple[Checkpoint, Checkpoint, list[str]]:
    """Returns both as what their quantised tensors stand for, and what is to be said of that.

    Where both are packed alike they are compared as they are, byte for byte.
    """
    if set(a.tensors) == set(b.tensors):
        return a, b, []
    notes, views = [], []
    for label, checkpoint in (("A", a), ("B", b)):
        try:
            view = dense_view(checkpoint)
            forms = packed_forms(view)
        except FindingError as error:
            notes.append(f"{label} is compared as it is stored: {error.message}")
            view, forms = checkpoint, {}
        listed = ", ".join(f"{form} ({counted(count, 'tensor')})" for form, count in forms.items())
        if forms:
            notes.append(f"{label} is quantised and compared by what it decodes to: {listed}")
        views.append(view)
    return views[0], views[1], notes


# --- names and heads


def _compare_names(a: Checkpoint, b: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Returns what only one side has, and what is to be said about heads; equal meanings of heads are no difference."""
    only_in_a = [name for name in a.tensors if name not in b.tensors]
    only_in_b = [name for name in b.tensors if name not in a.tensors]
    notes = []
    for label, checkpoint in (("A", a), ("B", b)):
        if checkpoint.incomplete is not None:
            notes.append(f"{label}: {checkpoint.incomplete.sentence}")
        for name in checkpoint.placeholders:
            notes.append(
                f"{label} lists {name} without data: a placeholder, the embedding stands for it (`apr trace` computes "
                "all-zero logits from it; `convert.py --to apr` leaves it out)"
            )
    for label, other, checkpoint, only in (("A", "B", a, only_in_a), ("B", "A", b, only_in_b)):
        if HEAD not in only or EMBEDDING not in checkpoint.tensors:
            continue
        if same_values(checkpoint.tensors[EMBEDDING], checkpoint.tensors[HEAD]):
            only.remove(HEAD)
            notes.append(f"{HEAD} is only in {label} and equals the embedding there: both heads are tied")
        else:
            notes.append(
                f"{HEAD} of {label} has values of its own, and {other} has no head: with the embedding in its place "
                f"the logits of {other} are others"
            )
    if not set(a.tensors) & set(b.tensors):
        notes.append(_nothing_in_common(a, b))
    return tuple(only_in_a), tuple(only_in_b), notes


def _nothing_in_common(a: Checkpoint, b: Checkpoint) -> str:
    """Says why nothing could be compared, and what names there are."""

    def described(label: str, checkpoint: Checkpoint) -> str:
        for kind, parts in _NAMINGS:
            for name in checkpoint.tensors:
                if name.startswith(parts):
                    return f"{label} has {kind} names ({name})"
        return f"{label} has {next(iter(checkpoint.tensors))}" if checkpoint.tensors else f"{label} holds no tensors"

    return (
        f"nothing was compared, no tensor has the same name: {described('A', a)}, {described('B', b)}. Map the names "
        "to HuggingFace's first (as blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight)"
    )


_NAMINGS = (
    ("HuggingFace's", ("model.layers.", "model.embed_tokens.", "model.norm.")),
    ("GGUF", ("blk.", "token_embd.", "output_norm.")),
    ("HuggingFace's (without `model.`)", ("layers.", "embed_tokens.")),
)


# --- findings


def _exact_casts(pairs: Sequence[Pair]) -> list[Finding]:
    groups: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        if pair.verdict == EQUAL_VALUES and not pair.rounded:
            groups.setdefault((pair.a.dtype.name, pair.b.dtype.name), []).append(pair.name)
    return [
        Finding(EXACT_CAST, tuple(names), {"from": source, "to": target}, 1.0)
        for (source, target), names in groups.items()
    ]


def _merged_adapters(pairs: Sequence[Pair]) -> list[Finding]:
    """Finds tensors that are those of A with its adapter added, rounded to their own type."""
    computed = [pair for pair in pairs if isinstance(pair.a, DecodedTensor) and pair.a.form.name == ADAPTER]
    if not computed:
        return []
    from apr_jax.converters.verify.diagnosis.forms import is_sum

    groups: dict[tuple[int, str], list[str]] = {}
    for pair in computed:
        pair.rounded = is_sum(pair)
        if pair.rounded:
            rank = int(dict(pair.a.form.details)["rank"]) if isinstance(pair.a, DecodedTensor) else 0
            groups.setdefault((rank, pair.b.dtype.name), []).append(pair.name)
    return [
        Finding("merged-adapter", tuple(names), {"rank": rank, "type": kind}, 1.0)
        for (rank, kind), names in groups.items()
    ]


def _diagnose(a: Checkpoint, b: Checkpoint, pairs: Sequence[Pair], progress: Progress | None) -> list[Finding]:
    """Searches for the causes, tensor by tensor, and gathers equal ones."""
    from apr_jax.converters.verify.diagnosis.context import Context
    from apr_jax.converters.verify.diagnosis.forms import form_cause
    from apr_jax.converters.verify.diagnosis.search import diagnose
    from apr_jax.converters.verify.diagnosis.story import one_story

    context = Context(a, b)
    meter = Meter("causes", sum(pair.b.nbytes for pair in pairs), progress)
    causes: list[tuple[Pair, Cause]] = []

    def step(pair: Pair) -> None:
        if (form := form_cause(pair)) is not None:
            causes.append((pair, form))
        elif pair.same_bytes and pair.a.dtype != pair.b.dtype:
            # The comparison has read it all: nothing is left to search for.
            parameters = {"from": pair.a.dtype.name, "to": pair.b.dtype.name, "values_converted": False}
            causes.append((pair, Cause("relabelled-dtype", parameters, 1.0)))
        else:
            causes.extend((pair, cause) for cause in diagnose(pair.a, pair.b, context)[:1])
        meter.advance(pair.b.nbytes)

    # The largest first, so that no thread is left alone with it at the end.
    in_threads(step, ((pair,) for pair in sorted(pairs, key=lambda pair: -pair.b.nbytes)))
    return _grouped(one_story(sorted(causes, key=lambda found: found[0].name), context))


def _diagnose_names(
    a: Checkpoint, b: Checkpoint, only_in_a: Sequence[str], only_in_b: Sequence[str]
) -> tuple[list[Finding], list[str]]:
    """Finds out what became of tensors that one side lacks: fused, split or under another name."""
    from apr_jax.converters.verify.diagnosis.context import Context
    from apr_jax.converters.verify.diagnosis.missing import diagnose_missing

    findings: list[Finding] = []
    renamed = []
    for match in diagnose_missing(only_in_a, only_in_b, Context(a, b)):
        cause = match.cause
        if cause is None:
            renamed.append(match)
            continue
        names = (*match.only_in_a, *match.only_in_b)
        known = [f for f in findings if (f.cause, f.parameters) == (cause.cause, cause.parameters)]
        if known:
            findings.remove(known[0])
            names = (*known[0].tensors, *names)
        findings.append(Finding(cause.cause, names, cause.parameters, cause.explained, cause.alternatives))
    if not renamed:
        return findings, []
    first = renamed[0]
    more = f", and {len(renamed) - 1} more" if len(renamed) > 1 else ""
    return findings, [f"equal under other names: {first.only_in_a[0]} of A is {first.only_in_b[0]} of B{more}"]


def _grouped(causes: Iterable[tuple[Pair, Cause]]) -> list[Finding]:
    groups: dict[str, list[tuple[Pair, Cause]]] = {}
    for pair, cause in causes:
        key = json.dumps([cause.cause, cause.parameters], sort_keys=True)
        groups.setdefault(key, []).append((pair, cause))
    findings = []
    for group in groups.values():
        first = group[0][1]
        weight = sum(pair.weight for pair, _ in group)
        explained = sum(pair.weight * cause.explained for pair, cause in group) / max(weight, 1)
        # What one of the tensors rules out is no alternative for all of them.
        shared = [name for name in first.alternatives if all(name in cause.alternatives for _, cause in group)]
        findings.append(
            Finding(
                first.cause,
                tuple(pair.name for pair, _ in group),
                first.parameters,
                explained,
                tuple(shared),
                _figures(group),
            )
        )
    return findings


def _figures(group: Sequence[tuple[Pair, Cause]]) -> str:
    """Returns the figures behind a finding, where the cause alone does not say how much."""
    cause = group[0][1]
    if cause.cause in (DIFFERENT_WEIGHTS, "changed-rows"):
        return _statistics(pair for pair, _ in group)
    if cause.cause != "low-rank":
        return ""
    return cause.evidence if len(group) == 1 else f"in {group[0][0].name} {cause.evidence}"


def _statistics(pairs: Iterable[Pair]) -> str:
    """Returns, for weights that nothing explains, the figures that say so."""
    sums = [pair.sums for pair in pairs if pair.sums is not None]
    if not sums:
        return ""
    cosines = [found.cosine for found in sums if found.cosine is not None]
    share = sum(found.differing for found in sums) / max(1, sum(found.elements for found in sums))
    text = f"{100 * share:.3g} % of the elements differ"
    distances = [found.relative_l2 for found in sums if found.aa or not found.differing]
    if distances:
        text += f", relative L2 {_span(distances)}"
    if len(distances) < len(sums):
        largest = max(found.max_abs for found in sums if not found.aa)
        which = "it was" if len(sums) == 1 else f"{len(sums) - len(distances)} of them were"
        text += f", {which} all zero in the original and {'is' if len(sums) == 1 else 'are'} now up to {largest:.3g}"
    return text + (f", cosine {_span(cosines)}" if cosines else "")


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _worst_first(findings: Iterable[Finding], pairs: Iterable[Pair]) -> tuple[Finding, ...]:
    distances = {pair.name: pair.result().distance for pair in pairs}

    def order(finding: Finding) -> tuple[float, int]:
        worst = max((distances.get(name, math.inf) for name in finding.tensors), default=math.inf)
        return -worst, -len(finding.tensors)

    return tuple(sorted(findings, key=order))


def _footer_notes(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Says of an `.apr` that differs if it changed after it was written."""
    notes = []
    for label, checkpoint in (("A", a), ("B", b)):
        if checkpoint.apr is None or not checkpoint.apr.has_footer:
            continue
        try:
            streaming.check_footer(checkpoint.sources[0], checkpoint.apr.data_end, ())
        except BrokenContainerError as error:
            sums = f"stored {error.found}, computed {error.expected}"
            notes.append(f"the checksum of {label} is wrong ({sums}): its bytes changed after it was written")
    return notes
