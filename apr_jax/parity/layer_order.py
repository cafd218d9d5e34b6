"""Which layer's weights each dumped layer was computed with: layers in another order, left out, or run twice."""

from __future__ import annotations

import dataclasses
import time
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
_FEW_PERCENT = 0.02
"""Relative to the values: what is less is no other layer, but rounding or a mistake within the right one."""
_EXPLAINS = 0.1
"""What another order leaves at most of the difference."""
_SECONDS = 30.0
"""As long orders are tried at a stage, behind layer outputs or logits alone."""


def execution_order(
    exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray]
) -> tuple[list[int], Mistake | None]:
    """Which layer's weights each dumped layer was computed with, and what that order is called."""
    layers = exact.config.num_layers
    dumped = 1 + max((layer for key in theirs if (layer := Key(key).layer) is not None), default=-1)
    if not dumped and theirs.keys() == {stages.LOGITS}:
        order = _order_behind_logits(exact, inputs, theirs[stages.LOGITS])
    elif {Key(key).stage for key in theirs if Key(key).layer is not None} == {"post_ffn_residual"}:
        order = _order_of_outputs(exact, inputs, theirs, dumped)
    else:
        count = dumped if dumped > layers or _ends_after(exact, inputs, theirs, dumped) else layers
        order = [_weights_of(exact, inputs, theirs, layer) for layer in range(count)]
    return order, _called(order, layers)


def _called(order: list[int], layers: int) -> Mistake | None:
    """What an order of execution is called; None is the right one."""
    if order == list(range(layers)):
        return None
    for layer in range(layers):
        if order == [index for index in range(layers) if index != layer]:
            return SKIPPED.made(layer=layer)
        if order == sorted([*range(layers), layer]):
            return REPEATED.made(layer=layer)
    return ORDER.made(order=tuple(order))


def _order_of_outputs(exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], dumped: int) -> list[int]:
    """The order behind layer outputs alone: each is made of the one before it by some layer, its own in doubt."""
    layers, order = exact.config.num_layers, list[int]()
    for layer in range(dumped):
        own = min(layer, layers - 1)
        candidates = [own, *(other for other in range(layers) if other != own)]
        orders = [[*range(layer), candidate] for candidate in candidates]
        order.append(_first_that_fits(exact, inputs, theirs, Key.of(layer, "post_ffn_residual"), orders)[-1])
    skipped = _called(order, layers)
    # Behind what was dumped the layers go on; HuggingFace's hidden states hold no output of the last one.
    ends = order != list(range(dumped)) or _ends_after(exact, inputs, theirs, dumped)
    return order if ends and skipped is not None and skipped.fault is SKIPPED else order + list(range(dumped, layers))


def _order_behind_logits(exact: LanguageModel, inputs: Inputs, logits: np.ndarray) -> list[int]:
    """The order behind logits alone, among those that engines run by mistake: the right one if none gives them."""
    right = list(range(exact.config.num_layers))
    skipped = [right[:layer] + right[layer + 1 :] for layer in right] if len(right) > 1 else []
    repeated = [sorted([*right, layer]) for layer in right]
    swapped = [[*right[:i], i + 1, i, *right[i + 2 :]] for i in right[:-1]]
    orders = [right, *skipped, *repeated, right[::-1], *swapped]
    return _first_that_fits(exact, inputs, {stages.LOGITS: logits}, stages.LOGITS, orders)


def _first_that_fits(
    exact: LanguageModel, inputs: Inputs, theirs: Mapping[str, np.ndarray], key: Key, orders: Sequence[list[int]]
) -> list[int]:
    """The first order of layers that gives a value from the outputs before it; the first of all if none does.

    A query sees what is before it, so that the first tokens of each row tell.
    """
    if theirs[key].shape[1] != inputs.input_ids.shape[1] or not np.isfinite(theirs[key]).all():
        return orders[0]
    tokens = inputs.attention_mask == 1
    some = slice(0, int(tokens.argmax(axis=1).max()) + _ENOUGH_POSITIONS)
    few = Inputs(inputs.input_ids[:, some], inputs.attention_mask[:, some], inputs.position_ids[:, some])
    shown = {other: values[:, some] for other, values in theirs.items() if other != key}
    wanted, counted, started = theirs[key][:, some], tokens[:, some], time.thread_time()
    enough = _FEW_PERCENT * float(np.linalg.norm(wanted[counted]))
    for tried, order in enumerate(orders):
        model = reordered(exact, order)
        value = Replay(model.config, model.parameters, few, shown).compute(key)
        distance = float(np.linalg.norm((value - wanted)[counted]))
        if distance <= enough:
            return order
        if tried == 0:
            enough = _EXPLAINS * distance
        if time.thread_time() - started > _SECONDS:
            break
    return orders[0]


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
