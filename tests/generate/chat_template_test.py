"""Chat templates: which one, what it sees, what it makes of Qwen's own, what it does not ask for."""

import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
import warnings
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.generate import chat_template
from apr_jax.generate.tokenizer import Tokenizer
from tests import paths

BASE = paths.checkpoint("gqa_tied_bf16")
TEMPLATES = paths.DATA / "chat_templates"
USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
# The committed templates, by the digests that upstream recorded.
RECORDED = {
    "cd8e9439f057": "qwen2_5",
    "d5495a1e5db0": "qwen2_5_gguf",
    "5da44855ab7e": "qwen3_0_6b",
    "8428c815ac94": "qwen3_8b",
    "40c21f34cf67": "qwen3_instruct_2507",
    "e60df41481b6": "qwen3_5_think",
    "57f1fd00f001": "qwen3_gguf",
    "7f0e529032c2": "qwen3_5_nothink",
    "87710339d25b": "qwen3_coder",
}
THINKING = {"on": {"enable_thinking": True}, "off": {"enable_thinking": False}, "unset": {}}


def tokenizer_with(**files: str | None) -> Tokenizer:
    """The tokenizer of a committed checkpoint with other side files: `__` stands for a dot, `___` for a slash."""
    with open_checkpoint(BASE) as checkpoint:
        given = dict(checkpoint.files)
        for name, text in files.items():
            name = name.replace("___", "/").replace("__", ".")
            given.pop(name, None)
            if text is not None:
                given[name] = text.encode()
        with mock.patch.object(checkpoint, "files", given):
            return Tokenizer.of(checkpoint)


def without_template() -> str:
    config = json.loads((BASE / "tokenizer_config.json").read_text())
    return json.dumps({key: value for key, value in config.items() if key != "chat_template"})


class RecordedRenderingsTest(parameterized.TestCase):
    @parameterized.product(sha=tuple(RECORDED), thinking=tuple(THINKING))
    def test_field_qwens_templates_render_as_upstream_recorded(self, sha, thinking):
        """FIELD Text: Qwen's templates with thinking on, off and unset -> aprender's recorded renderings"""
        content = (TEMPLATES / f"{RECORDED[sha]}.jinja").read_bytes()
        self.assertStartsWith(hashlib.sha256(content).hexdigest(), sha)
        template = content.decode()
        reference = json.loads((TEMPLATES / "renderings.json").read_text())
        self.assertLen(reference["message_sets"], 3)
        self.assertEqual({key.partition("/")[0] for key in reference["sha256"]}, set(RECORDED))
        for name, messages in reference["message_sets"].items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = chat_template.render(template, messages, True, {}, arguments=THINKING[thinking]).text
            recorded = reference["sha256"][f"{sha}/{name}/{thinking}"]
            self.assertEqual(hashlib.sha256(text.encode()).hexdigest(), recorded, text)


class ChoiceTest(parameterized.TestCase):
    SEVERAL = (("default", "D"), ("tool_use", "T"), ("rag", "{{ messages[0].content }}R"))

    def listed(self, *names: str) -> str:
        entries = [{"name": name, "template": text} for name, text in self.SEVERAL if name in names]
        return json.dumps({**json.loads(without_template()), "chat_template": entries})

    def test_field_one_of_several_is_chosen_by_name_and_by_rule(self):
        """FIELD Text: a list of named templates -> default, tool_use where there are tools, any by name"""
        tokenizer = tokenizer_with(tokenizer_config__json=self.listed("default", "tool_use", "rag"))
        self.assertEqual(tokenizer.apply_chat_template(USER), "D")
        self.assertEqual(tokenizer.apply_chat_template(USER, chat_template="rag"), "HiR")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.assertEqual(tokenizer.apply_chat_template(USER, tools=TOOLS), "T")
            self.assertEqual(tokenizer.apply_chat_template(USER, tools=TOOLS, chat_template="default"), "D")
        self.assertEqual(tokenizer.apply_chat_template(USER, chat_template="own {{ messages|length }}"), "own 1")

    def test_field_several_without_a_default_are_listed(self):
        """FIELD Text: named templates and none is the default -> their names and the option that chooses"""
        tokenizer = tokenizer_with(tokenizer_config__json=self.listed("tool_use", "rag"))
        with self.assertRaisesRegex(RefusedError, r"none is the default.*rag, tool_use.*--chat-template NAME"):
            tokenizer.apply_chat_template(USER)

    @parameterized.parameters(
        ({"chat_template__jinja": "J", "additional_chat_templates___rag__jinja": "A"}, None, "J"),
        ({"chat_template__jinja": "J", "additional_chat_templates___rag__jinja": "A"}, "rag", "A"),
        ({"chat_template__jinja": "J", "chat_template__json": '{"chat_template": "L"}'}, None, "J"),
        ({"chat_template__json": '{"chat_template": "L"}', "tokenizer_config__json": "plain"}, None, "L"),
        ({"chat_template__json": '{"chat_template": "L"}', "tokenizer_config__json": "S"}, None, "S"),
        ({"chat_template__json": '{"chat_template": [{"name": "default", "template": "L"}]}',
          "tokenizer_config__json": "plain"}, None, "L"),
    )  # fmt: skip
    def test_field_templates_come_from_every_file_that_may_hold_them(self, files, wanted, expected):
        """FIELD Text: chat_template.jinja, additional_chat_templates/, chat_template.json -> found, files first"""
        config = files.get("tokenizer_config__json")
        if config is not None:
            text = without_template()
            files |= {"tokenizer_config__json": text if config == "plain" else text[:-1] + ', "chat_template": "S"}'}
        self.assertEqual(tokenizer_with(**files).apply_chat_template(USER, chat_template=wanted), expected)

    def test_without_any_the_options_are_named(self):
        with self.assertRaisesRegex(RefusedError, "no chat template.*--chat-template FILE"):
            tokenizer_with(tokenizer_config__json=without_template()).apply_chat_template(USER)

    def test_a_folder_of_templates_goes_along_into_an_apr_and_back(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        shutil.copytree(BASE, folder / "hf")
        (folder / "hf" / "chat_template.jinja").write_text("J")
        (folder / "hf" / "additional_chat_templates").mkdir()
        (folder / "hf" / "additional_chat_templates" / "rag.jinja").write_text("A {{ messages[0].content }}")
        (folder / "hf" / "additional_chat_templates" / "notes.txt").write_text("mine")
        with open_checkpoint(folder / "hf") as checkpoint:
            self.assertEqual(checkpoint.left_behind, ("additional_chat_templates/notes.txt",))
        convert(folder / "hf", folder / "m.apr", to="apr")
        with open_checkpoint(folder / "m.apr") as checkpoint:
            self.assertEqual(Tokenizer.of(checkpoint).apply_chat_template(USER, chat_template="rag"), "A Hi")
        convert(folder / "m.apr", folder / "again", to="safetensors")
        again = sorted(str(path.relative_to(folder / "again")) for path in (folder / "again").rglob("*.*"))
        there = sorted(str(path.relative_to(folder / "hf")) for path in (folder / "hf").rglob("*.*"))
        self.assertEqual(again, [name for name in there if not name.endswith("notes.txt")])
        convert(folder / "m.apr", folder / "again", to="safetensors", force=True)

    def test_a_folder_of_templates_that_is_a_link_elsewhere_is_refused(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        shutil.copytree(BASE, folder / "hf")
        (folder / "out").mkdir()
        (folder / "out" / "rag.jinja").write_text("secret")
        os.symlink(folder / "out", folder / "hf" / "additional_chat_templates")
        with open_checkpoint(folder / "hf") as checkpoint, self.assertRaisesRegex(RefusedError, "leads out"):
            Tokenizer.of(checkpoint)


class ArgumentsTest(parameterized.TestCase):
    def said(self, template: str, **settings: object) -> tuple[str, list[str]]:
        tokenizer = tokenizer_with(chat_template__jinja=template)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            text = tokenizer.apply_chat_template(USER, **settings)
        return text, [str(warning.message) for warning in said]

    @parameterized.parameters(
        ("{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}", {"enable_thinking": False}, "False"),
        ("{{ tools | tojson }}", {"tools": TOOLS}, json.dumps(TOOLS)),
        ("{% macro m() %}{{ documents[0].text }}{% endmacro %}{{ m() }}", {"documents": [{"text": "x"}]}, "x"),
        ("{{ eos_token }}", {"eos_token": "E"}, "E"),
        ("{{ a.b }}", {"a": {"b": 2}}, "2"),
        ("{% for t in tools or [] %}{% endfor %}{{ tools is none }}", {}, "True"),
    )
    def test_field_what_a_template_asks_for_it_gets(self, template, settings, expected):
        """FIELD Text: tools, enable_thinking, documents, any variable -> rendered as the template asks, nothing said"""
        self.assertEqual(self.said(template, **settings), (expected, []))

    @parameterized.parameters(
        ("x", {"enable_thinking": False}, "does not ask for enable_thinking"),
        ("{{ messages[0].content }}", {"tools": TOOLS}, "does not ask for tools"),
        ("{% set thinking = 1 %}{{ thinking }}", {"thinking": 2}, "does not ask for thinking"),
        ("{# budget #}", {"budget": 2}, "does not ask for budget"),
    )
    def test_field_what_it_does_not_ask_for_is_said(self, template, settings, message):
        """FIELD Text: an argument that the template does not know -> a warning that it changes nothing"""
        (said,) = self.said(template, **settings)[1]
        self.assertIn(message, said)

    def test_none_in_a_message_is_left_out_and_thoughts_have_all_their_names(self):
        tokenizer = tokenizer_with(chat_template__jinja="{{ messages[-1] | tojson }}")
        said = [{"role": "assistant", "content": "a", "tool_calls": None, "reasoning": "r"}]
        self.assertEqual(
            json.loads(tokenizer.apply_chat_template(said)),
            {"role": "assistant", "content": "a", "reasoning": "r", "thinking": "r", "reasoning_content": "r"},
        )

    @parameterized.parameters(
        ({"tools": ["f"]}, "tools are not JSON schemas"),
        ({"tools": [{"f": {1}}]}, "tools are not plain JSON"),
        ({"x": {1, 2}}, "not plain JSON"),
    )
    def test_what_is_no_json_is_refused(self, settings, message):
        with self.assertRaisesRegex(UsageError, message):
            tokenizer_with().apply_chat_template(USER, **settings)

    @parameterized.parameters(
        "{% set n = namespace(_x=1) %}", "{{ namespace(**{'__class__': 1}) }}", "{{ dict.__class__.__mro__ }}"
    )
    def test_names_that_lead_out_of_the_sandbox_are_refused(self, template):
        with self.assertRaisesRegex(RefusedError, "unsafe"):
            tokenizer_with(chat_template__jinja=template).apply_chat_template(USER)

    def test_dict_works_as_far_as_templates_need_it(self):
        template = "{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab', 2)['b'] }}"
        self.assertEqual(tokenizer_with(chat_template__jinja=template).apply_chat_template(USER), "12")


LOOP = "{% for i in range(99999) %}"
HOSTILE = {
    "break without a loop": "{% break %}",
    "continue without a loop": "{% continue %}",
    "21 nested loops": "{% for i in [1] %}" * 21 + "{% endfor %}" * 21,
    "120 nested conditions": "{% if 1 %}" * 120 + "{% endif %}" * 120,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "cycler of nothing": "{{ cycler() }}",
    "cut to one": "{{ 'x' | truncate(1) }}",
    "half a character": "{{ '\\ud800' }}",
    "nested loops": LOOP * 3 + "{% endfor %}" * 3,
    "macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "a list": "{{ [0] * 10**10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "filler": "{{ lipsum(n=99999) }}",
    "indentation": "{{ messages | tojson(indent=10**9) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "lines": "{{ ('a ' * 10000000) | wordwrap(1) }}",
    "dates": "{{ strftime_now('%c' * 10000000) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
}


class HostileTest(parameterized.TestCase):
    @parameterized.named_parameters((name.replace(" ", "_"), name) for name in HOSTILE)
    def test_a_template_that_fails_or_does_not_end_is_refused_within_bounds(self, name):
        chat_template.render("warm", USER, True, {})
        begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        with self.assertRaisesRegex(RefusedError, "chat template .*--chat-template FILE") as caught:
            chat_template.render(HOSTILE[name], USER, True, {}, "model.apr")
        self.assertEqual((caught.exception.code, caught.exception.file), ("chat-template-broken", "model.apr"))
        self.assertLen(str(caught.exception).splitlines(), 1)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.assertLess(children.ru_utime + children.ru_stime - spent.ru_utime - spent.ru_stime, 2)
        self.assertLess(time.process_time() - begun, 0.5)
        self.assertLess(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 50 << 10)
        self.assertEqual(
            chat_template.render("{{ messages[0].content }}", USER, True, {}).text, "Hi", "the next one works"
        )

    def test_the_memory_that_templates_take_is_bounded(self):
        program = (
            f"import resource, sys; sys.path = {sys.path!r}\n"
            "from tests.generate import chat_template_test as hostile\n"
            "for name in ('repetition', 'doubling', 'indentation', 'lines', 'dates', '120 nested conditions'):\n"
            "    try: hostile.chat_template.render(hostile.HOSTILE[name], hostile.USER, True, {})\n"
            "    except hostile.RefusedError: pass\n"
            "hostile.chat_template._templates().close()\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        self.assertBetween(int(done.stdout), 50 << 10, 200 << 10)

    @parameterized.parameters(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ('%s' | format)['__class__'].x }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ['{0.__class__.__mro__}'] | map('format', 1) | list }}",
        "{{ (messages | map(attribute='__class__') | list)[0].x }}",
        "{{ self._TemplateReference__context.environment }}",
    )
    def test_the_sandbox_holds(self, template):
        try:
            text = chat_template.render(template, USER, True, {}).text
        except RefusedError:
            return
        self.assertNotRegex(text, "class|module|uid=|function|object at|Environment")


if __name__ == "__main__":
    absltest.main()
