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

from converters.errors import BrokenContainerError, RefusedError

if TYPE_CHECKING:
    import numpy as np

CURRENT = "current"
OLD_APRENDER = "aprender<2026-03"
OLD_ENGINE = "engine<2026-01-30"
ENGINE = "engine>=2026-01-30"
ERAS: Mapping[str, str] = MappingProxyType(
    {
        CURRENT: "aprender since March 2026",
        OLD_APRENDER: "aprender until March 2026",
        OLD_ENGINE: "realizar until 2026-01-30, with a table of its own",
        ENGINE: "realizar since 2026-01-30, with GGML's numbering",
    }
)

# How elements share blocks. "plain": N elements of equal width. "rows": every row is a whole number of blocks (GGML).
# "padded-rows": whole blocks over the flattened tensor, or each row padded to whole blocks. "flat": whole blocks over
# the flattened tensor, the last one padded. "scaled": one f32 scale, then one byte per element; nothing for no
# elements.
_PLAIN, _ROWS, _PADDED_ROWS, _FLAT, _SCALED = "plain", "rows", "padded-rows", "flat", "scaled"

# Python, numpy and the file formats agree up to here; beyond it a product can wrap in somebody's 64 bits.
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

    @property
    def is_block(self) -> bool:
        """Whether the values have to be decoded from quantised blocks."""
        return self.bits is None

    @property
    def is_float(self) -> bool:
        """Whether the elements are plain real floating-point numbers."""
        return self.bits is not None and self.name.lstrip("b").startswith("f")

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
                f"values of type {self.name} cannot be read yet: decoding of this type is not available",
                code="dtype-not-decoded",
                hint="Its bytes can be read as they are (raw, stream)",
            )
        import numpy as np

        module, _, attribute = self.numpy_name.rpartition(".")
        if module:
            import ml_dtypes

            return np.dtype(getattr(ml_dtypes, attribute))
        return np.dtype(self.numpy_name).newbyteorder("<")

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
) -> DType:
    return DType(name, None, elements, nbytes, apr_ids=_apr_ids(apr), ggml=ggml, packing=packing)


def _apr_ids(apr: Mapping[str, int] | None) -> tuple[AprId, ...]:
    return tuple(AprId(id, era) for era, id in (apr or {}).items())


_F16_UP = "f16 bf16 f32 f64 c64"
_ROWS_OF_THE_TABLE = (
    # --- one element, whole bytes; safetensors' codes
    _plain("f64", 64, "F64", "float64", apr={CURRENT: 3, OLD_APRENDER: 3}, ggml=28),
    _plain(
        "f32",
        32,
        "F32",
        "float32",
        apr={CURRENT: 0, OLD_APRENDER: 0, OLD_ENGINE: 0, ENGINE: 0},
        ggml=0,
        exact="f64 c64",
    ),
    _plain(
        "f16",
        16,
        "F16",
        "float16",
        apr={CURRENT: 1, OLD_APRENDER: 1, OLD_ENGINE: 1, ENGINE: 1},
        ggml=1,
        exact="f32 f64 c64",
    ),
    _plain(
        "bf16",
        16,
        "BF16",
        "ml_dtypes.bfloat16",
        apr={CURRENT: 30, OLD_APRENDER: 2, OLD_ENGINE: 2, ENGINE: 30},
        ggml=30,
        exact="f32 f64 c64",
    ),
    _plain("i64", 64, "I64", "int64", apr={CURRENT: 5, OLD_APRENDER: 5, OLD_ENGINE: 6}, ggml=27),
    _plain("i32", 32, "I32", "int32", apr={CURRENT: 4, OLD_APRENDER: 4, OLD_ENGINE: 5}, ggml=26, exact="i64 f64"),
    _plain("i16", 16, "I16", "int16", apr={OLD_ENGINE: 4}, ggml=25, exact="i32 i64 f32 f64 c64"),
    _plain(
        "i8",
        8,
        "I8",
        "int8",
        apr={CURRENT: 6, OLD_APRENDER: 6, OLD_ENGINE: 3},
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
        apr={CURRENT: 7, OLD_APRENDER: 7, OLD_ENGINE: 7},
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
    _block("apr_q4", 32, 18, apr={CURRENT: 128, OLD_APRENDER: 8}, packing=_FLAT),
    _block("apr_q8", 1, 1, apr={CURRENT: 129, OLD_APRENDER: 9}, packing=_SCALED),
    # --- GGML blocks
    _block("q4_0", 32, 18, ggml=2, apr={ENGINE: 2}),
    _block("q4_1", 32, 20, ggml=3, apr={ENGINE: 3}),
    _block("q5_0", 32, 22, ggml=6, apr={ENGINE: 6}),
    _block("q5_1", 32, 24, ggml=7, apr={ENGINE: 7}),
    _block("q8_0", 32, 34, ggml=8, apr={ENGINE: 8, OLD_ENGINE: 10}),
    # Two f16 and 32 bytes since ggml's 2024 change; the gguf package still counts the two as f32 (40 bytes).
    _block("q8_1", 32, 36, ggml=9, apr={ENGINE: 9}),
    _block("q2_k", 256, 84, ggml=10, apr={ENGINE: 10}),
    _block("q3_k", 256, 110, ggml=11, apr={ENGINE: 11}),
    _block(
        "q4_k",
        256,
        144,
        ggml=12,
        apr={CURRENT: 12, OLD_APRENDER: 12, OLD_ENGINE: 8, ENGINE: 12},
        packing=_PADDED_ROWS,
    ),
    _block("q5_k", 256, 176, ggml=13, apr={ENGINE: 13}),
    _block(
        "q6_k",
        256,
        210,
        ggml=14,
        apr={CURRENT: 14, OLD_APRENDER: 14, OLD_ENGINE: 9, ENGINE: 14},
        packing=_PADDED_ROWS,
    ),
    _block("q8_k", 256, 292, ggml=15),
    _block("iq2_xxs", 256, 66, ggml=16, apr={ENGINE: 16}),
    _block("iq2_xs", 256, 74, ggml=17, apr={ENGINE: 17}),
    _block("iq3_xxs", 256, 98, ggml=18),
    _block("iq1_s", 256, 50, ggml=19),
    _block("iq4_nl", 32, 18, ggml=20),
    _block("iq3_s", 256, 110, ggml=21),
    _block("iq2_s", 256, 82, ggml=22),
    _block("iq4_xs", 256, 136, ggml=23),
    _block("iq1_m", 256, 56, ggml=29),
    _block("tq1_0", 256, 54, ggml=34),
    _block("tq2_0", 256, 66, ggml=35),
    _block("mxfp4", 32, 17, ggml=39),
    _block("nvfp4", 64, 36, ggml=40),
    _block("q1_0", 128, 18, ggml=41),
)

TYPES: Mapping[str, DType] = MappingProxyType({dtype.name: dtype for dtype in _ROWS_OF_THE_TABLE})
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _ROWS_OF_THE_TABLE if dtype.safetensors}
_BY_APR_ID: dict[int, list[tuple[AprId, DType]]] = {}
for _dtype in _ROWS_OF_THE_TABLE:
    for _known in _dtype.apr_ids:
        _BY_APR_ID.setdefault(_known.id, []).append((_known, _dtype))

# Ids that current files no longer carry and that aprender's current reader still takes, in aprender's old meaning
# (GH-438).
_STILL_READ = frozenset((8, 9))


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


def current_apr_type(id: int) -> DType:
    """Returns what an id means to aprender's current reader, whatever the tensor's size.

    Raises:
      BrokenContainerError: Code "dtype-unknown", listing the known ids.
      RefusedError: Code "dtype-legacy", if only older or other writers used the id.
    """
    meanings = apr_meanings(id)
    if not meanings:
        known = " ".join(str(known) for known in sorted(_BY_APR_ID))
        raise BrokenContainerError("unknown dtype id", code="dtype-unknown", found=id, expected=f"one of {known}")
    accepted = (CURRENT, OLD_APRENDER) if id in _STILL_READ else (CURRENT,)
    for meaning, dtype in meanings:
        if meaning.era in accepted:
            return dtype
    raise _legacy(id, meanings)


def by_apr_id(id: int, shape: Sequence[int], nbytes: int) -> DType:
    """Returns the type of a tensor in an `.apr` file, from its dtype id, shape and byte size.

    Raises:
      BrokenContainerError: Code "dtype-unknown" for an id that nobody ever wrote, "size-mismatch" if no meaning of the
        id has this size.
      RefusedError: Code "dtype-ambiguous" if several meanings fit, "dtype-legacy" if only an older or another writer's
        meaning fits; both name the candidates.
    """
    meanings = apr_meanings(id)
    fitting = tuple(meaning for meaning in meanings if nbytes in meaning[1].sizes(shape))
    try:
        current = current_apr_type(id)
    except RefusedError:
        raise _legacy(id, fitting or meanings) from None
    if nbytes in current.sizes(shape):
        # No elements, no bytes: then nothing depends on which type it is.
        if nbytes and len({dtype.name for _, dtype in fitting}) > 1:
            raise _legacy(id, fitting, code="dtype-ambiguous")
        return current
    if fitting:
        raise _legacy(id, fitting)
    expected = " or ".join(
        f"{size} bytes for {dtype.name}" for dtype in _distinct(meanings) for size in dtype.sizes(shape)
    )
    raise BrokenContainerError(
        f"the byte size does not fit dtype id {id} and shape {list(shape)}",
        code="size-mismatch",
        found=nbytes,
        expected=expected or f"a shape of whole blocks of {current.block_elements}",
    )


def _distinct(meanings: Iterable[tuple[AprId, DType]]) -> list[DType]:
    return list({dtype.name: dtype for _, dtype in meanings}.values())


def _legacy(id: int, meanings: Sequence[tuple[AprId, DType]], code: str = "dtype-legacy") -> RefusedError:
    candidates = "; ".join(
        f"{dtype.name} ({', '.join(known.writer for known, other in meanings if other is dtype)})"
        for dtype in _distinct(meanings)
    )
    what = (
        "fits more than one type" if code == "dtype-ambiguous" else "is not one that current .apr files use like this"
    )
    return RefusedError(
        f"dtype id {id} {what}",
        code=code,
        found=id,
        expected=f"candidates: {candidates}",
        hint=f"If you know what it is, say so with --legacy {id}=TYPE",
    )
