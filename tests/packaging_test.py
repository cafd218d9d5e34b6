"""What is installed: a wheel with `apr_jax` and nothing else at the top, which runs beside a folder `converters`."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest
from absl.testing import absltest

from tests import paths

pytestmark = pytest.mark.slow

EXPORTS = """
import apr_jax
for name in apr_jax.__all__:
    getattr(apr_jax, name)
print(apr_jax.open_checkpoint("model.apr").kind, apr_jax.__file__)
"""
BUILD = "from setuptools import build_meta; import sys; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(what: str, source: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Builds a "wheel" or an "sdist" as pip does, with the setuptools of this environment; returns the file."""
    output.mkdir()
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = output.iterdir()
    return made


def content(wheel: pathlib.Path) -> dict[str, bytes]:
    """Returns what a wheel installs beside its own metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


class PackagingTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.scratch = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        # A copy: setuptools leaves a folder build/ behind, of which later wheels would take what is there no more.
        cls.source = cls.scratch / "source"
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("apr_jax", "converters"):
            shutil.copytree(paths.ROOT / name, cls.source / name, symlinks=True, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(paths.ROOT / name, cls.source)
        cls.wheel = build("wheel", cls.source, cls.scratch / "wheel")

    def test_the_wheel_is_apr_jax_with_every_module_once(self):
        expected = {"apr_jax/py.typed"}
        for kind in ("*.py", "*.cu", "web/*", "schema_files/*"):
            expected |= {path.relative_to(self.source).as_posix() for path in (self.source / "apr_jax").rglob(kind)}
            inside = {path.relative_to(self.source) for path in (self.source / "converters").rglob(kind)}
            expected |= {f"apr_jax/{path.as_posix()}" for path in inside}
        found = content(self.wheel)
        self.assertSameElements(found, expected)
        self.assertGreater(sum(name.startswith("apr_jax/converters/") for name in found), 40)
        self.assertEqual(found["apr_jax/converters/errors.py"], (self.source / "converters" / "errors.py").read_bytes())

    def test_a_source_archive_gives_the_same_wheel(self):
        archive = build("sdist", self.source, self.scratch / "sdist")
        with tarfile.open(archive) as file:
            self.assertEmpty([member.name for member in file if not (member.isfile() or member.isdir())])
            file.extractall(self.scratch / "extracted", filter="data")
        (source,) = (self.scratch / "extracted").iterdir()
        wheel = build("wheel", source, self.scratch / "wheel-of-sdist")
        self.assertEqual(content(wheel), content(self.wheel))

    def test_the_installed_wheel_runs_beside_a_folder_named_converters(self):
        site = self.scratch / "site"
        install = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(self.wheel)]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
        self.assertSameElements({path.name.split("-")[0] for path in site.iterdir()}, {"apr_jax", "bin"})
        folder = self.scratch / "elsewhere"
        (folder / "converters").mkdir(parents=True)
        (folder / "converters" / "__init__.py").write_text("raise ImportError('not the one that was meant')\n")
        # -S leaves .pth files out, and with them an editable install, which would find what the wheel lacks.
        others = [entry for entry in sys.path if entry and pathlib.Path(entry).resolve() != paths.ROOT]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *others])}

        def run(*command: str) -> str:
            command = [sys.executable, "-S", *command]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            return done.stdout

        program, name = str(site / "bin" / "apr-jax"), "gqa_tied_bf16"
        run(program, "convert", "--to", "apr", str(paths.checkpoint(name)), "-o", "model.apr")
        run(program, "verify", "model.apr", str(paths.checkpoint(name)))
        run(program, "golden", "model.apr", "--check", str(paths.golden(name)))
        # As in a session: the current folder stands first in sys.path.
        self.assertEqual(run("-c", EXPORTS).split(), ["apr", str(site / "apr_jax" / "__init__.py")])


if __name__ == "__main__":
    absltest.main()
