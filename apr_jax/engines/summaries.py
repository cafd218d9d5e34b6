"""Dumps that hold a few numbers of each stage, not its values: minimum, maximum, mean, L2 norm, sum.

"stages": {"stage.0.attn_norm": {"min": -1.2, "max": 3.4, "mean": 0.01, "l2": 12.5}, ...}     our dump.json
"data": {"Module.model.norm.Qwen2RMSNorm.forward.0": {"output": [{"Max": ..., "Norm": ...}]}}  msprobe, "statistics"
l_out-0 = (f32) ADD(...) = {896, 64, 1, 1} ... sum = -12.345678                               llama-eval-callback
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import BrokenContainerError
from apr_jax.engines import bounded, names
from apr_jax.engines.found import Found, Summary
from apr_jax.engines.roles import OUTPUTS, Role, assign, named
from apr_jax.trace.stages import Key

KINDS = ("min", "max", "mean", "l2", "sum")
_MSPROBE = {"Max": "max", "Min": "min", "Mean": "mean", "Norm": "l2"}
_MODULE = re.compile(r"(?:Module|Cell)\.(.+)\.(\w+)\.forward\.0")
_TENSOR = re.compile(r"([A-Za-z_]+(?:-\d{1,6})?)(?: \([\w ]+\))* = \(\w+\)\s+(\w+)\(.*= \{((?: *\d+ *,)* *\d+ *)\}\s*$")
_SUM = re.compile(r"\s*sum = (-?\d+\.?\d*(?:e[-+]?\d+)?|-?nan|-?inf)\s*$")
_MAX_LINE = 4096


def of_entry(entry: Mapping[str, Any], key: str, path: pathlib.Path) -> Summary:
    """Returns the numbers that a map has for a stage.

    Raises:
      BrokenContainerError: They are none.
    """
    numbers = {kind: entry[kind] for kind in KINDS if kind in entry}
    if not numbers or not all(isinstance(number, int | float) and abs(number) < 1e300 for number in numbers.values()):
        raise BrokenContainerError(
            "neither a file nor statistics of a stage",
            code="dump-map",
            file=path,
            tensor=key,
            expected=f'{{"file": "NAME.npy"}} or numbers: {", ".join(KINDS)}',
        )
    return Summary({kind: float(number) for kind, number in numbers.items()})


def is_msprobe(content: Any) -> bool:
    """Whether the content of a dump.json is msprobe's."""
    return isinstance(content, dict) and isinstance(content.get("data"), dict) and "stages" not in content


def msprobe(content: Mapping[str, Any]) -> Found:
    """Reads msprobe's statistics of what modules gave; the tokens lie beside it."""
    given: dict[str, Summary] = {}
    for name, entry in content["data"].items():
        outputs = entry.get("output") if isinstance(entry, dict) else None
        if (
            (match := _MODULE.fullmatch(name))
            and isinstance(outputs, list)
            and outputs
            and isinstance(outputs[0], dict)
        ):
            numbers = {ours: outputs[0][theirs] for theirs, ours in _MSPROBE.items() if theirs in outputs[0]}
            if numbers and all(isinstance(number, int | float) for number in numbers.values()):
                given[match[1]] = Summary({kind: float(number) for kind, number in numbers.items()})
    roles = assign([named(name) for name in given])
    found = {_key(role): given[name] for name, role in roles.items() if role.part in OUTPUTS and name in given}
    return Found({}, summaries=found)


def _key(role: Role) -> str:
    return Key.of(role.layer, OUTPUTS[role.part])


def shows_log(path: pathlib.Path) -> bool:
    """Whether a file is what llama-eval-callback printed."""
    if not path.is_file() or path.suffix not in (".txt", ".log", ".out"):
        return False
    with path.open("rb") as file:
        return any(_TENSOR.search(line) for line in file.read(1 << 20).decode("utf-8", "replace").splitlines()[:20000])


def log(path: pathlib.Path, config: Qwen2Config) -> Found:
    """Reads the sums that llama-eval-callback printed; the tokens lie beside it."""
    found: dict[str, Summary] = {}
    for name, operation, sizes, total in _printed(bounded.data(path, bounded.MAX_TEXT)):
        key = names.key_of(name, config.num_layers)
        stage = None if key is None else Key(key).stage
        if stage in (None, names.UNSCALED, "attn_softmax"):
            continue  # of all pairs, hidden ones too
        if stage in ("q_post_rope", "k_post_rope") and "ROPE" not in operation:
            continue
        if name.startswith("kqv_out") and "MUL_MAT" in operation:
            key = Key.of(Key(str(key)).layer, "attn_out")
        found[str(key)] = Summary({"sum": total}, elements=math.prod(sizes))
    return Found({}, summaries=found)


def _printed(text: bytes) -> Iterator[tuple[str, str, list[int], float]]:
    last: tuple[str, str, list[int]] | None = None
    for line in text.decode("utf-8", "replace").splitlines():
        if match := _TENSOR.search(line[-_MAX_LINE:]):
            last = match[1], match[2], [int(size) for size in match[3].split(",")]
        elif (match := _SUM.fullmatch(line[:_MAX_LINE])) and last is not None:
            yield (*last, float(match[1].replace("-nan", "nan")))
            last = None
