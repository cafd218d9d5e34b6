"""Files of tensors that are no model of their own: one shard of several, an adapter, the state of a training run.

Adapters are PEFT's and MLX's, and those of aprender, which also writes what a training run needs to go on
(`.adapter.apr` and `.ckpt.apr`: paiml/aprender, docs/specifications, "APR Checkpoint Specification" 1.3.0).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from apr_jax.converters.errors import AprJaxError, RefusedError
from apr_jax.converters.formats import strict_json

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")

_MAX_CONFIG_BYTES = 16 << 20
TRAINING = "__training__."
"""What the names of an optimizer's tensors begin with in an `.apr` of a training run."""

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
    if (adapter_config is not None and file == ADAPTER_NAME) or (names and all(map(is_adapters, names))):
        return _adapter(adapter_config)
    return None


def is_adapters(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return name.startswith("lora.") or _ADAPTER_PART.search(name) is not None


def recognise_apr(
    metadata: Mapping[str, Any], names: Collection[str], adapter_config: bytes | None
) -> Incomplete | None:
    """Returns what an `.apr` is, if it is no model; as `recognise`.

    `__checkpoint__.type` tells, else the names; a file that holds a model beside adapter or state is a model.
    """
    own = [name for name in names if not name.startswith(TRAINING)]
    stated = _checkpoint_type(metadata)
    adapted = [name for name in own if is_adapters(name)]
    if any(".layers." in name and name not in adapted for name in own):
        return None
    if stated not in ("adapter", "training") and not adapted and len(own) == len(names):
        return None
    if adapted and len(adapted) == len(names) and stated is None:
        return _adapter(adapter_config)
    given = metadata.get("adapter_config")
    config = given if isinstance(given, dict) else {}
    rank = config.get("rank", metadata.get("lora_rank"))
    details = [str(metadata.get("adapter_type", "lora"))] if adapted or stated == "adapter" else []
    details += [f"rank {rank}"] if type(rank) is int else []
    details += _targets(config.get("target_modules"))
    base = metadata.get("base_model_source")
    base = base if isinstance(base, str) and base else None
    training = training_state(metadata, names)
    what = "an adapter of aprender" if training is None else f"{training}, with an adapter"
    return Incomplete(
        "adapter",
        f"this is no model but {what}{f' ({_joined(details)})' if details else ''}"
        + (f" of {base}" if base else ", and it does not say of which model"),
        f"aprender's own programs take it beside {base or 'its model'}; --adapter is for PEFT's",
    )


def training_state(metadata: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Returns what an `.apr` holds beside the weights for a training run to go on; None if it holds nothing of it."""
    count = sum(name.startswith(TRAINING) for name in names)
    if not count and _checkpoint_type(metadata) != "training":
        return None
    given = metadata.get(TRAINING.rstrip("."))
    state = given if isinstance(given, dict) else metadata
    known = (("epoch", "epoch"), ("step", "global_step"), ("train loss", "train_loss"), ("val loss", "val_loss"))
    figures = [f"{word} {state[key]}" for word, key in known if isinstance(state.get(key), int | float)]
    said = f" ({_joined(figures)})" if figures else ""
    return f"a training checkpoint of aprender{said}, {count} of {len(names)} tensors the state of its optimizer"


def _checkpoint_type(metadata: Mapping[str, Any]) -> Any:
    """Returns "adapter" or "training" where the metadata say so, nested or with the keys joined by a dot."""
    given = metadata.get("__checkpoint__")
    return given.get("type") if isinstance(given, dict) else metadata.get("__checkpoint__.type")


def _joined(details: Collection[str]) -> str:
    return ", ".join(details)


def _targets(given: Any) -> list[str]:
    if not isinstance(given, list) or not given:
        return []
    more = ", ..." if len(given) > _SHOWN_TARGETS else ""
    return ["for " + ", ".join(sorted(map(str, given))[:_SHOWN_TARGETS]) + more]


def _adapter(content: bytes | None) -> Incomplete:
    given = _object(content)
    kind, rank = given.get("peft_type"), given.get("r")
    details = [f"rank {rank}"] if type(rank) is int else []
    details += _targets(given.get("target_modules"))
    base = given.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    what = f"PEFT adapter, {kind}" if isinstance(kind, str) else "PEFT adapter"
    what += f" ({_joined(details)})" if details else ""
    return Incomplete(
        "adapter",
        f"this is no model but a {what}" + (f" of {base}" if base else ", and it does not say of which model"),
        f"Give {base or 'the model that it belongs to'}, and the folder of this with --adapter",
    )


def _object(content: bytes | None) -> Mapping[str, Any]:
    if content is None:
        return {}
    try:
        value = strict_json.loads(content, what=ADAPTER_CONFIG_NAME, max_bytes=_MAX_CONFIG_BYTES)
    except AprJaxError:
        return {}
    return value if isinstance(value, dict) else {}
