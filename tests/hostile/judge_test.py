"""The safetensors package as a second judge, on files after the names of its own tests (0.8.0) and what is near them.

`python tests/hostile/judge_test.py --table` writes the verdicts into JUDGE.md.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import safetensors
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError
from tests.hostile.cases import entry

F32, SIX = entry(), entry(shape=[2, 3], offsets=[0, 24])


def file_of(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def typed(dtype, shape, nbytes, held=None) -> bytes:
    return file_of({"a": entry(dtype, shape, [0, nbytes])}, bytes(nbytes if held is None else held))


def attack() -> bytes:
    """test_json_attack: 10,000 tensors over the same bytes."""
    return file_of({f"weight_{number}": SIX for number in range(10_000)}, bytes(24))


def spread(count, stride) -> bytes:
    """Tensors of 4 bytes, `stride` apart."""
    entries = {f"t{number}": entry(offsets=[stride * number, stride * number + 4]) for number in range(count)}
    return file_of(entries, bytes(stride * (count - 1) + 4))


BITS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}
FILES: dict[str, bytes] = {
    "test_serialization": file_of({"attn.0": entry(shape=[1, 2, 3], offsets=[0, 24])}, bytes(24)),
    **{f"test_serialization {code}": typed(code, [3, 1], 3 * width) for code, width in BITS.items()},
    "test_serialization_fp4": typed("F4", [1, 2], 1),
    "test_serialization_fp4 two rows": typed("F4", [2, 4], 4),
    "test_serialization_fp4 with a zero": typed("F4", [0, 3], 0),
    "test_serialization_fp6": typed("F6_E2M3", [4], 3),
    "test_serialization_fp6 E3M2": typed("F6_E3M2", [2, 4], 6),
    "test_serialization_fp4_misaligned": typed("F4", [1, 3], 1),
    "test_serialization_fp4_misaligned, a byte more": typed("F4", [1, 3], 2),
    "test_serialization_fp4_invalid": typed("F4", [1, 2], 2),
    "test_serialization_fp6 misaligned": typed("F6_E2M3", [3], 2),
    "test_empty": file_of(b"{}      "),
    "test_empty with metadata": file_of({"__metadata__": {"framework": "pt"}}),
    "test_empty with empty metadata": file_of({"__metadata__": {}}),
    "test_empty with null metadata": file_of({"__metadata__": None}),
    "test_serialization_forced_alignement": file_of({"attn0": entry(shape=[1, 1, 2, 3], offsets=[0, 24])}, bytes(24)),
    "test_serialization_forced_alignement, not aligned": file_of(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "test_serialization_no_big_endian": typed(">F4", [1], 4),
    "test_serialization_order_invariant": file_of({"b": entry(offsets=[4, 8]), "a": F32}, bytes(8)),
    "test_serialization_metadata": file_of({"__metadata__": {"format": "np"}, "a": F32}, bytes(4)),
    "test_serialization_metadata of numbers": file_of({"__metadata__": {"format": 5}, "a": F32}, bytes(4)),
    "test_serialization_metadata of lists": file_of({"__metadata__": {"a": []}, "b": F32}, bytes(4)),
    "test_serialization_metadata, a list": file_of({"__metadata__": [], "b": F32}, bytes(4)),
    "test_serialization_metadata twice": file_of(b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}'),
    "test_serialization_metadata, a key twice": file_of(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "test_gpt2_tiny": file_of({f"h.{n}.w": entry(shape=[n % 3], offsets=[0, 0]) for n in (0, 3, 6)}),
    "test_slicing": spread(5, 4),
    "test_pt_sf_save_model_overlapping_storage": file_of(
        {"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, bytes(8)
    ),
    "test_pt_sf_save_model_overlapping_storage, the same": file_of({"a": F32, "b": F32}, bytes(4)),
    "test_empty_shapes_allowed": file_of({"test": entry("I32", [], [0, 4])}, bytes(4)),
    "test_deserialization": file_of({"test": entry("I32", [2, 2], [0, 16])}, bytes(16)),
    "test_deserialization, a field more": file_of({"test": entry(stride=[1])}, bytes(4)),
    "test_deserialization, a field less": file_of({"test": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "test_deserialization, a field twice": file_of(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "test_deserialization, a name twice": file_of(
        b'{"a":%(e)s,"a":%(e)s}' % {b"e": json.dumps(F32).encode()}, bytes(4)
    ),
    "test_deserialization, an empty name": file_of({"": F32}, bytes(4)),
    "test_deserialization, a name of 10 KB": file_of({"n" * 10_000: F32}, bytes(4)),
    "test_deserialization, a name with NUL": file_of({"a\0": F32}, bytes(4)),
    "test_deserialization, half a character": file_of(
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "test_json_attack": attack(),
    "test_metadata_incomplete_buffer": file_of(
        {"test": entry("I32", [2, 2], [0, 16])}, bytes(16) + b"extra_bogus_data_for_polyglot_file"
    ),
    "test_metadata_incomplete_buffer, missing bytes": file_of(
        {"test": entry("I32", [1000, 500], [0, 2000000])}, bytes(7)
    ),
    "test_metadata_incomplete_buffer, a hole": spread(3, 8),
    "test_metadata_incomplete_buffer, a hole at the start": file_of({"a": entry(offsets=[4, 8])}, bytes(8)),
    "test_header_too_large": b"<" * 8 + bytes(8),
    "test_header_too_large, 100,000,001": file_of({}, length=100_000_001),
    "test_header_too_small": b"",
    "test_header_too_small, 7 bytes": bytes(7),
    "test_header_too_small, 8 bytes": bytes(8),
    "test_invalid_header_length": b"<" + bytes(7),
    "test_invalid_header_length, a byte less": file_of(b"{}", length=3),
    "test_invalid_header_non_utf8": b"\1" + bytes(7) + b"\xff",
    "test_invalid_header_non_utf8 in a name": file_of(b'{"\xff":1}'),
    "test_invalid_header_not_json": b"\1" + bytes(7) + b"{",
    "test_invalid_header_not_json, two documents": file_of(b"{}{}"),
    "test_invalid_header_not_json, a comma": file_of(b'{"__metadata__":{},}'),
    "test_invalid_header_not_json, NaN": file_of(b'{"__metadata__":NaN}'),
    "test_invalid_header_not_json, a list": file_of(b"[]"),
    "test_invalid_header_not_json, deep": file_of(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"),
    "test_whitespace_padded_header": file_of(b"{}       "),
    "test_whitespace_padded_header, line breaks": file_of(b"{}\n\t\r"),
    "test_whitespace_padded_header, NUL": file_of(b"{}\0"),
    "test_whitespace_leading_padded_header": file_of(b"\t{}"),
    "test_whitespace_leading_padded_header, a mark": file_of(b"\xef\xbb\xbf{}"),
    "test_zero_sized_tensor": file_of({"test": entry("I32", [2, 0], [0, 0])}),
    "test_zero_sized_tensor within another": file_of(
        {"a": entry(shape=[2], offsets=[0, 8]), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)
    ),
    "test_invalid_info": file_of({"test": entry("I32", [2, 2], [0, 4])}, bytes(4)),
    "test_invalid_info, the other way": file_of({"test": entry("I32", [1], [0, 16])}, bytes(16)),
    "test_invalid_info, offsets that go backwards": file_of({"a": entry(offsets=[4, 0])}, bytes(4)),
    "test_invalid_info, three offsets": file_of({"a": entry(offsets=[0, 4, 4])}, bytes(4)),
    "test_invalid_info, an offset of 1.0": file_of({"a": entry(offsets=[0, 4.0])}, bytes(4)),
    "test_invalid_info, a dimension of 1.0": file_of({"a": entry(shape=[1.0])}, bytes(4)),
    "test_invalid_info, a dimension of true": file_of({"a": entry(shape=[True])}, bytes(4)),
    "test_invalid_info, a dimension of -1": file_of({"a": entry(shape=[-1])}, bytes(4)),
    "test_invalid_info, 65 dimensions": file_of({"a": entry(shape=[1] * 65)}, bytes(4)),
    "test_invalid_info, an unknown dtype": file_of({"a": entry("F33")}, bytes(4)),
    "test_invalid_info, dtype in lower case": file_of({"a": entry("f32")}, bytes(4)),
    "test_validation_overflow": file_of({"test": entry("I32", [2, 18446744073709551614], [0, 16])}, bytes(16)),
    "test_validation_overflow of bytes": file_of({"test": entry("I32", [2, 9223372036854775807], [0, 16])}, bytes(16)),
    "test_validation_overflow to 0": file_of({"test": entry("I32", [2**32, 2**32], [0, 0])}),
    "test_validation_overflow beside a 0": file_of({"test": entry("I32", [0, 2**63, 2**63], [0, 0])}),
    "test_validation_overflow before a 0": file_of({"test": entry("I32", [2**63, 2**63, 0], [0, 0])}),
    "safetensors_abuse_attempt_1": spread(1000, 4),
    "safetensors_abuse_attempt_2": file_of({"a": entry(shape=[2**20], offsets=[0, 2**22])}, bytes(4)),
    "safetensors_abuse_attempt_3": attack()[:-4],
}
REASONS = {
    "test_empty with null metadata": "the format says: an object of strings",
    "test_serialization_metadata, a key twice": "bad-inputs 32: one of two values would be lost",
    "test_deserialization, a field more": "bad-inputs 39: what it means is not known",
    "test_deserialization, a name twice": "bad-inputs 28: duplicate keys are refused, even equal ones",
    "test_deserialization, an empty name": "bad-inputs 40",
    "test_deserialization, a name with NUL": "bad-inputs 41: it would be cut or shown otherwise elsewhere",
    "test_whitespace_leading_padded_header": "the format says that the header begins with {",
    "test_invalid_info, 65 dimensions": "bad-inputs 51: NumPy ends at 64",
    "test_validation_overflow beside a 0": "bad-inputs 49: dimensions beyond 2^63 - 1",
}
"""Files that the package accepts and that are refused here, each with the reason; the other way round there is none."""


def theirs(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | str:
    """Returns what the package reads, or its error."""
    try:
        return {
            name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
            for name, tensor in safetensors.deserialize(data)
        }
    except safetensors.SafetensorError as error:
        return str(error)


def ours(data: bytes, folder: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]] | str:
    """Returns what is read here, or the code of the error."""
    path = folder / "x.safetensors"
    path.write_bytes(data)
    try:
        with open_checkpoint(path) as checkpoint:
            return {name: (str(t.dtype.safetensors), list(t.shape), t.raw()) for name, t in checkpoint.tensors.items()}
    except AprJaxError as error:
        return error.code


def table(folder: pathlib.Path) -> str:
    """Returns the verdicts as Markdown."""
    lines = [
        f"{time.strftime('%Y-%m-%d')}, safetensors {importlib.metadata.version('safetensors')}, {len(FILES)} files, "
        f"{len(REASONS)} verdicts differ.",
        "",
        "| file, after the test of the package | the package | apr_jax | why they differ |",
        "| --- | --- | --- | --- |",
    ]
    for name, data in FILES.items():
        verdicts = [
            verdict if isinstance(verdict, str) else "accepted" for verdict in (theirs(data), ours(data, folder))
        ]
        cells = (
            name,
            ascii(verdicts[0].removeprefix("Error while deserializing header: ")[:60])[1:-1],
            verdicts[1],
            REASONS.get(name, ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class JudgeTest(parameterized.TestCase):
    def test_there_are_enough_files(self):
        self.assertGreater(len(FILES), 60 + 20)
        self.assertContainsSubset(REASONS.keys(), FILES.keys())
        verdicts = [isinstance(theirs(data), str) for data in FILES.values()]
        self.assertGreater(min(sum(verdicts), len(verdicts) - sum(verdicts)), 30, "of both kinds")

    @parameterized.named_parameters((name.replace(" ", "_"), name) for name in FILES)
    def test_both_judge_alike_or_the_reason_is_known(self, name):
        found, known = ours(FILES[name], pathlib.Path(self.create_tempdir().full_path)), theirs(FILES[name])
        if name in REASONS:
            self.assertIsInstance(found, str)
            self.assertIsInstance(known, dict)
        elif isinstance(known, dict):
            self.assertEqual(found, known)
        else:
            self.assertIsInstance(found, str)


if __name__ == "__main__":
    if "--table" in sys.argv:
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            (pathlib.Path(__file__).parent / "JUDGE.md").write_text(table(pathlib.Path(place)))
    else:
        absltest.main()
