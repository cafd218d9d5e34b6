"""The command as an engineer runs it on the dump of another engine."""

import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.load.load_model import load_model
from apr_jax.trace import aprt, golden, inputs, stages
from apr_jax.trace.inputs import seeded
from tests import oracle, paths, tool
from tests.battery.faulty_forward import Planted, at_rows, forward, write_aprt
from tests.battery.parity_battery import REAL_CASE

SAMPLE = paths.checkpoint("gqa_tied_bf16")


class ParityTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def ran(self, *args, code):
        """Returns what the command prints on stdout and on stderr."""
        done = tool.ran(self, "parity", *args, code=code)
        return done.stdout, done.stderr

    def report(self, *args, code):
        return json.loads(self.ran(*args, "--json", code=code)[0])

    def dump(self, length, faults=()):
        ids = seeded(288, 1, length).input_ids
        values = forward(*oracle.load(SAMPLE), ids, faults=faults)
        write_aprt(self.folder / "dump", values, ids)
        return self.folder / "dump", values


class ParityCommandTest(ParityTestCase):
    def test_the_four_defects_of_the_bug_hunt_are_named_in_one_run(self):
        dump, _ = self.dump(80, REAL_CASE)
        command = [sys.executable, paths.ROOT / "tools" / "parity.py", SAMPLE, "--right", dump]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        # Progress, on a slow machine, and nothing else.
        self.assertRegex(done.stderr, r"\A(\.\.\. .*\n)*\Z")
        for part in (
            "q_post_rope: yours equals adjacent-pair RoPE",
            "the RoPE base is 10000",
            "rms_norm eps is 1e-05 in input_layernorm, norm, post_attention_layernorm",
            "the q, k and v biases are missing",
        ):
            self.assertIn(part, done.stdout)
        self.assertRegex(done.stdout, r"(?m)^mistake: 4 found")
        self.assertRegex(done.stdout, r"(?m)^q_post_rope +X  X$")
        self.assertRegex(done.stdout, r"(?m)^attn_softmax +\.  \.$")

    def test_the_json_report_has_the_fields_that_are_promised(self):
        dump, _ = self.dump(80, REAL_CASE)
        report = self.report(SAMPLE, "--right", dump, code=1)
        fields = (
            "verdict standing compared dtype widened unexamined first_wrong findings notes stages worst_stage logits"
        )
        self.assertEqual(set(report), {*fields.split(), "logits", "sides"})
        self.assertEqual(
            (report["verdict"], report["compared"], report["dtype"], report["unexamined"], report["notes"]),
            ("mistake", {"stages": 37, "elements": 292768, "positions": 80}, "float32", [], []),
        )
        self.assertLen(report["findings"], 4)
        kinds = {
            "fault": str,
            "layers": str,
            "stage": str,
            "parameters": dict,
            "residual_before": float,
            "residual_after": float,
            "alternatives": list,
            "certainty": str,
            "sentence": str,
            "cannot_show": list,
            "formulas": dict,
            "first": list,
        }
        for finding in report["findings"]:
            self.assertEqual({key: type(value) for key, value in finding.items()}, kinds)
            self.assertEqual((finding["layers"], finding["certainty"]), ("all", "certain"))
            self.assertLess(finding["residual_after"], 1e-6)
            self.assertGreater(finding["residual_before"], 1e-2)
        found = {finding["fault"]: finding["parameters"] for finding in report["findings"]}
        self.assertEqual(found["rope-theta"], {"theta": 1e4})

    def test_one_layer_is_a_list_and_what_nothing_explains_has_no_residual_after(self):
        dump, values = self.dump(64)
        wrong = values["stage.1.ffn_out"][0].copy()
        wrong[40] *= 1 + 0.01 * np.random.default_rng(0).standard_normal(64)
        (dump / "layer-1" / "ffn_out.bin").write_bytes(aprt.encode(1, wrong))
        findings = self.report(SAMPLE, "--right", dump, code=1)["findings"]
        self.assertEqual([f["stage"] for f in findings], ["ffn_out", "post_ffn_residual"])
        for finding in findings:
            self.assertEqual(
                (finding["fault"], finding["layers"], finding["residual_after"], finding["certainty"]),
                ("unknown", [1], None, "unexplained"),
            )
            self.assertIn("row 0 position 40", finding["sentence"])

    def test_field_a_right_float16_engine(self):
        """FIELD parity: a right engine's dump of float16 values, declared and not -> rounding, as float16, rc 0"""
        load_model(SAMPLE, "float16", "cpu")
        ids = seeded(288, 1, 80).input_ids
        write_aprt(self.folder / "half", forward(*oracle.load(SAMPLE), ids, dtype="float16"), ids)
        for declared in ([], ["--right-dtype", "float16"]):
            report = self.report(SAMPLE, "--right", self.folder / "half", *declared, code=0)
            self.assertEqual((report["verdict"], report["dtype"], report["findings"]), ("rounding", "float16", []))

    def test_field_rotation_in_bfloat16_is_no_rounding(self):
        """FIELD parity: bfloat16 engine whose RoPE angles are bfloat16, 80 positions -> rope-precision, rc 1"""
        ids, angles = seeded(288, 1, 80).input_ids, Planted("rope-precision", None, {"what": "angles"})
        write_aprt(self.folder / "narrow", forward(*oracle.load(SAMPLE), ids, faults=[angles], dtype="bfloat16"), ids)
        printed, _ = self.ran(SAMPLE, "--right", self.folder / "narrow", code=1)
        self.assertIn("all layers, q_post_rope: RoPE is less precise than float32: angles in bfloat16", printed)
        self.assertIn("judged as bfloat16", printed)

    def test_a_right_engine_is_rounding_and_its_last_positions_logits_suffice(self):
        dump, _ = self.dump(64)
        report = self.report(SAMPLE, "--right", dump, code=0)
        self.assertEqual((report["verdict"], report["findings"], report["unexamined"]), ("rounding", [], []))

    def test_one_token_at_position_0_is_warned_of(self):
        dump, _ = self.dump(1, REAL_CASE[3:])
        out, err = self.ran(SAMPLE, "--right", dump, code=0)
        self.assertIn("rounding", out)
        self.assertRegex(err, "RoPE is the identity there, and neither masking nor attention .* is seen")

    def test_a_dump_of_some_layers_is_no_model_with_fewer_layers(self):
        dump, _ = self.dump(64)
        for path in (dump / "layer-1").iterdir():
            path.unlink()
        report = self.report(SAMPLE, "--right", dump, code=0)
        self.assertEqual((report["verdict"], report["compared"]["stages"]), ("rounding", 20))
        self.assertIn("stage.1.attn_norm", report["unexamined"])

    def test_the_upload_is_read_back(self):
        _, err = self.ran(SAMPLE, "--right", "cpu", "--check-upload", code=0)
        self.assertIn("26 of 26 parameters read back bit for bit", err)


@pytest.mark.slow
class DecodingTest(ParityTestCase):
    """Dumps of eight decoding steps: positions 64 to 71, made against a cache that nobody dumped."""

    def steps(self, faults=(), form="map", positions=None):
        ids = seeded(288, 1, 72)
        values = forward(*oracle.load(SAMPLE), ids.input_ids, None, positions, faults)
        rows = at_rows(values, slice(64, 72))
        folder = self.folder / form
        folder.mkdir(exist_ok=True)
        if form == "golden":
            arrays = {key: np.ascontiguousarray(value) for key, value in rows.items()}
            arrays |= {"input_ids": ids.input_ids, "positions": np.arange(64, 72, dtype=np.int32)}
            safetensors.numpy.save_file(arrays, folder / "steps.safetensors")
            return folder / "steps.safetensors"
        if form == "map":
            for key, value in rows.items():
                np.save(folder / f"{key}.npy", value)
            entries = {key: {"file": f"{key}.npy"} for key in rows}
            content = {"input_ids": ids.input_ids.tolist(), "positions": list(range(64, 72)), "stages": entries}
            (folder / "dump.json").write_text(json.dumps(content))
            return folder
        for key, value in rows.items():
            path = folder / aprt.path_of(key)
            path.parent.mkdir(exist_ok=True)
            outer = 0 if key == stages.EMBEDDING else aprt.WHOLE_MODEL
            path.write_bytes(aprt.encode(int(key.split(".")[1]) if key.count(".") == 2 else outer, value))
        (folder / "token_ids.json").write_text(json.dumps(ids.input_ids[0].tolist()))
        return folder

    def test_right_steps_are_clean_in_every_form_and_the_report_says_what_it_did_not_see(self):
        for form, more in (("map", ()), ("golden", ()), ("aprt", ("--positions", "64-71"))):
            report = self.report(SAMPLE, "--right", self.steps(form=form), *more, code=0)
            self.assertEqual((report["verdict"], report["findings"]), ("rounding", []), form)
            self.assertEqual((report["compared"]["stages"], report["compared"]["positions"]), (37, 8))
            self.assertEqual(report["unexamined"], ["positions 0-63"])
            self.assertIn("only positions 64-71 were dumped", report["notes"][0])
        _, err = self.ran(SAMPLE, "--right", self.steps(form="aprt"), code=5)
        self.assertIn("--positions says which it holds", err)
        _, err = self.ran(SAMPLE, "--right", self.steps(form="aprt"), "--positions", "64-72", code=2)
        self.assertIn("of 0 to 71", err)

    def test_the_same_mistake_at_every_position_is_named_once_though_the_cache_is_not_there(self):
        (finding,) = self.report(SAMPLE, "--right", self.steps([Planted("rope-adjacent-pairs")]), code=1)["findings"]
        self.assertEqual(
            (finding["fault"], finding["layers"], finding["stage"], finding["certainty"]),
            ("rope-adjacent-pairs", "all", "q_post_rope", "certain"),
        )
        report = self.report(SAMPLE, "--right", self.steps(REAL_CASE), code=1)
        self.assertEqual({f["fault"] for f in report["findings"]}, {planted.name for planted in REAL_CASE})
        self.assertEqual(report["compared"]["stages"], 37)

    def test_mistakes_of_the_steps_alone_are_named(self):
        cache = Planted("cache-position", None, {"shift": 1, "prefill": 64, "side": "write"})
        (finding,) = self.report(SAMPLE, "--right", self.steps([cache]), code=1)["findings"]
        self.assertEqual((finding["fault"], finding["layers"]), ("cache-position", "all"))
        self.assertEqual(finding["parameters"], {"shift": 1, "side": "write", "prefill": 64})

        # The prompt was run at the right positions, the steps behind it three further on.
        late = np.arange(72) + 3 * (np.arange(72) >= 64)
        (finding,) = self.report(SAMPLE, "--right", self.steps(positions=late[None]), code=1)["findings"]
        self.assertEqual((finding["fault"], finding["layers"]), ("rope-position", "all"))
        self.assertEqual((finding["parameters"], finding["certainty"]), ({"shift": 3}, "certain"))

    def test_behind_a_mistake_that_nothing_explains_the_cache_is_not_judged(self):
        steps = self.steps([Planted("rope-adjacent-pairs")])
        rows = np.load(steps / "stage.0.k_post_rope.npy")
        np.save(steps / "stage.0.k_post_rope.npy", rows[..., ::-1] * np.float32(1.5))
        report = self.report(SAMPLE, "--right", steps, code=1)
        self.assertEqual(
            [(f["fault"], f["stage"]) for f in report["findings"]],
            [("rope-adjacent-pairs", "q_post_rope"), ("unknown", "k_post_rope")],
        )
        self.assertIn("stage.0.attn_scores", report["unexamined"])


class InputsBesideTest(ParityTestCase):
    def test_arrays_with_a_map_in_other_layouts_are_read_with_the_inputs_beside_them(self):
        _, values = self.dump(64)
        other = self.folder / "arrays"
        inputs.write_plain(other, seeded(288, 1, 64))
        q = values["stage.0.q_post_rope"].reshape(1, 64, 4, 16).transpose(0, 2, 1, 3)
        np.save(other / "q.npy", q)
        values["stage.0.ffn_out"][0].T.astype("<f4").tofile(other / "ffn.raw")
        entries = {
            "stage.0.q_post_rope": {"file": "q.npy", "layout": "bhtd"},
            "stage.0.ffn_out": {"file": "ffn.raw", "dtype": "float32", "layout": "dt"},
        }
        (other / "dump.json").write_text(json.dumps({"stages": entries}))
        report = self.report(SAMPLE, "--right", other, code=0)
        self.assertEqual((report["verdict"], report["compared"]["stages"]), ("rounding", 2))
        self.assertLen(report["unexamined"], 35)
        for wrong, code in (
            ({"layout": "btxd"}, 2),
            ({"layout": 5}, 2),
            ({"file": "none.npy"}, 3),
            ({"dtype": "int3", "file": "ffn.raw"}, 2),
        ):
            entries["stage.0.q_post_rope"] = {"file": "q.npy", "layout": "bhtd"} | wrong
            (other / "dump.json").write_text(json.dumps({"stages": entries}))
            self.ran(SAMPLE, "--right", other, code=code)

    def test_a_dump_in_an_exported_folder_needs_nothing_else(self):
        dump, _ = self.dump(64)
        (dump / "token_ids.json").unlink()
        self.ran(SAMPLE, "--right", dump, code=3)
        inputs.write_plain(self.folder / "inputs", seeded(288, 1, 64))
        self.assertEqual(
            self.report(SAMPLE, "--right", dump, "--input-ids", self.folder / "inputs", code=0)["notes"], []
        )
        for path in (self.folder / "inputs").glob("input_ids.*"):
            path.rename(dump / path.name)
        self.assertEqual(self.report(SAMPLE, "--right", dump, code=0)["verdict"], "rounding")


class RefusalTest(ParityTestCase):
    """Broken and foreign dumps end with one line and an exit code, or with a finding: never with a traceback."""

    def refused(self, *args, code):
        out, err = self.ran(*args, code=code)
        self.assertEqual(out, "")
        self.assertRegex(err, r"(?m)^(error:|parity.py: error:) ")
        return err

    def test_broken_and_foreign_dumps_are_refused_by_name(self):
        dump, _ = self.dump(64)
        path = dump / "layer-1" / "ffn_up.bin"
        data = path.read_bytes()
        for content, code in (
            (data[:-2], 4),
            (data[:5], 4),
            (b"", 4),
            (b"GGUF" + data[4:], 4),
            (data[:8] + data[:4], 4),
        ):
            path.write_bytes(content)
            self.assertIn("ffn_up.bin", self.refused(SAMPLE, "--right", dump, code=code))
        path.write_bytes(aprt.encode(1, np.ones(64 * 159)))
        self.assertIn("10176", self.refused(SAMPLE, "--right", dump, code=5))
        path.write_bytes(data)
        self.assertIn("elements", self.refused(paths.checkpoint("odd_sizes"), "--right", dump, code=5))
        self.assertIn(
            "stage.embedding", self.refused(SAMPLE, "--right", paths.golden("mha_untied_f32_sharded"), code=5)
        )
        self.refused(SAMPLE, "--right", SAMPLE / "model.safetensors", code=5)
        self.refused(SAMPLE, "--right", SAMPLE / "tokenizer.json", code=4)
        empty = self.folder / "empty"
        empty.mkdir()
        self.assertIn("dump.json", self.refused(SAMPLE, "--right", empty, code=5))
        (dump / "token_ids.json").unlink()
        self.assertIn("--export-inputs", self.refused(SAMPLE, "--right", dump, code=3))

    def test_wrong_usage_says_what_is_right(self):
        dump, _ = self.dump(8)
        other = self.folder / "ids.json"
        for content, code, part in (
            ("[[1, 2, 288]]", 2, "below 288"),
            ("[1, 2]", 2, "list of lists"),
            ("[[1", 4, "ids"),
        ):
            other.write_text(content)
            self.assertIn(part, self.refused(SAMPLE, "--right", "cpu", "--input-ids", other, code=code))
        other.write_text("[[1, 2, 3]]")
        self.assertIn("elements", self.refused(SAMPLE, "--right", dump, "--input-ids", other, code=5))
        self.assertIn("cpu, cuda, hf", self.refused(SAMPLE, "--right", "gpu", code=3))
        self.assertIn("gpu", self.refused("gpu", "--right", "cpu", code=3))
        self.assertIn("--right-dtype", self.refused(SAMPLE, "--right", dump, "--dtype", "bfloat16", code=2))
        self.assertIn("dumps", self.refused(SAMPLE, "--right", "cpu", "--positions", "3", code=2))
        self.assertIn("64-71", self.refused(SAMPLE, "--right", dump, "--positions", "64..71", code=3))
        self.assertIn("--right", self.refused(SAMPLE, code=2))

    def test_values_that_are_not_finite_are_a_finding_and_pass_no_bar(self):
        dump, _ = self.dump(64)
        for path in sorted(dump.rglob("*.bin")):
            layer, found = aprt.decode(path.read_bytes(), str(path))
            path.write_bytes(aprt.encode(layer, np.full_like(found, np.nan)))
        report = self.report(SAMPLE, "--right", dump, code=1)
        self.assertEqual([f["fault"] for f in report["findings"]], ["non-finite"])
        self.assertEqual((report["findings"][0]["stage"], report["compared"]["stages"]), ("embedding", 1))
        self.assertLen(report["unexamined"], 36)
        out, _ = self.ran(SAMPLE, "--right", dump, code=1)
        self.assertRegex(out, r"(?m)^ffn_up +\?  \?$")

    def test_a_golden_file_of_other_weights_is_said(self):
        made = golden.read(paths.golden("gqa_tied_bf16"))
        path = self.folder / "other.safetensors"
        golden.write(path, golden.Golden(made.inputs, made.values, {**made.metadata, "weights_sha256": "0"}))
        self.assertIn("other weights", "\n".join(self.report(SAMPLE, "--right", path, code=0)["notes"]))


if __name__ == "__main__":
    absltest.main()
