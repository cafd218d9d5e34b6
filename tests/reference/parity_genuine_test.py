"""What `parity` says of dumps of the genuine `apr`, and what `apr diff` says of ours.

The recorded dumps come from $APR_FIXTURES or shared/fixtures beside the checkout, the live ones from $APR_BIN.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.commands import parity
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.load.load_model import load_model
from apr_jax.trace import aprt, stages
from apr_jax.trace.inputs import seeded
from tests import paths

APR = os.environ.get("APR_BIN")
FIXTURES = paths.fixtures()
NO_FIXTURES = "no genuine files: $APR_FIXTURES and shared/fixtures beside the checkout are absent"


def recorded(kind: str) -> list[str]:
    """Names of the genuine checkpoints with a dump of this kind."""
    return [path.parents[1].name for path in sorted(FIXTURES.glob(f"genuine/*/traces/{kind}"))] if FIXTURES else []


def examined(model, dump, *more) -> dict:
    """Runs the command with --json; returns its report, with the exit code as "code"."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = parity.main(parity.parse(["parity", str(model), "--right", str(dump), "--json", *map(str, more)]))
    return json.loads(printed.getvalue()) | {"code": code}


class GenuineTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def file_of(self, name, kind):
        """The .apr that a dump came from; made anew where the fixtures hold only the dump."""
        path = FIXTURES / "genuine" / name / "apr" / f"{kind}.apr"
        if path.exists():
            return path
        made = self.folder / f"{kind}.apr"
        rules = [CastRule.parse({"fp16": "f16"}[kind])]
        convert(path.parents[1] / "hf", made, to="apr", cast=rules, tied_head="copy")
        return made

    def assert_clean(self, report):
        self.assertEqual((report["code"], report["findings"]), (0, []), report)
        self.assertIn(report["verdict"], ("rounding", "equal"))
        self.assertEqual(report["unexamined"], [])
        self.assertEqual(report["compared"]["positions"], 12)
        self.assertIn("only 12 positions: mistakes that need more of them are not seen", report["notes"])

    def assert_quantised(self, report, codec):
        """Every finding is the codec's, in all layers; beside Q4_K also what `apr` does to activations."""
        self.assertEqual((report["code"], report["verdict"]), (1, "mistake"))
        names = {finding["fault"] for finding in report["findings"]}
        expected = {"weights-quantised"} | ({"activations-quantised"} if codec == "q4_k" else set())
        self.assertEqual(names, expected, report)
        (finding,) = (finding for finding in report["findings"] if finding["fault"] == "weights-quantised")
        self.assertEqual((finding["parameters"]["codec"], finding["certainty"]), (codec, "certain"))
        self.assertLess(finding["residual_after"], 1e-6)
        self.assertGreater(finding["residual_before"], 1e-4)
        # Embedding, q, k, v, o, gate, up, down: the head is the embedding. fp16 rounds norms and biases as well.
        self.assertLen(finding["parameters"]["tensor"], {"q4_k": 8, "fp16": 14}[codec])
        print(f"{codec}: off by {finding['residual_before']:.1e}, by {finding['residual_after']:.0e} from these")


@absltest.skipUnless(FIXTURES, NO_FIXTURES)
class RecordedDumpsTest(GenuineTestCase):
    @parameterized.parameters(*paths.cases(recorded("plain")))
    def test_plain_dumps_are_clean_but_for_the_missing_head(self, name):
        report = examined(self.file_of(name, "plain"), FIXTURES / "genuine" / name / "traces" / "plain")
        # `apr` takes its own 0-byte placeholder of a tied 16-bit head for the weight (shared format notes, 9.1).
        if name not in ("tiny_bf16_tied", "k256_bf16_tied"):
            self.assert_clean(report)
            return
        (finding,) = report["findings"]
        self.assertEqual((report["code"], finding["fault"], finding["stage"]), (1, "head-missing", "logits"))
        self.assertEqual((finding["layers"], finding["certainty"], finding["residual_after"]), ([], "certain", 0))

    @parameterized.parameters(*paths.cases(recorded("q4k")))
    def test_q4k_dumps_are_clean_against_their_file_and_quantised_against_its_source(self, name):
        dump = FIXTURES / "genuine" / name / "traces" / "q4k"
        report = examined(self.file_of(name, "q4k"), dump)
        self.assert_clean(report)
        self.assertRegex("\n".join(report["notes"]), "no mistake beside quantised weights: .*q8_k")
        self.assert_quantised(examined(FIXTURES / "genuine" / name / "hf", dump), "q4_k")

    @parameterized.parameters(*paths.cases(recorded("fp16")))
    def test_fp16_dumps_are_clean_against_their_file(self, name):
        self.assert_clean(examined(self.file_of(name, "fp16"), FIXTURES / "genuine" / name / "traces" / "fp16"))

    def test_the_fp16_dump_of_a_float32_checkpoint_is_quantised_against_it(self):
        folder = FIXTURES / "genuine" / "tiny_f32_tied"
        self.assert_quantised(examined(folder / "hf", folder / "traces" / "fp16"), "fp16")


@absltest.skipUnless(FIXTURES and APR, f"{NO_FIXTURES}, or APR_BIN does not name the genuine apr")
class LiveDumpsTest(GenuineTestCase):
    def test_an_fp16_dump_made_now_is_clean_against_its_file_and_quantised_against_its_source(self):
        source = FIXTURES / "genuine" / "tiny_f32_tied" / "hf"
        model, dump = self.folder / "model.apr", self.folder / "dump"
        subprocess.run([APR, "import", source, "-o", model, "--quantize", "fp16"], check=True, capture_output=True)
        command = [APR, "trace", "--payload", model, "--save-tensor", "all", "--save-tensor-layers", "0..2"]
        done = subprocess.run([*command, "--save-tensor-dir", dump], check=True, capture_output=True, text=True)
        ids = self.folder / "ids.json"
        ids.write_text("[" + re.search(r"Token ids: *(\[.*?\])", done.stdout)[1] + "]")
        self.assert_clean(examined(model, dump, "--input-ids", ids))
        self.assert_quantised(examined(source, dump, "--input-ids", ids), "fp16")


@absltest.skipUnless(APR, "APR_BIN does not name the genuine apr")
class AprDiffTest(parameterized.TestCase):
    """`apr diff --values` as a reader of the files that `aprt.write` makes."""

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        self.model = load_model(paths.checkpoint("gqa_tied_bf16"), "float32", "cpu")
        batch = seeded(self.model.config.vocab_size, 1, 6)
        self.trace = self.model.trace(batch)
        self.dumps = [self.folder / name for name in ("one", "other")]
        for dump in self.dumps:
            aprt.write(dump, batch, self.trace)

    def differences(self, name, code=0):
        files = [dump / name for dump in self.dumps]
        done = subprocess.run(
            [APR, "diff", "--values", "--json", "--limit", "1", *files], capture_output=True, text=True, check=False
        )
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return json.loads(done.stdout) if code == 0 else done.stderr

    def test_apr_reads_every_stage_of_two_equal_dumps_as_equal(self):
        for key in stages.trace_keys(2):
            found = self.differences(aprt.path_of(key))
            outer = key.count(".") < 2 and key != stages.EMBEDDING
            layer = "whole-model" if outer else 0 if key == stages.EMBEDDING else int(key.split(".")[1])
            self.assertEqual((found["schema"], found["layer"]), ("apr-stage-diff-v1", layer), key)
            values = self.trace[key][:, -1] if key == stages.LOGITS else self.trace[key]
            self.assertEqual((found["dim_product"], found["max_abs_diff"]), (values.size, 0.0), key)
            self.assertAlmostEqual(found["cosine_sim"], 1.0, 6, key)
            # The first element of the first file as `apr` read it: the body begins where it should.
            self.assertEqual(np.float32(found["top_diffs"][0]["a"]), values.flat[0], key)

    def test_apr_finds_the_one_value_that_was_changed(self):
        name = "layer-1/ffn_up.bin"
        layer, values = aprt.decode((self.dumps[1] / name).read_bytes(), name)
        changed = values.copy()
        changed[77] += 0.25
        (self.dumps[1] / name).write_bytes(aprt.encode(layer, changed))
        found = self.differences(name)
        self.assertEqual((found["max_abs_diff_index"], found["top_diffs"][0]["index"]), (77, 77))
        self.assertAlmostEqual(found["max_abs_diff"], 0.25, 5)

    def test_apr_refuses_what_our_reader_refuses(self):
        data = (self.dumps[1] / "final_norm.bin").read_bytes()
        for content in (data[:-4], aprt.encode(1, np.frombuffer(data[12:], "<f4")), aprt.encode(2**32 - 1, np.ones(3))):
            (self.dumps[1] / "final_norm.bin").write_bytes(content)
            self.differences("final_norm.bin", code=5)


if __name__ == "__main__":
    absltest.main()
