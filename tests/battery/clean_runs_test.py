"""The clean runs: a right dump gives no finding, a wrong one does, and what cannot be run is counted."""

import contextlib
import io
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from apr_jax.trace import hf_reference, stages
from tests.battery import clean_runs
from tests.battery.clean_runs import FIRST, Run

pytestmark = pytest.mark.slow


def main(*argv: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = clean_runs.main(argv)
    return code, printed.getvalue()


class CleanRunsTest(absltest.TestCase):
    def test_right_programs_have_no_finding_and_a_wrong_value_is_one(self):
        run = Run("NumPy", "odd_sizes", "float32", FIRST)
        count, share, _, found = clean_runs.examine(run)
        self.assertEqual((count, found), (37, []))
        self.assertBetween(share, 0.05, 0.6)
        inputs, dump = clean_runs.numpy_engine(run)
        dump["stage.1.ffn_out"][1, 40] *= 1.01
        with mock.patch.dict(clean_runs.SIDES, {"NumPy": lambda _: (inputs, dump)}):
            _, share, where, found = clean_runs.examine(run)
        self.assertNotEmpty(found)
        self.assertGreater(share, 1)
        self.assertIn(where, ("stage.1.ffn_out", "stage.1.post_ffn_residual"))

    def test_a_dump_that_looks_like_another_dtype_is_a_finding(self):
        run = Run("NumPy", "odd_sizes", "float32", FIRST)
        inputs, dump = clean_runs.numpy_engine(run)
        # The checkpoint's matrices are bfloat16: its embeddings alone do not show that the engine is float32.
        lookup = {stages.EMBEDDING: dump[stages.EMBEDDING]}
        with mock.patch.dict(clean_runs.SIDES, {"NumPy": lambda _: (inputs, lookup)}):
            self.assertEqual(clean_runs.examine(run)[3], ["taken for bfloat16"])

    def test_without_torch_the_runs_are_counted_as_missing_and_the_program_fails(self):
        with mock.patch.object(hf_reference, "available", return_value=False):
            code, printed = main("--sides", "HuggingFace", "--only", "odd_sizes")
        self.assertEqual(code, 1)
        self.assertIn("NOT RUN: HuggingFace, 3 runs: no torch", printed)
        self.assertIn("0 clean runs, 0 findings; 3 runs missing", printed)

    def test_findings_and_too_few_runs_fail(self):
        for found, least, expected in (([], 3, 0), (["wrong"], 3, 1), ([], 4, 1)):
            with (
                mock.patch.object(clean_runs, "examine", lambda run, found=found: (37, 0.2, "logits", found)),
                mock.patch.object(clean_runs, "LEAST", least),
            ):
                self.assertEqual(main("--sides", "NumPy", "--only", "odd_sizes")[0], expected)

    def test_there_are_more_than_twenty_runs_on_every_checkpoint_in_every_dtype(self):
        made = list(clean_runs.runs(list(clean_runs.SIDES)))
        self.assertLen(set(made), len(made))
        for side in ("ours", "NumPy", "HuggingFace", "CUDA"):
            mine = [run for run in made if run.side == side]
            self.assertGreaterEqual(len(mine), clean_runs.LEAST)
            self.assertLen({(run.checkpoint, run.dtype) for run in mine}, 21)


if __name__ == "__main__":
    absltest.main()
