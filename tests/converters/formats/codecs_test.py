"""Quantised blocks against the gguf package, against formulas written out value by value, and against `apr`."""

import hashlib
import math
import pathlib
import struct
import sys
import tracemalloc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import gguf
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import casts, codecs, dtypes
from tests import quantiser_cases
from tests.paths import checkpoint

DECODED = sorted(name for name, dtype in dtypes.TYPES.items() if dtype.codec_name)
BY_GGUF = """q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s iq1_s iq1_m iq4_nl
    iq4_xs tq1_0 tq2_0 mxfp4 nvfp4""".split()
ENCODED = [name for _, name in quantiser_cases.KINDS.values()]
MILLION = 1 << 20


def decode(name, data, count):
    """The first `count` values of `data`."""
    out = np.full(count, 777, np.float32)
    dtypes.by_name(name).codec.decode(data, out)
    return out


def random_blocks(name, count, seed=0):
    """Bytes of at least `count` values; scales of every kind, infinite, subnormal and NaN among them."""
    dtype = dtypes.by_name(name)
    return np.random.default_rng(seed).bytes(-(-count // dtype.block_elements) * dtype.block_bytes)


def half(data, at=0):
    return np.float32(struct.unpack_from("<e", data, at)[0])


def f32(value):
    return np.float32(value)


# --- The same formulas as in apr-v2-format 2.4, one value at a time; shares nothing with the codecs.


def plain_apr_q4(block):
    nibbles = [(block[2 + i // 2] >> 4 * (i % 2)) & 15 for i in range(32)]
    return [f32(nibble - 8) * half(block) for nibble in nibbles]


def plain_q4_k(block):
    d, dmin, s, values = half(block), half(block, 2), block[4:16], []
    for i in range(256):
        j = i // 32
        scale = s[j] & 63 if j < 4 else (s[j + 4] & 15) | s[j - 4] >> 6 << 4
        low = s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) | s[j] >> 6 << 4
        q = (block[16 + 32 * (j // 2) + i % 32] >> 4 * (j % 2)) & 15
        values.append(d * f32(scale) * f32(q) - dmin * f32(low))
    return values


def plain_q6_k(block):
    values = [f32(0)] * 256
    for half_number in (0, 1):
        low, high = block[64 * half_number :], block[128 + 32 * half_number :]
        scales = [f32(v - 256 if v > 127 else v) for v in block[192 + 8 * half_number : 200 + 8 * half_number]]
        for i in range(32):
            quarters = (
                (low[i] & 15) | (high[i] & 3) << 4,
                (low[i + 32] & 15) | ((high[i] >> 2) & 3) << 4,
                (low[i] >> 4) | ((high[i] >> 4) & 3) << 4,
                (low[i + 32] >> 4) | ((high[i] >> 6) & 3) << 4,
            )
            for number, q in enumerate(quarters):
                scale = half(block, 208) * scales[i // 16 + 2 * number]
                values[128 * half_number + 32 * number + i] = scale * f32(q - 32)
    return values


def plain_q8_1(block):
    return [half(block) * f32(struct.unpack_from("b", block, 4 + i)[0]) for i in range(32)]


PLAIN = {"apr_q4": plain_apr_q4, "q4_k": plain_q4_k, "q6_k": plain_q6_k, "q8_1": plain_q8_1}


class DecodingTest(parameterized.TestCase):
    def assert_same_values(self, found, expected):
        """The same bits; of a NaN only that it is one."""
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        numbers = ~np.isnan(found)
        np.testing.assert_array_equal(found[numbers].view("u4"), expected[numbers].view("u4"))

    @parameterized.parameters(*DECODED)
    def test_a_layout_is_as_wide_as_the_registry_says(self, name):
        dtype = dtypes.by_name(name)
        self.assertEqual(dtype.codec.layout.itemsize, dtype.block_bytes)
        self.assertEqual(dtype.codec.elements, dtype.block_elements)

    @parameterized.parameters(*BY_GGUF)
    def test_a_million_random_values_are_those_of_gguf(self, name):
        data = random_blocks(name, MILLION)
        blocks = np.frombuffer(data, np.uint8).reshape(-1, dtypes.by_name(name).block_bytes)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, name.upper()))
        found = decode(name, data, MILLION)
        self.assert_same_values(found, expected.reshape(-1))
        self.assertGreater(np.isfinite(found).mean(), 0.9)

    @parameterized.parameters(*PLAIN)
    def test_random_blocks_are_the_formula_value_by_value(self, name):
        data, dtype = random_blocks(name, 64 * 256, seed=1), dtypes.by_name(name)
        blocks = [data[at : at + dtype.block_bytes] for at in range(0, len(data), dtype.block_bytes)]
        with np.errstate(all="ignore"):
            expected = np.array([value for block in blocks for value in PLAIN[name](block)], np.float32)
        self.assert_same_values(decode(name, data, expected.size), expected)

    def test_apr_q8_is_one_scale_and_a_byte_for_each_value(self):
        scale, q = np.float32(0.0123), np.arange(-128, 128).astype(np.int8)
        found = decode("apr_q8", scale.tobytes() + q.tobytes(), 256)
        np.testing.assert_array_equal(found, np.array([np.float32(int(v)) * scale for v in q], np.float32))

    @parameterized.parameters(*(name for name in DECODED if name != "apr_q8"))
    def test_a_last_block_may_be_used_in_part(self, name):
        count = dtypes.by_name(name).block_elements * 3
        data = random_blocks(name, count)
        whole = decode(name, data, count)
        for missing in (1, 7, dtypes.by_name(name).block_elements - 1):
            self.assert_same_values(decode(name, data, count - missing), whole[:-missing])

    def test_half_scales_are_ieee_and_small_ones_are_no_zeros(self):
        # aprender's own reader takes the first four for 0 (GH-186); the engine does not.
        for bits, scale in ((0x0001, 2.0**-24), (0x83FF, -1023 * 2.0**-24), (0x7C00, math.inf), (0x7E00, math.nan)):
            block = struct.pack("<H", bits) + bytes([0x9F] * 16)
            np.testing.assert_array_equal(decode("apr_q4", block, 2), np.array([7, 1], np.float32) * np.float32(scale))

    def test_a_halfs_that_old_aprender_wrote_wrongly_is_read_as_it_stands(self):
        # Until #2231 a value that rounds to -256 was stored as -128 (apr-v2-format 2.5).
        block = struct.pack("<H", 0xD800) + bytes([0x99] * 16)
        self.assertEqual(decode("q4_0", block, 1)[0], -128.0)

    def test_types_that_nothing_decodes_are_refused_with_those_that_are(self):
        for name in sorted(set(dtypes.TYPES) - set(DECODED)):
            if dtypes.by_name(name).is_block:
                with self.assertRaises(RefusedError) as caught:
                    _ = dtypes.by_name(name).codec
                self.assertEqual(caught.exception.code, "dtype-not-decoded")
                self.assertIn(name, str(caught.exception))
                self.assertIn("q4_k", str(caught.exception))


class EncodingTest(parameterized.TestCase):
    @parameterized.parameters(*quantiser_cases.KINDS)
    def test_payloads_of_hard_values_are_those_of_apr(self, kind):
        payload = casts.quantise(
            quantiser_cases.hard_values(), quantiser_cases.KINDS[kind][1], quantiser_cases.HARD_SHAPE
        )
        self.assertEqual(hashlib.sha256(payload).hexdigest(), quantiser_cases.HARD_SHA256[kind])

    @parameterized.parameters(*quantiser_cases.KINDS)
    def test_payloads_of_a_checkpoint_of_odd_sizes_are_those_of_apr(self, kind):
        digest, name_of_type = hashlib.sha256(), quantiser_cases.KINDS[kind][1]
        with open_checkpoint(checkpoint("odd_sizes")) as opened:
            for name, tensor in opened.tensors.items():
                if not codecs.stays_float(name, math.prod(tensor.shape)):
                    values = tensor.read().astype(np.float32)
                    digest.update(casts.quantise(values, name_of_type, tensor.shape))
        self.assertEqual(digest.hexdigest(), quantiser_cases.ODD_SIZES_SHA256[kind])

    @parameterized.parameters(*ENCODED)
    def test_quantising_what_was_quantised_moves_little(self, name):
        shape = (40, 300)
        values = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
        dtype = dtypes.by_name(name)
        payload = casts.quantise(values, name, shape)
        self.assertLen(payload, dtype.encoded_nbytes(shape))
        columns = 512 if dtype.padded_columns(shape, len(payload)) else 300
        found = decode(name, payload, 40 * columns).reshape(40, columns)[:, :300]
        bar = {"apr_q8": 0.02, "apr_q4": 0.12, "q4_k": 0.09}[name]
        error = np.linalg.norm(found - values) / np.linalg.norm(values)
        self.assertBetween(error, bar / 10, bar)

    def test_ties_are_rounded_away_from_zero(self):
        values = np.array([127, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997], np.float32)
        payload = casts.quantise(values, "apr_q8", (7,))
        self.assertEqual(struct.unpack("<f7b", payload), (1.0, 127, 1, 2, 3, -1, -3, 0))

    def test_zeros_and_nothing(self):
        self.assertEqual(casts.quantise(np.zeros(3), "apr_q8", (3,)), struct.pack("<f3b", 1, 0, 0, 0))
        self.assertEqual(casts.quantise(np.zeros(0), "apr_q8", (0,)), b"")
        # 3 values of nibble 8; behind them zero bytes, not zero values.
        payload = casts.quantise(np.zeros(3), "apr_q4", (3,))
        self.assertEqual(payload, struct.pack("<e", 1) + bytes([0x88, 0x08]) + bytes(14))

    def test_rows_of_k_quants_are_padded_and_a_vector_is_one_row(self):
        values = np.random.default_rng(1).normal(size=(3, 100)).astype(np.float32)
        rows = b"".join(casts.quantise(row, "q4_k", (100,)) for row in values)
        self.assertEqual(casts.quantise(values, "q4_k", (3, 100)), rows)
        self.assertLen(rows, 3 * 144)

    @parameterized.parameters(*ENCODED)
    def test_nan_and_infinities_are_refused(self, name):
        for bad in (np.nan, np.inf, -np.inf):
            with self.assertRaises(RefusedError) as caught:
                casts.quantise(np.array([1, bad], np.float32), name, (2,))
            self.assertEqual(caught.exception.code, "cast-non-finite")

    def test_types_that_nothing_encodes_are_refused(self):
        for name in ("q8_0", "q6_k"):
            with self.assertRaises(RefusedError) as caught:
                casts.quantise(np.zeros(256, np.float32), name, (256,))
            self.assertEqual(caught.exception.code, "cast-unsupported")

    @parameterized.parameters(
        ("model.layers.0.self_attn.q_proj.bias", 4096, True),
        ("model.layers.0.input_layernorm.weight", 4096, True),
        ("h.0.layer_norm.weight", 4096, True),
        ("model.norm.weight", 4096, True),
        ("model.layers.0.self_attn.k_proj.weight", 1023, True),
        ("model.layers.0.self_attn.k_proj.weight", 1024, False),
        ("model.embed_tokens.weight", 4096, False),
        ("lm_head.weight", 4096, False),
    )
    def test_what_apr_leaves_in_float32(self, name, elements, expected):
        self.assertEqual(codecs.stays_float(name, elements), expected)

    @parameterized.parameters(*ENCODED)
    def test_encoding_takes_a_small_multiple_of_the_values(self, name):
        values = np.ones(MILLION, np.float32)
        tracemalloc.start()
        casts.quantise(values, name, (MILLION,))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 10 * values.nbytes)


if __name__ == "__main__":
    absltest.main()
