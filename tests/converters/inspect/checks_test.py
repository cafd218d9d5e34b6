"""The checks of a single checkpoint: each is red for what it is about, alone, and green for everything clean."""

import json
import pathlib
import struct
import sys
import tempfile
import zlib
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.plan import CastRule
from apr_jax.converters.convert.run import convert
from apr_jax.converters.formats import apr_format, dtypes
from apr_jax.converters.inspect import first_pass, statistics
from apr_jax.converters.inspect.checks import inspect
from tests.paths import DATA, NAMES, checkpoint

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}


class InspectionTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def sample(self, name="gqa_tied_bf16", to="apr"):
        """Metadata, and name -> [dtype name, array], of a sample as our converter writes it."""
        path = self.folder / f"sample.{to}"
        convert(checkpoint(name), path, to=to, force=True)
        with open_checkpoint(path) as opened:
            tensors = {tensor.name: [tensor.dtype.name, tensor.read()] for tensor in opened.tensors.values()}
            return dict(opened.metadata), tensors

    def write(self, metadata, tensors, placeholders=None, patch=None):
        """Writes an `.apr` with right checksums; `patch(file, entries)` may change bytes before the footer is made."""
        listed = [
            (name, dtypes.by_name(dtype), values.shape, values.nbytes) for name, (dtype, values) in tensors.items()
        ]
        listed += [(name, dtypes.by_name("f32"), shape, 0) for name, shape in (placeholders or {}).items()]
        entries = apr_format.lay_out(listed)
        file = bytearray(apr_format.serialise_prologue(metadata, entries))
        start = len(file)
        for entry in entries:
            data = tensors[entry.name][1].tobytes() if entry.size else b""
            file += data + bytes(-len(data) % 64)
        if patch is not None:
            patch(file, start, {entry.name: entry for entry in entries})
        file += struct.pack("<I", zlib.crc32(file))
        path = self.folder / "x.apr"
        path.write_bytes(file)
        return path

    def inspect(self, path, **options):
        with open_checkpoint(path, **options) as opened:
            checks = inspect(opened)
        for check in checks:
            json.dumps(check.to_json(), allow_nan=False)
            self.assertNotIn("\n", check.sentence)
        return checks

    def failures(self, path, **options):
        return {check.name: check for check in self.inspect(path, **options) if check.passed is False}

    def only_failure(self, path, name, tensors=None, words=(), **options):
        failed = self.failures(path, **options)
        self.assertEqual(list(failed), [name], [check.sentence for check in failed.values()])
        if tensors is not None:
            self.assertEqual(sorted(failed[name].tensors), sorted(tensors))
        for word in words:
            self.assertIn(word, failed[name].sentence)
        return failed[name]

    # --- what is said of it

    def test_a_head_without_an_embedding_is_held_against_nothing(self):
        metadata, tensors = self.sample("gqa_untied_bf16")
        del tensors[EMBEDDING]
        said = {check.name: check.sentence for check in self.inspect(self.write(metadata, tensors))}
        self.assertIn("no embedding to hold it against", said["head"])

    def test_a_head_whose_values_cannot_be_compared_is_not_called_a_copy(self):
        # Nothing here decodes floats of 4 bits.
        header = {
            EMBEDDING: {"dtype": "F4", "shape": [6, 4], "data_offsets": [0, 12]},
            HEAD: {"dtype": "F32", "shape": [6, 4], "data_offsets": [12, 108]},
        }
        text = json.dumps(header).encode()
        (self.folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(108))
        (self.folder / "config.json").write_text('{"tie_word_embeddings": true}')
        (found,) = (check for check in self.inspect(self.folder) if check.name == "head")
        self.assertIsNone(found.passed)
        self.assertIn(f"cannot be held against {EMBEDDING}", found.sentence)

    def test_names_of_ggufs_are_not_missed_as_ours(self):
        metadata, tensors = self.sample()
        named = {("blk.0.attn_q.weight" if name == GATE else name): held for name, held in tensors.items()}
        said = {check.name: check for check in self.inspect(self.write(metadata, named))}
        self.assertIsNone(said["tensor-set"].passed)
        self.assertIn("GGUF's names", said["tensor-set"].sentence)

    def test_an_embedding_that_is_no_matrix_has_no_rows_to_look_at(self):
        for shape in ((96,), (0, 4)):
            values = np.random.default_rng(0).normal(0, 0.02, shape).astype("<f4")
            said = {check.name for check in self.inspect(self.write({}, {EMBEDDING: ["f32", values]}))}
            self.assertIn("embedding", said)
            self.assertNotIn("spot-rows", said)

    def test_a_file_without_a_byte_of_values_is_looked_at_all_the_same(self):
        text = json.dumps({"x": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}).encode()
        path = self.folder / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        self.assertEmpty(self.failures(path))

    def test_a_sliding_window_is_described(self):
        for windowed, words in ((0, "layers 0 to 1"), (1, "layers 1 to 1")):
            metadata, tensors = self.sample()
            files = metadata["source_files"]
            config = json.loads(files["config.json"])
            config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": windowed}
            config.pop("layer_types", None)
            files["config.json"] = json.dumps(config)
            said = {check.name: check.sentence for check in self.inspect(self.write(metadata, tensors))}
            self.assertIn(f"a sliding window of 8 in {words}", said["configuration"])

    # --- clean

    @parameterized.parameters(*NAMES)
    def test_samples_and_what_our_converter_makes_of_them_are_clean(self, name):
        paths = [checkpoint(name)]
        for to, options in (("apr", {}), ("apr", {"tied_head": "copy"}), ("safetensors", {})):
            paths.append(self.folder / f"{len(paths)}.{to}")
            convert(checkpoint(name), paths[-1], to=to, **options)
        for path in paths:
            checks = self.inspect(path)
            wrong = [check.sentence for check in checks if check.severity in ("failure", "note")]
            expected = sum(word in name for word in ("mqa_f16", "odd_sizes"))
            self.assertLen(wrong, expected, wrong)
            self.assertTrue(all("rope_theta" in sentence for sentence in wrong))
            self.assertGreaterEqual(sum(check.passed is True for check in checks), 12)

    @parameterized.parameters("bf16", "f16", "f32")
    def test_a_rounding_cast_of_a_sample_is_clean(self, dtype):
        path = self.folder / "cast.apr"
        rules = [CastRule.parse(dtype)]
        convert(checkpoint("mixed_dtypes"), path, to="apr", cast=rules)
        self.assertEmpty(self.failures(path))

    @parameterized.parameters(
        "tiny_f32_tied-int8.apr", "tiny_f32_tied-int4.apr", "tiny_bf16_tied-int4.apr", "golden_v2.apr"
    )
    def test_genuine_files_that_are_right_are_clean(self, name):
        self.assertEmpty(self.failures(DATA / "apr" / name))

    def test_no_tensors_at_all(self):
        self.assertEmpty(self.failures(self.write({}, {})))

    # --- container

    def test_a_changed_byte_is_a_wrong_footer_checksum(self):
        path = self.write(*self.sample())
        file = bytearray(path.read_bytes())
        file[-1000] ^= 1
        path.write_bytes(file)
        stored = int.from_bytes(file[-4:], "little")
        words = (f"{stored:#010x}", f"{zlib.crc32(file[:-4]):#010x}")
        self.only_failure(path, "footer-checksum", words=words)

    def test_without_a_footer_nothing_is_said_about_it(self):
        path = self.write(*self.sample())
        path.write_bytes(path.read_bytes()[:-4])
        checks = {check.name: check for check in self.inspect(path, lenient=True)}
        self.assertIsNone(checks["footer-checksum"].passed)
        self.assertEqual(checks["warning"].severity, "note")

    def test_hidden_bytes_in_padding_are_named_with_the_tensor_before_them(self):
        metadata, tensors = self.sample("odd_sizes")
        place = []

        def hide(file, start, entries):
            end = start + entries[GATE].offset + entries[GATE].size
            self.assertNotEqual(end % 64, 0)
            file[end + 1] = 0x41
            place.append(end + 1)

        path = self.write(metadata, tensors, patch=hide)
        self.only_failure(path, "padding", [GATE], words=(GATE, str(place[0])))

        def hide_at_the_end(file, start, entries):
            file[-1] = 1

        path = self.write({}, {"a": ["f32", np.ones(3, np.float32)]}, patch=hide_at_the_end)
        self.only_failure(path, "padding", ["a"])

    def test_the_checksum_of_a_file_of_many_blocks(self):
        values = np.random.default_rng(0).integers(0, 255, (40 << 20) + 13).astype(np.uint8)
        path = self.write({}, {"a": ["u8", values], "b": ["f32", np.ones((9, 7), np.float32)]})
        self.assertEmpty(self.failures(path))
        with open_checkpoint(path) as opened:
            self.assertEqual(first_pass.screen(opened).crc, zlib.crc32(path.read_bytes()[:-4]))
        file = bytearray(path.read_bytes())
        file[35 << 20] ^= 0x80
        path.write_bytes(file)
        self.assertEqual(list(self.failures(path)), ["footer-checksum"])

    def test_progress_adds_up_to_the_file(self):
        path = self.write(*self.sample())
        seen = []
        with open_checkpoint(path) as opened:
            inspect(opened, progress=seen.append)
        self.assertEqual(sum(seen), path.stat().st_size - 4)

    # --- configuration

    @parameterized.parameters(
        ("hidden_size", 128), ("num_layers", 3), ("num_kv_heads", 4), ("vocab_size", 289), ("rope_theta", 10000.0)
    )
    def test_metadata_that_contradict_config_json(self, key, value):
        metadata, tensors = self.sample()
        found = self.only_failure(self.write(metadata | {key: value}, tensors), "metadata")
        self.assertIn(key, found.sentence)
        self.assertIn(str(value), found.sentence)
        self.assertIn(str(metadata[key]), found.sentence)

    @parameterized.parameters(("hidden_size", "64"), ("hidden_size", -1), ("num_heads", 5), ("rope_type", 0))
    def test_malformed_metadata(self, key, value):
        metadata, tensors = self.sample()
        del metadata["source_files"]
        found = self.failures(self.write(metadata | {key: value}, tensors))
        self.assertIn("configuration", found)
        self.assertIn(repr(value), found["configuration"].sentence)

    def test_shapes_that_contradict_metadata_that_stand_alone(self):
        metadata, tensors = self.sample()
        del metadata["source_files"]
        found = self.only_failure(self.write(metadata | {"intermediate_size": 96}, tensors), "tensor-set")
        self.assertIn("[64, 160], expected [64, 96]", found.sentence)
        self.assertLen(found.tensors, 6)

    def test_missing_unexpected_and_misshapen_tensors(self):
        metadata, tensors = self.sample()
        extra = {"extra": ["f32", np.ones(3, np.float32)]}
        self.only_failure(self.write(metadata, tensors | extra), "tensor-set", ["extra"])
        turned = tensors | {GATE: ["bf16", np.ascontiguousarray(tensors[GATE][1].T)]}
        self.only_failure(self.write(metadata, turned), "tensor-set", [GATE], words=("[64, 160]", "[160, 64]"))
        del tensors[DOWN], tensors[BIAS]
        self.only_failure(
            self.write(metadata, tensors), "tensor-set", [DOWN, BIAS], words=("missing", "1 other", "[64]")
        )

    def test_listed_shapes_that_are_not_those_of_the_index(self):
        metadata, tensors = self.sample()
        shapes = {name: list(values.shape) for name, (_, values) in tensors.items()}
        self.assertEmpty(self.failures(self.write(metadata | {"tensor_shapes": shapes}, tensors)))
        path = self.write(metadata | {"tensor_shapes": shapes | {GATE: [64, 160]}}, tensors)
        self.only_failure(path, "metadata", [GATE], words=("[64, 160]", "[160, 64]"))

    def test_a_family_that_the_names_contradict(self):
        metadata, tensors = self.sample()
        norm = {"model.layers.0.self_attn.q_norm.weight": ["f32", np.ones(16, np.float32)]}
        for said, added, named in (("llama", {}, "qwen2"), ("qwen2", norm, "qwen3")):
            failed = self.failures(self.write(metadata | {"architecture": said}, tensors | added))
            found = failed["architecture"].sentence
            self.assertIn(f"the metadata say {said}, the tensors' names are those of {named}", found)

    def test_a_configuration_that_is_not_supported_is_no_fault_of_the_file(self):
        metadata, tensors = self.sample()
        files = metadata["source_files"]
        config = json.loads(files["config.json"]) | {"unheard_of": True}
        metadata |= {"source_files": files | {"config.json": json.dumps(config)}}
        checks = {check.name: check for check in self.inspect(self.write(metadata, tensors))}
        self.assertIsNone(checks["configuration"].passed)
        self.assertIn("unheard_of", checks["configuration"].sentence)

    def test_oddities_are_notes_and_no_failures(self):
        metadata, tensors = self.sample()
        odd = {"model_type": "Auto", "param_count": 0, "total_size": 5}
        checks = self.inspect(self.write(metadata | odd, tensors))
        self.assertEqual(
            {check.name for check in checks if check.severity == "note"}, {"model-type", "param-count", "total-size"}
        )
        self.assertFalse([check for check in checks if check.passed is False])
        del metadata["source_files"]
        checks = self.inspect(self.write(metadata | {"rms_norm_eps": 0.001, "rope_theta": 10000.0}, tensors))
        self.assertEqual({check.name for check in checks if check.severity == "note"}, {"rms-norm-eps", "rope-theta"})

    # --- head

    def test_a_placeholder_head(self):
        path = self.write(*self.sample(), placeholders={HEAD: (288, 64)})
        self.only_failure(path, "placeholder-head", [HEAD], words=("0 bytes", "[288, 64]", "all zero"))

    def test_a_head_of_its_own_that_is_said_to_be_tied(self):
        metadata, tensors = self.sample("gqa_untied_bf16")
        self.assertEmpty(self.failures(self.write(metadata, tensors)))
        path = self.write(metadata | {"tied_embeddings": True}, tensors)
        self.only_failure(path, "falsely-tied", [HEAD], words=("tied_embeddings", "apr export"))

    def test_config_json_that_ties_a_head_of_its_own(self):
        folder = self.folder / "hf"
        convert(checkpoint("gqa_untied_bf16"), folder, to="safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        self.only_failure(folder, "falsely-tied", [HEAD], words=("config.json", "HuggingFace"))

    @parameterized.parameters("bf16", "f32")
    def test_a_head_that_is_a_copy_in_any_type_is_right(self, dtype):
        metadata, tensors = self.sample()
        head = tensors[EMBEDDING][1].astype(NUMPY[dtype])
        self.assertEmpty(self.failures(self.write(metadata, tensors | {HEAD: [dtype, head]})))
        head[287, 63] += np.array(0.25, head.dtype)
        self.only_failure(self.write(metadata, tensors | {HEAD: [dtype, head]}), "falsely-tied", [HEAD])

    def test_a_head_of_another_shape(self):
        _, tensors = self.sample("gqa_untied_bf16")
        turned = tensors | {HEAD: ["bf16", np.ascontiguousarray(tensors[HEAD][1].T)]}
        self.only_failure(self.write({}, turned), "head", [HEAD], words=("[56, 288]", "[288, 56]"))

    # --- values

    @parameterized.parameters(("gqa_tied_bf16", "f16"), ("mqa_f16", "bf16"))
    def test_a_relabelled_file_is_found_without_the_original(self, name, label):
        metadata, tensors = self.sample(name)
        self.assertEmpty(self.failures(self.write(metadata, tensors)))
        relabelled = {name: [label, values.view(NUMPY[label])] for name, (_, values) in tensors.items()}
        failed = self.failures(self.write(metadata, relabelled))
        matrices = {name for name, (_, values) in tensors.items() if values.ndim > 1}
        self.assertEqual(set(failed["relabelled"].tensors), matrices)
        other = "bf16" if label == "f16" else "f16"
        self.assertIn(f"look like {other} bytes read as {label}", failed["relabelled"].sentence)
        self.assertEqual(set(failed) - {"relabelled", "embedding", "final-norm", "l2"}, set())

    @parameterized.parameters(("gqa_tied_bf16", "f16"), ("mqa_f16", "bf16"))
    def test_each_single_matrix_that_is_relabelled_is_found_alone(self, name, label):
        metadata, tensors = self.sample(name)
        found = 0
        for name, (_, values) in tensors.items():
            if values.ndim > 1:
                path = self.write(metadata, tensors | {name: [label, values.view(NUMPY[label])]})
                self.assertEqual(self.failures(path)["relabelled"].tensors, (name,))
                found += 1
        self.assertGreaterEqual(found, 15)

    @parameterized.parameters(0.001, 0.02, 0.25)
    def test_relabelled_matrices_of_any_usual_spread_are_found_and_genuine_ones_are_not(self, std):
        values = np.random.default_rng(0).standard_normal((200, 300)) * std
        for dtype, label in (("bf16", "f16"), ("f16", "bf16")):
            given = values.astype(NUMPY[dtype])
            self.assertEmpty(self.failures(self.write({}, {"a": [dtype, given]})))
            failed = self.failures(self.write({}, {"a": [label, given.view(NUMPY[label])]}))
            self.assertIn(f"{dtype} bytes read as {label}", failed["relabelled"].sentence)

    def test_relabelled_values_are_found_when_they_were_widened_since(self):
        metadata, tensors = self.sample()
        wide = {name: ["f32", values.view(np.float16).astype(np.float32)] for name, (_, values) in tensors.items()}
        self.assertLen(self.failures(self.write(metadata, wide))["relabelled"].tensors, 15)

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_one_value_that_is_not_finite(self, value):
        metadata, tensors = self.sample()
        for name in (GATE, BIAS, NORM):
            values = tensors[name][1].copy()
            values.reshape(-1)[-1] = value
            path = self.write(metadata, tensors | {name: ["bf16", values]})
            self.only_failure(path, "finite", [name], words=("1 NaN" if np.isnan(value) else "1 infinite",))

    def test_zeros_up_to_the_bounds_of_s24(self):
        metadata, tensors = self.sample()
        for name, limit in ((EMBEDDING, 0.5), (GATE, 0.8)):
            values = tensors[name][1].copy()
            self.assertTrue((values != 0).all())
            # Scattered, so that no row dies; one short of the bound, and the bound.
            order = np.random.default_rng(0).permutation(values.size)
            zeros = int(limit * values.size)
            values.reshape(-1)[order[: zeros - 1]] = 0
            self.assertEmpty(self.failures(self.write(metadata, tensors | {name: ["bf16", values]})))
            values.reshape(-1)[order[zeros - 1]] = -0.0
            path = self.write(metadata, tensors | {name: ["bf16", values]})
            self.only_failure(path, "zeros", [name], words=(f"{limit:.0%}",))

    def test_dead_rows_up_to_the_bound_of_s24(self):
        metadata, tensors = self.sample()
        values = tensors[GATE][1].copy()
        values[:39] = 0
        self.assertEmpty(self.failures(self.write(metadata, tensors | {GATE: ["bf16", values]})))
        values[100] *= np.array(-0.0, values.dtype)
        path = self.write(metadata, tensors | {GATE: ["bf16", values]})
        self.only_failure(path, "dead-rows", [GATE], words=("40 of 160",))

    def test_all_zero_tensors(self):
        metadata, tensors = self.sample()
        for names in ((GATE,), (NORM, DOWN)):
            zeroed = {name: ["bf16", np.zeros_like(tensors[name][1])] for name in names}
            failed = self.failures(self.write(metadata, tensors | zeroed))
            self.assertEqual(sorted(failed["all-zero"].tensors), sorted(names))
            self.assertEqual(set(failed) - {"all-zero", "final-norm"}, set())
        checks = self.inspect(self.write(metadata, tensors | {BIAS: ["bf16", np.zeros_like(tensors[BIAS][1])]}))
        self.assertEqual([check.name for check in checks if check.severity in ("failure", "note")], ["all-zero-bias"])

    def test_all_zero_tensors_of_a_sparse_safetensors_file(self):
        path = self.folder / "holes.safetensors"
        entries = [("a", dtypes.by_name("bf16"), (64, 64), 8192), ("b", dtypes.by_name("f32"), (7, 9), 252)]
        path.write_bytes(safetensors_header(entries))
        with path.open("ab") as file:
            file.truncate(file.tell() + 8444)
        self.only_failure(path, "all-zero", ["a", "b"])

    def test_a_bool_that_is_neither_is_said_and_what_cannot_be_decoded_is_no_failure(self):
        path = self.folder / "x.safetensors"
        entries = [("a", dtypes.by_name("bool"), (2,), 2), ("c", dtypes.by_name("c64"), (2,), 16)]
        path.write_bytes(safetensors_header(entries) + bytes((1, 2)) + bytes(16))
        self.only_failure(path, "values", ["a"], words=("BOOL",))
        skipped = [check for check in self.inspect(path) if check.passed is None and check.tensors]
        self.assertEqual([check.tensors for check in skipped], [("c",)])

    def test_a_norm_below_the_bound_of_s24(self):
        metadata, tensors = self.sample()
        small = (tensors[DOWN][1].astype(np.float32) * 1e-7).astype(np.float32)
        self.assertLess(np.linalg.norm(small), 1e-6)
        failed = self.failures(self.write(metadata, tensors | {DOWN: ["f32", small]}))
        self.assertEqual(failed["l2"].tensors, (DOWN,))

    @parameterized.parameters((0, 0.051, 0), (1, 0, 0.0049), (1, 0, 0.51))
    def test_embedding_statistics_beyond_the_bounds_of_s1(self, keep, mean, std):
        metadata, tensors = self.sample()
        values = tensors[EMBEDDING][1].astype(np.float64)
        values = (values - values.mean()) / values.std() * (std or 0.0152) + mean * (1 - keep)
        for factor, red in ((1.0, True), (0.97 if std != 0.0049 else 1.04, False)):
            scaled = values * factor
            path = self.write(metadata, tensors | {EMBEDDING: ["f32", scaled.astype(np.float32)]})
            self.assertEqual(list(self.failures(path)), ["embedding"] if red else [])

    @parameterized.parameters(0.001, 14.0, -1.0, 1000.0)
    def test_final_norm_statistics_beyond_the_bounds_of_s1(self, factor):
        metadata, tensors = self.sample()
        values = (tensors[NORM][1].astype(np.float32) * factor).astype(np.float32)
        path = self.write(metadata, tensors | {NORM: ["f32", values]})
        self.only_failure(path, "final-norm", [NORM])
        values = tensors[NORM][1].astype(np.float32) * np.float32(12.5)
        self.assertEmpty(self.failures(self.write(metadata, tensors | {NORM: ["f32", values]})))

    @parameterized.parameters(0.1, 0.5, 0.9)
    def test_the_spot_rows_of_s24(self, share):
        metadata, tensors = self.sample()
        values = tensors[EMBEDDING][1].copy()
        values[int(288 * share)] = 0
        path = self.write(metadata, tensors | {EMBEDDING: ["bf16", values]})
        self.only_failure(path, "spot-rows", [EMBEDDING], words=(str(int(288 * share)),))

    # --- large tensors, of which only a part is sampled

    @parameterized.parameters("bf16", "f16", "f32")
    def test_one_bad_value_anywhere_in_a_large_tensor_is_found(self, dtype):
        values = np.full((1200, 9001), 0.02, NUMPY[dtype])
        for place, bad in ((0, np.nan), (5_000_000, np.inf), (values.size - 1, -np.nan)):
            values.reshape(-1)[place] = bad
            self.only_failure(self.write({}, {"a": [dtype, values]}), "finite", ["a"])
            values.reshape(-1)[place] = 0.02

    def test_a_large_relabelled_tensor_and_a_large_half_empty_one(self):
        generator = np.random.default_rng(0)
        values = (generator.standard_normal((1200, 9001), np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        other = np.ones((5, 5), np.float32)
        self.assertEmpty(self.failures(self.write({}, {"a": ["bf16", values], "b": ["f32", other]})))
        path = self.write({}, {"a": ["f16", values.view(np.float16)], "b": ["f32", other]})
        self.only_failure(path, "relabelled", ["a"])
        values[500:820] = 0
        self.only_failure(self.write({}, {"a": ["bf16", values]}), "dead-rows", ["a"], words=("320 of 1200",))

    def test_a_tensor_that_leaves_no_doubt_is_read_once(self):
        values = np.random.default_rng(0).normal(0, 0.02, (64, 64)).astype(np.float32)
        empty = values.copy()
        empty[:16] = 0
        with mock.patch.object(statistics, "measure", side_effect=statistics.measure) as measure:
            self.inspect(self.write({}, {"a": ["f32", values], "b": ["f32", empty]}))
        self.assertEqual([call.args[0].name for call in measure.call_args_list], ["b"])

    def test_a_file_that_shrinks_is_an_error_that_names_it(self):
        path = self.write({}, {"a": ["f32", np.ones((1200, 9001), np.float32)]})
        with open_checkpoint(path) as opened:
            with path.open("r+b") as file:
                file.truncate(30 << 20)
            with self.assertRaises(Exception) as caught:
                inspect(opened)
        self.assertEqual(getattr(caught.exception, "code", None), "short-read")


def safetensors_header(entries):
    """A header for tensors that follow each other."""
    described, position = {}, 0
    for name, dtype, shape, nbytes in entries:
        described[name] = {
            "dtype": dtype.safetensors,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text


if __name__ == "__main__":
    absltest.main()
