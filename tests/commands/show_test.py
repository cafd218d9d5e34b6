"""The command line of `show`."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.commands import cli
from apr_jax.converters.formats import apr_format, dtypes
from apr_jax.testing.sample import SAMPLES
from tests import html_pages, tool
from tests.paths import DATA, NAMES, ROOT, checkpoint
from tests.start_up import cpu_seconds

TOOL = ROOT / "tools" / "show.py"


class ShowTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def write_apr(self, metadata, entries, data):
        """Writes x.apr with right checksums."""
        file = apr_format.serialise_prologue(metadata, entries) + data
        path = self.folder / "x.apr"
        path.write_bytes(file + struct.pack("<I", zlib.crc32(file)))
        return path

    def run_tool(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return tool.ran(self, "show", *arguments, code=code)

    def test_what_a_stream_cannot_encode_is_escaped(self):
        path = self.folder / "x.safetensors"
        safetensors.numpy.save_file({"gewicht.größe": np.zeros(2, np.float32)}, path)
        environment = os.environ | {"PYTHONIOENCODING": "ascii"}
        for arguments in ((path,), (path, "--tensors", "größe")):
            done = subprocess.run([sys.executable, TOOL, *arguments], env=environment, capture_output=True, text=True)
            self.assertIn("gr\\xf6\\xdfe", done.stdout + done.stderr)
            self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(done.returncode, 2)

    @parameterized.parameters(">&-", "2>&-", ">&- 2>&-")
    def test_closed_streams_are_no_failure(self, closed):
        for arguments in ("", "--json"):
            command = f'exec "$0" "$1" "$2" {arguments} {closed}'
            done = subprocess.run(
                ["/bin/sh", "-c", command, sys.executable, TOOL, checkpoint("gqa_tied_bf16")],
                capture_output=True,
                text=True,
            )
            self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_json_spells_what_it_cannot_express(self):
        with mock.patch("sys.stdout", io.StringIO()) as out:
            cli.print_json({"a": [float("nan"), (1.5, float("-inf"))], "b": {"c": float("inf")}})
        self.assertEqual(json.loads(out.getvalue()), {"a": ["nan", [1.5, "-inf"]], "b": {"c": "inf"}})

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

    def test_a_head_without_data_is_said_to_stand_for_the_embedding(self):
        entries = apr_format.lay_out(
            (name, dtypes.by_name("f32"), (2, 2), size)
            for name, size in (("model.embed_tokens.weight", 16), ("lm_head.weight", 0))
        )
        path = self.write_apr({"tied_embeddings": True}, entries, bytes(64))
        self.assertIn("lm_head.weight [2, 2] has no data: it stands for the embedding", self.run_tool(path).stdout)

    def test_an_empty_line_stands_between_the_parts(self):
        parts = self.run_tool(checkpoint("gqa_tied_bf16")).stdout.split("\n\n")
        self.assertEqual([part.split()[0] for part in parts[1:4]], ["metadata", "side", "tensor"])
        self.assertLen(parts, 5)

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

    def test_statistics_are_those_of_numpy(self):
        done = self.run_tool(checkpoint("mixed_dtypes"), "--stats", "--json")
        listed = json.loads(done.stdout)["tensors"]
        with open_checkpoint(checkpoint("mixed_dtypes")) as opened:
            self.assertLen(listed, len(opened.tensors))
            for entry in listed:
                values = opened.tensors[entry["name"]].read().astype(np.float64)
                found = entry["statistics"]
                np.testing.assert_allclose(
                    [found[key] for key in ("count", "mean", "std", "minimum", "maximum", "zeros", "nans", "infs")],
                    [values.size, values.mean(), values.std(), values.min(), values.max(), (values == 0).sum(), 0, 0],
                    rtol=1e-12,
                    atol=1e-16,
                )
                self.assertEqual(sum(found["histogram"]["counts"]) + found["zeros"], values.size)
        self.assertNotIn("statistics", self.run_tool(checkpoint("mixed_dtypes"), "--json").stdout)

    def test_the_table_of_statistics_has_every_column_and_tensor(self):
        text = self.run_tool(checkpoint("gqa_tied_bf16"), "--stats", "--tensors", "*.layers.0.*").stdout
        head = next(line for line in text.splitlines() if line.startswith("tensor "))
        for column in ("mean", "std", "min", "max", "zeros", "NaN", "Inf", "in [0.5, 4)", "dead rows"):
            self.assertIn(column, head)
        line = next(line for line in text.splitlines() if line.startswith("model.layers.0.self_attn.q_proj.bias"))
        self.assertIn("128", line.split())
        self.assertIn("-65.5", line.split())
        self.assertIn("12 tensors", text)

    def test_values_that_cannot_be_read_are_said_to_be_so(self):
        path = self.folder / "x.safetensors"
        header = json.dumps({"c": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        self.assertIn("not decoded", self.run_tool(path, "--stats").stdout)
        self.assertIsNone(json.loads(self.run_tool(path, "--stats", "--json").stdout)["tensors"][0]["statistics"])
        self.run_tool(path, "--html", self.folder / "x.html")
        self.assertIn("not decoded", (self.folder / "x.html").read_text())

    @parameterized.parameters(*NAMES)
    def test_the_page_holds_every_tensor_and_refers_to_nothing_outside(self, name):
        path = self.folder / "page.html"
        done = self.run_tool(checkpoint(name), "--html", path)
        self.assertEmpty(done.stdout)
        self.assertIn(f"{path.stat().st_size} bytes", done.stderr)
        page = Page(path.read_text("utf-8"))
        with open_checkpoint(checkpoint(name)) as opened:
            for tensor in opened.tensors:
                self.assertIn(tensor, page.texts)
            for file in opened.files:
                self.assertIn(file, page.texts)
            self.assertEqual(page.tags.count("svg"), len(opened.tensors))
        self.assertIn("relabelled", page.texts)
        self.assertNotIn("failure", page.texts)

    def test_text_from_the_file_cannot_leave_its_place_in_the_page(self):
        hostile = ["</title><script>alert(1)</script>", '"><img src=http://x.y/z onerror=alert(1)>', "&lt;b&gt;"]
        hostile += ["'--><svg/onload=alert(1)>", "</style><i>"]
        metadata = {name: name for name in hostile} | {"control": "\x1b[2Jevil\u202e"}
        metadata |= {"source_files": {"README<i>": "x"}}
        entries = apr_format.lay_out([(name, dtypes.by_name("f32"), (1,), 4) for name in hostile])
        source = self.write_apr(metadata, entries, bytes(64) * len(hostile)).rename(self.folder / "<b>\x1b&amp;.apr")
        self.run_tool(source, "--html", self.folder / "page.html")
        text = (self.folder / "page.html").read_text("utf-8")
        page = Page(text)
        for name in hostile:
            self.assertGreaterEqual(page.texts.count(name), 3, name)
        self.assertIn(str(source).replace("\x1b", "\\x1b"), page.texts)
        self.assertIn("README<i>", page.texts)
        self.assertIn("\\x1b[2Jevil\\u202e", page.texts)
        self.assertEmpty({"\x1b", "\u202e"} & set(text))

    def test_the_page_names_what_is_wrong(self):
        values = np.zeros((8, 8), "<f2")
        values[:] = np.nan
        listed = [("a", dtypes.by_name("f16"), (8, 8), 128), ("b", dtypes.by_name("f32"), (4, 4), 64)]
        entries = apr_format.lay_out(listed)
        self.write_apr({}, entries, values.tobytes() + bytes(64))
        self.run_tool(self.folder / "x.apr", "--html", self.folder / "x.html")
        page = Page((self.folder / "x.html").read_text())
        self.assertEqual(page.texts.count("failure"), 2)
        self.assertIn("b is all zeros, expected a trained weight", page.texts)
        self.assertTrue(any("64 NaN" in text for text in page.texts))

    def test_a_page_of_290_tensors_is_below_a_megabyte(self):
        shapes = SAMPLES["qwen2_0.5b"].config.tensor_shapes()
        small = [(name, dtypes.by_name("bf16"), (32, 32)[: len(shape)]) for name, shape in shapes.items()]
        entries = apr_format.lay_out([(name, dtype, shape, dtype.nbytes(shape)) for name, dtype, shape in small])
        end = entries[-1].offset + apr_format.pad(entries[-1].size)
        # Every octave of the histogram is there.
        self.write_apr({}, entries, np.random.default_rng(0).integers(0, 0x7F00, end // 2).astype("<u2").tobytes())
        self.run_tool(self.folder / "x.apr", "--html", self.folder / "x.html")
        page = Page((self.folder / "x.html").read_text())
        self.assertEqual(page.tags.count("svg"), 290)
        self.assertLess((self.folder / "x.html").stat().st_size, 1_000_000)
        order = [text for text in page.texts if text.endswith("input_layernorm.weight")]
        self.assertEqual(order[-24:], [f"model.layers.{layer}.input_layernorm.weight" for layer in range(24)])

    def test_an_existing_page_is_replaced_only_with_force_and_never_the_checkpoint(self):
        path = self.folder / "page.html"
        path.write_text("mine")
        done = self.run_tool(checkpoint("gqa_tied_bf16"), "--html", path, code=2)
        self.assertIn("exists", done.stderr)
        self.assertEqual(path.read_text(), "mine")
        # Before minutes are spent on reading: this one has a BOOL that is neither 0 nor 1.
        header = json.dumps({"c": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}).encode()
        broken = self.folder / "x.safetensors"
        broken.write_bytes(struct.pack("<Q", len(header)) + header + bytes((1, 2)))
        self.run_tool(broken, "--html", path, code=2)
        self.run_tool(broken, "--html", path, "--force", code=4)
        broken.unlink()
        self.assertEqual(path.read_text(), "mine")
        self.run_tool(checkpoint("gqa_tied_bf16"), "--html", path, "--force")
        self.assertIn("<!doctype html>", path.read_text())
        self.assertEqual(os.listdir(self.folder), ["page.html"])
        entries = apr_format.lay_out([("a", dtypes.by_name("f32"), (1,), 4)])
        source = self.write_apr({}, entries, bytes(64))
        before = source.read_bytes()
        self.run_tool(source, "--html", source, "--force", code=2)
        self.assertEqual(source.read_bytes(), before)
        self.run_tool(checkpoint("gqa_tied_bf16"), "--html", self.folder / "none" / "x.html", code=3)

    def test_page_and_json_in_one_run(self):
        done = self.run_tool(checkpoint("mqa_f16"), "--html", self.folder / "x.html", "--json")
        self.assertIn("statistics", json.loads(done.stdout)["tensors"][0])
        self.assertTrue((self.folder / "x.html").exists())

    def test_a_file_of_another_kind_is_named_and_exit_4(self):
        done = self.run_tool(DATA / "apr" / "golden_v1.apr", code=4)
        self.assertIn("APRN", done.stderr)

    def test_help_takes_less_than_300_ms_and_imports_nothing_heavy(self):
        self.assertLess(cpu_seconds([sys.executable, TOOL, "--help"]), 0.3)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", TOOL, "--help"], capture_output=True, text=True, check=True
        )
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        self.assertEqual(imported & {"jax", "jaxlib", "flax", "numpy", "rich", "ml_dtypes", "torch"}, set())


class Page(html_pages.Page):
    """A page of show: nothing in it can run."""

    ALLOWED = frozenset(
        """html head meta title style body h1 h2 p dl div dt dd section table thead tbody tr th td b svg rect path
        details summary sup span main""".split()
    )
    ATTRIBUTES = frozenset(
        """lang charset name content http-equiv class scope colspan viewbox x y width height d role aria-label
        aria-hidden tabindex""".split()
    )

    def check(self, tag, attributes):
        if tag not in self.ALLOWED or not self.ATTRIBUTES.issuperset(attributes):
            raise AssertionError(f"unexpected: {tag} {attributes}")


if __name__ == "__main__":
    absltest.main()
