"""What files of tensors that are no model are said to be; that opening, convert and verify say it, is tested there."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import incomplete

PEFT = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]


class AdapterTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("said", json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Q"}),
         "this is no model but a PEFT adapter, LORA (rank 8) of Qwen/Q"),
        ("no_file", None, "this is no model but a PEFT adapter, and it does not say of which model"),
        ("no_json", "{", "this is no model but a PEFT adapter, and it does not say of which model"),
        ("no_object", "[1]", "this is no model but a PEFT adapter, and it does not say of which model"),
    )  # fmt: skip
    def test_of_peft(self, config, sentence):
        content = None if config is None else config.encode()
        for found in (
            incomplete.recognise("other.safetensors", PEFT, content),
            # The same tensors in an `.apr` whose metadata say nothing.
            incomplete.recognise_apr({}, PEFT, content),
        ):
            self.assertEqual((found.code, found.sentence), ("adapter", sentence))

    def test_a_model_beside_an_adapter_is_a_model(self):
        self.assertIsNone(incomplete.recognise_apr({}, [*PEFT, "model.layers.0.mlp.up_proj.weight"], None))


if __name__ == "__main__":
    absltest.main()
