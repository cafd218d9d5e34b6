"""Models on a mesh of devices: the suites of eight_devices.py, in processes that have as many."""

import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from tests import paths


class EightDevicesTest(parameterized.TestCase):
    def check(self, suite, least):
        """Runs a suite; fails if it does, or if it has fewer tests than it should."""
        program = paths.ROOT / "tests" / "mesh" / "eight_devices.py"
        done = subprocess.run([sys.executable, program, suite], cwd=paths.ROOT, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr[-8000:])
        self.assertGreaterEqual(int(re.search(r"Ran (\d+) tests?", done.stderr)[1]), least)
        self.assertNotIn("skipped", done.stderr)

    def test_quick(self):
        self.check("QuickTest", 4)

    @pytest.mark.slow
    def test_every_checkpoint(self):
        self.check("EveryCheckpointTest", 45)

    @pytest.mark.slow
    def test_load(self):
        self.check("LoadTest", 16)

    @pytest.mark.slow
    def test_parity(self):
        self.check("ParityTest", 3)

    @pytest.mark.slow
    def test_generate(self):
        self.check("GenerateTest", 8)

    @pytest.mark.slow
    def test_bench(self):
        self.check("BenchTest", 1)


if __name__ == "__main__":
    absltest.main()
