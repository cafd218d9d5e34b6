"""What an adapter does to a checkpoint beside its weights: PEFT's own logits are held against ours in tests/load."""

import json
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.adapters import low_rank_parts, with_adapter
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import EMBEDDING, HEAD
from tests import packers
from tests.paths import DATA, checkpoint


class HeadTest(parameterized.TestCase):
    @parameterized.parameters(
        (True, EMBEDDING, True, False), (True, HEAD, True, False), (False, EMBEDDING, True, False),
        (False, HEAD, True, False), (True, "model.norm.weight", False, True),
    )  # fmt: skip
    def test_a_head_is_untied_only_where_one_of_both_changes(self, tied, saved, has_head, stays_tied):
        folder = pathlib.Path(self.create_tempdir().full_path)
        shutil.copytree(checkpoint("gqa_tied_bf16"), folder / "base")
        tensors = packers.read(folder / "base" / "model.safetensors")
        if not tied:
            config = json.loads((folder / "base" / "config.json").read_text()) | {"tie_word_embeddings": False}
            (folder / "base" / "config.json").write_text(json.dumps(config))
            tensors[HEAD] = tensors[EMBEDDING] + np.ones((), tensors[EMBEDDING].dtype)
            packers.write(folder / "base" / "model.safetensors", tensors)
        (folder / "adapter").mkdir()
        shutil.copy(DATA / "adapters" / "lora" / "adapter_config.json", folder / "adapter")
        values = tensors.get(saved, tensors[EMBEDDING]).astype(np.float32) + 1
        packers.write(folder / "adapter" / "adapter_model.safetensors", {f"base_model.model.{saved}": values})
        with open_checkpoint(folder / "base") as base, with_adapter(base, folder / "adapter") as merged:
            np.testing.assert_array_equal(merged.tensors[saved].read().astype(np.float32), values)
            self.assertEqual(HEAD in merged.tensors, has_head)
            self.assertEqual(merged.config["tie_word_embeddings"], stays_tied)
            if HEAD in merged.tensors:
                other = EMBEDDING if saved == HEAD else HEAD
                before = tensors.get(other, tensors[EMBEDDING])
                np.testing.assert_array_equal(merged.tensors[other].read().astype(np.float32), before.astype("f4"))
            self.assertEqual("no longer tied" in " ".join(merged.warnings), tied and not stays_tied)


class LowRankTest(parameterized.TestCase):
    @parameterized.parameters("lora", "lora_bias")
    def test_the_parts_are_what_is_added(self, name):
        folder = DATA / "adapters" / name
        parts = low_rank_parts(folder)
        with open_checkpoint(checkpoint("gqa_tied_bf16")) as base, with_adapter(base, folder) as merged:
            changed = {name for name, tensor in merged.tensors.items() if tensor is not base.tensors[name]}
            self.assertEqual(set(parts), {name for name in changed if name.endswith(".weight")})
            for name, part in parts.items():
                before = base.tensors[name].read().astype(np.float32)
                expected = before + part.scale * (part.b @ part.a)
                np.testing.assert_allclose(merged.tensors[name].read(), expected, rtol=1e-6, atol=1e-7)

    def test_modules_with_more_than_two_matrices_are_left_out(self):
        folders = [folder for folder in sorted((DATA / "adapters").iterdir()) if folder.is_dir()]
        found = {folder.name: low_rank_parts(folder) for folder in folders}
        self.assertTrue(all(part.a.shape[0] == part.b.shape[1] for parts in found.values() for part in parts.values()))
        self.assertLess(min(map(len, found.values())), max(map(len, found.values())))


if __name__ == "__main__":
    absltest.main()
