"""verify A B where B is quantised in a published form, or has an adapter merged into it."""

import pathlib

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.dense import open_dense
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.verify.comparison import Comparison, compare
from apr_jax.converters.verify.wording import cause_in_words
from tests import packers

DATA = pathlib.Path(__file__).parents[2] / "data"
BASE = DATA / "checkpoints" / "gqa_tied_bf16"
ADAPTER = DATA / "adapters" / "lora"

WORDS = {
    "gptq_int4_act_order": "quantised by gptq to int4, in groups of 32",
    "gptq_int3": "quantised by gptq to int3, in groups of 32",
    "gptq_int8_whole_row_bf16": "quantised by gptq to int8, with a scale for each row",
    "awq_16_bf16": "quantised by awq to int4, in groups of 16",
    "fp8_block_128": "quantised by fp8 to fp8_e4m3, with a scale for each block of 128 x 128",
    "fp8_block_32_16": "quantised by fp8 to fp8_e4m3, with a scale for each block of 32 x 16",
    "fp8_tensor": "quantised by fp8 to fp8_e4m3, with one scale for the tensor",
    "bnb_nf4_128_nested_bf16": "quantised by bitsandbytes to nf4, in groups of 128",
    "bnb_int8": "quantised by bitsandbytes to int8, with a scale for each row",
    "ct_int4_asymmetric_16": "quantised by compressed-tensors to int4, in groups of 16",
    "ct_fp8_tensor": "quantised by compressed-tensors to fp8_e4m3, with one scale for the tensor",
    "ct_nvfp4": "quantised by compressed-tensors to nvfp4, in groups of 16",
}


class VerifyTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = pathlib.Path(self.create_tempdir().full_path)

    @parameterized.parameters(sorted(WORDS))
    def test_field_the_form_is_named(self, member):
        """FIELD Forms: verify SOURCE QUANTISED -> compared by decoded values; the form, codec and group are named"""
        packers.pack_checkpoint(BASE, self.root / "packed", *packers.MEMBERS[member])
        found = self._compare(BASE, self.root / "packed")
        self.assertEqual((found.only_in_a, found.only_in_b), ((), ()))
        words = {cause_in_words(f.cause, f.parameters) for f in found.findings}
        if member == "fp8_block_128":
            # Of most matrices one block is the whole.
            words.remove(WORDS["fp8_tensor"])
        self.assertEqual(words, {WORDS[member]})
        self.assertEqual(sum(len(finding.tensors) for finding in found.findings), 14)
        self.assertEqual(found.exit_code, 1)
        self.assertIn("B is quantised and compared by what it decodes to", " ".join(found.notes))

    def test_the_dense_checkpoint_of_a_form_is_equal_to_it(self):
        packers.pack_checkpoint(BASE, self.root / "packed", *packers.MEMBERS["awq_32"])
        convert(self.root / "packed", self.root / "dense", to="safetensors", dequantise=True)
        self.assertEqual(self._compare(self.root / "packed", self.root / "dense").exit_code, 0)

    def test_what_nothing_decodes_is_compared_as_it_is_stored(self):
        packers.pack_checkpoint(BASE, self.root / "packed", packers.gptq(), {"quant_method": "hqq"})
        found = self._compare(BASE, self.root / "packed")
        self.assertRegex(" ".join(found.notes), "B is compared as it is stored: .*hqq")
        self.assertLen(found.only_in_a, 14)

    def test_two_of_one_form_are_compared_byte_for_byte(self):
        for name in ("one", "two"):
            packers.pack_checkpoint(BASE, self.root / name, *packers.MEMBERS["gptq_int4_32"])
        found = self._compare(self.root / "one", self.root / "two")
        self.assertEqual(found.verdict, "identical")
        self.assertGreater(len(found.tensors), 50)

    def test_other_weights_in_a_form_are_not_taken_for_the_original_quantised(self):
        other = DATA / "checkpoints" / "gqa_untied_bf16"
        packers.pack_checkpoint(other, self.root / "packed", *packers.MEMBERS["bnb_nf4_64"])
        found = self._compare(BASE, self.root / "packed")
        self.assertFalse([f for f in found.findings if "form" in f.parameters])

    def test_a_damaged_scale_is_seen_in_its_tensor(self):
        packers.pack_checkpoint(BASE, self.root / "packed", *packers.MEMBERS["fp8_row"])
        tensors = packers.read(self.root / "packed" / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[f"{name}_scale"] = (tensors[f"{name}_scale"] * 4).astype(np.float32)
        packers.write(self.root / "packed" / "model.safetensors", tensors)
        found = self._compare(BASE, self.root / "packed")
        of_form = [f for f in found.findings if "form" in f.parameters]
        self.assertLen(of_form[0].tensors, 13)
        self.assertIn(name, [n for f in found.findings if "form" not in f.parameters for n in f.tensors])

    def test_field_base_and_adapter_are_the_merged_model(self):
        """FIELD Forms: verify BASE MERGED --adapter DIR -> no difference, the adapter is named; others differ"""
        convert(BASE, self.root / "merged", to="safetensors", adapters=[ADAPTER])
        found = self._compare(BASE, self.root / "merged", ADAPTER)
        self.assertEqual(found.exit_code, 0)
        self.assertEqual([(f.cause, len(f.tensors)) for f in found.findings], [("merged-adapter", 4)])
        # As PEFT merges in the base's type: what is added is rounded, and the sum.
        tensors, parts = (
            dict(packers.read(BASE / "model.safetensors")),
            packers.read(ADAPTER / "adapter_model.safetensors"),
        )
        for name in [name for name in parts if "lora_A" in name]:
            product = parts[name.replace("lora_A", "lora_B")] @ parts[name] * np.float32(4)
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            tensors[target] = tensors[target] + product.astype(ml_dtypes.bfloat16)
        packers.dense_checkpoint(BASE, self.root / "peft", tensors)
        self.assertEqual(self._compare(BASE, self.root / "peft", ADAPTER).exit_code, 0)
        tensors[target] = tensors[target] + product.astype(ml_dtypes.bfloat16)
        packers.dense_checkpoint(BASE, self.root / "twice", tensors)
        self.assertEqual(self._compare(BASE, self.root / "twice", ADAPTER).exit_code, 1)

    def test_a_quantised_merged_model_is_no_sum_but_told_as_quantised(self):
        convert(BASE, self.root / "q.apr", to="apr", adapters=[ADAPTER], cast=[CastRule.parse("*_proj.weight=q8")])
        found = self._compare(BASE, self.root / "q.apr", ADAPTER)
        self.assertNotIn("merged-adapter", [finding.cause for finding in found.findings])
        self.assertIn("quantised", [finding.cause for finding in found.findings])

    def _compare(self, a: pathlib.Path, b: pathlib.Path, *adapters: pathlib.Path) -> Comparison:
        with open_dense(a, adapters=adapters) if adapters else open_checkpoint(a) as one, open_checkpoint(b) as other:
            return compare(one, other)


if __name__ == "__main__":
    absltest.main()
