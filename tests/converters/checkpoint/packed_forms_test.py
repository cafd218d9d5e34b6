"""Published quantised forms: what the libraries wrote decodes to what they decode it to, and every member of each form
to what plain formulas say; what does not fit is refused.
"""

import json
import pathlib
import shutil
import zlib

import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.decoded import DecodedTensor
from apr_jax.converters.checkpoint.dense import is_computed
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.packed_forms import dense_view, packed_forms
from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.formats import apr_format
from apr_jax.converters.formats.dtypes import by_name
from tests import packers

DATA = pathlib.Path(__file__).parents[2] / "data"
BASE = DATA / "checkpoints" / "gqa_tied_bf16"
LIBRARIES = DATA / "packed"
Q = "model.layers.0.self_attn.q_proj"


class LibrariesTest(parameterized.TestCase):
    @parameterized.parameters(sorted(path.stem for path in LIBRARIES.glob("*.safetensors")))
    def test_field_what_a_library_wrote(self, name):
        """FIELD Forms: packed by bitsandbytes, GPTQModel, AutoGPTQ, AutoAWQ, torchao and others -> their own values"""
        folder = pathlib.Path(self.create_tempdir().full_path)
        (folder / "model.safetensors").write_bytes((LIBRARIES / f"{name}.safetensors").read_bytes())
        with open_checkpoint(folder) as raw:
            config = {"quantization_config": json.loads(raw.metadata["quantization_config"])}
        (folder / "config.json").write_text(json.dumps(config))
        wanted = np.load(LIBRARIES / "dense.npz")[name]
        with open_checkpoint(folder) as raw:
            view = dense_view(raw)
            (tensor,) = view.tensors.values()
            self.assertEqual(tensor.name, "layer.weight")
            # torchao's own words for what is packed no longer.
            self.assertEmpty(view.metadata.keys() & {"layer.weight", "tensor_names"})
            found = tensor.read().astype(np.float32)
        # These compute in the type that the weight had.
        if name.startswith("torchao") and name.endswith("bf16"):
            found = found.astype(ml_dtypes.bfloat16).astype(np.float32)
        if name.startswith("gptqmodel"):
            found = found.astype(np.float16).astype(np.float32)
        # Exact but for LLM.int8, whose two products we join.
        np.testing.assert_allclose(found, wanted, rtol=2e-7 if name == "bnb_int8" else 0, atol=0)

    def test_there_are_enough_of_them(self):
        self.assertGreaterEqual(len(list(LIBRARIES.glob("*.safetensors"))), 30)


class FormulasTest(parameterized.TestCase):
    @parameterized.parameters(sorted(packers.MEMBERS))
    def test_field_members_of_each_form(self, name):
        """FIELD Forms: every form: bits, groups, zero points, scale types, act-order -> dense values"""
        packer, config = packers.MEMBERS[name]
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        dense = packers.pack_checkpoint(BASE, folder, packer, config, ignored=("layers.1.mlp",))
        with open_checkpoint(folder) as raw:
            view = dense_view(raw)
            self.assertEqual(set(view.tensors), set(dense))
            decoded = [tensor for tensor in view.tensors.values() if isinstance(tensor, DecodedTensor)]
            self.assertLen(decoded, 2 * 7 - 3)
            for tensor in decoded:
                wanted = dense[tensor.name]
                tolerance = {"rtol": 3e-7, "atol": 0}
                np.testing.assert_allclose(tensor.read().astype("f4"), wanted, **tolerance, err_msg=tensor.name)
                # Rows, columns and odd byte ranges are the same values.
                part = tensor.read((slice(3, 17), slice(5, 41))).astype("f4")
                np.testing.assert_allclose(part, wanted[3:17, 5:41], **tolerance)
                whole, cut = tensor.raw(), bytearray(1001)
                tensor.readinto_at(333, cut)
                self.assertEqual(bytes(cut), whole[333:1334])
            self.assertNotIn("quantization_config", view.config)
            view.model_config()
            self.assertIs(dense_view(view), view)

    def test_what_autogptq_says_in_a_file_of_its_own(self):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packer, config = packers.MEMBERS["gptq_int4_16_v2"]
        dense = packers.pack_checkpoint(BASE, folder, packer, config)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "quantize_config.json").write_text(json.dumps(settings.pop("quantization_config")))
        (folder / "config.json").write_text(json.dumps(settings))
        with open_checkpoint(folder) as raw:
            view = dense_view(raw)
            # Of version 2: taken for version 1, every zero point would be one more.
            np.testing.assert_allclose(view.tensors[f"{Q}.weight"].read(), dense[f"{Q}.weight"], rtol=3e-7)
            self.assertNotIn("quantize_config.json", view.files)
            self.assertTrue(is_computed(view))
            self.assertFalse(is_computed(raw))

    @parameterized.parameters(True, False)
    def test_an_apr_says_no_longer_that_it_is_quantised(self, is_object):
        codes, scales = np.arange(-6, 6, dtype=np.int8).reshape(4, 3), np.arange(4, dtype=np.float32)
        held = {"x.weight": ("i8", (4, 3), codes.tobytes()), "x.SCB": ("f32", (4,), scales.tobytes())}
        given = {"model_type": "qwen2", "quantization_config": {"load_in_8bit": True}} if is_object else "qwen2"
        path = pathlib.Path(self.create_tempdir().full_path) / "m.apr"
        entries = apr_format.lay_out(
            (name, by_name(kind), shape, len(data)) for name, (kind, shape, data) in held.items()
        )
        files = {"config.json": json.dumps(given)} if is_object else {}
        content = apr_format.serialise_prologue({"hf_config": given, "source_files": files}, entries)
        content += b"".join(held[entry.name][2] + bytes(-entry.size % 64) for entry in entries)
        path.write_bytes(content + apr_format.footer(zlib.crc32(content)))
        with open_checkpoint(path) as raw:
            view = dense_view(raw)
            np.testing.assert_allclose(view.tensors["x.weight"].read(), codes * scales[:, None] / 127, rtol=3e-7)
            self.assertEqual(view.metadata["hf_config"], {"model_type": "qwen2"} if is_object else "qwen2")
            if is_object:
                self.assertEqual(json.loads(view.metadata["source_files"]["config.json"]), {"model_type": "qwen2"})
            for tensor in view.tensors.values():
                self.assertEqual(tensor.read_flat(2, 2).size, 0)

    def test_no_elements_are_nothing_to_decode(self):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, *packers.MEMBERS["ct_int4_32"])
        with open_checkpoint(folder) as raw:
            tensor = dense_view(raw).tensors[f"{Q}.weight"]
            self.assertEqual(tensor.raw(slice(3, 3)), b"")
            self.assertEqual(tensor.read((slice(2, 2),)).shape, (0, tensor.shape[1]))

    def test_a_dense_checkpoint_stays_what_it_is(self):
        with open_checkpoint(BASE) as checkpoint:
            self.assertIs(dense_view(checkpoint), checkpoint)
            self.assertEqual(packed_forms(checkpoint), {})

    def test_without_a_configuration_the_names_tell(self):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        dense = packers.pack_checkpoint(BASE, folder, *packers.MEMBERS["awq_32"])
        lone = folder / "lone.safetensors"
        (folder / "model.safetensors").rename(lone)
        with open_checkpoint(lone) as raw:
            np.testing.assert_array_equal(dense_view(raw).tensors[f"{Q}.weight"].read(), dense[f"{Q}.weight"])
            self.assertEqual(packed_forms(raw), {"awq int4, group 32": 14})

    def test_scales_of_activations_are_said_and_left_out(self):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, *packers.MEMBERS["fp8_tensor"])
        tensors = packers.read(folder / "model.safetensors")
        tensors[f"{Q}.input_scale"] = np.array(0.5, np.float32)
        packers.write(folder / "model.safetensors", tensors)
        with open_checkpoint(folder) as raw:
            view = dense_view(raw)
            self.assertNotIn(f"{Q}.input_scale", view.tensors)
            self.assertIn("scale of activations", " ".join(view.warnings))

    def test_field_biases_of_zeros_as_autogptq_writes_them(self):
        """FIELD Forms: Qwen's own GPTQ files, a zero bias beside every matrix -> loads, said; others are refused"""
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, *packers.MEMBERS["gptq_int4_32"])
        tensors = packers.read(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(".scales")]:
            bias = name.replace(".scales", ".bias")
            tensors.setdefault(bias, np.zeros(tensors[name].shape[1], np.float16))
        packers.write(folder / "model.safetensors", tensors)
        with open_checkpoint(folder) as raw:
            view = dense_view(raw)
            self.assertEqual(set(view.tensors), set(view.model_config().tensor_shapes()))
            self.assertIn("8 vectors of zeros", " ".join(view.warnings))
        tensors["model.layers.0.mlp.up_proj.bias"] = np.ones(160, np.float16)
        packers.write(folder / "model.safetensors", tensors)
        with open_checkpoint(folder) as raw:
            self.assertIn("model.layers.0.mlp.up_proj.bias", dense_view(raw).tensors)


class RefusalsTest(parameterized.TestCase):
    @parameterized.parameters(
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "aqlm", "in_group_size": 8}, "aqlm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "auto_round"),
    )
    def test_field_what_nothing_decodes_is_refused_by_name(self, config, name):
        """FIELD Forms: HQQ, AQLM, Marlin, AWQ gemv -> refused by name; convert carries them as they are"""
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, packers.gptq(), config)
        with open_checkpoint(folder) as raw, self.assertRaisesRegex(RefusedError, name) as caught:
            dense_view(raw)
        self.assertEqual(caught.exception.code, "quantisation-unsupported")

    def test_field_what_torchao_packed_for_one_kernel_is_refused_by_name(self):
        """FIELD Forms: torchao's int4 for a kernel of its own -> refused by name; convert carries it as it is"""
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, *packers.MEMBERS["torchao_int4_32"])
        tensors = packers.read(folder / "model.safetensors")
        tensors[f"{Q}._weight_qdata"] = np.zeros((8, 4, 32, 4), np.int32)
        packers.write(folder / "model.safetensors", tensors)
        with open_checkpoint(folder) as raw, self.assertRaisesRegex(RefusedError, "torchao as i32") as caught:
            dense_view(raw)
        self.assertEqual(caught.exception.code, "quantisation-unsupported")

    def test_field_what_mlx_packed_is_refused_by_name(self):
        """FIELD Forms: MLX's packed matrices (scales, biases, quantization) -> named, the way out"""
        folder = self.dense_folder({"quantization": {"group_size": 32, "bits": 4}})
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            tensors[name] = np.zeros((rows, columns // 8), np.uint32)
            for part in ("scales", "biases"):
                tensors[name.removesuffix("weight") + part] = np.zeros((rows, columns // 32), np.float16)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        with open_checkpoint(folder) as raw, self.assertRaisesRegex(RefusedError, "MLX.*--dequantize"):
            dense_view(raw)

    @parameterized.parameters(
        {"quant_method": "none"},
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
        {"quant_method": None},
    )
    def test_field_a_dense_checkpoint_that_names_a_quantisation(self, **quantization):
        """FIELD Forms: quantization_config "none", or switched off, beside dense tensors -> the same model"""
        folder = self.dense_folder({"quantization_config": quantization})
        with open_checkpoint(folder) as raw, open_checkpoint(BASE) as base:
            view = dense_view(raw)
            self.assertEqual(view.model_config(), base.model_config())
            bytes_of = {name: tensor.raw() for name, tensor in base.tensors.items()}
            self.assertEqual({name: tensor.raw() for name, tensor in view.tensors.items()}, bytes_of)

    def dense_folder(self, keys):
        folder = pathlib.Path(self.create_tempdir().full_path) / "dense"
        shutil.copytree(BASE, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))
        return folder

    def test_a_configuration_that_is_no_object(self):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, packers.gptq(), [4, 128])
        with open_checkpoint(folder) as raw, self.assertRaisesRegex(BrokenContainerError, "not an object"):
            dense_view(raw)

    @parameterized.parameters(
        ("gptq_int4_32", "scales", lambda t: t[:, :-8]),
        ("gptq_int4_32", "scales", lambda t: t.astype(np.int32)),
        ("gptq_int4_32", "qzeros", lambda t: t[:1]),
        ("gptq_int4_32", "qzeros", None),
        ("gptq_int4_32", "g_idx", lambda t: t[:-1]),
        ("awq_32", "qzeros", lambda t: t[:, :1]),
        ("fp8_block_128", "weight_scale_inv", lambda t: np.ones((3, 5), np.float32)),
        ("bnb_nf4_64", "weight.absmax", lambda t: t[:-1]),
        ("bnb_nf4_64", "weight", lambda t: t[:-1]),
        ("bnb_nf4_64", "weight.quant_map", lambda t: t[:-1]),
        ("bnb_nf4_64", "weight.quant_state.bitsandbytes__nf4", lambda t: np.frombuffer(b'{"shape": 4}', np.uint8)),
        ("ct_int4_32", "weight_shape", lambda t: np.array([64, 1 << 40], np.int64)),
        ("ct_int4_32", "weight_scale", lambda t: t[:, :0]),
        ("ct_nvfp4", "weight_scale", lambda t: t[:-1]),
        ("gptq_int4_32", "qweight", lambda t: t.astype(np.float32)),
        ("gptq_int4_32", "scales", lambda t: t[:0]),
        ("bnb_nf4_64", "weight.quant_state.bitsandbytes__nf4", lambda t: np.zeros((1 << 16) + 1, np.uint8)),
        ("bnb_nf4_128_nested_bf16", "weight.quant_state.bitsandbytes__nf4", lambda t: _without(t, "nested_offset")),
        ("bnb_int8", "weight", lambda t: t.reshape(-1)),
        ("bnb_int8", "weight_format", lambda t: np.ones((), np.uint8)),
        ("ct_int8_row", "weight_scale", lambda t: t.astype(np.int32)),
        ("ct_int4_32", "weight_packed", lambda t: t.reshape(-1)),
        ("ct_int4_32", "weight_packed", lambda t: t.astype(np.int64)),
        ("ct_int4_32", "weight_shape", lambda t: t[:1]),
        ("ct_nvfp4", "weight_global_scale", lambda t: np.ones(2, np.float32)),
    )
    def test_parts_that_do_not_fit(self, member, part, change):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, *packers.MEMBERS[member])
        tensors = packers.read(folder / "model.safetensors")
        held = tensors.pop(f"{Q}.{part}", None)
        if change is not None:
            tensors[f"{Q}.{part}"] = np.ascontiguousarray(change(held))
        packers.write(folder / "model.safetensors", tensors)
        with open_checkpoint(folder) as raw, self.assertRaises(RefusedError) as caught:
            dense_view(raw)
        self.assertEqual(caught.exception.code, "quantised-tensor")
        self.assertIn(Q, caught.exception.tensor)

    def test_an_index_that_leads_out_of_the_groups(self):
        folder = pathlib.Path(self.create_tempdir().full_path) / "packed"
        packers.pack_checkpoint(BASE, folder, *packers.MEMBERS["gptq_int4_act_order"])
        tensors = packers.read(folder / "model.safetensors")
        tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"] + 1
        packers.write(folder / "model.safetensors", tensors)
        with open_checkpoint(folder) as raw, self.assertRaisesRegex(RefusedError, "out of range"):
            dense_view(raw).tensors[f"{Q}.weight"].read()


def _without(state, key):
    values = json.loads(bytes(state))
    del values[key]
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


if __name__ == "__main__":
    absltest.main()
