"""What is written down of another engine's calls, and how it becomes a dump that `parity` reads.

An engine's modules tell a `Recorder` what went in and came out of each part; it knows which stages those are. Calls
follow each other as a prompt and decoding steps do: the second goes on where the first one ended. Layers are counted in
order of execution, so that one which is run twice or left out is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from apr_jax.converters.errors import DumpError, RefusedError, UsageError
from apr_jax.converters.storage.output import FolderKind, atomic_folder, check_target
from apr_jax.engines.roles import Part, Role
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.stages import Key

MAP = "dump.json"
_NAMES = {"float16": "float16", "float32": "float32", "float64": "float64", "bfloat16": "bfloat16"}
DUMP = FolderKind(
    "captured dump",
    holds=lambda name: name == MAP or re.fullmatch(r"[\w.]+\.(npy|raw)", name) is not None,
    shows=lambda name: name == MAP,
)
_REQUIRED = ("embedding", "q", "k", "v", "o", "gate", "up", "down", "final_norm")
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_HIDDEN = -1e8
"""Scores below this are those of keys that a mask hides: an additive mask's value, or minus infinity."""


@dataclasses.dataclass
class _Call:
    """What one call of the model showed; values are [B, t, ...], attention stages [B, N, t, S].

    `given` are the token ids that the model was called with, `ids` those that are known to have been looked up.
    """

    given: np.ndarray | None = None
    ids: np.ndarray | None = None
    mask: np.ndarray | None = None
    positions: np.ndarray | None = None
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    layer: int = -1
    standing: int | None = None
    parts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    adds: bool = False


class Recorder:
    """Takes the values of stages.

    Attributes:
      calls: What was seen of each call of the model.
      vocabulary: Rows of the embedding; None if they are not known.
      gradients: "grad." and a stage's key, or a parameter's name -> gradient.
      labels: What the loss was given, [B, T]; None if all tokens count.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.vocabulary: int | None = None
        self.gradients: dict[str, np.ndarray] = {}
        self.labels: np.ndarray | None = None

    def expect(self, parts: Sequence[Part], roles: Mapping[str, Role]) -> None:
        """Is told what the tree holds; warns of parts that were not found."""
        self.vocabulary = next(
            (part.shape[0] for part in parts if part.shape and roles.get(part.name) == Role("embedding")), None
        )
        found = {role.part for role in roles.values()}
        missing = [part for part in _REQUIRED if part not in found and _FUSED.get(part) not in found]
        if missing:
            warnings.warn(
                f"no module was found for: {', '.join(missing)}. Their stages are not captured; names="
                f'{{"{missing[0]}": "the end of its path"}} says where they are',
                stacklevel=5,
            )

    @property
    def call(self) -> _Call:
        """The call that is going on."""
        if not self.calls:
            self.calls.append(_Call())
        return self.calls[-1]

    def begin(
        self, mask: np.ndarray | None = None, positions: np.ndarray | None = None, ids: np.ndarray | None = None
    ) -> None:
        """A call of the model begins; `mask`, `positions` and token `ids` are what it was given, if it was."""
        self.calls.append(_Call(ids, mask=mask, positions=positions))

    def __call__(self, key: str, value: Any) -> Any:
        """Takes a stage's value [B, t, ...] under its key ("stage.0.attn_norm"), and returns the value as it is."""
        self.call.values[key] = np.array(as_numpy(value))
        return value

    # --- What modules show ---------------------------------------------------------------------------------------

    def enter(self, layer: int | None, inputs: Sequence[Any] = ()) -> None:
        """A layer begins: the number is its place in the tree, what counts is the order of execution.

        Where no module looks the tokens up, the first of the first layer's `inputs` is what they became.
        """
        if inputs and self.call.ids is None and self.call.given is not None:
            self._embedding([self.call.given], inputs)
        self.call.layer += 1
        self.call.standing = layer
        self.call.parts.clear()

    def told(self, stage: str, value: Any) -> Any:
        """A stage of the layer that is going on, told by the layer itself; returns the value as it is."""
        return self(Key.of(self.call.layer, stage), value)

    def leave(self, outputs: Sequence[Any], layer: int | None = None) -> None:
        """A layer ends; `layer` is which, where that is all that is known of it."""
        if layer is not None and layer != self.call.standing:
            self.enter(layer)
        if outputs and not self.call.adds:
            self._put("post_ffn_residual", outputs[0])
        self.call.standing = None

    def observe(self, role: Role, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """A part of the model was called: arrays that went in, before anything changed them, and that came out."""
        call = self.call
        if role.layer is not None and role.part not in ("rotary", "act") and role.layer != call.standing:
            self.enter(role.layer)
        if not outputs:
            return
        getattr(self, f"_{role.part}")(inputs, outputs)

    def _embedding(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        if self.call.ids is None and inputs:
            self.call.ids = inputs[0]
            if self.call.ids.ndim == 1:
                self.call.ids = self.call.ids[None]
        self._put("embedding", outputs[0], outer=True)

    def _normed(
        self, stage: str, before: str, inputs: Sequence[Any], outputs: Sequence[Any], outer: bool = False
    ) -> None:
        """A norm, alone or with the addition of the residual stream before it, which is then its second output."""
        self._put(stage, outputs[0], outer)
        if len(outputs) > 1:  # a norm alone has one output
            self.call.adds = True
            place = self.call.layer - (before == "post_ffn_residual" and not outer)
            self._put(before, outputs[1], layer=place)
        elif inputs and before == "post_attn_residual":
            self._put(before, inputs[0])

    def _attn_norm(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._normed("attn_norm", "post_ffn_residual", inputs, outputs)

    def _ffn_norm(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._normed("ffn_norm", "post_attn_residual", inputs, outputs)

    def _final_norm(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._normed("final_norm", "post_ffn_residual", inputs, outputs, outer=True)

    def _q(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._projected("q", inputs, outputs)

    def _k(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._projected("k", inputs, outputs)

    def _v(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._projected("v", inputs, outputs)

    def _projected(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("attn_norm", inputs)
        self.call.parts[name] = self.rows(outputs[0])
        if all(part in self.call.parts for part in "qkv"):
            self._put("qkv_bias", np.concatenate([self.call.parts[part] for part in "qkv"], -1))

    def _qkv(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("attn_norm", inputs)
        self._put("qkv_bias", outputs[0])

    def _rotary(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        del inputs
        self.rotated(outputs)

    def rotated(self, outputs: Sequence[Any]) -> None:
        """A function or module that may have rotated q, k or both: only widths that fit say that it did."""
        call = self.call
        projected = call.values.get(Key.of(call.layer, "qkv_bias"))
        if projected is None or call.standing is None:
            return
        rows = [self.heads(value) for value in outputs[:2] if value.ndim >= 2]
        if len(rows) == 1:
            rows = [*([call.parts["rotated"]] if "rotated" in call.parts else []), *rows]
            call.parts["rotated"] = rows[0]
        if len(rows) != 2 or rows[0].shape[-1] + 2 * rows[1].shape[-1] != projected.shape[-1]:
            return
        for name, value in zip("qk", rows, strict=True):
            self._put(f"{name}_post_rope", value)

    def softmax(self, scores: Any, weights: Any) -> None:
        """A softmax within a layer, of scores with the mask in them."""
        if self.call.standing is None or Key.of(self.call.layer, "attn_out") in self.call.values:
            return
        if (kept := self._pairs(weights)) is not None and (masked := self._pairs(scores)) is not None:
            limit = max(_HIDDEN, float(ml_dtypes.finfo(masked.dtype).min) / 2)
            self._put_pairs("attn_scores", np.where(masked <= limit, np.zeros((), masked.dtype), masked))
            self._put_pairs("attn_softmax", kept)

    def activated(self, inputs: Any, outputs: Any) -> None:
        """An activation function within a layer."""
        up = self.call.values.get(Key.of(self.call.layer, "ffn_norm"))
        if up is not None and self.call.standing is not None and inputs.shape == outputs.shape and outputs.ndim > 1:
            self._put("ffn_silu", outputs)

    def _attention(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        del inputs
        for value in outputs[1:]:
            if (weights := self._pairs(value)) is not None:
                self._put_pairs("attn_softmax", weights)

    def _core(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        del inputs
        self._put("attention", outputs[0])

    def _o(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("attention", inputs)
        self._put("attn_out", outputs[0])

    def _gate(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("ffn_norm", inputs)
        self._put("ffn_gate", outputs[0])

    def _up(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("ffn_norm", inputs)
        self._put("ffn_up", outputs[0])

    def _gate_up(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("ffn_norm", inputs)
        for stage, half in zip(("ffn_gate", "ffn_up"), np.split(self.rows(outputs[0]), 2, axis=-1), strict=True):
            self._put(stage, half)

    def _act(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        if inputs:
            self.activated(inputs[0], outputs[0])

    def _down(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._default("ffn_swigl", inputs)
        self._put("ffn_out", outputs[0])

    def _head(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        del inputs
        self.call.values[stages.LOGITS] = self._logits(outputs[0])

    def returned(self, value: Any) -> None:
        """What the model returned: logits, where no module of its own makes them and the width is the vocabulary's."""
        if stages.LOGITS not in self.call.values and value.ndim >= 2 and value.shape[-1] == self.vocabulary:
            self.call.values[stages.LOGITS] = self._logits(value)

    def _logits(self, value: Any) -> np.ndarray:
        batch = self._shape()[0]
        return np.array(value).reshape(batch, -1, value.shape[-1])

    # --- Shapes --------------------------------------------------------------------------------------------------

    def _shape(self) -> tuple[int, int]:
        if self.call.ids is None:
            raise UsageError(
                "a layer was called before the embedding was, so the token ids are not known",
                code="capture-ids",
                hint='Call the whole model, or say which module is the embedding: names={"embedding": "..."}.',
            )
        batch, length = self.call.ids.shape
        return batch, length

    def rows(self, value: Any) -> np.ndarray:
        """Any order of [B, t, ...], flat or not -> [B, t, width]."""
        batch, length = self._shape()
        array = np.array(value)
        if array.ndim > 2 and array.shape[:2] == (length, batch) and array.shape[:2] != (batch, length):
            array = array.swapaxes(0, 1)
        if array.size % (batch * length) or not array.size:
            raise DumpError(
                "a module's output does not fit the token ids",
                code="capture-shape",
                found=list(array.shape),
                expected=f"[{batch}, {length}, ...]",
            )
        return array.reshape(batch, length, -1)

    def heads(self, value: Any) -> np.ndarray:
        """[B, heads, t, H] or any order that `rows` takes -> [B, t, heads * H]."""
        batch, length = self._shape()
        array = np.asarray(value)
        if array.ndim == 4 and array.shape[0] == batch and array.shape[2] == length:
            array = array.swapaxes(1, 2)
        return self.rows(array) if array.size and array.size % (batch * length) == 0 else np.zeros((1, 1, 0))

    def _pairs(self, value: Any) -> np.ndarray | None:
        """[B, N, t, S], [B * N, t, S] or [B, K, G, t, S] -> [B, N, t, S]; None if it is nothing of that kind."""
        batch, length = self._shape()
        if value.ndim < 3 or value.shape[-2] != length or value.shape[-1] < length:
            return None
        heads, rest = divmod(int(np.prod(value.shape[:-2])), batch)
        return None if rest else np.array(value).reshape(batch, heads, *value.shape[-2:])

    def _put(self, stage: str, value: Any, outer: bool = False, layer: int | None = None) -> None:
        place = None if outer else self.call.layer if layer is None else layer
        self.call.values[Key.of(place, stage)] = self.rows(value)

    def _put_pairs(self, stage: str, value: np.ndarray) -> None:
        self.call.values[Key.of(self.call.layer, stage)] = value

    def _default(self, stage: str, inputs: Sequence[Any]) -> None:
        """What a projection was given, where no module said so."""
        if inputs and Key.of(self.call.layer, stage) not in self.call.values:
            self._put(stage, inputs[0])


# --- The dump --------------------------------------------------------------------------------------------------------


def as_numpy(value: Any) -> np.ndarray:
    """Returns a torch tensor, a JAX array or anything NumPy takes as a NumPy array, bfloat16 kept."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            return np.asarray(value.contiguous().view(dtype=_torch_dtype(value, "uint16")).numpy()).view(
                ml_dtypes.bfloat16
            )
        if "float8" in str(value.dtype):
            value = value.float()
        return np.asarray(value.numpy())
    return np.asarray(value)


def _torch_dtype(value: Any, name: str) -> Any:
    import importlib

    del value
    return getattr(importlib.import_module("torch"), name)


@contextlib.contextmanager
def recording(folder: str | os.PathLike[str], input_ids: Any = None, force: bool = False) -> Iterator[Recorder]:
    """Records calls and writes them as a dump at the end; nothing is written if the block raises.

    Args:
      folder: Where to.
      input_ids: All tokens [B, T] from the first position on, where the recorded calls are decoding steps after others.
      force: Whether an earlier dump may be replaced.
    """
    check_target(os.fspath(folder), folder=DUMP, force=force)
    recorder = Recorder()
    yield recorder
    inputs, values, positions = joined(recorder.calls, input_ids)
    write(folder, inputs, {**values, **recorder.gradients}, positions, force, recorder.labels)


def joined(calls: Sequence[_Call], input_ids: Any) -> tuple[Inputs, dict[str, np.ndarray], list[list[int]] | None]:
    """Puts the calls of one run one behind the other: their inputs, values and, for steps alone, their positions.

    Raises:
      RefusedError: No call showed a stage.
      UsageError: The tokens are not the last ones of `input_ids`.
    """
    calls = [call for call in calls if call.ids is not None and call.values]
    if not calls:
        raise RefusedError(
            "nothing was captured",
            code="nothing-captured",
            hint="Call the model itself inside the context: hooks see neither compiled modules nor `.forward(...)`.",
        )
    ids = np.concatenate([call.ids for call in calls if call.ids is not None], axis=1)
    length = ids.shape[1]
    whole = ids if input_ids is None else np.atleast_2d(np.asarray(as_numpy(input_ids)))
    before = whole.shape[1] - length
    if before < 0 or not np.array_equal(whole[:, before:], ids):
        raise UsageError(
            "the tokens that were run are not the last ones of input_ids",
            code="input-ids",
            found=f"{length} captured, {whole.shape[1]} given",
            hint="Give all tokens of the sequence, those that a cache holds first",
        )
    inputs = _inputs(calls, whole, before)
    values: dict[str, np.ndarray] = {}
    for key in calls[0].values:
        blocks = [call.values[key] for call in calls if key in call.values]
        if Key(key).per_pair:
            blocks = [_padded(block[..., : whole.shape[1]], whole.shape[1]) for block in blocks]
        joined = np.concatenate(blocks, axis=2 if Key(key).per_pair else 1)
        rows = joined.shape[2 if Key(key).per_pair else 1]
        if rows == length:
            values[key] = joined
        elif key == stages.LOGITS:
            values[key] = joined[:, -1:]  # of a prompt whose last logits alone were computed
    positions = None
    if before:
        positions = inputs.position_ids[:, before:].tolist()
    return inputs, values, positions


def _padded(block: np.ndarray, length: int) -> np.ndarray:
    """Keys that a call did not have yet are hidden: 0."""
    return np.pad(block, [(0, 0)] * 3 + [(0, length - block.shape[-1])])


def _inputs(calls: Sequence[_Call], whole: np.ndarray, before: int) -> Inputs:
    """The batch: what the last call says of the mask, what all of them say of positions."""
    mask = calls[-1].mask
    if mask is None or mask.ndim != 2 or mask.shape != whole.shape:
        masks = [call.mask for call in calls if call.mask is not None and call.ids is not None]
        fits = (
            len(masks) == len(calls)
            and not before
            and all(
                mask.shape == call.ids.shape for mask, call in zip(masks, calls, strict=True) if call.ids is not None
            )
        )
        mask = np.concatenate(masks, axis=1) if fits else None
    given = [call.positions for call in calls if call.positions is not None]
    positions = None
    if len(given) == len(calls) and not before:
        rows = [
            np.broadcast_to(np.atleast_2d(each), call.ids.shape)
            for each, call in zip(given, calls, strict=True)
            if call.ids is not None
        ]
        positions = np.concatenate(rows, axis=1)
    return Inputs.of(whole, None if mask is None else (mask != 0).astype(np.int32), positions)


def write(
    folder: str | os.PathLike[str],
    inputs: Inputs,
    values: Mapping[str, np.ndarray],
    positions: list[list[int]] | None = None,
    force: bool = False,
    labels: np.ndarray | None = None,
) -> None:
    """Writes a dump with its map, atomically: .npy where NumPy knows the dtype, raw bytes for bfloat16.

    Raises:
      RefusedError: There is nothing to write, or values of a dtype that no dump has.
      UsageError: The folder exists and `force` is not given, or it holds something else.
    """
    if not values:
        raise RefusedError(
            "no stage was captured", code="nothing-captured", hint="docs/dumps.md says what stages there are."
        )
    entries, files = {}, {}
    for key, value in values.items():
        dtype = str(value.dtype)
        if dtype not in _NAMES:
            raise DumpError("a stage does not hold floats", code="dump-dtype", tensor=key, found=dtype)
        name = f"{key}.{'raw' if dtype == 'bfloat16' else 'npy'}"
        entries[key] = {"file": name, "dtype": dtype}
        files[name] = value.tobytes() if dtype == "bfloat16" else _npy(value)
    content = {name: getattr(inputs, name).tolist() for name in ("input_ids", "attention_mask", "position_ids")}
    content |= {"dtype": _dtype(values), "stages": entries}
    if labels is not None:
        content["labels"] = labels.tolist()
    if positions is not None:
        content["positions"] = positions
    files[MAP] = json.dumps(content).encode()
    with atomic_folder(os.fspath(folder), sum(map(len, files.values())), kind=DUMP, force=force) as output:
        for name, data in files.items():
            with output.create(name, len(data)) as file:
                file.write_at(data, 0)


def _npy(value: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def _dtype(values: Mapping[str, np.ndarray]) -> str:
    """What the engine computes in: the dtype of most stages."""
    names = [str(value.dtype) for value in values.values()]
    return max(sorted(set(names)), key=names.count)
