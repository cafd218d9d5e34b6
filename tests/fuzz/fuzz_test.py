"""The inputs from which fuzzing starts, and those that it found: no reader crashes at them, and most are accepted."""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from tests.fuzz import fuzz, targets

FOUND = pathlib.Path(__file__).resolve().parent / "found"
"""Inputs that were crashes once, READER/NAME."""
INPUTS = sorted([*fuzz.SEEDS.glob("*/*"), *FOUND.glob("*/*")])


class FuzzTest(parameterized.TestCase):
    def test_every_reader_has_seeds_and_every_seed_a_reader(self):
        self.assertSameElements(fuzz.NAMES, targets.TARGETS)
        self.assertGreater(len(INPUTS), 50)

    @parameterized.named_parameters((f"{path.parent.name}_{path.name}", path) for path in INPUTS)
    def test_no_crash(self, path):
        with tempfile.TemporaryDirectory() as folder:
            targets.TARGETS[path.parent.name].opens(path.read_bytes(), pathlib.Path(folder))

    def test_a_crash_is_noticed(self):
        with (
            self.assertRaisesRegex(AssertionError, "refuses what is accepted here"),
            tempfile.TemporaryDirectory() as folder,
        ):
            whole = (fuzz.SEEDS / "safetensors" / "types").read_bytes()
            with absltest.mock.patch.object(
                targets.safetensors, "deserialize", side_effect=targets.safetensors.SafetensorError("x")
            ):
                targets.TARGETS["safetensors"].opens(whole, pathlib.Path(folder))


if __name__ == "__main__":
    absltest.main()
