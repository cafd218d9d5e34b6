"""Mutants are mistakes that can be seen, and the tests that are run for them are those that could see them."""

import contextlib
import io
import json
import os
import pathlib
import sys
import textwrap
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from tests.mutation import run
from tests.mutation.mutants import mutants
from tests.mutation.which_tests import WhichTests
from tests.paths import ROOT


def changed(source: str) -> list[str]:
    data = textwrap.dedent(source).encode()
    return [mutant.apply(data).decode() for mutant in mutants("x.py", data)]


class MutantsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("a < b", ["a <= b", "a >= b"]),
        ("a == b is not c", ["a != b is not c", "a == b is c"]),
        ("a not  in (b)", ["a in (b)"]),
        ("a and b and c", ["a or b and c", "a and b or c"]),
        ("é + (a - b)", ["é - (a - b)", "é + (a + b)"]),
        ("x[a:, :b]", ["x[(a) + 1:, :b]", "x[a:, :(b) + 1]"]),
        ("f(7, k=True)", ["pass", "f(8, k=True)", "f(6, k=True)", "f(7, k=False)"]),
        ("y = 0.5", ["y = 1.5", f"y = {0.5 / 3}"]),
        ("y = not a", ["y = a"]),
        ("y = a if b else c", ["y = a if not (b) else c"]),
        ("y = {a for a in b if c}", ["y = {a for a in b if not (c)}"]),
        ("y = min(a, b)", ["y = max(a, b)"]),
        ("x -= y", ["x += y"]),
    )
    def test_each_kind_of_mistake(self, source, expected):
        self.assertCountEqual(changed(source), expected)

    def test_statements_that_are_missing_and_results_that_are_not_returned(self):
        source = "def f(a):\n    if a:\n        raise E('no')\n    while a:\n        break\n    return g(a)\n"
        self.assertCountEqual(
            changed(source),
            [
                source.replace("if a:", "if not (a):"),
                source.replace("while a:", "while not (a):"),
                source.replace("raise E('no')", "pass"),
                source.replace("break", "pass"),
                source.replace("g(a)", "None"),
            ],
        )

    @parameterized.parameters(
        '"""A docstring of 3 lines, and so on."""',
        "x: int | None",
        "def f(a: T[3], *, b: int | float) -> list[1]: ...",
        "y = f'{a + 1:>{w - 2}} of {a < b}'",
        "@dataclass(frozen=True)\nclass C:\n    a: int = dataclasses.field(repr=False, compare=False)",
        "@functools.lru_cache(maxsize=8)\ndef f(): ...",
        "assert a < 3",
        "__all__ = ('a', 3)",
        "if TYPE_CHECKING:\n    f(3)",
        "if __name__ == '__main__':\n    f(3)",
        "y = zip(a, b, strict=True)",
        "y = f(hint=a + 3, found=x[:20])",
        "y = judge.broken('text', a < 3)",
        "y = 'text' + a",
        "y = '%d' % a",
        "def __repr__(self):\n    return f(a) + 3",
        "import a",
        "def f():\n    return None",
    )
    def test_what_nobody_could_see_is_left_alone(self, source):
        self.assertEqual(changed(source), [])

    def test_of_an_error_only_that_it_is_raised_is_changed(self):
        self.assertEqual(changed("raise BrokenError('a', offset=x + 3, found=y[:3])"), ["pass"])

    def test_a_survivor_is_told_with_its_operands_and_its_line(self):
        (first, _) = mutants("a/b.py", b"x = (\n    y\n    < z)\n")
        self.assertEqual(str(first), "a/b.py:3: y < z -> y <= z")


class WhichTestsTest(absltest.TestCase):
    def tree(self, **files):
        root = pathlib.Path(self.create_tempdir().full_path)
        for name, text in files.items():
            path = root / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return WhichTests(root)

    def test_tests_that_import_a_module_or_have_its_name_come_first_and_then_those_of_its_importers(self):
        which = self.tree(
            converters__storage__output="",
            converters__storage__other="",
            converters__plan="def f():\n    from apr_jax.converters.storage import output\n",
            tests__converters__storage__output_test="",
            tests__converters__zip_test="import apr_jax.converters.storage.output\n"
            "from apr_jax.converters.storage import other",
            tests__apr_jax__output_test="",
            tests__helper="from apr_jax.converters.plan import f",
            tests__converters__far_test="from tests import helper",
            tests__reference__output_test="from apr_jax.converters.storage import output",
        )
        self.assertEqual(
            list(which.by_distance("converters/storage/output.py")),
            [
                ["tests/converters/storage/output_test.py", "tests/converters/zip_test.py"],
                ["tests/converters/far_test.py"],
            ],
        )
        self.assertEqual(list(which.by_distance("converters/storage/other.py")), [["tests/converters/zip_test.py"]])

    def test_a_command_that_is_only_run_is_reached_by_its_name(self):
        which = self.tree(
            converters__report="",
            converters__commands__show="from apr_jax.converters import report",
            tests__commands__show_test="import subprocess",
        )
        self.assertEqual(list(which.by_distance("converters/report.py")), [["tests/commands/show_test.py"]])

    def test_nearly_every_module_of_this_tree_has_tests(self):
        which = WhichTests(ROOT)
        for path in ("converters", "apr_jax"):
            files = [file for file in (ROOT / path).rglob("*.py") if not set(file.parts) & run.LEFT_OUT.keys()]
            untested = [file.name for file in files if not list(which.by_distance(file.relative_to(ROOT).as_posix()))]
            self.assertLessEqual(set(untested), {"__init__.py", "__main__.py", "entry.py"})


_SOURCE = "def larger(a, b):\n    return a > b\n\n\ndef spare(a):\n    return a - 1\n"
_TEST = (
    "from apr_jax.converters.sized import larger\n\n\ndef test_it():\n    assert larger(2, 1) and not larger(1, 1)\n"
)


class RunTest(absltest.TestCase):
    def test_survivors_are_told_and_what_is_known_is_not_run_again(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        output = folder / "results.jsonl"

        def two_files(target):
            for name, text in {
                "converters/sized.py": _SOURCE,
                "tests/sized_test.py": _TEST,
                "apr_jax/__init__.py": "",
            }.items():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_text(text)
            (target / "apr_jax" / "converters").symlink_to("../converters")
            (target / "pytest.ini").write_text("[pytest]\npython_files = *_test.py\npythonpath = .\n")

        def ran():
            printed = io.StringIO()
            # Importing hypothesis and xdist takes longer than everything else that pytest does here.
            bare = mock.patch.dict(os.environ, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
            with mock.patch.object(run, "copy_tree", two_files), contextlib.redirect_stdout(printed), bare:
                code = run.main(["--count", "99", "--jobs", "2", "--output", str(output)])
            return code, printed.getvalue()

        code, text = ran()
        self.assertEqual(code, 1)
        # Of both functions: two comparisons and a result; a sum, two numbers and a result.
        self.assertIn("killed: 3 of 7, 42.9%", text)
        self.assertIn("converters/sized.py:6: a - 1 -> a + 1\n", text)
        self.assertNotIn("sized.py:2", text.partition("survivors:")[2])
        before = output.read_text()
        with mock.patch.object(run.Tree, "run", side_effect=AssertionError("run again")):
            self.assertEqual(ran()[1], text)
        self.assertEqual(output.read_text(), before)
        self.assertTrue(all(json.loads(line)["key"] for line in before.splitlines()))


class AgainTest(absltest.TestCase):
    def test_what_survived_is_found_where_it_stands_now_and_what_is_gone_is_said(self):
        root = pathlib.Path(self.create_tempdir().full_path)
        (root / "converters").mkdir()
        (root / "apr_jax").mkdir()
        (root / "converters" / "sized.py").write_text("# moved down\n\n" + _SOURCE)
        results = root / "results.jsonl"
        entries = [
            {"key": "takes tests/sized_test.py", "seconds": 1.0},
            {"key": "1", "mutant": "converters/sized.py:6: a - 1 -> a + 1", "killed_by": None},
            {"key": "2", "mutant": "converters/sized.py:2: a > b -> a >= b", "killed_by": "tests/sized_test.py"},
            {"key": "3", "mutant": "converters/sized.py:9: a * 2 -> a / 2", "killed_by": None},
        ]
        results.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            found = run.survivors_of(root, results)
        self.assertEqual([str(mutant) for mutant in found], ["converters/sized.py:8: a - 1 -> a + 1"])
        self.assertEqual(printed.getvalue(), "gone: converters/sized.py:9: a * 2 -> a / 2\n")


if __name__ == "__main__":
    absltest.main()
