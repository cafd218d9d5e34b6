"""Every case is refused with its code, or accepted, within 100 ms and 50 MB beyond its text, and leaves no output."""

import os
import pathlib
import re
import sys
import tempfile
import time
import tracemalloc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
)
from tests.hostile.cases import CASES, Case

MEMORY_BYTES = 50 << 20
SECONDS, BYTES_A_SECOND = 0.1, 50e6
# Other processes compute on the same cores.
PATIENCE = 10


def size_of(path: pathlib.Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def measured(path: pathlib.Path) -> tuple[AprJaxError | None, float, int, int]:
    """Opens a checkpoint; returns the error, processor time, the most memory that Python took, and the text's bytes."""
    text = size_of(path)
    tracemalloc.start()
    begun = time.process_time()
    try:
        open_checkpoint(path).close()
        found = None
    except AprJaxError as error:
        found = error
    finally:
        seconds, memory = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found, seconds, memory, text


def print_table() -> None:
    """Prints every case with its outcome and cost, the dearest last."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found, seconds, memory, text = measured(case.make(pathlib.Path(folder)))
        rows.append((memory - text, seconds, case.name, "accepted" if found is None else found.code, text))
    for memory, seconds, name, outcome, text in sorted(rows):
        print(
            f"{name[:48]!a:52} {outcome:20} {text:>10} bytes {1000 * seconds:7.1f} ms {memory / 2**20:7.1f} MB beyond"
        )
    print(f"{len(rows)} cases; the slowest takes {max(1000 * row[1] for row in rows):.0f} ms")


class CasesTest(parameterized.TestCase):
    def test_every_number_of_the_list_that_a_file_can_be_is_there(self):
        prefixes = [re.match(r"\d+([,-] ?\d+)*", case.name)[0] for case in CASES]
        ranges = [part.strip().split("-") for prefix in prefixes for part in prefix.split(",")]
        numbers = {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}
        self.assertGreater(len(CASES), 200)
        self.assertContainsSubset({1, 2, 3, 4, *range(14, 18), *range(20, 35), *range(53, 68)}, numbers)
        self.assertContainsSubset(
            {*range(68, 71), *range(77, 93), *range(100, 106), 111, 112, 114, 115, 116, 123}, numbers
        )

    @parameterized.named_parameters((f"{number:03d} {case.name[:60]!a}", case) for number, case in enumerate(CASES))
    def test_case(self, case: Case):
        path = case.make(pathlib.Path(self.create_tempdir().full_path))
        found, seconds, memory, text = measured(path)
        if case.codes is None:
            self.assertIsNone(found)
        else:
            self.assertIsInstance(found, BrokenContainerError | RefusedError | MissingFileError)
            self.assertIn(found.code, case.codes, str(found))
            self.assertStartsWith(found.file, str(path))
            self.assertNotRegex(str(found), r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
        self.assertLess(memory - text, MEMORY_BYTES + text)
        self.assertLess(seconds, PATIENCE * (SECONDS + text / BYTES_A_SECOND))
        if case.codes is not None:
            output = pathlib.Path(self.create_tempdir().full_path)
            for to, name in (("apr", "out.apr"), ("safetensors", "out")):
                with self.assertRaises(AprJaxError):
                    convert(path, output / name, to=to)
            self.assertEqual(os.listdir(output), [])


if __name__ == "__main__":
    print_table() if "--table" in sys.argv else absltest.main()
