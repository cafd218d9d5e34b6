"""The pictures of docs/faults.md: a row for each mistake, red where the table of faults says that it is made."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.parity.faults import seen, table
from tests import paths
from tests.battery import fault_pictures, parity_battery
from tests.battery.faulty_forward import Planted

FAMILIES = [family for family in table.FAMILIES.values() if family is not seen]
NOWHERE = {"layout", "gradient-clipped"}
"""Every stage is right but for its order, every gradient but for the factor that all have in common."""
MOST_BYTES = 250_000


def rows(svg: str) -> dict[str, tuple[set[str], set[str]]]:
    """Returns mistake -> the stages that have a pale bar, and those that have a red one."""
    columns = re.findall(r'translate\((\d+) \d+\)rotate\(-90\)">([^<]+)<', svg)
    stages = {(int(x) - fault_pictures.LABEL) // fault_pictures.COLUMN: name for x, name in columns}
    found = {}
    for name, rest in re.findall(r'<text x="2" y="\d+">([^<]+)</text>(.*?)(?=<text x="2"|</svg>)', svg, re.DOTALL):
        bars = []
        for kind in "to":
            (path,) = re.findall(f'class="{kind}" d="([^"]+)"', rest) or [""]
            at = (int(x) - fault_pictures.LABEL for x in re.findall(r"M(\d+) ", path))
            bars.append({stages[x // fault_pictures.COLUMN] for x in at})
        found[name] = tuple(bars)
    return found


class PicturesTest(parameterized.TestCase):
    @parameterized.named_parameters((family.__name__.rpartition(".")[2], family) for family in FAMILIES)
    def test_every_mistake_has_a_row_and_is_red_where_it_is_made(self, family):
        found = rows((paths.ROOT / "docs" / table.picture(family)).read_text())
        self.assertEqual(set(found), {fault.name for fault in family.FAULTS})
        for fault in family.FAULTS:
            pale, red = found[fault.name]
            self.assertNotEmpty(pale | red, fault.name)
            if fault.name not in NOWHERE:
                self.assertNotEmpty(red, fault.name)
            if not callable(fault.stages) and not fault.multiplies and family.__name__.endswith((".rope", ".norms")):
                self.assertContainsSubset(red, fault.stages, fault.name)

    def test_they_are_small(self):
        sizes = [(paths.ROOT / "docs" / table.picture(family)).stat().st_size for family in FAMILIES]
        self.assertLess(sum(sizes), MOST_BYTES)

    @pytest.mark.slow
    def test_they_are_drawn_as_they_stand_in_docs(self):
        bench = parity_battery.Bench.of(parity_battery.CONFIGS[0])
        for name, parameters, file in (
            ("rope-theta", {"theta": 1e4}, "faults-rope.svg"),
            ("rms-norm-eps", {"eps": 1e-5}, "faults-norms.svg"),
        ):
            drawn = fault_pictures.drawn(
                "one", {name: fault_pictures.forward_errors(bench, Planted(name, None, parameters))}
            )
            self.assertEqual(rows(drawn)[name], rows((paths.ROOT / "docs" / file).read_text())[name])


if __name__ == "__main__":
    absltest.main()
