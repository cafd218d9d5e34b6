"""The same faults where a model, a prepared checkpoint, golden values and dumps are written."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import StorageError
from apr_jax.load import prepared
from apr_jax.load.load_model import load_model
from apr_jax.load.save import save
from apr_jax.trace import aprt, golden, inputs, stages
from tests import file_faults
from tests.hostile.file_faults_test import FileFaultsTestCase, make_model, sampled

pytestmark = pytest.mark.slow

WRITERS = ("save", "save a folder", "golden", "dump", "inputs")
VALUES = {stages.LOGITS: np.ones((1, 3, 6), np.float32), stages.FINAL_NORM: np.ones((1, 3, 8), np.float32)}


class ModelFileFaultsTest(FileFaultsTestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(warnings, "warn", self.said.append))

    def begin_with(self, output: str, force: bool, write: Callable[[int], None]) -> None:
        """As `begin`; `write` takes which content it is, 0 or 1."""
        self.root = self.folder / "root"
        self.root.mkdir()
        self.output = self.root / output
        self.act = lambda: write(0)
        if force:
            write(1)
        self.begun()

    @parameterized.product(writer=WRITERS, force=[False, True], fault=[*file_faults.ERRORS, *file_faults.INTERRUPTS])
    def test_a_call_that_goes_wrong(self, writer, force, fault):
        name = {"save": "m.apr", "golden": "g.safetensors"}.get(writer, "out")
        batch = inputs.Inputs.of([[1, 2, 3]])
        if writer.startswith("save"):
            for seed in range(2):
                make_model(self.folder / str(seed), seed)
            models = [load_model(self.folder / str(seed), "bfloat16") for seed in range(2)]

        def write(which: int) -> None:
            values = {key: value + which for key, value in VALUES.items()}
            if writer.startswith("save"):
                save(models[which], self.output, force=force, max_shard_bytes=None if writer == "save" else 500)
            elif writer == "golden":
                golden.write(self.output, golden.Golden(batch, values, {}), force, notice=self.said.append)
            elif writer == "dump":
                aprt.write(self.output, batch, values, force, notice=self.said.append)
            else:
                given = inputs.Inputs.of([[1 + which, 2, 3]])
                inputs.write_plain(self.output, given, force, notice=self.said.append)

        self.begin_with(name, force, write)
        first, step = sampled(writer + fault.name)
        self.each(fault, self.check, first % 11, min(step, 11))

    @parameterized.product(force=[False, True], fault=[*file_faults.ERRORS, file_faults.INTERRUPTS[0]])
    def test_a_prepared_checkpoint(self, force, fault):
        for seed in range(2):
            make_model(self.folder / str(seed), seed)

        def write(which: int) -> None:
            with open_checkpoint(self.folder / str(which)) as checkpoint:
                prepared.save(checkpoint, os.fspath(self.output), force=force, notice=self.said.append)

        self.unlike = frozenset(
            f"prepared/parameters/{name}" for name in ("_CHECKPOINT_METADATA", "commit_success.txt")
        )
        # Orbax takes a failing look for "not there", and says that as an error of its own.
        fault = dataclasses.replace(fault, calls=fault.calls - {"stat", "lstat"})
        self.begin_with("prepared", force, write)
        first, step = sampled(f"prepared {fault.name} {force}")
        self.each(fault, self.check, first, 3 * step if step > 1 else 1)


class TensorStoreTest(parameterized.TestCase):
    def test_a_disk_that_refuses_what_orbax_writes_is_an_error_of_the_disk(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        make_model(folder / "model", 0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        with open_checkpoint(folder / "model") as checkpoint:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
            try:
                with self.assertRaises(StorageError) as caught, self.assertNoLogs("absl"):
                    prepared.save(checkpoint, os.fspath(folder / "out"))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        self.assertEqual(caught.exception.code, "file-too-large")
        self.assertEqual(os.listdir(folder), ["model"])


if __name__ == "__main__":
    absltest.main()
