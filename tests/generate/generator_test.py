"""Generation on the device beside the plain forward pass: the same tokens, few programs, no copies."""

import contextlib
import dataclasses
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError, RefusedError, UsageError
from apr_jax.generate import programs
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.generator import Generator, load_generator
from apr_jax.generate.programs import bucket
from apr_jax.kernels import fastest_ops
from apr_jax.model.language_model import LanguageModel
from apr_jax.trace import tolerances
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs
from tests import paths

SAMPLE = paths.checkpoint("gqa_tied_bf16")
PLAIN = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": ()}
WIDTH = 128  # all reference runs share one program of this length


class Compilations:
    """Counts what XLA compiles, whoever asks for it."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()


def seeded_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 280, length).tolist()


def reference(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from whole forward passes, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        ids = np.zeros((1, WIDTH), np.int64)
        ids[0, : len(tokens)] = tokens
        mask = (np.arange(WIDTH) < len(tokens)).astype(np.int32)[None]
        tokens.append(int(np.asarray(model(ids, mask))[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@contextlib.contextmanager
def recorded_hidden_states() -> Iterator[list[np.ndarray]]:
    """Keeps the hidden states [B, D] that first tokens are picked from."""
    genuine, kept = programs.Programs.first_token, []

    def first_token(self, parameters, hidden, *rest):
        kept.append(np.asarray(hidden))
        return genuine(self, parameters, hidden, *rest)

    with mock.patch.object(programs.Programs, "first_token", first_token):
        yield kept


class GenerationTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.generator = load_generator(SAMPLE)

    def greedy(self, prompts, count, generator=None, **settings):
        rows = (generator or self.generator).generate(prompts, max_new_tokens=count, **{**PLAIN, **settings})
        return [list(row.token_ids) for row in rows]

    @parameterized.parameters((1, 5), (16, 49), (17, 48), (63, 2), (64, 1), (65, 32), (40, 57), (60, 6))
    def test_greedy_tokens_are_those_of_whole_forward_passes_at_the_edges_of_every_bucket(self, length, count):
        prompt = seeded_prompt(length)
        self.assertEqual(self.greedy([prompt], count)[0], reference(self.generator.model, prompt, count))

    def test_each_row_of_a_batch_is_what_it_is_alone(self):
        prompts = [seeded_prompt(length, seed=length) for length in (1, 9)]
        batch = self.greedy(prompts, 20)
        self.assertEqual(batch, [self.greedy([prompt], 20)[0] for prompt in prompts])
        drawn = self.generator.generate(prompts, seed=3, max_new_tokens=20, eos_token_id=())
        alone = self.generator.generate(prompts[:1], seed=3, max_new_tokens=20, eos_token_id=())
        self.assertEqual(drawn[0], alone[0], "the first row's draws do not depend on the others")
        again = self.generator.generate(prompts, seed=3, max_new_tokens=20, eos_token_id=())
        self.assertEqual(drawn, again, "a seed gives the same text again")
        other = self.generator.generate(prompts, seed=4, max_new_tokens=20, eos_token_id=())
        self.assertNotEqual([row.token_ids for row in drawn], [row.token_ids for row in other])

    def test_the_penalty_counts_prompt_and_new_tokens(self):
        prompt = seeded_prompt(12)
        tokens = self.greedy([prompt], 30, repetition_penalty=1e6)[0]
        self.assertLen(set(prompt) | set(tokens), len(set(prompt)) + 30)

    def test_a_prompt_in_chunks_is_the_prompt_at_once_within_float32(self):
        model = self.generator.model
        lengths = (33, 16)  # one token beyond whole chunks, and none
        prompts = [seeded_prompt(length, seed=length) for length in lengths]
        inputs = Inputs.of(prompts)
        logits = np.asarray(model.logits(inputs))
        whole = np.stack([logits[row, length - 1] for row, length in enumerate(lengths)])
        chunked = Generator(model, prefill_chunk=16)
        with recorded_hidden_states() as hidden:
            tokens = self.greedy(prompts, 20, chunked)
        project = jax.jit(lambda x: x @ model.parameters["model"]["embed_tokens"]["weight"].T)
        with jax.default_matmul_precision("highest"):
            pieces = np.asarray(project(hidden[0]))
        self.assertLessEqual(relative_l2(pieces, whole), tolerances.FLOAT32)
        self.assertEqual(tokens, self.greedy(prompts, 20))

    def test_first_chunks_are_long_where_prompts_keep_no_scores_and_rows_few(self):
        def chunks(model, **device):
            generator = Generator(model)
            generator.model = types.SimpleNamespace(
                config=model.config, layer_ops=model.layer_ops, ops=model.ops, device=types.SimpleNamespace(**device)
            )
            return [generator.prefill_chunk(rows) for rows in (1, 3, 16, 40_000)]

        model = self.generator.model
        flash = model.with_ops(fastest_ops.cuda_ops(132))
        self.assertEqual(chunks(flash, platform="gpu"), [32768, 8192, 2048, 2048])
        self.assertEqual(chunks(flash.with_ops(flash.ops, {1: flash.ops}), platform="gpu"), [2048] * 4)
        self.assertEqual(chunks(model, platform="gpu"), [2048] * 4)
        self.assertEqual(chunks(model, platform="cpu"), [512] * 4)
        self.assertEqual(Generator(model, prefill_chunk=16).prefill_chunk(1), 16)

    def test_calls_of_like_shape_compile_nothing(self):
        def use(length, seed, **settings):
            prompts = [seeded_prompt(length, seed), seeded_prompt(3, seed)]
            for settled in ({**PLAIN, "eos_token_id": (5,)}, {"temperature": 0.5, "top_k": 7, **settings}):
                self.generator.generate(prompts, seed=seed, max_new_tokens=30 + seed, **settled)

        use(12, seed=0)
        programs, compilations = self.generator.programs.compiled, COMPILATIONS.count
        use(16, seed=9, top_p=0.3, repetition_penalty=1.7, eos_token_id=(1, 2, 3))
        load_generator(SAMPLE).generate("What is 2+2? And more?", max_new_tokens=3)
        use(9, seed=1, stop_strings=["zz"], do_sample=True)
        single = self.generator.programs.compiled - programs
        self.assertLessEqual(single, 3, "another batch size, shared by all generators of the model")
        compilations += single
        self.assertEqual(COMPILATIONS.count, compilations)
        self.generator.generate([seeded_prompt(100)] * 2, max_new_tokens=1)
        self.assertGreater(COMPILATIONS.count, compilations, "the counter counts")

    def test_the_decode_loop_gets_the_cache_donated_and_never_copies_it(self):
        self.greedy([seeded_prompt(5)], 4)
        programs = self.generator.programs._compiled
        key = next(key for key in programs if key[0] == "decode" and key[1] == (1, 64) and not key[3].penalised)
        text = programs[key].as_text()
        layers = self.generator.model.config.num_layers
        cache = "f32\\[1,64,2,16\\]"
        self.assertNotEmpty(re.findall(cache, text))
        copies = re.findall(rf"= {cache}\S* copy\(", text)
        self.assertEmpty(copies)
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text, re.DOTALL)[1]
        self.assertGreaterEqual(aliases.count("may-alias"), 2 * layers)

    def test_a_row_ends_at_an_end_token_and_the_others_go_on(self):
        prompts = [seeded_prompt(6), seeded_prompt(9, seed=1)]
        whole = self.greedy(prompts, 40)
        end = next(token for token in whole[0][3:] if token not in whole[1])
        rows = self.generator.generate(prompts, max_new_tokens=40, **{**PLAIN, "eos_token_id": [end, 287]})
        at = whole[0].index(end) + 1
        self.assertEqual((list(rows[0].token_ids), rows[0].finish_reason), (whole[0][:at], "stop"))
        self.assertEqual((list(rows[1].token_ids), rows[1].finish_reason), (whole[1], "length"))

    def test_the_device_stops_when_every_row_has_ended_and_says_nothing_for_those_that_have(self):
        prompts = [seeded_prompt(6), seeded_prompt(9, seed=1)]
        whole = self.greedy(prompts, 40)
        ends = [row[5] for row in whole]
        blocks = []
        decode = programs.Programs.decode

        def kept(*args):
            state, block = decode(*args)
            blocks.append((np.asarray(block), int(state.made)))
            return state, block

        with mock.patch.object(programs.Programs, "decode", kept):
            rows = self.greedy(prompts, 40, eos_token_id=ends)
        made = np.concatenate(
            [block[:, : np.flatnonzero((block >= 0).any(axis=0)).size] for block, _ in blocks], axis=1
        )
        for row, tokens in zip(rows, made, strict=True):
            said = tokens[tokens != programs.NO_TOKEN].tolist()
            self.assertEqual(said, row[1:], "what the device made is what the row is, without its first token")
        self.assertEqual(blocks[-1][1], max(map(len, rows)), "no step after the last row's end")

    def test_a_stream_yields_what_generate_returns(self):
        stream = self.generator.stream("What is 2+2?", max_new_tokens=50, **PLAIN)
        deltas = list(stream)
        (row,) = self.generator.generate("What is 2+2?", max_new_tokens=50, **PLAIN)
        self.assertGreater(len(deltas), 2)
        self.assertLen(deltas[0].token_ids, 1, "the first token comes at once")
        self.assertEqual("".join(delta.text for delta in deltas), row.text)
        self.assertEqual(sum((delta.token_ids for delta in deltas), ()), row.token_ids)
        self.assertEqual(row.text, self.generator.tokenizer.decode(row.token_ids))
        self.assertEqual([delta.finish_reason for delta in deltas], [None] * (len(deltas) - 1) + ["length"])
        timing = stream.timing
        self.assertEqual((timing.rows, timing.new_tokens, timing.prompt_tokens), (1, 50, len(row.prompt_ids)))
        self.assertGreater(timing.decode_rate, 0)
        half = self.generator.stream("What is 2+2?", max_new_tokens=50, **PLAIN)
        next(iter(half))
        self.assertEqual((half.results()[0].token_ids, half.results()[0].finish_reason), (row.token_ids[:1], None))

    def test_a_stop_string_ends_the_text_with_its_token(self):
        (row,) = self.generator.generate("What is 2+2?", max_new_tokens=60, **PLAIN)
        at = next(
            at for at in range(10, 50) if row.text[at : at + 2].isascii() and row.text.find(row.text[at : at + 2]) == at
        )
        stop = row.text[at : at + 2]
        (cut,) = self.generator.generate("What is 2+2?", max_new_tokens=60, stop_strings=[stop], **PLAIN)
        self.assertEqual((cut.text, cut.finish_reason), (row.text[: at + 2], "stop"))
        self.assertEqual(cut.token_ids, row.token_ids[: len(cut.token_ids)])

    def test_positions_end_where_the_model_ends(self):
        model = self.generator.model
        config = dataclasses.replace(model.config, max_position_embeddings=20)
        short = Generator(LanguageModel(config, model.parameters, model.device))
        prompt = seeded_prompt(15)
        (row,) = short.generate([prompt], max_new_tokens=50, **PLAIN)
        self.assertEqual(list(row.token_ids), reference(model, prompt, 6))
        self.assertEqual(row.finish_reason, "length")
        with self.assertRaisesRegex(UsageError, "longer than the model"):
            short.generate([seeded_prompt(21)], max_new_tokens=1)

    @parameterized.parameters(
        ([""], {}, "prompt is empty"),
        ([[]], {}, "not a batch"),
        ([], {}, "not a batch"),
        ([[288]], {}, "beyond the vocabulary"),
        ([[-1]], {}, "out of range"),
        ([[0.5]], {}, "not integers"),
        (["a"], {"seed": -1}, "seed"),
        (["a"], {"seed": 1 << 32}, "seed"),
        (["a"], {"top_p": -0.5}, "top_p is out of range"),
        (["a"], {"temperature": float("nan")}, "temperature is out of range"),
        (["a"], {"temperature": -1.0}, "temperature is out of range"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is out of range"),
        (["a"], {"stop_strings": [""]}, "stop_strings is out of range"),
        (["a"], {"num_beams": 2}, "num_beams is not supported"),
        (["a"], {"beams": 2}, "no such setting"),
        (["a b c"], {"max_length": 3}, "no room"),
    )
    def test_what_cannot_be_is_refused_before_anything_is_compiled(self, prompts, settings, message):
        before = COMPILATIONS.count
        with self.assertRaisesRegex(UsageError, message):
            self.generator.stream(prompts, **settings)
        self.assertEqual(COMPILATIONS.count, before)

    def test_a_chat_is_a_prompt_of_ids_alone_and_beside_others(self):
        chat = self.generator.chat_prompt([{"role": "user", "content": "Hi"}])
        self.assertEqual(chat, self.generator.tokenizer.encode_chat([{"role": "user", "content": "Hi"}]))
        for prompts, rows in ((chat, 1), ([chat, "a"], 2), (np.asarray(chat), 1)):
            stream = self.generator.stream(prompts)
            self.assertEqual(stream.timing.rows, rows)
            self.assertEqual([int(token) for token in stream.results()[0].prompt_ids], chat)

    def test_field_ids_work_beside_a_tokenizer_that_cannot_be_used(self):
        """FIELD Text: a tokenizer.json that is cut, or of another kind -> refused for text, ids work"""
        for broken in (b'{"model": {"ty', b'{"model": {"type": "Unigram", "vocab": []}}'):
            with open_checkpoint(SAMPLE) as checkpoint:
                object.__setattr__(checkpoint, "files", {**checkpoint.files, "tokenizer.json": broken})
                with self.assertRaises(AprJaxError):
                    load_generator(checkpoint)
                with self.assertWarnsRegex(UserWarning, "token ids alone: .*tokenizer"):
                    generator = load_generator(checkpoint, text=False)
            self.assertIsNone(generator.tokenizer)

    def test_without_a_tokenizer_ids_work_and_text_does_not(self):
        bare = Generator(self.generator.model)
        (row,) = bare.generate([seeded_prompt(5)], max_new_tokens=4, **PLAIN)
        self.assertEqual((len(row.token_ids), row.text), (4, ""))
        for act in (
            lambda: bare.generate("a"),
            lambda: bare.generate([[1]], stop_strings=["a"]),
            lambda: bare.chat_prompt([{"role": "user", "content": "a"}]),
        ):
            self.assertRaisesRegex(RefusedError, "no tokenizer", act)


class LoopTest(parameterized.TestCase):
    def test_this_xla_knows_the_options_of_a_loop_in_a_graph(self):
        self.assertEqual(jax.jit(lambda x: x + 1, compiler_options=programs._LOOP_IN_A_GRAPH)(1), 2)

    @parameterized.parameters(("gpu", None, True), ("cpu", None, False), ("gpu", "a mesh", False))
    def test_the_decode_loop_of_one_gpu_is_a_graph(self, platform, layout, graph):
        made = object.__new__(programs.Programs)
        made._device, made._layout, made._spread = types.SimpleNamespace(platform=platform), layout, False
        with mock.patch.object(programs.Programs, "_call") as call:
            made.decode(
                mock.MagicMock(), mock.MagicMock(), np.zeros(1, bool), 1, mock.MagicMock(), (), mock.MagicMock()
            )
        self.assertEqual(call.call_args.kwargs["options"], programs._LOOP_IN_A_GRAPH if graph else {})


class BucketTest(absltest.TestCase):
    def test_there_are_two_for_each_doubling_and_none_wastes_half(self):
        buckets = {bucket(length, 64) for length in range(1, 32769)}
        self.assertLen(buckets, 19)
        for length in range(1, 5000):
            self.assertGreaterEqual(bucket(length, 16), length)
            self.assertLess(bucket(length, 16), max(17, 1.5 * length))
        self.assertEqual([bucket(n, 16) for n in (1, 16, 17, 24, 25, 32, 33)], [16, 16, 24, 24, 32, 32, 48])


class GenerationConfigTest(parameterized.TestCase):
    def read(self, config, **model_config) -> GenerationConfig:
        with open_checkpoint(SAMPLE) as checkpoint:
            files = dict(checkpoint.files)
            if config is None:
                del files["generation_config.json"]
            else:
                files["generation_config.json"] = config.encode()
            object.__setattr__(checkpoint, "files", files)
            return GenerationConfig.of(checkpoint)

    def test_the_checkpoints_settings_are_read_under_huggingfaces_names_and_defaults(self):
        config = self.read(
            '{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "eos_token_id": [282, 280], "num_beams": 1,'
            ' "stop_strings": "END", "max_new_tokens": 2048, "chat_format": "chatml", "min_p": null}'
        )
        expected = GenerationConfig(
            max_new_tokens=2048,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            top_p=0.8,
            eos_token_id=(282, 280),
            stop_strings=("END",),
        )
        self.assertEqual(config, expected)
        self.assertEqual(
            self.read(None), GenerationConfig(eos_token_id=(280,)), "from config.json, as HuggingFace does"
        )

    @parameterized.parameters(
        ('{"num_beams": 4, "no_repeat_ngram_size": 3}', "num_beams = 4, no_repeat_ngram_size = 3"),
        ('{"min_p": 0.1, "do_sample": true}', "min_p = 0.1.*--greedy"),
        ('{"suppress_tokens": [1]}', "suppress_tokens"),
        ('{"do_sample": true, "temperature": "hot"}', "temperature is out of range.*--temperature"),
        ('{"do_sample": true, "temperature": 0.0}', "temperature is out of range.*--temperature"),
        ('{"do_sample": true, "top_k": -1}', "top_k is out of range.*--top-k"),
        ('{"do_sample": true, "top_p": -0.1}', "top_p is out of range.*--top-p"),
        ('{"do_sample": true, "top_k": 2147483648}', "top_k is out of range"),
        ('{"max_new_tokens": 2147483648}', "max_new_tokens is out of range.*--max-new-tokens"),
        ('{"max_new_tokens": 0}', "max_new_tokens is out of range"),
        ('{"repetition_penalty": 0}', "repetition_penalty is out of range.*--repetition-penalty"),
        ('{"eos_token_id": [1, "2"]}', "eos_token_id is out of range.*--ignore-generation-config eos_token_id"),
        ('{"do_sample": "yes"}', "do_sample is out of range.*--greedy"),
    )
    def test_what_it_asks_for_and_we_do_not_do_is_refused_by_name(self, text, message):
        with self.assertRaisesRegex(RefusedError, message):
            self.read(text).checked()

    @parameterized.parameters(
        '{"do_sample": false, "temperature": 0.0}',
        '{"do_sample": false, "top_k": -1}',
        '{"do_sample": false, "top_p": 1.7}',
        '{"temperature": -3}',
        '{"temperature": "hot", "do_sample": null}',
        '{"min_p": 0.1, "typical_p": 0.5, "top_h": 0.4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2}',
        '{"do_sample": true, "top_p": 1.5, "min_p": 0.0, "epsilon_cutoff": 1.5, "typical_p": 1.5, "eta_cutoff": 0}',
        '{"penalty_alpha": 0.6, "top_k": 1}',
        '{"num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 2.0, "early_stopping": true}',
        '{"renormalize_logits": true, "no_repeat_ngram_size": -1, "min_length": -1, "prompt_lookup_num_tokens": 3}',
        '{"max_length": -1, "max_new_tokens": 5}',
        '{"eos_token_id": -1}',
        '{"do_sample": 1, "eos_token_id": null, "min_new_tokens": 4}',
    )
    def test_field_values_that_nothing_uses_stop_nothing(self, text):
        """FIELD Configurations: a generation_config.json with odd values that nothing uses -> they stop nothing"""
        self.read(text).checked()

    @parameterized.parameters(
        ('{"do_sample": true, "temperature": 0.0}', {"temperature": 0.7}),
        ('{"do_sample": true, "temperature": 0.0}', {"do_sample": False}),
        ('{"do_sample": true, "top_k": -1}', {"top_k": 20}),
        ('{"do_sample": true, "top_k": -1, "min_p": 0.1}', {"temperature": 0}),
        ('{"max_new_tokens": -5}', {"max_new_tokens": 5}),
        ('{"max_length": 0}', {"max_new_tokens": 5}),
        ('{"repetition_penalty": -1}', {"repetition_penalty": 1.0}),
        ('{"num_beams": 4}', {"num_beams": 1}),
        ('{"eos_token_id": "end"}', {"eos_token_id": [5]}),
    )
    def test_field_what_the_caller_replaces_is_not_judged(self, text, changes):
        """FIELD Configurations: a generation_config.json whose bad value an option replaces -> the option's value"""
        config = self.read(text)
        self.assertRaises(RefusedError, config.checked)
        config.but(**changes).checked()
        config.without(changes.keys() | config.others.keys() | {"top_k", "temperature", "max_length"}).checked()

    def test_a_setting_can_be_left_out_by_name(self):
        config = self.read('{"num_beams": 4, "do_sample": true, "top_k": -1, "min_p": 0.1}')
        with self.assertRaisesRegex(RefusedError, "--ignore-generation-config"):
            config.without(["top_k"]).checked()
        expected = GenerationConfig(do_sample=True)
        self.assertEqual(config.without(["num_beams", "top_k", "min_p"]).checked(), expected)
        with self.assertRaisesRegex(UsageError, "no such setting"):
            config.without(["num_bees"])

    def test_temperature_zero_is_greedy_and_none_changes_nothing(self):
        config = GenerationConfig(do_sample=True, temperature=0.5)
        self.assertEqual(config.but(temperature=0, do_sample=True), GenerationConfig())
        self.assertIs(config.but(top_k=None).do_sample, True)


if __name__ == "__main__":
    absltest.main()
