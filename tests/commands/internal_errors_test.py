"""A mistake of our own: one line, exit code 70 and the name of a log, wherever it happens, whatever the command."""

import json
import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.commands.entry import COMMANDS
from tests import paths

# What stands in for a command's module; `entry` finds it as it would find the real one.
_STARTED = """
import sys, types
sys.path.insert(0, sys.argv[1])
{prepare}
from apr_jax.commands import entry
from apr_jax.converters.commands import arguments
module = types.ModuleType(entry.COMMANDS[sys.argv[2]][0])
def parse(argv):
    parser = arguments.make_parser("test", "")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv[1:])
module.parse = parse
module.main = lambda args: 0
{plant}
sys.modules[module.__name__] = module
sys.argv = ["apr-jax", *sys.argv[2:]]
entry.run()
"""
_WRONG = {
    "in main": "def main(args): return {}['no such key\\x1b\\nand a second line']\nmodule.main = main",
    "while parsing": "def parse(argv): return int('x')\nmodule.parse = parse",
    "past Exception, as native code does": "class PanicException(BaseException): pass\n"
    "def main(args): raise PanicException('index out of bounds')\nmodule.main = main",
    "too deep": "def main(args): return main(args)\nmodule.main = main",
    "an assertion": "def main(args): assert False\nmodule.main = main",
}
_IMPORT = "entry.COMMANDS[sys.argv[2]] = ('no_such_module_anywhere', '')\n"


def started(
    command: str, plant: str, *options: str, prepare: str = "", **settings: object
) -> subprocess.CompletedProcess:
    code = _STARTED.format(plant=plant, prepare=prepare)
    program = [sys.executable, "-c", code, str(paths.ROOT), command, *options]
    return subprocess.run(program, check=False, **{"capture_output": True, "text": True, **settings})


class InternalErrorsTest(parameterized.TestCase):
    def check(self, done: subprocess.CompletedProcess, as_json: bool = False) -> str:
        """Checks the one line and the log; returns the log."""
        self.assertEqual(done.returncode, 70, done.stderr)
        self.assertLen(done.stderr.splitlines(), 1, done.stderr)
        self.assertNotRegex(done.stderr, "\x1b|Traceback")
        (log,) = re.findall(r"^internal error: .*; the traceback is in (\S+)$", done.stderr.strip())
        text = pathlib.Path(log).read_text()
        self.assertEqual(os.stat(log).st_mode & 0o077, 0, "paths and names are nobody else's business")
        os.unlink(log)
        self.assertIn("Traceback", text)
        if as_json:
            error = json.loads(done.stdout)["error"]
            self.assertEqual((error["code"], error["log"]), ("internal", log))
        else:
            self.assertEqual(done.stdout, "")
        return text

    @parameterized.parameters(*COMMANDS)
    def test_every_command(self, command):
        self.assertIn("KeyError", self.check(started(command, _WRONG["in main"])))

    @parameterized.product(where=list(_WRONG), options=[(), ("--json",)])
    def test_wherever_it_happens(self, where, options):
        self.check(started("verify", _WRONG[where], *options), as_json=bool(options))

    def test_a_module_that_cannot_be_imported(self):
        done = started("verify", _IMPORT)
        self.assertIn("Not all that apr_jax needs is installed", done.stderr)
        self.assertIn("no_such_module_anywhere", self.check(done))

    def test_where_no_log_can_be_written(self):
        # The folders that tempfile tries, and then the one that the process is in.
        missing = "import tempfile\ntempfile.tempdir = '/nowhere/at/all'"
        done = started("verify", _WRONG["in main"], prepare=missing)
        self.assertEqual(done.returncode, 70)
        self.assertRegex(done.stderr, r"^internal error: KeyError: .*the traceback could not be kept \(No such file")
        self.assertLen(done.stderr.splitlines(), 1)

    @parameterized.parameters("convert", "show")
    def test_help_that_cannot_be_written_is_an_error_of_the_disk(self, command):
        tool = str(paths.ROOT / "tools" / f"{command}.py")
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, tool, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        self.assertEqual(done.returncode, 7, done.stderr)
        self.assertRegex(done.stderr, "^error: stdout: the output cannot be written: No space")
        self.assertLen(done.stderr.splitlines(), 1)


if __name__ == "__main__":
    absltest.main()
