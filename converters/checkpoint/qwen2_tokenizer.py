"""Qwen2's tokenizer.json around a vocabulary: what containers that keep tokens and merges alone leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2Tokenizer's: what is merged lies within one of these."""
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def added_token(text: str, special: bool) -> dict[str, Any]:
    """Returns an added token as `added_tokens_decoder` of tokenizer_config.json has it."""
    return {"content": text, **_FLAGS, "special": special}


def tokenizer_json(
    vocabulary: Mapping[str, int], merges: Sequence[str], added: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the content of tokenizer.json.

    Args:
      vocabulary: Token, in GPT-2's letters for bytes, -> id.
      merges: "left right", the first before the others.
      added: Id -> `added_token`.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **token} for number, token in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False},
                _BYTE_LEVEL,
            ],
        },
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
