"""Imports go down, from room to room; and the rule notices one that does not."""

import contextlib
import functools
import io
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl.testing import absltest, parameterized

from tests import rooms

CODE = ("apr_jax", "converters", "tests", "tools")


class RoomsTest(parameterized.TestCase):
    def test_every_import_goes_down(self):
        found = _today()
        self.assertGreater(len(found), 100)
        self.assertEqual(rooms.violations(found), [])

    def test_converters_has_one_name(self):
        paths = [path for folder in CODE for path in sorted((rooms.ROOT / folder).rglob("*.py"))]
        self.assertGreater(len(paths), 150)
        self.assertEqual([line for path in paths for line in rooms.outside(path.read_text(), str(path))], [])

    def test_the_table_itself_is_without_circles_and_names_rooms_that_exist(self):
        self.assertEqual(rooms.circle(rooms.MAY_IMPORT), [])
        named = {module.room for module in _today()}
        self.assertLessEqual(set(rooms.MAY_IMPORT) - named, {"apr_jax.converters.workers"})

    @parameterized.named_parameters(
        ("upward", "converters/formats/new.py", "import apr_jax.converters.verify.wording"),
        ("of_a_name", "converters/storage/new.py", "from apr_jax.converters.checkpoint.tensor import Tensor"),
        ("of_a_module", "converters/storage/new.py", "from apr_jax.converters.checkpoint import tensor"),
        ("sideways", "converters/inspect/new.py", "from apr_jax.converters.convert import plan"),
        ("in_a_function", "converters/formats/new.py", "def f():\n    from apr_jax.converters.convert import plan"),
        ("for_types_only", "converters/formats/new.py", "if TYPE_CHECKING:\n    from apr_jax.converters import verify"),
        ("relative", "converters/verify/diagnosis/new.py", "from ...commands import cli"),
        ("of_the_model", "converters/commands/new.py", "from apr_jax.model import qwen2"),
        ("of_the_front", "converters/commands/new.py", "from apr_jax import load_model"),
        ("of_jax", "converters/inspect/new.py", "import jax.numpy as jnp"),
        ("of_torch_in_a_function", "converters/inspect/new.py", "def f():\n    from torch import nn"),
        ("of_errors_own_room", "converters/errors.py", "from apr_jax.converters.storage import crc"),
        ("parity_of_generate", "apr_jax/parity/new.py", "from apr_jax.generate import sampling"),
        ("generate_of_parity", "apr_jax/generate/new.py", "from apr_jax.parity import dumps"),
        ("load_of_cuda", "apr_jax/load/new.py", "from apr_jax.cuda import nvrtc"),
        ("trace_of_model", "apr_jax/trace/new.py", "from apr_jax.model import qwen2"),
        ("of_testing", "apr_jax/generate/new.py", "from apr_jax.testing import sample"),
        ("library_of_commands", "apr_jax/bench/new.py", "from apr_jax.converters.commands import cli"),
        ("front_of_commands", "apr_jax/__init__.py", "from apr_jax.commands import golden"),
        ("no_room", "apr_jax/new.py", "import numpy"),
        ("no_room_below_converters", "converters/names/new.py", "import numpy"),
        ("re_export", "converters/storage/__init__.py", '"""Files."""\nimport numpy'),
    )
    def test_a_planted_import_is_noticed(self, path, text):
        planted = self._planted(path, text)
        found = rooms.violations([*_sound(), planted])
        self.assertLen(found, 1, found)
        self.assertStartsWith(found[0], path)

    @parameterized.named_parameters(
        ("down", "converters/verify/new.py", "from apr_jax.converters.formats import dtypes"),
        ("own_room", "converters/verify/new.py", "from apr_jax.converters.verify import wording"),
        ("own_room_relative", "converters/verify/diagnosis/new.py", "from ..wording import cause_in_words"),
        ("numpy", "converters/verify/new.py", "import numpy as np"),
        ("converters", "apr_jax/trace/new.py", "from apr_jax.converters.storage import output"),
        ("commands", "apr_jax/commands/new.py", "from apr_jax.converters.commands import cli"),
        ("testing", "apr_jax/bench/new.py", "from apr_jax.testing import sample"),
    )
    def test_an_allowed_import_is_not(self, path, text):
        self.assertEqual(rooms.violations([*_sound(), self._planted(path, text)]), [])

    def test_circles_are_noticed_within_a_room_too(self):
        one = self._planted("converters/verify/one.py", "from apr_jax.converters.verify import two")
        two = self._planted("converters/verify/two.py", "def f():\n    from apr_jax.converters.verify.one import x")
        (found,) = rooms.violations([one, two])
        self.assertStartsWith(found, "a circle of modules")
        low = self._planted("converters/storage/low.py", "from apr_jax.converters.verify import high")
        high = self._planted("converters/verify/high.py", "from apr_jax.converters.storage import low")
        self.assertIn("a circle of rooms", "\n".join(rooms.violations([low, high])))

    @parameterized.parameters("import converters", "from converters.formats import dtypes", "import converters.errors")
    def test_the_other_name_of_converters_is_noticed(self, text):
        self.assertLen(rooms.outside(text, "tests/x.py"), 1)
        self.assertEqual(rooms.outside("from apr_jax.converters import errors", "tests/x.py"), [])

    def test_the_command_prints_the_tree_and_fails_on_what_is_wrong(self):
        for planted, code in ((), 0), ([self._planted("converters/storage/new.py", "import apr_jax.model")], 1):
            out, err = io.StringIO(), io.StringIO()
            with (
                mock.patch.object(rooms, "modules", return_value=[*_today(), *planted]),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                self.assertEqual(rooms.main(), code)
            self.assertEqual("storage/new.py" in err.getvalue(), bool(planted))
            for room in ("storage", "checkpoint", "trace", "generate"):
                self.assertRegex(out.getvalue(), rf"(?m)^  {room} +\d+ modules +\d+ lines")

    def _planted(self, path: str, text: str) -> rooms.Module:
        root = pathlib.Path(self.create_tempdir().full_path)
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text(text + "\n")
        (module,) = rooms.modules(root)
        return module


@functools.cache
def _today() -> list[rooms.Module]:
    return rooms.modules()


@functools.cache
def _sound() -> list[rooms.Module]:
    """Returns the modules of today, without what they import: a planted import has somewhere to lead."""
    return [rooms.Module(module.name, module.path, "") for module in _today()]


if __name__ == "__main__":
    absltest.main()
