"""The tokenizer that `AutoTokenizer.from_pretrained` of transformers 5 makes of a checkpoint's files.

tokenizer.json alone does not say which ids a text has. For every model_type qwen2, whatever tokenizer_class says,
transformers builds a Qwen2Tokenizer: it takes vocabulary, merges and post-processor from the file, normaliser, words
and decoder from the class, and cuts and pads nothing. Then it adds tokens, each with the next free id unless the
vocabulary has it: those of `added_tokens_decoder`, or else of added_tokens.json and tokenizer.json; the named ones
(`eos_token` and so on, which have defaults); the additional special ones. Here the same is done, by the same calls of
the same package in the same order.

Source: transformers 5.24, models/auto/tokenization_auto.py, models/qwen2/tokenization_qwen2.py,
`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from apr_jax.converters.checkpoint import qwen2_tokenizer
from apr_jax.converters.convert import apr_tokenizer
from apr_jax.converters.errors import AprJaxError, RefusedError
from apr_jax.converters.formats import strict_json
from apr_jax.converters.storage.isolation import Isolated

CONFIG = "tokenizer_config.json"
WHOLE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_ADDED, _SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"
_ALL = (CONFIG, WHOLE, VOCABULARY, MERGES, _ADDED, _SPECIAL_MAP)
_MAX_BYTES = 64 << 20
# Far above what any tokenizer has; the package takes minutes for millions.
_MAX_VOCABULARY, _MAX_ADDED, _MAX_PIECES = 1_000_000, 100_000, 64
_CHILD_SECONDS, _CHILD_BYTES = 5.0, 512 << 20
_MODEL_TYPE, _CLASS = "qwen2", "Qwen2Tokenizer"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Qwen2Tokenizer's, where tokenizer_config.json does not have the key; null means none.
_DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
      ids: Their ids.
      spans: For each token the first character that it has a part of, and one behind the last.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint's files say of its tokenizer.

    Attributes:
      backend: Text to ids and back.
      named: Tokens that a chat template may name: "eos_token" and so on.
      config: tokenizer_config.json; empty if there is none.
      warnings: What is odd about the files.
      is_strange: Whether the backend has parts that nobody has looked at, so that texts are encoded in a child.
    """

    backend: tokenizers.Tokenizer
    named: Mapping[str, str]
    config: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    is_strange: bool = False

    def encode(self, text: str, special_tokens: bool, path: str | None = None) -> Encoded:
        """Returns the ids of a text, and which of its characters each stands for.

        Raises:
          RefusedError: The tokenizer does not end, takes too much memory, or cannot encode it.
        """
        with _native(path):
            if not self.is_strange:
                return _encoded(self.backend, text, special_tokens)
            digest, text_of_all = self._serialised
            arguments = (digest, text, special_tokens, bool(self.backend.encode_special_tokens))
            found = _child().call("encoded", *arguments)
            if found is None:
                _child().call("kept", digest, text_of_all)
                found = _child().call("encoded", *arguments)
            return Encoded(*found)

    @functools.cached_property
    def _serialised(self) -> tuple[str, str]:
        text = self.backend.to_str()
        return hashlib.sha256(text.encode()).hexdigest(), text


def read(files: Mapping[str, bytes], model_type: str | None, path: str) -> TokenizerFiles | None:
    """Builds the tokenizer of a checkpoint.

    Args:
      files: Side files of the checkpoint, name -> content.
      model_type: config.json's.
      path: The checkpoint, for error messages.

    Returns:
      None if there is neither tokenizer.json nor vocab.json with merges.txt.

    Raises:
      RefusedError: A tokenizer that cannot be used.
      BrokenContainerError: One of the files is not JSON.
    """
    if WHOLE not in files and not (VOCABULARY in files and MERGES in files):
        return None
    config = _object(files, CONFIG, path)
    is_strange = WHOLE in files and not _is_qwen2(config, model_type)
    if is_strange:
        with _native(path):
            encoded = {name: base64.b64encode(files[name]).decode() for name in _ALL if name in files}
            _child().call("tried", encoded, model_type, path)
    return _built(files, config, model_type, path, is_strange)


def _built(
    files: Mapping[str, bytes], config: Mapping[str, Any], model_type: str | None, path: str, is_strange: bool
) -> TokenizerFiles:
    is_qwen2 = _is_qwen2(config, model_type)
    with _native(path):
        if WHOLE not in files:
            backend = _of_lists(files, config, path)
        elif is_qwen2:
            backend = _rebuilt(_object(files, WHOLE, path), config, path)
        else:
            backend = _as_it_stands(files[WHOLE], path)
        tokens = _Tokens.of(files, config, is_qwen2=is_qwen2)
        warnings = tokens.add_to(backend)
        if WHOLE not in files:
            backend.post_processor = _ends(backend, config, tokens.named)
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    named = {name: _text(token) for name, token in tokens.named.items() if token is not None}
    return TokenizerFiles(backend, named, config, warnings, is_strange)


@contextlib.contextmanager
def _native(path: str | None) -> Iterator[None]:
    """Makes an error of the family of whatever the package raises: bare Exception, and panics, which are not even that.

    Raises:
      RefusedError: Code "tokenizer-broken".
    """
    try:
        yield
    except AprJaxError as error:
        if error.code == "not-bounded":
            raise _refused(error.message, path) from None
        error.file = error.file or path
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise _refused(f"the tokenizer cannot be used: {said}", path) from None


# --- a tokenizer that tokenizer.json describes whole: regular expressions and replacements of whoever wrote it


@functools.cache
def _child() -> Isolated:
    return Isolated(__name__, "the tokenizer", seconds=_CHILD_SECONDS, memory=_CHILD_BYTES)


def tried(encoded: Mapping[str, str], model_type: str | None, path: str) -> None:
    """Builds the tokenizer as `read` is about to, in a child: native code may end the process, or not end at all."""
    files = {name: base64.b64decode(content) for name, content in encoded.items()}
    built = _built(files, _object(files, CONFIG, path), model_type, path, is_strange=False)
    with _native(path):
        tokenizers.Tokenizer.from_str(built.backend.to_str()).encode("a")


_kept: dict[str, tokenizers.Tokenizer] = {}


def kept(digest: str, serialised: str) -> None:
    """Makes a tokenizer ready for `encoded`, in a child."""
    _kept.clear()
    with _native(None):
        _kept[digest] = tokenizers.Tokenizer.from_str(serialised)


def encoded(digest: str, text: str, special_tokens: bool, split_special: bool) -> Encoded | None:
    """Returns a text as tokens, in a child; None if this child does not have the tokenizer."""
    if digest not in _kept:
        return None
    backend = _kept[digest]
    backend.encode_special_tokens = split_special
    with _native(None):
        return _encoded(backend, text, special_tokens)


def _encoded(backend: tokenizers.Tokenizer, text: str, special_tokens: bool) -> Encoded:
    encoding = backend.encode(text, add_special_tokens=special_tokens)
    return Encoded(encoding.ids, encoding.offsets)


def missing(path: str | None = None) -> RefusedError:
    """Returns the error for a checkpoint without a tokenizer."""
    return RefusedError(
        "the checkpoint has no tokenizer",
        code="tokenizer-missing",
        file=path,
        expected="tokenizer.json, or vocab.json and merges.txt",
        hint=apr_tokenizer.WITHOUT_TOKENIZER,
    )


def _is_qwen2(config: Mapping[str, Any], model_type: str | None) -> bool:
    """Whether transformers makes a Qwen2Tokenizer, and not what tokenizer.json describes.

    `AutoTokenizer` overrides tokenizer_class for this model_type, R1-Distill-Qwen's LlamaTokenizerFast for one; not
    where code comes with the checkpoint, whose class it then looks for and replaces if it does not find it.
    """
    given = config.get("tokenizer_class")
    named = None if given is None else str(given).removesuffix("Fast")
    code = config.get("auto_map")
    has_code = bool(code.get("AutoTokenizer")) if isinstance(code, Mapping) else bool(code)
    return named == _CLASS or (model_type == _MODEL_TYPE and not (has_code and named))


def _of_lists(files: Mapping[str, bytes], config: Mapping[str, Any], path: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer of vocab.json and merges.txt, before anything is added to it."""
    lines = [line.rstrip("\r") for line in files[MERGES].decode().split("\n")]
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    return _qwen2(_object(files, VOCABULARY, path), apr_tokenizer.pairs(merges, MERGES), config)


def _rebuilt(whole: Mapping[str, Any], config: Mapping[str, Any], path: str) -> tokenizers.Tokenizer:
    """Returns the Qwen2Tokenizer with what transformers takes from tokenizer.json."""
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        found = str(model.get("type")) if isinstance(model, dict) else "no model"
        raise _no_byte_level(path, found, "the model BPE")
    backend = _qwen2(model["vocab"], apr_tokenizer.pairs(model.get("merges", ()), WHOLE), config)
    if whole.get("post_processor") is not None:
        _check_post_processor(whole["post_processor"], path)
        backend.post_processor = _post_processor(whole["post_processor"])
    return backend


def _as_it_stands(content: bytes, path: str) -> tokenizers.Tokenizer:
    """Returns what tokenizer.json describes, but that texts are encoded whole and alone."""
    backend = tokenizers.Tokenizer.from_str(content.decode())
    if not _is_byte_level(backend.decoder):
        raise _no_byte_level(path, type(backend.decoder).__name__, "the decoder ByteLevel")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _no_byte_level(path: str, found: str, expected: str) -> RefusedError:
    message = "the tokenizer is not byte-level BPE, as Qwen2's are"
    return _refused(message, path, code="tokenizer-kind", found=found, expected=expected)


def _qwen2(vocabulary: dict[str, int], merges: list[list[str]], config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    if len(vocabulary) > _MAX_VOCABULARY or len(merges) > _MAX_VOCABULARY:
        found = f"{len(vocabulary)} tokens, {len(merges)} merges"
        expected = f"at most {_MAX_VOCABULARY}"
        raise RefusedError(
            "the tokenizer is too large",
            code="tokenizer-size",
            found=found,
            expected=expected,
            hint=apr_tokenizer.WITHOUT_TOKENIZER,
        )
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[(left, right) for left, right in merges]))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(qwen2_tokenizer.WORDS), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, spelling])
    backend.decoder = decoders.ByteLevel()
    return backend


def _check_post_processor(described: Any, path: str) -> None:
    """Checks what the package does not: it panics at tokens that a template lacks, and repeats a text at will.

    Raises:
      RefusedError: Code "tokenizer-broken".
    """
    parts = described.get("processors") if isinstance(described, dict) else None
    if isinstance(parts, list):
        if len(parts) > _MAX_PIECES:
            raise _refused("the post-processor has too many parts", path, found=len(parts))
        for part in parts:
            _check_post_processor(part, path)
        return
    pieces = described.get("single") if isinstance(described, dict) else None
    if not isinstance(pieces, list):
        return
    special = described.get("special_tokens")
    known = special if isinstance(special, dict) else {}
    texts = 0
    for piece in pieces[: _MAX_PIECES + 1]:
        (kind, token), *others = piece.items() if isinstance(piece, dict) and piece else [("", None)]
        name = token.get("id") if isinstance(token, dict) else None
        entry = known.get(name) if isinstance(name, str) else None
        ids = entry.get("ids") if isinstance(entry, dict) else None
        texts += kind == "Sequence" and name == "A"
        is_token = kind == "SpecialToken" and isinstance(ids, list) and len(ids) <= _MAX_PIECES
        if others or not (is_token or (kind == "Sequence" and name == "A")):
            raise _refused("the post-processor puts something into texts that it does not know", path, found=name)
    if texts > 1 or len(pieces) > _MAX_PIECES:
        raise _refused("the post-processor repeats texts", path, found=f"{len(pieces)} pieces")


def _post_processor(described: Any) -> Any:
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": described}
    return tokenizers.Tokenizer.from_str(json.dumps(empty)).post_processor


def _ends(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, Any]) -> Any:
    """Returns what puts the first and the last token around a text; only without a tokenizer.json is it asked for."""
    around = []
    for key in ("bos_token", "eos_token"):
        token = named.get(key) if config.get(f"add_{key}") else None
        around.append(None if token is None else _text(token))
    first, last = around
    single = " ".join([*([f"{first}:0"] if first else []), "$A:0", *([f"{last}:0"] if last else [])])
    tokens = [(token, backend.token_to_id(token)) for token in around if token]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=tokens)


def _is_byte_level(decoder: Any) -> bool:
    """Whether a decoder turns GPT-2's letters back into bytes and does nothing else."""
    if isinstance(decoder, decoders.Sequence):
        parts = json.loads(decoder.__getstate__())["decoders"]
        kinds = [part["type"] for part in parts]
        return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}
    return isinstance(decoder, decoders.ByteLevel)


@dataclasses.dataclass
class _Tokens:
    """Tokens that are added to a vocabulary, and their roles.

    Attributes:
      added: Index -> token. The index says in which order they are added, and not which id they get.
      named: Role -> token, None where it is taken by none.
      extra: Further special tokens.
      again: Whether all special tokens are added once more, as Qwen2Tokenizer does.
    """

    added: dict[int, AddedToken]
    named: dict[str, Any]
    extra: list[Any]
    again: bool

    @classmethod
    def of(cls, files: Mapping[str, bytes], config: Mapping[str, Any], *, is_qwen2: bool) -> _Tokens:
        settings = dict(config)
        if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
            settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
        if "added_tokens_decoder" in config:
            added = {int(index): _added(token) for index, token in config["added_tokens_decoder"].items()}
        else:
            _merge_special_map(settings, _object(files, _SPECIAL_MAP, _SPECIAL_MAP))
            added = _legacy_added(files, settings)
        if "extra_special_tokens" not in settings:
            settings["extra_special_tokens"] = settings.get("additional_special_tokens")
        extra = settings["extra_special_tokens"] or []
        own = extra if isinstance(extra, Mapping) else {}
        defaults = _DEFAULTS if is_qwen2 else {}
        named = {name: settings[name] if name in settings else defaults.get(name) for name in _NAMED}
        by_text = {token.content: token for token in added.values()}
        named = {name: by_text.get(_text(token), token) if token is not None else None for name, token in named.items()}
        others = {key: token for key, token in settings.items() if key.endswith("_token") and key not in _NAMED}
        named |= {key: token for key, token in {**others, **own}.items() if isinstance(token, str | dict)}
        return cls(added, named, [] if own else list(extra), is_qwen2)

    def add_to(self, backend: tokenizers.Tokenizer) -> tuple[str, ...]:
        """Adds the tokens; returns what is odd about the ids that they got."""
        if len(self.added) + len(self.named) + len(self.extra) > _MAX_ADDED:
            found = len(self.added) + len(self.extra)
            raise RefusedError(
                "too many added tokens",
                code="tokenizer-size",
                found=found,
                expected=f"at most {_MAX_ADDED}",
                hint=apr_tokenizer.WITHOUT_TOKENIZER,
            )
        new: list[Any] = [token for _, token in sorted(self.added.items())]
        roles = {_text(token) for token in self.named.values() if token is not None}
        for token in new:
            # A token with a role is a special one, whatever the file says of it.
            token.special = token.special or token.content in roles
        known = {token.content for token in (*new, *backend.get_added_tokens_decoder().values())}
        for token in (*self.named.values(), *self.extra):
            if token is not None and _text(token) not in known:
                known.add(_text(token))
                new.append(_special(token))
        if new:
            backend.add_tokens(new)
        if self.again:
            special = [_text(token) for token in (*self.named.values(), *self.extra) if token is not None]
            backend.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(special)])
        return self._moved(backend)

    def _moved(self, backend: tokenizers.Tokenizer) -> tuple[str, ...]:
        ids = {token.content: (index, backend.token_to_id(token.content)) for index, token in self.added.items()}
        moved = [f"{text} {index} -> {number}" for text, (index, number) in sorted(ids.items()) if index != number]
        if not moved:
            return ()
        more = f" and {len(moved) - 5} more" if len(moved) > 5 else ""
        said = "added tokens have other ids than the files say, since transformers gives the next free one"
        return (f"{said}: {', '.join(moved[:5])}{more}",)


def _merge_special_map(settings: dict[str, Any], special_map: Mapping[str, Any]) -> None:
    """Lets special_tokens_map.json go before tokenizer_config.json, as it does without `added_tokens_decoder`."""
    for key, value in special_map.items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = {**value, "special": True}
        if isinstance(value, list) and key == "extra_special_tokens":
            before = list(settings.get(key) or [])
            value = before + [token for token in value if token not in before]
        settings[key] = value


def _legacy_added(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Reads added_tokens.json and tokenizer.json's added tokens, which count without `added_tokens_decoder`."""
    extra = settings.get("extra_special_tokens") or []
    special = {_text(token) for token in (*(settings.get(name) for name in _NAMED), *extra) if token is not None}
    added = {}
    for text, index in _object(files, _ADDED, _ADDED).items():
        added[index] = AddedToken(text, normalized=text not in special, special=text in special)
    for token in _object(files, WHOLE, WHOLE).get("added_tokens") or ():
        added[token["id"]] = _added(token)
    return added


def _added(described: Mapping[str, Any]) -> AddedToken:
    if not isinstance(described.get("content"), str):
        raise TypeError(f"an added token is {described!r}")
    # The package prints what it does not know on stdout.
    return AddedToken(described["content"], **{flag: described[flag] for flag in _FLAGS if flag in described})


def _special(token: Any) -> AddedToken:
    """Returns a token that has a role: named by its text, described, or one of those that were added."""
    if isinstance(token, Mapping):
        return _added({"special": True, **token})
    return token if isinstance(token, AddedToken) else AddedToken(token, special=True)


def _text(token: Any) -> str:
    if isinstance(token, Mapping):
        token = token.get("content")
    if not isinstance(token, str | AddedToken):
        raise TypeError(f"a special token is {token!r}")
    return token if isinstance(token, str) else str(token.content)


def _object(files: Mapping[str, bytes], name: str, path: str) -> dict[str, Any]:
    """Returns a file's JSON object, an empty one if there is no such file."""
    if name not in files:
        return {}
    try:
        value = strict_json.loads(
            files[name], what=name, max_bytes=_MAX_BYTES, budget=strict_json.TOKENIZER, wide=True, file=path
        )
    except AprJaxError as error:
        error.hint = error.hint or apr_tokenizer.WITHOUT_TOKENIZER
        raise
    if not isinstance(value, dict):
        raise _refused(f"{name} is not an object", path)
    return value


def _refused(message: str, path: str | None, code: str = "tokenizer-broken", **details: Any) -> RefusedError:
    return RefusedError(message, code=code, file=path, hint=apr_tokenizer.WITHOUT_TOKENIZER, **details)
