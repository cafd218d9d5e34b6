"""The command as an engineer runs it on the dump of another engine."""

import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest

from apr_jax.inputs import seeded
from tests import oracle, paths
from tests.battery.faulty_forward import forward, write_aprt
from tests.battery.parity_battery import REAL_CASE

SAMPLE = paths.checkpoint("gqa_tied_bf16")
FIELDS = {"verdict", "compared", "dtype", "unexamined", "findings", "notes"}


class ParityCommandTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def ran(self, *args, code):
        command = [sys.executable, paths.ROOT / "tools" / "parity.py", *args]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def dump(self, length, faults):
        ids = seeded(288, 1, length).input_ids
        values = forward(*oracle.load(SAMPLE), ids, faults=faults)
        write_aprt(self.folder / "dump", values, ids)
        return self.folder / "dump", values

    def test_the_four_defects_of_the_bug_hunt_are_named_in_one_run(self):
        dump, _ = self.dump(80, REAL_CASE)
        done = self.ran(SAMPLE, "--right", dump, code=1)
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
        report = json.loads(self.ran(SAMPLE, "--right", dump, "--json", code=1).stdout)
        self.assertEqual(set(report), FIELDS)
        self.assertEqual((report["verdict"], report["compared"]["positions"]), ("mistake", 80))
        for finding in report["findings"]:
            self.assertEqual((finding["layers"], finding["certainty"]), ("all", "certain"))
            self.assertLess(finding["residual_after"], 1e-6)
            self.assertGreater(finding["residual_before"], 1e-2)

    def test_a_right_engine_is_rounding_and_its_last_positions_logits_suffice(self):
        dump, _ = self.dump(70, ())
        report = json.loads(self.ran(SAMPLE, "--right", dump, "--json", code=0).stdout)
        self.assertEqual((report["verdict"], report["findings"], report["unexamined"]), ("rounding", [], []))

    def test_one_token_at_position_0_is_warned_of(self):
        dump, _ = self.dump(1, REAL_CASE[3:])
        done = self.ran(SAMPLE, "--right", dump, code=0)
        self.assertIn("RoPE is the identity there", done.stderr)

    def test_arrays_with_a_map_in_other_layouts_are_read(self):
        _, values = self.dump(64, ())
        other = self.folder / "arrays"
        other.mkdir()
        q = values["stage.0.q_post_rope"].reshape(1, 64, 4, 16).transpose(0, 2, 1, 3)
        np.save(other / "q.npy", q)
        values["stage.0.ffn_out"][0].T.astype("<f4").tofile(other / "ffn.raw")
        entries = {
            "stage.0.q_post_rope": {"file": "q.npy", "layout": "bhtd"},
            "stage.0.ffn_out": {"file": "ffn.raw", "dtype": "float32", "layout": "dt"},
        }
        content = {"input_ids": seeded(288, 1, 64).input_ids.tolist(), "stages": entries}
        (other / "dump.json").write_text(json.dumps(content))
        report = json.loads(self.ran(SAMPLE, "--right", other, "--json", code=0).stdout)
        self.assertEqual((report["verdict"], report["compared"]["stages"]), ("rounding", 2))
        self.assertLen(report["unexamined"], 35)
        for wrong, code in (
            ({"layout": "btxd"}, 2),
            ({"file": "none.npy"}, 3),
            ({"dtype": "int3", "file": "ffn.raw"}, 2),
        ):
            entries["stage.0.q_post_rope"] = {"file": "q.npy", "layout": "bhtd"} | wrong
            (other / "dump.json").write_text(json.dumps(content))
            self.ran(SAMPLE, "--right", other, code=code)

    def test_the_upload_is_read_back(self):
        done = self.ran(SAMPLE, "--right", "cpu", "--check-upload", code=0)
        self.assertIn("26 of 26 parameters read back bit for bit", done.stderr)


if __name__ == "__main__":
    absltest.main()
