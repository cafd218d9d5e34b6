"""`parity --backward` as an engineer runs it: on a safetensors file, parameters alone, a map of raw files."""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.engines import names
from apr_jax.load.load_model import load_model
from apr_jax.trace.inputs import seeded
from apr_jax.trace.stages import GRADIENT, Key
from tests import oracle, paths, tool
from tests.battery.backward_engine import Planted, backward

SAMPLE = paths.checkpoint("gqa_tied_bf16")
SILU = Planted("backward-silu-sigmoid-only", (1,))


class BackwardCommandTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ids = np.array(seeded(288, 2, 64).input_ids)
        cls.labels = cls.ids.copy()
        cls.labels[0, :20] = -100
        cls.dumps = {
            wrong: backward(*oracle.load(SAMPLE), cls.ids, None, cls.labels, [SILU] * wrong) for wrong in (False, True)
        }

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def written(self, wrong=False, keep=lambda key: True, name=lambda key: key):
        values = {name(key): np.ascontiguousarray(v) for key, v in self.dumps[wrong].items() if keep(key)}
        path = self.folder / "dump.safetensors"
        batch = {"input_ids": self.ids.astype(np.int32), "labels": self.labels.astype(np.int32)}
        safetensors.numpy.save_file(values | batch, path)
        return path

    def ran(self, *args, code):
        return tool.ran(self, "parity", SAMPLE, "--backward", *args, code=code)

    @staticmethod
    def of_parameter(key):
        return Key(key).of_parameter

    def test_a_mistake_is_one_line_in_the_form_of_forward_ones_and_ends_with_1(self):
        path = self.written(True, lambda key: key.startswith(GRADIENT))
        done = self.ran("--right", path, code=1)
        self.assertIn("mistake: 1 found", done.stdout)
        self.assertIn("layer 1, grad.ffn_gate: the derivative of SiLU is σ(x), without x σ'(x)", done.stdout)
        self.assertRegex(done.stdout, r"grad\.ffn_gate +\. +X")

    def test_json_has_the_finding_its_formulas_and_every_gradient(self):
        path = self.written(True, self.of_parameter, lambda key: key.removeprefix(GRADIENT))
        answer = json.loads(self.ran("--right", path, "--json", code=1).stdout)
        (finding,) = answer["findings"]
        self.assertEqual((finding["fault"], finding["layers"], finding["certainty"]), (SILU.name, [1], "certain"))
        self.assertEqual(finding["stage"], "grad.mlp.gate_proj.weight")
        self.assertEqual(finding["formulas"]["theirs"], "dgate = g σ(gate)")
        self.assertEqual(answer["compared"]["stages"], 26)
        self.assertIn("gradients of parameters alone", " ".join(answer["notes"]))
        self.assertEqual(answer["unexamined"], [])

    def test_a_right_dump_of_parameters_alone_is_rounding(self):
        done = self.ran("--right", self.written(False, self.of_parameter), code=0)
        self.assertIn("rounding: every stage is within the budget of float32 (26 stages", done.stdout)

    def test_raw_files_with_a_map_are_read(self):
        entries = {}
        for key, value in self.dumps[True].items():
            if Key(key).of_parameter:
                (self.folder / f"{key}.raw").write_bytes(value.astype("<f4").tobytes())
                entries[key] = {"file": f"{key}.raw"}
        content = {"input_ids": self.ids.tolist(), "labels": self.labels.tolist(), "stages": entries}
        (self.folder / "dump.json").write_text(json.dumps(content))
        answer = json.loads(self.ran("--right", self.folder, "--json", code=1).stdout)
        self.assertEqual([finding["fault"] for finding in answer["findings"]], [SILU.name])

    def test_without_the_option_gradients_are_said_to_be_unread_or_refused(self):
        path = self.written(False, self.of_parameter)
        done = tool.ran(self, "parity", SAMPLE, "--right", path, code=5)
        self.assertIn("--backward examines them", done.stderr)

    def test_what_does_not_fit_is_refused_with_the_reason(self):
        path = self.written(False, lambda key: not key.startswith(GRADIENT))
        self.assertIn("the dump holds no gradient", self.ran("--right", path, code=5).stderr)
        self.assertIn("--backward is for dumps", self.ran("--right", "cpu", code=2).stderr)

    def test_names_of_other_programs_are_known(self):
        config = load_model(SAMPLE, "float64", "cpu").config
        weight = "model.layers.1.self_attn.q_proj.weight"
        for name, key in (
            (weight, f"grad.{weight}"),
            (f"module.{weight}.grad", f"grad.{weight}"),
            (f"_orig_mod.{weight}", f"grad.{weight}"),
            ("stage_grad.1.attn_norm", "grad.stage.1.attn_norm"),
            ("stage_grad.logits", "grad.logits"),
            ("grad_part.head.model.embed_tokens.weight", "grad.model.embed_tokens.weight.as_head"),
            ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight", f"grad.{weight}.lora_A"),
            ("model.layers.7.self_attn.q_proj.weight", None),
            ("hidden.0", None),
        ):
            self.assertEqual(names.gradient_of(name, config), key)


if __name__ == "__main__":
    absltest.main()
