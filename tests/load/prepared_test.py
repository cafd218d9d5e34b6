"""Prepared checkpoints: bit-equal after restore, Orbax's own format, everything along, whole or not there at all."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import sys
import threading
import tracemalloc
import types
import zlib
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import ml_dtypes  # noqa: F401  (numpy learns bfloat16 of it)
import numpy as np
import orbax.checkpoint
from absl.testing import absltest, parameterized

from apr_jax.commands import checkpoint as command
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import (
    AprJaxError,
    BrokenContainerError,
    MissingFileError,
    RefusedError,
    StorageError,
    UsageError,
)
from apr_jax.load import prepared
from apr_jax.load.load_model import load_model
from apr_jax.trace import golden
from tests import flushes, paths

SOURCE = paths.checkpoint("gqa_tied_bf16")
DOWN = "model.layers.1.mlp.down_proj.weight"


class Case(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.scratch = pathlib.Path(self.create_tempdir().full_path)
        self.folder = self.scratch / "prepared"

    def save(self, source=SOURCE, **options):
        with open_checkpoint(source) as checkpoint:
            return prepared.save(checkpoint, str(self.folder), **options)

    def edit(self, name, **changes):
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def assert_same_bits(self, found, expected):
        self.assertEqual(jax.tree.structure(found), jax.tree.structure(expected))
        for here, there in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            here, there = np.asarray(here), np.asarray(there)
            self.assertEqual((here.dtype, here.shape), (there.dtype, there.shape))
            np.testing.assert_array_equal(here.view("u1"), there.view("u1"))

    def refused(self, kind, code, call=None):
        with self.assertRaises(AprJaxError) as caught:
            (call or (lambda: load_model(self.folder)))()
        self.assertEqual((type(caught.exception), caught.exception.code), (kind, code), caught.exception)
        return caught.exception


class RestoreTest(Case):
    @parameterized.parameters(
        ("gqa_tied_bf16", "bfloat16", True),
        ("odd_sizes", "float32", True),
        ("mha_untied_f32_sharded", "bfloat16", False),
        ("mixed_dtypes", "float64", True),
        ("mqa_f16", "float32", False),
    )
    def test_parameters_are_bit_equal_to_those_of_the_source(self, name, dtype, fused):
        self.save(paths.checkpoint(name), dtype=dtype, fused=fused)
        self.assertEqual(prepared.check(str(self.folder), "cpu").dtype, dtype)
        # However it was prepared, it is loaded either way: fused rows are tensors one behind the other.
        for each in (False, True):
            expected = load_model(paths.checkpoint(name), dtype, "cpu", fused=each)
            self.assert_same_bits(load_model(self.folder, dtype, "cpu", fused=each).parameters, expected.parameters)

    def test_orbax_restores_the_same_tree(self):
        self.save(dtype="bfloat16", fused=True)
        found = orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False).restore(self.folder / "parameters")
        expected = dict(load_model(SOURCE, "bfloat16", "cpu", fused=True).parameters)
        expected["model"] = dict(expected["model"])
        expected["model"]["layers"] = {str(layer): of for layer, of in expected["model"]["layers"].items()}
        self.assert_same_bits(found, expected)

    def test_what_one_device_has_is_not_copied_before_it_is_written(self):
        values = jax.numpy.arange(4 << 20, dtype="float32").reshape(2048, 2048)
        # NumPy tells tracemalloc what it takes.
        tracemalloc.start()
        try:
            with prepared._being_written({"values": values}, str(self.folder)):
                pass
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        self.assertEqual((self.folder / "values" / "0.0").read_bytes(), np.asarray(values).tobytes())
        self.assertLess(peak, values.nbytes // 2)

    def test_configuration_side_files_and_provenance_come_along(self):
        description = self.save(dtype="bfloat16", fused=True)
        with open_checkpoint(SOURCE) as source, open_checkpoint(self.folder) as found:
            self.assertEqual(dict(found.files), dict(source.files))
            self.assertGreater(len(source.files), 4)
            self.assertEqual(found.model_config(), source.model_config())
            self.assertEqual((found.metadata, found.left_behind), (source.metadata, ()))
            digest = golden.weights_sha256(source)
            # The same weights under the same names, as if nothing had been fused.
            self.assertEqual(golden.weights_sha256(found), digest)
        self.assertEqual(description.source["weights_sha256"], digest)
        self.assertEqual(description.source["path"], str(SOURCE))
        self.assertEqual(
            description.source["files"], {"model.safetensors": (SOURCE / "model.safetensors").stat().st_size}
        )
        self.assertEqual(description.versions["jax"], jax.__version__)
        self.assertEqual((description.dtype, description.fused, description.devices), ("bfloat16", True, 1))

    def test_it_converts_back_to_the_very_files_of_its_source(self):
        self.save(dtype="bfloat16", fused=True)
        convert(self.folder, self.scratch / "hf", to="safetensors")
        for file in SOURCE.iterdir():
            self.assertEqual((self.scratch / "hf" / file.name).read_bytes(), file.read_bytes(), file.name)

    def test_an_apr_without_config_json_gets_one(self):
        source = paths.DATA / "apr" / "tiny_f32_tied-int8.apr"
        self.save(source, dtype="float32", fused=True)
        with open_checkpoint(source) as opened, open_checkpoint(self.folder) as found:
            self.assertEqual(found.model_config(), opened.model_config())
        self.assert_same_bits(load_model(self.folder).parameters, load_model(source).parameters)


class BeginTest(Case):
    @parameterized.parameters("bfloat16", "float64", "float16")
    def test_what_is_changed_meanwhile_is_saved_as_it_was(self, dtype):
        model = load_model(SOURCE, dtype, "cpu", fused=dtype == "bfloat16")
        expected = jax.tree.map(lambda array: np.array(array), model.parameters)
        may_write, real = threading.Event(), prepared._being_written

        def waiting(*arguments):
            may_write.wait(60)
            return real(*arguments)

        with absltest.mock.patch.object(prepared, "_being_written", waiting):
            saving = prepared.begin(model, str(self.folder))
            jax.tree.map(lambda array: array.delete(), model.parameters)
            self.assertFalse(saving.is_done())
            self.assertFalse(self.folder.exists())
            may_write.set()
            description = saving.wait()
        self.assertTrue(saving.is_done())
        self.assertEqual((description.dtype, description.fused), (dtype, dtype == "bfloat16"))
        self.assert_same_bits(load_model(self.folder, dtype, "cpu", fused=description.fused).parameters, expected)
        self.assertEqual(prepared.check(str(self.folder), "cpu").types["model.norm.weight"], description.stored.name)
        with open_checkpoint(SOURCE) as source, open_checkpoint(self.folder) as found:
            self.assertEqual(found.files["tokenizer.json"], source.files["tokenizer.json"])
            self.assertEqual(found.model_config(), source.model_config())

    def test_an_error_is_told_by_wait_and_a_folder_that_exists_at_once(self):
        model = load_model(SOURCE, "float32", "cpu")
        error = OSError(28, "No space left on device")
        with absltest.mock.patch.object(prepared, "_described", side_effect=error):
            saving = prepared.begin(model, str(self.folder))
            self.refused(StorageError, "no-space", saving.wait)
        self.assertEqual((saving.is_done(), os.listdir(self.scratch)), (False, []))
        prepared.begin(model, str(self.folder)).wait()
        self.refused(UsageError, "output-exists", lambda: prepared.begin(model, str(self.folder)))
        prepared.begin(model, str(self.folder), force=True).wait()


class BrokenTest(Case):
    def test_changed_values_are_found_by_restore_and_named(self):
        self.save(dtype="bfloat16", fused=True)
        file = self.folder / "parameters" / DOWN / "0.0"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        error = self.refused(BrokenContainerError, "prepared-hash", lambda: prepared.check(str(self.folder), "cpu"))
        self.assertEqual((error.tensor, error.exit_code), (DOWN, 4))

    def test_sums_are_those_of_zlib(self):
        self.save(dtype="bfloat16")
        parameters = json.loads((self.folder / "prepared.json").read_text())["parameters"]
        for name, fields in parameters.items():
            content = next((self.folder / "parameters" / name).glob("0*")).read_bytes()
            self.assertEqual(fields["crc32"], f"{zlib.crc32(content):08x}")

    def test_parts_of_several_devices_are_put_in_c_order_whatever_order_they_come_in(self):
        whole = np.arange(24, dtype=np.int32).reshape(4, 6)
        cuts = [(slice(row, row + 2), slice(column, column + 3)) for row in (0, 2) for column in (0, 3)]
        for shape, at in (
            (cuts, whole),
            ([(slice(n, n + 2),) for n in (0, 2)], whole[:4, 0]),
            ([(slice(None),)], whole[0]),
        ):
            shards = [
                types.SimpleNamespace(replica_id=0, index=cut, data=np.ascontiguousarray(at[cut])) for cut in shape
            ]
            shards += [types.SimpleNamespace(replica_id=1, index=cut, data=None) for cut in shape]
            for block in (1, 16, 1 << 18):
                with mock.patch.object(prepared, "_BLOCK_BYTES", block):
                    array = types.SimpleNamespace(addressable_shards=shards[::-1])
                    self.assertEqual(b"".join(prepared._in_c_order(array)), at.tobytes())

    def test_what_is_missing_or_cut_off_is_named(self):
        self.save()
        file = self.folder / "parameters" / DOWN / "0.0"
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        self.assertEqual(self.refused(BrokenContainerError, "prepared-size").tensor, DOWN)
        file.unlink()
        self.assertIn(DOWN, self.refused(MissingFileError, "file-missing").file)
        shutil.rmtree(file.parent)
        self.assertIn("prepare it anew", str(self.refused(MissingFileError, "file-missing")))

    def test_a_parameter_of_another_shape_or_type_is_refused(self):
        self.save()
        check = lambda: prepared.check(str(self.folder), "cpu")  # noqa: E731
        self.edit(f"parameters/{DOWN}/.zarray", dtype="<i4")
        self.refused(BrokenContainerError, "prepared-parameter", check)
        self.edit(f"parameters/{DOWN}/.zarray", dtype="<f4", order="F")
        self.refused(RefusedError, "prepared-chunks", check)
        # What has another size is not opened at all.
        (self.folder / "parameters" / DOWN / "0.0").rename(self.folder / "parameters" / DOWN / "0.1")
        self.refused(RefusedError, "prepared-chunks")

    def test_other_versions_are_refused(self):
        self.save()
        self.edit("prepared.json", format="apr_jax.prepared/3")
        self.refused(RefusedError, "prepared-format")

    @parameterized.parameters(
        ({"dtype": "int8"},),
        ({"fused": 1},),
        ({"parameters": {"a/../b": {"shape": [2], "crc32": "", "tensors": {"a": [2]}}}},),
        ({"parameters": {"a": {"shape": [2], "crc32": "", "tensors": {"a": [1]}}}},),
        ({"parameters": {name: {"shape": [2], "crc32": "", "tensors": {"a": [2]}} for name in "ab"}},),
        ({"parameters": None},),
        ({"format": 1},),
    )
    def test_a_malformed_description_is_refused(self, changes):
        self.save()
        self.edit("prepared.json", **changes)
        self.refused(BrokenContainerError, "prepared-content")

    def test_what_is_lacking_of_the_model_is_named(self):
        self.save()
        parameters = json.loads((self.folder / "prepared.json").read_text())["parameters"]
        del parameters[DOWN]
        self.edit("prepared.json", parameters=parameters)
        self.assertIn(f"missing: {DOWN}", str(self.refused(RefusedError, "tensors-mismatch")))

    def test_orbax_checkpoints_of_others_are_told_apart(self):
        self.refused(MissingFileError, "file-missing", lambda: prepared.check(str(self.folder)))
        orbax.checkpoint.PyTreeCheckpointer().save(self.folder, {"a": np.ones(3)})
        self.assertIn("prepared.json", str(self.refused(RefusedError, "foreign-orbax")))
        self.refused(UsageError, "not-prepared", lambda: prepared.check(str(self.folder)))
        shutil.rmtree(self.folder)
        self.save()
        self.assertIn(
            "folder above",
            str(self.refused(RefusedError, "foreign-orbax", lambda: load_model(self.folder / "parameters"))),
        )
        (self.folder / "prepared.json").unlink()
        self.refused(RefusedError, "foreign-orbax")


class AtomicTest(Case):
    def listed(self):
        return sorted(os.listdir(self.scratch))

    def test_an_existing_folder_is_refused_and_replaced_only_by_force(self):
        self.save(dtype="bfloat16")
        self.refused(UsageError, "output-exists", self.save)
        self.save(dtype="float32", fused=True, force=True)
        self.assertEqual(prepared.check(str(self.folder), "cpu").dtype, "float32")
        self.assertEqual(self.listed(), ["prepared"])

    @parameterized.parameters(False, True)
    def test_every_file_and_folder_is_flushed_before_the_folder_gets_its_name_and_the_name_after(self, force):
        if force:
            self.save(dtype="bfloat16")
        with flushes.recorded(self.scratch) as flushed:
            self.save(dtype="bfloat16", fused=True, force=force)
        self.assertTrue((self.folder / "parameters" / DOWN / "0.0").is_file())
        self.assertEqual(flushes.lacking(flushed, self.folder), [])

    def test_several_processes_are_refused(self):
        model = load_model(SOURCE, "float32", "cpu")
        with absltest.mock.patch.object(jax, "process_count", return_value=2):
            self.refused(UsageError, "save-processes", self.save)
            self.refused(UsageError, "save-processes", lambda: prepared.begin(model, str(self.folder)))
        self.assertEqual(self.listed(), [])

    def test_force_replaces_nothing_but_a_prepared_checkpoint(self):
        self.folder.mkdir()
        (self.folder / "thesis.txt").write_text("unique")
        self.refused(UsageError, "output-not-replaceable", lambda: self.save(force=True))
        self.save_into_source = shutil.copytree(SOURCE, self.scratch / "hf")
        with open_checkpoint(self.save_into_source) as checkpoint, self.assertRaises(UsageError):
            prepared.save(checkpoint, str(self.save_into_source), force=True)
        self.assertEqual((self.folder / "thesis.txt").read_text(), "unique")

    @parameterized.parameters((KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left"), StorageError))
    def test_nothing_stays_of_a_save_that_was_interrupted(self, error, expected):
        # While Orbax writes.
        with absltest.mock.patch.object(prepared, "_described", side_effect=error), self.assertRaises(expected):
            self.save()
        self.assertEqual(self.listed(), [])

    def test_a_checkpoint_that_is_refused_leaves_nothing(self):
        broken = shutil.copytree(SOURCE, self.scratch / "hf")
        config = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 3}
        (broken / "config.json").write_text(json.dumps(config))
        self.refused(RefusedError, "tensors-mismatch", lambda: self.save(broken))
        self.assertEqual(self.listed(), ["hf"])


class CommandTest(Case):
    def run_command(self, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = command.main(command.parse(["checkpoint", *map(str, arguments)]))
        self.assertEqual(code, 0)
        return out.getvalue()

    def test_save_and_restore_say_what_is_in_it(self):
        text = self.run_command("save", SOURCE, self.folder, "--dtype", "bfloat16", "--fused")
        self.assertIn("16 parameters of 26 tensors, 210,048 bytes, bfloat16, fused", text)
        self.assertIn("as it was saved", self.run_command("restore", self.folder, "--device", "cpu"))
        found = json.loads(self.run_command("restore", self.folder, "--device", "cpu", "--json"))
        self.assertEqual((found["parameters"], found["tensors"], found["bytes"]), (16, 26, 210048))
        self.assertEqual(found["source"]["path"], str(SOURCE))

    def test_golden_accepts_it(self):
        from apr_jax.commands import golden as golden_command

        self.run_command("save", SOURCE, self.folder, "--dtype", "bfloat16", "--fused")
        reference = paths.golden("gqa_tied_bf16")
        with contextlib.redirect_stdout(io.StringIO()):
            code = golden_command.main(
                golden_command.parse(["golden", str(self.folder), "--check", str(reference), "--device", "cpu"])
            )
        self.assertEqual(code, 0)


if __name__ == "__main__":
    absltest.main()
