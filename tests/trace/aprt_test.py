"""APRT dumps: bytes as the format says, round trips, and what does not fit a model."""

import os
import pathlib
import struct
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, MissingFileError, RefusedError, UsageError
from apr_jax.load.load_model import load_model
from apr_jax.trace import aprt, stages
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import gather_positions
from tests import paths


class AprtTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.model = load_model(paths.checkpoint("gqa_tied_bf16"))
        cls.inputs = seeded(cls.model.config.vocab_size, 1, 9)
        cls.trace = cls.model.trace(cls.inputs)

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.dump = self.folder / "dump"

    def raises(self, kind: type[AprJaxError], code: str, call, *args):
        with self.assertRaises(kind) as caught:
            call(*args)
        self.assertEqual(caught.exception.code, code)
        return str(caught.exception)

    def test_the_bytes_of_a_file_are_those_of_the_format(self):
        data = aprt.encode(3, np.array([[1.0, -2.0]]))
        self.assertEqual(data, b"APRT" + struct.pack("<IIff", 3, 2, 1.0, -2.0))
        layer, values = aprt.decode(data, "x")
        self.assertEqual((layer, values.tolist()), (3, [1.0, -2.0]))

    def test_a_trace_comes_back_with_the_last_positions_logits(self):
        aprt.write(self.dump, self.inputs, self.trace)
        inputs, values = aprt.read(self.dump, self.model.config)
        np.testing.assert_array_equal(inputs.input_ids, self.inputs.input_ids)
        self.assertEqual(list(values), list(stages.trace_keys(2)))
        for key, value in values.items():
            expected = self.trace[key][:, -1:] if key == stages.LOGITS else self.trace[key]
            np.testing.assert_array_equal(value, expected, key)
        self.assertLen(list(self.dump.rglob("*.bin")), 37)
        self.assertTrue((self.dump / "layer-0" / "embedding.bin").is_file())
        self.assertEqual((self.dump / "lm_head.bin").read_bytes()[4:8], b"\xff\xff\xff\xff")

    def test_logits_of_all_positions_and_the_alias_of_the_last_stage_are_read(self):
        (self.dump / "layer-1").mkdir(parents=True)
        (self.dump / "lm_head.bin").write_bytes(aprt.encode(aprt.WHOLE_MODEL, self.trace[stages.LOGITS]))
        output = self.trace["stage.1.post_ffn_residual"]
        (self.dump / "layer-1" / "layer_output.bin").write_bytes(aprt.encode(1, output))
        _, values = aprt.read(self.dump, self.model.config, self.inputs)
        np.testing.assert_array_equal(values[stages.LOGITS], self.trace[stages.LOGITS])
        np.testing.assert_array_equal(values["stage.1.post_ffn_residual"], output)

    def test_a_dump_is_replaced_only_on_request_and_only_if_it_is_one(self):
        aprt.write(self.dump, self.inputs, self.trace)
        self.raises(UsageError, "output-exists", aprt.write, self.dump, self.inputs, self.trace)
        aprt.write(self.dump, self.inputs, {stages.FINAL_NORM: self.trace[stages.FINAL_NORM]}, True)
        self.assertEqual(sorted(os.listdir(self.dump)), ["final_norm.bin", "token_ids.json"])
        for stranger in ("layer-0/notes.txt", "deep/er/x.bin"):
            (self.dump / stranger).parent.mkdir(parents=True, exist_ok=True)
            (self.dump / stranger).write_text("mine")
            self.raises(UsageError, "output-not-replaceable", aprt.write, self.dump, self.inputs, self.trace, True)
            self.assertEqual((self.dump / stranger).read_text(), "mine")
            (self.dump / stranger).unlink()
        self.assertEqual(os.listdir(self.folder), ["dump"])

    def test_batches_and_padding_do_not_fit(self):
        for inputs in (seeded(50, 2, 9), Inputs.of([[1, 2]], [[1, 0]])):
            self.raises(UsageError, "aprt-batch", aprt.write, self.dump, inputs, {})
        self.assertFalse(self.dump.exists())

    def test_broken_files_and_files_of_another_model_are_refused(self):
        config = self.model.config
        aprt.write(self.dump, self.inputs, self.trace)
        norm = self.dump / "final_norm.bin"
        data = norm.read_bytes()
        for content, kind, code in (
            (b"NOPE" + data[4:], BrokenContainerError, "aprt-magic"),
            (b"", BrokenContainerError, "aprt-magic"),
            (data[:-1], BrokenContainerError, "aprt-length"),
            (data + b"\0", BrokenContainerError, "aprt-length"),
            (data[:7], BrokenContainerError, "aprt-length"),
            (aprt.encode(aprt.WHOLE_MODEL, np.zeros(2 * 64)), RefusedError, "dump-size"),
            (aprt.encode(0, self.trace[stages.FINAL_NORM]), RefusedError, "aprt-layer"),
        ):
            norm.write_bytes(content)
            self.assertIn("final_norm.bin", self.raises(kind, code, aprt.read, self.dump, config))
        norm.write_bytes(data)
        other = load_model(paths.checkpoint("odd_sizes")).config
        self.raises(RefusedError, "dump-size", aprt.read, self.dump, other)

    def test_a_dump_without_stages_or_token_ids_is_refused(self):
        config = self.model.config
        self.raises(MissingFileError, "file-missing", aprt.read, self.dump, config)
        self.dump.mkdir()
        self.raises(MissingFileError, "token-ids-missing", aprt.read, self.dump, config)
        self.raises(RefusedError, "aprt-empty", aprt.read, self.dump, config, self.inputs)
        for content, code in (("{}", "token-ids"), ("[]", "token-ids"), ("[1.5]", "token-ids"), ("[", "json-syntax")):
            (self.dump / "token_ids.json").write_text(content)
            self.raises(BrokenContainerError, code, aprt.read, self.dump, config)

    def test_a_batch_and_some_positions_of_it_are_read(self):
        batch = seeded(self.model.config.vocab_size, 2, 9)
        columns = np.array([[4, 5], [4, 5]])
        trace = self.model.trace(batch)
        for name, kept in (("whole", None), ("steps", columns)):
            for key, value in trace.items():
                path = self.folder / name / aprt.path_of(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                outer = 0 if key == stages.EMBEDDING else aprt.WHOLE_MODEL
                layer = int(key.split(".")[1]) if key.count(".") == 2 else outer
                path.write_bytes(aprt.encode(layer, gather_positions(key, value, kept)))
            _, values = aprt.read(self.folder / name, self.model.config, batch, kept)
            self.assertEqual(list(values), list(trace))
            for key, value in values.items():
                np.testing.assert_array_equal(value, gather_positions(key, trace[key], kept), key)
        with self.assertRaisesRegex(RefusedError, "--positions"):
            aprt.read(self.folder / "steps", self.model.config, batch)

    def test_files_that_are_no_stage_are_named(self):
        aprt.write(self.dump, self.inputs, self.trace)
        self.assertEqual(aprt.unknown_files(self.dump, self.model.config), [])
        (self.dump / "layer-7").mkdir()
        for name in ("layer-7/ffn_up.bin", "layer-0/q_rope.bin"):
            (self.dump / name).write_bytes(aprt.encode(0, np.zeros(3)))
        (self.dump / "layer-1" / "ffn_up.bin").unlink()
        os.mkfifo(self.dump / "layer-1" / "ffn_up.bin")
        self.assertEqual(
            aprt.unknown_files(self.dump, self.model.config),
            ["layer-0/q_rope.bin", "layer-1/ffn_up.bin", "layer-7/ffn_up.bin"],
        )


if __name__ == "__main__":
    absltest.main()
