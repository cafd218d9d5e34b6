"""The element types: one table, the only place where a dtype id, name or width is written down.

A row says how the bytes of a type are laid out, which codes stand for it in `.apr`, safetensors and GGML, which numpy
(and so JAX) type holds its values, and into which types every one of its values casts without change.

An `.apr` id means different things in files of different age and origin, so it is never resolved alone but together
with the tensor's shape and byte size (`by_apr_id`). Sources: apr-v2-format sections 2.1 to 2.4; safetensors 0.8.0;
ggml.h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from apr_jax.converters.errors import BrokenContainerError, RefusedError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from apr_jax.converters.formats.codecs import Codec

CURRENT = "current"
MARCH_APRENDER = "aprender=2026-03"
OLD_APRENDER = "aprender<2026-03"
OLD_ENGINE = "engine<2026-01-30"
ENGINE = "engine>=2026-01-30"
ERAS: Mapping[str, str] = MappingProxyType(
    {
        CURRENT: "aprender since GH-438, March 2026",
        MARCH_APRENDER: "aprender in March 2026, bf16 moved and q4 and q8 not yet",
        OLD_APRENDER: "aprender until March 2026",
        OLD_ENGINE: "realizar until 2026-01-30, with a table of its own",
        ENGINE: "realizar since 2026-01-30, with GGML's numbering",
    }
)

# Whether to read ids as older and other writers meant them: False, no; True, where the size leaves one type; or besides
# what some ids stand for, id -> name of the type.
Legacy = bool | Mapping[int, str]

# How elements share blocks. "plain": N elements of equal width. "rows": every row is a whole number of blocks (GGML).
# "padded-rows": whole blocks over the flattened tensor, or each row padded to whole blocks. "flat": whole blocks over
# the flattened tensor, the last one padded. "scaled": one f32 scale, then one byte per element; nothing for no
# elements.
_PLAIN, _ROWS, _PADDED_ROWS, _FLAT, _SCALED = "plain", "rows", "padded-rows", "flat", "scaled"

# Python, numpy and the file formats agree up to here; beyond it a product can wrap in somebody's 64 bits.
_WIDEST = 8  # bytes of a value in memory
_MAX_COUNT = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class AprId:
    """One meaning of one `.apr` dtype byte.

    Attributes:
      id: The byte, 0..255.
      era: A key of `ERAS`.
      writer: Who wrote such files, and when.
    """

    id: int
    era: str

    @property
    def writer(self) -> str:
        return ERAS[self.era]


@dataclasses.dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
      name: Canonical name, lower case.
      bits: Bits of one element; None for quantised blocks.
      block_elements: Elements that share one block; 1 for types of whole bytes.
      block_bytes: Bytes of one block.
      apr_ids: Every `.apr` id that ever stood for the type.
      safetensors: Its code in safetensors, or None.
      ggml: Its `ggml_type`, or None.
      numpy_name: The numpy or ml_dtypes type whose arrays have the very bytes of the file (JAX's type has the same
        name), or None where bytes have to be decoded first.
      exact_casts: Names of the other types that hold every value of this one, infinities, NaN and -0 included.
      packing: How elements are gathered in blocks.
      codec_name: The class of `codecs` (or, with its name in front, `grid_codecs`) that turns its bytes into values,
        or None if nothing does.
    """

    name: str
    bits: int | None
    block_elements: int
    block_bytes: int
    apr_ids: tuple[AprId, ...] = ()
    safetensors: str | None = None
    ggml: int | None = None
    numpy_name: str | None = None
    exact_casts: frozenset[str] = frozenset()
    packing: str = _PLAIN
    codec_name: str | None = None

    @property
    def is_block(self) -> bool:
        """Whether the values have to be decoded from quantised blocks."""
        return self.bits is None

    @property
    def is_float(self) -> bool:
        """Whether the elements are plain real floating-point numbers."""
        return self.bits is not None and self.name.lstrip("b").startswith("f")

    @property
    def codec(self) -> Codec:
        """What decodes values of this type.

        Raises:
          RefusedError: Code "dtype-not-decoded", listing the types that can be decoded.
        """
        if self.codec_name is None:
            raise RefusedError(
                f"values of type {self.name} cannot be read: nothing here decodes them",
                code="dtype-not-decoded",
                expected=f"one of {' '.join(dtype.name for dtype in TYPES.values() if dtype.codec_name)}",
                hint="Its bytes can be read as they are (raw, stream)",
            )
        from apr_jax.converters.formats import codecs, grid_codecs

        module, _, name = self.codec_name.rpartition(".")
        codec: Codec = getattr(grid_codecs if module else codecs, name)()
        return codec

    @property
    def apr_id(self) -> int | None:
        """The id that current `.apr` files carry, or None if they cannot hold the type."""
        return next((known.id for known in self.apr_ids if known.era == CURRENT), None)

    @property
    def numpy(self) -> np.dtype:
        """The numpy dtype of the bytes as they stand in a file (little-endian).

        Raises:
          RefusedError: Code "dtype-not-decoded", if no array type has these bytes.
        """
        if self.numpy_name is None:
            raise RefusedError(
                f"no array type has the bytes of {self.name}",
                code="dtype-not-decoded",
                hint="Its bytes can be read as they are (raw, stream)",
            )
        import numpy as np

        module, _, attribute = self.numpy_name.rpartition(".")
        if module:
            import ml_dtypes

            found = np.dtype(getattr(ml_dtypes, attribute))
            if found.itemsize > 1 and not _is_little_endian():
                raise RefusedError(
                    f"{self.name} has no array type on a big-endian machine",
                    code="dtype-not-decoded",
                    hint="Cast it to f32; its bytes can be read as they are (raw, stream)",
                )
            return found
        return np.dtype(self.numpy_name).newbyteorder("<")

    @property
    def torch(self) -> str | None:
        """What torch, and so the `torch_dtype` of a config.json, calls the type: the same as numpy and ml_dtypes do."""
        return self.numpy_name and self.numpy_name.rpartition(".")[2]

    def nbytes(self, shape: Sequence[int]) -> int:
        """Returns the bytes of a tensor of this shape (for K-quants: of the flat layout).

        Raises:
          BrokenContainerError: The shape is malformed or overflows 63 bits, or does not fill whole bytes or blocks.
        """
        sizes = self.sizes(shape)
        if not sizes:
            raise BrokenContainerError(
                f"shape {list(shape)} does not fill whole blocks of {self.block_elements} {self.name} elements",
                code="shape-blocks",
            )
        return sizes[0]

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns every byte size that a tensor of this shape may have; empty if the shape cannot be stored.

        Raises:
          BrokenContainerError: The shape is malformed or overflows 63 bits.
        """
        count = element_count(shape)
        # No array holds nothing in a shape whose other sizes are beyond what can be addressed.
        if not count and math.prod(filter(None, shape)) * _WIDEST > _MAX_COUNT:
            raise _overflow(shape)
        whole, rest = divmod(count, self.block_elements)
        flat = (whole + (rest > 0)) * self.block_bytes
        if self.packing == _SCALED:
            sizes: tuple[int, ...] = (4 + count if count else 0,)
        elif self.packing == _FLAT:
            sizes = (flat,)
        elif self.packing == _PADDED_ROWS:
            columns = shape[-1] if shape else 1
            rows = count // columns if columns else 0
            padded = rows * -(-columns // self.block_elements) * self.block_bytes
            sizes = (flat,) if padded == flat else (flat, padded)
        elif self.packing == _ROWS:
            sizes = () if (shape[-1] if shape else 1) % self.block_elements else (flat,)
        else:
            sizes = () if rest else (flat,)
        if any(size > _MAX_COUNT for size in sizes):
            raise _overflow(shape)
        return sizes

    def encoded_nbytes(self, shape: Sequence[int]) -> int:
        """Returns the bytes of a tensor of this shape as it is written from values: K-quants row by row, as `apr` does.

        Raises:
          BrokenContainerError: As `nbytes`.
        """
        self.nbytes(shape)
        return self.sizes(shape)[-1]

    def padded_columns(self, shape: Sequence[int], nbytes: int) -> int | None:
        """Returns the length of rows that are padded to whole blocks each; None if blocks run on across rows.

        Where both layouts have the same size the rows are padded: the only writer of rows that are not whole blocks
        (aprender, apr-v2-format 2.4) pads them.
        """
        if self.packing != _PADDED_ROWS or len(shape) < 2 or not shape[-1] % self.block_elements:
            return None
        return shape[-1] if nbytes == self.sizes(shape)[-1] else None


def element_count(shape: Sequence[int]) -> int:
    """Returns the product of the dimensions, 1 for a scalar.

    Raises:
      BrokenContainerError: A dimension is no integer of 0..2**63-1, or the product of those that are not 0 is larger.
    """
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= _MAX_COUNT:
            raise BrokenContainerError(
                f"dimension {dimension!r} is not an integer of 0..2**63-1", code="shape-dimension", found=_shown(shape)
            )
    # Zeros are left out, so that the verdict does not depend on the order of the dimensions.
    if math.prod(filter(None, shape)) > _MAX_COUNT:
        raise _overflow(shape)
    return math.prod(shape)


def _is_little_endian() -> bool:
    import numpy as np

    return np.dtype("<u2").isnative


def _overflow(shape: Sequence[int]) -> BrokenContainerError:
    return BrokenContainerError("the shape overflows 63 bits", code="shape-overflow", found=_shown(shape))


def _shown(shape: Sequence[int]) -> str:
    return str([str(dimension)[:24] for dimension in shape[:9]]).replace("'", "")


def _plain(
    name: str,
    bits: int,
    safetensors: str,
    numpy_name: str | None,
    *,
    apr: Mapping[str, int] | None = None,
    ggml: int | None = None,
    exact: str = "",
) -> DType:
    # The smallest group that fills whole bytes: 2 elements of 4 bits, 4 of 6 bits, else 1.
    elements = 8 // math.gcd(8, bits)
    return DType(
        name=name,
        bits=bits,
        block_elements=elements,
        block_bytes=elements * bits // 8,
        apr_ids=_apr_ids(apr),
        safetensors=safetensors,
        ggml=ggml,
        numpy_name=numpy_name,
        exact_casts=frozenset(exact.split()),
    )


def _block(
    name: str,
    elements: int,
    nbytes: int,
    *,
    ggml: int | None = None,
    apr: Mapping[str, int] | None = None,
    packing: str = _ROWS,
    codec: str | None = None,
) -> DType:
    return DType(name, None, elements, nbytes, apr_ids=_apr_ids(apr), ggml=ggml, packing=packing, codec_name=codec)


def _apr_ids(apr: Mapping[str, int] | None) -> tuple[AprId, ...]:
    return tuple(AprId(id, era) for era, id in (apr or {}).items())


_F16_UP = "f16 bf16 f32 f64 c64"
_ROWS_OF_THE_TABLE = (
    # --- one element, whole bytes; safetensors' codes
    _plain("f64", 64, "F64", "float64", apr={CURRENT: 3, MARCH_APRENDER: 3, OLD_APRENDER: 3}, ggml=28),
    _plain(
        "f32",
        32,
        "F32",
        "float32",
        apr={CURRENT: 0, MARCH_APRENDER: 0, OLD_APRENDER: 0, OLD_ENGINE: 0, ENGINE: 0},
        ggml=0,
        exact="f64 c64",
    ),
    _plain(
        "f16",
        16,
        "F16",
        "float16",
        apr={CURRENT: 1, MARCH_APRENDER: 1, OLD_APRENDER: 1, OLD_ENGINE: 1, ENGINE: 1},
        ggml=1,
        exact="f32 f64 c64",
    ),
    _plain(
        "bf16",
        16,
        "BF16",
        "ml_dtypes.bfloat16",
        apr={CURRENT: 30, MARCH_APRENDER: 30, OLD_APRENDER: 2, OLD_ENGINE: 2, ENGINE: 30},
        ggml=30,
        exact="f32 f64 c64",
    ),
    _plain("i64", 64, "I64", "int64", apr={CURRENT: 5, MARCH_APRENDER: 5, OLD_APRENDER: 5, OLD_ENGINE: 6}, ggml=27),
    _plain(
        "i32",
        32,
        "I32",
        "int32",
        apr={CURRENT: 4, MARCH_APRENDER: 4, OLD_APRENDER: 4, OLD_ENGINE: 5},
        ggml=26,
        exact="i64 f64",
    ),
    _plain("i16", 16, "I16", "int16", apr={OLD_ENGINE: 4}, ggml=25, exact="i32 i64 f32 f64 c64"),
    _plain(
        "i8",
        8,
        "I8",
        "int8",
        apr={CURRENT: 6, MARCH_APRENDER: 6, OLD_APRENDER: 6, OLD_ENGINE: 3},
        ggml=24,
        exact=f"i16 i32 i64 {_F16_UP}",
    ),
    _plain("u64", 64, "U64", "uint64"),
    _plain("u32", 32, "U32", "uint32", exact="u64 i64 f64"),
    _plain("u16", 16, "U16", "uint16", exact="u32 u64 i32 i64 f32 f64 c64"),
    _plain(
        "u8",
        8,
        "U8",
        "uint8",
        apr={CURRENT: 7, MARCH_APRENDER: 7, OLD_APRENDER: 7, OLD_ENGINE: 7},
        exact=f"u16 u32 u64 i16 i32 i64 {_F16_UP}",
    ),
    _plain(
        "bool",
        8,
        "BOOL",
        "bool",
        exact="u8 u16 u32 u64 i8 i16 i32 i64 f4 f6_e2m3 f6_e3m2 f8_e4m3 f8_e5m2 f8_e4m3fnuz f8_e5m2fnuz " + _F16_UP,
    ),
    _plain("c64", 64, "C64", "complex64"),
    _plain("f8_e5m2", 8, "F8_E5M2", "ml_dtypes.float8_e5m2", exact=_F16_UP),
    _plain("f8_e4m3", 8, "F8_E4M3", "ml_dtypes.float8_e4m3fn", exact=_F16_UP),
    _plain("f8_e5m2fnuz", 8, "F8_E5M2FNUZ", "ml_dtypes.float8_e5m2fnuz", exact=_F16_UP),
    _plain("f8_e4m3fnuz", 8, "F8_E4M3FNUZ", "ml_dtypes.float8_e4m3fnuz", exact=_F16_UP),
    _plain("f8_e8m0", 8, "F8_E8M0", "ml_dtypes.float8_e8m0fnu", exact="bf16 f32 f64 c64"),
    # Packed tightly in the file while ml_dtypes spends a byte on each element: no array has these bytes.
    _plain("f6_e2m3", 6, "F6_E2M3", None, exact=f"f8_e4m3 {_F16_UP}"),
    _plain("f6_e3m2", 6, "F6_E3M2", None, exact=f"f8_e4m3 f8_e5m2 {_F16_UP}"),
    _plain("f4", 4, "F4", None, exact=f"f6_e2m3 f6_e3m2 f8_e4m3 f8_e5m2 {_F16_UP}"),
    # --- aprender's own quantised types
    _block("apr_q4", 32, 18, apr={CURRENT: 128, MARCH_APRENDER: 8, OLD_APRENDER: 8}, packing=_FLAT, codec="AprQ4"),
    _block("apr_q8", 1, 1, apr={CURRENT: 129, MARCH_APRENDER: 9, OLD_APRENDER: 9}, packing=_SCALED, codec="AprQ8"),
    # --- GGML blocks
    _block("q4_0", 32, 18, ggml=2, apr={ENGINE: 2}, codec="Q4_0"),
    _block("q4_1", 32, 20, ggml=3, apr={ENGINE: 3}, codec="Q4_1"),
    _block("q5_0", 32, 22, ggml=6, apr={ENGINE: 6}, codec="Q5_0"),
    _block("q5_1", 32, 24, ggml=7, apr={ENGINE: 7}, codec="Q5_1"),
    _block("q8_0", 32, 34, ggml=8, apr={ENGINE: 8, OLD_ENGINE: 10}, codec="Q8_0"),
    # Two f16 and 32 bytes since ggml's 2024 change; the gguf package still counts the two as f32 (40 bytes).
    _block("q8_1", 32, 36, ggml=9, apr={ENGINE: 9}, codec="Q8_1"),
    _block("q2_k", 256, 84, ggml=10, apr={ENGINE: 10}, codec="Q2_K"),
    _block("q3_k", 256, 110, ggml=11, apr={ENGINE: 11}, codec="Q3_K"),
    _block(
        "q4_k",
        256,
        144,
        ggml=12,
        apr={CURRENT: 12, MARCH_APRENDER: 12, OLD_APRENDER: 12, OLD_ENGINE: 8, ENGINE: 12},
        packing=_PADDED_ROWS,
        codec="Q4_K",
    ),
    _block("q5_k", 256, 176, ggml=13, apr={ENGINE: 13}, codec="Q5_K"),
    _block(
        "q6_k",
        256,
        210,
        ggml=14,
        apr={CURRENT: 14, MARCH_APRENDER: 14, OLD_APRENDER: 14, OLD_ENGINE: 9, ENGINE: 14},
        packing=_PADDED_ROWS,
        codec="Q6_K",
    ),
    _block("q8_k", 256, 292, ggml=15),
    _block("iq2_xxs", 256, 66, ggml=16, apr={ENGINE: 16}, codec="grid_codecs.IQ2_XXS"),
    _block("iq2_xs", 256, 74, ggml=17, apr={ENGINE: 17}, codec="grid_codecs.IQ2_XS"),
    _block("iq3_xxs", 256, 98, ggml=18, codec="grid_codecs.IQ3_XXS"),
    _block("iq1_s", 256, 50, ggml=19, codec="grid_codecs.IQ1_S"),
    _block("iq4_nl", 32, 18, ggml=20, codec="grid_codecs.IQ4_NL"),
    _block("iq3_s", 256, 110, ggml=21, codec="grid_codecs.IQ3_S"),
    _block("iq2_s", 256, 82, ggml=22, codec="grid_codecs.IQ2_S"),
    _block("iq4_xs", 256, 136, ggml=23, codec="grid_codecs.IQ4_XS"),
    _block("iq1_m", 256, 56, ggml=29, codec="grid_codecs.IQ1_M"),
    _block("tq1_0", 256, 54, ggml=34, codec="grid_codecs.TQ1_0"),
    _block("tq2_0", 256, 66, ggml=35, codec="grid_codecs.TQ2_0"),
    _block("mxfp4", 32, 17, ggml=39, codec="grid_codecs.MXFP4"),
    _block("nvfp4", 64, 36, ggml=40, codec="grid_codecs.NVFP4"),
    _block("q1_0", 128, 18, ggml=41),
)

TYPES: Mapping[str, DType] = MappingProxyType({dtype.name: dtype for dtype in _ROWS_OF_THE_TABLE})
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _ROWS_OF_THE_TABLE if dtype.safetensors}
_BY_APR_ID: dict[int, list[tuple[AprId, DType]]] = {}
for _dtype in _ROWS_OF_THE_TABLE:
    for _known in _dtype.apr_ids:
        _BY_APR_ID.setdefault(_known.id, []).append((_known, _dtype))


def by_name(name: str) -> DType:
    """Returns the type of this canonical name.

    Raises:
      RefusedError: Code "dtype-unknown", listing the known names.
    """
    if name not in TYPES:
        raise RefusedError(f"unknown type '{name}'", code="dtype-unknown", expected=f"one of {' '.join(TYPES)}")
    return TYPES[name]


def by_safetensors(code: str) -> DType:
    """Returns the type of this safetensors code.

    Raises:
      BrokenContainerError: Code "dtype-unknown", listing the known codes.
    """
    if code not in _BY_SAFETENSORS:
        known = " ".join(_BY_SAFETENSORS)
        raise BrokenContainerError(
            "unknown dtype", code="dtype-unknown", found=repr(code)[:80], expected=f"one of {known}"
        )
    return _BY_SAFETENSORS[code]


def apr_meanings(id: int) -> tuple[tuple[AprId, DType], ...]:
    """Returns every meaning that an `.apr` dtype byte ever had, the current one first; empty for an unknown id."""
    return tuple(sorted(_BY_APR_ID.get(id, ()), key=lambda meaning: list(ERAS).index(meaning[0].era)))


def fitting_eras(tensors: Iterable[tuple[int, Sequence[int], int]]) -> tuple[str, ...]:
    """Returns the eras in which all tensors of an `.apr` can have been written, by their ids and sizes.

    Args:
      tensors: (dtype id, shape, bytes) of each; no bytes despite elements mean a placeholder, of which only the id
        counts.

    Returns:
      Keys of `ERAS`, in their order.
    """
    eras = set(ERAS)
    for id, shape, nbytes in tensors:
        placeholder = not nbytes and element_count(shape)
        eras &= {known.era for known, dtype in apr_meanings(id) if placeholder or nbytes in dtype.sizes(shape)}
    return tuple(era for era in ERAS if era in eras)


def parse_legacy(texts: Sequence[str]) -> Legacy:
    """Returns what `--legacy` says: given once or more, each time empty or "ID=TYPE"; never given means False.

    Raises:
      UsageError: Code "legacy-meaning": no id, or a type that it never stood for.
    """
    said: dict[int, str] = {}
    for text in filter(None, texts):
        id, _, name = text.partition("=")
        if not id.isdecimal() or not name:
            raise UsageError(f"'{text}' is not ID=TYPE", code="legacy-meaning", expected="as in --legacy 8=q4_k")
        said[int(id)] = name.lower()
    for known in said:
        _said(known, said)
    return (said or True) if texts else False


def _said(id: int, legacy: Legacy) -> DType | None:
    """Returns the type that the user says an id stands for, or None."""
    if isinstance(legacy, bool) or id not in legacy:
        return None
    candidates = _distinct(apr_meanings(id))
    for dtype in candidates:
        if dtype.name == legacy[id]:
            return dtype
    raise UsageError(
        f"dtype id {id} never stood for '{legacy[id]}'",
        code="legacy-meaning",
        expected=f"one of {' '.join(dtype.name for dtype in candidates)}" if candidates else "an id that is known",
    )


def _meanings(id: int) -> tuple[tuple[AprId, DType], ...]:
    meanings = apr_meanings(id)
    if not meanings:
        known = " ".join(str(known) for known in sorted(_BY_APR_ID))
        raise BrokenContainerError("unknown dtype id", code="dtype-unknown", found=id, expected=f"one of {known}")
    return meanings


def placeholder_type(id: int, legacy: Legacy = False) -> DType:
    """Returns what the id of a tensor without data means: its size says nothing.

    Raises:
      BrokenContainerError: Code "dtype-unknown", listing the known ids.
      RefusedError: Code "dtype-legacy", if current files do not use the id.
    """
    meanings = _meanings(id)
    if (known := meanings[0][0]).era != CURRENT and legacy is False:
        raise _refused(known.id, meanings, "dtype-legacy")
    return _said(id, legacy) or meanings[0][1]


def by_apr_id(id: int, shape: Sequence[int], nbytes: int, legacy: Legacy = False) -> DType:
    """Returns the type of a tensor in an `.apr` file, from its dtype id, shape and byte size.

    Args:
      id: The dtype byte.
      shape: The dimensions.
      nbytes: The size of the data.
      legacy: Whether to take older and other writers' meanings where one type alone has this size, or what the ids
        stand for where the size does not decide.

    Raises:
      BrokenContainerError: Code "dtype-unknown" for an id that nobody ever wrote, "size-mismatch" if no meaning of the
        id has this size.
      RefusedError: Code "dtype-ambiguous" if several meanings fit, "dtype-legacy" if only an older or another writer's
        meaning fits; both name the candidates.
      UsageError: Code "legacy-meaning": `legacy` gives the id a meaning that it never had.
    """
    meanings = _meanings(id)
    said = _said(id, legacy)
    if said is not None:
        meanings = tuple(meaning for meaning in meanings if meaning[1] is said)
    fitting = tuple(meaning for meaning in meanings if nbytes in meaning[1].sizes(shape))
    candidates = _distinct(fitting)
    is_current = bool(fitting) and fitting[0][0].era == CURRENT
    # No elements, no bytes: then nothing depends on which type it is.
    if candidates and (len(candidates) == 1 or not nbytes) and (is_current or legacy is not False):
        return candidates[0]
    if len(candidates) > 1 and nbytes:
        raise _refused(id, fitting, "dtype-ambiguous")
    if legacy is False and (fitting or meanings[0][0].era != CURRENT):
        raise _refused(id, fitting or meanings, "dtype-legacy")
    expected = " or ".join(
        f"{size} bytes for {dtype.name}" for dtype in _distinct(meanings) for size in dtype.sizes(shape)
    )
    raise BrokenContainerError(
        f"the byte size does not fit dtype id {id} and shape {list(shape)}",
        code="size-mismatch",
        found=nbytes,
        expected=expected or f"a shape of whole blocks of {meanings[0][1].block_elements}",
    )


def _distinct(meanings: Iterable[tuple[AprId, DType]]) -> list[DType]:
    return list({dtype.name: dtype for _, dtype in meanings}.values())


def _refused(id: int, meanings: Sequence[tuple[AprId, DType]], code: str) -> RefusedError:
    types = _distinct(meanings)
    candidates = "; ".join(
        f"{dtype.name} ({', '.join(known.writer for known, other in meanings if other is dtype)})" for dtype in types
    )
    said = [f"--legacy {id}={dtype.name}" for dtype in types]
    if code == "dtype-ambiguous":
        what, hint = "fits more than one type", f"Its size does not decide; say what it is: {' or '.join(said)}"
    else:
        what = "is not one that current .apr files use like this"
        hint = f"--legacy reads it as {types[0].name}" if len(types) == 1 else "--legacy takes what the size decides"
    return RefusedError(f"dtype id {id} {what}", code=code, found=id, expected=f"candidates: {candidates}", hint=hint)
