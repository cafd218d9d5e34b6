"""The benchmark: the least work of a case, turns, tables and pictures; docs/speed.md shows what was measured."""

import json
import math
import pathlib
import sys
import tempfile
import xml.etree.ElementTree

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.bench import measure, report, roofline
from apr_jax.bench.cases import ALL, Case, Ceilings, Work, work
from apr_jax.converters.errors import UsageError
from apr_jax.testing.sample import SAMPLES
from tests import paths, tool
from tests.bench import bench_report


class FakeContestant:
    """Takes the times that it is given, one a turn; the first is the call that sizes a turn."""

    def __init__(self, name, seconds, log, error=None):
        self.name, self._seconds, self._log, self._error = name, iter(seconds), log, error

    def prepare(self, case, steps):
        if self._error:
            raise self._error

        def calls(count):
            self._log.append((self.name, count))
            return next(self._seconds) * count

        return calls, {"compile_seconds": 3.0}


RESULTS = {
    "model": "shape",
    "dtype": "float32",
    "machine": {"device": "Abacus", "platform": "cpu", "cores": 2},
    "date": "2026-01-02",
    "versions": {"jax": "1.2"},
    "commit": "abc",
    "ceilings": {"flops": 2e11, "bytes": 4e10},
    "cases": [
        {
            "case": "decode-1x128",
            "flops": 1e9,
            "bytes": 2e9,
            "limit_milliseconds": 50.0,
            "bound": "memory",
            "rows": [
                {"contestant": "apr_jax", "milliseconds": 80.0},
                {"contestant": "HuggingFace", "milliseconds": 150.0},
            ],
        },
        {
            "case": "prefill-1x512",
            "flops": 4e11,
            "bytes": 2e9,
            "limit_milliseconds": 2000.0,
            "bound": "arithmetic",
            "rows": [{"contestant": "apr_jax", "milliseconds": 2500.0}, {"contestant": "HuggingFace", "error": "no"}],
        },
    ],
}


class CasesTest(parameterized.TestCase):
    @parameterized.parameters("decode-0x5", "decode-1", "prefill-1x2x3", "train-1x1", "decode-1x-5")
    def test_what_is_no_case_is_refused(self, text):
        with self.assertRaises(UsageError):
            Case.parse(text)

    def test_names_are_read_back(self):
        self.assertEqual([Case.parse(case.name) for case in ALL], list(ALL))
        self.assertLen(ALL, 9)

    @parameterized.parameters("qwen2_0.5b", "qwen2_7b")
    def test_a_decode_step_reads_every_matrix_once_and_the_keys_and_values(self, name):
        config = SAMPLES[name].config
        matrices = {key: shape for key, shape in config.tensor_shapes().items() if len(shape) == 2}
        if not config.tie_word_embeddings:
            del matrices["model.embed_tokens.weight"]
        read = sum(math.prod(shape) for shape in matrices.values())
        cached = 8 * 100 * config.num_layers * 2 * config.num_kv_heads * config.head_dim
        least = work(config, Case("decode", 8, 100), 2)
        self.assertEqual(least.bytes, 2 * (read + cached))
        scores_and_values = 8 * 100 * config.num_layers * config.num_heads * config.head_dim * 2
        self.assertEqual(least.flops, 2 * (8 * read + scores_and_values))

    def test_of_a_prompt_the_last_token_alone_goes_beyond_the_last_layers_keys(self):
        config = SAMPLES["gqa_tied_bf16"].config
        shapes = {k: math.prod(s) for k, s in config.tensor_shapes().items() if len(s) == 2}
        last = f"layers.{config.num_layers - 1}."
        for_keys = sum(n for k, n in shapes.items() if last in k and ("k_proj" in k or "v_proj" in k))
        before = sum(n for k, n in shapes.items() if "layers" in k and last not in k)
        three, two, one = (work(config, Case("prefill", 5, length), 4) for length in (3, 2, 1))
        self.assertEqual(one.flops, work(config, Case("decode", 5, 1), 4).flops)
        attended = 2 * 64  # scores and values of one position
        # One more token goes through all layers but the last. There it attends to itself and those before; in the last
        # layer the last token has one more to attend to.
        below = config.num_layers - 1
        self.assertEqual(two.flops - one.flops, 5 * 2 * (before + for_keys + (2 * below + 1) * attended))
        self.assertEqual(three.flops - two.flops, 5 * 2 * (before + for_keys + (3 * below + 1) * attended))

    def test_the_limit_is_the_slower_of_arithmetic_and_memory(self):
        ceilings = Ceilings(flops=100.0, bytes=10.0)
        self.assertEqual((ceilings.floor(Work(200.0, 5.0)), ceilings.bound(Work(200.0, 5.0))), (2.0, "arithmetic"))
        self.assertEqual((ceilings.floor(Work(200.0, 50.0)), ceilings.bound(Work(200.0, 50.0))), (5.0, "memory"))


class MeasureTest(absltest.TestCase):
    CASE = Case("decode", 4, 128)

    def rows(self, best, seconds=0.3):
        self.log = []
        contestants = [
            FakeContestant("a", [0.1, 0.5, 0.2, 0.3], self.log),
            FakeContestant("broken", [], self.log, RuntimeError("out of memory\nat length")),
            FakeContestant("b", [0.1, 0.9, 0.8, 0.7], self.log),
        ]
        measurement = measure.Measurement(self.CASE, measure.Plan(rounds=3, seconds=seconds, steps=10, best=best))
        measurement.prepare(contestants[:1])
        measurement.prepare(contestants[1:])
        self.assertEmpty(self.log)
        measurement.take_turns()
        return measurement.rows

    def test_turns_alternate_and_make_as_many_calls_as_fit(self):
        self.rows(best=True)
        self.assertEqual(self.log, [("a", 1), ("b", 1), *[("a", 2), ("b", 2)] * 3])

    def test_the_fastest_or_the_median_turn_counts_for_one_step(self):
        self.assertAlmostEqual(self.rows(best=True)[0]["milliseconds"], 20.0)
        row = self.rows(best=False)[0]
        self.assertAlmostEqual(row["milliseconds"], 30.0)
        self.assertAlmostEqual(row["tokens_per_second"], 4 / 0.030)
        self.assertAlmostEqual(row["slowest"], 50.0)

    def test_where_one_call_fills_a_turn_the_first_call_is_one(self):
        self.rows(best=True, seconds=0.0)
        self.assertEqual(self.log, [("a", 1), ("b", 1)] * 3)

    def test_a_contestant_that_fails_says_so_and_the_others_are_measured(self):
        rows = self.rows(best=True)
        self.assertEqual(rows[1], {"contestant": "broken", "error": "RuntimeError: out of memory"})
        self.assertAlmostEqual(rows[2]["milliseconds"], 70.0)


class ReportTest(absltest.TestCase):
    def test_the_table_says_limit_share_and_peers(self):
        self.assertEqual(
            report.cases(RESULTS),
            [
                ["ms", "limit", "set by", "apr_jax", "share of limit", "HuggingFace"],
                ["decode, batch 1, context 128", "50.0", "memory", "80.0", "62%", "150"],
                ["prefill 1 x 512", "2000", "arithmetic", "2500", "80%", ""],
            ],
        )
        self.assertEqual(
            report.heading(RESULTS),
            "shape, float32, Abacus, 2 cores: product of matrices 200 GFLOP/s, memory 40 GB/s",
        )

    def test_the_picture_is_well_formed_and_nothing_leaves_it(self):
        root = xml.etree.ElementTree.fromstring(roofline.svg(RESULTS))
        circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
        # Two cases and the one that a peer was measured in; both contestants once more in the legend.
        self.assertLen(circles, 2 + 1 + 2)
        for across, up in circles:
            self.assertBetween(across, 0, 860)
            self.assertBetween(up, 0, 440)

    def test_a_case_stands_below_the_roof_by_its_share(self):
        scale = roofline._Scale((0.1, 1000.0), (1e9, 1e12))
        self.assertAlmostEqual(scale.up(1e11) - scale.up(1e12), scale.up(1e10) - scale.up(1e11))
        self.assertLess(scale.up(2e11), scale.up(1e11))


class CommittedResultsTest(absltest.TestCase):
    def test_the_page_shows_the_committed_results(self):
        text = bench_report.PAGE.read_text(encoding="utf-8")
        shown = text.split(bench_report.BEGIN)[1].split(bench_report.END)[0].strip()
        self.assertEqual(shown, bench_report.section(), "run `make bench-report`")

    def test_the_pictures_show_the_committed_results(self):
        self.assertNotEmpty(bench_report.pictures())
        for path, drawing in bench_report.pictures().items():
            self.assertEqual(path.read_text(encoding="utf-8"), drawing, "run `make bench-report`")

    def test_results_carry_machine_date_versions_and_commit(self):
        self.assertNotEmpty(bench_report.results())
        for name, results in bench_report.results().items():
            with self.subTest(name):
                self.assertTrue(results["machine"]["device"])
                self.assertRegex(results["date"], r"^\d{4}-\d{2}-\d{2}$")
                self.assertContainsSubset({"python", "jax", "jaxlib", "flax"}, results["versions"])
                self.assertRegex(results["commit"] or "", r"^[0-9a-f]{7,40}\+?$")


@pytest.mark.slow
class CommandTest(absltest.TestCase):
    def bench(self, *arguments):
        return tool.run("bench", *arguments)

    def test_a_quick_run_on_a_tiny_checkpoint_writes_json_and_a_picture(self):
        with tempfile.TemporaryDirectory() as folder:
            output, picture = pathlib.Path(folder, "out.json"), pathlib.Path(folder, "out.svg")
            done = self.bench(
                paths.checkpoint("gqa_tied_bf16"),
                *("--quick", "--no-peers", "--json", "--cases", "prefill-2x9,decode-3x20", "--svg", picture),
                *("-o", output),
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            printed = json.loads(done.stdout)
            self.assertEqual(printed, json.loads(output.read_text()))
            self.assertTrue(picture.read_text().startswith("<svg"))
        self.assertEqual([entry["case"] for entry in printed["cases"]], ["prefill-2x9", "decode-3x20"])
        for entry in printed["cases"]:
            (row,) = entry["rows"]
            self.assertEqual(row["contestant"], "apr_jax")
            self.assertGreater(row["milliseconds"], entry["limit_milliseconds"])
            self.assertGreater(row["memory_bytes"], entry["bytes"])
            self.assertGreater(row["compile_seconds"], 0)

    def test_nothing_begins_after_the_time_is_over(self):
        done = self.bench(
            paths.checkpoint("gqa_tied_bf16"), "--no-peers", "--json", "--cases", "decode-1x20", "--seconds", "0"
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["left_out"], ["decode-1x20"])

    def test_what_is_no_case_ends_with_2(self):
        done = self.bench(paths.checkpoint("gqa_tied_bf16"), "--cases", "decode-1")
        self.assertEqual(done.returncode, 2)
        self.assertIn("decode-1", done.stderr)


if __name__ == "__main__":
    absltest.main()
