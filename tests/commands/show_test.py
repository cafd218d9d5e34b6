"""The command line of `show`."""

import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from converters import apr_format, dtypes
from tests.paths import DATA, NAMES, ROOT, checkpoint

TOOL = ROOT / "tools" / "show.py"


class ShowTest(parameterized.TestCase):
    def run_tool(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done

    @parameterized.parameters(*NAMES)
    def test_lists_every_tensor_and_side_file(self, name):
        found = json.loads(self.run_tool(checkpoint(name), "--json").stdout)
        files = {
            file.name: file.stat().st_size for file in checkpoint(name).iterdir() if "safetensors" not in file.name
        }
        self.assertEqual(found["side_files"], files)
        self.assertLen(found["tensors"], found["totals"]["tensors"])
        self.assertGreater(found["totals"]["tensors"], 20)
        text = self.run_tool(checkpoint(name)).stdout
        for tensor in found["tensors"]:
            self.assertIn(tensor["name"], text)
        for file in files:
            self.assertIn(file, text)
        self.assertNotIn("\x1b", text)

    @parameterized.parameters("tiny_bf16_tied-int4.apr", "tiny_f32_tied-int8.apr", "golden_v2.apr")
    def test_header_and_quantised_tensors_of_a_genuine_apr(self, name):
        path = DATA / "apr" / name
        found = json.loads(self.run_tool(path, "--json").stdout)
        self.assertEqual(found["header"]["file_bytes"], path.stat().st_size)
        self.assertEqual(found["header"]["flag_names"], ["LAYOUT_ROW_MAJOR"])
        self.assertEqual(found["header"]["tensor_count"], len(found["tensors"]) + len(found["placeholders"]))
        text = self.run_tool(path).stdout
        self.assertIn("LAYOUT_ROW_MAJOR", text)
        self.assertTrue(all(len(line) < 250 for line in text.splitlines()))
        if "int" in name:
            self.assertIn("apr_q", text)
            self.assertIn("items:", text)

    def test_a_glob_selects_and_one_that_matches_nothing_is_an_error(self):
        text = self.run_tool(checkpoint("gqa_tied_bf16"), "--tensors", "*norm*").stdout
        self.assertIn("5 tensors", text)
        self.assertNotIn("q_proj", text)
        self.run_tool(checkpoint("gqa_tied_bf16"), "--tensors", "nothing", code=2)

    def test_text_from_the_file_cannot_steer_the_terminal(self):
        metadata = {"name": "\x1b[2Jevil\u202e", "\x1b]0;key": 1}
        entries = apr_format.lay_out([("a", dtypes.by_name("f32"), (1,), 4)])
        data = apr_format.serialise_prologue(metadata, entries) + bytes(64)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "x.apr"
            path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))
            text = self.run_tool(path).stdout
        self.assertNotIn("\x1b", text)
        self.assertNotIn("\u202e", text)
        self.assertIn("\\x1b[2Jevil\\u202e", text)

    def test_a_file_of_another_kind_is_named_and_exit_4(self):
        done = self.run_tool(DATA / "apr" / "golden_v1.apr", code=4)
        self.assertIn("APRN", done.stderr)

    def test_help_takes_less_than_300_ms_and_imports_nothing_heavy(self):
        best = 9.0
        for _ in range(5):
            begin = time.perf_counter()
            self.run_tool("--help")
            best = min(best, time.perf_counter() - begin)
        self.assertLess(best, 0.3)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", TOOL, "--help"], capture_output=True, text=True, check=True
        )
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        self.assertEqual(imported & {"jax", "jaxlib", "flax", "numpy", "rich", "ml_dtypes", "torch"}, set())


if __name__ == "__main__":
    absltest.main()
