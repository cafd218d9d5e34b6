"""Every case is refused with its code, or accepted, within 100 ms and 50 MB beyond its text, and leaves no output."""

import ast
import gc
import os
import pathlib
import platform
import re
import sys
import tempfile
import time
import tracemalloc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
    StorageError,
    UsageError,
)
from tests import paths
from tests.hostile import cases
from tests.hostile.cases import Case
from tests.hostile.every_case import CASES

MEMORY_BYTES = 50 << 20
SECONDS, BYTES_A_SECOND = 0.1, 50e6
# Other processes compute on the same cores.
PATIENCE = 10
LISTED = range(1, 141)
"""The numbers of the list of bad inputs."""
_SOURCE, _RUN = "converters/storage/source_test.py::test_", "converters/convert/run_test.py::test_"
_OUTPUT = "converters/storage/output_test.py::test_"
ELSEWHERE = {
    7: _SOURCE + "a_file_replaced_by_a_rename_goes_on_being_read",
    13: _RUN + "no_file_that_the_source_consists_of_can_be_the_output",
    124: "converters/checkpoint/hub_test.py::test_urls_that_name_nothing",
    125: _RUN + "overflow_is_refused_with_names_and_counts_and_allowed_on_request",
    126: "converters/formats/casts_test.py::test_vanishing_values_are_counted",
    127: "converters/formats/casts_test.py::test_every_value_rounds_once_to_nearest_even",
    129: _RUN + "tensors_that_are_not_plain_floats_are_refused_by_name",
    130: "load/save_test.py::test_what_cannot_be_written_says_why",
    131: "load/save_test.py::test_the_base_itself_can_be_replaced",
    132: _RUN + "every_form_of_a_tied_head_gives_the_huggingface_tensors_back",
    133: _OUTPUT + "existing_output_is_refused_without_force_and_replaced_with_it_keeping_its_mode",
    134: _OUTPUT + "a_disk_that_fills_up_leaves_nothing_and_says_how_much_is_missing",
    135: _OUTPUT + "a_file_size_limit_leaves_nothing_behind",
    136: _RUN + "kill_9_at_ten_moments_each",
    137: _OUTPUT + "two_writers_of_one_output_do_not_disturb_each_other",
    138: _OUTPUT + "permissions_are_all_that_the_umask_leaves",
    139: _OUTPUT + "short_writes_are_continued",
    140: "converters/formats/safetensors_format_test.py::test_refuses",
}
"""Numbers that no single file can be: the test of each, under tests/."""


def size_of(path: pathlib.Path) -> int:
    """Returns the bytes of a file, or of the files of a folder."""
    # os.path: pathlib raises where a name is too long.
    within = path.rglob("*") if os.path.isdir(path) else [path]
    files = [file for file in within if os.path.isfile(file)]
    return sum(file.stat().st_size for file in files)


def measured(case: Case, path: pathlib.Path) -> tuple[AprJaxError | None, float, int, int]:
    """Opens a case; returns the error, processor time, the most memory that Python took, and the text's bytes."""
    text = size_of(path)
    tracemalloc.start()
    begun = time.process_time()
    try:
        found = case.opened(path)
    finally:
        seconds, memory = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found, seconds, memory, text


def report() -> str:
    """Returns every case with its outcome and cost as Markdown, the dearest first, and the numbers of the list."""
    rows = []
    # What the imports have left is looked through by no collection in the middle of a case.
    gc.collect()
    gc.freeze()
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            # Time is measured where nobody counts what is allocated, and on a file that nobody has opened.
            path = case.make(pathlib.Path(folder))
            begun = time.process_time()
            case.opened(path)
            seconds = time.process_time() - begun
        with tempfile.TemporaryDirectory() as folder:
            path = case.make(pathlib.Path(folder))
            found, _, memory, text = measured(case, path)
            where = "" if found is None else _where(found).replace(folder, "")
        rows.append((memory - text, seconds, case.name, "accepted" if found is None else found.code, text, where))
    worst, slowest = max(row[0] for row in rows), max((row for row in rows if row[4] < 1 << 20), key=lambda row: row[1])
    lines = [
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {os.cpu_count()} cores: {len(rows)} cases, "
        f"{sum(row[3] == 'accepted' for row in rows)} of them accepted. "
        f"Most memory beyond a text: {worst / 2**20:.1f} MB "
        f"(at most 50); the slowest below 1 MB: {1000 * slowest[1]:.0f} ms of processor time ({slowest[2]!a}).",
        "",
        "| case | outcome | where, found, expected | bytes | ms | MB beyond |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for memory, seconds, name, outcome, text, where in sorted(rows, reverse=True):
        cells = (ascii(name[:60])[1:-1], outcome, where, str(text), f"{1000 * seconds:.1f}", f"{memory / 2**20:.1f}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _where(error: AprJaxError) -> str:
    parts = [f"byte {error.offset}"] if error.offset is not None else []
    parts += [f"tensor {error.tensor[:30]!a}"] if error.tensor is not None else []
    parts += [
        f"{label} {str(value)[:60]!a}"
        for label, value in (("found", error.found), ("expected", error.expected))
        if value
    ]
    return ", ".join(parts)


def numbers_of(case: Case) -> set[int]:
    """Returns the numbers of the list that a case stands for: "97, 98-100 words"."""
    match = re.match(r"\d+([,-] ?\d+)*(?= )", case.name)
    ranges = [part.strip().split("-") for part in match[0].split(",")] if match else []
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}


class CasesTest(parameterized.TestCase):
    def test_every_number_of_the_list_has_a_case_or_a_test_elsewhere(self):
        numbers = set().union(*map(numbers_of, CASES))
        self.assertContainsSubset(numbers, LISTED)
        self.assertEqual(sorted(set(LISTED) - numbers - ELSEWHERE.keys()), [])
        self.assertEqual(sorted(numbers & ELSEWHERE.keys()), [], "these have cases")

    @parameterized.parameters(*ELSEWHERE.items())
    def test_what_is_tested_elsewhere_is_there(self, number, place):
        file, name = place.split("::")
        tree = ast.parse((paths.ROOT / "tests" / file).read_text())
        self.assertIn(name, {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, number)

    @parameterized.named_parameters((f"{number:03d} {case.name[:60]!a}", case) for number, case in enumerate(CASES))
    def test_case(self, case: Case):
        path = case.make(pathlib.Path(self.create_tempdir().full_path))
        found, seconds, memory, text = measured(case, path)
        self.assertIsNone(case.complaint(found))
        self.assertLess(memory - text, MEMORY_BYTES)
        self.assertLess(seconds, PATIENCE * (SECONDS + text / BYTES_A_SECOND))
        if found is not None:
            self.assertIsInstance(
                found, BrokenContainerError | RefusedError | MissingFileError | UsageError | StorageError
            )
            self.assertNotRegex(str(found), r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
        if found is not None and case.opens is cases.checkpoint:
            output = pathlib.Path(self.create_tempdir().full_path)
            to, name = (("apr", "out.apr"), ("safetensors", "out"))[len(case.name) % 2]
            with self.assertRaises(AprJaxError):
                convert(path, output / name, to=to)
            self.assertEqual(os.listdir(output), [])

    def test_options_open_what_they_should_and_nothing_else(self):
        refused = [case for case in CASES if case.codes and case.opens is cases.checkpoint]
        self.assertGreater(len(refused), 300)
        opened = {"lenient": 0, "legacy": 0}
        for case in refused:
            path = case.make(pathlib.Path(self.create_tempdir().full_path))
            for option in opened if size_of(path) < 1 << 20 else ():
                found = case.opened(path, **{option: True})
                self.assertEqual(found is None, option in case.softened, f"{case.name} with --{option}: {found}")
                opened[option] += found is None
        self.assertGreater(opened["lenient"], 5)
        self.assertGreater(opened["legacy"], 2)


if __name__ == "__main__":
    if "--table" in sys.argv:
        (pathlib.Path(__file__).parent / "RESULTS.md").write_text(report())
    else:
        absltest.main()
