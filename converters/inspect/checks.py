"""Checks one checkpoint by itself, without an original to compare with.

Structure, checksums, sizes, configuration against shapes, and what the values look like. The bounds S1 and S24 are
those of aprender's tests (`pretrain_real.rs`, tensor-layout FALSIFY-001 to 006), unchanged. What a relabelled type
looks like was measured, over 195 matrices of 13 checkpoints: bf16 read as f16 has at least 99.5 % of its magnitudes in
[0.5, 4), a genuine matrix 0.6 % at most; f16 read as bf16 has at least 92 % below 2**-20, a genuine one 0.03 % at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.checkpoint import side_files
from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.incomplete import TRAINING, is_adapters
from apr_jax.converters.checkpoint.naming import Naming, expected_names, is_no_weight, recognise
from apr_jax.converters.checkpoint.packed_forms import dense_view, packed_forms
from apr_jax.converters.checkpoint.qwen2 import CHECKED_IN_APR, EMBEDDING, FINAL_NORM, HEAD, Qwen2Config
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.checkpoint.tied_heads import same_values, stated
from apr_jax.converters.errors import BrokenContainerError, FindingError, RefusedError, counted
from apr_jax.converters.formats.dtypes import element_count
from apr_jax.converters.inspect import first_pass, statistics
from apr_jax.converters.inspect.statistics import Statistics

EMBEDDING_MEAN = 0.05
EMBEDDING_STD = (0.005, 0.5)
FINAL_NORM_MEAN = (0.01, 100.0)
FINAL_NORM_STD = 100.0
EMBEDDING_ZEROS = 0.5
WEIGHT_ZEROS = 0.8
SMALLEST_L2 = 1e-6
DEAD_ROWS = 0.25
SPOT_ROWS = (0.1, 0.5, 0.9)
# Of normally distributed values 76 % at most lie in [0.5, 4), whatever their spread.
RELABEL_SHARE, RELABEL_STD = 0.95, 0.5
TINY_SHARE, TINY_STD = 0.75, 1e-3

# The names that HuggingFace and GGUF give to what is looked at by name.
_EMBEDDINGS = (EMBEDDING, "token_embd.weight", "tok_embeddings.weight")
_FINAL_NORMS = (FINAL_NORM, "output_norm.weight")
_HEADS = (HEAD, "output.weight")
_QWEN2 = "qwen2"
_UNSUPPORTED = (
    *("not supported", "not known to leave", "not a rule that is known"),
    *("hidden_act is '", "layer_types holds '"),
)
_FIELDS = dataclasses.fields(Qwen2Config)
_WITHOUT_APR_KEY = ("rope_scaling", "sliding_window", "window_layers")
_FAMILIES = ("qwen2", "qwen3", "llama")
_PUBLISHED_THETA = 1e6
_PUBLISHED_EPS = (1e-6, 1e-5)


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
      name: A stable, kebab-case identifier.
      passed: False only for what is wrong; None if the check does not apply, and the sentence says why.
      sentence: What was found and what was expected, for people.
      tensors: The tensors concerned.
      note: Whether a passed check is worth saying all the same.
    """

    name: str
    passed: bool | None
    sentence: str
    tensors: tuple[str, ...] = ()
    note: bool = False

    @property
    def severity(self) -> str:
        """One of "failure", "note", "ok" and "skipped"."""
        if self.passed is None:
            return "skipped"
        return "failure" if not self.passed else "note" if self.note else "ok"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        return dataclasses.asdict(self) | {"tensors": list(self.tensors), "severity": self.severity}


def inspect(
    checkpoint: Checkpoint,
    *,
    measured: Mapping[str, Statistics] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Check]:
    """Checks one checkpoint by itself. Its files are read once; what looks suspicious then is measured exactly.

    Args:
      checkpoint: An open checkpoint.
      measured: Statistics of tensors that are known already, by name.
      progress: Called with numbers of bytes read, from any thread.

    Returns:
      One check after the other, container first.

    Raises:
      StorageError: A file cannot be read.
    """
    dense, quantised = _decoded(checkpoint)
    naming = _naming(dense)
    if naming is not None:
        dense = dense.renamed(naming.names)
        # What is looked at by name goes by the names of HuggingFace.
        checkpoint = checkpoint.renamed(naming.names)
    screened = first_pass.screen(checkpoint, progress)
    values = _Values(checkpoint, screened, dict(measured or {}))
    return [
        *_container(checkpoint, screened),
        *_sizes(checkpoint),
        *_names(naming),
        *_side_files(checkpoint),
        *quantised,
        *_configuration(dense),
        *_head(dense),
        *_metadata(checkpoint),
        *_data(checkpoint, values),
    ]


def _decoded(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Check]]:
    """Returns the dense checkpoint that a quantised one stands for, and what is to be said of the quantisation."""
    try:
        dense = dense_view(checkpoint)
        forms = packed_forms(dense)
    except FindingError as error:
        # A method that is not known here is nothing wrong with the file; a broken config.json is said elsewhere.
        passed = {"quantisation-unsupported": None, "quantised-tensor": False}
        said = [Check("quantisation", passed[error.code], error.message)] if error.code in passed else []
        return checkpoint, said
    listed = ", ".join(f"{counted(count, 'tensor')} by {form}" for form, count in forms.items())
    checks = [Check("quantisation", True, f"{listed}: the parts of each fit together")] if forms else []
    more = dense.warnings[len(checkpoint.warnings) :]
    return dense, [*checks, *(Check("warning", True, warning, note=True) for warning in more)]


# --- container


def _container(checkpoint: Checkpoint, screened: first_pass.Screening) -> Iterator[Check]:
    number = len(checkpoint.tensors) + len(checkpoint.placeholders)
    yield Check("structure", True, f"{number} tensors, each within the file, without overlap or hole")
    for warning in checkpoint.warnings:
        yield Check("warning", True, warning, note=True)
    if checkpoint.apr is None:
        yield Check("checksums", None, "safetensors files carry no checksum")
        return
    apr = checkpoint.apr
    yield Check("header-checksum", True, f"the header's CRC-32 is {apr.header.checksum:#010x}, as it says")
    if not apr.has_footer:
        yield Check("footer-checksum", None, "there is no footer, so the content cannot be checked against it")
    else:
        stored = int.from_bytes(checkpoint.sources[0].read_at(apr.data_end, 4), "little")
        right = stored == screened.crc
        yield Check(
            "footer-checksum",
            right,
            f"the file's CRC-32 is {screened.crc:#010x}, as its footer says"
            if right
            else f"the content has the CRC-32 {screened.crc:#010x}, the footer says {stored:#010x}: the file has "
            "changed since it was written",
        )
    if screened.hidden is None:
        yield Check("padding", True, "nothing but zeros between the tensors")
    else:
        offset, before = screened.hidden
        where = f"after {before}" if before else "before the first tensor"
        yield Check(
            "padding",
            False,
            f"byte {offset} of the padding {where} is not zero: something is hidden between the tensors",
            (before,) if before else (),
        )


def _sizes(checkpoint: Checkpoint) -> Iterator[Check]:
    # A file of which this is not so is not opened.
    yield Check("sizes", True, "every tensor has the bytes that its type and shape ask for")


# --- names


def _naming(checkpoint: Checkpoint) -> Naming | None:
    try:
        return recognise(checkpoint.tensors, expected_names(checkpoint.model_config()))
    except FindingError:
        # Checked elsewhere.
        return None


def _names(naming: Naming | None) -> Iterator[Check]:
    if naming is None:
        return
    known = naming.known_to_transformers
    after = "transformers finds them all the same" if known else "programs that read them by name do not find them"
    yield Check("names", known, f"{naming.sentence}: {after}; `convert {naming.options}` renames them", note=True)


# --- side files


def _side_files(checkpoint: Checkpoint) -> Iterator[Check]:
    if checkpoint.files:
        problems = side_files.broken(checkpoint.files)
        for name, problem in problems.items():
            yield Check("side-files", False, f"{name} {problem}")
        if not problems:
            yield Check("side-files", True, f"{counted(len(checkpoint.files), 'file')} that can be read")
    largest = max(side_files.vocabulary(checkpoint).items(), default=None)
    embedding = _first(checkpoint.tensors, _EMBEDDINGS)
    if largest is None or embedding is None or not embedding.shape:
        return
    number, token = largest
    rows = embedding.shape[0]
    yield Check(
        "vocabulary",
        number < rows,
        f"the tokenizer's largest id is {number} ({token!r}), {embedding.name} has {rows} rows"
        + ("" if number < rows else ": text with such tokens cannot be embedded"),
    )


# --- configuration


def _configuration(checkpoint: Checkpoint) -> Iterator[Check]:
    if checkpoint.incomplete is not None and CONFIG_NAME not in checkpoint.files:
        yield Check("configuration", None, checkpoint.incomplete.sentence)
        return
    family, named = _family_of_names(checkpoint.tensors), _family_said(checkpoint)
    # Biases are no mark of a family where the configuration asks for them.
    if family and named in _FAMILIES and not (family == _QWEN2 and _asks_for_biases(checkpoint)):
        yield Check(
            "architecture",
            family == named,
            f"the metadata say {named}, the tensors' names are those of {family}",
        )
    if named is None:
        yield Check("configuration", None, f"there is {_no_configuration(checkpoint)} to hold the tensors against")
        return
    if named != _QWEN2:
        yield Check("configuration", None, f"architecture {named!r} is not known here, only {_QWEN2!r}")
        return
    try:
        config = checkpoint.model_config()
    except FindingError as error:
        problems = error.message.split("\n  ")[1:]
        # Another model than those that are known here is nothing that is wrong with the file.
        broken = not problems or any(not any(words in problem for words in _UNSUPPORTED) for problem in problems)
        said = ". ".join(filter(None, (error.message.replace("\n  ", " "), error.hint)))
        yield Check("configuration", False if broken else None, said)
        return
    yield Check("configuration", True, _described(config))
    if any(name.startswith("blk.") for name in checkpoint.tensors):
        yield Check("tensor-set", None, "the tensors have GGUF's names, which are not known here")
    else:
        yield from _tensor_set(checkpoint, config)
    yield from _typed_metadata(checkpoint, config)
    yield from _plausible(config)


def _asks_for_biases(checkpoint: Checkpoint) -> bool:
    try:
        return bool(checkpoint.config.get("attention_bias"))
    except FindingError:
        return False


def _no_configuration(checkpoint: Checkpoint) -> str:
    if CONFIG_NAME not in checkpoint.files:
        return "no configuration"
    return f"no configuration that says what model_type it is for, in {CONFIG_NAME}"


def _described(config: Qwen2Config) -> str:
    """Says in a line what model a configuration is of, and what about it other programs may not know."""
    said = [_QWEN2, f"{config.num_layers} layers", f"hidden size {config.hidden_size}"]
    if config.rope_scaling is not None:
        said.append(f"RoPE scaled by {config.rope_scaling}")
    if config.window_layers:
        first, last = config.window_layers[0], config.window_layers[-1]
        where = f"layers {first} to {last}" if len(config.window_layers) == last - first + 1 else "some layers"
        said.append(f"a sliding window of {config.sliding_window} in {where}")
    return ", ".join(said)


def _family_said(checkpoint: Checkpoint) -> str | None:
    """Returns what metadata or config.json call the architecture."""
    try:
        named = checkpoint.metadata.get("architecture") if checkpoint.kind == "apr" else None
        named = named or checkpoint.config.get("model_type")
    except FindingError:
        return None
    return named if isinstance(named, str) and named else None


def _family_of_names(names: Iterable[str]) -> str | None:
    """Returns the family that has such tensors (upstream's INV-INIT-ARCH-MATCH-001); None for GGUF's names."""
    listed = list(names)
    if not any(name.startswith("model.layers.") for name in listed):
        return None
    if any("q_norm" in name for name in listed):
        return "qwen3"
    return _QWEN2 if any(name.endswith("q_proj.bias") or "qkv_proj" in name for name in listed) else "llama"


def _tensor_set(checkpoint: Checkpoint, config: Qwen2Config) -> Iterator[Check]:
    """Names and shapes against the configuration; a head beside a tied configuration is judged elsewhere."""
    expected = config.tensor_shapes()
    head = {HEAD: (config.vocab_size, config.hidden_size)}
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if not is_no_weight(name)}
    missing = [name for name in expected if name not in found]
    # A head without data has its own check.
    missing = [name for name in missing if name not in checkpoint.placeholders]
    unexpected = [name for name in found if name not in expected | head]
    misshapen = [name for name in found if name in expected | head and found[name] != (expected | head)[name]]
    if missing:
        yield Check(
            "tensor-set",
            False,
            f"{_named(missing)} missing: the configuration asks for {list(expected[missing[0]])}",
            tuple(missing),
        )
    if unexpected:
        yield Check(
            "tensor-set", False, f"{_named(unexpected)} unknown to the configuration of {_QWEN2}", tuple(unexpected)
        )
    if misshapen:
        first = misshapen[0]
        yield Check(
            "tensor-set",
            False,
            f"{_named(misshapen)} of another shape than the configuration's: {first} is {list(found[first])}, expected "
            f"{list((expected | head)[first])}",
            tuple(misshapen),
        )
    if not missing and not unexpected and not misshapen:
        yield Check(
            "tensor-set", True, f"{counted(len(found), 'tensor')} with the names and shapes of the configuration"
        )


def _typed_metadata(checkpoint: Checkpoint, config: Qwen2Config) -> Iterator[Check]:
    """The keys that the engine reads of an `.apr`, against config.json, and the shapes that it lists."""
    if checkpoint.kind != "apr":
        return
    try:
        typed = Qwen2Config.from_apr(checkpoint.metadata, tied=config.tie_word_embeddings, file=checkpoint.path)
    except RefusedError as error:
        yield Check("metadata", False, error.message.replace("\n  ", " "))
        return
    # What `.apr` has no key of its own for is in config.json alone.
    said = any(checkpoint.metadata.get(key) is not None for key in CHECKED_IN_APR if key != "rope_theta")
    fields = [field for field in _FIELDS if said or field.name not in _WITHOUT_APR_KEY]
    values = {field.name: (getattr(typed, field.name), getattr(config, field.name)) for field in fields}
    differing = [name for name, (found, expected) in values.items() if not _same(found, expected)]
    if checkpoint.metadata.get("head_dim") is None and len(differing) > 1:
        # Not said, but computed from one of the others.
        differing = [name for name in differing if name != "head_dim"]
    for name in differing:
        found, expected = values[name]
        yield Check("metadata", False, f"{name} is {found!r} in the metadata and {expected!r} in config.json")
    listed = checkpoint.metadata.get("tensor_shapes")
    for name, shape in listed.items() if isinstance(listed, dict) else ():
        held = checkpoint.tensors[name].shape if name in checkpoint.tensors else checkpoint.placeholders.get(name)
        if held is None or list(held) != shape:
            differing.append(name)
            yield Check(
                "metadata",
                False,
                f"tensor_shapes says {name} {shape}, the file holds {'none' if held is None else list(held)}",
                (name,),
            )
    if not differing:
        yield Check("metadata", True, "the metadata agree with the configuration and the shapes")


def _same(typed: Any, configured: Any) -> bool:
    # The metadata hold theta and eps as f32.
    if isinstance(typed, float):
        return bool(np.float32(typed) == np.float32(configured))
    return bool(typed == configured)


def _plausible(config: Qwen2Config) -> Iterator[Check]:
    if config.rope_theta != _PUBLISHED_THETA:
        yield Check(
            "rope-theta",
            True,
            f"rope_theta is {config.rope_theta:g}; Qwen2 and Qwen2.5 are published with {_PUBLISHED_THETA:g}, and old "
            "versions of `apr import` wrote 10000 where they did not find it",
            note=True,
        )
    if not any(_same(config.rms_norm_eps, eps) for eps in _PUBLISHED_EPS):
        yield Check(
            "rms-norm-eps",
            True,
            f"rms_norm_eps is {config.rms_norm_eps:g}; Qwen2 and Qwen2.5 are published with 1e-06 or 1e-05",
            note=True,
        )


# --- head


def _head(checkpoint: Checkpoint) -> Iterator[Check]:
    for name, shape in checkpoint.placeholders.items():
        yield Check(
            "placeholder-head",
            False,
            f"{name} has the shape {list(shape)} and 0 bytes, expected all data or no such tensor: `apr trace` 0.72.3 "
            "takes it for the weight and computes logits that are all zero; convert.py --to apr leaves it out",
            (name,),
        )
    head, embedding = _first(checkpoint.tensors, _HEADS), _first(checkpoint.tensors, _EMBEDDINGS)
    if head is None:
        if not checkpoint.placeholders and embedding is not None:
            yield Check("head", True, f"there is no head of its own: {embedding.name} is the head")
        return
    if embedding is None:
        yield Check("head", None, "there is a head and no embedding to hold it against")
        return
    if head.shape != embedding.shape:
        yield Check(
            "head",
            False,
            f"{head.name} is {list(head.shape)}, expected {list(embedding.shape)} ([vocabulary, hidden], as "
            f"{embedding.name})",
            (head.name,),
        )
        return
    said = stated(checkpoint)
    if said is None or not said.tied:
        yield Check("head", True, f"{head.name} {list(head.shape)} is there, and nothing says that it is tied")
        return
    try:
        is_copy = same_values(head, embedding)
    except RefusedError as error:
        yield Check("head", None, f"{head.name} cannot be held against {embedding.name}: {error.message}")
        return
    if is_copy:
        yield Check("head", True, f"{head.name} is a copy of {embedding.name}, as {said.where} says")
    else:
        yield Check(
            "falsely-tied",
            False,
            f"{said.where} says that the head is the embedding, but {head.name} holds values of its own: "
            f"{'`apr export`' if 'metadata' in said.where else 'HuggingFace'} drops them",
            (head.name,),
        )


# --- metadata that is only odd


def _metadata(checkpoint: Checkpoint) -> Iterator[Check]:
    if checkpoint.kind != "apr":
        return
    metadata = checkpoint.metadata
    if metadata.get("model_type") == "Auto":
        yield Check(
            "model-type",
            True,
            "model_type is 'Auto', the way that `apr import` was called; architecture says what the model is",
            note=True,
        )
    elements = sum(element_count(tensor.shape) for tensor in checkpoint.tensors.values())
    with_placeholders = elements + sum(map(element_count, checkpoint.placeholders.values()))
    count = metadata.get("param_count")
    if count not in (elements, with_placeholders):
        yield Check("param-count", True, f"param_count is {count!r}, the tensors have {elements} elements", note=True)
    size, nbytes = metadata.get("total_size"), sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if size not in (None, 0, nbytes):
        yield Check("total-size", True, f"total_size is {size!r}, the tensors have {nbytes} bytes", note=True)


# --- values


class _Values:
    """What is known of the tensors' values, measured exactly where the first look leaves a doubt."""

    def __init__(self, checkpoint: Checkpoint, screened: first_pass.Screening, measured: dict[str, Statistics]):
        self._glances = screened.glances
        self._measured = measured
        self.undecoded: list[Tensor] = []
        self.broken: dict[str, str] = {}
        self.tensors: list[Tensor] = []
        for name, tensor in checkpoint.tensors.items():
            if name not in measured and (name not in self._glances or self._doubtful(tensor, self._glances[name])):
                try:
                    measured[name] = statistics.measure(tensor)
                except RefusedError:
                    self.undecoded.append(tensor)
                    continue
                except BrokenContainerError as error:
                    self.broken[name] = error.message
                    continue
            self.tensors.append(tensor)

    def exact(self, tensor: Tensor) -> Statistics | None:
        """Returns the statistics of all elements, if anything but "unsuspicious" can be said of the tensor."""
        return self._measured.get(tensor.name)

    def nearly(self, tensor: Tensor) -> tuple[Statistics, str]:
        """Returns mean and standard deviation, of a sample if nothing depends on the rest, and words that say so."""
        measured = self._measured.get(tensor.name)
        if measured is not None:
            return measured, ""
        glance = self._glances[tensor.name]
        partial = glance.sample.count < glance.count
        return glance.sample, f" (of {glance.sample.count} of its values)" if partial else ""

    def _doubtful(self, tensor: Tensor, glance: first_pass.Glance) -> bool:
        sample = glance.sample
        # With fewer zeros than this a quarter of the rows cannot be dead.
        if not glance.finite or glance.magnitude <= 2 * SMALLEST_L2 or glance.zeros >= DEAD_ROWS * glance.count:
            return True
        if _is_matrix(tensor) and (sample.relabel_share > 0.8 or sample.tiny_share > 0.5):
            return True
        # Within a factor of two of a bound, or beyond.
        if tensor.name in _EMBEDDINGS:
            inside = 2 * EMBEDDING_STD[0] < sample.std < EMBEDDING_STD[1] / 2 and abs(sample.mean) < EMBEDDING_MEAN / 2
            return not inside
        return tensor.name in _FINAL_NORMS


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) > 1


def _may_be_zero(tensor: Tensor) -> bool:
    """Whether a tensor is none whose zeros say something: a bias, half of an adapter, an optimizer's sums."""
    return tensor.name.endswith("bias") or tensor.name.startswith(TRAINING) or is_adapters(tensor.name)


def _data(checkpoint: Checkpoint, values: _Values) -> Iterator[Check]:
    if not checkpoint.tensors:
        yield Check("values", None, "there are no tensors")
        return
    if values.undecoded:
        types = ", ".join(sorted({tensor.dtype.name for tensor in values.undecoded}))
        yield Check(
            "values",
            None,
            f"the values of {counted(len(values.undecoded), 'tensor')} were not looked at: {types} is not decoded",
            tuple(tensor.name for tensor in values.undecoded),
        )
    for name, message in values.broken.items():
        yield Check("values", False, f"{name}: {message}", (name,))
    yield from _finite(values)
    yield from _zeros(values)
    yield from _embedding(checkpoint, values)
    yield from _final_norm(checkpoint, values)
    yield from _relabelled(values)


def _finite(values: _Values) -> Iterator[Check]:
    wrong = {
        tensor.name: found
        for tensor in values.tensors
        if (found := values.exact(tensor)) is not None and found.nans + found.infs
    }
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name].nans + wrong[name].infs)
        found = wrong[worst]
        yield Check(
            "finite",
            False,
            f"{_named(wrong)} not finite: {worst} holds {found.nans} NaN and {found.infs} infinite values of "
            f"{found.count}, expected none",
            tuple(wrong),
        )
    elif values.tensors:
        yield Check("finite", True, f"no NaN and no infinity in {counted(len(values.tensors), 'tensor')}")


def _zeros(values: _Values) -> Iterator[Check]:
    """All-zero tensors, and S24: zeros, Euclidean norm and dead rows."""
    exact = {tensor.name: (tensor, found) for tensor in values.tensors if (found := values.exact(tensor)) is not None}
    empty = [name for name, (_, found) in exact.items() if found.count and found.zeros == found.count]
    weights = [name for name in empty if not _may_be_zero(exact[name][0])]
    biases = [name for name in empty if _may_be_zero(exact[name][0])]
    if weights:
        yield Check("all-zero", False, f"{_named(weights)} all zeros, expected a trained weight", tuple(weights))
    if biases:
        yield Check("all-zero-bias", True, f"{_named(biases)} all zeros", tuple(biases), note=True)
    failed = bool(weights)
    for name, (tensor, found) in exact.items():
        if name in empty or _may_be_zero(tensor) or not found.count:
            continue
        for kind, sentence in _sparse(tensor, found):
            failed = True
            yield Check(kind, False, f"{name} {sentence}", (name,))
    if values.tensors and not failed:
        yield Check(
            "density",
            True,
            f"S24: zeros below {EMBEDDING_ZEROS:.0%} in the embedding and {WEIGHT_ZEROS:.0%} elsewhere, L2 above "
            f"{SMALLEST_L2:g}, dead rows below {DEAD_ROWS:.0%}",
        )


def _sparse(tensor: Tensor, found: Statistics) -> Iterator[tuple[str, str]]:
    limit = EMBEDDING_ZEROS if tensor.name in _EMBEDDINGS else WEIGHT_ZEROS
    if found.zeros >= limit * found.count:
        yield "zeros", f"is {found.zeros / found.count:.1%} zeros, expected below {limit:.0%} (S24)"
    if not found.l2 > SMALLEST_L2 and found.nans + found.infs < found.count:
        yield "l2", f"has the norm {found.l2:.3g}, expected above {SMALLEST_L2:g} (S24)"
    if found.rows and found.dead_rows >= DEAD_ROWS * found.rows:
        yield (
            "dead-rows",
            f"has {found.dead_rows} of {found.rows} rows that are all zeros, expected below {DEAD_ROWS:.0%} (S24)",
        )


def _embedding(checkpoint: Checkpoint, values: _Values) -> Iterator[Check]:
    """S1 and the spot rows of S24."""
    tensor = _first(checkpoint.tensors, _EMBEDDINGS)
    if tensor is None or tensor not in values.tensors:
        reason = "there is no embedding" if tensor is None else f"{tensor.name} cannot be read"
        yield Check("embedding", None, reason)
        return
    found, of_a_sample = values.nearly(tensor)
    low, high = EMBEDDING_STD
    right = abs(found.mean) < EMBEDDING_MEAN and low <= found.std <= high
    yield Check(
        "embedding",
        right,
        f"{tensor.name} has mean {found.mean:.3g} and std {found.std:.3g}{of_a_sample}, expected |mean| below "
        f"{EMBEDDING_MEAN:g} and std in [{low:g}, {high:g}] (S1)",
        (tensor.name,),
    )
    if len(tensor.shape) != 2 or not tensor.shape[0]:
        return
    rows = sorted({int(tensor.shape[0] * share) for share in SPOT_ROWS})
    dead = [row for row in rows if not tensor.read((slice(row, row + 1),)).astype(np.float64).any()]
    yield Check(
        "spot-rows",
        not dead,
        f"rows {', '.join(map(str, dead or rows))} of {tensor.name} are {'' if dead else 'not '}all zeros (S24)",
        (tensor.name,),
    )


def _final_norm(checkpoint: Checkpoint, values: _Values) -> Iterator[Check]:
    tensor = _first(checkpoint.tensors, _FINAL_NORMS)
    if tensor is None or tensor not in values.tensors:
        reason = "there is no final norm" if tensor is None else f"{tensor.name} cannot be read"
        yield Check("final-norm", None, reason)
        return
    found, of_a_sample = values.nearly(tensor)
    low, high = FINAL_NORM_MEAN
    yield Check(
        "final-norm",
        low < found.mean < high and found.std < FINAL_NORM_STD,
        f"{tensor.name} has mean {found.mean:.3g} and std {found.std:.3g}{of_a_sample}, expected a mean in "
        f"({low:g}, {high:g}) and a std below {FINAL_NORM_STD:g} (S1)",
        (tensor.name,),
    )


def _relabelled(values: _Values) -> Iterator[Check]:
    matrices = [tensor for tensor in values.tensors if _is_matrix(tensor) and not _may_be_zero(tensor)]
    exact = {tensor.name: found for tensor in matrices if (found := values.exact(tensor)) is not None}
    types = {tensor.name: tensor.dtype.name for tensor in matrices}
    as_f16 = {
        name: found for name, found in exact.items() if found.relabel_share >= RELABEL_SHARE and found.std > RELABEL_STD
    }
    as_bf16 = {
        name: found for name, found in exact.items() if found.tiny_share >= TINY_SHARE and not found.std >= TINY_STD
    }
    if as_f16:
        worst = max(as_f16, key=lambda name: as_f16[name].count)
        yield Check(
            "relabelled",
            False,
            f"{_named(as_f16, 'looks', 'look')} like bf16 bytes read as f16: {worst} ({types[worst]}) has "
            f"{as_f16[worst].relabel_share:.2%} of its magnitudes in [0.5, 4) and std {as_f16[worst].std:.3g}; a "
            "weight matrix has few there and std below 0.5",
            tuple(as_f16),
        )
    if as_bf16:
        worst = max(as_bf16, key=lambda name: as_bf16[name].count)
        yield Check(
            "relabelled",
            False,
            f"{_named(as_bf16, 'looks', 'look')} like f16 bytes read as bf16: {worst} ({types[worst]}) has "
            f"{as_bf16[worst].tiny_share:.2%} of its magnitudes below 2**-20 and std {as_bf16[worst].std:.3g}; a "
            "weight matrix has next to none there",
            tuple(as_bf16),
        )
    if not as_f16 and not as_bf16:
        yield (
            Check("relabelled", True, f"{len(matrices)} matrices, none with the magnitudes of a relabelled type")
            if matrices
            else Check("relabelled", None, "there are no matrices whose values can be read")
        )


# --- words


def _named(names: Iterable[str], one: str = "is", several: str = "are") -> str:
    """Returns a subject and its verb: "x is", "x and 3 others are"."""
    first, *others = names
    if not others:
        return f"{first} {one}"
    return f"{first} and {len(others)} {'other' if len(others) == 1 else 'others'} {several}"


def _first(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)
