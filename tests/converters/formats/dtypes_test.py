"""The registry against the format's own tables, the safetensors package, the gguf package and numpy."""

import functools
import json
import math
import re
import struct
import warnings

import gguf
import ml_dtypes
import numpy as np
import safetensors
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import BrokenContainerError, RefusedError, UsageError
from apr_jax.converters.formats import dtypes

# Which type each `.apr` id stood for in each era, from apr-v2-format sections 2.1 to 2.3: aprender since GH-438, in
# the weeks before that when only bf16 had moved, and earlier; realizar's own table until 2026-01-30, GGML's since.
ERAS = {
    era: {int(id): name for id, _, name in (pair.partition("=") for pair in table.split())}
    for era, table in (
        ("current", "0=f32 1=f16 3=f64 4=i32 5=i64 6=i8 7=u8 12=q4_k 14=q6_k 30=bf16 128=apr_q4 129=apr_q8"),
        (
            "aprender=2026-03",
            "0=f32 1=f16 3=f64 4=i32 5=i64 6=i8 7=u8 8=apr_q4 9=apr_q8 12=q4_k 14=q6_k 30=bf16",
        ),
        (
            "aprender<2026-03",
            "0=f32 1=f16 2=bf16 3=f64 4=i32 5=i64 6=i8 7=u8 8=apr_q4 9=apr_q8 12=q4_k 14=q6_k",
        ),
        (
            "engine<2026-01-30",
            "0=f32 1=f16 2=bf16 3=i8 4=i16 5=i32 6=i64 7=u8 8=q4_k 9=q6_k 10=q8_0",
        ),
        (
            "engine>=2026-01-30",
            """0=f32 1=f16 2=q4_0 3=q4_1 6=q5_0 7=q5_1 8=q8_0 9=q8_1 10=q2_k 11=q3_k 12=q4_k 13=q5_k 14=q6_k 16=iq2_xxs
            17=iq2_xs 30=bf16""",
        ),
    )
}
CURRENT = ERAS["current"]
KNOWN = {id for table in ERAS.values() for id in table}

# name: (elements, bytes) of a block, how blocks are laid out, whether values can be read. From ggml.h and
# apr-v2-format 2.4.
WIDTHS = {
    name: (int(elements), int(nbytes), *rest)
    for name, elements, nbytes, *rest in (
        row.split()
        for row in """
        f64 1 8 flat array
        f32 1 4 flat array
        f16 1 2 flat array
        bf16 1 2 flat array
        i64 1 8 flat array
        i32 1 4 flat array
        i16 1 2 flat array
        i8 1 1 flat array
        u8 1 1 flat array
        apr_q4 32 18 flat codec
        apr_q8 1 1 scale codec
        q4_0 32 18 rows codec
        q4_1 32 20 rows codec
        q5_0 32 22 rows codec
        q5_1 32 24 rows codec
        q8_0 32 34 rows codec
        q8_1 32 36 rows codec
        q2_k 256 84 rows codec
        q3_k 256 110 rows codec
        q4_k 256 144 both codec
        q5_k 256 176 rows codec
        q6_k 256 210 both codec
        iq2_xxs 256 66 rows codec
        iq2_xs 256 74 rows codec""".strip().splitlines()
    )
}
# The same of every safetensors code.
CODES = {
    code: (int(bits), name)
    for code, bits, name in (
        row.split()
        for row in """
        F64 64 f64
        F32 32 f32
        F16 16 f16
        BF16 16 bf16
        I64 64 i64
        I32 32 i32
        I16 16 i16
        I8 8 i8
        U64 64 u64
        U32 32 u32
        U16 16 u16
        U8 8 u8
        BOOL 8 bool
        C64 64 c64
        F8_E5M2 8 f8_e5m2
        F8_E4M3 8 f8_e4m3
        F8_E5M2FNUZ 8 f8_e5m2fnuz
        F8_E4M3FNUZ 8 f8_e4m3fnuz
        F8_E8M0 8 f8_e8m0
        F6_E2M3 6 f6_e2m3
        F6_E3M2 6 f6_e3m2
        F4 4 f4""".strip().splitlines()
    )
}
SHAPES = ((), (1,), (0,), (206,), (32,), (3, 11), (2, 250), (4, 64), (2, 256), (3, 896), (2, 3, 512))


def sizes(name, shape):
    """The byte sizes that a tensor may have, written out anew from WIDTHS."""
    elements, nbytes, layout, _ = WIDTHS[name]
    count, columns = math.prod(shape), shape[-1] if shape else 1
    flat = -(-count // elements) * nbytes
    if layout == "scale":
        return {count + 4 if count else 0}
    if layout == "both" and count:
        return {flat, count // columns * -(-columns // elements) * nbytes}
    return set() if layout == "rows" and columns % elements else {flat}


# The numpy type of the values of each plain type, packed ones unpacked: the oracle for what casts exactly.
VALUES = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "u64": np.uint64,
    "u32": np.uint32,
    "u16": np.uint16,
    "u8": np.uint8,
    "bool": np.bool_,
    "c64": np.complex64,
    "f8_e5m2": ml_dtypes.float8_e5m2,
    "f8_e4m3": ml_dtypes.float8_e4m3fn,
    "f8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "f8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "f8_e8m0": ml_dtypes.float8_e8m0fnu,
    "f6_e2m3": ml_dtypes.float6_e2m3fn,
    "f6_e3m2": ml_dtypes.float6_e3m2fn,
    "f4": ml_dtypes.float4_e2m1fn,
}


def all_values(name):
    """Every value of a type of at most 16 bits; of a wider one, values at the edges of what others can hold."""
    bits = dtypes.TYPES[name].bits
    if name == "bool":
        return np.array([False, True])
    if bits <= 16:
        return np.arange(2**bits).astype(np.uint16 if bits == 16 else np.uint8).view(VALUES[name])
    edges = [0, 1, *(2**power + step for power in range(1, 64) for step in (-1, 0, 1))]
    if name.startswith(("i", "u")):
        limits = np.iinfo(VALUES[name])
        signed = [*edges, *(-edge for edge in edges)]
        return np.array([edge for edge in signed if limits.min <= edge <= limits.max], VALUES[name])
    floats = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, np.finfo(np.float32).max]
    values = np.concatenate([floats, np.array(special, np.float32)])
    if name == "f64":
        values = np.concatenate(
            [values[np.isfinite(values)].astype(np.float64), [1 / 3, 1e300, 5e-324, np.inf, np.nan]]
        )
    if name == "c64":
        pairs = np.empty(len(values), np.complex64)
        pairs.real, pairs.imag = values, values[::-1]
        return pairs
    return values.astype(VALUES[name])


def casts_exactly(source, target):
    """Whether every value survives the way there and back, with its sign and as a number."""
    before = all_values(source)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        try:
            there = before.astype(VALUES[target])
        except TypeError:
            # ml_dtypes lacks some casts between its own types; float32 holds all values of each.
            there = before.astype(np.float32).astype(VALUES[target])
        if source[0] in "iu":
            # Python's integers hold all of them; float64 would not.
            after = there.real if target == "c64" else there
            try:
                return [int(value) for value in before] == [int(value) for value in after.tolist()]
            except (ValueError, OverflowError):
                return False
        wide = np.complex128 if source == "c64" else np.float64
        want = before.astype(wide)
        have = (there.real if target == "c64" and source != "c64" else there).astype(wide)
    if source == "c64":
        return np.array_equal(want, have, equal_nan=True)
    return np.array_equal(want, have, equal_nan=True) and np.array_equal(
        np.signbit(want) & ~np.isnan(want), np.signbit(have) & ~np.isnan(have)
    )


@functools.cache
def exact_casts(name):
    return frozenset(target for target in VALUES if target != name and casts_exactly(name, target))


class AprIdsTest(parameterized.TestCase):
    def test_each_of_256_ids_in_each_era_has_its_name_width_sizes_numpy_type_and_exact_casts(self):
        walked = 0
        for id in range(256):
            found = {known.era: dtype for known, dtype in dtypes.apr_meanings(id)}
            self.assertEqual(
                {era: dtype.name for era, dtype in found.items()},
                {era: table[id] for era, table in ERAS.items() if id in table},
            )
            for era, dtype in found.items():
                self.assertNotEmpty(dtypes.ERAS[era])
                elements, nbytes, _, reading = WIDTHS[dtype.name]
                self.assertEqual((dtype.block_elements, dtype.block_bytes), (elements, nbytes))
                self.assertEqual(dtype.bits, None if dtype.is_block else 8 * nbytes)
                for shape in SHAPES:
                    self.assertEqual(set(dtype.sizes(shape)), sizes(dtype.name, shape), (dtype.name, shape))
                if reading == "array":
                    self.assertEqual(dtype.numpy, np.dtype(VALUES[dtype.name]))
                    self.assertEqual(dtype.exact_casts, exact_casts(dtype.name))
                else:
                    self.assertIsNone(dtype.numpy_name)
                    self.assertEqual(dtype.exact_casts, frozenset())
                self.assertEqual(dtype.codec_name is not None, reading == "codec")
                walked += 1
        self.assertEqual(walked, sum(map(len, ERAS.values())))
        self.assertEqual(set(dtypes.ERAS), set(ERAS))

    @parameterized.parameters(*SHAPES)
    def test_each_of_256_ids_has_its_verdict_at_every_size_that_some_type_has(self, *shape):
        possible = {size for name in WIDTHS for size in sizes(name, shape)} | {7}
        for id in range(256):
            meanings = {table[id] for table in ERAS.values() if id in table}
            with self.subTest(id=id):
                for size in possible:
                    fitting = {name for name in meanings if size in sizes(name, shape)}
                    self.check_verdict(id, shape, size, meanings, fitting)

    def check_verdict(self, id, shape, size, meanings, fitting):
        decided = len(fitting) == 1 or (fitting and not size)
        if decided and CURRENT.get(id) in fitting:
            self.assertEqual(dtypes.by_apr_id(id, shape, size).name, CURRENT[id])
            self.assertEqual(dtypes.by_apr_id(id, shape, size, legacy=True).name, CURRENT[id])
            return
        error = self.refusal(id, shape, size, legacy=False)
        if not meanings:
            self.assertEqual((error.code, error.exit_code), ("dtype-unknown", 4))
            self.assertEqual(self.refusal(id, shape, size, legacy=True).code, "dtype-unknown")
            return
        if fitting or id not in CURRENT:
            self.assertEqual(error.code, "dtype-legacy" if decided or not fitting else "dtype-ambiguous")
            self.assertEqual(error.exit_code, 5)
            self.assertIn("--legacy", error.hint)
            for name in fitting or meanings:
                self.assertIn(f"{name} (", str(error))
        else:
            self.assertEqual((error.code, error.exit_code), ("size-mismatch", 4))
        if decided:
            self.assertIn(dtypes.by_apr_id(id, shape, size, legacy=True).name, fitting)
        else:
            expected = "dtype-ambiguous" if fitting else "size-mismatch"
            self.assertEqual(self.refusal(id, shape, size, legacy=True).code, expected)
        for name in meanings:
            if name in fitting:
                self.assertEqual(dtypes.by_apr_id(id, shape, size, legacy={id: name}).name, name)
            else:
                self.assertEqual(self.refusal(id, shape, size, legacy={id: name}).code, "size-mismatch")

    def refusal(self, id, shape, size, legacy):
        with self.assertRaises((RefusedError, BrokenContainerError)) as caught:
            dtypes.by_apr_id(id, shape, size, legacy)
        return caught.exception

    def test_current_ids_are_those_that_the_format_pins(self):
        pinned = {dtype.apr_id: name for name, dtype in dtypes.TYPES.items() if dtype.apr_id is not None}
        self.assertEqual(pinned, CURRENT)

    def test_id_2_is_refused_at_every_size_and_names_its_candidates(self):
        for size, names in ((2 * 512, ("bf16",)), (18 * 16, ("q4_0",)), (7, ("bf16", "q4_0"))):
            error = self.refusal(2, (2, 256), size, legacy=False)
            self.assertEqual(error.code, "dtype-legacy")
            self.assertIn("--legacy", error.hint)
            for name in names:
                self.assertIn(name, str(error))
        self.assertIn("aprender until March 2026", str(error))

    def test_sizes_that_two_meanings_share_are_ambiguous(self):
        # AprQ4 and Q4_K wherever 256 divides the elements; AprQ8 and Q8_1 of 32 elements; AprQ8 and Q6_K of 206.
        for id, shape, size, names in (
            (8, (2, 256), 288, ("apr_q4", "q4_k")),
            (9, (32,), 36, ("apr_q8", "q8_1")),
            (9, (206,), 210, ("apr_q8", "q6_k")),
        ):
            error = self.refusal(id, shape, size, legacy=True)
            self.assertEqual(error.code, "dtype-ambiguous")
            for name in names:
                self.assertIn(f"--legacy {id}={name}", error.hint)

    def test_size_exposes_an_id_read_with_the_wrong_table(self):
        error = self.refusal(30, (4, 4), 64, legacy=False)
        self.assertEqual((error.code, error.found), ("size-mismatch", 64))
        self.assertIn("q5_0", str(self.refusal(6, (2, 32), 44, legacy=False)))

    def test_unknown_id_lists_the_known_ones(self):
        error = self.refusal(99, (4,), 16, legacy=True)
        self.assertIn(" ".join(map(str, sorted(KNOWN))), str(error))

    def test_eras_are_those_in_which_every_tensor_fits(self):
        f32, bf16, old, q4, q6 = (0, (4,), 16), (30, (4,), 8), (2, (4,), 8), (8, (3, 40), 72), (14, (256,), 210)
        aprender = ("current", "aprender=2026-03", "aprender<2026-03")
        for tensors, expected in (
            ([f32], tuple(ERAS)),
            ([f32, bf16], ("current", "aprender=2026-03", "engine>=2026-01-30")),
            ([f32, old], ("aprender<2026-03", "engine<2026-01-30")),
            ([f32, old, q4], ("aprender<2026-03",)),
            ([bf16, q4], ("aprender=2026-03",)),
            ([bf16, old], ()),
            ([f32, q6], (*aprender, "engine>=2026-01-30")),
            ([(3, (4,), 32)], aprender),
            ([(3, (4,), 4)], ("engine<2026-01-30",)),
            # A placeholder has no size that could speak against an era.
            ([(30, (4,), 0)], ("current", "aprender=2026-03", "engine>=2026-01-30")),
        ):
            self.assertEqual(dtypes.fitting_eras(tensors), expected)

    def test_what_a_user_says_about_ids(self):
        self.assertIs(dtypes.parse_legacy([]), False)
        self.assertIs(dtypes.parse_legacy([""]), True)
        self.assertEqual(dtypes.parse_legacy(["", "8=Q4_K", "2=bf16"]), {8: "q4_k", 2: "bf16"})
        for text in ("8=f32", "99=f32", "q4_k", "8=", "=q4_k", "-1=f32", "x=f32"):
            with self.assertRaises(UsageError) as caught:
                dtypes.parse_legacy([text])
            self.assertEqual(caught.exception.code, "legacy-meaning")
        with self.assertRaises(UsageError) as caught:
            dtypes.parse_legacy(["8=f32"])
        self.assertIn("apr_q4 q8_0", str(caught.exception).replace("q4_k ", ""))


class SafetensorsCodesTest(absltest.TestCase):
    def header(self, code, shape, size):
        text = json.dumps({"x": {"dtype": code, "shape": shape, "data_offsets": [0, size]}}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(size)

    def package_codes(self):
        try:
            safetensors.deserialize(self.header("NONE", [1], 1))
        except safetensors.SafetensorError as error:
            return re.findall(r"`([A-Z0-9_]+)`", str(error).partition("expected one of")[2])
        raise AssertionError("the package accepts any dtype")

    def test_each_code_has_its_name_width_sizes_numpy_type_and_exact_casts(self):
        self.assertCountEqual(CODES, self.package_codes())
        for code, (bits, name) in CODES.items():
            dtype = dtypes.by_safetensors(code)
            self.assertEqual((dtype.name, dtype.bits, dtype.is_block), (name, bits, False))
            for shape in SHAPES:
                whole, rest = divmod(math.prod(shape) * bits, 8)
                self.assertEqual(dtype.sizes(shape), () if rest else (whole,), (code, shape))
            self.assertEqual(dtype.exact_casts, exact_casts(name))
            if bits % 8:
                self.assertIsNone(dtype.numpy_name)
            else:
                self.assertEqual(dtype.numpy, np.dtype(VALUES[name]))

    def test_every_code_of_the_package_is_known_and_no_other(self):
        codes = self.package_codes()
        self.assertGreaterEqual(len(codes), 22)
        self.assertCountEqual(codes, [t.safetensors for t in dtypes.TYPES.values() if t.safetensors])
        for code in codes:
            self.assertEqual(dtypes.by_safetensors(code).safetensors, code)

    def test_sizes_are_those_that_the_package_accepts(self):
        for code in self.package_codes():
            size = dtypes.by_safetensors(code).nbytes((3, 8))
            safetensors.deserialize(self.header(code, [3, 8], size))
            with self.assertRaises(safetensors.SafetensorError):
                safetensors.deserialize(self.header(code, [3, 8], size + 1))

    def test_lower_case_and_other_spellings_are_unknown(self):
        for code in ("f32", "F8_E4M3FN", "FLOAT", ""):
            with self.assertRaises(BrokenContainerError) as caught:
                dtypes.by_safetensors(code)
            self.assertIn("BF16", str(caught.exception))


class GgmlTest(absltest.TestCase):
    def test_ids_and_block_sizes_are_those_of_the_gguf_package(self):
        ours = {dtype.ggml: dtype for dtype in dtypes.TYPES.values() if dtype.ggml is not None}
        compared = 0
        for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
            dtype = ours[int(kind)]
            self.assertEqual(dtype.name, kind.name.lower())
            # The package still has Q8_1 with two f32; ggml.h has two f16, and so has apr-v2-format section 2.3.
            expected = 36 if kind.name == "Q8_1" else nbytes
            self.assertEqual((dtype.block_elements, dtype.block_bytes), (elements, expected), kind)
            compared += 1
        self.assertGreaterEqual(compared, 30)


class SizesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("f32", (3, 5), (60,)),
        ("bf16", (), (2,)),
        ("f64", (0, 7), (0,)),
        ("f4", (3, 2), (3,)),
        ("f6_e2m3", (4,), (3,)),
        ("f4", (3,), ()),
        ("apr_q4", (3, 11), (36,)),
        ("apr_q8", (3, 11), (37,)),
        ("apr_q8", (0,), (0,)),
        ("q4_k", (384, 64), (13824, 55296)),
        ("q4_k", (896,), (576,)),
        ("q6_k", (2, 256), (420,)),
        ("q8_0", (4, 64), (272,)),
        ("q8_0", (4, 33), ()),
    )
    def test_sizes_of_a_shape(self, name, shape, sizes):
        self.assertEqual(dtypes.by_name(name).sizes(shape), sizes)

    @parameterized.parameters(
        ((2**32, 2**32), "shape-overflow"),
        ((4194305, 4194305, 211106198978564), "shape-overflow"),
        ((2**62,), "shape-overflow"),
        ((2**63, 0), "shape-dimension"),
        ((-1,), "shape-dimension"),
        ((1.0,), "shape-dimension"),
        ((True,), "shape-dimension"),
        (("1",), "shape-dimension"),
    )
    def test_hostile_shapes_are_refused(self, shape, code):
        with self.assertRaises(BrokenContainerError) as caught:
            dtypes.by_name("f64").nbytes(shape)
        self.assertEqual(caught.exception.code, code)

    def test_a_long_shape_is_shown_shortened(self):
        with self.assertRaises(BrokenContainerError) as caught:
            dtypes.by_name("f64").nbytes([10**30] * 20)
        dimension = "1" + "0" * 23
        self.assertEqual(caught.exception.found, f"[{', '.join([dimension] * 9)}]")

    def test_zero_does_not_excuse_an_overflow_wherever_it_stands(self):
        for shape in ((2**62, 2**62, 0), (0, 2**62, 2**62)):
            with self.assertRaises(BrokenContainerError):
                dtypes.by_name("u8").nbytes(shape)

    def test_unfilled_blocks_are_refused(self):
        with self.assertRaises(BrokenContainerError) as caught:
            dtypes.by_name("f4").nbytes((3,))
        self.assertEqual(caught.exception.code, "shape-blocks")


class TorchTest(absltest.TestCase):
    def test_names_are_those_of_config_json(self):
        names = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "u8": "uint8"}
        names |= {"f8_e4m3": "float8_e4m3fn", "bool": "bool", "c64": "complex64", "f4": None, "q4_k": None}
        self.assertEqual({name: dtypes.by_name(name).torch for name in names}, names)


class NumpyTest(absltest.TestCase):
    def test_numpy_types_have_the_width_of_the_file(self):
        compared = 0
        for dtype in dtypes.TYPES.values():
            if dtype.numpy_name is not None:
                self.assertEqual(dtype.numpy, np.dtype(VALUES[dtype.name]))
                self.assertEqual(dtype.numpy.itemsize, dtype.block_bytes)
                compared += 1
        self.assertEqual(compared, 19)

    def test_types_without_arrays_say_that_they_are_not_decoded(self):
        for name in ("f4", "f6_e2m3", "q4_k", "apr_q4", "apr_q8"):
            with self.assertRaises(RefusedError) as caught:
                _ = dtypes.by_name(name).numpy
            self.assertEqual(caught.exception.code, "dtype-not-decoded")

    def test_floats_and_blocks_are_told_apart(self):
        floats = {name for name, dtype in dtypes.TYPES.items() if dtype.is_float}
        self.assertEqual(floats, {n for n in VALUES if n.startswith(("f", "bf"))})
        self.assertTrue(dtypes.by_name("q4_k").is_block)
        self.assertFalse(dtypes.by_name("f4").is_block)

    def test_exact_casts_are_those_that_lose_no_value(self):
        self.assertCountEqual(VALUES, [name for name, dtype in dtypes.TYPES.items() if not dtype.is_block])
        for source in VALUES:
            self.assertEqual(exact_casts(source), dtypes.TYPES[source].exact_casts, source)

    def test_unknown_name_lists_the_known_ones(self):
        with self.assertRaises(RefusedError) as caught:
            dtypes.by_name("float33")
        self.assertIn("bf16", str(caught.exception))


if __name__ == "__main__":
    absltest.main()
