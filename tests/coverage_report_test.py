"""The report of what no test takes: reasons hold when lines move, and only for what they are about."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl.testing import absltest, parameterized

from tests import coverage_report as report
from tests.paths import ROOT

SOURCE = """
def first(x):
    if x:
        try:
            return 1
        except OSError:
            return 2
    return None


def second(x):
    if x:
        return None


def third(x):
    for y in x:
        return y
    return None
"""


class PlacesTest(parameterized.TestCase):
    @parameterized.parameters(0, 7)
    def test_a_reason_holds_wherever_its_line_is_and_for_what_is_inside(self, moved):
        def found(*lines: int) -> list[int]:
            return [line + moved for line in lines]

        measured = {
            "missing_lines": found(4, 5, 6, 7, 13),
            "missing_branches": [found(3, 4), found(12, 13)],
        }
        places = report.places("a/b.py", "\n" * moved + SOURCE, measured)
        self.assertEqual(
            [(place.function, place.text, place.count) for place in places],
            [("first", "if x: (one way)", 5), ("second", "if x: (one way)", 2)],
        )
        reason = report.Reason("a/b.py:first", "if x:", "because")
        self.assertEqual([reason.holds(place) for place in places], [True, False])

    def test_what_a_test_enters_and_does_not_take_whole_is_a_place_of_its_own(self):
        measured = {"missing_lines": [6, 7, 18], "missing_branches": [[3, 8], [17, 19]]}
        places = report.places("a/b.py", SOURCE, measured)
        self.assertEqual(
            [place.text for place in places],
            ["if x: (one way)", "except OSError:", "for y in x: (one way)", "return y"],
        )

    def test_every_reason_is_about_code_that_is_there(self):
        for reason in report.reasons():
            file, _, function = reason.where.partition(":")
            if file == "*":
                continue
            source = (ROOT / "converters" / file).read_text()
            inside = report.statements(source)
            lines = [
                text
                for line, text in enumerate(source.split("\n"), 1)
                if not function or inside.get(line, ("",))[0] == function
            ]
            part = reason.part.removesuffix(" (one way)")
            self.assertTrue(any(part in text for text in lines), f"{reason.where}: {reason.part}")


if __name__ == "__main__":
    absltest.main()
