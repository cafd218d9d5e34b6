"""What an `.apr` hides or contradicts is no part of a conversion, unless --as-is asks for it."""

import json
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.formats import apr_format, dtypes
from tests.paths import checkpoint

SAMPLE = checkpoint("gqa_tied_bf16")


def with_footer(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(4, "little")


class PaddingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        f32 = dtypes.by_name("f32")
        entries = apr_format.lay_out([(name, f32, (3,), 12) for name in "abc"])
        prologue = apr_format.serialise_prologue({}, entries)
        self.begin = len(prologue)
        self.data = prologue + (b"\x01" * 12 + bytes(52)) * 3

    def write(self, data: bytes) -> pathlib.Path:
        path = self.folder / "m.apr"
        path.write_bytes(data)
        return path

    @parameterized.product(at=(12, 40, 63, 64 + 12, 128 + 12, 191), to=("apr", "safetensors"), footer=(True, False))
    def test_a_byte_hidden_in_padding_is_refused_with_its_place(self, at, to, footer):
        changed = bytearray(self.data)
        changed[self.begin + at] = 7
        path = self.write(with_footer(bytes(changed)) if footer else bytes(changed))
        output = self.folder / ("out.apr" if to == "apr" else "out.safetensors")
        with self.assertRaisesRegex(BrokenContainerError, "hidden in the padding.*found 0x07.*--as-is") as caught:
            convert(path, output, to=to)
        error = caught.exception
        self.assertEqual((error.code, error.offset, error.file), ("padding", self.begin + at, str(path)))
        self.assertFalse(output.exists())
        convert(path, output, to=to, as_is=True)
        self.assertNotIn(7, output.read_bytes()[-204:] if to == "safetensors" else output.read_bytes()[self.begin : -4])

    def test_zeros_and_tensors_without_data_are_fine(self):
        convert(self.write(with_footer(self.data)), self.folder / "out.apr", to="apr")
        self.assertEqual((self.folder / "out.apr").read_bytes(), with_footer(self.data))


class MetadataTest(parameterized.TestCase):
    """An `.apr` of another writer: its metadata are all that says what the model is."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pathlib.Path(absltest.TEST_TMPDIR.value) / "metadata_test"
        cls.folder.mkdir(parents=True, exist_ok=True)
        convert(SAMPLE, cls.folder / "a.apr", to="apr", force=True)
        with open_checkpoint(cls.folder / "a.apr") as opened:
            left = ("source_files", "source_metadata")
            cls.metadata = {key: value for key, value in opened.metadata.items() if key not in left}
            cls.entries = opened.apr.entries
            begin = opened.apr.header.data_offset
        cls.payload = (cls.folder / "a.apr").read_bytes()[begin:-4]

    def apr(self, **changes: object) -> pathlib.Path:
        text = json.dumps(self.metadata | changes).encode()
        path = pathlib.Path(self.create_tempdir().full_path) / "b.apr"
        path.write_bytes(with_footer(apr_format.serialise_prologue(text, self.entries) + self.payload))
        return path

    def test_right_metadata_become_a_configuration(self):
        path = self.apr()
        convert(path, path.parent / "out", to="safetensors")
        self.assertEqual(json.loads((path.parent / "out" / "config.json").read_text())["hidden_size"], 64)

    @parameterized.product(
        change=(
            {"hidden_size": "896"}, {"hidden_size": -1}, {"hidden_size": 1e9}, {"hidden_size": 128},
            {"num_layers": [2]}, {"num_heads": True}, {"vocab_size": 10**9}, {"rope_theta": "1e6"},
            {"rms_norm_eps": -1e-6}, {"intermediate_size": 161}, {"num_kv_heads": 4},
            {"max_position_embeddings": "4096"},
        ),
        to=("apr", "safetensors"),
    )  # fmt: skip
    def test_fields_of_another_type_or_of_another_model_are_refused(self, change, to):
        path = self.apr(**change)
        with self.assertRaisesRegex(RefusedError, "metadata does not match the model.*\n.*(\n.*)*--as-is") as caught:
            convert(path, path.parent / "out.apr", to=to) if to == "apr" else convert(path, path.parent / "out", to=to)
        self.assertEqual((caught.exception.code, caught.exception.exit_code), ("metadata-values", 5))
        self.assertLen(list(path.parent.iterdir()), 1)

    def test_as_is_converts_it_and_says_so(self):
        path = self.apr(hidden_size="896")
        convert(path, path.parent / "out", to="safetensors", as_is=True)
        self.assertTrue((path.parent / "out" / "model.safetensors").exists())
        self.assertFalse((path.parent / "out" / "config.json").exists())

    def test_another_architecture_is_not_judged_by_qwen2s_shapes(self):
        path = self.apr(architecture="other", hidden_size=77)
        convert(path, path.parent / "out", to="safetensors")
        self.assertTrue((path.parent / "out" / "model.safetensors").exists())

    def test_a_name_that_does_not_fit_names_the_file(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        name = "n" * 257
        header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with self.assertRaises(RefusedError) as caught:
            convert(folder / "x.safetensors", folder / "x.apr", to="apr")
        self.assertEqual(caught.exception.file, str(folder / "x.safetensors"))


if __name__ == "__main__":
    absltest.main()
