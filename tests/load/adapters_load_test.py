"""PEFT adapters on load: logits are those that PEFT computes with the adapter beside the model."""

import json
import pathlib
import shutil

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import adapters
from apr_jax.converters.checkpoint.adapters import with_adapter
from apr_jax.converters.checkpoint.dense import open_dense
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError, MissingFileError, RefusedError
from apr_jax.load.load_model import load_model
from apr_jax.trace.inputs import Inputs
from tests import packers

DATA = pathlib.Path(__file__).parents[1] / "data"
BASE = DATA / "checkpoints" / "gqa_tied_bf16"
ADAPTERS = DATA / "adapters"
PEFT = np.load(ADAPTERS / "logits.npz")
Q = "model.layers.0.self_attn.q_proj"


class LoadTest(parameterized.TestCase):
    @parameterized.parameters(sorted(set(PEFT) - {"input_ids"}))
    def test_field_logits_are_those_of_peft(self, name):
        """FIELD Forms: --adapter: LoRA, rslora, patterns, DoRA, biases, modules_to_save -> PEFT's logits"""
        model = load_model(BASE, "float32", "cpu", adapters=[ADAPTERS / name])
        found = np.asarray(model.logits(Inputs.of(PEFT["input_ids"])))[:, -4:]
        np.testing.assert_allclose(found, PEFT[name], rtol=0, atol=1e-5 * np.abs(PEFT[name]).max())
        plain = np.asarray(load_model(BASE, "float32", "cpu").logits(Inputs.of(PEFT["input_ids"])))[:, -4:]
        self.assertGreater(np.abs(found - plain).max(), 1e-3 * np.abs(plain).max())

    def test_field_convert_rounds_once_to_the_type_of_the_base(self):
        """FIELD Forms: convert --adapter -> base + adapter in the base's type, everything else bit for bit"""
        root = pathlib.Path(self.create_tempdir().full_path)
        convert(BASE, root / "merged", to="safetensors", adapters=[ADAPTERS / "lora"])
        base, merged = (packers.read(folder / "model.safetensors") for folder in (BASE, root / "merged"))
        parts = packers.read(ADAPTERS / "lora" / "adapter_model.safetensors")
        self.assertEqual(set(base), set(merged))
        for name, values in base.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in parts:
                product = parts[f"{stem}.lora_B.weight"].astype("f8") @ parts[f"{stem}.lora_A.weight"].astype("f8")
                exact = values.astype("f8") + 16 / 4 * product
                # Half a unit in the last place, and the sum's own rounding in float32.
                error = np.abs(merged[name].astype("f8") - exact)
                self.assertLess((error / np.abs(exact)).max(), 2**-8 * (1 + 1e-3), name)
                self.assertEqual(merged[name].dtype, values.dtype)
            else:
                self.assertEqual(merged[name].tobytes(), values.tobytes(), name)

    def test_two_adapters_and_a_quantised_base(self):
        root = pathlib.Path(self.create_tempdir().full_path)
        dense = packers.pack_checkpoint(BASE, root / "packed", *packers.MEMBERS["bnb_nf4_64"])
        with open_dense(root / "packed", adapters=[ADAPTERS / "lora", ADAPTERS / "lora"]) as checkpoint:
            found = checkpoint.tensors[f"{Q}.weight"].read()
        parts = packers.read(ADAPTERS / "lora" / "adapter_model.safetensors")
        stem = f"base_model.model.{Q}"
        product = parts[f"{stem}.lora_B.weight"].astype("f8") @ parts[f"{stem}.lora_A.weight"].astype("f8")
        np.testing.assert_allclose(found, dense[f"{Q}.weight"] + 2 * 16 / 4 * product, rtol=0, atol=1e-6)

    def test_a_grown_vocabulary(self):
        root = pathlib.Path(self.create_tempdir().full_path)
        folder = self._copy("lora")
        tensors = dict(packers.read(folder / "adapter_model.safetensors"))
        rows = packers.read(BASE / "model.safetensors")["model.embed_tokens.weight"]
        tensors["base_model.model.model.embed_tokens.weight"] = np.concatenate([rows, rows[:8]])
        packers.write(folder / "adapter_model.safetensors", tensors)
        convert(BASE, root / "merged", to="safetensors", adapters=[folder])
        self.assertEqual(json.loads((root / "merged" / "config.json").read_text())["vocab_size"], 296)
        with open_checkpoint(root / "merged") as merged:
            self.assertEqual(merged.tensors["model.embed_tokens.weight"].shape, (296, 64))
        load_model(root / "merged", "float32", "cpu")

    def _copy(self, name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(ADAPTERS / name, pathlib.Path(self.create_tempdir().full_path) / name))


class RefusalsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "None"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"r": 0}, "r is no"),
    )
    def test_field_what_is_not_computed_is_refused_by_name(self, change, name):
        """FIELD Forms: IA3, QA-LoRA, token adapters -> refused by name"""
        error = self._refused(config=change)
        self.assertEqual(error.code, "adapter-unsupported")
        self.assertIn(name, str(error))

    @parameterized.parameters(
        (f"{Q}.lora_A.weight", lambda t: t[:, :-1], "rank and weight need"),
        (f"{Q}.lora_A.weight", None, "holds B"),
        ("model.layers.7.self_attn.q_proj.lora_A.weight", lambda t: np.ones((4, 64), np.float32), "nothing of this"),
        ("model.strange.weight", lambda t: np.ones((4, 64), np.float32), "nothing of this"),
        ("model.norm.weight", lambda t: np.ones(65, np.float32), "the checkpoint has"),
    )
    def test_tensors_that_do_not_fit(self, name, change, text):
        error = self._refused(tensor=name, change=change)
        self.assertEqual(error.code, "adapter-tensors")
        self.assertIn(text, str(error))

    def test_a_bias_that_does_not_fit(self):
        error = self._refused(tensor=f"{Q}.lora_B.bias", change=lambda _: np.ones(7, np.float32))
        self.assertIn("a bias that does not fit", str(error))

    def test_magnitudes_that_do_not_fit(self):
        name = f"{Q}.lora_magnitude_vector"
        error = self._refused({"use_dora": True}, tensor=name, change=lambda _: np.ones(7, np.float32))
        self.assertIn("the magnitudes are [7]", str(error))

    def test_no_tensors(self):
        folder = pathlib.Path(shutil.copytree(ADAPTERS / "lora", self.create_tempdir().full_path, dirs_exist_ok=True))
        packers.write(folder / "adapter_model.safetensors", {})
        with open_checkpoint(BASE) as base, self.assertRaisesRegex(RefusedError, "no tensors"):
            with_adapter(base, folder)

    def test_an_adapter_that_began_as_a_part_of_its_base_says_so(self):
        folder = pathlib.Path(shutil.copytree(ADAPTERS / "lora", self.create_tempdir().full_path, dirs_exist_ok=True))
        settings = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa_niter_4"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        with open_checkpoint(BASE) as base:
            self.assertIn("began as pissa_niter_4", " ".join(with_adapter(base, folder).warnings))

    def test_patterns_that_are_no_expressions_match_nothing(self):
        for pattern in ("(", "a{99999999999}", "(" * 5000):
            self.assertFalse(adapters.matched(pattern, "a"), pattern[:20])

    def test_an_empty_folder_and_a_pickle(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        with self.assertRaises(MissingFileError):
            open_dense(BASE, adapters=[folder])
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.bin").write_bytes(b"PK")
        with self.assertRaisesRegex(MissingFileError, "pickle"):
            open_dense(BASE, adapters=[folder])

    def _refused(self, config=None, tensor=None, change=None) -> AprJaxError:
        folder = pathlib.Path(shutil.copytree(ADAPTERS / "lora", self.create_tempdir().full_path, dirs_exist_ok=True))
        settings = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        if tensor is not None:
            tensors = packers.read(folder / "adapter_model.safetensors")
            name = f"base_model.model.{tensor}"
            held = tensors.pop(name, None)
            if change is not None:
                tensors[name] = np.ascontiguousarray(change(held))
            packers.write(folder / "adapter_model.safetensors", tensors)
        with open_checkpoint(BASE) as base, self.assertRaises(RefusedError) as caught:
            with_adapter(base, folder)
        return caught.exception


class PatternsTest(parameterized.TestCase):
    def test_patterns_of_a_configuration_are_regular_expressions_that_end(self):
        root = pathlib.Path(self.create_tempdir().full_path) / "adapter"
        shutil.copytree(ADAPTERS / "lora", root)
        config = json.loads((root / "adapter_config.json").read_text())
        for pattern in ("(.+)+!", "(_|[a-z.0-9]|[a-z.]|layers)*!", "(.*.*.*.*.*.*.*.*.*.*)!"):
            (root / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {pattern: 4}}))
            with (
                open_checkpoint(BASE) as checkpoint,
                self.assertRaisesRegex(RefusedError, "pattern.*not end") as caught,
            ):
                with_adapter(checkpoint, root)
            self.assertEqual((caught.exception.file, caught.exception.found), (str(root), pattern))
        for pattern, module, found in (
            ("q_proj", "model.layers.0.q_proj", True), (r"layers\.[01]\.q_proj", "model.layers.1.q_proj", True),
            ("q_proj|k_proj", "a.k_proj", True), ("proj", "q_proj", False), (".*", "a", True), ("(", "a", False),
        ):  # fmt: skip
            self.assertEqual(adapters._matches(pattern, module), found, pattern)


if __name__ == "__main__":
    absltest.main()
