"""Chat templates: Jinja programs that come with a checkpoint, rendered in a sandbox as HuggingFace transformers does.

A template is code by whoever made the checkpoint. It runs in jinja2's immutable sandbox, within a process of its own
whose time and memory are bounded, and sees plain JSON values and the functions that `render_jinja_template` of
transformers gives it, nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apr_jax.converters.checkpoint.file_names import CHAT_TEMPLATES_FOLDER
from apr_jax.converters.errors import AprJaxError, RefusedError, UsageError, printable
from apr_jax.converters.formats import strict_json
from apr_jax.converters.storage.isolation import Isolated
from apr_jax.converters.storage.source import read_whole

Templates = str | Mapping[str, str] | None
"""One template, or several by name, as `tokenizer.chat_template` of transformers."""

_AT_LEAST = (3, 1, 6)
"""Earlier versions of jinja2 have holes in their sandbox (CVE-2025-27516)."""
_FILE, _LEGACY = "chat_template.jinja", "chat_template.json"
_MAX_BYTES = 16 << 20
_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ANOTHER = "--chat-template FILE takes another one"
# Under any of these a message holds what was thought before it; the first is the one that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: All of it.
      generated: Which characters the template marks as the assistant's, from and up to; None if it has no such marks.
    """

    text: str
    generated: list[tuple[int, int]] | None


def of_files(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Templates:
    """Returns the templates of a checkpoint, from where transformers takes them.

    Template files (chat_template.jinja, additional_chat_templates/NAME.jinja) go before tokenizer_config.json's, and
    chat_template.json, which processors of older versions wrote, is taken where there is no other.

    Args:
      files: Side files, name -> content.
      config: The content of tokenizer_config.json.
    """
    named = {_DEFAULT: files[_FILE].decode(errors="replace")} if _FILE in files else {}
    for name in files:
        if name.startswith(CHAT_TEMPLATES_FOLDER):
            named[name.removeprefix(CHAT_TEMPLATES_FOLDER).removesuffix(".jinja")] = files[name].decode(
                errors="replace"
            )
    if named:
        return named[_DEFAULT] if list(named) == [_DEFAULT] else named
    given = config.get("chat_template")
    if given is None and _LEGACY in files:
        legacy = strict_json.loads(files[_LEGACY], what=_LEGACY, max_bytes=_MAX_BYTES, file=_LEGACY)
        given = legacy.get("chat_template") if isinstance(legacy, dict) else None
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, dict):
        return {name: text for name, text in given.items() if isinstance(name, str) and isinstance(text, str)}
    return given if isinstance(given, str) else None


def choose(templates: Templates, wanted: str | None, with_tools: bool, file: str | None = None) -> str:
    """Returns the template for a conversation, by `get_chat_template`'s rule.

    Args:
      templates: The checkpoint's.
      wanted: The name of one of them, or the text of another template; None leaves it to the rule: "tool_use" where
        there are tools and such a template, else "default".
      with_tools: Whether there are tools.
      file: The checkpoint, for error messages.

    Raises:
      RefusedError: There is none, or several without one that is the default.
    """
    named = templates if isinstance(templates, Mapping) else {}
    if wanted is not None:
        return named.get(wanted, wanted)
    if isinstance(templates, str):
        return templates
    if with_tools and _WITH_TOOLS in named:
        return named[_WITH_TOOLS]
    if _DEFAULT in named:
        return named[_DEFAULT]
    if named:
        raise RefusedError(
            "the checkpoint has several chat templates and none is the default",
            code="chat-template-several",
            file=file,
            found=", ".join(sorted(named)),
            hint="--chat-template NAME chooses one",
        )
    raise RefusedError(
        "the checkpoint has no chat template",
        code="chat-template-missing",
        file=file,
        expected=f"{_FILE}, or chat_template in tokenizer_config.json",
        hint="--chat-template FILE gives one, --prompt takes the whole text",
    )


def by_name_or_file(templates: Templates, wanted: str) -> str:
    """Returns the name of one of the checkpoint's templates as it is, else the text of the file of that name.

    Raises:
      UsageError: It is neither.
    """
    names = templates if isinstance(templates, Mapping) else {}
    if wanted in names:
        return wanted
    if wanted == _DEFAULT and isinstance(templates, str):
        return templates
    try:
        return read_whole(wanted, _MAX_BYTES, "a chat template").decode()
    except (AprJaxError, UnicodeDecodeError) as error:
        raise UsageError(
            "neither a chat template of the checkpoint nor a Jinja file",
            code="chat-template",
            found=f"{wanted} ({error.message if isinstance(error, AprJaxError) else 'not UTF-8'})",
            expected=", ".join(sorted(names)) or (_DEFAULT if templates else "a file"),
        ) from None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    file: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Rendered:
    """Renders messages as the text of a prompt.

    Args:
      template: The checkpoint's Jinja template.
      messages: One conversation, {"role": ..., "content": ...} each; plain JSON values. What is None is left out.
      add_generation_prompt: End with the beginning of the assistant's answer.
      special_tokens: Variables of the template: "eos_token" and so on.
      file: The checkpoint, for error messages.
      tools: JSON schemas of functions that the model may call.
      arguments: Further variables, such as enable_thinking. One that the template does not ask for is warned of.

    Raises:
      UsageError: The template refuses the messages (`raise_exception`), they are no JSON values, or jinja2 is missing.
      RefusedError: The template does not work, does not end, or takes too much memory.
    """
    variables = {
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
        **_plain(dict(arguments or {}), "arguments of the chat template"),
        "messages": _conversation(messages),
        "tools": None if tools is None else _tools(tools),
    }
    given = [*(arguments or ()), *(["tools"] if tools is not None else [])]
    try:
        text, generated, unasked = _templates().call("rendered", template, variables, given)
    except AprJaxError as error:
        error.file = file
        if isinstance(error, RefusedError):
            error.code, error.hint = "chat-template-broken", _ANOTHER
        raise
    for name in unasked:
        warnings.warn(f"the chat template does not ask for {name}: it changes nothing", stacklevel=3)
    return Rendered(text, generated)


def without_marks(file: str | None) -> RefusedError:
    """Returns the error for a template that does not say which text is the assistant's."""
    return RefusedError(
        "the chat template does not mark what the assistant says",
        code="chat-template-unmarked",
        file=file,
        expected="{% generation %} ... {% endgeneration %} around it",
        hint="--chat-template FILE takes one that does (in Python: chat_template=TEXT)",
    )


@functools.cache
def _templates() -> Isolated:
    return Isolated(__name__, "the chat template")


def rendered(
    template: str, variables: Mapping[str, Any], given: Sequence[str]
) -> tuple[str, list[tuple[int, int]] | None, list[str]]:
    """Returns what `Rendered` holds, and which of the `given` variables the template does not ask for.

    `render` calls it in a child.

    Raises:
      UsageError: The template refuses the messages, or jinja2 is missing.
      RefusedError: The template does not work.
    """
    _jinja2()
    try:
        asked_for = _variables(template) if given else frozenset()
        text, generated = _marked(template, variables)
        text.encode()
    except _Refusal as refusal:
        raise UsageError(
            f"the chat template refuses the messages: {printable(str(refusal))}",
            code="chat-messages",
            hint="Change the messages as it says, or take another: --chat-template FILE",
        ) from None
    except MemoryError:
        raise
    except RecursionError:
        raise RefusedError(
            "the chat template is nested too deeply, or does not end", code="chat-template-broken", hint=_ANOTHER
        ) from None
    except Exception as error:  # a program can fail in any way, and so can Python's compiler on what jinja2 makes of it
        said = printable(str(error)) or type(error).__name__
        raise RefusedError(
            f"the chat template does not work: {said[:300]}", code="chat-template-broken", hint=_ANOTHER
        ) from None
    return text, generated, [name for name in given if name not in asked_for]


def _plain(value: Any, what: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise UsageError(
            f"{what} are not plain JSON values",
            code="chat-messages",
            hint="Make them of numbers, text, lists and dictionaries",
        ) from None


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages as templates get them: without what is None, with thoughts under every name for them."""
    plain = _plain(list(messages), "messages")
    if not plain or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in plain):
        raise UsageError(
            "messages are not a conversation",
            code="chat-messages",
            expected='a non-empty list of {"role": ..., "content": ...}',
        )
    conversation = []
    for message in plain:
        said = {key: value for key, value in message.items() if value is not None}
        thoughts = next((said[key] for key in _REASONING if key in said), None)
        if thoughts is not None:
            said = {"thinking": thoughts, **said, "reasoning_content": thoughts}
        conversation.append(said)
    return conversation


def _tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    plain = _plain(list(tools), "tools")
    if not all(isinstance(tool, dict) for tool in plain):
        raise UsageError(
            "tools are not JSON schemas",
            code="chat-tools",
            expected='a list of {"type": "function", "function": {"name": ..., "parameters": ...}}',
        )
    return list(plain)


class _Refusal(Exception):
    """What a template raises by `raise_exception(message)`."""


def _jinja2() -> Any:
    try:
        import jinja2
    except ImportError:
        raise UsageError(
            "chat templates need jinja2", code="jinja2-missing", hint="pip install 'jinja2>=3.1.6'"
        ) from None
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < _AT_LEAST:
        raise UsageError(
            "chat templates need a jinja2 whose sandbox holds",
            code="jinja2-old",
            found=jinja2.__version__,
            expected="3.1.6 or newer",
        )
    return jinja2


def _marked(template: str, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]] | None]:
    """Renders a template; returns the text and, if it has marks at all, where what they enclose came to stand."""
    compiled = _compiled(template)
    marks = next(each for each in _environment().extensions.values() if "generation" in each.tags)
    marks.spans, marks.length = [], 0
    parts = []
    for part in compiled.generate(**variables):
        parts.append(part)
        marks.length += len(part)
    return "".join(parts), marks.spans if _MARK.search(template) else None


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """Returns the names of variables that a template asks for."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_environment().parse(template)))


@functools.cache
def _environment() -> Any:
    from jinja2 import ext, nodes, sandbox, utils
    from jinja2.exceptions import SecurityError

    class Generation(ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the assistant said; here that is told apart.

        Attributes:
          length: Of the text so far.
          spans: What was marked in it, from and up to; in a macro or a block that is set it is where that began, as in
            transformers.
        """

        tags = {"generation"}  # noqa: RUF012
        length = 0

        def __init__(self, environment: Any):
            super().__init__(environment)
            self.spans: list[tuple[int, int]] = []

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> str:
            text: str = caller()
            self.spans.append((self.length, self.length + len(text)))
            return text

    class Namespace(utils.Namespace):
        """Refuses names that begin with an underscore, as transformers does."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                _refuse_underscore(name)
            utils.Namespace.__init__(args[0], *args[1:], **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            super().__setitem__(name, value)

    def _refuse_underscore(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"unsafe name in a namespace: {name}")

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "namespace": Namespace,
        "dict": _Dict(),
    }
    return environment


class _Dict:
    """What templates may do with `dict`: its attributes would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes what HTML would take amiss.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
