"""The four-fold case: right answers count, and whatever else is said does not."""

import contextlib
import dataclasses
import io
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from apr_jax.parity.findings import Finding
from tests.battery import four_fold

pytestmark = pytest.mark.slow


def answer() -> list[Finding]:
    """The right one."""
    return [
        Finding(name, "all", "some_stage", parameters, 1.0, 0.0, (), "certain", name)
        for name, parameters in four_fold.EXPECTED.items()
    ]


class FourFoldTest(absltest.TestCase):
    def test_the_answer_is_right_on_a_seed_in_both_forms(self):
        """On one of the hundred of `make four-fold`."""
        self.assertEqual(four_fold.examine(7), {"full dump": [], "decode rows": []})

    def test_a_right_answer_counts_and_anything_else_does_not(self):
        eps, *others = answer()
        self.assertEqual(four_fold.misjudged([eps, *others]), [])
        for change in (
            {"parameters": {"eps": 1.0001e-5, "norms": eps.parameters["norms"]}},
            {"layers": (0,)},
            {"certainty": "ambiguous"},
        ):
            wrong = dataclasses.replace(eps, **change)
            self.assertEqual(
                four_fold.misjudged([wrong, *others]), ["rms-norm-eps", "rms-norm-eps is not named"], change
            )
        unknown = dataclasses.replace(eps, fault="unknown", sentence="unknown")
        self.assertEqual(four_fold.misjudged([eps, *others, unknown]), ["unknown"])
        self.assertEqual(four_fold.misjudged([eps, eps, *others]), ["rms-norm-eps is named 2 times"])

    def test_one_seed_that_does_not_count_fails_the_battery(self):
        for wrong, code in ((["unknown"], 1), ([], 0)):
            printed = io.StringIO()
            with (
                mock.patch.object(
                    four_fold, "examine", lambda seed, wrong=wrong: {"full dump": wrong if seed == 6 else []}
                ),
                contextlib.redirect_stdout(printed),
            ):
                self.assertEqual(four_fold.main(["--seeds", "3", "--first", "5"]), code)
            self.assertRegex(printed.getvalue(), rf"full dump +3 +{3 - code}")


if __name__ == "__main__":
    absltest.main()
