"""Shells complete the words of `apr-jax`: its commands, their options, what an option chooses from, and files."""

import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.commands import completion
from apr_jax.commands.entry import COMMANDS
from tests import paths

# Source the script as a shell does, and press Tab behind the words.
TAB = """
source ./script
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
completer=$(complete -p apr-jax | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$completer apr-jax "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str) -> str:
    command = [sys.executable, "-m", "apr_jax", "completion", shell]
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=True).stdout


class CompletionTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bash = script("bash")

    @parameterized.named_parameters(
        ("commands", ["par"], ["parity"]),
        ("every_command", [""], list(COMMANDS)),
        ("options", ["generate", "--max"], ["--max-new-tokens"]),
        ("choices", ["convert", "a", "--to", ""], ["apr", "safetensors"]),
        ("a_command_of_two_words", ["checkpoint", "res"], ["restore"]),
        ("files", ["show", "mod"], ["model.apr"]),
        ("files_of_an_option", ["golden", "model.apr", "--check", "gol"], ["golden.safetensors"]),
    )
    def test_bash_completes(self, words, expected):
        folder = pathlib.Path(self.create_tempdir().full_path)
        for name in ("model.apr", "golden.safetensors"):
            (folder / name).touch()
        (folder / "script").write_text(self.bash)
        command = ["bash", "-c", TAB, "bash", "apr-jax", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        self.assertContainsSubset(expected, done.stdout.split(), done.stderr)
        self.assertTrue(all(word.startswith(words[-1]) for word in done.stdout.split()))

    @parameterized.parameters(*completion.SHELLS)
    def test_every_shell_has_a_script_that_it_can_read(self, shell):
        made = script(shell)
        for command in COMMANDS:
            self.assertIn(command, made)
        if (program := shutil.which(shell)) is not None:
            checked = subprocess.run([program, "-n"], input=made, capture_output=True, text=True)
            self.assertEqual(checked.returncode, 0, checked.stderr)

    def test_a_mistyped_shell(self):
        command = [sys.executable, "-m", "apr_jax", "completion", "bsh"]
        done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("Did you mean bash?", done.stderr)


if __name__ == "__main__":
    absltest.main()
