"""Errors of what is not installed, and the command that installs it; packaging_test.py tries such a command out."""

import json
import pathlib
import sys
from importlib import metadata
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters import errors
from tests.paths import ROOT


class NotInstalledTest(parameterized.TestCase):
    @parameterized.parameters(("flax.nnx", "flax"), ("huggingface_hub", "huggingface_hub"), ("numpy.nothing", None))
    def test_a_package_that_an_extra_brings_is_named(self, module, package):
        found = errors.not_installed("it", ModuleNotFoundError("no", name=module))
        if package is None:
            self.assertIsNone(found)
        else:
            self.assertEqual(found.message, f"it needs {package}, which is not installed")

    @parameterized.named_parameters(
        ("no_package", None, f"`pip install '{ROOT}[hub]'`"),
        ("from_an_index", {}, f"`pip install '{ROOT}[hub]'`"),
        ("a_checkout", {"url": ROOT.as_uri(), "dir_info": {"editable": True}},
         f"`pip install --editable '{ROOT}[hub]'`"),
        ("a_repository", {"url": "https://host/x", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
         "`pip install 'apr-jax[hub] @ git+https://host/x@abc'`"),
        ("a_folder_that_is_gone", {"url": "file:///nowhere/x", "dir_info": {}}, "`pip install 'apr-jax[hub]'`"),
    )  # fmt: skip
    def test_an_extra_is_installed_from_where_the_package_came(self, origin, command):
        found = mock.Mock(read_text=lambda name: json.dumps(origin) if origin else None)
        wanted = {"side_effect": metadata.PackageNotFoundError} if origin is None else {"return_value": found}
        with mock.patch.object(metadata, "distribution", **wanted):
            self.assertEqual(errors.pip_install("hub"), command)


if __name__ == "__main__":
    absltest.main()
