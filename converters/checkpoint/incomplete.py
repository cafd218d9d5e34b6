"""Files of tensors that are no model of their own: one shard of several, an adapter for another model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from apr_jax.converters.errors import AprJaxError, RefusedError
from apr_jax.converters.formats import strict_json

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")

_MAX_CONFIG_BYTES = 16 << 20
# What the parts of an adapter's names begin with: PEFT's and MLX's LoRA, IA3, prompts, OFT, LoHa, LoKr, VeRA.
_ADAPTER_PART = re.compile(r"(?:^|\.)(?:lora_|ia3_l|prompt_embeddings|oft_|hada_|lokr_|vera_)", re.IGNORECASE)
_SHOWN_TARGETS = 8


@dataclasses.dataclass(frozen=True)
class Incomplete:
    """Why a checkpoint is no model.

    Attributes:
      code: Of the error that says so: "one-of-several" or "adapter".
      sentence: What it is.
      hint: What makes a model of it.
    """

    code: str
    sentence: str
    hint: str

    def error(self, path: str, *hints: str) -> RefusedError:
        """Returns the error to raise where a model is needed."""
        return RefusedError(self.sentence, code=self.code, file=path, hint=". ".join((self.hint, *hints)))


def recognise(file: str, names: Collection[str], adapter_config: bytes | None) -> Incomplete | None:
    """Returns what a file of tensors is, if it is no model.

    Args:
      file: Its name.
      names: Of its tensors.
      adapter_config: The content of the adapter_config.json beside it, if there is one.
    """
    shard = SHARD.fullmatch(file)
    if shard is not None and int(shard[3]) > 1:
        return Incomplete(
            "one-of-several",
            f"this is shard {int(shard[2])} of {int(shard[3])} of a model",
            "Give the folder with all of them, or the index beside them",
        )
    if (adapter_config is not None and file == ADAPTER_NAME) or (names and all(map(_ADAPTER_PART.search, names))):
        return _adapter(adapter_config)
    return None


def _adapter(content: bytes | None) -> Incomplete:
    given = _object(content)
    kind, rank, targets = given.get("peft_type"), given.get("r"), given.get("target_modules")
    details = [f"rank {rank}"] if type(rank) is int else []
    if isinstance(targets, list) and targets:
        more = ", ..." if len(targets) > _SHOWN_TARGETS else ""
        details.append("for " + ", ".join(sorted(map(str, targets))[:_SHOWN_TARGETS]) + more)
    base = given.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    what = f"PEFT adapter, {kind}" if isinstance(kind, str) else "PEFT adapter"
    what += f" ({', '.join(details)})" if details else ""
    return Incomplete(
        "adapter",
        f"this is no model but a {what}" + (f" of {base}" if base else ", and it does not say of which model"),
        f"Give {base or 'the model that it belongs to'}, and this with --adapter",
    )


def _object(content: bytes | None) -> Mapping[str, object]:
    if content is None:
        return {}
    try:
        value = strict_json.loads(content, what=ADAPTER_CONFIG_NAME, max_bytes=_MAX_CONFIG_BYTES)
    except AprJaxError:
        return {}
    return value if isinstance(value, dict) else {}
