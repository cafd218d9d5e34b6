"""The command as a user runs it: what it prints, streams and returns, and how it ends when it is interrupted."""

import json
import os
import pathlib
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.generate.tokenizer import Tokenizer
from tests import paths, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")
GREEDY = ("--greedy", "--repetition-penalty", "1")


class GenerateCommandTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Text has to appear at once by itself, not because the environment says so.
        left_out = ("JAX_COMPILATION_CACHE_DIR", "PYTHONUNBUFFERED")
        cls.environment = {name: value for name, value in os.environ.items() if name not in left_out}

    def command(self, *args) -> list[str]:
        return [str(part) for part in (sys.executable, paths.ROOT / "tools" / "generate.py", *args)]

    def ran(self, *args, code=0) -> subprocess.CompletedProcess:
        return tool.ran(self, "generate", *args, code=code)

    def process(self, cache: pathlib.Path, *args) -> subprocess.CompletedProcess:
        """Runs the command in a process of its own, with a cache folder of its own."""
        environment = {**self.environment, "XDG_CACHE_HOME": str(cache)}
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, check=True, env=environment, timeout=300
        )

    def file(self, content: str) -> pathlib.Path:
        return pathlib.Path(self.create_tempfile(content=content).full_path)

    def test_text_json_and_a_second_run_from_the_compilation_cache_agree(self):
        cache = pathlib.Path(self.create_tempdir().full_path)
        done = self.process(cache, SAMPLE, "--prompt", "What is 2+2?", "--max-new-tokens", 20, *GREEDY)
        self.assertRegex(done.stderr, r"prompt: 10 tokens in .* new: 20 tokens, .* tokens/s after the first")
        kept = set((cache / "apr_jax" / "compiled").glob("*-cache"))
        self.assertNotEmpty(kept, "programs are kept in the user's cache folder")
        again = self.process(cache, SAMPLE, "--prompt", "What is 2+2?", "--max-new-tokens", 20, *GREEDY, "--json")
        self.assertEqual(set((cache / "apr_jax" / "compiled").glob("*-cache")), kept)
        result = json.loads(again.stdout)
        (row,) = result["generations"]
        self.assertEqual(row["text"].rstrip("\n") + "\n", done.stdout)
        self.assertEqual((row["prompt_tokens"], len(row["token_ids"]), row["finish_reason"]), (10, 20, "length"))
        self.assertEqual((result["interrupted"], result["settings"]["do_sample"]), (False, False))
        self.assertGreater(result["timing"]["decode_tokens_per_second"], 0)

    def test_a_batch_of_texts_and_conversations_is_what_its_parts_are_alone(self):
        prompts = self.file(json.dumps(["Hello", [{"role": "user", "content": "What is 2+2?"}]]))
        args = ("--max-new-tokens", 20, *GREEDY)
        rows = json.loads(self.ran(SAMPLE, "--prompts", prompts, *args, "--json").stdout)["generations"]
        chat = json.loads(self.ran(SAMPLE, "--chat", "What is 2+2?", *args, "--json").stdout)["generations"]
        self.assertEqual(rows[1], {**chat[0], "index": 1})
        shown = self.ran(SAMPLE, "--prompts", prompts, *args).stdout
        for row in rows:
            self.assertIn(f"[{row['index']}] {row['text']}", shown)
        ids = self.file(json.dumps([[39, 68, 75, 75, 78]]))
        alone = json.loads(self.ran(SAMPLE, "--input-ids", ids, *args, "--json").stdout)["generations"]
        self.assertEqual(alone[0]["token_ids"], rows[0]["token_ids"])

    def test_the_checkpoints_settings_rule_until_options_say_otherwise(self):
        args = (SAMPLE, "--prompt", "A", "--max-new-tokens", 12, "--json")
        drawn, other, high = (
            json.loads(self.ran(*args, *more).stdout)
            for more in ((), ("--seed", 7), ("--temperature", 3, "--stop", "e"))
        )
        self.assertEqual([drawn["settings"][k] for k in ("do_sample", "temperature", "top_k")], [True, 0.7, 20])
        self.assertNotEqual(drawn["generations"], other["generations"])
        self.assertEqual((high["settings"]["temperature"], high["settings"]["stop_strings"]), (3, ["e"]))

    def test_mistakes_are_one_line_with_their_exit_code(self):
        bare = pathlib.Path(self.create_tempdir().full_path)
        for name in ("config.json", "model.safetensors"):
            (bare / name).write_bytes((SAMPLE / name).read_bytes())
        for args, code, message in (
            ((SAMPLE,), 2, "required"),
            ((SAMPLE, "--prompt", "a", "--chat", "b"), 2, "not allowed"),
            ((SAMPLE, "--prompt", "a", "--system", "b"), 2, "belongs to --chat"),
            ((SAMPLE, "--prompt", "a", "--greedy", "--top-k", 3), 2, "does not sample"),
            ((SAMPLE, "--prompt", "a", "--template-arg", "x=1"), 2, "--template-arg belongs to --chat"),
            ((SAMPLE, "--chat", "a", "--template-arg", "x"), 2, "not a variable of a chat template"),
            ((SAMPLE, "--chat", "a", "--tools", self.file("{}")), 2, "not a list of tools"),
            ((SAMPLE, "--chat", "a", "--chat-template", "no"), 2, "neither a chat template of the checkpoint nor"),
            ((SAMPLE, "--chat", "a", "--ignore-generation-config", "x"), 2, "no such setting"),
            ((SAMPLE, "--prompt", "a", "--top-p", -1), 2, "top_p is out of range"),
            ((SAMPLE, "--prompt", ""), 2, "prompt is empty"),
            ((SAMPLE, "--prompts", self.file('["a", 1]')), 2, "not a list of texts"),
            ((SAMPLE, "--input-ids", self.file("[[300]]")), 2, "beyond the vocabulary"),
            ((SAMPLE, "--prompts", bare / "none"), 3, "no such file"),
            ((bare / "none", "--prompt", "a"), 3, "no such"),
            ((SAMPLE, "--prompts", self.file("[")), 4, "JSON"),
            ((bare, "--prompt", "a"), 5, "no tokenizer"),
        ):
            with self.subTest(message):
                lines = self.ran(*args, code=code).stderr.strip().splitlines()
                self.assertIn(message, lines[-1])
                self.assertIn("error", lines[-1])

    def test_a_chat_with_tools_and_switches_goes_through_the_template_that_is_asked_for(self):
        asks = pathlib.Path(self.file("{{ messages[0].content }}{{ tools[0].name }}{{ enable_thinking }}{{ style }}"))
        tools = self.file('[{"name": "weather"}]')
        switches = ("--template-arg", "enable_thinking=false", "--template-arg", "style=terse", "--tools", tools)
        few = ("--json", "--max-new-tokens", 3, *GREEDY)
        done = self.ran(SAMPLE, "--chat", "Hi", *switches, "--chat-template", asks, *few)
        self.assertNotIn("warning", done.stderr)
        (row,) = json.loads(done.stdout)["generations"]
        with open_checkpoint(SAMPLE) as checkpoint:
            tokenizer = Tokenizer.of(checkpoint)
        self.assertEqual(row["prompt_tokens"], len(tokenizer.encode("HiweatherFalseterse")))
        done = self.ran(SAMPLE, "--chat", "Hi", *switches, *few)
        self.assertEqual(json.loads(done.stdout)["generations"][0]["prompt_tokens"], 53)
        for name in ("enable_thinking", "style", "tools"):
            self.assertIn(f"warning: the chat template does not ask for {name}", done.stderr)

    def test_ids_work_without_a_tokenizer(self):
        bare = pathlib.Path(self.create_tempdir().full_path)
        for name in ("config.json", "model.safetensors"):
            (bare / name).write_bytes((SAMPLE / name).read_bytes())
        ids = self.file(json.dumps([[39, 68, 75, 75, 78]]))
        done = self.ran(bare, "--input-ids", ids, "--greedy", "--max-new-tokens", 5)
        self.assertLen(done.stdout.split(), 5)

    def interrupted(self, process: subprocess.Popen, number: int = signal.SIGINT) -> tuple[str, str]:
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 130, errors)
        self.assertEqual(errors.splitlines(), ["interrupted"])
        return output, errors

    def started(self, *args, patch: str = "") -> subprocess.Popen:
        code = f"""
import os, sys
sys.path.insert(0, sys.argv[1])
from apr_jax.commands import generate
from apr_jax.converters.commands import cli
{patch}
cli.start("apr_jax.commands.generate", ["generate", *sys.argv[2:]])
"""
        command = [sys.executable, "-c", code, paths.ROOT, *args]
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.environment,
        )

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
    @pytest.mark.slow
    def test_an_interrupt_while_decoding_leaves_the_text_so_far(self, number):
        args = (SAMPLE, "--prompt", "What is 2+2?", "--max-new-tokens", 4000, *GREEDY)
        process = self.started(*args)
        begun = process.stdout.read(5)
        output, _ = self.interrupted(process, number)
        text = begun + output.removesuffix("\n")
        self.assertGreaterEqual(len(text), 5)
        whole = self.ran(SAMPLE, "--prompt", "What is 2+2?", "--max-new-tokens", 4000, *GREEDY).stdout
        self.assertLess(len(text), len(whole))
        self.assertTrue(whole.startswith(text), "the beginning of what it would have printed")

    @pytest.mark.slow
    def test_an_interrupt_while_decoding_a_batch_prints_every_row_and_json_says_so(self):
        patch = """
import signal
from apr_jax.generate.generator import _Row
take = _Row.take
def interrupting(self, index, tokens):
    delta = take(self, index, tokens)
    if index == 1 and len(self.result().token_ids) > 3:
        os.kill(os.getpid(), signal.SIGINT)
    return delta
_Row.take = interrupting
"""
        args = (SAMPLE, "--prompt", "What is 2+2?", "--prompt", "A", "--max-new-tokens", 40, *GREEDY)
        for more in ((), ("--json",)):
            process = self.started(*args, *more, patch=patch)
            output, errors = process.communicate(timeout=120)
            self.assertEqual((process.returncode, errors), (130, "interrupted\n"))
            if more:
                result = json.loads(output)
                self.assertTrue(result["interrupted"])
                self.assertGreater(len(result["generations"][1]["token_ids"]), 3)
                self.assertIsNone(result["generations"][1]["finish_reason"])
            else:
                self.assertRegex(output, r"(?s)\[0\] .*\n\[1\] .*\n$")

    @pytest.mark.slow
    def test_an_interrupt_while_loading_prints_nothing(self):
        patch = """
import signal
from apr_jax.converters.checkpoint.tensor import Tensor
for name in ("readinto", "read", "raw"):
    setattr(Tensor, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
"""
        process = self.started(SAMPLE, "--prompt", "A", patch=patch)
        output, errors = process.communicate(timeout=120)
        self.assertEqual((process.returncode, output, errors), (130, "", "interrupted\n"))

    @pytest.mark.slow
    def test_an_interrupt_that_the_compiler_does_not_notice_ends_it_all_the_same(self):
        # A call into C that returns to nobody, like XLA in the midst of a long compilation.
        patch = """
import ctypes, signal, threading
from apr_jax.generate.programs import Programs
call, libc = Programs._call, ctypes.CDLL(None)
def stuck(self, key, *rest, **options):
    if key[0] != "decode":
        return call(self, key, *rest, **options)
    mutex = ctypes.create_string_buffer(128)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
Programs._call = stuck
"""
        args = (SAMPLE, "--input-ids", self.file("[[1, 2, 3]]"), "--json", "--max-new-tokens", 10, *GREEDY)
        process = self.started(*args, patch=patch)
        output, errors = process.communicate(timeout=120)
        self.assertEqual((process.returncode, errors), (130, "interrupted\n"))
        result = json.loads(output)
        self.assertLen(result["generations"][0]["token_ids"], 1, "the first token was there already")


if __name__ == "__main__":
    absltest.main()
