"""What is installed: a wheel with `apr_jax` and nothing else at the top, which runs beside a folder `converters`.

Without extras it brings what converts, verifies, shows and captures; what needs more says what to install. The source
archive holds the tests and what they need.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from importlib import metadata

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import pytest
from absl.testing import absltest
from packaging.requirements import Requirement

from apr_jax.converters.errors import EXTRAS
from tests import paths

pytestmark = pytest.mark.slow

EXPORTS = """
import apr_jax
for name in apr_jax.__all__:
    getattr(apr_jax, name)
print(apr_jax.open_checkpoint("model.apr").kind, apr_jax.__file__)
"""
CAPTURES = """
import numpy as np
import apr_jax
apr_jax.capture.arrays("dump", np.zeros((1, 2), np.int32), {"logits": np.zeros((1, 2, 288), np.float32)})
try:
    apr_jax.load_model
except ImportError as error:
    print(error)
"""
BUILD = "from setuptools import build_meta; import sys; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def source_copy(scratch: pathlib.Path) -> pathlib.Path:
    """Copies what packages are built from: setuptools leaves a folder build/ behind, of which later ones would take."""
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".venv", ".*_cache", ".hypothesis", "build", "*.egg-info")
    return pathlib.Path(shutil.copytree(paths.ROOT, scratch / "source", symlinks=True, ignore=ignored))


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


def install(wheel: pathlib.Path, site: pathlib.Path) -> None:
    """Installs a wheel into a folder, nothing that it needs with it."""
    command = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, capture_output=True)


def requirements(distribution: metadata.Distribution) -> set[str]:
    """Returns the names of what a distribution needs here, no extra asked for, and what that needs."""
    found = set()
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= {requirement.name, *requirements(metadata.distribution(requirement.name))}
    return found


def link(name: str, site: pathlib.Path) -> None:
    """Puts a distribution of this environment into another one."""
    distribution = metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        (site / top).symlink_to(pathlib.Path(str(distribution.locate_file(top))))


def run(test: absltest.TestCase, command: list[str], folder: pathlib.Path, *places: str, code: int = 0) -> str:
    """Runs a Python that imports from `places` and from its own library alone; returns all that it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    # -S leaves .pth files out, and with them an editable install, which would find what the wheel lacks.
    command = [sys.executable, "-S", *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    test.assertEqual(done.returncode, code, done.stdout + done.stderr)
    return done.stdout + done.stderr


class PackagingTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.scratch = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.source = source_copy(cls.scratch)
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

    def test_a_source_archive_gives_the_same_wheel_and_can_be_tested(self):
        copy = source_copy(self.scratch / "unbuilt")
        of_copy = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
        archive = build("sdist", copy, self.scratch / "sdist")
        with tarfile.open(archive) as file:
            self.assertEmpty([member.name for member in file if not (member.isfile() or member.isdir())])
            file.extractall(self.scratch / "extracted", filter="data")
        (source,) = (self.scratch / "extracted").iterdir()
        of_archive = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        self.assertEmpty(sorted(map(str, of_copy - of_archive))[:9])
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/rooms_test.py",
            "tests/converters/formats/dtypes_test.py",
        ]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
        self.assertEqual(done.returncode, 0, done.stdout)
        wheel = build("wheel", source, self.scratch / "wheel-of-sdist")
        self.assertEqual(content(wheel), content(self.wheel))

    def test_the_installed_wheel_runs_beside_a_folder_named_converters(self):
        site = self.scratch / "site"
        install(self.wheel, site)
        self.assertSameElements({path.name.split("-")[0] for path in site.iterdir()}, {"apr_jax", "bin"})
        folder = self.scratch / "elsewhere"
        (folder / "converters").mkdir(parents=True)
        (folder / "converters" / "__init__.py").write_text("raise ImportError('not the one that was meant')\n")
        others = [entry for entry in sys.path if entry and pathlib.Path(entry).resolve() != paths.ROOT]
        program, name = str(site / "bin" / "apr-jax"), "gqa_tied_bf16"
        for command in (
            [program, "convert", "--to", "apr", str(paths.checkpoint(name)), "-o", "model.apr"],
            [program, "verify", "model.apr", str(paths.checkpoint(name))],
            [program, "golden", "model.apr", "--check", str(paths.golden(name))],
        ):
            run(self, command, folder, str(site), *others)
        # As in a session: the current folder stands first in sys.path.
        printed = run(self, ["-c", EXPORTS], folder, str(site), *others)
        self.assertEqual(printed.split(), ["apr", str(site / "apr_jax" / "__init__.py")])


class BaseInstallTest(absltest.TestCase):
    def test_it_converts_verifies_shows_and_captures_and_says_how_to_get_the_rest(self):
        scratch = pathlib.Path(self.create_tempdir().full_path)
        wheel = build("wheel", source_copy(scratch), scratch / "wheel")
        site, folder, sample = scratch / "site", scratch / "work", str(paths.checkpoint("gqa_tied_bf16"))
        folder.mkdir()
        install(wheel, site)
        (ours,) = (found for found in metadata.distributions(path=[str(site)]) if found.name == "apr-jax")
        needed = requirements(ours)
        self.assertNoCommonElements(needed, {"jax", "flax", "torch", "scipy", "safetensors"})
        for name in needed:
            link(name, site)
        program = str(site / "bin" / "apr-jax")

        def said(*command: str, code: int = 0) -> str:
            return run(self, list(command), folder, str(site), code=code)

        said(program, "convert", sample, "model.apr")
        said(program, "convert", "model.apr", "back")
        self.assertStartsWith(said(program, "verify", sample, "model.apr"), "identical: 26 tensors")
        said(program, "verify", "model.apr")
        said(program, "show", "model.apr", "--html", "page.html")
        advice = rf"needs ({'|'.join(EXTRAS['model'])}), which is not installed\. "
        advice += rf"`pip install '{re.escape(str(wheel))}\[model\]'` installs it\n"
        self.assertRegex(said("-c", CAPTURES), rf"^apr_jax\.load_model {advice}$")
        for command, *words in (
            ("golden", "model.apr", "-o", "g.safetensors"),
            ("parity", "model.apr", "--right", "dump"),
            ("generate", "model.apr", "--prompt", "x"),
            ("loss", "model.apr", "--text", f"{sample}/config.json"),
            ("checkpoint", "save", "model.apr", "prepared"),
        ):
            self.assertRegex(said(program, command, *words, code=2), rf"^error: `apr-jax {command}` {advice}$")

    def test_what_an_extra_brings_is_what_pyproject_says(self):
        extras = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra, modules in EXTRAS.items():
            # The one distribution whose module has another name.
            listed = {Requirement(each).name.replace("orbax-checkpoint", "orbax") for each in extras[extra]}
            self.assertEqual(listed - {"apr-jax"}, set(modules), extra)


if __name__ == "__main__":
    absltest.main()
