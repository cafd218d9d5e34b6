"""On an NVIDIA GPU: files and prepared checkpoints arrive bit for bit, through page-locked memory and in pieces."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.load import prepared, upload
from apr_jax.load.load_model import load_model
from tests import paths
from tests.load import upload_test


class CudaUploadTest(upload_test.UploadTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.device = jax.devices("cuda")[0]

    def test_staging_memory_is_writable_and_goes_to_the_device_as_it_is(self):
        memory = upload._staging(1 << 20, self.device)
        memory[:] = np.arange(1 << 20, dtype=np.uint32).astype(np.uint8)
        np.testing.assert_array_equal(jax.device_put(memory, self.device), memory)

    @parameterized.parameters(
        ("gqa_tied_bf16", "bfloat16", True),
        ("odd_sizes", "float32", True),
        ("mha_untied_f32_sharded", "bfloat16", False),
    )
    def test_prepared_checkpoints_are_restored_bit_for_bit(self, name, dtype, fused):
        folder = pathlib.Path(self.create_tempdir().full_path, "prepared")
        with open_checkpoint(paths.checkpoint(name)) as checkpoint:
            prepared.save(checkpoint, str(folder), dtype=dtype, fused=fused)
        prepared.check(str(folder), self.device)
        direct = load_model(paths.checkpoint(name), dtype, self.device, fused=fused)
        restored = load_model(folder, dtype, self.device, fused=fused)
        self.assertEqual(jax.tree.structure(restored.parameters), jax.tree.structure(direct.parameters))
        for there, here in zip(jax.tree.leaves(restored.parameters), jax.tree.leaves(direct.parameters), strict=True):
            np.testing.assert_array_equal(np.asarray(there).view("u1"), np.asarray(here).view("u1"))


if __name__ == "__main__":
    absltest.main()
