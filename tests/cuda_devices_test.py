"""That tests/cuda fails where CUDA cannot be used, and says why: on any machine, with GPUs and failures made up."""

import os
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from absl.testing import absltest

from tests.cuda import devices

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = "Backend 'cuda' failed to initialize: RESOURCE_EXHAUSTED: Out of memory"


def failing(error):
    def find(_platform):
        raise error

    return find


class DevicesTest(absltest.TestCase):
    def test_a_device_that_computes_is_fine(self):
        self.assertIsNone(devices.why_not(lambda _: jax.devices("cpu"), []))
        self.assertIsNone(devices.why_not(lambda _: jax.devices("cpu"), ["/dev/nvidia0"]))

    def test_a_gpu_that_fails_for_any_reason_is_a_failure_with_that_reason(self):
        for error in (RuntimeError(OUT_OF_MEMORY), OSError("libcuda.so.1"), AssertionError("no plugin"), KeyError("x")):
            reason = devices.why_not(failing(error), ["/dev/nvidia0"])
            self.assertIn("has an NVIDIA GPU (/dev/nvidia0)", reason)
            self.assertIn(f"{type(error).__name__}: {error}", reason)

    def test_a_device_that_is_there_but_does_not_compute_is_a_failure(self):
        self.assertIn("JAX cannot compute on it", devices.why_not(lambda _: ["no device"], ["/dev/nvidia3"]))

    def test_no_device_and_no_error_is_a_failure(self):
        self.assertIn("JAX cannot compute on it", devices.why_not(lambda _: [], ["/usr/bin/nvidia-smi"]))

    def test_a_machine_without_a_gpu_is_a_failure_that_says_so(self):
        reason = devices.why_not(failing(RuntimeError("Unknown backend cuda")), [])
        self.assertIn("has no NVIDIA GPU", reason)
        self.assertIn("Unknown backend cuda", reason)

    def test_signs_of_a_gpu_are_device_nodes_and_nvidia_smi(self):
        machine = pathlib.Path(self.create_tempdir().full_path)
        (machine / "nvidia-uvm").touch()
        self.assertEqual(devices.signs_of_a_gpu(machine, str(machine)), [])
        (machine / "nvidia0").touch()
        program = machine / "nvidia-smi"
        program.touch(mode=0o755)
        self.assertEqual(devices.signs_of_a_gpu(machine, str(machine)), [str(machine / "nvidia0"), str(program)])

    def test_memory_is_shared_unless_somebody_said_otherwise(self):
        for before, after in (({}, "false"), ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "true")):
            devices.share_memory(before)
            self.assertEqual(before["XLA_PYTHON_CLIENT_PREALLOCATE"], after)

    def test_the_folder_fails_with_the_reason_where_cuda_is_hidden(self):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/generate_cuda_test.py"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertStartsWith(done.stdout.splitlines()[-1], "8 errors in ")
        self.assertLen(re.findall("^this machine has (?:no|an) NVIDIA GPU.*: .+$", done.stdout, re.MULTILINE), 8)


if __name__ == "__main__":
    absltest.main()
