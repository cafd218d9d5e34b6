"""Gradients of a PyTorch model: of the stages that its modules show, by hooks on their tensors, and of its parameters.

What a part of the model computes is a stage, and so is what some parts read; `torch_modules` knows the same of values.
Tensors keep their gradients until the block ends; parameters give what was added to theirs in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apr_jax.engines.recorder import Recorder, as_numpy
from apr_jax.engines.roles import OUTER, OUTPUTS, Role
from apr_jax.trace.stages import GRADIENT, Key

_INPUTS = {"o": "attention", "ffn_norm": "post_attn_residual", "down": "ffn_swigl"}
"""Part -> the stage that it reads."""
_TENSORS = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "o": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}
"""Part -> the name that its parameters have in a checkpoint, without ".weight" and ".bias"."""

View = Callable[[np.ndarray], np.ndarray]


class Gradients:
    """Tensors whose gradients are wanted.

    Attributes:
      watching: Whether the forward pass goes on: what is called in the backward pass recomputes it.
    """

    def __init__(self, model: Any, roles: Mapping[str, Role], recorder: Recorder):
        self.watching = True
        self._recorder = recorder
        self._tensors: dict[str, list[tuple[Any, View]]] = {}
        self._parts: dict[str, Any] = {}
        # By identity: a head that is tied to the embedding is the same parameter once more.
        self._parameters: list[tuple[str, Any]] = []
        for name, role in sorted(roles.items(), key=lambda pair: pair[1].part == "head"):
            for kind, parameter in model.get_submodule(name).named_parameters(recurse=False):
                if role.part in _TENSORS and all(parameter is not other for _, other in self._parameters):
                    self._parameters.append((f"{_TENSORS[role.part].format(role.layer)}.{kind}", parameter))
        self._before = {name: _gradient(parameter) for name, parameter in self._parameters}

    def observe(self, role: Role, inputs: Any, outputs: Any) -> None:
        """A part was called: the tensors that it read, and those that it returned."""
        if not self.watching or not outputs:
            return
        rows = self._recorder.rows
        if role.part in OUTER:
            self._take(Key.of(None, OUTPUTS[role.part]), outputs[0], rows)
        elif role.part in ("q", "k", "v"):
            self._parts[role.part] = outputs[0]
            if all(part in self._parts for part in "qkv"):
                self._join("qkv_bias", [(self._parts.pop(part), rows) for part in "qkv"])
        elif role.part in OUTPUTS:
            self._join(OUTPUTS[role.part], [(outputs[0], rows)])
        if role.part in _INPUTS and inputs:
            self._join(_INPUTS[role.part], [(inputs[0], rows)])

    def rotated(self, outputs: Any) -> None:
        """A function rotated queries and keys."""
        if self.watching and len(outputs) == 2:
            for name, value in zip("qk", outputs, strict=True):
                self._join(f"{name}_post_rope", [(value, self._recorder.heads)])

    def softmax(self, weights: Any) -> None:
        """A softmax within a layer."""
        if self.watching and weights.ndim == 4:
            self._join("attn_softmax", [(weights, lambda value: value)])

    def _join(self, stage: str, parts: list[tuple[Any, View]]) -> None:
        self._add(Key.of(self._recorder.call.layer, stage), parts)

    def _take(self, key: str, tensor: Any, view: View) -> None:
        self._add(key, [(tensor, view)])

    def _add(self, key: str, parts: list[tuple[Any, View]]) -> None:
        if all(tensor.requires_grad for tensor, _ in parts):
            for tensor, _ in parts:
                tensor.retain_grad()
            self._tensors[key] = parts

    def collected(self) -> dict[str, np.ndarray]:
        """Returns "grad." and a stage's key, or a parameter's name -> gradient: what has one when the block ends."""
        found: dict[str, np.ndarray] = {}
        for key, parts in self._tensors.items():
            if all(tensor.grad is not None for tensor, _ in parts):
                found[GRADIENT + key] = np.concatenate([view(as_numpy(tensor.grad)) for tensor, view in parts], -1)
        for name, parameter in self._parameters:
            after, before = _gradient(parameter), self._before[name]
            if after is not None:
                found[GRADIENT + name] = after if before is None else after - before
        return found


def _gradient(parameter: Any) -> np.ndarray | None:
    return None if parameter.grad is None else np.array(as_numpy(parameter.grad))
