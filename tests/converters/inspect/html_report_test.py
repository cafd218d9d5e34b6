"""Which figures of a tensor the page marks; the page as a whole is tested with `show --html`."""

import base64
import hashlib
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.inspect import html_report, page, statistics
from apr_jax.converters.inspect.checks import Check

COLUMNS = ("mean", "std", "minimum", "maximum", "zeros", "nans", "infs", "relabelled", "dead rows", "bytes")


def measured(values: np.ndarray) -> statistics.Statistics:
    gathered = statistics.WideAccumulator(values.shape)
    gathered.add(values.ravel())
    return gathered.result()


def marked(values: np.ndarray) -> set[str]:
    """The figures that are marked in the row of a tensor."""
    row = html_report.TensorRow("x", "f32", values.shape, values.nbytes, measured(values))
    cells = re.findall(r'<td class="n( bad)?">', html_report._row(row).replace("class=n", 'class="n"'))
    assert len(cells) == len(COLUMNS), cells
    return {name for name, bad in zip(COLUMNS, cells, strict=True) if bad}


class MarksTest(parameterized.TestCase):
    @parameterized.parameters(
        (slice(None), 0.0, {"zeros", "dead rows"}),
        ((3, 3), np.nan, {"nans"}),
        ((3, 3), -np.inf, {"infs"}),
        (slice(0, 2), 0.0, {"dead rows"}),
        (0, 0.0, set()),
        (slice(0, 0), 0.0, set()),
    )
    def test_a_figure_that_a_trained_matrix_does_not_have_is_marked(self, where, value, expected):
        # A quarter of the rows is many.
        values = np.random.default_rng(0).normal(0, 0.02, (8, 64)).astype("<f4")
        values[where] = value
        self.assertEqual(marked(values), expected)

    def test_values_near_one_are_marked_in_a_matrix_and_not_in_a_vector(self):
        values = np.random.default_rng(0).choice([-1.5, -0.75, 0.75, 1.5], (8, 64)).astype("<f4")
        self.assertEqual(marked(values), {"relabelled"})
        self.assertEqual(marked(values.ravel()), set())
        self.assertEqual(marked(values * 0.1), set())

    def test_numbers_are_short_and_none_is_a_dash(self):
        numbers = (0.0, 1.25, -0.0123456, 1.5e-7, -3e7, np.nan, np.inf, -np.inf)
        shown = ["0", "1.25", "&minus;0.01235", "1.5e&minus;7", "&minus;3e7", *["&ndash;"] * 3]
        self.assertEqual([html_report._number(number) for number in numbers], shown)

    def test_nothing_is_marked_of_a_tensor_without_elements(self):
        self.assertEqual(marked(np.zeros((0, 4), "<f4")), set())


class ChecksTest(absltest.TestCase):
    def test_what_passed_is_folded_away_and_missing_where_nothing_did(self):
        failed, passed = (Check(name, name == "good", f"it is {name}") for name in ("bad", "good"))
        for checks, folded in (([failed], 0), ([failed, passed], 1)):
            shown = html_report._checks(checks)
            self.assertEqual(shown.count("<details>"), folded)
            self.assertIn("it is bad", shown)


class ScriptTest(absltest.TestCase):
    def test_a_page_may_run_its_own_script_and_no_other(self):
        script = "document.title = '1'"
        content = page.document("t", "b", script=script).decode()
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        self.assertIn(f"; script-src 'sha256-{digest}'\"", content)
        self.assertIn(f"<script>{script}</script>", content)
        self.assertNotIn("script", page.document("t", "b").decode())


class HistogramTest(absltest.TestCase):
    def test_bars_stand_where_the_band_and_the_line_say_and_are_as_high_as_their_share(self):
        first, last = (statistics.RELABEL_OCTAVES[at] for at in (0, -1))
        values = np.array([1.0] * 1000 + [2.0**first] * 500 + [2.0**last], "<f8")
        drawn = html_report._histogram(measured(values), False)
        ((x, width, height),) = re.findall(r'<rect x="(\d+)" width="(\d+)" height="(\d+)"/>', drawn)
        (one,) = re.findall(r'class="one" d="M(\d+) 0', drawn)
        bars = {int(at): (int(wide), float(high)) for at, high, wide in re.findall(r"M(\d+) 26v-([\d.]+)h(\d+)", drawn)}
        # A line between the bars is left free; what is there is seen.
        expected = {int(x): (3, int(height) / 2), int(x) + int(width) - 4: (3, 1.0), int(one): (3, float(height))}
        self.assertEqual(bars, expected)
        self.assertIn(f'viewBox="0 0 {4 * len(statistics.OCTAVES)} {height}"', drawn)


if __name__ == "__main__":
    absltest.main()
