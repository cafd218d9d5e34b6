"""The variations name what this machine has, and one failure under one of them fails the whole."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl.testing import absltest, parameterized

from tests import every_cpu

FEATURES = """
from numpy._core._multiarray_umath import __cpu_features__ as has
print(*[name for name, there in has.items() if there])
"""


class EveryCpuTest(parameterized.TestCase):
    @parameterized.named_parameters((v.name, v) for v in every_cpu.VARIATIONS)
    def test_numpy_takes_a_variation_without_complaint_and_does_without_what_it_names(self, variation):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", FEATURES],
            env=variation.variables(),
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        without = variation.environment.get("NPY_DISABLE_CPU_FEATURES", "").split()
        self.assertEmpty(set(without) & set(done.stdout.split()))

    def test_flags_that_are_set_stay(self):
        with mock.patch.dict(os.environ, XLA_FLAGS="--xla_dump_to=x"):
            flags = {v.name: v.variables()["XLA_FLAGS"] for v in every_cpu.VARIATIONS}
        self.assertEqual(flags["native, two threads"], "--xla_dump_to=x")
        self.assertEqual(
            flags["AVX2, one thread"],
            "--xla_dump_to=x --xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false",
        )

    def test_the_share_that_judges_dumps_is_there_and_in_the_default_suite(self):
        chosen = every_cpu.judging()
        self.assertNotEmpty([path for path in chosen if path.endswith("four_fold_test.py")])
        for path in chosen:
            self.assertTrue((every_cpu.ROOT / path).is_file())
            self.assertNotIn("reference", path)

    def test_one_command_that_fails_under_one_variation_fails_the_whole_and_is_shown(self):
        programs = {
            "suite": [[sys.executable, "-c", "import os; assert 'AVX2' not in os.environ['XLA_FLAGS'], 'last bits'"]]
        }
        for only, code, failures in (("native", 0, 0), ("two threads", 1, 1)):
            printed = io.StringIO()
            with (
                mock.patch.dict(os.environ, XLA_FLAGS=""),
                mock.patch.object(every_cpu, "commands", lambda part, _: programs[part]),
                contextlib.redirect_stdout(printed),
            ):
                self.assertEqual(every_cpu.main(["--only", only, "--parts", "suite"]), code)
            self.assertEqual(printed.getvalue().count("AssertionError: last bits"), failures)
            self.assertRegex(printed.getvalue(), r"native, two threads +passed")


if __name__ == "__main__":
    absltest.main()
