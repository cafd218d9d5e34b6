"""Generated text against live HuggingFace on CPU, and against the genuine `apr run` where $APR_BIN names it."""

import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import RefusedError
from apr_jax.generate import sampling
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.generator import load_generator
from apr_jax.generate.sampling import Method, Numbers
from apr_jax.generate.tokenizer import StopStrings, Tokenizer
from apr_jax.trace import hf_reference
from tests import paths

APR = os.environ.get("APR_BIN")
PROMPTS = ("What is 2+2?", "A", "The quick brown fox jumps over the lazy dog, and then it does so again. Über 😀")
NEW_TOKENS = 100

if hf_reference.available():
    import torch
    import transformers
    from transformers.generation import stopping_criteria


def left_padded(prompts):
    """Returns ids and mask as HuggingFace's `generate` takes unequal prompts."""
    length = max(map(len, prompts))
    ids, mask = (torch.zeros((len(prompts), length), dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class GreedyAgainstHuggingFaceTest(parameterized.TestCase):
    def both(self, name, texts=PROMPTS, **settings):
        """Generates greedily on both sides; returns (their tokens, our Generation) of each prompt."""
        folder = paths.checkpoint(name)
        generator = load_generator(folder)
        model = hf_reference.load(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        prompts = [tokenizer(prompt)["input_ids"] for prompt in texts]
        ids, mask = left_padded(prompts)
        theirs = dict(settings)
        if "eos_token_id" in theirs:
            model.generation_config.eos_token_id = theirs.pop("eos_token_id") or None
        if "stop_strings" in theirs:
            theirs["tokenizer"] = tokenizer
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, **theirs
            )[:, ids.shape[1] :].tolist()
        ours = generator.generate(
            texts, do_sample=False, max_new_tokens=NEW_TOKENS, **{"eos_token_id": None, **settings}
        )
        self.assertEqual([list(row.prompt_ids) for row in ours], prompts)
        for row, tokens in zip(ours, made, strict=True):
            self.assertEqual(
                row.text, tokenizer.decode(tokens[: len(row.token_ids)], skip_special_tokens=True), "same text"
            )
        return made, ours

    @parameterized.parameters(paths.NAMES)
    def test_100_greedy_tokens_of_unequal_prompts_are_huggingfaces(self, name):
        made, ours = self.both(name, repetition_penalty=1.0, eos_token_id=[])
        for theirs, row in zip(made, ours, strict=True):
            self.assertLen(row.token_ids, NEW_TOKENS)
            self.assertEqual(list(row.token_ids), theirs)

    @parameterized.parameters(paths.NAMES)
    def test_greedy_tokens_with_the_checkpoints_penalty_and_end_tokens_are_huggingfaces(self, name):
        config = json.loads((paths.checkpoint(name) / "generation_config.json").read_text())
        self.assertGreater(config["repetition_penalty"], 1)
        made, ours = self.both(name)
        for theirs, row in zip(made, ours, strict=True):
            self.assertEqual(list(row.token_ids), theirs[: len(row.token_ids)])
            self.assertEqual(set(theirs[len(row.token_ids) :]) - {0}, set(), "nothing but padding behind the end")
            ended = row.token_ids[-1] in config["eos_token_id"]
            self.assertEqual(row.finish_reason, "stop" if ended else "length")

    def test_stop_strings_end_the_text_at_huggingfaces_token(self):
        settings = {"texts": PROMPTS[:1], "repetition_penalty": 1.0, "eos_token_id": []}
        _, (whole,) = self.both("gqa_tied_bf16", **settings)
        stop = next(whole.text[at : at + 3] for at in range(20, 90) if whole.text[at : at + 3].isascii())
        (theirs,), (ours,) = self.both("gqa_tied_bf16", **settings, stop_strings=[stop, "never there"])
        self.assertEqual((list(ours.token_ids), ours.finish_reason), (theirs, "stop"))
        self.assertLess(len(theirs), NEW_TOKENS)
        self.assertIn(stop, ours.text)


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class ProcessorsAgainstHuggingFaceTest(parameterized.TestCase):
    """Our warped distribution beside that of HuggingFace's processors, in HuggingFace's own order."""

    def theirs(self, scores, seen_ids, **settings):
        config = transformers.GenerationConfig(do_sample=True, **settings)
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
            )
        )
        processors = model._get_logits_processor(config, input_ids_seq_length=len(seen_ids[0]))
        warped = processors(torch.tensor(seen_ids), torch.tensor(scores))
        return torch.softmax(warped, dim=-1).numpy()

    def ours(self, scores, seen_ids, **settings):
        config = GenerationConfig(do_sample=True, **settings)
        method = Method.of(config, scores.shape[1])
        numbers = Numbers.of(config, method)
        seen = np.zeros(scores.shape, bool)
        np.put_along_axis(seen, np.asarray(seen_ids), True, axis=1)

        @jax.jit
        def warp(scores, seen, numbers):
            if method.penalised:
                scores = sampling.penalise(scores, seen, numbers.repetition_penalty)
            return sampling.warp(scores, numbers, method.candidates)

        warped, tokens = warp(jnp.asarray(scores), seen, numbers)
        whole = np.full(scores.shape, -np.inf, np.float32)
        if tokens is None:
            whole = np.asarray(warped)
        else:
            np.put_along_axis(whole, np.asarray(tokens), np.asarray(warped), axis=1)
        return np.asarray(jax.nn.softmax(whole, axis=-1))

    @parameterized.parameters(
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.7, "top_k": 0, "top_p": 0.9},
        {"temperature": 0.05, "top_k": 0, "top_p": 0.5},
        {"top_k": 1},
        {"top_k": 50, "top_p": 0.95},
        {"top_k": 101, "top_p": 0.3},
        {"top_k": 2000, "top_p": 0.99},
        {"top_k": 10_000},
        {"top_k": 0, "top_p": 0.0},
        {"top_k": 0, "repetition_penalty": 0.8},
        {"top_k": 7, "repetition_penalty": 3.0},
    )
    def test_the_distribution_that_tokens_are_drawn_from_is_huggingfaces(self, **settings):
        random = np.random.default_rng(1)
        scores = (3 * random.standard_normal((6, 3000))).astype(np.float32)
        # bfloat16 logits tie, at the k-th too.
        scores[3:] = scores[3:].astype(jnp.bfloat16).astype(np.float32)
        seen = random.integers(0, 3000, (6, 200))
        # Where equals straddle top-p's cut, HuggingFace's unstable sort decides which of them goes.
        rows = slice(0, 3) if settings.get("top_p", 1.0) < 1 else slice(0, 6)
        theirs, ours = (side(scores[rows], seen[rows].tolist(), **settings) for side in (self.theirs, self.ours))
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=1e-9)

    def test_where_equals_straddle_the_cut_of_top_p_as_many_stay_as_huggingface_keeps(self):
        scores = np.random.default_rng(2).integers(0, 4, (8, 300)).astype(np.float32)
        for top_p in (0.1, 0.5, 0.9):
            theirs, ours = (side(scores, [[0]] * 8, top_k=0, top_p=top_p) for side in (self.theirs, self.ours))
            np.testing.assert_array_equal((ours > 0).sum(axis=1), (theirs > 0).sum(axis=1))
            np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=3e-6, atol=1e-9)


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class SettingsAgainstHuggingFaceTest(parameterized.TestCase):
    """Which generation settings go through: those that live HuggingFace generates with, and ours."""

    CONFIGS = (
        {"do_sample": False, "temperature": 0.0},
        {"do_sample": False, "temperature": -1, "top_k": -1, "top_p": 1.7},
        {"temperature": "hot"},
        {"top_p": -1, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.2, "top_h": 0.4},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": -0.5},
        {"do_sample": True, "top_k": -1},
        {"do_sample": True, "top_k": 1, "top_p": 1.5, "min_p": 0.0, "epsilon_cutoff": 1.5, "typical_p": 1.5},
        {"do_sample": True, "top_p": -0.1},
        {"do_sample": True, "top_k": 1, "top_p": 0.0},
        {"do_sample": 1, "top_k": 1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"penalty_alpha": 0.6, "top_k": 1},
        {"num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 2.0, "early_stopping": True},
        {"renormalize_logits": True, "no_repeat_ngram_size": -1, "min_length": -1, "prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 3},
        {"max_new_tokens": 0},
        {"max_length": -1, "max_new_tokens": 3},
        {"eos_token_id": -1},
        {"eos_token_id": None, "min_new_tokens": 2},
    )

    def test_field_settings_go_through_where_transformers_generates_and_greedy_is_greedy(self):
        """FIELD Configurations: 21 generation_config.json with odd values -> taken or refused as by transformers"""
        generator, model = (load(paths.checkpoint("gqa_tied_bf16")) for load in (load_generator, hf_reference.load))
        ids = torch.tensor([[5, 6, 7]])
        (plain,) = generator.generate([[5, 6, 7]], do_sample=False, repetition_penalty=1.0, max_new_tokens=3)
        folder = pathlib.Path(self.create_tempdir().full_path)
        taken = 0
        for config in self.CONFIGS:
            with self.subTest(config):
                (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, **config}))
                try:
                    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
                    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0)[0, 3:].tolist()
                except ValueError:
                    theirs = None
                with open_checkpoint(paths.checkpoint("gqa_tied_bf16")) as checkpoint:
                    content = (folder / "generation_config.json").read_bytes()
                    object.__setattr__(checkpoint, "files", {**checkpoint.files, "generation_config.json": content})
                    ours = GenerationConfig.of(checkpoint)
                if theirs is None:
                    self.assertRaisesRegex(RefusedError, "--", ours.checked)
                    continue
                ours.checked()
                # A draw from one token is no draw.
                self.assertEqual(theirs, list(plain.token_ids))
                taken += 1
        self.assertBetween(taken, 10, len(self.CONFIGS) - 5)


@absltest.skipUnless(hf_reference.available(), "torch and transformers are not installed (extra: reference)")
class TextAgainstHuggingFaceTest(parameterized.TestCase):
    def tokenizers(self, name="gqa_tied_bf16"):
        folder = paths.checkpoint(name)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with open_checkpoint(folder) as checkpoint:
            return theirs, Tokenizer.of(checkpoint)

    def test_stop_strings_match_after_the_same_token_as_stopstringcriteria(self):
        theirs, ours = self.tokenizers()
        random = np.random.default_rng(3)
        alphabet = [*range(64, 90), 220, 11, 13, 256, 257, 258, 266, 269, 281, 282]
        found = 0
        for _ in range(150):
            tokens = random.choice(alphabet, 40).tolist()
            if random.random() < 0.3:
                # "é" and "😀" are two and four tokens; a stop string may end within.
                tokens[20:20] = ours.encode("é😀é")
            text = theirs.decode(tokens)
            at = int(random.integers(0, len(text) - 4))
            strings = [text[at : at + int(random.integers(1, 5))], "<|im_end|>", "zzzz"][: int(random.integers(1, 4))]
            criteria = stopping_criteria.StopStringCriteria(theirs, strings)
            prompt = int(random.integers(1, 10))
            matched = [
                bool(criteria(torch.tensor([tokens[:count]]), None)[0]) for count in range(prompt + 1, len(tokens) + 1)
            ]
            expected = matched.index(True) + 1 if any(matched) else None
            self.assertEqual(StopStrings(ours, strings, tokens[:prompt]).first_end(tokens[prompt:]), expected, strings)
            one_by_one = StopStrings(ours, strings, tokens[:prompt])
            steps = [one_by_one.first_end([token]) for token in tokens[prompt:][:expected]]
            self.assertEqual(steps.index(1) + 1 if 1 in steps else None, expected)
            found += expected is not None
        self.assertBetween(found, 50, 149)

    @parameterized.parameters(paths.NAMES)
    def test_chats_are_rendered_and_tokenised_as_huggingface_does(self, name):
        theirs, ours = self.tokenizers(name)
        for messages in (
            [{"role": "user", "content": "Hé, what's 2+2? 😀"}],
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " <b>&amp;</b> "}],
            [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
        ):
            for prompt in (True, False):
                text = ours.apply_chat_template(messages, add_generation_prompt=prompt)
                self.assertEqual(
                    text, theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
                )
                ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
                self.assertEqual(ours.encode(text), ids)

    def test_templates_with_what_huggingface_offers_them_are_rendered_alike(self):
        theirs, ours = self.tokenizers()
        messages = [{"role": "user", "content": "<é>", "extra": {"b": [1, 2.5, None], "a": "ü"}}]
        for template in (
            "{{ messages | tojson }}|{{ messages[0].extra | tojson(indent=2) }}",
            "{% for m in messages %}\n  {% if loop.first %}{{ m.role }}{% continue %}{% endif %}{% endfor %}",
            "{{ pad_token }}{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%Y') }}",
            "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = 5 %}{% endfor %}{{ n.x }}{{ eos_token }}",
            "{% if tools %}tools{% endif %}{% if documents is none %}none{% endif %}{{ add_generation_prompt }}",
        ):
            ours.chat_template = template
            self.assertEqual(
                ours.apply_chat_template(messages),
                theirs.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=True, tokenize=False
                ),
                template,
            )


@absltest.skipUnless(APR, "APR_BIN does not name the genuine apr")
class AgainstAprRunTest(parameterized.TestCase):
    @parameterized.parameters(paths.NAMES)
    def test_apr_run_generates_our_greedy_tokens_from_our_file(self, name):
        path = pathlib.Path(self.create_tempdir().full_path) / "model.apr"
        convert(paths.checkpoint(name), path, to="apr")
        settings = ["--temperature", "0", "--repeat-penalty", "1.0", "--offline", "--no-gpu", "--json"]
        command = [APR, "run", path, "-p", PROMPTS[0], "-n", str(NEW_TOKENS), *settings]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        theirs = json.loads(run.stdout)
        generator = load_generator(path)
        (ours,) = generator.generate(PROMPTS[0], do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS)
        self.assertEqual(theirs["prompt_tokens"], len(ours.prompt_ids))
        # `apr` does not list the token that ends a text.
        tokens = ours.token_ids[:-1] if ours.finish_reason == "stop" else ours.token_ids
        self.assertEqual(list(tokens), theirs["tokens"])
        self.assertGreater(len(tokens), 10)
        # Nor does it turn GPT-2's letters for bytes back into bytes, but for space and newline: its text is ours where
        # that is ASCII. It leaves special tokens out as well.
        tokenizer = tokenizers.Tokenizer.from_file(str(paths.checkpoint(name) / "tokenizer.json"))
        shown = [token for token in tokens if token not in tokenizer.get_added_tokens_decoder()]
        text = "".join(tokenizer.id_to_token(token) or "<unk>" for token in shown)
        text = text.replace("Ġ", " ").replace("Ċ", "\n")
        self.assertEqual(theirs["text"].strip(), text.strip())


if __name__ == "__main__":
    absltest.main()
