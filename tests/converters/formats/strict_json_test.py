"""What the JSON reader refuses, keeps and costs, and that the writer spells as `apr` does."""

import json
import pathlib
import random
import struct
import subprocess
import sys
import textwrap
import time
import timeit
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.formats import strict_json

ROOT = pathlib.Path(__file__).resolve().parents[3]


def loads(text, **limits):
    data = text.encode() if isinstance(text, str) else text
    return strict_json.loads(data, what="the text", **({"max_bytes": 1 << 26} | limits))


def values(depth=3):
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**64), 2**64)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=12,
    )


class RefusalTest(parameterized.TestCase):
    @parameterized.parameters(
        ('{"a":1,"a":1}', "json-duplicate"),
        ('{"a":1,"\\u0061":2}', "json-duplicate"),
        ('{"x":{"b":[],"b":{}}}', "json-duplicate"),
        ("NaN", "json-number"),
        ("[Infinity]", "json-number"),
        ("[-Infinity]", "json-number"),
        ("1e999", "json-number"),
        ("-1e999", "json-number"),
        ("1" * 101, "json-number"),
        ("1" * 100_000, "json-number"),
        ("0." + "1" * 100_000, "json-number"),
        (b"\xef\xbb\xbf{}", "json-utf8"),
        ("{}".encode("utf-16-le"), "json-syntax"),
        ("{}".encode("utf-16"), "json-utf8"),
        (b'"\xc0\xaf"', "json-utf8"),
        (b'"\xed\xa0\x80"', "json-utf8"),
        (b'"\xff"', "json-utf8"),
        ('"\\ud800"', "json-surrogate"),
        ('{"\\udc00":1}', "json-surrogate"),
        ('["\\ude00\\ud83d"]', "json-surrogate"),
        ("", "json-syntax"),
        (" ", "json-syntax"),
        ("{} {}", "json-syntax"),
        ("{}\0", "json-syntax"),
        ("{}x", "json-syntax"),
        ('{"a":1,}', "json-syntax"),
        ("[1,]", "json-syntax"),
        ("{'a':1}", "json-syntax"),
        ("{} // x", "json-syntax"),
        ("/**/{}", "json-syntax"),
        ('"a\nb"', "json-syntax"),
        ('"\\x41"', "json-syntax"),
        ("01", "json-syntax"),
        ("+1", "json-syntax"),
        ("[", "json-syntax"),
        ("]", "json-syntax"),
        ('"', "json-syntax"),
        ("\\", "json-syntax"),
        ("{]}", "json-syntax"),
    )
    def test_refuses(self, text, code):
        with self.assertRaises(BrokenContainerError) as caught:
            loads(text)
        self.assertEqual(caught.exception.code, code)

    def test_size_is_checked_before_anything_is_read(self):
        with self.assertRaises(BrokenContainerError) as caught:
            loads(b"\xff" * 11, max_bytes=10)
        self.assertEqual(caught.exception.code, "json-size")

    @parameterized.parameters("[]", "{}")
    def test_depth_is_exact(self, pair):
        opening = "[" if pair == "[]" else '{"a":'
        deep = opening * 4 + "0" + pair[1] * 4
        loads(deep, max_depth=4)
        for levels in (5, 150, 250, 1_000_000):
            with self.assertRaises(BrokenContainerError) as caught:
                loads(opening * levels + "0" + pair[1] * levels, max_depth=4)
            self.assertEqual(caught.exception.code, "json-depth")

    def test_a_million_open_brackets_are_refused_without_recursion(self):
        for text in ("[" * 1_000_000, '{"a":' * 1_000_000, '[{"' * 300_000):
            with self.assertRaises(BrokenContainerError) as caught:
                loads(text)
            self.assertEqual(caught.exception.code, "json-depth")

    def test_brackets_and_quotes_in_strings_do_not_count(self):
        text = r'["[[[[", "\"[[[", "\\", "{{\\\"{", "]"]'
        self.assertEqual(loads(text, max_depth=1), ["[[[[", '"[[[', "\\", '{{\\"{', "]"])
        for hidden in (r'["\\",[[0]]]', r'["\\\\",[[0]]]', r'["\"",[[0]]]', r'["\\\"",[[0]],"\\"]'):
            with self.assertRaises(BrokenContainerError) as caught:
                loads(hidden, max_depth=2)
            self.assertEqual(caught.exception.code, "json-depth")

    @parameterized.parameters(
        ("[", "[],", 256_000),
        ("[", "{},", 256_000),
        ("[", '"a",', 493_000),
        ("[", '"ć",', 335_000),
        ("[", '"😀",', 310_000),
        ("[", '"\\u0107",', 252_000),
        ("[", '"' + 60 * "a" + '",', 264_000),
        ("[", "0.5,", 129_000),
        ("[", "1e5,", 129_000),
        ("[", "17,", 957_000),
        ("{", '"%06d":1,', 138_000),
        ("[", '{"a":[1]},', 103_000),
    )
    def test_what_objects_take_is_bounded_before_anything_is_built(self, opening, item, count):
        """The largest number that is accepted takes 32 MB beyond the text; a tenth more is refused."""
        for factor, code in ((0.85, "json-syntax"), (1.1, "json-count")):
            items = (item % number if "%" in item else item for number in range(int(factor * count)))
            with self.assertRaises(BrokenContainerError) as caught:
                loads(opening + "".join(items) + "!")
            self.assertEqual(caught.exception.code, code, f"{factor}: {caught.exception}")

    @parameterized.parameters("😀", r"\ud83d\ude00")
    def test_one_letter_makes_a_text_four_times_as_dear_wherever_it_is(self, letter):
        size, piece = 7_130_000, 1 << 18
        for at in (0, *range(piece - 13, piece), size):
            text = f'["{"a" * at}{letter}{"a" * (size - at)}"]'.encode()
            self.assertEqual(self.refusal(text), "json-count", at)
        self.assertIsNone(self.refusal(text, wide=True))
        self.assertIsNone(self.refusal(f'["ć{"a" * size}"]'.encode()))
        # Beside the text it costs nothing but the width of the whole, which an escape leaves as it is.
        self.assertEqual(self.refusal(f'["{"a" * size}","{letter}"]'.encode()), None if "u" in letter else "json-count")

    def refusal(self, data, **options):
        """Returns the code with which a text is refused for its price; it is not parsed."""
        try:
            with mock.patch.object(json.JSONDecoder, "decode", return_value=None):
                loads(data, **options)
        except BrokenContainerError as error:
            return error.code
        return None

    def test_the_price_is_what_the_objects_take(self):
        """Measured: nothing that is accepted takes 25 % more than its price says."""
        script = textwrap.dedent("""
            import sys, tracemalloc
            from apr_jax.converters.formats import strict_json
            opening, item, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
            items = (item % number if "%" in item else item for number in range(count))
            data = (opening + "".join(items)[:-1] + {"[": "]", "{": "}"}[opening]).encode()
            tracemalloc.start()
            strict_json.loads(data, what="x", max_bytes=1 << 24)
            print(tracemalloc.get_traced_memory()[1] - len(data))
        """)
        for opening, item, count in (
            ("[", "[],", 97_500), ("[", "[[[]]],", 40_000), ("[", "0.5,", 77_500), ("[", "1234567,", 362_500),
            ("{", '"%06d":1,', 60_000), ("[", '{"a":[1]},', 34_000), ("[", '{"a":1,"b":2},', 23_750),
            ("[", "-0,", 75_000),
            ("[", '"abcdefg",', 200_000), ("[", "true,", 77_500),
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-c", script, opening, item, str(count)], capture_output=True, check=True, cwd=ROOT
            )
            self.assertLess(int(done.stdout), 15 << 20, item)

    @parameterized.parameters(2**18 - 3, 2**18 - 2, 2**18 - 1, 2**18, 2**18 + 1)
    def test_texts_are_counted_alike_wherever_they_are_cut(self, at):
        for text in (r'"\\"', r'"\\\"[["', r'"\"\\"', '"a"', "-0", "7" * 101, '{"a":[]}', r'"\\\\\\"', r'"\n\\\u0041"'):
            padded = "[" + " " * (at - len(text) // 2) + text + ",[]]"
            if text == "7" * 101:
                self.assertRaisesRegex(BrokenContainerError, "out of range", loads, padded)
                continue
            value = loads(padded, max_depth=3)
            self.assertEqual(value, json.loads(padded))
            self.assertIsInstance(value[0], float if text == "-0" else object)
            with self.assertRaises(BrokenContainerError) as caught:
                loads(padded, max_depth=1)
            self.assertEqual(caught.exception.code, "json-depth")

    def test_hostile_texts_of_20_mb_are_refused_quickly(self):
        for text in ("[]," * 7_000_000, '"":"",' * 3_500_000, "[" * 20_000_000):
            begin = time.perf_counter()
            with self.assertRaises(BrokenContainerError):
                loads("[" + text + "0]")
            self.assertLess(time.perf_counter() - begin, 3)

    def test_reading_takes_not_much_longer_than_python_alone(self):
        """Alone on a core that is 50 MB a second and more; beside others only a comparison means something."""
        entry = '"model.layers.%d.mlp.down_proj.weight":{"dtype":"BF16","shape":[4096,1024],"data_offsets":[%d,%d]},'
        header = "{" + "".join(entry % (n, n << 23, (n + 1) << 23) for n in range(25_000))[:-1] + "}"
        for name, text in {"header": header, "text": json.dumps({"a": "words " * 3_000_000})}.items():
            data = text.encode()
            ours, pythons = (
                min(timeit.repeat(read, number=1, repeat=3, timer=time.process_time))
                for read in (lambda data=data: loads(data), lambda data=data: json.loads(data))
            )
            self.assertLess(ours, 4 * pythons + 0.05, name)


class SpellingTest(parameterized.TestCase):
    @parameterized.parameters(
        "0.000001", "1e-06", "1E5", "1000000.0", "1.50", "-0.0", "-0", "1e+20", "123456789012345678901234567890"
    )
    def test_numbers_are_written_back_as_they_were(self, text):
        self.assertEqual(strict_json.dumps(loads(f"[{text}]")), f"[{text}]".encode())
        self.assertEqual(float(loads(text)), float(text))

    @parameterized.parameters("-0", "1.0", "1e0")
    def test_only_plain_integers_are_int(self, text):
        self.assertIsInstance(loads(text), float)

    def test_order_null_and_raw_unicode_are_kept(self):
        text = '{"z":null,"a":[],"Ġ":{"m":"\x7f/é😀","b":true}}'
        self.assertEqual(strict_json.dumps(loads(text)).decode(), text)

    def test_escapes_are_those_of_serde_json(self):
        text = '"\\"\\\\\\b\\f\\n\\r\\t\\u0001\\u001f\x7f/é"'
        self.assertEqual(strict_json.dumps(loads(text)).decode(), text)

    def test_surrogate_pairs_are_one_character(self):
        self.assertEqual(loads('"\\ud83d\\ude00"'), "😀")

    @parameterized.parameters(
        (1e6, "1000000.0"),
        (1e4, "10000.0"),
        (1e-6, "0.000001"),
        (1e-5, "0.00001"),
        (9.999999e-7, "9.999999e-7"),
        (1e-7, "1e-7"),
        (0.1, "0.1"),
        (7.46, "7.46"),
        (1.5e20, "1.5e+20"),
        (1e13, "1e+13"),
        (9.999999e12, "9999999000000.0"),
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (-2.5, "-2.5"),
    )
    def test_f32_fields_are_spelt_as_apr_spells_them(self, value, text):
        self.assertEqual(strict_json.f32(value).text, text)
        self.assertEqual(strict_json.dumps({"x": strict_json.f32(value)}).decode(), f'{{"x":{text}}}')

    @parameterized.parameters(
        (1e6, "1000000.0"),
        (1e-5, "0.00001"),
        (1e-6, "1e-6"),
        (1e16, "1e+16"),
        (1e15, "1000000000000000.0"),
        (0.1, "0.1"),
    )
    def test_other_floats_are_spelt_as_f64(self, value, text):
        self.assertEqual(strict_json.dumps(value).decode(), text)

    def test_f32_digits_are_the_shortest_that_numpy_finds(self):
        generator = random.Random(0)
        bits = [generator.getrandbits(32) for _ in range(20_000)]
        values = [struct.unpack("<f", struct.pack("<I", word))[0] for word in bits]
        values += [2.0**power for power in range(-149, 128)]
        compared = 0
        for value in values:
            if np.isfinite(value):
                shortest = np.format_float_scientific(np.float32(value), unique=True)
                ours = strict_json.f32(value)
                self.assertEqual(float(ours.text), float(shortest))
                digits = ours.text.lstrip("-").partition("e")[0].replace(".", "").strip("0")
                self.assertEqual(digits, shortest.lstrip("-").partition("e")[0].replace(".", "").strip("0"))
                compared += 1
        self.assertGreater(compared, 19_000)

    def test_f32_refuses_what_is_not_finite(self):
        for value in (1e39, float("inf"), float("nan")):
            with self.assertRaises(RefusedError):
                strict_json.f32(value)

    def test_writer_refuses_what_json_cannot_express(self):
        for value, code in (
            (float("nan"), "json-number"),
            ([float("inf")], "json-number"),
            ({1: 2}, "json-type"),
            (b"x", "json-type"),
            ("\ud800", "json-surrogate"),
        ):
            with self.assertRaises(RefusedError) as caught:
                strict_json.dumps(value)
            self.assertEqual(caught.exception.code, code)

    @settings(max_examples=200, derandomize=True, deadline=None)
    @given(values())
    def test_what_is_written_is_read_back_and_is_what_python_reads(self, value):
        text = strict_json.dumps(value)
        self.assertEqual(json.loads(text), value)
        parsed = loads(text)
        self.assertEqual(parsed, value)
        self.assertEqual(strict_json.dumps(parsed), text)


class CostTest(absltest.TestCase):
    def test_20_mb_of_tokenizer_cost_8_times_their_bytes_and_under_a_second(self):
        script = textwrap.dedent("""
            import json, random, sys, time
            def peak():
                lines = open("/proc/self/status").read().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
            if sys.argv[1] == "write":
                generator = random.Random(0)
                letters = [chr(c) for c in (*range(33, 127), *range(0x100, 0x144))]
                words = ["".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(151_643)]
                merges = [word[:3] + " " + word[3:] for word in words]
                tokenizer = json.dumps({"vocab": {w: i for i, w in enumerate(words)}, "merges": merges}, indent=1,
                    ensure_ascii=False)
                value = {"tokenizer.vocabulary": words, "tokenizer.merges": merges,
                    "source_files": {"tokenizer.json": tokenizer, "vocab.json": tokenizer}}
                sys.stdout.buffer.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
            else:
                from apr_jax.converters.formats import strict_json
                before = peak()
                data = sys.stdin.buffer.read()
                begin = time.thread_time()
                value = strict_json.loads(
                    data, what="the metadata", max_bytes=1 << 26, budget=strict_json.METADATA, wide=True)
                print(len(data), time.thread_time() - begin, (peak() - before) / len(data))
                assert strict_json.dumps(value) == data
        """)
        if not pathlib.Path("/proc/self/status").exists():
            self.skipTest("peak memory is read from /proc")
        command = [sys.executable, "-c", script]
        data = subprocess.run([*command, "write"], capture_output=True, check=True).stdout
        done = subprocess.run([*command, "read"], input=data, capture_output=True, check=True, cwd=ROOT)
        nbytes, seconds, factor = map(float, done.stdout.split())
        self.assertGreater(nbytes, 10e6)
        self.assertLess(seconds, 1)
        self.assertLess(factor, 8)


if __name__ == "__main__":
    absltest.main()
