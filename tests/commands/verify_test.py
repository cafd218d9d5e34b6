"""The command line of `verify`: verdicts, exit codes, JSON, words; and the story of the bf16 file tagged f16."""

import json
import os
import pathlib
import pty
import struct
import subprocess
import sys
import tempfile
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.formats import dtypes
from tests import tool
from tests.paths import DATA, ROOT, checkpoint
from tests.start_up import cpu_seconds

TOOL = ROOT / "tools" / "verify.py"
# checks.md: values of the HuggingFace file and of the .apr that the report held beside them.
REPORTED = ((7.5625, 8.0, 7.21875, 7.3125, 7.46875, 7.375), (7.0625, 7.125, 7.0, 7.0625, 6.75, 6.875))


class VerifyTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def verify(self, *arguments: object, code: int) -> subprocess.CompletedProcess[str]:
        return tool.ran(self, "verify", *arguments, code=code)

    def verify_json(self, *arguments: object, code: int) -> dict:
        return json.loads(self.verify(*arguments, "--json", code=code).stdout)

    def convert(self, source: pathlib.Path, **arguments) -> pathlib.Path:
        path = self.folder / "m.apr"
        convert(source, path, to="apr", force=True, **arguments)
        return path


def tag_as(path: pathlib.Path, source: str, target: str) -> int:
    """Changes dtype ids in an `.apr` and makes both checksums right again, as a faulty writer would; how many."""
    ids = [dtypes.by_name(name).apr_id for name in (source, target)]
    data = bytearray(path.read_bytes())
    (count,) = struct.unpack_from("<I", data, 8)
    (at,) = struct.unpack_from("<Q", data, 24)
    changed = 0
    for _ in range(count):
        at += 2 + struct.unpack_from("<H", data, at)[0]
        if data[at] == ids[0]:
            data[at] = ids[1]
            changed += 1
        at += 2 + 8 * (data[at + 1] + 2)
    data[40:44] = struct.pack("<I", zlib.crc32(data[:40] + data[44:64]))
    data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
    path.write_bytes(data)
    return changed


class StoryTest(VerifyTestCase):
    """What the original report asked: is the .apr the published model, and if not, what happened to it?"""

    def test_a_bf16_payload_tagged_f16_is_said_in_one_line_and_repaired(self):
        source = checkpoint("gqa_tied_bf16")
        path = self.convert(source)
        self.assertEqual(tag_as(path, "bf16", "f16"), 26)
        lines = self.verify(source, path, code=1).stdout.splitlines()
        self.assertTrue(lines[0].startswith("different: 26 tensors compared"), lines[0])
        self.assertEqual(
            lines[1], "- 26 tensors: bf16 bytes tagged f16: the bytes are the original's, the dtype is wrong"
        )
        self.assertEqual([line for line in lines if line.startswith("- ")], lines[1:2])
        found = self.verify_json(source, path, code=1)
        (finding,) = found["findings"]
        self.assertEqual((finding["cause"], len(finding["tensors"])), ("relabelled-dtype", 26))
        self.assertEqual((finding["parameters"]["from"], finding["parameters"]["to"]), ("bf16", "f16"))
        self.assertEqual((finding["explained"], finding["alternatives"]), (1.0, []))

        repair = [sys.executable, ROOT / "tools" / "convert.py", "--to", "apr", source, "-o", path, "--force"]
        subprocess.run(repair, check=True, capture_output=True)
        self.assertTrue(self.verify(source, path, code=0).stdout.startswith("identical: 26 tensors"))

    def test_the_relabelled_file_gives_itself_away_without_the_original(self):
        path = self.convert(checkpoint("gqa_tied_bf16"))
        self.verify(path, code=0)
        tag_as(path, "bf16", "f16")
        found = self.verify_json(path, code=1)
        failed = {check["name"] for check in found["checks"] if check["passed"] is False}
        self.assertEqual(found["verdict"], "failed")
        self.assertIn("relabelled", failed)

    @parameterized.product(types=(("bf16", "bf16"), ("bf16", "f16"), ("bf16", "f32"), ("f32", "f16")), among=(0, 890))
    def test_the_six_reported_pairs_are_different_weights_and_no_relabel_or_cast(self, types, among):
        numpy = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
        rest = np.random.default_rng(0).normal(7.46, 0.84, (2, among))
        paths = []
        for side, dtype, values, others in zip("ab", types, REPORTED, rest, strict=True):
            path = self.folder / f"{side}.safetensors"
            array = np.concatenate([np.array(values), others]).astype(ml_dtypes.bfloat16).astype(numpy[dtype])
            safetensors.numpy.save_file({"model.norm.weight": array}, path)
            paths.append(path)
        found = self.verify_json(*paths, code=1)
        self.assertEqual(found["verdict"], "different")
        self.assertEqual([finding["cause"] for finding in found["findings"]], ["different-weights"])
        self.assertEqual(found["findings"][0]["alternatives"], [])


class CompareTest(VerifyTestCase):
    def test_identical_files_end_with_zero_and_one_line_for_all_tensors(self):
        source = checkpoint("gqa_untied_bf16")
        done = self.verify(source, self.convert(source), code=0)
        self.assertRegex(done.stdout.splitlines()[0], r"^identical: 27 tensors compared, \d+ elements, \d+ bytes; none")
        self.assertEqual(done.stdout.splitlines()[1:], ["27 tensors: equal byte for byte"])
        self.assertEqual(done.stderr, "")

    def test_an_exact_cast_is_equal_and_a_rounding_one_is_close(self):
        source = checkpoint("gqa_tied_bf16")
        wide = self.convert(source, cast=[CastRule.parse("f32")])
        found = self.verify_json(source, wide, code=0)
        self.assertEqual(
            (found["verdict"], [finding["cause"] for finding in found["findings"]]), ("equal-values", ["exact-cast"])
        )
        text = self.verify(source, wide, code=0).stdout
        self.assertIn("26 tensors: cast from bf16 to f32, every value exactly: no difference", text)
        self.assertIn("26 tensors: equal in value", text)
        self.assertNotIn("relative L2", text)
        source = checkpoint("mha_untied_f32_sharded")
        found = self.verify_json(source, self.convert(source, cast=[CastRule.parse("f16")]), code=1)
        self.assertEqual(
            (found["verdict"], [finding["cause"] for finding in found["findings"]]), ("close", ["rounded-cast"])
        )

    def test_the_table_has_the_worst_first_and_no_equal_tensors(self):
        source = checkpoint("gqa_tied_bf16")
        path = self.convert(source)
        changed = self.folder / "hf"
        convert(path, changed, to="safetensors")
        weights = safetensors.numpy.load_file(changed / "model.safetensors")
        names = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
        for name, factor in zip(names, (2, 4), strict=True):
            weights[name] = (weights[name].astype(np.float32) * factor).astype(ml_dtypes.bfloat16)
        safetensors.numpy.save_file(weights, changed / "model.safetensors")
        lines = self.verify(source, changed, code=1).stdout.splitlines()
        self.assertIn("multiplied by 4", lines[1])
        self.assertIn("multiplied by 2", lines[2])
        (header,) = [number for number, line in enumerate(lines) if line.startswith("tensor ")]
        self.assertEqual([line.split()[0] for line in lines[header + 1 : header + 3]], list(reversed(names)))
        self.assertEqual(lines[header + 3 :], ["24 tensors: equal byte for byte"])

    def test_what_has_another_shape_has_no_figures(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, shape in (("a", (2, 3)), ("b", (3, 2))):
                safetensors.numpy.save_file({"x": np.ones(shape, "f4")}, f"{folder}/{name}.safetensors")
            done = tool.ran(self, "verify", f"{folder}/a.safetensors", f"{folder}/b.safetensors", code=1)
        self.assertRegex(done.stdout, r"(?m)^x +f32 +2x3 -> 3x2 +\S+ *$")

    def test_nothing_in_common_fails_with_a_hint(self):
        lines = self.verify(checkpoint("mqa_f16"), DATA / "apr" / "golden_v2.apr", code=1).stdout.splitlines()
        self.assertTrue(lines[0].startswith("different: nothing was compared"), lines[0])
        self.assertTrue(any("Map the names" in line for line in lines))

    def test_configurations_that_disagree_are_told_in_one_line(self):
        source = checkpoint("gqa_tied_bf16")
        other = self.folder / "hf"
        convert(self.convert(source), other, to="safetensors")
        config = json.loads((other / "config.json").read_text())
        config.pop("rope_parameters", None)
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}))
        lines = self.verify(source, other, code=1).stdout.splitlines()
        self.assertStartsWith(lines[0], "different: 26 tensors")
        self.assertEndsWith(lines[0], "none differ; the weights are identical, but not configuration")
        self.assertRegex(lines[1], "rope_theta 1000000.0 in A, 10000.0 in B, rms_norm_eps 1e-06 in A, 1e-05 in B")

    @parameterized.parameters(("nowhere", 3), ("broken.apr", 4))
    def test_errors_have_their_own_exit_codes(self, name, code):
        (self.folder / "broken.apr").write_bytes(b"APR\0" + bytes(100))
        done = self.verify(checkpoint("mqa_f16"), self.folder / name, code=code)
        self.assertIn("error: ", done.stderr)
        self.assertEqual(done.stdout, "")
        self.verify(self.folder / name, code=code)


class AloneTest(VerifyTestCase):
    def test_an_adapter_belongs_to_a_comparison(self):
        done = self.verify(checkpoint("gqa_tied_bf16"), "--adapter", DATA / "adapters" / "lora", code=2)
        self.assertIn("--adapter belongs to a comparison", done.stderr)

    def test_a_sound_file_passes_and_says_what_was_checked(self):
        path = self.convert(checkpoint("gqa_tied_bf16"))
        lines = self.verify(path, code=0).stdout.splitlines()
        self.assertRegex(lines[0], r"^passed: \d+ checks passed$")
        self.assertTrue(any("footer-checksum" in line for line in lines))

    def test_a_failed_check_comes_first_and_ends_with_one(self):
        path = self.convert(checkpoint("gqa_tied_bf16"))
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        lines = self.verify(path, code=1).stdout.splitlines()
        self.assertTrue(lines[0].startswith("failed: "), lines[0])
        self.assertTrue(lines[1].startswith("failure"), lines[1])
        found = self.verify_json(path, code=1)
        self.assertIn("footer-checksum", [check["name"] for check in found["checks"] if check["passed"] is False])


class TerminalTest(VerifyTestCase):
    def in_terminal(self, *arguments: object, code: int) -> str:
        """Returns what the command writes to a terminal, stderr included."""
        main, side = pty.openpty()
        command = [sys.executable, TOOL, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=side, stderr=side, stdin=side, env=os.environ | {"COLUMNS": "160"})
        os.close(side)
        shown = b""
        try:
            while part := os.read(main, 1 << 16):
                shown += part
        except OSError:
            # Linux says so when the other end is closed.
            pass
        os.close(main)
        self.assertEqual(process.wait(), code, shown)
        self.assertNotIn(b"Traceback", shown)
        return shown.decode()

    def test_colours_and_progress_are_for_terminals_only(self):
        source = checkpoint("gqa_tied_bf16")
        path = self.convert(source)
        tag_as(path, "bf16", "f16")
        shown = self.in_terminal(source, path, code=1)
        self.assertIn("\x1b[1;31mdifferent\x1b[0m", shown)
        self.assertIn("bytes", shown)
        piped = self.verify(source, path, code=1)
        self.assertNotIn("\x1b", piped.stdout)
        self.assertEqual(piped.stderr, "")


class StartTest(VerifyTestCase):
    def test_help_answers_at_once_without_heavy_modules(self):
        self.assertLess(cpu_seconds([sys.executable, TOOL, "--help"]), 0.3)
        done = self.verify("--help", code=0)
        for word in ("identical", "equal-values", "--json", "--lenient", "--legacy"):
            self.assertIn(word, done.stdout)

    def test_equal_files_are_compared_without_numpy(self):
        source = checkpoint("gqa_tied_bf16")
        code = (
            "import sys; from apr_jax.converters.commands import verify\n"
            f"code = verify.main(verify.parse(['verify', {str(source)!r}, {str(self.convert(source))!r}]))\n"
            "print(code, sorted({'numpy', 'rich', 'jax', 'ml_dtypes'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.splitlines()[-1], "0 []")


if __name__ == "__main__":
    absltest.main()
