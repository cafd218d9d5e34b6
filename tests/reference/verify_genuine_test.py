"""What the genuine `apr` does wrong is found by `verify`, each thing in one line; and nothing where it is right.

Needs the genuine files ($APR_FIXTURES, or shared/fixtures beside the checkout); the exports also the genuine `apr`
($APR_BIN).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from tests.paths import ROOT, cases, fixtures

APR = os.environ.get("APR_BIN")
FIXTURES = fixtures()
GENUINE = FIXTURES / "genuine" if FIXTURES else pathlib.Path()
NAMES = sorted(path.name for path in GENUINE.iterdir()) if FIXTURES else []
QUANTISED = {"int8": "apr_q8", "int4": "apr_q4", "q4k": "q4_k"}
TIED = "tie_word_embeddings"


class VerifyGenuineTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if FIXTURES is None:
            self.skipTest("there are no fixtures: APR_FIXTURES names none, and there is no shared/fixtures")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def verify(self, *paths: pathlib.Path, code: int) -> tuple[dict, list[str]]:
        """Returns the JSON object and the lines of the text."""
        command = [sys.executable, ROOT / "tools" / "verify.py", *paths]
        shown = [subprocess.run([*command, *more], capture_output=True, text=True) for more in (["--json"], [])]
        for done in shown:
            self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return json.loads(shown[0].stdout), shown[1].stdout.splitlines()

    def line(self, lines: list[str], *words: str) -> str:
        """Returns the one line that holds all words."""
        found = [line for line in lines if all(word in line for word in words)]
        self.assertLen(found, 1, "\n".join(lines))
        return found[0]


class ImportsTest(VerifyGenuineTestCase):
    @parameterized.parameters(*cases(NAMES))
    def test_plain_imports_are_identical(self, name):
        found, _ = self.verify(GENUINE / name / "hf", GENUINE / name / "apr" / "plain.apr", code=0)
        self.assertEqual((found["verdict"], found["findings"]), ("identical", []))
        self.assertEqual((found["only_in_a"], found["only_in_b"]), ([], []))
        differences = [difference["attribute"] for difference in found["metadata_differences"]]
        self.assertEqual(differences, [TIED] if name == "tiny_f16_untied" else [])
        self.assertGreater(found["compared"]["tensors"], 12)

    @parameterized.parameters("tiny_bf16_tied", "k256_bf16_tied")
    def test_the_placeholder_head_of_a_tied_bf16_import_is_named_in_one_line(self, name):
        path = GENUINE / name / "apr" / "plain.apr"
        found, lines = self.verify(GENUINE / name / "hf", path, code=0)
        self.line(lines, "B lists lm_head.weight without data", "all-zero logits")
        self.assertLen(found["notes"], 1)
        found, lines = self.verify(path, code=1)
        self.assertEqual([check["name"] for check in found["checks"] if check["passed"] is False], ["placeholder-head"])
        self.line(lines, "failure", "lm_head.weight", "0 bytes")

    def test_the_falsely_tied_f16_import_is_named_in_one_line(self):
        path = GENUINE / "tiny_f16_untied" / "apr" / "plain.apr"
        found, lines = self.verify(GENUINE / "tiny_f16_untied" / "hf", path, code=0)
        self.line(lines, "B says that its head is tied", "lm_head.weight has values of its own")
        (difference,) = found["metadata_differences"]
        self.assertEqual((difference["attribute"], difference["a"], difference["b"]), (TIED, False, True))
        found, lines = self.verify(path, code=1)
        self.assertEqual([check["name"] for check in found["checks"] if check["passed"] is False], ["falsely-tied"])
        self.line(lines, "failure", "values of its own")

    @parameterized.parameters("tiny_f32_tied", "tiny_bf16_tied_sharded", "tiny_mixed_untied_sharded")
    def test_nothing_is_named_where_nothing_is_wrong(self, name):
        found, _ = self.verify(GENUINE / name / "apr" / "plain.apr", code=0)
        self.assertEqual(found["verdict"], "passed")

    def test_quantised_imports_are_found_to_be_that_and_nothing_else(self):
        files = sorted(path for path in GENUINE.glob("*/apr/*.apr") if path.stem in QUANTISED)
        self.assertGreaterEqual(len(files), 4)
        for path in files:
            found, lines = self.verify(path.parents[1] / "hf", path, code=1)
            self.assertEqual(found["verdict"], "different")
            kinds = [(finding["cause"], finding["parameters"]) for finding in found["findings"]]
            self.assertEqual(kinds[0], ("quantised", {"type": QUANTISED[path.stem]}), path)
            self.assertLessEqual({cause for cause, _ in kinds}, {"quantised", "exact-cast"})
            self.line(lines, f"quantised to {QUANTISED[path.stem]}")

    def test_half_precision_imports_are_found_to_be_rounded(self):
        files = sorted(GENUINE.glob("*/apr/fp16.apr"))
        self.assertNotEmpty(files)
        for path in files:
            found, _ = self.verify(path.parents[1] / "hf", path, code=1)
            causes = {finding["cause"] for finding in found["findings"]}
            self.assertIn("rounded-cast", causes)
            self.assertLessEqual(causes, {"rounded-cast", "exact-cast"}, path)


@absltest.skipUnless(APR, "APR_BIN does not name the genuine apr")
class ExportsTest(VerifyGenuineTestCase):
    def export(self, name: str, kind: str) -> tuple[pathlib.Path, pathlib.Path]:
        """Returns the .apr and the folder that `apr export` makes of it."""
        source, out = GENUINE / name / "apr" / f"{kind}.apr", self.folder / "out"
        out.mkdir()
        command = [APR, "export", source, "--format", "safetensors", "-o", out / "model.safetensors"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return source, out

    def test_the_lost_head_and_the_invented_configuration_of_an_untied_f16_export(self):
        for original in (None, GENUINE / "tiny_f16_untied" / "hf"):
            with tempfile.TemporaryDirectory() as folder:
                self.folder = pathlib.Path(folder)
                source, out = self.export("tiny_f16_untied", "plain")
                found, lines = self.verify(original or source, out, code=1)
            self.assertEqual((found["verdict"], found["only_in_a"]), ("different", ["lm_head.weight"]))
            self.assertEqual([finding["cause"] for finding in found["findings"]], ["exact-cast"])
            self.line(lines, "lm_head.weight of A has values of its own, and B has no head")
            self.line(lines, "configurations disagree", "num_heads 8 in A, 1 in B", "rope_theta 10000.0 in A")

    def test_row_padded_q4k_that_is_decoded_flat(self):
        source, out = self.export("tiny_bf16_tied", "q4k")
        found, lines = self.verify(source, out, code=1)
        (wrong,) = (finding for finding in found["findings"] if finding["cause"] != "exact-cast")
        self.assertEqual((wrong["cause"], wrong["explained"], len(wrong["tensors"])), ("shifted", 1.0, 15))
        self.line(lines, "15 tensors: rows padded with zeros", "Q4_K", "read as if they were not padded")
        # Against the folder that was imported the same is seen through the quantisation.
        found, lines = self.verify(GENUINE / "tiny_bf16_tied" / "hf", out, code=1)
        (wrong,) = (finding for finding in found["findings"] if finding["cause"] != "exact-cast")
        self.assertEqual(
            (wrong["cause"], wrong["parameters"]["type"], len(wrong["tensors"])), ("quantised", "q4_k", 15)
        )
        self.line(lines, "quantised to q4_k", "pad each row")

    def test_an_export_that_is_right_is_equal_in_value(self):
        source, out = self.export("k256_bf16_tied", "q4k")
        found, _ = self.verify(source, out, code=0)
        self.assertEqual(found["verdict"], "equal-values")
        self.assertEqual({finding["cause"] for finding in found["findings"]}, {"exact-cast"})


if __name__ == "__main__":
    absltest.main()
