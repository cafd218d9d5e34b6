"""The command line of `convert`: what it prints, what it ends with, what it costs to start."""

import json
import os
import pathlib
import pty
import shutil
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from tests import tool
from tests.paths import ROOT, checkpoint
from tests.start_up import cpu_seconds

TOOL = ROOT / "tools" / "convert.py"
SOURCE = checkpoint("gqa_tied_bf16")


class ConvertTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_tool(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return tool.ran(self, "convert", *arguments, code=code, cwd=self.folder)

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
        ((SOURCE, "-o", "x", "--to", "apr", "--cast", "q6k"), 5),
        ((SOURCE, "-o", "x", "--to", "safetensors", "--cast", "q8"), 5),
        ((SOURCE, "-o", "x", "--to", "apr", "--legacy", "8=f32"), 2),
        ((SOURCE, "-o", "x", "--to", "apr", "--legacy=q4"), 2),
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
        head, *lines = done.stdout.splitlines()
        # Numbers end where their column does, names begin there.
        norm = next(line for line in lines if line.startswith("model.norm.weight"))
        self.assertLen(norm, len(head))
        self.assertEqual([norm.index("m.apr"), norm.index(" 256 ") + 4], [head.index("file"), head.index("bytes") + 5])
        self.assertIn("nothing written", done.stdout)
        self.assertEqual(os.listdir(self.folder), [])

    def test_what_is_left_out_and_what_is_lost_is_printed(self):
        values = {"model.embed_tokens.weight": np.array([[1e30, 1.0]], np.float32)}
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
        safetensors.numpy.save_file(values, self.folder / "s.safetensors")
        arguments = ("s.safetensors", "-o", "m.apr", "--to", "apr", "--tied-head", "absent")
        left_out = "left out: lm_head.weight (its values are the embedding's)"
        planned = self.run_tool(*arguments, "--dry-run").stdout
        self.assertIn(left_out, planned)
        self.assertNotIn("side files:", planned)
        done = self.run_tool(*arguments, "--cast", "f16", "--allow-overflow").stdout
        self.assertIn(left_out, done)
        self.assertIn("model.embed_tokens.weight: 1 value became infinite, 0 became zero", done)

    def test_json_of_dry_run_and_run_agree(self):
        arguments = (SOURCE, "-o", "hf", "--to", "safetensors", "--max-shard-size", "100KB", "--json")
        planned = json.loads(self.run_tool(*arguments, "--dry-run").stdout)
        done = json.loads(self.run_tool(*arguments).stdout)
        self.assertEqual(done["plan"], planned["plan"])
        self.assertLen(done["plan"]["files"], 3)
        written = sum(file.stat().st_size for file in (self.folder / "hf").iterdir())
        self.assertEqual(done["plan"]["bytes_written"], written)
        self.assertGreater(done["outcome"]["seconds"], 0)

    def test_what_quantising_cost_is_printed_worst_first_and_in_json(self):
        arguments = (checkpoint("odd_sizes"), "-o", "q.apr", "--to", "apr", "--cast", "q4k", "--force")
        lines = self.run_tool(*arguments).stdout.splitlines()
        self.assertIn("27 tensors (27 cast)", lines[0])
        self.assertEqual(lines[1].split(), "quantised tensor relative L2 cosine max abs worst block".split())
        errors = [float(line.split()[1]) for line in lines[2:]]
        self.assertLen(errors, 16)
        self.assertEqual(errors, sorted(errors, reverse=True))
        self.assertRegex(lines[2], r"weight +\d\.\d{3}e-02 +0\.99\d{4} +\d\.\d{3}e-02 +\d\.\d{3}e-0\d at \[\d+, \d+\]")
        found = json.loads(self.run_tool(*arguments, "--json").stdout)["outcome"]["quantised"]
        self.assertLen(found, 16)
        head = found["lm_head.weight"]
        self.assertBetween(head["relative_l2"], 0.05, 0.1)
        self.assertBetween(head["cosine"], 0.99, 1)
        self.assertGreater(head["worst_block"]["relative_l2"], head["relative_l2"])
        self.assertLen(head["worst_block"]["begins_at"], 2)

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
        self.assertRegex(shown, rb"210\.0/210\.0 kB.*0:00:00", "how much, and when the rest is done")
        self.assertNotIn(b"\x1b", done.stdout)

    def test_help_names_the_command_as_it_was_called(self):
        self.assertIn("usage: python convert.py ", self.run_tool("--help").stdout)
        self.assertIn("\n  python convert.py Qwen2.5-0.5B -o ", self.run_tool("--help").stdout)
        code = "from apr_jax.commands import entry; import sys; sys.argv[1:] = ['convert', '--help']; entry.run()"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertIn("usage: apr-jax convert ", done.stdout)
        self.assertIn("\n  apr-jax convert Qwen2.5-0.5B -o ", done.stdout)

    def test_warnings_of_several_lines_have_lines_and_names_are_escaped(self):
        source = self.folder / "source"
        shutil.copytree(SOURCE, source)
        (source / "a\nb\x1b.py").touch()
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        lines = self.run_tool(source, "-o", "hf", "--to", "safetensors").stderr.splitlines()
        self.assertIn("warning: config.json: the tensors do not match the configuration, 12 of them:", lines)
        self.assertIn("  missing: model.layers.2.input_layernorm.weight [64]", lines)
        self.assertIn("warning: not taken along: a\\nb\\x1b.py", lines)

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
    def test_an_interrupt_that_is_swallowed_still_ends_it_with_130_and_nothing(self, number):
        code = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.formats import casts
from apr_jax.converters.commands import cli, convert
prepare = casts.prepare
def swallowing():
    for _ in range(2):
        try:
            os.kill(os.getpid(), int(sys.argv[2]))
        except KeyboardInterrupt:
            pass
        time.sleep(0.1)
    prepare()
casts.prepare = swallowing
cli.start("apr_jax.converters.commands.convert", ["convert", *sys.argv[3:]])
"""
        arguments = [SOURCE, "-o", "m.apr", "--to", "apr", "--cast", "f32"]
        command = [sys.executable, "-c", code, ROOT, int(number), *arguments]
        done = subprocess.run(list(map(str, command)), cwd=self.folder, capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 130, done.stderr)
        self.assertEqual(done.stderr.splitlines()[1:], ["interrupted"])
        self.assertEqual(os.listdir(self.folder), [])

    @parameterized.parameters(
        (["convert", SOURCE, "-o", "m.apr", "--to", "apr"],),
        (["convert", SOURCE, "-o", "m.apr", "--to", "apr", "--cast", "f16"],),
        (["convert", SOURCE, "-o", "m.apr", "--to", "apr", "--cast", "q8"],),
        (["convert", SOURCE, "-o", "m.apr", "--to", "apr", "--cast", "q4k"],),
        (["verify", SOURCE],),
        (["verify", SOURCE, checkpoint("gqa_untied_bf16")],),
        (["verify", checkpoint("mqa_f16"), checkpoint("odd_sizes")],),
    )
    def test_helper_threads_import_nothing(self, arguments):
        # An import that an interrupt breaks off in one thread leaves others waiting for it.
        code = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.commands import convert, verify
class Finder:
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            print("imported by a helper:", name)
sys.meta_path.insert(0, Finder())
import _thread
start = _thread.start_new_thread
def said(*arguments):
    print("a helper began")
    return start(*arguments)
_thread.start_new_thread = said
command = {"convert": convert, "verify": verify}[sys.argv[2]]
sys.exit(command.main(command.parse(sys.argv[2:])))
"""
        command = [sys.executable, "-c", code, ROOT, *arguments, "--json"]
        done = subprocess.run(list(map(str, command)), cwd=self.folder, capture_output=True, text=True)
        self.assertIn(done.returncode, (0, 1), done.stderr)
        self.assertIn("a helper began", done.stdout)
        self.assertEqual([line for line in done.stdout.splitlines() if line.startswith("imported")], [])

    def test_help_takes_less_than_300_ms_and_imports_nothing_heavy(self):
        self.assertLess(cpu_seconds([sys.executable, TOOL, "--help"]), 0.3)
        done = self.run_tool("--help")
        for option in (
            "--cast",
            "--tied-head",
            "--max-shard-size",
            "--allow-overflow",
            "--dry-run",
            "--lenient",
            "--legacy",
        ):
            self.assertIn(option, done.stdout)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", TOOL, "--help"], capture_output=True, text=True, check=True
        )
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        self.assertIn("apr_jax", imported)
        self.assertEqual(imported & {"jax", "jaxlib", "flax", "numpy", "rich", "ml_dtypes", "torch"}, set())


if __name__ == "__main__":
    absltest.main()
