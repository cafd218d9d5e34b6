"""The command line of `convert`: what it prints, what it ends with, what it costs to start."""

import json
import os
import pathlib
import pty
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from tests.paths import ROOT, checkpoint

TOOL = ROOT / "tools" / "convert.py"
SOURCE = checkpoint("gqa_tied_bf16")


class ConvertTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_tool(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, TOOL, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True
        )
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def test_runs_from_any_folder_and_says_what_it_wrote(self):
        done = self.run_tool("--to", "apr", SOURCE, "-o", "m.apr")
        self.assertIn("wrote m.apr: 26 tensors (0 cast), 6 side files", done.stdout)
        self.assertEqual(done.stderr, "")
        self.assertEqual(os.listdir(self.folder), ["m.apr"])

    def test_existing_output_is_exit_2_and_untouched(self):
        (self.folder / "m.apr").write_bytes(b"mine")
        done = self.run_tool(SOURCE, "-o", "m.apr", "--to", "apr", code=2)
        self.assertIn("--force", done.stderr)
        self.assertEqual((self.folder / "m.apr").read_bytes(), b"mine")
        self.run_tool(SOURCE, "-o", "m.apr", "--to", "apr", "--force")
        self.assertGreater((self.folder / "m.apr").stat().st_size, 1000)

    @parameterized.parameters(
        ((), 2),
        (("nowhere", "-o", "x", "--to", "apr"), 3),
        (("broken.apr", "-o", "x", "--to", "safetensors"), 4),
        ((SOURCE, "-o", "x", "--to", "apr", "--cast", "q8"), 5),
        ((SOURCE, "-o", "x", "--to", "apr", "--cast", "float"), 2),
        ((SOURCE, "-o", "x", "--to", "apr", "--cast", "none*=f32"), 2),
        ((SOURCE, "-o", "x", "--to", "apr", "--max-shard-size", "1GB"), 2),
        ((SOURCE, "-o", "x", "--to", "safetensors", "--max-shard-size", "much"), 2),
        ((SOURCE, "-o", "no/x", "--to", "apr"), 3),
        ((SOURCE, "-o", SOURCE, "--to", "safetensors", "--force"), 2),
    )
    def test_exit_codes(self, arguments, code):
        (self.folder / "broken.apr").write_bytes(b"APR\0" + bytes(100))
        done = self.run_tool(*arguments, code=code)
        self.assertNotEqual(done.stderr, "")
        self.assertEqual(os.listdir(self.folder), ["broken.apr"])

    def test_dry_run_prints_the_plan_and_writes_nothing(self):
        done = self.run_tool(
            SOURCE, "-o", "m.apr", "--to", "apr", "--dry-run", "--cast", "*norm*=f32", "--tied-head", "copy"
        )
        self.assertIn("lm_head.weight", done.stdout)
        self.assertRegex(done.stdout, r"model\.norm\.weight +bf16 -> f32 +64 +256 +m\.apr +\d+")
        self.assertIn("nothing written", done.stdout)
        self.assertEqual(os.listdir(self.folder), [])

    def test_json_of_dry_run_and_run_agree(self):
        arguments = (SOURCE, "-o", "hf", "--to", "safetensors", "--max-shard-size", "100KB", "--json")
        planned = json.loads(self.run_tool(*arguments, "--dry-run").stdout)
        done = json.loads(self.run_tool(*arguments).stdout)
        self.assertEqual(done["plan"], planned["plan"])
        self.assertLen(done["plan"]["files"], 3)
        written = sum(file.stat().st_size for file in (self.folder / "hf").iterdir())
        self.assertEqual(done["plan"]["bytes_written"], written)
        self.assertGreater(done["outcome"]["seconds"], 0)

    def test_dry_run_tells_that_the_output_exists(self):
        (self.folder / "m.apr").write_bytes(b"mine")
        self.run_tool(SOURCE, "-o", "m.apr", "--to", "apr", "--dry-run", code=2)

    def test_errors_as_json_carry_their_fields(self):
        done = self.run_tool("nowhere", "-o", "x", "--to", "apr", "--json", code=3)
        self.assertEqual(json.loads(done.stdout)["error"]["file"], "nowhere")

    def test_a_terminal_gets_a_progress_bar_on_stderr_and_stdout_stays_plain(self):
        controller, terminal = pty.openpty()
        done = subprocess.run(
            [sys.executable, TOOL, SOURCE, "-o", "m.apr", "--to", "apr"],
            cwd=self.folder, stdout=subprocess.PIPE, stderr=terminal, env=os.environ | {"TERM": "xterm"}, check=True,
        )  # fmt: skip
        os.close(terminal)
        shown = os.read(controller, 1 << 16)
        os.close(controller)
        self.assertIn(b"\x1b[", shown)
        self.assertNotIn(b"\x1b", done.stdout)

    def test_help_takes_less_than_300_ms_and_imports_nothing_heavy(self):
        best = 9.0
        for _ in range(5):
            begin = time.perf_counter()
            done = self.run_tool("--help")
            best = min(best, time.perf_counter() - begin)
        self.assertLess(best, 0.3)
        for option in ("--cast", "--tied-head", "--max-shard-size", "--allow-overflow", "--dry-run", "--lenient"):
            self.assertIn(option, done.stdout)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", TOOL, "--help"], capture_output=True, text=True, check=True
        )
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        self.assertIn("converters", imported)
        self.assertEqual(imported & {"jax", "jaxlib", "flax", "numpy", "rich", "ml_dtypes", "torch"}, set())


if __name__ == "__main__":
    absltest.main()
