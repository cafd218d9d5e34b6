"""Suites that need eight devices, simulated on the CPU; mesh_test.py runs each class in a process of its own.

python tests/mesh/eight_devices.py [Class[.test]]
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
# Nearly all of it is compilation: programs that are quickly made will do.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import UsageError
from apr_jax.generate import programs
from apr_jax.generate.generator import Generator, load_generator
from apr_jax.kernels import fastest_ops
from apr_jax.load import load_model as loading
from apr_jax.load import parameters
from apr_jax.load.load_model import find_mesh, load_model
from apr_jax.model import qwen2
from apr_jax.model.gradients import gradients
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.qwen2 import OPS
from apr_jax.model.sharding import Layout
from apr_jax.testing import sample
from apr_jax.trace import golden
from tests import paths, tool

MESHES = {"data=2,model=4": {"data": 2, "model": 4}, "model=2": {"model": 2}, "model=8": {"model": 8}}
TINY = "gqa_tied_bf16"
NEW = 24


def relative_l2(found, expected) -> float:
    found, expected = (
        np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in each]) for each in (found, expected)
    )
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def on_mesh(name, mesh, **settings):
    return load_model(paths.checkpoint(name), device=find_mesh(MESHES[mesh], "cpu"), **settings)


class _Suite(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def check_model(self, name, mesh):
        """Logits, gradients of all parameters, and greedy tokens are those of one device."""
        inputs = golden.read(paths.golden(name)).inputs
        alone, spread = load_model(paths.checkpoint(name)), on_mesh(name, mesh)
        tokens = inputs.attention_mask == 1
        self.assertLess(relative_l2([spread.logits(inputs)[tokens]], [alone.logits(inputs)[tokens]]), 1e-5)
        loss, expected = gradients(alone, inputs)
        found_loss, found = gradients(spread, inputs)
        self.assertAlmostEqual(found_loss, loss, delta=1e-5 * loss)
        self.assertEqual(set(found), set(expected))
        self.assertLess(relative_l2([found[key] for key in expected], expected.values()), 1e-5)
        prompts = [inputs.input_ids[0, :20].tolist(), inputs.input_ids[1, 20:31].tolist(), [5]]
        texts = [
            [row.token_ids for row in Generator(model).generate(prompts, max_new_tokens=NEW, do_sample=False)]
            for model in (alone, spread)
        ]
        self.assertEqual(*texts)
        self.assertEqual([len(row) for row in texts[0]], [NEW] * 3)

    def check_golden(self, name, mesh, code=0):
        """`golden --check` on a mesh, against HuggingFace's values."""
        given = (paths.checkpoint(name), "--check", paths.golden(name), "--mesh", mesh)
        done = tool.run("golden", *given)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)

    def trace(self, name, mesh):
        """A dump of what is computed on a mesh."""
        dump = self.folder / "dump.safetensors"
        done = tool.run("golden", paths.checkpoint(name), "-o", dump, "--trace", "--force", "--mesh", mesh)
        self.assertEqual(done.returncode, 0, done.stderr)
        return dump


def rolled(name):
    """Plants: each device gets the part of a weight that belongs to its neighbour."""
    made = jax.make_array_from_single_device_arrays

    def make(shape, sharding, arrays):
        if shape == name:
            parts = [np.asarray(array) for array in arrays]
            arrays = [jax.device_put(part, a.device) for part, a in zip([*parts[1:], parts[0]], arrays, strict=True)]
        return made(shape, sharding, arrays)

    return mock.patch.object(jax, "make_array_from_single_device_arrays", make)


def unsummed(layout):
    """Plants: the output projection of attention is not summed over the devices of `model`; a table of operations."""
    width = layout.config.num_heads * layout.config.head_dim
    spec = layout.spec("o_proj.weight")

    def linear(ops, x, weight, dtype=None):
        if weight.shape != (layout.config.hidden_size, width):
            return qwen2.linear(ops, x, weight, dtype)
        part = jax.shard_map(
            lambda x, weight: qwen2.linear(OPS, x, weight, dtype),
            mesh=layout.mesh,
            in_specs=(PartitionSpec(None, None, spec[1]), spec),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return part(x, weight)

    return dataclasses.replace(OPS, linear=linear)


class QuickTest(_Suite):
    """What the default suite has time for: one checkpoint whose key/value heads are fewer than the devices."""

    def test_a_mesh_computes_what_one_device_does(self):
        self.check_model(TINY, "data=2,model=4")

    def test_golden_and_a_wrongly_spread_weight(self):
        self.check_golden(TINY, "model=2")
        with rolled((32, 64)):  # k and v: with two key/value heads on two devices, rolled by a head
            self.check_golden(TINY, "model=2", code=1)

    def test_each_device_reads_its_own(self):
        check_bytes(self, 2, 0.55)

    def test_meshes_that_cannot_be(self):
        for mesh, said in (
            ({"model": 9}, "has 9 devices.*found 8 cpu devices.*device_count=9"),
            ({"data": 3, "model": 4}, "has 12 devices"),
        ):
            with self.assertRaisesRegex(UsageError, said):
                find_mesh(mesh, "cpu")
        with self.assertRaisesRegex(UsageError, "all devices of a kind"):
            find_mesh({"model": 2}, "cpu:1")
        with self.assertRaisesRegex(UsageError, "axis that a model has no use for.*'stage'"):
            load_model(paths.checkpoint(TINY), device=jax.make_mesh((2,), ("stage",)))
        with self.assertRaisesRegex(UsageError, "fused"):
            on_mesh(TINY, "model=2", fused=True)
        self.assertEqual(find_mesh({"data": 1, "model": 1}, "cpu"), "cpu")
        # A mesh of one device is that device: the same programs.
        alone = load_generator(paths.checkpoint(TINY), device=jax.make_mesh((1, 1), ("data", "model")))
        self.assertIsNone(alone.model.layout)
        self.assertIs(alone.programs, load_generator(paths.checkpoint(TINY), device="cpu").programs)


class EveryCheckpointTest(_Suite):
    @parameterized.product(name=paths.NAMES, mesh=list(MESHES))
    def test_a_mesh_computes_what_one_device_does(self, name, mesh):
        self.check_model(name, mesh)

    @parameterized.product(name=paths.NAMES, mesh=list(MESHES))
    def test_golden_on_a_mesh(self, name, mesh):
        self.check_golden(name, mesh)

    @parameterized.parameters(*MESHES)
    def test_gradients_of_the_module_in_float64(self, mesh):
        """In the caller's own program, where nothing is placed but parameters and tokens."""
        ids = np.random.default_rng(0).integers(0, 288, (4, 9))
        gradient = nnx.jit(nnx.grad(lambda module, ids: module(ids).mean()))
        with jax.enable_x64(True):
            expected = jax.tree.leaves(gradient(load_model(paths.checkpoint(TINY), "float64").module, ids))
            model = on_mesh(TINY, mesh, dtype="float64")
            found = jax.tree.leaves(gradient(model.module, ids))
            self.assertTrue(any(not leaf.is_fully_replicated for leaf in found))
            for one, other in zip(found, expected, strict=True):
                self.assertLess(relative_l2([one], [other]), 1e-11)


class LoadTest(_Suite):
    @parameterized.parameters((2, 0.55), (8, 0.16))
    def test_each_device_reads_its_own(self, devices, most):
        for container in ("safetensors", "apr", "sharded"):
            check_bytes(self, devices, most, container)

    @parameterized.product(devices=(2, 8), cast=("q4k", "q8"))
    def test_of_quantised_files_the_blocks(self, devices, cast):
        check_bytes(self, devices, 0.55 if devices == 2 else 0.16, "apr", cast)

    def test_a_replica_reads_nothing(self):
        config = WIDE
        with opened_wide(self.folder, "safetensors") as checkpoint:
            read = bytes_read(checkpoint, config, {"data": 2, "model": 4})
        self.assertLen(read, 4)

    @parameterized.parameters(*paths.NAMES)
    def test_parameters_are_those_of_one_device_bit_for_bit(self, name):
        alone = jax.tree.leaves(load_model(paths.checkpoint(name), "bfloat16").parameters)
        for mesh in MESHES:
            model = on_mesh(name, mesh, dtype="bfloat16")
            for one, other in zip(jax.tree.leaves(model.parameters), alone, strict=True):
                self.assertEqual(np.asarray(one).tobytes(), np.asarray(other).tobytes())
                # Also the copies that are not shown.
                for part in one.addressable_shards:
                    self.assertEqual(np.asarray(part.data).tobytes(), np.asarray(other)[part.index].tobytes())


# Wide enough for parts of rows to be pages, with little that is not cut: norms, 0.02 %.
WIDE = Qwen2Config(2048, 256, 4096, 1, 32, 8, 128, 1e6, 1e-6, False)


def opened_wide(folder, container, cast=None):
    """Writes a checkpoint of the shape and opens it."""
    with mock.patch.dict(sample.SAMPLES, wide=sample.Sample("wide", WIDE, shards=3, spell_head_dim=True)):
        if not (folder / "wide").exists():
            sample.write_sample("wide", folder / "wide")
    path = folder / "wide"
    if container == "safetensors":
        path = folder / "wide.safetensors"
        convert(folder / "wide", path, to="safetensors")
    if container == "apr":
        path = folder / f"{cast}.apr"
        convert(folder / "wide", path, to="apr", cast=[CastRule.parse(cast)] if cast else [])
    return open_checkpoint(path)


def bytes_read(checkpoint, config, shape):
    """Loads onto a mesh; returns bytes by the device that they were read for."""
    read = {}
    load = parameters._load

    def counted(sources, dtype, device, **options):
        before = sum(source.bytes_read for source in checkpoint.sources)
        found = load(sources, dtype, device, **options)
        read[device] = sum(source.bytes_read for source in checkpoint.sources) - before
        return found

    with mock.patch.object(parameters, "_load", counted):
        layout = Layout.of(config, find_mesh(shape, "cpu"))
        parameters.load_parameters(checkpoint, config, "bfloat16", layout)
    return read


def check_bytes(test, devices, most, container="sharded", cast=None):
    with opened_wide(test.folder, container, cast) as checkpoint:
        size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        read = bytes_read(checkpoint, WIDE, {"model": devices})
        test.assertLen(read, devices)
        for device, count in read.items():
            test.assertGreater(count, size / devices / 1.01, device)
            test.assertLessEqual(count, most * size, (device, count / size))
        # Nor is anything read beside: the whole file once, its metadata, and the blocks' scales for each part.
        test.assertLess(sum(source.bytes_read for source in checkpoint.sources), 1.01 * size + 1e5)


class ParityTest(_Suite):
    def test_a_run_on_a_mesh_is_clean(self):
        for mesh in MESHES:
            dump = self.trace(TINY, mesh)
            done = tool.run("parity", paths.checkpoint(TINY), "--right", dump, "--json")
            self.assertEqual(done.returncode, 0, done.stdout)

    def test_parity_itself_on_a_mesh(self):
        """A right dump is clean, and a mistake is named, where both models lie on a mesh."""
        from tests.battery import parity_battery

        source = paths.checkpoint(TINY)
        done = tool.run("parity", source, "--right", "cpu", "--mesh", "data=2,model=4")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        parity_battery.write_real_case(self.folder / "wrong")
        done = tool.run("parity", source, "--right", self.folder / "wrong", "--mesh", "model=2")
        alone = tool.run("parity", source, "--right", self.folder / "wrong")
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        named = [[line for line in run.stdout.splitlines() if line.startswith("  - ")] for run in (done, alone)]
        self.assertLen(named[0], 4)
        self.assertEqual(*named)

    def test_wrongly_spread_weights_turn_golden_and_parity_red(self):
        def without_a_sum(config, *given, layout, **more):
            return LanguageModel(config, *given, layout=layout, **more).with_ops(unsummed(layout))

        faults = {
            "all layers, qkv_matmul: ": rolled((32, 64)),  # k and v
            "all layers, attn_out: ": rolled((64, 64)),  # o, and q
            "all layers, ffn_out: ": rolled((64, 160)),  # down
            "all layers, attn_out: self_attn.o_proj.weight: the sum leaves out columns 32 to 63": mock.patch.object(
                loading, "LanguageModel", without_a_sum
            ),
        }
        for said, fault in faults.items():
            with self.subTest(said):
                with fault:
                    self.check_golden(TINY, "model=2", code=1)
                    dump = self.trace(TINY, "model=2")
                done = tool.run("parity", paths.checkpoint(TINY), "--right", dump)
                self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
                self.assertIn(said, done.stdout)


class GenerateTest(_Suite):
    def test_programs_are_keyed_by_where_the_model_lies(self):
        source = paths.checkpoint(TINY)
        programs._programs.cache_clear()
        made = [load_generator(source, device=find_mesh(MESHES[mesh], "cpu")) for mesh in MESHES]
        made.append(load_generator(source))
        texts = [one.generate(["abc", "de", "f"], max_new_tokens=70, do_sample=False) for one in made]
        for text in texts[1:]:
            self.assertEqual(text, texts[0])
        self.assertLen({id(one.programs) for one in made}, 4)
        compiled = [one.programs.compiled for one in made]
        self.assertEqual(compiled, [compiled[-1]] * 4)
        again = load_generator(source, device=find_mesh(MESHES["model=2"], "cpu"))
        again.generate(["abc", "de", "f"], max_new_tokens=70, do_sample=False)
        self.assertIs(again.programs, made[1].programs)
        self.assertEqual(again.programs.compiled, compiled[-1])

    def test_a_step_tells_other_devices_only_what_it_has_to(self):
        """Two sums a layer and one for the embedding; no weight, no cache and no logits go from device to device."""
        from tests.bench.mesh_bench import collectives

        for mesh, rows in (("model=2", 1), ("model=2", 4)):
            programs._programs.cache_clear()
            made = load_generator(paths.checkpoint(TINY), device=find_mesh(MESHES[mesh], "cpu"))
            made.generate([[1, 2, 3]] * rows, max_new_tokens=4, do_sample=False, repetition_penalty=1.0)
            ((_, program),) = ((key, p) for key, p in made.programs._compiled.items() if key[0] == "decode")
            told = collectives(program.as_text())
            config = made.model.config
            self.assertEqual(told.pop(("all-reduce", 4 * rows * config.hidden_size)), 2 * config.num_layers + 1)
            # Of logits the best of each part.
            self.assertTrue(all(nbytes <= 64 for _, nbytes in told), told)

    def test_flash_attention_of_each_devices_own_heads(self):
        """As on a mesh of GPUs, with XLA's own in cuDNN's place."""
        flash, seen = jax.nn.dot_product_attention, []

        def by_xla(q, k, v, **settings):
            seen.append((q.shape, k.shape))
            return flash(q, k, v, **settings | {"implementation": "xla"})

        prompts = [list(range(3, 40)), [9, 8, 7], list(range(50, 60)), [1]]
        expected = Generator(load_model(paths.checkpoint(TINY))).generate(prompts, max_new_tokens=4, do_sample=False)
        for mesh in MESHES:
            model = on_mesh(TINY, mesh)
            self.assertTrue(model.layout.heads_meet)
            with mock.patch.object(jax.nn, "dot_product_attention", by_xla):
                found = Generator(model.with_ops(fastest_ops.mesh_ops(model.layout)))
                self.assertEqual(found.generate(prompts, max_new_tokens=4, do_sample=False), expected)
        # Rows, tokens, heads: of four and of two, on (2, 4), (1, 2) and (1, 8) devices; the last layer keeps one token.
        shapes = {((2, 48, 1, 16), (2, 48, 1, 16)), ((4, 48, 2, 16), (4, 48, 1, 16)), ((4, 48, 1, 16), (4, 48, 1, 16))}
        self.assertEqual(set(seen), shapes)

    def test_caches_are_cut_by_heads_and_rows(self):
        for mesh, rows, share in (("data=2,model=4", 4, 4), ("data=2,model=4", 3, 2), ("model=8", 4, 2)):
            model = on_mesh(TINY, mesh)
            cache = model.empty_cache(rows, 16)
            self.assertLen(cache.layers[0].keys.devices(), 8)
            self.assertEqual(cache.layers[0].keys.addressable_shards[0].data.size * share, cache.layers[0].keys.size)

    def test_a_long_prompt_goes_on_behind_its_first_chunk(self):
        prompts = [list(range(3, 60)), list(range(20))]
        texts = []
        for model in (load_model(paths.checkpoint(TINY)), on_mesh(TINY, "data=2,model=4")):
            generator = Generator(model, prefill_chunk=16)
            texts.append([row.token_ids for row in generator.generate(prompts, max_new_tokens=8, do_sample=False)])
        self.assertEqual(*texts)

    def test_draws_and_penalties_are_those_of_one_device(self):
        settings = {"max_new_tokens": 30, "do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
        source = paths.checkpoint(TINY)
        alone, spread = (
            load_generator(source, device=device).generate(["ab", "c"], seed=3, **settings)
            for device in ("cpu", find_mesh(MESHES["data=2,model=4"], "cpu"))
        )
        self.assertEqual(alone, spread)

    def test_a_model_that_its_caller_spread_in_another_way(self):
        model = load_model(paths.checkpoint(TINY))
        expected = Generator(model).generate([[1, 2, 3]], max_new_tokens=70, do_sample=False)
        mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
        state = nnx.state(model.module)
        spread = lambda x: NamedSharding(mesh, PartitionSpec("x"))  # noqa: E731
        nnx.update(model.module, jax.device_put(state, jax.tree.map(spread, state)))
        found = Generator(model).generate([[1, 2, 3]], max_new_tokens=70, do_sample=False)
        self.assertEqual(found, expected)

    def test_loss_with_a_batch_that_does_not_divide(self):
        text = self.folder / "text"
        text.write_text("So long, and thanks for all the fish. " * 30)
        given = (paths.checkpoint(TINY), "--text", text, "--window", 32, "--batch", 3, "--json")
        alone, spread = (
            tool.json_outputs.json.loads(tool.run("loss", *given, *more).stdout)["loss_nats"]
            for more in ((), ("--mesh", "data=2,model=4"))
        )
        self.assertAlmostEqual(alone, spread, delta=1e-5 * alone)


class BenchTest(_Suite):
    def test_bench_says_how_the_model_lies(self):
        given = (paths.checkpoint(TINY), "--cases", "prefill-2x16,decode-2x16", "--quick", "--json")
        done = tool.run("bench", *given, "--mesh", "model=4")
        self.assertEqual(done.returncode, 0, done.stderr)
        found = tool.json_outputs.json.loads(done.stdout)["mesh"]
        self.assertEqual(found["parts"], {"kv_heads": 2, "heads": 4, "ffn": 4, "vocabulary": 4})
        self.assertLess(found["parameter_bytes_per_device"], 0.3 * found["parameter_bytes"])
        self.assertIn("give way", found["operations"])
        self.assertNotIn("mesh", tool.json_outputs.json.loads(tool.run("bench", *given).stdout))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        absltest.main()
