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
        self.check("LoadTest", 14)

    @pytest.mark.slow
    def test_parity(self):
        self.check("ParityTest", 3)

    @pytest.mark.slow
    def test_generate(self):
        self.check("GenerateTest", 8)

    @pytest.mark.slow
    def test_bench(self):
        self.check("BenchTest", 1)

    @pytest.mark.slow
    def test_the_plan_is_the_arithmetic(self):
        script = paths.ROOT / "tests" / "bench" / "mesh_plan.py"
        done = subprocess.run(
            [sys.executable, script, "--latency", "0"], cwd=paths.ROOT, capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = {tuple(words[:4]): words[4:] for words in map(str.split, done.stdout.splitlines())}
        # 7,615,616,512 parameters, the same on both devices but for 57 norms; 28 layers of 2 x 4 heads of 128; 57 sums.
        halved = 7_615_616_512 + 57 * 3584
        cache = 28 * 2 * 2 * 128 * 2048 * 2
        self.assertEqual(rows["7B", "data=1,model=2", "1", "2048"][:3], [
            f"{halved / 1e9:.2f}", f"{cache / 1e9:.2f}", f"{57 * 3584 * 2 / 1e3:.0f}",
        ])  # fmt: skip
        # 72,706,203,648 parameters, an eighth on each of eight. Without latency only what is sent takes time.
        weights, cache, sent, compute, sums, *_ = rows["72B", "data=1,model=8", "1", "2048"]
        self.assertEqual((weights, cache), ("18.18", f"{80 * 2 * 128 * 2048 * 2 / 1e9:.2f}"))
        self.assertAlmostEqual(float(sums), float(sent) * 1e3 / 450e9 * 1e3, delta=0.01)
        read = 72_706_203_648 / 8 * 2 - 152064 / 8 * 8192 * 2
        self.assertAlmostEqual(float(compute), read / 4.24e12 * 1e3, delta=0.05)


if __name__ == "__main__":
    absltest.main()
