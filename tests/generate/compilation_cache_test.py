"""Tools keep compiled programs in the user's cache folder, unless the user said something else."""

import os
import pathlib
import stat
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
from absl.testing import absltest

from apr_jax.generate import compilation_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


class CompilationCacheTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        for name in SETTINGS:
            self.addCleanup(jax.config.update, name, jax.config.values[name])
        jax.config.update("jax_compilation_cache_dir", None)
        self.home = pathlib.Path(self.create_tempdir().full_path)

    def enabled(self, **environment: str) -> str | None:
        with mock.patch.dict(os.environ, environment):
            compilation_cache.enable()
        return jax.config.values["jax_compilation_cache_dir"]

    def test_it_is_in_the_users_cache_folder_and_nobody_elses(self):
        folder = self.enabled(XDG_CACHE_HOME=str(self.home))
        self.assertEqual(folder, str(self.home / "apr_jax" / "compiled"))
        self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode), 0o700)

    def test_without_xdg_it_is_under_the_home_folder(self):
        folder = self.enabled(XDG_CACHE_HOME="", HOME=str(self.home))
        self.assertEqual(folder, str(self.home / ".cache" / "apr_jax" / "compiled"))

    def test_the_users_own_choice_stays_no_cache_included(self):
        for chosen in ("", str(self.home / "mine")):
            jax.config.update("jax_compilation_cache_dir", chosen)
            self.assertEqual(self.enabled(XDG_CACHE_HOME=str(self.home)), chosen)
        self.assertEqual(list(self.home.iterdir()), [])

    def test_a_folder_that_cannot_be_made_or_is_anothers_means_no_cache(self):
        (self.home / "apr_jax").write_text("a file in the way")
        self.assertIsNone(self.enabled(XDG_CACHE_HOME=str(self.home)))
        (self.home / "apr_jax").unlink()
        with mock.patch.object(os, "getuid", return_value=os.getuid() + 1):
            self.assertIsNone(self.enabled(XDG_CACHE_HOME=str(self.home)))

    def test_beyond_the_limit_what_was_used_longest_ago_goes(self):
        folder = self.home / "apr_jax" / "compiled"
        folder.mkdir(parents=True)
        for name, read, written in (("old", 10, 10), ("read", 40, 5), ("new", 30, 30), ("oldest", 1, 1)):
            (folder / name).write_bytes(bytes(100))
            os.utime(folder / name, (read, written))
        for most, left in ((400, {"old", "read", "new", "oldest"}), (399, {"old", "read", "new"}), (199, {"read"})):
            jax.config.update("jax_compilation_cache_dir", None)
            with mock.patch.object(compilation_cache, "_MOST_BYTES", most):
                self.assertIsNotNone(self.enabled(XDG_CACHE_HOME=str(self.home)))
            self.assertEqual({path.name for path in folder.iterdir()}, left)


if __name__ == "__main__":
    absltest.main()
