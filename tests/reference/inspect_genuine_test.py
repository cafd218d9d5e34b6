"""Every file that the genuine `apr` wrote, looked at alone: which checks fail, and that nothing else does.

The files come from $APR_FIXTURES, or are `shared/fixtures` beside the repository; without them the tests are skipped.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.inspect.checks import inspect
from tests.paths import fixtures

FIXTURES = fixtures()
HEAD = "lm_head.weight"

# What `apr` 0.72.3 does wrong, file by file; every file that is not listed is right.
FAILURES = {
    "tiny_bf16_tied/apr/plain.apr": "placeholder-head",
    "k256_bf16_tied/apr/plain.apr": "placeholder-head",
    "tiny_f16_untied/apr/plain.apr": "falsely-tied",
}
NOTES = {"model-type", "param-count", "rope-theta"}


@absltest.skipUnless(FIXTURES, "no genuine files; set APR_FIXTURES")
class InspectGenuineTest(absltest.TestCase):
    def test_the_defects_of_genuine_files_are_found_and_nothing_else_is(self):
        assert FIXTURES is not None
        files = sorted((FIXTURES / "genuine").glob("*/apr/*.apr"))
        listed = set()
        for path in files:
            name = str(path.relative_to(FIXTURES / "genuine"))
            with self.subTest(name), open_checkpoint(path) as opened:
                checks = inspect(opened)
                failed = [check for check in checks if check.passed is False]
                self.assertEqual([check.name for check in failed], [FAILURES[name]] if name in FAILURES else [])
                for check in failed:
                    print(f"{name}: {check.sentence}")
                    self.assertEqual(check.tensors, (HEAD,))
                    self.assertIn(HEAD, check.sentence)
                    self.assertNotIn("\n", check.sentence)
                    listed.add(name)
                self.assertLessEqual({check.name for check in checks if check.severity == "note"}, NOTES)
                # Everything was looked at, the quantised values too.
                self.assertEmpty([check.sentence for check in checks if check.passed is None])
                self.assertGreaterEqual(sum(check.passed is True for check in checks), 14)
        self.assertEqual(listed, set(FAILURES))
        self.assertGreaterEqual(len(files), 18)

    def test_what_apr_says_of_its_import_is_noted(self):
        assert FIXTURES is not None
        seen = {}
        for path in (FIXTURES / "genuine").glob("*/apr/plain.apr"):
            with open_checkpoint(path) as opened:
                notes = [check for check in inspect(opened) if check.severity == "note"]
            seen[path.parents[1].name] = {check.name for check in notes}
        # In memory the architecture option is written as the model's type, streaming no count at all.
        self.assertIn("model-type", seen["tiny_bf16_tied"])
        self.assertIn("param-count", seen["tiny_bf16_tied_sharded"])
        self.assertIn("rope-theta", seen["tiny_f16_untied"])

    def test_the_folders_that_they_were_made_of_are_clean(self):
        assert FIXTURES is not None
        folders = sorted((FIXTURES / "genuine").glob("*/hf"))
        for folder in folders:
            with self.subTest(folder.parent.name), open_checkpoint(folder) as opened:
                failed = [check.sentence for check in inspect(opened) if check.passed is False]
                self.assertEmpty(failed)
        self.assertGreaterEqual(len(folders), 6)


if __name__ == "__main__":
    absltest.main()
