"""Chat templates: Jinja programs that come with a checkpoint, rendered in a sandbox as HuggingFace transformers does.

A template is code by whoever made the checkpoint. It runs in jinja2's immutable sandbox and sees plain JSON values and
the functions that `render_jinja_template` of transformers gives it, nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.converters.errors import RefusedError, UsageError, printable

_AT_LEAST = (3, 1, 6)
"""Earlier versions of jinja2 have holes in their sandbox (CVE-2025-27516)."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    file: str | None = None,
) -> str:
    """Renders messages as the text of a prompt.

    Args:
      template: The checkpoint's Jinja template.
      messages: One conversation, {"role": ..., "content": ...} each; plain JSON values.
      add_generation_prompt: End with the beginning of the assistant's answer.
      special_tokens: Variables of the template: "eos_token" and so on.
      file: The checkpoint, for error messages.

    Raises:
      UsageError: The template refuses the messages (`raise_exception`), they are no JSON values, or jinja2 is missing.
      RefusedError: The template does not work.
    """
    jinja2 = _jinja2()
    try:
        plain = json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError):
        raise UsageError("messages are not plain JSON values", code="chat-messages") from None
    if not plain or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in plain):
        raise UsageError(
            "messages are not a conversation",
            code="chat-messages",
            expected='a non-empty list of {"role": ..., "content": ...}',
        )
    try:
        text: str = _compiled(template).render(
            messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except _Refusal as refusal:
        raise UsageError(
            f"the chat template refuses the messages: {printable(str(refusal))}", code="chat-messages", file=file
        ) from None
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"the chat template does not work: {printable(str(error))}", code="chat-template-broken", file=file
        ) from None
    except (MemoryError, RecursionError):
        raise RefusedError("the chat template does not end", code="chat-template-broken", file=file) from None
    return text


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


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the assistant said, for training; here it is text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes what HTML would take amiss.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
