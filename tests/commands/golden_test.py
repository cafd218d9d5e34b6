"""The command as a user runs it: what it writes, prints and returns."""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.trace import golden, inputs
from apr_jax.trace.positions import find_columns, gather_positions
from tests import paths, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")


class GoldenCommandTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def ran(self, *args, code=0):
        return tool.ran(self, "golden", *args, code=code)

    def test_a_golden_file_holds_what_is_promised_and_checks_against_itself(self):
        path = self.folder / "g.safetensors"
        done = self.ran(SAMPLE, "-o", path, "--trace", "--hidden-states")
        self.assertIn("2 x 64 positions", done.stdout)
        arrays = safetensors.numpy.load_file(path)
        self.assertEqual(arrays["input_ids"].dtype, np.int32)
        self.assertEqual(arrays["logits"].shape, (2, 64, 288))
        self.assertEqual((arrays["loss_nats"].dtype, arrays["loss_nats"].shape), (np.float64, (1,)))
        self.assertEqual(arrays["stage.1.attn_scores"].shape, (2, 4, 64, 64))
        self.assertEqual(sum(name.startswith("stage.") for name in arrays), 36)
        self.assertEqual(sum(name.startswith("hidden.") for name in arrays), 3)
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
        for key in ("witness", "dtype", "versions", "device", "precision", "weights_sha256", "config"):
            self.assertTrue(metadata[key], key)
        result = json.loads(self.ran(SAMPLE, "--check", path, "--json").stdout)
        self.assertEqual((result["within"], result["compared"], result["warnings"]), (True, 40, []))
        self.assertEqual(max(tensor["max_abs"] for tensor in result["tensors"]), 0)
        self.assertIn("8.1699", self.ran(SAMPLE, "--check", path).stdout, "uniform loss in bits: log2(288)")
        self.assertIn("output exists", self.ran(SAMPLE, "-o", path, code=2).stderr)
        before = path.read_bytes()
        self.ran(SAMPLE, "-o", path, "--trace", "--hidden-states", "--force")
        self.assertEqual(path.read_bytes(), before, "the same input gives the same bytes")

    def test_huggingfaces_recorded_values_check_and_another_models_do_not(self):
        done = self.ran(SAMPLE, "--check", paths.golden("gqa_tied_bf16"))
        self.assertIn("agree", done.stdout)
        done = self.ran(paths.checkpoint("gqa_untied_bf16"), "--check", paths.golden("gqa_tied_bf16"), code=5)
        self.assertIn("shapes differ", done.stderr)

    def test_one_wrong_digit_is_outside_and_exits_1(self):
        reference = golden.read(paths.golden("gqa_tied_bf16"))
        values = {key: value.copy() for key, value in reference.values.items()}
        values["hidden.1"][1, 20] *= 1 + 1e-3
        path = self.folder / "wrong.safetensors"
        golden.write(path, golden.Golden(reference.inputs, values, {**reference.metadata, "weights_sha256": "0"}))
        done = self.ran(SAMPLE, "--check", path, code=1)
        self.assertRegex(done.stdout, r"hidden\.1 .*OUTSIDE")
        self.assertIn("differ: 1 outside", done.stdout)
        self.assertIn("other weights", done.stderr)
        result = json.loads(self.ran(SAMPLE, "--check", path, "--json", code=1).stdout)
        self.assertEqual([t["key"] for t in result["tensors"] if not t["within"]], ["hidden.1"])

    def test_bfloat16_is_held_against_its_own_error(self):
        result = json.loads(
            self.ran(SAMPLE, "--check", paths.golden("gqa_tied_bf16"), "--dtype", "bfloat16", "--json").stdout
        )
        logits = next(tensor for tensor in result["tensors"] if tensor["key"] == "logits")
        self.assertBetween(logits["relative_l2"], 1e-3, logits["bar"])

    def test_a_dump_of_a_prompt_checks_in_float64_too(self):
        dump = f"{self.folder}/dump/"
        self.ran(SAMPLE, "-o", dump, "--trace", "--prompt", "What is 2+2?")
        ids = json.loads((self.folder / "dump" / "token_ids.json").read_text())
        self.assertEqual(ids, [54, 71, 269, 266, 82, 220, 17, 10, 17, 30], "as `apr` tokenises it")
        for dtype in ("float32", "float64"):
            result = json.loads(self.ran(SAMPLE, "--check", dump, "--dtype", dtype, "--json").stdout)
            self.assertEqual((result["within"], result["compared"]), (True, 37))

    def test_inputs_come_from_json_and_from_golden_files(self):
        ids = self.folder / "ids.json"
        ids.write_text("[[1, 2, 3, 4], [5, 6]]")
        path = self.folder / "g.safetensors"
        self.ran(SAMPLE, "-o", path, "--input-ids", ids)
        again = self.folder / "again.safetensors"
        self.ran(SAMPLE, "-o", again, "--input-ids", path)
        self.assertEqual(golden.read(again).inputs.attention_mask.tolist(), [[1, 1, 1, 1], [1, 1, 0, 0]])
        self.assertEqual(again.read_bytes(), path.read_bytes())
        ids.write_text("[[5]]")
        self.ran(SAMPLE, "-o", path, "--input-ids", ids, "--force")
        self.assertNotIn("loss_nats", safetensors.numpy.load_file(path), "a single token predicts nothing")

    def test_inputs_are_exported_as_plain_files_and_taken_back(self):
        folder = self.folder / "inputs"
        self.assertIn("1 x 64 positions", self.ran(SAMPLE, "--export-inputs", folder).stdout)
        raw = np.fromfile(folder / "input_ids.1x64.i32", "<i4")
        np.testing.assert_array_equal(raw[None], inputs.seeded(288, 1, 64).input_ids)
        np.testing.assert_array_equal(np.fromfile(folder / "position_ids.1x64.i64", "<i8"), np.arange(64))
        self.assertEqual(json.loads((folder / "inputs.json").read_text())["input_ids"], [raw.tolist()])
        self.assertIn("output exists", self.ran(SAMPLE, "--export-inputs", folder, code=2).stderr)
        self.ran(SAMPLE, "--export-inputs", folder, "--input-ids", paths.golden("gqa_tied_bf16"), "--force")
        path = self.folder / "g.safetensors"
        self.ran(SAMPLE, "-o", path, "--input-ids", folder)
        expected = golden.read(paths.golden("gqa_tied_bf16")).inputs
        found = golden.read(path).inputs
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.positions(), expected.positions())

    def test_a_golden_file_of_some_positions_is_checked_at_these(self):
        whole = golden.read(paths.golden("gqa_tied_bf16"))
        positions = [3, 20]
        columns = find_columns(positions, whole.inputs)
        arrays = {key: gather_positions(key, value, columns) for key, value in whole.values.items()}
        given = {name: getattr(whole.inputs, name) for name in ("input_ids", "attention_mask", "position_ids")}
        arrays |= given | {"positions": np.array(positions, np.int32)}
        path = self.folder / "steps.safetensors"
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, dict(whole.metadata))
        result = json.loads(self.ran(SAMPLE, "--check", path, "--json").stdout)
        logits = next(tensor for tensor in result["tensors"] if tensor["key"] == "logits")
        self.assertEqual((result["within"], logits["elements"]), (True, 2 * len(whole.inputs.input_ids) * 288))
        arrays["logits"] = np.ascontiguousarray(arrays["logits"][:, ::-1])
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, dict(whole.metadata))
        self.ran(SAMPLE, "--check", path, code=1)

    def test_mistakes_are_one_line_with_their_exit_code(self):
        other = self.folder / "x.safetensors"
        safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, other)
        for args, code in (
            ((SAMPLE,), 2),
            ((SAMPLE, "-o", self.folder / "g", "--check", "g"), 2),
            ((SAMPLE, "--check", "g", "--trace"), 2),
            ((SAMPLE, "-o", f"{self.folder}/dump/"), 2),
            ((SAMPLE, "--export-inputs", self.folder / "in", "--trace"), 2),
            ((self.folder / "none", "-o", self.folder / "g"), 3),
            ((SAMPLE, "--check", self.folder / "none"), 3),
            ((SAMPLE, "--check", SAMPLE / "tokenizer.json"), 4),
            ((SAMPLE, "--check", other), 5),
        ):
            with self.subTest(args=args):
                done = self.ran(*args, code=code)
                self.assertRegex(done.stderr, r"(?m)^(error:|.*: error:) ")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["x.safetensors"])


class FormatTest(parameterized.TestCase):
    @parameterized.parameters(
        (("out", "--to", "aprt"), True),
        (("out/",), True),
        (("out",), False),
        (("out.safetensors", "--to", "safetensors"), False),
    )
    def test_an_option_or_the_name_says_what_is_written(self, words, folder):
        place = pathlib.Path(self.create_tempdir().full_path)
        tool.ran(self, "golden", SAMPLE, "--trace", "--prompt", "x", "-o", *words, cwd=place)
        (made,) = place.iterdir()
        self.assertEqual(made.is_dir(), folder)

    @parameterized.parameters(
        (("-o", "out/", "--to", "safetensors", "--trace"), "a safetensors file cannot be a folder"),
        (("-o", "out", "--to", "aprt"), "Add --trace"),
        (("--check", "out", "--to", "aprt"), "--to says what -o writes"),
    )
    def test_what_cannot_be(self, words, said):
        done = tool.run("golden", SAMPLE, *words)
        self.assertEqual(done.returncode, 2)
        self.assertIn(said, done.stderr)


if __name__ == "__main__":
    absltest.main()
