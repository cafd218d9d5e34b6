"""`model.module` under JAX's and Flax's transforms, on one device and on four, and the host-side API around it."""

import inspect
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import apr_jax
from apr_jax.converters.errors import UsageError
from apr_jax.generate.generator import Generator
from apr_jax.load.load_model import load_model
from apr_jax.model.qwen2 import OPS, Qwen2ForCausalLM
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import seeded
from tests import faults, paths

TINY = paths.checkpoint("gqa_tied_bf16")
# The shape of the golden files, which programs of other tests have too.
IDS = seeded(288, 2, 64).input_ids


def loss(module, ids):
    logits = jax.nn.log_softmax(module(ids)[:, :-1].astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1))


def distance(one, other):
    return max(
        relative_l2(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


class LogitsTest(parameterized.TestCase):
    @parameterized.parameters("gqa_tied_bf16", "head_dim_given", "mha_untied_f32_sharded", "odd_sizes")
    def test_the_module_computes_what_the_model_computes(self, name):
        model = load_model(paths.checkpoint(name))
        ids = seeded(model.config.vocab_size, 2, 64).input_ids
        ours = nnx.jit(lambda module: module(ids))(model.module)
        self.assertEqual((ours.shape, ours.dtype), ((2, 64, model.config.vocab_size), jnp.float32))
        self.assertLessEqual(relative_l2(np.asarray(ours), np.asarray(model(ids))), 1e-6)

    @parameterized.parameters("left", "right")
    def test_padding_and_positions_are_those_of_the_model(self, side):
        model = load_model(TINY)
        mask = np.ones_like(IDS)
        mask[1, slice(0, 4) if side == "left" else slice(7, None)] = 0
        expected = np.asarray(model(IDS, mask))[mask == 1]
        self.assertLessEqual(relative_l2(np.asarray(model.module(IDS, attention_mask=mask))[mask == 1], expected), 1e-6)
        positions = np.arange(20, 84)
        expected = np.asarray(model(IDS, mask, np.tile(positions, (2, 1))))[mask == 1]
        traced = jax.jit(lambda positions, mask: model.module(IDS, positions, mask))
        for ours in (model.module(IDS, positions, mask), traced(positions, mask)):
            self.assertLessEqual(relative_l2(np.asarray(ours)[mask == 1], expected), 1e-6)

    def test_what_cannot_be_raised_in_a_traced_program_is_nan(self):
        module = load_model(TINY).module
        positions = np.array([*range(63), module.config.max_position_embeddings])
        self.assertTrue(jnp.isnan(jax.jit(lambda p: module(IDS, p))(positions)[:, -1]).all())
        self.assertTrue(jnp.isnan(jax.jit(module)(np.array([[5, 288]]))[:, -1]).all())

    def test_float64_stays_float64_in_the_users_scope(self):
        model = load_model(TINY, "float64")
        with jax.enable_x64(True):
            ours = nnx.jit(lambda module: module(IDS))(model.module)
        self.assertEqual(ours.dtype, np.float64)
        self.assertLessEqual(relative_l2(np.asarray(ours), np.asarray(model(IDS))), 1e-14)


class TransformsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.module = load_model(TINY).module
        cls.loss, cls.gradients = nnx.jit(nnx.value_and_grad(loss))(cls.module, IDS)

    def test_split_and_merge_with_jax_grad(self):
        graph, state = nnx.split(self.module)
        value, gradients = jax.jit(jax.value_and_grad(lambda state: loss(nnx.merge(graph, state), IDS)))(state)
        self.assertLessEqual(distance(gradients, self.gradients), 1e-5)
        self.assertLessEqual(abs(value - self.loss), 1e-6 * self.loss)

    def test_vmap_over_sequences_and_over_parameters(self):
        whole = self.module(IDS)
        each = jax.jit(jax.vmap(lambda row: self.module(row[None])[0]))(IDS)
        self.assertLessEqual(distance(each, whole), 1e-6)
        graph, state = nnx.split(self.module)
        both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), state)
        one, two = jax.jit(jax.vmap(lambda state: nnx.merge(graph, state)(IDS)))(both)
        self.assertLessEqual(distance(one, whole), 1e-6)
        self.assertGreater(distance(two, whole), 1e-3)

    def test_checkpoint_of_the_model_and_of_each_layer(self):
        def remade(module, ids):
            step = module.place(ids)
            x = module.embed(ids)
            for layer in module.model.layers:
                x = jax.checkpoint(lambda layer, x: layer(x, step)[0])(layer, x)
            logits = jax.nn.log_softmax(module.project(module.norm(x))[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1))

        graph, state = nnx.split(self.module)
        whole = jax.checkpoint(lambda state: loss(nnx.merge(graph, state), IDS))
        layers = lambda state: remade(nnx.merge(graph, state), IDS)  # noqa: E731
        for function, names in ((whole, 1), (layers, self.module.config.num_layers)):
            program = str(jax.make_jaxpr(jax.grad(function))(state))
            self.assertEqual(program.count("remat") + program.count("checkpoint["), names)
            self.assertLessEqual(distance(jax.jit(jax.grad(function))(state), self.gradients), 1e-5)

    def test_orbax_restores_a_module(self):
        expected = self.module(IDS)
        with tempfile.TemporaryDirectory() as folder:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(pathlib.Path(folder) / "state", nnx.state(self.module))
            fresh = Qwen2ForCausalLM(self.module.config)
            self.assertEqual(float(jnp.abs(fresh(IDS)).max()), 0)
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                nnx.update(fresh, checkpointer.restore(pathlib.Path(folder) / "state", nnx.state(fresh)))
        np.testing.assert_array_equal(fresh(IDS), expected)


class OneModelTest(parameterized.TestCase):
    """The module and the model are one set of arrays."""

    def test_no_array_is_copied(self):
        model = load_model(TINY, fused=True)
        held = nnx.to_pure_dict(nnx.state(model.module, nnx.Param))
        self.assertEqual(jax.tree.structure(held), jax.tree.structure(model.parameters))
        for one, other in zip(jax.tree.leaves(held), jax.tree.leaves(model.parameters), strict=True):
            self.assertIs(one, other)

    @parameterized.parameters(False, True)
    def test_a_fresh_module_has_room_for_what_a_checkpoint_holds(self, fused):
        model = load_model(TINY, fused=fused)
        fresh = nnx.eval_shape(lambda: Qwen2ForCausalLM(model.config, fused=fused))
        shapes = [
            jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(nnx.state(module, nnx.Param)))
            for module in (fresh, model.module)
        ]
        self.assertEqual(*shapes)

    def test_what_is_written_into_the_module_is_what_the_model_computes_with(self):
        model = load_model(TINY)
        sibling, generator = model.with_ops(OPS), Generator(model)
        before, said = np.asarray(model(IDS)), generator.generate([[5, 6, 7]], max_new_tokens=8)[0].token_ids
        nnx.update(model.module, jax.tree.map(lambda x: -x, nnx.state(model.module)))
        after = np.asarray(model.module(IDS))
        self.assertGreater(relative_l2(after, before), 0.1)
        for other in (model, sibling):
            self.assertLessEqual(relative_l2(np.asarray(other(IDS)), after), 1e-6)
        self.assertEqual(model.trace(seeded(288, 1, 4), ["logits"])["logits"].shape, (1, 4, 288))
        self.assertNotEqual(generator.generate([[5, 6, 7]], max_new_tokens=8)[0].token_ids, said)

    def test_a_tracer_is_told_where_to_go(self):
        model = load_model(TINY)
        mask = np.ones_like(IDS)
        for function in (model, lambda ids: model(np.asarray(IDS), ids), lambda ids: model(IDS, mask, ids)):
            with self.assertRaisesRegex(UsageError, r"model\.module"):
                jax.jit(function)(IDS)
        with self.assertRaisesRegex(UsageError, r"model\.module"):
            jax.jit(lambda cache: model.step(seeded(288), cache)[0])(model.empty_cache(2, 64))


class WordsTest(parameterized.TestCase):
    @parameterized.parameters(jnp.bfloat16, "bf16", "bfloat16", np.dtype(jnp.bfloat16))
    def test_a_dtype_may_be_written_as_jax_users_write_it(self, dtype):
        self.assertEqual(load_model(TINY, dtype).dtype, "bfloat16")

    @parameterized.parameters(jnp.int8, "half", "int8", None, 32)
    def test_other_dtypes_are_refused_with_the_known_ones(self, dtype):
        with self.assertRaisesRegex(UsageError, "float32 or bfloat16 or float16 or float64"):
            load_model(TINY, dtype)

    def test_a_device_may_be_a_name_with_a_number_a_device_or_a_sharding(self):
        cpu = jax.devices("cpu")[0]
        for device in ("cpu", "cpu:0", cpu, jax.sharding.SingleDeviceSharding(cpu), None):
            model = load_model(TINY, device=device)
            self.assertEqual((model.device, model.module.model.norm.weight[...].devices()), (cpu, {cpu}))
        for wrong in ("cpu:9", "cpu:x", "cpu:-1", "tpu"):
            with self.assertRaisesRegex(UsageError, wrong):
                load_model(TINY, device=wrong)

    def test_what_is_no_batch_says_what_to_do(self):
        model = load_model(TINY)
        for wrong, advice in (
            ([5, 6, 7], r"\[\[5, 6, 7\]\]"),
            ("hello", "load_generator"),
            (["hello"], "load_generator"),
        ):
            with self.assertRaisesRegex(UsageError, advice):
                model(wrong)
        with self.assertRaisesRegex(ValueError, r"\[batch, tokens\]"):
            model.module(IDS[0])

    def test_reprs_say_sizes_dtype_and_device(self):
        model = load_model(TINY, "bfloat16")
        shown = repr(model)
        for part in ("2 layers", "hidden size 64", "vocabulary 288", "105,024 parameters", "bfloat16 on cpu:0", "OPS"):
            self.assertIn(part, shown)
        self.assertIn("rope=adjacent_pairs", repr(model.with_ops(faults.ADJACENT_PAIRS)))
        self.assertEqual(repr(model.empty_cache(2, 8)), "Cache(2 rows of 8 slots, 2 layers, bfloat16 on cpu:0)")
        self.assertEqual(repr(seeded(288, 2, 5)), "Inputs(2 rows of 5 positions, 10 tokens)")
        self.assertEqual(repr(Generator(model)), f"Generator({shown}, no tokenizer)")

    def test_help_shows_a_signature_of_one_line(self):
        shown = str(inspect.signature(apr_jax.load_model))
        self.assertNotIn("\n", shown)
        self.assertIn("ops: 'Ops' = OPS", shown)
        self.assertLess(len(shown), 300)

    def test_every_public_name_is_there(self):
        for name in (*apr_jax.__all__, "__version__"):
            self.assertIsNotNone(getattr(apr_jax, name))
            self.assertIn(name, dir(apr_jax))
        self.assertRegex(apr_jax.__version__, r"^\d")


FOUR_DEVICES = """
import sys, tempfile
import jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from apr_jax import load_model, save
source = sys.argv[1]
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
ids = np.random.default_rng(0).integers(0, 288, (4, 9))
model = load_model(source)
expected = model(ids)
# In float64: under float32 the gradient of a k bias is what is left of a sum that cancels, on some CPUs 1.1e-5 off.
exact = load_model(source, "float64").module
gradient = nnx.jit(nnx.grad(lambda module, ids: module(ids).mean()))
with jax.enable_x64(True):
    gradients = gradient(exact, ids)

def close(one, other, bound=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)

# Rows of every matrix over one axis of the mesh, sequences over the other.
spread = lambda x: NamedSharding(mesh, P("model", *[None] * (x.ndim - 1)))
state = nnx.state(model.module)
nnx.update(model.module, jax.device_put(state, jax.tree.map(spread, state)))
held = jax.tree.leaves(model.parameters)
assert all(len(x.devices()) == 4 for x in held) and any(not x.is_fully_replicated for x in held)
shown = jax.device_put(ids, NamedSharding(mesh, P("data")))
logits = nnx.jit(lambda module, ids: module(ids))(model.module, shown)
assert len(logits.devices()) == 4
close(logits, expected)
with jax.enable_x64(True):
    state = nnx.state(exact)
    nnx.update(exact, jax.device_put(state, jax.tree.map(spread, state)))
    found = gradient(exact, shown)
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(found))
    close(found, gradients, 1e-12)
close(model(ids), expected)
cache = model.empty_cache(4, 16)
from apr_jax import Inputs
step, cache = model.step(Inputs.of(ids[:, :5]), cache)
more, cache = model.step(Inputs.of(ids[:, 5:], None, np.tile(np.arange(5, 9), (4, 1))), cache)
close(np.concatenate([step, more], 1), expected)
assert repr(model).count("cpu:") == 4, repr(model)
with tempfile.TemporaryDirectory() as folder:
    save(model, folder + "/m.apr")
    close(load_model(folder + "/m.apr").parameters, load_model(source).parameters)
close(load_model(source, device="cpu:3")(ids), expected)
close(load_model(source, device=NamedSharding(mesh, P()))(ids), expected)
try:
    load_model(source, device=NamedSharding(mesh, P(None, "model")))
except Exception as error:
    assert "does not fit" in str(error), error
else:
    raise AssertionError("a sharding that does not fit was taken")
print("as expected")
"""


@pytest.mark.slow
class FourDevicesTest(absltest.TestCase):
    def test_a_sharded_module_computes_the_same(self):
        done = subprocess.run(
            [sys.executable, "-c", FOUR_DEVICES, str(TINY)],
            cwd=paths.ROOT,
            # Nearly all of it is compilation: programs that are quickly made will do.
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
            },
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.stdout, "as expected\n", done.stderr)


if __name__ == "__main__":
    absltest.main()
