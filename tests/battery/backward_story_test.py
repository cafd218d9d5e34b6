"""docs/backward.md tells what its commands print: each is run, and each line that the page shows has to be there."""

import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from tests import paths, tool

pytestmark = pytest.mark.slow

PAGE = paths.ROOT / "docs" / "backward.md"


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Returns the commands of a page, each with the lines that the page shows of its output."""
    found: list[tuple[str, list[str]]] = []
    heredoc = False
    for line in re.findall(r"(?m)^    (.*)$", text):
        if line.startswith("$ "):
            found.append((line[2:], []))
            heredoc = "<<'END'" in line
        elif heredoc:
            found[-1] = (found[-1][0] + "\n" + line, [])
            heredoc = line != "END"
        else:
            found[-1][1].append(line.strip())
    return found


class StoryTest(absltest.TestCase):
    def test_every_command_prints_what_the_page_shows(self):
        told = commands(PAGE.read_text())
        self.assertGreaterEqual(len(told), 9)
        self.assertGreaterEqual(sum(len(lines) for _, lines in told), 9)
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for part in ("tests", "tools"):
                (folder / part).symlink_to(paths.ROOT / part)
            for command, lines in told:
                with self.subTest(command.splitlines()[0]):
                    printed = self.printed(command, folder)
                    for line in lines:
                        self.assertIn(line, printed)

    def printed(self, command: str, folder: pathlib.Path) -> str:
        words = shlex.split(command.splitlines()[0])
        if words[1].startswith("tools/"):
            done = tool.run(words[1].removeprefix("tools/").removesuffix(".py"), *words[2:], cwd=folder)
            self.assertIn(done.returncode, (0, 1), done.stderr)
        else:
            done = subprocess.run(
                ["bash", "-c", command.replace("python ", f"{sys.executable} ", 1)],
                cwd=folder,
                env={"PYTHONPATH": str(paths.ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
            )
            self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout


if __name__ == "__main__":
    absltest.main()
