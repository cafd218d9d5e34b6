"""Text in and text out: the checkpoint's tokenizer, its chat templates, and text that grows token by token.

A byte-level BPE token (GPT-2's, and Qwen2's) is a string of bytes, not of characters: a character may be spread over
several tokens, and a text may end in the middle of one. So text is made from bytes here, and half a character waits.
"""

from __future__ import annotations

import codecs
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.file_names import CONFIG_NAME
from apr_jax.converters.convert import apr_tokenizer
from apr_jax.converters.errors import AprJaxError, UsageError, in_file
from apr_jax.generate import chat_template as chat_templates
from apr_jax.generate import tokenizer_files

_UNKNOWN = b"\xff"
"""The bytes of an id that no token has: nothing in UTF-8, so that no string is found across it."""


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
      chat_template: Its Jinja template, or several by name; None if there is none.
      special_tokens: Tokens that a template may name ("eos_token" and so on).
      warnings: What is odd about the files that it was made of.
    """

    def __init__(
        self,
        files: tokenizer_files.TokenizerFiles,
        template: chat_templates.Templates = None,
        file: str | None = None,
        warnings: Sequence[str] = (),
    ):
        self._files, self._backend = files, files.backend
        self._special = {number for number in self._backend.get_added_tokens_decoder() if self._is_left_out(number)}
        self._file = file
        self.chat_template = template
        self.special_tokens = dict(files.named)
        self.warnings = (*warnings, *files.warnings)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """Makes the tokenizer that transformers' `AutoTokenizer` makes of the checkpoint's files.

        Of an `.apr` file by `apr import`, which has none, the vocabulary and the merges in its metadata are taken, with
        what Qwen2 does before merging. None if there is nothing at all.

        Raises:
          RefusedError: A tokenizer that cannot be used.
          BrokenContainerError: One of the files is not JSON.
        """
        files, warnings = checkpoint.files, list[str]()
        found = tokenizer_files.read(files, _model_type(checkpoint), checkpoint.path)
        if found is None and checkpoint.kind == "apr":
            with in_file(checkpoint.path):
                files = {**files, **apr_tokenizer.files_of(checkpoint.metadata, warnings)}
            found = tokenizer_files.read(files, _model_type(checkpoint), checkpoint.path)
        if found is None:
            return None
        templates = chat_templates.of_files(files, found.config)
        return cls(found, templates, checkpoint.path, warnings)

    @classmethod
    def if_usable(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """As `of`, for what needs no text: one that cannot be used is warned of, and None."""
        try:
            return cls.of(checkpoint)
        except AprJaxError as error:
            warnings.warn(f"there is no text, token ids alone: {error.message}", stacklevel=3)
            return None

    def __repr__(self) -> str:
        return f"Tokenizer({self._backend.get_vocab_size()} tokens)"

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text; special tokens that it spells out become such.

        Args:
          text: The text.
          special_tokens: Whether the tokenizer adds what it puts around every text (Qwen2's adds nothing).

        Raises:
          UsageError: The text holds unpaired surrogates.
          RefusedError: The tokenizer cannot encode it, or does not end.
        """
        return self._encoded(text, special_tokens).ids

    def _encoded(self, text: str, special_tokens: bool) -> tokenizer_files.Encoded:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                "the prompt is not UTF-8", code="prompt", hint="Encode it as UTF-8, or give token ids: --input-ids FILE"
            ) from None
        return self._files.encode(text, special_tokens, self._file)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **arguments: Any,
    ) -> str:
        """Renders messages ({"role": ..., "content": ...}) as HuggingFace's function of this name does.

        The text is to be encoded without special tokens: it holds all that the model shall see.

        Args:
          messages: The conversation.
          add_generation_prompt: End with the beginning of the assistant's answer.
          tools: JSON schemas of functions that the model may call.
          chat_template: The name of one of the checkpoint's templates, or the text of another.
          **arguments: Variables of the template, such as enable_thinking; one that it does not ask for is warned of.

        Raises:
          RefusedError: There is no template, or it does not work.
          UsageError: The template itself refuses the messages, or jinja2 is missing.
        """
        return self._rendered(messages, add_generation_prompt, tools, chat_template, arguments).text

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        arguments: Mapping[str, Any],
    ) -> chat_templates.Rendered:
        template = chat_templates.choose(self.chat_template, chat_template, tools is not None, self._file)
        return chat_templates.render(
            template, messages, add_generation_prompt, self.special_tokens, self._file, tools, arguments
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> list[int]:
        """Returns the ids of a conversation; arguments and errors are those of `apply_chat_template`."""
        return self.encode(self.apply_chat_template(messages, **settings), special_tokens=False)

    def encode_marked_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **arguments: Any,
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a whole conversation, and which of them the assistant said.

        Those are the tokens of what the template puts between `{% generation %}` and `{% endgeneration %}`, as
        `return_assistant_tokens_mask` of transformers has them. Arguments and errors as `apply_chat_template`.

        Raises:
          RefusedError: The template has no such marks.
        """
        rendered = self._rendered(messages, False, tools, chat_template, arguments)
        if rendered.generated is None:
            raise chat_templates.without_marks(self._file)
        ids, spans = self._encoded(rendered.text, special_tokens=False)
        said = [
            any(begin < end and first < end and begin < last for begin, end in rendered.generated)
            for first, last in spans
        ]
        return ids, said

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to the text, special tokens included."""
        spelt = self._backend.id_to_token(token)
        if spelt is None:
            return _UNKNOWN
        alphabet = _byte_level_alphabet()
        if all(character in alphabet for character in spelt):
            return bytes(alphabet[character] for character in spelt)
        return spelt.encode()

    @property
    def unknown_token(self) -> int | None:
        """The id of the token that stands for what the tokenizer does not know; None if it has none."""
        spelt = self.special_tokens.get("unk_token")
        number: int | None = None if spelt is None else self._backend.token_to_id(spelt)
        return number

    def _is_left_out(self, token: int) -> bool:
        """Whether the text that is shown leaves a token out; `AddedToken.special` says so in new versions only."""
        return bool(self._backend.decode([token], skip_special_tokens=False)) and not self._backend.decode([token])

    def shown_bytes(self, token: int) -> bytes:
        """Returns what a token adds to the text that is shown: nothing for special and unknown ones."""
        if token in self._special or self._backend.id_to_token(token) is None:
            return b""
        return self.token_bytes(token)


class Detokenizer:
    """One text in the making: takes tokens, gives the characters that are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Sequence[int]) -> str:
        """Returns what the tokens complete; an unfinished character is kept back."""
        return self._decoder.decode(b"".join(map(self._tokenizer.shown_bytes, tokens)))

    def finish(self) -> str:
        """Returns what is left: U+FFFD for a character that was never finished, as `Tokenizer.decode` has it."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the token that completes a stop string, as HuggingFace's `StopStringCriteria`.

    The string is looked for in the bytes of all tokens, special ones and the prompt's included; it may begin in the
    prompt and end within a token. The text keeps the whole of that token.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._wanted = tuple(string.encode() for string in strings)
        self._reach = max(map(len, self._wanted), default=0)
        # As many tokens as the longest string has bytes always suffice, as each has a byte at least.
        self._tail = b"".join(map(tokenizer.token_bytes, prompt[len(prompt) - min(self._reach, len(prompt)) :]))

    def first_end(self, tokens: Sequence[int]) -> int | None:
        """Takes the next tokens; returns how many of them there are up to the end of the first stop string."""
        for count, token in enumerate(tokens, start=1):
            added = self._tokenizer.token_bytes(token)
            text = self._tail + added
            # Only what ends within the new token is new.
            earlier = len(self._tail)
            if any(text.find(wanted, max(0, earlier - len(wanted) + 1)) >= 0 for wanted in self._wanted):
                return count
            self._tail = text[len(text) - min(len(text), self._reach) :]
        return None


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte."""
    return {letter: byte for byte, letter in enumerate(apr_tokenizer.byte_letters())}


def _model_type(checkpoint: Checkpoint) -> str | None:
    """Returns what transformers chooses the tokenizer by; only Qwen2 travels in an `.apr` without config.json."""
    if CONFIG_NAME not in checkpoint.files:
        return "qwen2"
    found = checkpoint.config.get("model_type")
    return found if isinstance(found, str) else None
