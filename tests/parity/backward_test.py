"""Mistakes of a backward pass are found where they are made and named; a right one has none.

The witness is the NumPy engine of the battery, whose gradients are held against finite differences here and against
torch's autograd in tests/reference.
"""

import pathlib
import sys
import weakref
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.parity.backward import diagnose, localise, nodes, scaling
from apr_jax.parity.backward.localise import judge
from apr_jax.parity.backward.loss import Loss
from apr_jax.parity.backward.replay import Backward
from apr_jax.parity.faults.table import BACKWARD
from apr_jax.parity.replay import Replay
from apr_jax.trace.stages import GRADIENT, Key
from tests import oracle
from tests.battery import backward_engine, faulty_forward
from tests.battery.backward_battery import CONFIGS, Bench, adapter_singles, matches, singles
from tests.battery.backward_engine import Planted

GQA, MHA = CONFIGS
FEW = (
    Planted("backward-rope-direction", None, {}),
    Planted("backward-softmax-sum-missing", (1,), {}),
    Planted("backward-norm-projection-missing", None, {}),
    Planted("kv-gradient-first-head", (0,), {}),
    Planted("backward-gate-up-swapped", (1,), {}),
    Planted("weight-gradient-transposed", (1,), {}),
    Planted("accumulation-averaged", None, {"rows": 1}),
    Planted("tied-gradient-head-missing", None, {}),
)


def bench_without_a_run(name, stages=True):
    """The bench, whose forward pass in float32 is the NumPy engine's: nothing is compiled for it."""
    bench = Bench.of(name)
    i = bench.inputs
    forward = faulty_forward.forward(bench.weights, bench.config, i.input_ids, i.attention_mask)
    object.__setattr__(bench, "rounded", {} if stages else forward)
    object.__setattr__(bench, "stages", stages)
    return bench


class FormulasTest(parameterized.TestCase):
    @parameterized.parameters(*CONFIGS)
    def test_the_engine_is_the_gradient_of_its_loss_along_random_directions(self, name):
        bench = Bench.of(name)
        i, generator = bench.inputs, np.random.default_rng(0)
        dump = bench.dump((), "float64")

        def loss(weights):
            logits = oracle.forward(weights, bench.config, i.input_ids, i.attention_mask)[0]
            counted = (bench.labels[:, 1:] >= 0) & (i.attention_mask[:, :-1] == 1)
            shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
            picked = np.take_along_axis(shifted, i.input_ids[:, 1:, None], -1)[..., 0]
            return (np.log(np.exp(shifted).sum(-1)) - picked)[counted].mean()

        for _ in range(3):
            direction = {}
            for key, w in sorted(bench.weights.items()):
                direction[key] = generator.normal(size=w.shape) * np.abs(w).mean()

            def slope(step, direction=direction):
                ends = [loss({k: w + h * direction[k] for k, w in bench.weights.items()}) for h in (step, -step)]
                return (ends[0] - ends[1]) / (2 * step)

            # Attention is so curved here that the third derivative has to go, too.
            found = (4 * slope(5e-6) - slope(1e-5)) / 3
            expected = sum(float(np.vdot(dump[GRADIENT + key], d)) for key, d in direction.items())
            # Terms of a sum that happens to be small are not known any better.
            typical = sum(float(np.sum((dump[GRADIENT + key] * d) ** 2)) for key, d in direction.items()) ** 0.5
            self.assertAlmostEqual(found, expected, delta=1e-7 * max(abs(expected), typical))

    @parameterized.product(name=CONFIGS, stages=(True, False))
    def test_every_formula_gives_the_engines_gradient_in_float64(self, name, stages):
        bench = Bench.of(name)
        dump = bench.dump((), "float64")
        forward = {key: value for key, value in dump.items() if stages and not key.startswith(GRADIENT)}
        found = {key: value for key, value in dump.items() if stages and key.startswith(GRADIENT)}
        replay = Replay(bench.exact.config, bench.exact.parameters, bench.inputs, forward)
        back = Backward(replay, Loss.of(bench.inputs, bench.labels >= 0), found)
        compared = 0
        for key in (Key(key) for key in dump if key.startswith(GRADIENT)):
            ours, theirs = back.compute(key), dump[key]
            if key.stage == "attn_softmax":
                ours, theirs = (np.where(back.visible(key.layer), each, 0.0) for each in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * max(np.abs(theirs).max(), 1e-3), err_msg=key)
            compared += 1
        self.assertGreater(compared, 60)

    def test_gradients_come_in_an_order_in_which_each_is_made_of_earlier_ones(self):
        config = Bench.of(MHA).exact.config
        seen = set()
        for key in nodes.order(config):
            self.assertLessEqual(set(nodes.sources(key, config)), seen, key)
            seen.add(key)


class NamedTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.benches = {stages: bench_without_a_run(GQA, stages) for stages in (True, False)}

    @parameterized.parameters(True, False)
    def test_a_right_backward_pass_has_no_finding(self, stages):
        bench = self.benches[stages]
        answer = bench.diagnose(bench.dump(()))
        self.assertEqual((answer.findings, dict(answer.unexamined)), ((), {}))
        self.assertGreater(len(answer.sites), 60 if stages else 25)

    @parameterized.product(planted=FEW, stages=(True, False))
    def test_a_mistake_is_named_where_it_is_made(self, planted, stages):
        bench = self.benches[stages]
        (finding,) = bench.diagnose(bench.dump([planted])).findings
        self.assertTrue(matches(bench, planted, finding), finding.sentence)

    def test_values_of_judged_gradients_are_not_held(self):
        """At 0.5B those of all parameters would take 8 GB, and one embedding's in float64 takes one."""
        bench, held, most = self.benches[False], set(), 0

        def judged(*arguments):
            nonlocal most
            one = judge(*arguments)
            weakref.finalize(one, held.discard, id(one))
            held.add(id(one))
            most = max(most, len(held))
            self.assertNotIn("theirs", vars(one))
            return one

        with mock.patch.object(scaling, "judge", judged), mock.patch.object(diagnose, "judge", judged):
            self.assertEqual(bench.diagnose(bench.dump(())).findings, ())
        self.assertEqual(most, 1)

    def test_sizes_of_rows_are_those_of_the_whole_whatever_blocks_they_are_taken_in(self):
        generator = np.random.default_rng(0)
        for shape in ((7,), (7, 5), (2, 7, 5)):
            values, less = generator.standard_normal((2, *shape))
            counted = generator.random(shape) < 0.8
            off = (values - less) * counted
            expected = np.abs(off) if len(shape) == 1 else np.linalg.norm(off, axis=-1)
            for elements in (1, 10, 1 << 20):
                with mock.patch.object(localise, "_BLOCK_ELEMENTS", elements):
                    found = localise._norms(counted, values.astype(np.float32), minus=less)
                np.testing.assert_allclose(found, expected, atol=1e-6)
        values[0, 0, 0] = np.nan
        self.assertTrue(np.isfinite(localise._norms(np.ones(shape, bool), values, minus=less, finite=True)).all())

    def test_three_at_once_are_three_findings(self):
        planted = (
            Planted("backward-norm-projection-missing"),
            Planted("backward-rope-missing", (1,), {"of": "k"}),
            Planted("bias-gradient-missing", None, {"tensor": "self_attn.v_proj.bias"}),
        )
        bench = self.benches[True]
        findings = bench.diagnose(bench.dump(planted)).findings
        self.assertEqual({f.fault for f in findings}, {each.name for each in planted})

    def test_what_nothing_explains_is_unknown_where_it_is_with_what_is_seen(self):
        bench = self.benches[True]
        dump = dict(bench.dump(()))
        key = "grad.stage.1.ffn_up"
        dump[key] = dump[key] * np.where(np.arange(dump[key].shape[-1]) < 5, np.float32(0.9), np.float32(1))
        findings = {(f.fault, f.stage, f.layers): f for f in bench.diagnose(dump).findings}
        # It is wrong itself, and whatever was made of the right one does not follow from it.
        self.assertIn(("unknown", "grad.ffn_up", (1,)), findings)
        self.assertIn("channels 0-4 of", findings["unknown", "grad.ffn_up", (1,)].sentence)
        self.assertIn("0.9 times", findings["unknown", "grad.ffn_up", (1,)].sentence)
        self.assertLessEqual({layers for _, _, layers in findings}, {(1,)})

    def test_an_unexplained_gradient_of_parameters_alone_leaves_what_is_behind_it_unexamined(self):
        bench, right = self.benches[False], backward_engine._Backward._derivative

        def of_another_kind(engine, x, layer):
            return right(engine, 1.3 * x if layer == 1 else x, layer)

        with mock.patch.object(backward_engine._Backward, "_derivative", of_another_kind):
            dump = bench.dump(())
        answer = bench.diagnose(dump)
        self.assertEqual([(f.fault, f.layers) for f in answer.findings], [("unknown", (1,))])
        self.assertIn("grad.mlp.gate_proj.weight", answer.findings[0].stage)
        self.assertIn("grad.model.layers.0.self_attn.q_proj.weight", answer.unexamined)
        self.assertNotIn("grad.model.layers.1.mlp.down_proj.weight", answer.unexamined)

    def test_a_value_that_is_not_finite_is_said(self):
        bench = self.benches[True]
        dump = dict(bench.dump(()))
        key = "grad.model.layers.0.mlp.up_proj.weight"
        dump[key] = np.array(dump[key])
        dump[key][3, 4] = np.nan
        (finding,) = bench.diagnose(dump).findings
        self.assertEqual((finding.fault, finding.layers), ("non-finite", (0,)))

    def test_a_loss_scale_that_parameters_no_longer_hold_is_no_mistake(self):
        bench = self.benches[True]
        dump = bench.dump([Planted("gradient-scaled", None, {"factor": 1024.0})])
        dump = {
            k: v / np.float32(1024) if Key(k).of_parameter and k.startswith(GRADIENT) else v for k, v in dump.items()
        }
        answer = bench.diagnose(dump)
        self.assertEqual(answer.findings, ())
        self.assertIn("1024", answer.notes[0])


@pytest.mark.slow
class WholeTableTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of(GQA)

    def test_every_mistake_of_the_table_is_planted_here(self):
        planted = {each.name for each in (*singles(self.bench), *adapter_singles())}
        self.assertEqual(planted, set(BACKWARD))

    def test_each_is_named_alone_in_one_layer(self):
        for bench, all_planted in ((self.bench, singles(self.bench)), (self.bench.adapted(), adapter_singles())):
            for planted in all_planted:
                if planted.layers in ((1,), None):
                    found = bench.diagnose(bench.dump([planted])).findings
                    with self.subTest(str(planted)):
                        self.assertTrue(any(matches(bench, planted, f) for f in found), [f.sentence for f in found])
                        self.assertLen(found, 1)


if __name__ == "__main__":
    absltest.main()
