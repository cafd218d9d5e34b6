"""Text in and text out: the checkpoint's tokenizer.json, its chat template, and text that grows token by token.

A byte-level BPE token (GPT-2's, and Qwen2's) is a string of bytes, not of characters: a character may be spread over
several tokens, and a text may end in the middle of one. So text is made from bytes here, and half a character waits.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.normalizers
import tokenizers.pre_tokenizers

from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.converters.formats import strict_json
from apr_jax.generate import chat_template

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_MAX_BYTES = 64 << 20
# Special tokens that chat templates may name; all others are spelt out in them.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Qwen2Tokenizer's: what is merged lies within one of these.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNKNOWN = b"\xff"
"""The bytes of an id that no token has: nothing in UTF-8, so that no string is found across it."""


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
      chat_template: Its Jinja template, None if there is none.
      special_tokens: Tokens that the template may name ("eos_token" and so on).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        file: str | None = None,
    ):
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise RefusedError(
                "the tokenizer is not byte-level BPE, as Qwen2's are",
                code="tokenizer-decoder",
                file=file,
                found=type(backend.decoder).__name__,
                expected="the decoder ByteLevel",
                hint="Token ids work without a tokenizer.",
            )
        self._backend = backend
        self._special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        self._file = file
        self.chat_template = template
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Of an `.apr` file by `apr import`, which has none of these, the vocabulary and the merges in its metadata are
        taken, with what Qwen2 does before merging; there is no chat template then. None if there is nothing at all.

        Raises:
          RefusedError: A tokenizer that cannot be used.
          BrokenContainerError: tokenizer_config.json is not JSON.
        """
        source = checkpoint.files.get("tokenizer.json")
        try:
            if source is not None:
                backend = tokenizers.Tokenizer.from_str(source.decode())
            elif checkpoint.kind == "apr" and "tokenizer.vocabulary" in checkpoint.metadata:
                backend = _from_metadata(checkpoint.metadata)
            else:
                return None
        except Exception as error:  # the package raises bare Exception for whatever it cannot parse
            raise RefusedError(
                f"the tokenizer cannot be used: {error}", code="tokenizer-broken", file=checkpoint.path
            ) from None
        config: Any = {}
        if _CONFIG in checkpoint.files:
            config = strict_json.loads(
                checkpoint.files[_CONFIG], what=_CONFIG, max_bytes=_MAX_BYTES, file=checkpoint.path
            )
        config = config if isinstance(config, dict) else {}
        template = _template(config.get("chat_template"))
        if _TEMPLATE in checkpoint.files:
            template = checkpoint.files[_TEMPLATE].decode(errors="replace")
        named = {name: _content(config.get(name)) for name in _NAMED_TOKENS}
        return cls(backend, template, {name: text for name, text in named.items() if text}, checkpoint.path)

    def __repr__(self) -> str:
        return f"Tokenizer({self._backend.get_vocab_size()} tokens)"

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text; special tokens that it spells out become such.

        Args:
          text: The text.
          special_tokens: Whether the tokenizer adds what it puts around every text (Qwen2's adds nothing).

        Raises:
          UsageError: The text holds unpaired surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("the prompt is not UTF-8", code="prompt") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Renders messages ({"role": ..., "content": ...}) as HuggingFace's function of this name does.

        Raises:
          RefusedError: There is no template, or it does not work.
          UsageError: The template itself refuses the messages, or jinja2 is missing.
        """
        if self.chat_template is None:
            raise RefusedError(
                "the checkpoint has no chat template",
                code="chat-template-missing",
                file=self._file,
                expected=f"{_TEMPLATE}, or chat_template in {_CONFIG}",
                hint="Give the whole text as a prompt.",
            )
        return chat_template.render(
            self.chat_template, messages, add_generation_prompt, self.special_tokens, file=self._file
        )

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to the text, special tokens included."""
        spelt = self._backend.id_to_token(token)
        if spelt is None:
            return _UNKNOWN
        alphabet = _byte_level_alphabet()
        if all(character in alphabet for character in spelt):
            return bytes(alphabet[character] for character in spelt)
        return spelt.encode()

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
    """Character -> byte: GPT-2's alphabet, in which printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _from_metadata(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds a tokenizer from `tokenizer.vocabulary` and `tokenizer.merges`, as Qwen2's tokenizer.json would."""
    vocabulary = {token: number for number, token in enumerate(metadata["tokenizer.vocabulary"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.merges", ())]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), "isolated")
    spelling = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, spelling])
    backend.decoder = tokenizers.decoders.ByteLevel()
    # The file does not say which tokens are special: those spelt so are, in all of Qwen2's tokenizers.
    backend.add_special_tokens([token for token in vocabulary if token.startswith("<|") and token.endswith("|>")])
    return backend


def _template(given: Any) -> str | None:
    """Returns the template, of several the one called "default"."""
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _content(token: Any) -> str | None:
    """Returns the text of a special token, which tokenizer_config.json spells as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
