"""`kill -9` at random moments of real conversions: what stands there is old or new and whole, the next run
succeeds.

`make kill-test` does it at 200 moments, this suite at a few.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest

from tests import paths
from tests.hostile.file_faults_test import content

pytestmark = pytest.mark.slow

MOMENTS = int(os.environ.get("KILL_MOMENTS", "4"))
# Written in small pieces, so that a kill can come between any two of them.
_SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from apr_jax.converters.convert import streaming
streaming._CHUNK_BYTES, streaming._BLOCK_BYTES = 1 << 10, 1 << 12
write = streaming.OutputFile.write_at
def slow(self, data, offset):
    if not said:
        said.append(print("begins", flush=True))
    time.sleep(5e-4)
    write(self, data, offset)
streaming.OutputFile.write_at, said = slow, []
from apr_jax.converters.commands import cli
cli.start("apr_jax.converters.commands.convert", ["convert", *sys.argv[2:]])
"""


class KillTest(absltest.TestCase):
    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _SLOW, str(paths.ROOT), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, process: subprocess.Popen[bytes]) -> str:
        _, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, errors)
        return errors.decode()

    def test_kill_9_at_random_moments(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        source, older = folder / "source", folder / "older"
        shutil.copytree(paths.checkpoint("gqa_tied_bf16"), source)
        older.mkdir()
        before = content(source)
        outcomes: Counter[str] = Counter()
        chance = random.Random(14)
        outputs = {
            name: (source, "--force", "--to", "apr" if name.endswith(".apr") else "safetensors",
                   *(() if name.endswith(".apr") else ("--max-shard-size", "50KB")), "-o", folder / name)
            for name in ("m.apr", "m")
        }  # fmt: skip
        expected, seconds = {}, {}
        for name, arguments in outputs.items():
            process = self.start(*arguments)
            process.stdout.readline()
            begun = time.monotonic()
            self.finish(process)
            seconds[name] = time.monotonic() - begun
            expected[name] = content(folder / name)
            self.finish(self.start(paths.checkpoint("gqa_untied_bf16"), *arguments[1:-1], older / name))
        for moment in range(MOMENTS):
            name = ("m.apr", "m")[moment % 2]
            target = folder / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            if moment % 4 < 2:
                shutil.copytree(older / name, target) if name == "m" else shutil.copy(older / name, target)
            stood = content(target)
            process = self.start(*outputs[name])
            process.stdout.readline()
            time.sleep(chance.uniform(0, seconds[name]))
            process.kill()
            process.communicate()
            found = content(target)
            self.assertIn(found, (stood, expected[name]), f"partial at moment {moment}")
            self.assertEqual(content(source), before)
            left = [entry for entry in os.listdir(folder) if ".apr-jax-" in entry]
            outcomes["a temporary left" if left else "new" if found == expected[name] else "not begun"] += 1
            for entry in left:
                self.assertTrue(entry.startswith(f".{name}.apr-jax-tmp."), entry)
            if left or moment % 8 == 0:
                said = self.finish(self.start(*outputs[name]))
                for entry in left:
                    self.assertIn(f"removed '{entry}'", said)
                self.assertEqual(content(target), expected[name])
                self.assertEqual([entry for entry in os.listdir(folder) if ".apr-jax-" in entry], [])
        print(f"{MOMENTS} kills: {dict(outcomes)}")
        self.assertGreater(outcomes["a temporary left"], MOMENTS // 8, "the kills did not hit the writing")


if __name__ == "__main__":
    absltest.main()
