"""Published quantised forms: which tensors are the parts of one, and the dense checkpoint that they stand for.

Forms are known by the names and shapes of their tensors, as libraries write them; `quantization_config` in config.json
says what those do not (which zero points a GPTQ file stores, block sizes). So modules that were left alone are dense
whatever a list in the configuration calls them, and a lone file is read as well as a folder.

Sources: what GPTQModel, AutoGPTQ, AutoAWQ, bitsandbytes, compressed-tensors, torchao and transformers' FP8 write;
`converters.formats.packed_codecs` has the layouts and formulas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.converters.checkpoint.checkpoint import SOURCE_FILES_KEY, Checkpoint, SideFiles
from apr_jax.converters.checkpoint.decoded import ADAPTER, DecodedTensor, DecoderCache, Form
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.errors import BrokenContainerError, FindingError, RefusedError, counted
from apr_jax.converters.formats import dtypes, strict_json

if TYPE_CHECKING:
    import numpy as np

    from apr_jax.converters.formats.packed_codecs import Decoder

QUANTIZATION_KEY = "quantization_config"
# What older releases of AutoGPTQ and AutoAWQ write beside config.json.
_OWN_FILES = ("quantize_config.json", "quant_config.json")

METHODS = (
    "gptq",
    "awq",
    "auto-round",
    "fp8",
    "fbgemm_fp8",
    "modelopt",
    "bitsandbytes",
    "compressed-tensors",
    "torchao",
)
_GPTQ_FORMATS = ("gptq", "gptq_v2")
_GPTQ_BITS = (2, 3, 4, 8)
# What torchao calls the codes of a weight.
_TORCHAO = "_weight_qdata"
_FLOAT8 = ("f8_e4m3", "f8_e5m2")
_FLOATS = ("f16", "bf16", "f32")
_DEFAULT_BLOCK = 128
_MAX_STATE_BYTES = 1 << 16
_BY_MLX = "`mlx_lm.convert --hf-path FOLDER --mlx-path OUT --dequantize` writes it dense"
_CARRIED = (
    "`convert --to safetensors` carries it as it is; to decode it, load it with the library that wrote it, and save it "
    "dense"
)
# Scales of activations and of the key-value cache: the weights do not depend on them.
_ACTIVATION_PARTS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
    "q_scale",
    "activation_scale",
    "input_scale_ub",
)


def dense_view(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the dense checkpoint that a quantised one stands for: the same one if nothing in it is packed.

    Its tensors have the names, shapes and values of the weights, decoded when they are read (`DecodedTensor`), and its
    configuration says no longer that it is quantised. It shares the files of `checkpoint`: either closes them.

    Raises:
      RefusedError: Code "quantisation-unsupported": a method, or a variant of one, that nothing here decodes;
        "quantised-tensor": parts that do not fit together.
      BrokenContainerError: What config.json or a tensor says of the quantisation cannot be read.
    """
    settings = _Settings.of(checkpoint)
    found = _Search(checkpoint, settings)
    if not found.decoded and not settings.stated:
        return checkpoint
    used = {part.name for tensor in found.decoded for part in tensor.parts} | found.unused
    tensors = [tensor for name, tensor in checkpoint.tensors.items() if name not in used]
    warnings = list(checkpoint.warnings)
    if found.zero_biases:
        warnings.append(
            f"left out: {counted(len(found.zero_biases), 'vector')} of zeros ({found.zero_biases[0]}, ...), biases "
            "that the model does not have; AutoGPTQ writes one for each matrix"
        )
    if found.activations:
        warnings.append(
            f"{counted(len(found.activations), 'scale')} of activations or of the key-value cache "
            f"({found.activations[0]}, ...): weights alone are decoded, activations are computed as they are"
        )
    return checkpoint.replaced(
        tensors=[*tensors, *found.decoded],
        files=_without_quantisation(checkpoint.files),
        metadata=_metadata_without(checkpoint.metadata, [tensor.name for tensor in found.decoded]),
        warnings=warnings,
    )


def packed_forms(checkpoint: Checkpoint) -> dict[str, int]:
    """Returns what packed forms there are, in words, and how many tensors of each.

    Raises:
      As `dense_view`.
    """
    tensors = dense_view(checkpoint).tensors.values()
    forms: dict[str, int] = {}
    for tensor in tensors:
        if isinstance(tensor, DecodedTensor) and tensor.form.name != ADAPTER:
            forms[str(tensor.form)] = forms.get(str(tensor.form), 0) + 1
    return forms


# --- what the configuration says


def _refused(what: str, path: str, hint: str, **details: Any) -> RefusedError:
    what = f"{what}, which nothing here decodes"
    return RefusedError(what, code="quantisation-unsupported", file=path, hint=hint, **details)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What config.json says of the quantisation.

    Attributes:
      values: The object; empty where there is none.
      stated: Whether config.json has one.
      path: Of the checkpoint, for messages.
    """

    values: Mapping[str, Any]
    stated: bool
    path: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Settings:
        values: Any = None
        try:
            config = checkpoint.config
        except RefusedError:
            config = {}
        for holder in (config, config.get("text_config")):
            if values is None and isinstance(holder, dict):
                values = holder.get(QUANTIZATION_KEY, holder.get("compression_config"))
        if any(name.endswith(".biases") and f"{name[:-6]}scales" in checkpoint.tensors for name in checkpoint.tensors):
            raise _refused("the checkpoint is packed by MLX", checkpoint.path, _BY_MLX)
        stated = values is not None
        for name in _OWN_FILES:
            if values is None and name in checkpoint.files:
                values = strict_json.loads(checkpoint.files[name], what=name, max_bytes=1 << 20, file=checkpoint.path)
        if values is not None and not isinstance(values, dict):
            raise BrokenContainerError(
                f"{QUANTIZATION_KEY} is not an object",
                code="config-type",
                file=checkpoint.path,
                found=repr(values)[:80],
            )
        settings = cls(values or {}, stated, checkpoint.path)
        settings.check()
        return settings

    @property
    def method(self) -> str | None:
        method = self.values.get("quant_method")
        if method is None and ("load_in_4bit" in self.values or "load_in_8bit" in self.values):
            return "bitsandbytes"
        return method if isinstance(method, str) else None

    def check(self) -> None:
        """Refuses methods and variants that nothing here decodes."""
        if self.method not in (None, "none", *METHODS):
            raise self.refused(f"the checkpoint is quantised by {self.method!r}", METHODS)
        layout = self.values.get("checkpoint_format", self.values.get("format"))
        if self.method == "gptq" and layout not in (None, "", *_GPTQ_FORMATS):
            raise self.refused(f"the checkpoint is GPTQ in the layout {layout!r}", _GPTQ_FORMATS)
        version = str(self.values.get("version") or "gemm").lower()
        if self.method == "awq" and version != "gemm":
            raise self.refused(f"the checkpoint is AWQ in the layout {version!r}", ("gemm",))
        packing = str(self.values.get("packing_format") or "")
        if self.method == "auto-round" and not packing.endswith(("auto_gptq", "auto_awq", "llm_compressor")):
            raise self.refused(f"the checkpoint is packed as {packing!r}", ("auto_round:auto_gptq", "...:auto_awq"))

    def refused(self, what: str, known: tuple[str, ...]) -> RefusedError:
        return _refused(what, self.path, _CARRIED, expected=f"one of {', '.join(known)}")

    @property
    def zeros_less_one(self) -> bool:
        """Whether GPTQ's zero points are stored less one, as all files but those of its version 2 have them."""
        return self.values.get("checkpoint_format", self.values.get("format")) != "gptq_v2"

    @property
    def group(self) -> int | None:
        group = self.values.get("group_size", self.values.get("q_group_size"))
        return group if type(group) is int and group > 0 else None

    def block(self) -> tuple[int, int]:
        """The rows and columns that share a scale, where blocks do."""
        found = [self.values.get("weight_block_size")]
        found += [weights.get("block_structure") for weights in self.weights()]
        for block in found:
            if isinstance(block, str) and "x" in block:
                block = [int(part) for part in block.split("x") if part.isdecimal()]
            if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
                return block[0], block[1]
        return _DEFAULT_BLOCK, _DEFAULT_BLOCK

    def weights(self) -> list[Mapping[str, Any]]:
        """What compressed-tensors says of the weights, for each group of its configuration."""
        groups = self.values.get("config_groups")
        schemes = groups.values() if isinstance(groups, dict) else ()
        found = [scheme.get("weights") for scheme in schemes if isinstance(scheme, dict)]
        return [weights for weights in found if isinstance(weights, dict)]


def _without_quantisation(files: Mapping[str, bytes]) -> SideFiles:
    """Returns the side files of the dense checkpoint; config.json as it was but for the quantisation."""

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: _dense_config(files[name]) if name == CONFIG_NAME else files[name]

    return SideFiles(
        {name: reader(name) for name in files if name not in _OWN_FILES},
        paths=getattr(files, "paths", ()),
        left_behind=getattr(files, "left_behind", ()),
    )


def _dense_config(text: bytes) -> bytes:
    config = json.loads(text)
    return (json.dumps(_dense_object(config), indent=2, ensure_ascii=False) + "\n").encode()


def _dense_object(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: value for key, value in config.items() if key not in (QUANTIZATION_KEY, "compression_config")}


def _metadata_without(metadata: Mapping[str, Any], decoded: Sequence[str]) -> dict[str, Any]:
    """Returns the metadata of a container without what they say of the quantisation."""
    # torchao writes one entry for each tensor, and their names, into a safetensors file.
    changed = {key: value for key, value in metadata.items() if key not in (*decoded, "tensor_names")}
    if "hf_config" in changed:
        changed["hf_config"] = _dense_object(changed["hf_config"])
    files = changed.get(SOURCE_FILES_KEY)
    if isinstance(files, dict) and isinstance(files.get(CONFIG_NAME), str):
        changed[SOURCE_FILES_KEY] = files | {CONFIG_NAME: _dense_config(files[CONFIG_NAME].encode()).decode()}
    return changed


# --- what the tensors say


class _Search:
    """Goes through the names of a checkpoint.

    Attributes:
      decoded: The tensors that packed ones stand for.
      activations: Names of scales that concern no weight.
      zero_biases: Names of biases that AutoGPTQ wrote for matrices which have none in the model.
      unused: Names that go into no tensor of the dense checkpoint: those, and parts that say nothing of the values.
    """

    def __init__(self, checkpoint: Checkpoint, settings: _Settings):
        self._tensors = checkpoint.tensors
        self._settings = settings
        self._cache = DecoderCache()
        self.unused: set[str] = set()
        self.activations: list[str] = []
        self.zero_biases: list[str] = []
        self.decoded = list(self._found())
        if self.decoded:
            self.activations = [name for name in self._tensors if name.rpartition(".")[2] in _ACTIVATION_PARTS]
            self.zero_biases = list(self._needless_biases(checkpoint))
            self.unused |= {*self.activations, *self.zero_biases}

    def _needless_biases(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Yields the biases of packed matrices that are zero throughout and no part of the model, where it is known."""
        try:
            expected = Qwen2Config.from_hf(_dense_object(checkpoint.config)).tensor_shapes()
        except FindingError:
            return
        for tensor in self.decoded:
            bias = self._tensors.get(tensor.name.removesuffix("weight") + "bias")
            if bias is not None and tensor.name in expected and bias.name not in expected and not any(bias.raw()):
                yield bias.name

    def _found(self) -> Iterator[DecodedTensor]:
        for name, tensor in self._tensors.items():
            stem, _, last = name.rpartition(".")
            if last == "qweight" and f"{stem}.scales" in self._tensors:
                yield self._int32(stem, tensor)
            elif last == "weight_packed":
                yield self._packed(stem, tensor)
            elif f"{stem}.SCB" in self._tensors and last == "weight" and tensor.dtype.name == "i8":
                yield self._int8(stem, tensor)
            elif last.startswith("bitsandbytes__") and stem.endswith(".quant_state"):
                yield self._four_bits(stem[: -len(".quant_state")], tensor)
            elif last == _TORCHAO:
                yield self._torchao(stem, tensor)
            elif tensor.dtype.name in (*_FLOAT8, "i8") and len(tensor.shape) == 2:
                scale = self._tensors.get(f"{name}_scale_inv") or self._tensors.get(f"{name}_scale")
                if scale is not None:
                    yield self._scaled(name, tensor, scale, self._tensors.get(f"{name}_zero_point"))

    def _part(self, name: str, *, shape: tuple[int, ...] | None = None, types: tuple[str, ...] = ()) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise self._misfit(name, "is missing beside the tensors that need it")
        if shape is not None and tensor.shape != shape:
            raise self._misfit(name, f"has the shape {list(tensor.shape)}, expected {list(shape)}")
        if types and tensor.dtype.name not in types:
            raise self._misfit(name, f"is {tensor.dtype.name}, expected {' or '.join(types)}")
        return tensor

    def _misfit(self, name: str, what: str) -> RefusedError:
        return RefusedError(
            f"a part of a quantised tensor {what}",
            code="quantised-tensor",
            file=self._settings.path,
            tensor=name,
            hint=_CARRIED,
        )

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        form: Form,
        parts: list[Tensor],
        make: Callable[[], Decoder],
        dtype: str = "f32",
    ) -> DecodedTensor:
        return DecodedTensor.of(name, dtypes.by_name(dtype), shape, form, parts, make, self._cache)

    # GPTQ, AWQ

    def _int32(self, stem: str, qweight: Tensor) -> DecodedTensor:
        if len(qweight.shape) != 2 or qweight.dtype.name not in ("i32", "u32"):
            raise self._misfit(qweight.name, f"is {qweight.dtype.name} {list(qweight.shape)}, expected int32 [.., ..]")
        scales = self._part(f"{stem}.scales", types=_FLOATS)
        if len(scales.shape) != 2 or 0 in (*scales.shape, *qweight.shape):
            raise self._misfit(scales.name, f"has the shape {list(scales.shape)}, expected [groups, out]")
        if scales.shape[1] == qweight.shape[1]:
            return self._gptq(stem, qweight, scales)
        if scales.shape[1] == 8 * qweight.shape[1]:
            return self._awq(stem, qweight, scales)
        raise self._misfit(qweight.name, f"has the shape {list(qweight.shape)} beside scales {list(scales.shape)}")

    def _gptq(self, stem: str, qweight: Tensor, scales: Tensor) -> DecodedTensor:
        groups, outputs = scales.shape
        qzeros = self._part(f"{stem}.qzeros", types=("i32", "u32"))
        bits = [b for b in _GPTQ_BITS if qzeros.shape == (groups, -(-outputs * b // 32)) and not qweight.shape[0] % b]
        stated = self._settings.values.get("bits")
        if stated in bits:
            bits = [stated]
        if len(bits) != 1:
            raise self._misfit(qzeros.name, f"has the shape {list(qzeros.shape)} beside scales {list(scales.shape)}")
        inputs = qweight.shape[0] * 32 // bits[0]
        parts = [qweight, qzeros, scales]
        index = self._tensors.get(f"{stem}.g_idx")
        if index is not None:
            parts.append(self._part(index.name, shape=(inputs,), types=("i32", "i64")))
        group = self._group(inputs, groups, scales)
        less_one = self._settings.zeros_less_one
        form = Form("gptq", (("type", f"int{bits[0]}"), *_group_words(group, inputs)))

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs

            order = None if index is None else _group_of_column(index, groups, group)
            return packed_codecs.gptq(
                _words(qweight), _words(qzeros), _floats(scales), bits[0], group, order, zeros_less_one=less_one
            )

        return self._tensor(f"{stem}.weight", (outputs, inputs), form, parts, make)

    def _awq(self, stem: str, qweight: Tensor, scales: Tensor) -> DecodedTensor:
        (inputs, words), (groups, outputs) = qweight.shape, scales.shape
        qzeros = self._part(f"{stem}.qzeros", shape=(groups, words), types=("i32", "u32"))
        group = self._group(inputs, groups, scales)
        form = Form("awq", (("type", "int4"), *_group_words(group, inputs)))

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs

            return packed_codecs.awq(_words(qweight), _words(qzeros), _floats(scales), group)

        return self._tensor(f"{stem}.weight", (outputs, inputs), form, [qweight, qzeros, scales], make)

    def _group(self, columns: int, groups: int, scales: Tensor) -> int:
        """Returns the columns that share a scale: of `columns`, `groups` groups."""
        stated = [self._settings.group]
        stated += [weights.get("group_size") for weights in self._settings.weights()]
        for group in (*stated, -(-columns // max(1, groups))):
            if type(group) is int and group > 0 and -(-columns // group) == groups:
                return group
        raise self._misfit(scales.name, f"has {groups} groups for {columns} columns")

    # bitsandbytes

    def _four_bits(self, name: str, state: Tensor) -> DecodedTensor:
        kind = state.name.rpartition("bitsandbytes__")[2]
        if state.nbytes > _MAX_STATE_BYTES:
            raise self._misfit(state.name, f"has {state.nbytes} bytes, expected a short JSON object")
        values = strict_json.loads(
            state.raw(), what="quant_state", max_bytes=_MAX_STATE_BYTES, file=self._settings.path
        )
        shape, block, dtype = (values.get(key) for key in ("shape", "blocksize", "dtype"))
        names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
        if (
            not isinstance(shape, list)
            or type(block) is not int
            or block < 2
            or block % 2
            or dtype not in names
            or kind not in ("nf4", "fp4")
        ):
            raise self._misfit(state.name, f"says {str(values)[:200]}, which is not understood")
        count = dtypes.element_count(tuple(shape))
        data, code = self._part(name), self._part(f"{name}.quant_map", shape=(16,), types=("f32",))
        blocks = -(-count // block)
        if data.nbytes != -(-count // 2) or not count:
            raise self._misfit(name, f"has {data.nbytes} bytes, {list(shape)} needs {-(-count // 2)}")
        absmax = self._part(f"{name}.absmax", shape=(blocks,), types=("f32", "u8"))
        parts = [data, code, absmax, state]
        nested = absmax.dtype.name == "u8"
        if nested:
            nested_map = self._part(f"{name}.nested_quant_map", shape=(256,), types=("f32",))
            inner, offset = values.get("nested_blocksize"), values.get("nested_offset")
            if type(inner) is not int or inner < 1 or not isinstance(offset, float | int):
                raise self._misfit(state.name, f"says {str(values)[:200]}, which is not understood")
            nested_max = self._part(f"{name}.nested_absmax", shape=(-(-blocks // inner),), types=("f32",))
            parts += [nested_map, nested_max]

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs

            scales = absmax.read()
            if nested:
                scales = packed_codecs.nested_absmax(scales, nested_map.read(), nested_max.read(), inner, float(offset))
            return packed_codecs.bitsandbytes(_bytes(data).reshape(-1), code.read(), scales, block)

        details = (("type", kind), ("block", block), *((("scales", "8 bits"),) if nested else ()))
        # The form itself says of which type its values are, and the library rounds them to it whatever it computes in.
        return self._tensor(name, tuple(shape), Form("bitsandbytes", details), parts, make, names[dtype])

    def _int8(self, stem: str, weight: Tensor) -> DecodedTensor:
        if len(weight.shape) != 2:
            raise self._misfit(weight.name, f"has the shape {list(weight.shape)}, expected [out, in]")
        absmax = self._part(f"{stem}.SCB", shape=(weight.shape[0],), types=_FLOATS)
        layout = self._tensors.get(f"{stem}.weight_format")
        if layout is not None:
            if layout.nbytes > 8 or any(layout.raw()):
                raise self._misfit(layout.name, "asks for another layout than rows")
            self.unused.add(layout.name)

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs

            return packed_codecs.int8_rows(_bytes(weight), _floats(absmax))

        form = Form("bitsandbytes", (("type", "int8"), ("scale", "per row")))
        return self._tensor(weight.name, weight.shape, form, [weight, absmax], make)

    # FP8, compressed-tensors

    def _torchao(self, stem: str, weight: Tensor) -> DecodedTensor:
        """Float8Tensor, Int8Tensor and IntxUnpackedToInt8Tensor, taken apart as torchao's safetensors have them."""
        if weight.dtype.name not in (*_FLOAT8, "i8") or len(weight.shape) != 2:
            what = f"{weight.name} is packed by torchao as {weight.dtype.name} {list(weight.shape)}"
            raise _refused(what, self._settings.path, _CARRIED, expected="float8 or int8 [out, in]")
        scale = self._part(f"{stem}._weight_scale")
        return self._scaled(f"{stem}.weight", weight, scale, self._tensors.get(f"{stem}._weight_zero_point"))

    def _scaled(self, name: str, weight: Tensor, scale: Tensor, zero: Tensor | None) -> DecodedTensor:
        """Floats or integers of 8 bits beside their scale: per tensor, row, group or block."""
        rows, columns = weight.shape
        shape, by_rows, group = self._scale_shape(scale, rows, columns)
        parts = [weight, scale]
        if zero is not None:
            parts.append(self._part(zero.name, shape=scale.shape))
        order = self._tensors.get(f"{name}_g_idx")
        if order is not None:
            parts.append(self._part(order.name, shape=(columns,), types=("i32", "i64")))
        is_float = weight.dtype.is_float
        kind = weight.dtype.name if is_float else "int8"
        method = self._settings.method
        words = _scale_words(shape, by_rows, group, columns)
        form = Form(
            method if method in ("compressed-tensors", "torchao") else "fp8" if is_float else "int8",
            (("type", kind), *words),
        )

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs as codecs

            zeros = None if zero is None else _floats(zero).reshape(shape)
            return codecs.Grouped(
                codecs.eight_bit_floats(_bytes(weight), weight.dtype.numpy)
                if is_float
                else codecs.Whole(weight.read()),
                _floats(scale).reshape(shape),
                group,
                zeros=zeros,
                rows_per_scale=by_rows,
                group_of_column=None if order is None else _group_of_column(order, shape[1], group),
            )

        return self._tensor(name, weight.shape, form, parts, make)

    def _scale_shape(self, scale: Tensor, rows: int, columns: int) -> tuple[tuple[int, int], int, int]:
        """Returns a scale's shape as a matrix, and the rows and columns that share one of its numbers."""
        if scale.dtype.name not in (*_FLOATS, "f8_e8m0"):
            raise self._misfit(scale.name, f"is {scale.dtype.name}, expected one of {', '.join(_FLOATS)}")
        count = dtypes.element_count(scale.shape)
        if count == 1:
            return (1, 1), rows, columns
        if scale.shape in ((rows,), (rows, 1)):
            return (rows, 1), 1, columns
        if len(scale.shape) == 2 and scale.shape[0] == rows:
            return (rows, scale.shape[1]), 1, self._group(columns, scale.shape[1], scale)
        height, width = self._settings.block()
        if scale.shape == (-(-rows // height), -(-columns // width)):
            return (scale.shape[0], scale.shape[1]), height, width
        raise self._misfit(
            scale.name,
            f"has the shape {list(scale.shape)} for {rows} rows and {columns} columns: neither one scale, nor one for "
            f"each row or group, nor blocks of {height} x {width}",
        )

    def _packed(self, stem: str, packed: Tensor) -> DecodedTensor:
        """compressed-tensors: integers in int32, or floats of 4 bits in bytes."""
        if len(packed.shape) != 2:
            raise self._misfit(packed.name, f"has the shape {list(packed.shape)}, expected [out, ..]")
        name, scale = f"{stem}.weight", self._part(f"{stem}.weight_scale")
        if packed.dtype.name == "u8":
            return self._four_bit_floats(name, packed, scale)
        if packed.dtype.name not in ("i32", "u32"):
            raise self._misfit(packed.name, f"is {packed.dtype.name}, expected int32")
        given = self._part(f"{stem}.weight_shape", types=("i64", "i32"))
        shape = tuple(int(size) for size in given.read().reshape(-1)[:2])
        if given.nbytes > 16 or len(shape) != 2 or min(shape) < 1 or shape[0] != packed.shape[0]:
            raise self._misfit(given.name, f"says {list(shape)} beside {list(packed.shape)} packed words")
        rows, columns = shape
        stated = [weights.get("num_bits") for weights in self._settings.weights()]
        bits = [b for b in (*stated, *range(1, 9)) if type(b) is int and packed.shape[1] == -(-columns * b // 32)]
        if not bits or not 1 <= bits[0] <= 8:
            raise self._misfit(packed.name, f"has {packed.shape[1]} words for {columns} columns")
        matrix, by_rows, group = self._scale_shape(scale, rows, columns)
        parts = [packed, scale, given]
        zero, order = (self._tensors.get(f"{stem}.weight_{part}") for part in ("zero_point", "g_idx"))
        if zero is not None:
            wanted = (-(-rows * bits[0] // 32), matrix[1])
            parts.append(self._part(zero.name, shape=wanted, types=("i32", "u32")))
        if order is not None:
            parts.append(self._part(order.name, shape=(columns,), types=("i32", "i64")))
        form = Form(
            "compressed-tensors",
            (("type", f"int{bits[0]}"), *_scale_words(matrix, by_rows, group, columns)),
        )

        def make() -> Decoder:
            from apr_jax.converters.formats import packed_codecs

            decoder = packed_codecs.packed_rows(
                _words(packed),
                bits[0],
                columns,
                _floats(scale).reshape(matrix),
                group,
                None if zero is None else _words(zero),
            )
            columns_group = None if order is None else _group_of_column(order, matrix[1], group)
            return dataclasses.replace(decoder, rows_per_scale=by_rows, group_of_column=columns_group)

        return self._tensor(name, shape, form, parts, make)

    def _four_bit_floats(self, name: str, packed: Tensor, scale: Tensor) -> DecodedTensor:
        """NVFP4 (scales in E4M3 and one for the tensor) and MXFP4 (scales are powers of two)."""
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        if len(scale.shape) != 2 or scale.shape[0] != rows or scale.dtype.name not in ("f8_e4m3", "u8", "f8_e8m0"):
            raise self._misfit(scale.name, f"is {scale.dtype.name} {list(scale.shape)}, expected [{rows}, groups]")
        group = self._group(columns, scale.shape[1], scale)
        parts = [packed, scale]
        whole = self._tensors.get(f"{name}_global_scale")
        if whole is not None:
            parts.append(self._part(whole.name, types=_FLOATS))
            if whole.nbytes > 4:
                raise self._misfit(whole.name, f"has the shape {list(whole.shape)}, expected one number")
        kind = "nvfp4" if scale.dtype.name == "f8_e4m3" else "mxfp4"

        def make() -> Decoder:
            import numpy as np

            from apr_jax.converters.formats import packed_codecs as codecs

            scales = _floats(scale) if scale.dtype.is_float else np.exp2(_floats(scale) - np.float32(127))
            if whole is not None:
                scales = scales / _floats(whole).reshape(())
            return codecs.Grouped(codecs.four_bit_floats(_bytes(packed)), scales, group)

        form = Form("compressed-tensors", (("type", kind), *_group_words(group, columns)))
        return self._tensor(name, (rows, columns), form, parts, make)


# --- reading parts


def _words(tensor: Tensor) -> np.ndarray:
    return tensor.read().view("<u4")


def _bytes(tensor: Tensor) -> np.ndarray:
    import numpy as np

    data = np.empty(tensor.nbytes, np.uint8)
    tensor.readinto(data.data)
    return data.reshape(tensor.shape)


def _floats(tensor: Tensor) -> np.ndarray:
    import numpy as np

    return np.asarray(tensor.read().astype(np.float32))


def _group_of_column(index: Tensor, groups: int, group: int) -> np.ndarray | None:
    """Returns the group of each column; None where neighbours share one, as without act-order.

    Raises:
      RefusedError: Code "quantised-tensor": an index of no group.
    """
    import numpy as np

    order = index.read().astype(np.int64)
    if order.size and not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise RefusedError(
            "a group index is out of range",
            code="quantised-tensor",
            file=index.source.path,
            tensor=index.name,
            found=f"{order.min()} to {order.max()}",
            expected=f"0 to {groups - 1}",
            hint=_CARRIED,
        )
    return None if np.array_equal(order, np.arange(order.size) // group) else order


# --- words


_Words = tuple[tuple[str, str | int], ...]


def _group_words(group: int, columns: int) -> _Words:
    return (("group", group),) if group < columns else (("scale", "per row"),)


def _scale_words(matrix: tuple[int, int], by_rows: int, group: int, columns: int) -> _Words:
    if matrix == (1, 1):
        return (("scale", "per tensor"),)
    if by_rows > 1:
        return (("block", f"{by_rows} x {group}"),)
    return _group_words(group, columns)
