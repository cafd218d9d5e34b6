"""Dumps as other tools write them: what was computed comes back, mistakes are named, hostile files refused."""

import functools
import io
import json
import os
import pathlib
import sys
import zipfile
from typing import ClassVar

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax import capture
from apr_jax.converters.errors import AprJaxError, BrokenContainerError, MissingFileError, RefusedError, UsageError
from apr_jax.engines import bounded, jsonl
from apr_jax.load.load_model import load_model
from apr_jax.parity import dumps, ranks, summaries
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs, seeded
from tests import oracle, paths
from tests.battery.faulty_forward import Planted, forward

NAME = "gqa_tied_bf16"
LENGTH = 64
"""As in the other suites, so that what they compile is shared."""
load = functools.lru_cache(load_model)
MISTAKES = (
    Planted("rope-adjacent-pairs"),
    Planted("rms-norm-eps", None, {"eps": 1e-4}),
    Planted("kv-heads-interleaved"),
    Planted("mask-off-by-one"),
    Planted("softmax-scale", None, {"scale": 1.0}),
)


class ReadersTestCase(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.exact = load(paths.checkpoint(NAME), "float64", "cpu")
        cls.config = cls.exact.config
        cls.ids = seeded(cls.config.vocab_size, 1, LENGTH).input_ids

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def engine(self, *faults, ids=None):
        return forward(*oracle.load(paths.checkpoint(NAME)), self.ids if ids is None else ids, faults=faults)

    def refused(self, kind: type[AprJaxError], code, path, *args):
        with self.assertRaises(kind) as caught:
            dumps.read(path, self.config, *args)
        self.assertEqual(caught.exception.code, code, str(caught.exception))
        self.assertIsNotNone(caught.exception.file)
        return str(caught.exception)

    def assert_holds(self, dump, values, keys):
        self.assertEqual(set(dump.values), set(keys))
        for key in keys:
            np.testing.assert_array_equal(dump.values[key], values[key], key)

    def named(self, dump):
        same = load(paths.checkpoint(NAME), "float32", "cpu")
        return {one.fault for one in diagnose(self.exact, same, dump.inputs, dump.values, dump.columns).findings}


class HiddenStatesTest(ReadersTestCase):
    KEYS = ("stage.embedding", "stage.0.post_ffn_residual", "stage.final_norm")

    def states(self, values):
        """HuggingFace's tuple: the embedding, each layer's output, and the last one's after the final norm."""
        return [values[key] for key in self.KEYS]

    @parameterized.parameters("hidden.{}", "hidden_states.{}", "hidden_states_{}", "hidden_state-{}")
    def test_npz_and_safetensors(self, name):
        values = self.engine()
        arrays = {name.format(index): state for index, state in enumerate(self.states(values))}
        arrays |= {"input_ids": self.ids.astype(np.int64), "logits": values["logits"]}
        np.savez(self.folder / "x.npz", **arrays)
        safetensors.numpy.save_file(
            {k: np.ascontiguousarray(v) for k, v in arrays.items()}, self.folder / "x.safetensors"
        )
        for path in (self.folder / "x.npz", self.folder / "x.safetensors"):
            self.assert_holds(dumps.read(path, self.config), values, (*self.KEYS, "logits"))

    def test_one_array_and_attentions_and_a_single_row_of_ids(self):
        values = self.engine()
        weights = np.stack([values[f"stage.{layer}.attn_softmax"] for layer in range(2)])
        path = self.folder / "x.npz"
        np.savez_compressed(
            path, hidden_states=np.stack(self.states(values)), attentions=weights, input_ids=self.ids[0]
        )
        keys = (*self.KEYS, "stage.0.attn_softmax", "stage.1.attn_softmax")
        self.assert_holds(dumps.read(path, self.config), values, keys)
        np.savez(path, hidden_states=np.stack(self.states(values)[:2]), input_ids=self.ids)
        self.refused(RefusedError, "dump-shape", path)

    @parameterized.parameters("present.{}.key", "past_key_values.{}.key", "k_cache.{}")
    def test_the_keys_of_a_cache(self, name):
        values, c = self.engine(), self.config
        arrays = {
            name.format(layer): np.ascontiguousarray(
                values[f"stage.{layer}.k_post_rope"].reshape(1, LENGTH, c.num_kv_heads, c.head_dim).swapaxes(1, 2)
            )
            for layer in range(2)
        }
        arrays |= {"present.0.value": np.zeros(3, np.float32), "input_ids": self.ids.astype(np.int32)}
        safetensors.numpy.save_file(arrays, self.folder / "x.safetensors")
        dump = dumps.read(self.folder / "x.safetensors", self.config)
        self.assert_holds(dump, values, ["stage.0.k_post_rope", "stage.1.k_post_rope"])
        self.assertEqual(dump.strangers, ("present.0.value",))

    def test_hidden_names_in_a_map_and_as_files(self):
        values = self.engine()
        for index, state in enumerate(self.states(values)):
            np.save(self.folder / f"hidden.{index}.npy", state)
        (self.folder / "token_ids.json").write_text(json.dumps(self.ids[0].tolist()))
        self.assert_holds(dumps.read(self.folder, self.config), values, self.KEYS)
        entries = {f"hidden.{end}": {"file": f"hidden.{index}.npy"} for index, end in enumerate((0, 1, "final_norm"))}
        (self.folder / "dump.json").write_text(json.dumps({"stages": entries}))
        self.assert_holds(dumps.read(self.folder, self.config), values, self.KEYS)


class LlamaCppTest(ReadersTestCase):
    """Arrays under the names of llama.cpp's graph: scores without scale, the last layer of the last token alone."""

    STAGES: ClassVar = {
        "attn_norm": "attn_norm",
        "q_post_rope": "Qcur",
        "k_post_rope": "Kcur",
        "attn_softmax": "kq_soft_max",
        "attention": "kqv_out",
        "post_attn_residual": "ffn_inp",
        "ffn_norm": "ffn_norm",
        "ffn_gate": "ffn_gate",
        "ffn_up": "ffn_up",
        "ffn_swigl": "ffn_swiglu",
        "ffn_out": "ffn_out",
        "post_ffn_residual": "l_out",
    }

    def write(self, values, kept_last=True):
        c = self.config
        behind = list(self.STAGES).index("attention")
        for layer in range(c.num_layers):
            for place, (stage, name) in enumerate(self.STAGES.items()):
                array = values[f"stage.{layer}.{stage}"][0]
                if stage in ("q_post_rope", "k_post_rope"):
                    array = array.reshape(LENGTH, -1, c.head_dim)
                if stage == "attn_softmax":
                    array = np.pad(array, [(0, 0), (0, 0), (0, 96 - LENGTH)])  # the cache has more cells
                if kept_last and layer == c.num_layers - 1 and place > behind:
                    array = array[-1:]
                np.save(self.folder / f"{name}-{layer}.npy", array)
            scores = values[f"stage.{layer}.attn_scores"][0] * np.float32(c.head_dim**0.5)
            np.save(self.folder / f"kq-{layer}.npy", scores)
            np.save(self.folder / f"Vcur-{layer}.npy", np.zeros((LENGTH, 2), np.float32))
        np.save(self.folder / "inp_embd.npy", values["stage.embedding"][0])
        np.save(self.folder / "result_norm.npy", values["stage.final_norm"][0, -1:])
        np.save(self.folder / "result_output.npy", values["logits"][0, -1])
        (self.folder / "token_ids.json").write_text(json.dumps(self.ids[0].tolist()))

    def test_a_right_run_comes_back_and_has_no_finding(self):
        values = self.engine()
        self.write(values)
        dump = dumps.read(self.folder, self.config)
        self.assertLen(dump.values, 2 * (len(self.STAGES) + 1) + 3)
        self.assertEqual(dump.strangers, ("Vcur-0", "Vcur-1"))
        for key, found in dump.values.items():
            right = values[key][:, -1:] if found.shape != values[key].shape else values[key]
            np.testing.assert_allclose(found, right, rtol=3e-7, err_msg=key)
        self.assertEqual(self.named(dump), set())

    @parameterized.parameters(*MISTAKES)
    def test_mistakes_are_named(self, *planted):
        (fault,) = (planted[0],) if len(planted) == 1 else (Planted(*planted),)
        self.write(self.engine(fault))
        self.assertEqual(self.named(dumps.read(self.folder, self.config)), {fault.name})

    def test_older_versions_name_the_projected_values_kqv_out(self):
        values = self.engine()
        np.save(self.folder / "kqv_merged_cont-0.npy", values["stage.0.attention"][0])
        np.save(self.folder / "kqv_out-0.npy", values["stage.0.attn_out"][0])
        dump = dumps.read(self.folder, self.config, Inputs.of(self.ids))
        self.assert_holds(dump, values, ("stage.0.attention", "stage.0.attn_out"))


class RequestsTest(ReadersTestCase):
    """TensorRT-Edge-LLM's file of one request, as its LayerDebugger documents it."""

    def write(self, values, prompt, rounds, slots=72, **changed):
        c, arrays = self.config, {}
        for index in range(rounds):
            length = prompt + index
            arrays[f"round_{index}.logits"] = values["logits"][:, length - 1].astype(np.float16)
            arrays[f"round_{index}.context_lengths"] = np.array([length], np.int32)
            arrays[f"round_{index}.generated_token_ids"] = self.ids[0, length : length + 1].astype(np.int32)
            for layer in range(c.num_layers):
                cache = np.zeros((1, 2, c.num_kv_heads, slots, c.head_dim), np.float32)
                keys = values[f"stage.{layer}.k_post_rope"].reshape(1, LENGTH, c.num_kv_heads, c.head_dim)
                cache[:, 0, :, :length] = keys[:, :length].swapaxes(1, 2)
                arrays[f"round_{index}.layer_{layer}.kv"] = cache
        arrays |= changed
        safetensors.numpy.save_file({k: v for k, v in arrays.items() if v is not None}, self.folder / "r.safetensors")
        return self.folder / "r.safetensors"

    def test_logits_of_each_round_and_the_keys_of_all_tokens(self):
        values = self.engine()
        path = self.write(values, LENGTH - 4, 4)
        dump = dumps.read(path, self.config, Inputs.of(self.ids[:, : LENGTH - 4]))
        np.testing.assert_array_equal(dump.inputs.input_ids, self.ids[:, : LENGTH - 1])
        np.testing.assert_array_equal(dump.columns, [range(LENGTH - 5, LENGTH - 1)])
        np.testing.assert_array_equal(dump.values["logits"], values["logits"][:, LENGTH - 5 : -1].astype(np.float16))
        for layer in range(2):
            key = f"stage.{layer}.k_post_rope"
            np.testing.assert_array_equal(dump.values[key], values[key][:, :-1])

    def test_files_that_are_not_whole_are_refused(self):
        values, prompt = self.engine(), Inputs.of(self.ids[:, : LENGTH - 2])
        path = self.write(values, LENGTH - 2, 2, **{"round_1.context_lengths": None})
        self.refused(RefusedError, "dump-rounds", path, prompt)
        path = self.write(values, LENGTH - 2, 1, **{"round_0.context_lengths": np.array([LENGTH - 2, 30], np.int32)})
        self.refused(RefusedError, "dump-rounds", path, prompt)
        path = self.write(values, LENGTH - 2, 1, **{"round_0.layer_0.kv": np.ones((1, 2, 3, 4), np.float32)})
        self.refused(RefusedError, "dump-shape", path, prompt)
        self.refused(MissingFileError, "token-ids-missing", self.write(values, LENGTH - 2, 1))


class ModuleOutputsTest(ReadersTestCase):
    """msprobe's arrays of what modules took and gave, by the names of HuggingFace's modules."""

    MODULES = (
        ("input_layernorm.Qwen2RMSNorm", (), ("attn_norm",)),
        ("self_attn.o_proj.Linear", ("attention",), ("attn_out",)),
        ("self_attn.Qwen2Attention", (), ("attn_out", "attn_softmax")),
        ("post_attention_layernorm.Qwen2RMSNorm", ("post_attn_residual",), ("ffn_norm",)),
        ("mlp.gate_proj.Linear", ("ffn_norm",), ("ffn_gate",)),
        ("mlp.up_proj.Linear", ("ffn_norm",), ("ffn_up",)),
        ("mlp.act_fn.SiLUActivation", ("ffn_gate",), ("ffn_silu",)),
        ("mlp.down_proj.Linear", ("ffn_swigl",), ("ffn_out",)),
        ("Qwen2DecoderLayer", (), ("post_ffn_residual",)),
    )

    def write(self, values):
        folder = self.folder / "step0" / "rank0" / "dump_tensor_data"
        folder.mkdir(parents=True)

        def put(module, inputs, outputs):
            for side, arrays in (("input", inputs), ("output", outputs)):
                for index, array in enumerate(arrays):
                    np.save(folder / f"Module.{module}.forward.0.{side}.{index}.npy", array)

        put("model.embed_tokens.Embedding", [self.ids.astype(np.int64)], [values["stage.embedding"]])
        for layer in range(2):
            at = f"model.layers.{layer}"
            for module, inputs, outputs in self.MODULES:
                taken, given = ([values[f"stage.{layer}.{stage}"] for stage in each] for each in (inputs, outputs))
                put(f"{at}.{module}", taken, given)
            biased = values[f"stage.{layer}.qkv_bias"]
            sizes = np.cumsum([values[f"stage.{layer}.{part}_post_rope"].shape[-1] for part in "qk"])
            for part, array in zip("qkv", np.split(biased, sizes, -1), strict=True):
                put(f"{at}.self_attn.{part}_proj.Linear", [values[f"stage.{layer}.attn_norm"]], [array])
        put("model.norm.Qwen2RMSNorm", [], [values["stage.final_norm"]])
        put("lm_head.Linear", [values["stage.final_norm"]], [values["logits"]])
        (folder.parent / "dump.json").write_text(json.dumps({"task": "tensor", "level": "L0", "data": {}}))

    def test_what_modules_show_comes_back(self):
        values = self.engine()
        self.write(values)
        dump = dumps.read(self.folder, self.config)
        hidden = ("qkv_matmul", "q_post_rope", "k_post_rope", "attn_scores")
        self.assert_holds(dump, values, [key for key in values if key.rpartition(".")[2] not in hidden])

    def test_a_mistake_is_named(self):
        self.write(self.engine(Planted("rope-adjacent-pairs")))
        self.assertEqual(self.named(dumps.read(self.folder, self.config)), {"rope-adjacent-pairs"})

    def test_without_the_tokens_it_is_refused(self):
        self.write(self.engine())
        for path in self.folder.rglob("*embed_tokens*input*"):
            path.unlink()
        self.refused(RefusedError, "token-ids-missing", self.folder)


class SummariesTest(ReadersTestCase):
    """Dumps of a few numbers of each stage."""

    def judged(self, path, *args):
        dump = dumps.read(path, self.config, *args)
        self.assertEqual(dict(dump.values), {})
        return summaries.judge(self.exact, load(paths.checkpoint(NAME), "float32", "cpu"), dump.inputs, dump.summaries)

    def write_map(self, values, digits=7):
        def short(number):
            return float(f"{number:.{digits}g}")

        entries = {
            key: {
                "min": short(value.min()),
                "max": short(value.max()),
                "mean": short(value.mean(dtype=np.float64)),
                "l2": short(np.linalg.norm(value.astype(np.float64))),
            }
            for key, value in values.items()
        }
        (self.folder / "dump.json").write_text(json.dumps({"input_ids": self.ids.tolist(), "stages": entries}))
        return self.folder

    def test_a_right_run_differs_nowhere(self):
        answer = self.judged(self.write_map(self.engine()))
        self.assertEqual((answer.differences, len(answer.compared)), ((), 37))

    @parameterized.parameters(
        ("rope-adjacent-pairs", {}, "stage.0.q_post_rope", "adjacent-pair RoPE"),
        ("kv-heads-interleaved", {}, "stage.0.attn_scores", "KV head h mod"),
        ("norm-weight-missing", {}, "stage.0.attn_norm", "weight is missing"),
        ("mask-not-causal", {}, "stage.0.attn_scores", "not causal"),
        ("final-norm-missing", {}, "stage.final_norm", "final norm is missing"),
    )
    def test_the_first_wrong_stage_is_named_and_the_mistake_is_on_the_shortlist(self, name, parameters, key, said):
        answer = self.judged(self.write_map(self.engine(Planted(name, None, parameters))))
        self.assertEqual({one.key for one in answer.differences}, {key})
        self.assertIn(said, "; ".join(answer.shortlist))
        self.assertLess(len(answer.shortlist), 6)

    def test_what_llama_eval_callback_prints(self):
        def text(values):
            for key, name, operation in (
                ("stage.embedding", "inp_embd", "GET_ROWS(token_embd.weight{64, 288, 1, 1}, inp_tokens{64, 1, 1, 1}})"),
                ("stage.0.attn_norm", "attn_norm-0", "MUL(norm-0{64, 64, 1, 1}, blk.0.attn_norm.weight{64, 1, 1, 1}})"),
                (None, "Qcur-0", "MUL_MAT(blk.0.attn_q.weight{64, 64, 1, 1}, attn_norm-0{64, 64, 1, 1}})"),
                ("stage.0.q_post_rope", "Qcur-0", "ROPE(Qcur-0 (reshaped){16, 4, 64, 1}, inp_pos{64, 1, 1, 1}})"),
                ("stage.0.post_ffn_residual", "l_out-0", "ADD(ffn_out-0{64, 64, 1, 1}, ffn_inp-0{64, 64, 1, 1}})"),
                ("stage.1.post_ffn_residual", "l_out-1", "ADD(ffn_out-1{64, 1, 1, 1}, ffn_inp-1{64, 1, 1, 1}})"),
            ):
                value = np.ones((1, LENGTH, 64)) if key is None else values[key]
                value = value[:, -1:] if "-1" in name else value
                size = f"{value.shape[2]}, {value.shape[1]}, 1, 1"
                yield f"ggml_debug: {name:>24} = (f32) {operation} = {{{size}}}"
                yield from ("    [", "     [ -0.0181,   0.0272, ..., 0.1],", "    ]")
                yield f"    sum = {value.sum(dtype=np.float64):.6f}"

        (self.folder / "token_ids.json").write_text(json.dumps(self.ids[0].tolist()))
        path = self.folder / "run.txt"
        for fault, first in ((None, set()), (Planted("rope-adjacent-pairs"), {"stage.0.q_post_rope"})):
            path.write_text("llama_new_context: n_ctx = 512\n" + "\n".join(text(self.engine(*filter(None, [fault])))))
            answer = self.judged(path)
            self.assertEqual({one.key for one in answer.differences}, first)
            self.assertLen(answer.compared, 3 if first else 5)

    def test_msprobe_statistics(self):
        values, data = self.engine(Planted("rms-norm-eps", None, {"eps": 1e-3})), {}
        for module, key in (
            ("model.embed_tokens.Embedding", "stage.embedding"),
            *(
                (f"model.layers.{layer}.{module}", f"stage.{layer}.{stage}")
                for layer in range(2)
                for module, stage in (
                    ("input_layernorm.Qwen2RMSNorm", "attn_norm"),
                    ("post_attention_layernorm.Qwen2RMSNorm", "ffn_norm"),
                    ("mlp.down_proj.Linear", "ffn_out"),
                    ("mlp.up_proj.Linear", "ffn_up"),
                )
            ),
            ("model.norm.Qwen2RMSNorm", "stage.final_norm"),
        ):
            value = values[key].astype(np.float64)
            numbers = {"Max": value.max(), "Min": value.min(), "Mean": value.mean(), "Norm": np.linalg.norm(value)}
            data[f"Module.{module}.forward.0"] = {"output": [{"type": "torch.Tensor", **numbers}]}
        (self.folder / "dump.json").write_text(json.dumps({"task": "statistics", "level": "L0", "data": data}))
        answer = self.judged(self.folder, Inputs.of(self.ids))
        self.assertEqual({one.key for one in answer.differences}, {"stage.0.attn_norm"})

    @parameterized.parameters({}, {"l2": "x"}, {"l2": None}, {"min": [1]}, {"max": 1e999})
    def test_no_numbers_are_refused(self, **entry):
        text = json.dumps({"input_ids": [[1]], "stages": {"logits": entry}}).replace("Infinity", "1e999")
        (self.folder / "dump.json").write_text(text)
        with self.assertRaises(AprJaxError) as caught:
            dumps.read(self.folder, self.config)
        self.assertIn(caught.exception.code, ("dump-map", "json-number"))


class RanksTest(ReadersTestCase):
    """Dumps of tensor-parallel ranks, each written as its own process would."""

    @staticmethod
    def share(key, value, rank, count, config):
        """What a rank holds of a stage; KV heads are held by several ranks where there are fewer of them."""
        stage, width = key.rpartition(".")[2], config.head_dim
        kv = max(config.num_kv_heads // count, 1) * width
        place = rank * config.num_kv_heads // count
        if stage in ("attn_scores", "attn_softmax"):
            return np.split(value, count, 1)[rank]
        if stage == "k_post_rope":
            return value[..., place * width : place * width + kv]
        if stage in ("qkv_matmul", "qkv_bias"):
            ends = np.cumsum([config.num_heads, config.num_kv_heads]) * width
            q, k, v = np.split(value, ends, -1)
            shown = [each[..., place * width : place * width + kv] for each in (k, v)]
            return np.concatenate([np.split(q, count, -1)[rank], *shown], -1)
        split = ("q_post_rope", "attention", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "logits")
        return np.split(value, count, -1)[rank] if stage in split else value

    def write(self, values, count, order=None, change=lambda rank, key, value: value):
        for rank in range(count):
            held = (order or range(count))[rank]
            own = {
                key: np.ascontiguousarray(change(rank, key, self.share(key, value, held, count, self.config)))
                for key, value in values.items()
            }
            capture.arrays(self.folder / f"rank{rank}", self.ids, own)
        return dumps.read(self.folder, self.config)

    def judged(self, dump):
        values, findings = ranks.judge(self.exact, dump.inputs, dump.ranks, dump.columns)
        same = load(paths.checkpoint(NAME), "float32", "cpu")
        rest = diagnose(self.exact, same, dump.inputs, values, dump.columns).findings
        return [one.fault for one in findings], [one.fault for one in rest], values

    @parameterized.parameters(2, 4)
    def test_parts_are_put_together(self, count):
        values = self.engine()
        dump = self.write(values, count)
        self.assert_holds(dump, values, values)
        self.assertEqual(self.judged(dump)[:2], ([], []))

    @parameterized.parameters(((1, 0),), ((0, 2, 1, 3),), ((3, 2, 1, 0),))
    def test_ranks_in_another_order_are_named(self, order):
        values = self.engine()
        named, rest, sorted_out = self.judged(self.write(values, len(order), order))
        self.assertEqual((named, rest), (["rank-order"], []))
        np.testing.assert_array_equal(sorted_out["stage.1.ffn_up"], values["stage.1.ffn_up"])

    @parameterized.parameters("attn_out", "ffn_out")
    def test_parts_that_are_not_summed_are_named(self, stage):
        values, noise = self.engine(), np.random.default_rng(0)
        part = values[f"stage.0.{stage}"]
        part = (part * noise.uniform(0, 1, part.shape)).astype(np.float32)
        later = {"attn_out": "post_attn_residual", "ffn_out": "post_ffn_residual"}[stage]
        for reduced in (True, False):

            def own(rank, key, value, reduced=reduced):
                if key == f"stage.0.{stage}":
                    return part if rank else value - part
                return value + part * (1 if rank else -1) if key == f"stage.0.{later}" and not reduced else value

            self.folder = pathlib.Path(self.create_tempdir().full_path)
            named, rest, _ = self.judged(self.write(values, 2, change=own))
            self.assertEqual((named, rest), ([] if reduced else ["all-reduce-missing"], []))

    def test_another_mistake_is_named_as_ever(self):
        named, rest, _ = self.judged(self.write(self.engine(Planted("rope-adjacent-pairs")), 2))
        self.assertEqual((named, rest), ([], ["rope-adjacent-pairs"]))
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        named, rest, _ = self.judged(self.write(self.engine(Planted("qkv-bias-twice")), 2))
        self.assertEqual((named, rest), ([], ["qkv-bias-twice"]))

    def test_ranks_that_do_not_fit_are_refused(self):
        self.write(self.engine(), 2)
        (self.folder / "rank1").rename(self.folder / "rank3")
        self.refused(RefusedError, "dump-ranks", self.folder)
        (self.folder / "rank3").rename(self.folder / "rank1")
        (self.folder / "rank2").mkdir()
        self.refused(RefusedError, "dump-ranks", self.folder)
        (self.folder / "rank2").rmdir()
        np.save(self.folder / "rank0" / "stage.0.ffn_up.npy", np.ones((1, LENGTH, 7), np.float32))
        self.refused(RefusedError, "dump-size", self.folder)


class JsonlTest(ReadersTestCase):
    def test_what_is_written_is_read_and_rows_may_be_unequal(self):
        batch = Inputs.of([self.ids[0, :7].tolist(), self.ids[0, :5].tolist()])
        logits = self.engine(ids=batch.input_ids)["logits"]
        jsonl.write(self.folder / "x.jsonl", batch, logits)
        lines = [json.loads(line) for line in (self.folder / "x.jsonl").read_text().splitlines()]
        self.assertEqual([line["tokens"] for line in lines], [self.ids[0, :7].tolist(), self.ids[0, :5].tolist()])
        self.assertEqual(np.shape(lines[1]["logits"]), (5, self.config.vocab_size))
        dump = dumps.read(self.folder / "x.jsonl", self.config)
        np.testing.assert_array_equal(dump.inputs.attention_mask, batch.attention_mask)
        mask = batch.attention_mask == 1
        np.testing.assert_array_equal(dump.values["logits"][mask], logits[mask])

    @parameterized.parameters(
        (b"", RefusedError, "nothing-compared"),
        (b"{", BrokenContainerError, "json-syntax"),
        (b"[1]", BrokenContainerError, "jsonl"),
        (b'{"tokens": [1], "logits": "gANj"}', RefusedError, "dump-size"),
        (b'{"tokens": [1], "logits": [[1, [2]]]}', RefusedError, "dump-size"),
        (b'{"tokens": [1, 2], "logits": [[1.0, 2.0]]}', RefusedError, "dump-size"),
        (b'{"tokens": ["a"], "logits": [[1.0]]}', BrokenContainerError, "jsonl"),
        (b"\x80\x04\x95pickle", BrokenContainerError, "json-utf8"),
    )
    def test_others_are_refused(self, content, kind, code):
        (self.folder / "x.jsonl").write_bytes(content)
        self.refused(kind, code, self.folder / "x.jsonl")


def npy(header: bytes, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


class HostileTest(ReadersTestCase):
    @parameterized.parameters(
        b"((",
        b"{1: 2, 'descr': 3}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
        b"(" * 9000,
        b"1" * 9000,
        b"{'descr': '|O', 'fortran_order': False, 'shape': (0,), 'x': 1}",
    )
    def test_headers_that_are_none(self, header):
        (self.folder / "logits.npy").write_bytes(npy(header, bytes(4)))
        self.refused(BrokenContainerError, "npy", self.folder, Inputs.of(self.ids))

    @parameterized.parameters("|O", "<i8", "<c8", "<f16", "<U4")
    def test_other_elements(self, descr):
        header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,)}}".encode()
        (self.folder / "logits.npy").write_bytes(npy(header, bytes(np.dtype(descr).itemsize)))
        self.refused(RefusedError, "dump-dtype", self.folder, Inputs.of(self.ids))

    @parameterized.parameters("/etc/hostname", "../x.npy", "a/../../x.npy", "", "C:\\x.npy", "..\\x.npy", "a\0b")
    def test_a_map_names_files_of_its_folder_only(self, name):
        content = {"input_ids": [[1]], "stages": {"logits": {"file": name}}}
        (self.folder / "dump.json").write_text(json.dumps(content))
        self.refused(RefusedError, "file-name", self.folder)

    @parameterized.parameters({"dtype": {}}, {"stages": {"logits": {"file": "x.raw", "dtype": [1]}}}, {"dtype": 3})
    def test_a_dtype_is_a_name(self, **changed):
        content = {"input_ids": [[1]], "stages": {"logits": {"file": "x.raw"}}} | changed
        (self.folder / "dump.json").write_text(json.dumps(content))
        (self.folder / "x.raw").write_bytes(bytes(4))
        self.refused(UsageError, "dtype", self.folder)

    def test_a_large_file_is_refused_before_it_is_read(self):
        names = {"logits.npy": self.folder / "a", "x.raw": self.folder / "b"}
        for name, folder in names.items():
            folder.mkdir()
            with open(folder / name, "wb") as file:
                file.truncate(8 << 30)
        content = {"input_ids": self.ids.tolist(), "stages": {"logits": {"file": "x.raw"}}}
        (self.folder / "b" / "dump.json").write_text(json.dumps(content))
        for folder in names.values():
            self.refused(RefusedError, "dump-size", folder, Inputs.of(self.ids))
        with open(self.folder / "dump.json", "wb") as file:
            file.truncate(8 << 30)
        self.refused(RefusedError, "dump-size", self.folder)

    def test_pipes_are_not_opened(self):
        os.mkfifo(self.folder / "logits.npy")
        self.refused(RefusedError, "dump-file", self.folder, Inputs.of(self.ids))

    def test_an_archive_that_grows_is_refused(self):
        path = self.folder / "x.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            buffer = io.BytesIO()
            np.save(buffer, np.zeros((1, 64 << 20), np.float32))
            archive.writestr("logits.npy", buffer.getvalue())
            buffer = io.BytesIO()
            np.save(buffer, self.ids)
            archive.writestr("input_ids.npy", buffer.getvalue())
        self.refused(RefusedError, "dump-size", path)
        for content in (b"", b"PK\x03\x04", path.read_bytes()[:200]):
            path.write_bytes(content)
            self.refused(BrokenContainerError, "npz", path)

    def test_a_dump_without_a_stage_says_what_it_holds(self):
        np.savez(self.folder / "x.npz", input_ids=self.ids, something=np.zeros(3, np.float32))
        self.assertIn("something", self.refused(RefusedError, "nothing-compared", self.folder / "x.npz"))
        np.savez(self.folder / "x.npz", **{"input_ids": self.ids, "hidden_states.9": np.zeros(3, np.float32)})
        self.refused(RefusedError, "nothing-compared", self.folder / "x.npz")

    def test_every_dtype_that_numpy_saves_comes_back(self):
        value = self.engine()["stage.final_norm"]
        for name, dtype in bounded.DTYPES.items():
            for order in ("C", "F"):
                np.save(self.folder / "final_norm.npy", np.asarray(value.astype(dtype), order=order))
                found = dumps.read(self.folder, self.config, Inputs.of(self.ids)).values[stages.FINAL_NORM]
                np.testing.assert_array_equal(found, value.astype(dtype).astype(found.dtype), f"{name} {order}")


class ExplainTest(absltest.TestCase):
    def test_every_form_is_said(self):
        text = dumps.explain("apr-jax parity")
        for part in (
            "dump.json",
            "llama.cpp",
            "hidden_states",
            "TensorRT-Edge-LLM",
            "MaxText",
            "APRT",
            "capture.torch",
        ):
            self.assertIn(part, text)
        self.assertLessEqual(max(map(len, text.splitlines())), 100)


if __name__ == "__main__":
    absltest.main()
