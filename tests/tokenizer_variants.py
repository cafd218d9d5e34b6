"""Tokenizer folders as people hold them: the files of a committed checkpoint, each variant with one thing changed.

Two suites take them: live transformers says what is right in tests/reference, and what it said in the default suite.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tests import paths

BASE = "gqa_tied_bf16"
RECORDED = paths.ROOT / "tests" / "data" / "tokenizer_variants.json"
"""What transformers makes of them; by tests/data/record_tokenizer_variants.py."""
TEXTS = (
    "What is 2+2?",
    "  don't  He'll\n\n x1234 e\u0301 é 漢字😀\t!!\r\n ",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> the quick <tool_call>x</tool_call> <think> brown fox",
    "<new> <other> a<new>b [MASK] 12345678",
    "",
    "The quick brown fox jumps over the lazy dog, again and again.",
)
CHAT = ({"role": "user", "content": "Hé, what's 2+2? 😀"},)

Files = dict[str, bytes]
Json = dict
Kind = Mapping[str, Callable[[], Files]]


def base_files() -> Files:
    """The side files of the checkpoint."""
    folder = paths.checkpoint(BASE)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja")}


def changed(name: str, change: Callable[[Json], object], files: Files | None = None) -> Files:
    """The files with one of them, JSON, changed in place by `change`."""
    files = base_files() if files is None else files
    content = json.loads(files.get(name, b"{}"))
    change(content)
    return files | {name: json.dumps(content).encode()}


def _without(*names: str, files: Files | None = None) -> Files:
    return {name: data for name, data in (base_files() if files is None else files).items() if name not in names}


def _whole(**values: object) -> Files:
    return changed("tokenizer.json", lambda content: content.update(values))


def _config(files: Files | None = None, **values: object) -> Files:
    return changed("tokenizer_config.json", lambda content: content.update(values), files)


def _token(content: str, **flags: object) -> Json:
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"content": content, **common, **flags}


def _template_processing(first: str | None, last: str | None) -> Json:
    ids = {"<|endoftext|>": 280, "<|im_end|>": 282}
    single = [{"SpecialToken": {"id": token, "type_id": 0}} if token else None for token in (first, last)]
    single.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": [part for part in single if part],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (first, last) if token
        },
    }


def _truncation(side: str, **values: object) -> Json:
    return {"direction": side, "max_length": 8, "strategy": "LongestFirst", "stride": 0, **values}


def _padding(side: str, strategy: object, **values: object) -> Json:
    common = {"pad_to_multiple_of": None, "pad_id": 280, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    return {"strategy": strategy, "direction": side, **common, **values}


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_CLS = {"sep": ["<|im_end|>", 282], "cls": ["<|endoftext|>", 280]}
_BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
_DECODER = {"280": _token("<|endoftext|>", special=True), "281": _token("<|im_start|>", special=True)}
_SLOW_ADDED = {"<|endoftext|>": 280, "<|im_start|>": 281, "<|im_end|>": 282, "<new>": 283}
_FUSED = {"type": "Sequence", "decoders": [_BYTE_LEVEL, {"type": "Fuse"}]}
_CODE = {"AutoTokenizer": ["tokenization_qwen.T", None]}
_NEW = {"id": 283, **_token("<new>", special=True)}


def _only_in_the_configuration() -> Files:
    return changed("tokenizer.json", lambda content: content.update(added_tokens=[]))


def _slow() -> Files:
    return _without("tokenizer.json", "tokenizer_config.json")


def _legacy(**files: Json) -> Files:
    """Added tokens as transformers 4.30 wrote them."""
    plain = changed("tokenizer_config.json", lambda content: content.pop("added_tokens_decoder"))
    return plain | {name: json.dumps(content).encode() for name, content in files.items()}


def _merges(spell: Callable[[Any], Any]) -> Files:
    def change(content: Json) -> None:
        content["model"]["merges"] = [spell(merge) for merge in content["model"]["merges"]]

    return changed("tokenizer.json", change)


def _unsaid(*keys: str, files: Files | None = None) -> Files:
    def change(content: Json) -> None:
        for key in keys:
            content.pop(key, None)

    return changed("tokenizer_config.json", change, files)


CUT_AND_PADDED: Kind = {
    "as it is": base_files,
    "truncation on the right": lambda: _whole(truncation=_truncation("Right")),
    "truncation on the left": lambda: _whole(truncation=_truncation("Left")),
    "truncation of the first only, with stride": lambda: _whole(
        truncation=_truncation("Right", strategy="OnlyFirst", stride=2)
    ),
    "padding to 32 on the right": lambda: _whole(padding=_padding("Right", {"Fixed": 32})),
    "padding to 32 on the left": lambda: _whole(padding=_padding("Left", {"Fixed": 32})),
    "padding to the longest": lambda: _whole(padding=_padding("Left", "BatchLongest")),
    "padding to multiples of 8": lambda: _whole(padding=_padding("Right", "BatchLongest", pad_to_multiple_of=8)),
    "truncation and padding": lambda: _whole(truncation=_truncation("Left"), padding=_padding("Right", {"Fixed": 32})),
}
AROUND: Kind = {
    "BOS in front": lambda: _config(
        _whole(post_processor=_template_processing("<|endoftext|>", None)),
        bos_token="<|endoftext|>",
        chat_template=_BOS_TEMPLATE,
    ),
    "EOS at the end": lambda: _whole(post_processor=_template_processing(None, "<|im_end|>")),
    "BOS and EOS": lambda: _whole(post_processor=_template_processing("<|endoftext|>", "<|im_end|>")),
    "RobertaProcessing": lambda: _whole(
        post_processor={"type": "RobertaProcessing", **_CLS, "trim_offsets": True, "add_prefix_space": False}
    ),
    "BertProcessing": lambda: _whole(post_processor={"type": "BertProcessing", **_CLS}),
    "a Sequence of post-processors": lambda: _whole(
        post_processor={
            "type": "Sequence",
            "processors": [_BYTE_LEVEL, _template_processing("<|endoftext|>", None)],
        }
    ),
    "no post-processor": lambda: _whole(post_processor=None),
    "add_bos_token beside tokenizer.json": lambda: _config(add_bos_token=True, bos_token="<|endoftext|>"),
    "add_bos_token without tokenizer.json": lambda: _config(
        _without("tokenizer.json"), add_bos_token=True, add_eos_token=True, bos_token="<|endoftext|>"
    ),
}
ADDED: Kind = {
    "added tokens only in added_tokens_decoder": _only_in_the_configuration,
    "added_tokens_decoder with gaps": lambda: _config(
        added_tokens_decoder={**_DECODER, "290": _token("<new>", special=True), "286": _token("<other>")}
    ),
    "added_tokens_decoder lacks what tokenizer.json has": lambda: _config(
        changed("tokenizer.json", lambda content: content["added_tokens"].append(_NEW)), added_tokens_decoder=_DECODER
    ),
    "added tokens that strip and are words": lambda: _config(
        added_tokens_decoder={
            **_DECODER,
            "283": _token("<new>", lstrip=True, rstrip=True),
            "284": _token("quick", single_word=True, normalized=True),
            "285": _token("é", normalized=True),
        }
    ),
    "an added token that is special only as an additional one": lambda: _config(
        added_tokens_decoder={**_DECODER, "283": _token("<new>")}, additional_special_tokens=["<new>", "<other>"]
    ),
    "extra_special_tokens": lambda: _config(_unsaid("additional_special_tokens"), extra_special_tokens=["<new>"]),
    "extra_special_tokens empty beside additional ones": lambda: _config(
        extra_special_tokens=[], additional_special_tokens=["<new>"]
    ),
    "extra_special_tokens by name": lambda: _config(
        _unsaid("additional_special_tokens"), extra_special_tokens={"image_token": "<new>", "sound_token": "<other>"}
    ),
    "a token with a role of its own": lambda: _config(image_token="<new>", mask_token="[MASK]"),
    "roles spelt as objects": lambda: _config(
        bos_token={"__type": "AddedToken", **_token("<new>", normalized=True)}, mask_token="[MASK]"
    ),
    "tokenizer.json alone, its added tokens out of order and with a gap": lambda: changed(
        "tokenizer.json",
        lambda content: content.update(added_tokens=[{**_NEW, "id": 290}, *reversed(content["added_tokens"])]),
        _without("tokenizer_config.json", "vocab.json", "merges.txt"),
    ),
    "tokenizer.json alone": lambda: _without("tokenizer_config.json", "vocab.json", "merges.txt"),
}
SLOW: Kind = {
    "vocab.json and merges.txt alone": _slow,
    "vocab.json and merges.txt with tokenizer_config.json": lambda: _without("tokenizer.json"),
    "merges.txt with a version and Windows line ends": lambda: (
        _without("tokenizer.json")
        | {"merges.txt": b"#version: 0.2\r\n" + base_files()["merges.txt"].replace(b"\n", b"\r\n")}
    ),
    "added_tokens.json with special and other ones that are composed": lambda: _config(
        _legacy(**{"added_tokens.json": {**_SLOW_ADDED, "e\u0301": 284, "漢": 285, "o\u0308": 286}}),
        additional_special_tokens=["<|im_start|>", "e\u0301"],
    ),
    "added_tokens.json": lambda: _without(
        "tokenizer.json",
        files=_legacy(
            **{"added_tokens.json": {"<|endoftext|>": 280, "<|im_start|>": 281, "<|im_end|>": 282, "<new>": 283}}
        ),
    ),
}
LEGACY: Kind = {
    "special_tokens_map.json": lambda: _legacy(
        **{"special_tokens_map.json": {"eos_token": _token("<|endoftext|>"), "mask_token": "[MASK]"}}
    ),
    "special_tokens_map.json with further ones": lambda: _legacy(
        **{"special_tokens_map.json": {"extra_special_tokens": ["<new>", {"content": "<other>", "rstrip": True}]}}
    ),
    "special_tokens_map.json beside added_tokens_decoder": lambda: (
        base_files() | {"special_tokens_map.json": b'{"mask_token": "[MASK]", "eos_token": "<new>"}'}
    ),
    "roles left out": lambda: _unsaid("eos_token", "pad_token", "unk_token", "bos_token"),
    "split_special_tokens": lambda: _config(split_special_tokens=True),
}
OVERRIDDEN: Kind = {
    "add_prefix_space": lambda: _config(add_prefix_space=True),
    "a decoder in a Sequence": lambda: _whole(decoder=_FUSED),
    "a Llama's decoder": lambda: _whole(
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        }
    ),
    "another pre-tokenizer": lambda: _whole(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": False}, _BYTE_LEVEL],
        }
    ),
    "no normaliser, and one that lowers": lambda: _whole(normalizer={"type": "Lowercase"}),
    "a model with dropout, ignore_merges, byte_fallback and an unknown token": lambda: changed(
        "tokenizer.json",
        lambda content: content["model"].update(dropout=0.5, ignore_merges=True, byte_fallback=True, unk_token="!"),
    ),
    "a pre-tokenizer that puts a space in front": lambda: _whole(pre_tokenizer=_BYTE_LEVEL),
    "merges as pairs": lambda: _merges(lambda merge: merge.split(" ") if isinstance(merge, str) else merge),
    "merges as text": lambda: _merges(lambda merge: merge if isinstance(merge, str) else " ".join(merge)),
    "tokenizer_class LlamaTokenizerFast": lambda: _config(
        _whole(post_processor=_template_processing("<|endoftext|>", None)),
        tokenizer_class="LlamaTokenizerFast",
        bos_token={"__type": "AddedToken", **_token("<|endoftext|>", special=True)},
    ),
    "tokenizer_class PreTrainedTokenizerFast": lambda: _config(tokenizer_class="PreTrainedTokenizerFast"),
    "tokenizer_class unknown": lambda: _config(tokenizer_class="MyTokenizer"),
    "code beside Qwen2Tokenizer": lambda: _config(_whole(pre_tokenizer=_BYTE_LEVEL), auto_map=_CODE),
    "code beside another class, with roles of tokens that are not special": lambda: _config(
        _unsaid("added_tokens_decoder", "additional_special_tokens", files=_whole(pre_tokenizer=_BYTE_LEVEL)),
        auto_map=_CODE,
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder={**_DECODER, "283": _token("<new>")},
        mask_token="<new>",
    ),
    "code beside another class and special_tokens_map.json": lambda: (
        _config(
            _unsaid("added_tokens_decoder", "additional_special_tokens", files=_whole(pre_tokenizer=_BYTE_LEVEL)),
            auto_map=_CODE,
            tokenizer_class="PreTrainedTokenizerFast",
        )
        | {"special_tokens_map.json": json.dumps({"mask_token": _token("<new>")}).encode()}
    ),
    "code beside another class": lambda: _config(
        _whole(
            pre_tokenizer=_BYTE_LEVEL,
            decoder=_FUSED,
            truncation=_truncation("Right"),
            padding=_padding("Left", {"Fixed": 32}),
        ),
        auto_map=_CODE,
        tokenizer_class="PreTrainedTokenizerFast",
    ),
}

VARIANTS: Kind = {**CUT_AND_PADDED, **AROUND, **ADDED, **SLOW, **LEGACY, **OVERRIDDEN}
