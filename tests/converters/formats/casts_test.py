"""Casts against exact rational arithmetic."""

import fractions
import math
import pathlib
import random
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.converters.formats import casts

# Bits of the significand with the hidden one, smallest exponent of a normal number.
_PRECISION = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022)}
_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_PAIRS = [(source, target) for source in _BITS for target in _BITS if source != target]


def _decode(bits: int, dtype: str) -> fractions.Fraction | float:
    """The value of one bit pattern, exactly; infinities and NaN as floats."""
    precision, smallest = _PRECISION[dtype]
    fraction_bits = precision - 1
    sign = -1 if bits >> (_BITS[dtype] - 1) else 1
    exponent = bits >> fraction_bits & ((1 << (_BITS[dtype] - precision)) - 1)
    fraction = bits & ((1 << fraction_bits) - 1)
    if exponent == (1 << (_BITS[dtype] - precision)) - 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * fractions.Fraction(fraction) * fractions.Fraction(2) ** (smallest - fraction_bits)
    whole = fractions.Fraction(fraction + (1 << fraction_bits))
    return sign * whole * fractions.Fraction(2) ** (smallest + exponent - 1 - fraction_bits)


def _encode(value: fractions.Fraction, negative: bool, dtype: str) -> int:
    """The bits of the nearest number, ties to even: by the definition, one rounding."""
    precision, smallest = _PRECISION[dtype]
    size = abs(value)
    # The denominator is a power of two, so this is the exponent exactly.
    exponent = max(smallest, size.numerator.bit_length() - size.denominator.bit_length()) if size else smallest
    unit = fractions.Fraction(2) ** (exponent - precision + 1)
    bits = round(size / unit)  # Fraction rounds half to even
    if exponent > smallest or bits >= 1 << (precision - 1):
        bits += (exponent - smallest) << (precision - 1)
    infinity = ((1 << (_BITS[dtype] - precision)) - 1) << (precision - 1)
    return min(bits, infinity) | int(negative) << (_BITS[dtype] - 1)


def _samples(source: str, target: str) -> list[int]:
    """Bit patterns of `source`: random ones, all exponents, and the neighbourhood of ties in `target`."""
    random_bits = random.Random(f"{source}{target}")
    width = _BITS[source]
    patterns = [random_bits.getrandbits(width) for _ in range(1500)]
    dropped = _PRECISION[source][0] - _PRECISION[target][0]
    if dropped > 0:
        for _ in range(1500):
            base = random_bits.getrandbits(width) >> dropped << dropped
            tie = base | 1 << (dropped - 1)
            patterns += [base, tie, tie - 1, tie + 1]
        # Values that the target can hold, or almost.
        for _ in range(1500):
            exponent = random_bits.uniform(-26, 17)
            number = math.ldexp(1 + random_bits.randrange(1 << 12) / (1 << 12), int(exponent))
            packed = struct.pack("<d", number) if source == "f64" else struct.pack("<f", number)
            patterns.append(int.from_bytes(packed, "little") + random_bits.choice((-1, 0, 1)))
    patterns += [0, 1, 1 << (width - 1), (1 << (width - 1)) - 1]
    return [pattern % (1 << width) for pattern in patterns]


def _cast(patterns: list[int], source: str, target: str) -> tuple[list[int], casts.Damage]:
    data = np.array(patterns, f"<u{_BITS[source] // 8}").tobytes()
    out, damage = casts.cast(data, source, target)
    return np.frombuffer(out, f"<u{_BITS[target] // 8}").tolist(), damage


class CastsTest(parameterized.TestCase):
    @parameterized.parameters(*_PAIRS)
    def test_every_value_rounds_once_to_nearest_even(self, source, target):
        patterns = [bits for bits in _samples(source, target) if isinstance(_decode(bits, source), fractions.Fraction)]
        found, _ = _cast(patterns, source, target)
        wrong = []
        for bits, ours in zip(patterns, found, strict=True):
            expected = _encode(_decode(bits, source), bool(bits >> (_BITS[source] - 1)), target)
            if ours != expected:
                wrong.append((hex(bits), hex(ours), hex(expected)))
        self.assertEqual(wrong, [])
        self.assertGreater(len(patterns), 1000)

    @parameterized.parameters(("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"))
    def test_all_65536_patterns_come_back_except_for_signalling_nans(self, narrow, wide):
        patterns = list(range(1 << 16))
        there, _ = _cast(patterns, narrow, wide)
        back, damage = _cast(there, wide, narrow)
        quiet = 1 << (_PRECISION[narrow][0] - 2)
        expected = [
            bits | quiet if isinstance(_decode(bits, narrow), float) and math.isnan(_decode(bits, narrow)) else bits
            for bits in patterns
        ]
        self.assertEqual(back, expected)
        self.assertEqual(damage, casts.Damage())

    @parameterized.parameters(*_PAIRS)
    def test_nan_keeps_sign_and_upper_payload_and_is_quiet(self, source, target):
        width, fraction = _BITS[source], _PRECISION[source][0] - 1
        infinity = ((1 << (width - 1 - fraction)) - 1) << fraction
        patterns = []
        for payload in (1, 1 << (fraction - 1), 0b11 << (fraction - 2), 0b01 << (fraction - 2), (1 << fraction) - 1):
            patterns += [infinity | payload, 1 << (width - 1) | infinity | payload]
        found, damage = _cast(patterns, source, target)
        out_fraction = _PRECISION[target][0] - 1
        for bits, ours in zip(patterns, found, strict=True):
            self.assertTrue(math.isnan(_decode(ours, target)), hex(ours))
            self.assertEqual(ours >> (_BITS[target] - 1), bits >> (width - 1))
            self.assertTrue(ours >> (out_fraction - 1) & 1, "not quiet")
            kept = min(fraction, out_fraction) - 1
            ours_payload = ours & ((1 << (out_fraction - 1)) - 1)
            payload = bits & ((1 << (fraction - 1)) - 1)
            self.assertEqual(ours_payload >> (out_fraction - 1 - kept), payload >> (fraction - 1 - kept))
        self.assertEqual(damage, casts.Damage())

    def test_f64_to_bf16_does_not_round_twice(self):
        value = 1 + 2**-8 + 2**-40  # by way of f32 the last term is lost, and the tie goes down to 1
        out, _ = casts.cast(struct.pack("<d", value), "f64", "bf16")
        self.assertEqual(bytes(out), (0x3F81).to_bytes(2, "little"))

    def test_f64_to_f16_does_not_round_twice(self):
        value = 1 + 2**-11 + 2**-40
        out, _ = casts.cast(struct.pack("<d", value), "f64", "f16")
        self.assertEqual(bytes(out), (0x3C01).to_bytes(2, "little"))

    def test_overflow_counts_finite_values_only(self):
        values = np.array([65519.0, 65520.0, -1e9, np.inf, -np.inf, np.nan], "<f4")
        out, damage = casts.cast(values.tobytes(), "f32", "f16")
        self.assertEqual(damage.overflowed, 2)
        self.assertEqual(np.frombuffer(out, "<f2")[:3].tolist(), [65504.0, np.inf, -np.inf])

    def test_vanishing_values_are_counted(self):
        values = np.array([0.0, -0.0, 1e-30, -1e-30, 1e-7], "<f4")
        _, damage = casts.cast(values.tobytes(), "f32", "f16")
        self.assertEqual(damage, casts.Damage(overflowed=0, vanished=2))

    def test_unaligned_input_is_taken(self):
        data = memoryview(b"\0" + np.array([1.5, -2.0], "<f4").tobytes())[1:]
        out, _ = casts.cast(data, "f32", "bf16")
        self.assertEqual(bytes(out).hex(), "c03f00c0")

    @parameterized.parameters(
        ("q8", "apr_q8"), ("INT8", "apr_q8"), ("q4", "apr_q4"), ("int4", "apr_q4"), ("q4k", "q4_k"), ("Q4_K", "q4_k")
    )
    def test_quantised_targets_have_the_names_of_apr_and_of_the_registry(self, name, expected):
        self.assertEqual(casts.target_type(name).name, expected)

    @parameterized.parameters("q8_0", "q6_k", "q6k", "i8", "f8_e4m3", "bool")
    def test_targets_that_exist_but_are_not_available_are_refused_by_name(self, name):
        with self.assertRaises(RefusedError) as caught:
            casts.target_type(name)
        self.assertIn(name.lower(), str(caught.exception))

    def test_unknown_target_is_a_usage_error(self):
        with self.assertRaises(UsageError):
            casts.target_type("float")


if __name__ == "__main__":
    absltest.main()
