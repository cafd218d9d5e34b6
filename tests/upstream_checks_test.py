"""Every row of the table of upstream's checks holds, and a planted violation turns each one red."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest
from absl.testing import absltest, parameterized

from tests import upstream_checks
from tests.paths import ROOT

pytestmark = pytest.mark.slow

MEASURED = {row.name: row for row in upstream_checks.ROWS if row.check is not None}


class UpstreamChecksTest(parameterized.TestCase):
    def test_the_table_has_all_of_them(self):
        self.assertEqual([row.name for row in upstream_checks.ROWS], [f"S{number}" for number in range(1, 28)])
        unmeasured = {row.name for row in upstream_checks.ROWS if row.check is None}
        self.assertEqual(unmeasured, {"S8", "S10", "S17", "S19"})
        for row in upstream_checks.ROWS:
            self.assertEqual(row.kind == "not applicable", row.check is None)

    @parameterized.parameters(list(MEASURED))
    def test_it_holds_and_a_violation_turns_it_red(self, name):
        row = MEASURED[name]
        found = row.check(row.right())
        self.assertTrue(found.holds, found.text)
        violated = row.check(row.planted())
        self.assertFalse(violated.holds, violated.text)

    def test_the_committed_table_has_every_row(self):
        text = (ROOT / "tests" / "UPSTREAM_CHECKS.md").read_text()
        self.assertEqual(re.findall(r"(?m)^\| (S\d+) \|", text), [row.name for row in upstream_checks.ROWS])
        self.assertNotIn("**no**", text)


if __name__ == "__main__":
    absltest.main()
