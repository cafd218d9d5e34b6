"""Which layer's weights each dumped layer was computed with: layers in another order, left out, or run twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.faults.outside import ORDER, REPEATED, SKIPPED
from apr_jax.parity.faults.record import Mistake
from apr_jax.parity.replay import Replay
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.stages import Key

_TELLING = ("qkv_matmul", "qkv_bias", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
_BY_POSITION = ("qkv_matmul", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl")
"""What may be missing before a telling stage: each position is computed from itself alone."""
_ENOUGH_POSITIONS = 16


def execution_order(
    exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray]
) -> tuple[list[int], Mistake | None]:
    """Which layer's weights each dumped layer was computed with, and what that order is called."""
    layers = exact.config.num_layers
    dumped = 1 + max((layer for key in theirs if (layer := Key(key).layer) is not None), default=-1)
    count = dumped if dumped > layers or _ends_after(exact, inputs, theirs, dumped) else layers
    order = [_weights_of(exact, inputs, theirs, layer) for layer in range(count)]
    if order == list(range(layers)):
        return order, None
    for layer in range(layers):
        if order == [index for index in range(layers) if index != layer]:
            return order, SKIPPED.made(layer=layer)
        if order == sorted([*range(layers), layer]):
            return order, REPEATED.made(layer=layer)
    return order, ORDER.made(order=tuple(order))


def _ends_after(exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], dumped: int) -> bool:
    """Whether the final norm follows the last dumped layer: else the layers behind it ran and were not dumped."""
    source = Key.of(dumped - 1, "post_ffn_residual")
    if source not in theirs or stages.FINAL_NORM not in theirs:
        return False
    config = dataclasses.replace(exact.config, num_layers=dumped)
    few = np.unique(np.linspace(0, theirs[source].shape[1] - 1, _ENOUGH_POSITIONS).astype(int))
    whole = theirs[source].shape[1] == inputs.input_ids.shape[1]
    tokens = (inputs.attention_mask == 1 if whole else np.ones(theirs[source].shape[:2], bool))[:, few]
    right = Replay(config, exact.parameters, inputs, {source: theirs[source]}, rows=few).compute(stages.FINAL_NORM)
    found = theirs[stages.FINAL_NORM][:, few]
    return float(np.linalg.norm((found - right)[tokens])) <= 0.05 * float(np.linalg.norm(right[tokens]))


def _weights_of(exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], layer: int) -> int:
    """The layer of the file whose matrices reproduce most products of a dumped layer; its own number in doubt."""
    count, votes = exact.config.num_layers, dict[int, int]()
    dumped = {stage for stage in stages.LAYER_STAGES if Key.of(layer, stage) in theirs}
    for stage in _TELLING:
        if stage not in dumped or (stage == "qkv_bias" and "qkv_matmul" in dumped):
            continue
        best = _vote(exact, inputs, {name: theirs[Key.of(layer, name)] for name in dumped}, stage, layer)
        if best is not None:
            votes[best] = votes.get(best, 0) + 1
    if layer < count and (not votes or votes.get(layer, 0) >= max(votes.values())):
        return layer
    # One matrix of another layer is a mistake of its own; a layer's place is told by most of them.
    best, most = max(votes.items(), key=lambda pair: pair[1], default=(min(layer, count - 1), 0))
    return best if most >= 2 else min(layer, count - 1)


def _vote(exact: LanguageModel, inputs: Inputs, dumped: Mapping[str, np.ndarray], stage: str, layer: int) -> int | None:
    """The layer of the file that makes one stage of a layer out of the others that were dumped of it; None if none."""
    count, length = exact.config.num_layers, dumped[stage].shape[1]
    few = np.unique(np.linspace(0, length - 1, _ENOUGH_POSITIONS).astype(int))
    whole = length == inputs.input_ids.shape[1]
    tokens = (inputs.attention_mask == 1 if whole else np.ones(dumped[stage].shape[:2], bool))[:, few]
    wanted = dumped[stage][:, few]
    if not np.isfinite(wanted[tokens]).all():
        return None
    enough, distances = 0.05 * float(np.linalg.norm(wanted[tokens])), []
    # Its own layer first: it is seldom another one's.
    for candidate in sorted(range(count), key=lambda index: index != layer):
        key = Key.of(candidate, stage)
        moved: dict[str, np.ndarray] = {Key.of(candidate, name): values for name, values in dumped.items()}
        replay = Replay(exact.config, exact.parameters, inputs, moved, rows=few)
        if any(before.stage not in _BY_POSITION or before.layer != candidate for before in replay.undumped(key)[:-1]):
            return None
        value = replay.compute(key)
        distances.append((float(np.linalg.norm((value - wanted)[tokens])), candidate))
        if candidate == layer and distances[-1][0] <= enough:
            break
    distance, best = min(distances)
    return best if distance <= enough else None


def reordered(model: LanguageModel, order: Sequence[int]) -> LanguageModel:
    """Returns the model whose layer n is layer order[n] of the given one."""
    outer = model.parameters["model"]
    layers = {place: outer["layers"][source] for place, source in enumerate(order)}
    config = dataclasses.replace(model.config, num_layers=len(order))
    parameters = {**model.parameters, "model": {**outer, "layers": layers}}
    return LanguageModel(config, parameters, model.device, model.ops)
