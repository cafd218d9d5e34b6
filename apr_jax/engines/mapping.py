"""Arrays under an engine's own names, written under ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from apr_jax.converters.errors import DumpError, UsageError
from apr_jax.engines import recorder
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.stages import Key

_OUTER = ("embedding", "final_norm", "logits")


def write(
    folder: str | os.PathLike[str],
    input_ids: Any,
    values: Mapping[str, Any],
    names: Mapping[str, str] | None,
    attention_mask: Any,
    position_ids: Any,
    positions: Any,
    force: bool,
) -> None:
    """See `apr_jax.capture.arrays`."""
    ids, mask, places = (
        None if each is None else recorder.as_numpy(each) for each in (input_ids, attention_mask, position_ids)
    )
    inputs = Inputs.of(ids, mask, places)
    taken = {name: recorder.as_numpy(value) for name, value in renamed(values, names).items()}
    if not taken:
        raise DumpError(
            "no array has a name of the mapping",
            code="nothing-captured",
            found=", ".join(sorted(values)[:8]) or "no arrays",
            expected=", ".join((names or {}).values()) or "keys such as stage.0.attn_norm, logits",
        )
    rows = None if positions is None else np.asarray(positions).tolist()
    recorder.write(folder, inputs, taken, rows, force)


def renamed(values: Mapping[str, Any], names: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns trace key -> value, by a mapping of stage -> the engine's name with "{layer}" in it.

    Raises:
      UsageError: A stage that there is none of, or a stage of a layer without "{layer}".
    """
    if names is None:
        return {key: value for key, value in values.items() if Key(key).is_inner or key == stages.LOGITS}
    found: dict[str, Any] = {}
    for stage, theirs in names.items():
        inner = stage in stages.LAYER_STAGES
        if not inner and stage not in _OUTER:
            raise UsageError(
                "no such stage", code="capture-names", found=stage, expected=", ".join((*_OUTER, *stages.LAYER_STAGES))
            )
        if inner and "{layer}" not in theirs:
            raise UsageError(
                "a stage of a layer needs {layer} in its name",
                code="capture-names",
                found=theirs,
                hint='As in "blocks.{layer}.attn_out"',
            )
        pattern = re.compile(re.escape(theirs).replace(re.escape("{layer}"), r"(\d{1,6})"))
        for name, value in values.items():
            if match := pattern.fullmatch(name):
                found[Key.of(int(match[1]) if inner else None, stage)] = value
    return found
