"""The registry against the format's own tables, the safetensors package, the gguf package and numpy."""

import json
import re
import struct
import warnings

import gguf
import ml_dtypes
import numpy as np
import safetensors
from absl.testing import absltest, parameterized

from converters import dtypes
from converters.errors import BrokenContainerError, RefusedError

# What each `.apr` id may stand for, typed from apr-v2-format sections 2.1 to 2.3: how aprender's current reader takes
# it, and what else it meant or means to somebody.
CURRENT = {
    0: "f32",
    1: "f16",
    3: "f64",
    4: "i32",
    5: "i64",
    6: "i8",
    7: "u8",
    8: "apr_q4",
    9: "apr_q8",
    12: "q4_k",
    14: "q6_k",
    30: "bf16",
    128: "apr_q4",
    129: "apr_q8",
}
OTHERS = {
    2: {"bf16", "q4_0"},
    3: {"i8", "q4_1"},
    4: {"i16"},
    5: {"i32"},
    6: {"i64", "q5_0"},
    7: {"q5_1"},
    8: {"q4_k", "q8_0"},
    9: {"q6_k", "q8_1"},
    10: {"q8_0", "q2_k"},
    11: {"q3_k"},
    13: {"q5_k"},
    16: {"iq2_xxs"},
    17: {"iq2_xs"},
}

# The same by era, section 2.2: aprender until March 2026, realizar's own table until 2026-01-30, GGML's numbers since.
ERAS = {
    era: {int(id): name for id, _, name in (pair.partition("=") for pair in table.split())}
    for era, table in (
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


class AprIdsTest(parameterized.TestCase):
    def test_each_of_256_ids_has_its_expected_meanings(self):
        for id in range(256):
            names = {dtype.name for _, dtype in dtypes.apr_meanings(id)}
            expected = OTHERS.get(id, set()) | ({CURRENT[id]} if id in CURRENT else set())
            self.assertEqual(names, expected, id)
        self.assertEqual(sum(bool(dtypes.apr_meanings(id)) for id in range(256)), 20)

    def test_each_era_has_its_own_table(self):
        found = {}
        for id in range(256):
            for known, dtype in dtypes.apr_meanings(id):
                self.assertNotIn(id, found.setdefault(known.era, {}), "one id, one era, one meaning")
                self.assertNotEmpty(known.writer)
                found[known.era][id] = dtype.name
        self.assertEqual(found, {**ERAS, "current": {i: name for i, name in CURRENT.items() if i not in (8, 9)}})

    def test_each_of_256_ids_is_read_refused_or_unknown_at_every_size_that_some_type_has(self):
        shape = (2, 256)
        sizes = {size for dtype in dtypes.TYPES.values() for size in dtype.sizes(shape)}
        compared = 0
        for id in range(256):
            meanings = OTHERS.get(id, set()) | ({CURRENT[id]} if id in CURRENT else set())
            for size in sizes:
                fitting = {name for name in meanings if size in dtypes.TYPES[name].sizes(shape)}
                with self.subTest(id=id, size=size):
                    compared += 1
                    if CURRENT.get(id) in fitting and len(fitting) == 1 and id != 2:
                        self.assertEqual(dtypes.by_apr_id(id, shape, size).name, CURRENT[id])
                        continue
                    with self.assertRaises((RefusedError, BrokenContainerError)) as caught:
                        dtypes.by_apr_id(id, shape, size)
                    error = caught.exception
                    if not meanings:
                        self.assertEqual(error.code, "dtype-unknown")
                    elif fitting:
                        self.assertIn(error.code, ("dtype-legacy", "dtype-ambiguous"))
                        for name in fitting:
                            self.assertIn(name, str(error))
        self.assertGreater(compared, 256 * 10)

    def test_current_ids_are_those_that_the_format_pins(self):
        pinned = {dtype.apr_id: name for name, dtype in dtypes.TYPES.items() if dtype.apr_id is not None}
        self.assertEqual(pinned, {id: name for id, name in CURRENT.items() if id not in (8, 9)})

    def test_id_2_is_refused_at_every_size_and_names_both_candidates(self):
        for size in (2 * 512, 18 * 16, 7):
            with self.assertRaises(RefusedError) as caught:
                dtypes.by_apr_id(2, (2, 256), size)
            self.assertEqual(caught.exception.code, "dtype-legacy")
            self.assertIn("--legacy", caught.exception.hint)
        self.assertIn("bf16", str(caught.exception))
        self.assertIn("q4_0", str(caught.exception))

    def test_id_8_is_decided_by_size_where_it_can_be(self):
        self.assertEqual(dtypes.by_apr_id(8, (3, 40), 18 * 4).name, "apr_q4")
        with self.assertRaises(RefusedError) as caught:
            dtypes.by_apr_id(8, (2, 256), 18 * 16)
        self.assertEqual(caught.exception.code, "dtype-ambiguous")
        with self.assertRaises(RefusedError) as caught:
            dtypes.by_apr_id(8, (2, 256), 34 * 16)
        self.assertEqual(caught.exception.code, "dtype-legacy")
        self.assertIn("q8_0", str(caught.exception))

    def test_size_exposes_an_id_read_with_the_wrong_table(self):
        with self.assertRaises(BrokenContainerError) as caught:
            dtypes.by_apr_id(30, (4, 4), 64)
        self.assertEqual((caught.exception.code, caught.exception.found), ("size-mismatch", 64))
        with self.assertRaises(RefusedError) as caught:
            dtypes.by_apr_id(6, (2, 32), 44)
        self.assertIn("q5_0", str(caught.exception))

    def test_unknown_id_lists_the_known_ones(self):
        with self.assertRaises(BrokenContainerError) as caught:
            dtypes.by_apr_id(99, (4,), 16)
        self.assertIn("0 1 2 3", str(caught.exception))
        self.assertIn("30 128 129", str(caught.exception))


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

    def test_zero_does_not_excuse_an_overflow_wherever_it_stands(self):
        for shape in ((2**62, 2**62, 0), (0, 2**62, 2**62)):
            with self.assertRaises(BrokenContainerError):
                dtypes.by_name("u8").nbytes(shape)

    def test_unfilled_blocks_are_refused(self):
        with self.assertRaises(BrokenContainerError) as caught:
            dtypes.by_name("f4").nbytes((3,))
        self.assertEqual(caught.exception.code, "shape-blocks")


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
            exact = {target for target in VALUES if target != source and casts_exactly(source, target)}
            self.assertEqual(exact, dtypes.TYPES[source].exact_casts, source)

    def test_unknown_name_lists_the_known_ones(self):
        with self.assertRaises(RefusedError) as caught:
            dtypes.by_name("float33")
        self.assertIn("bf16", str(caught.exception))


if __name__ == "__main__":
    absltest.main()
