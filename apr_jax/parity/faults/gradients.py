"""Mistakes of a backward pass that stages' gradients show: RoPE, attention, norms, residuals, the MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import erf

from apr_jax.parity import round_numbers
from apr_jax.parity.backward import nodes
from apr_jax.parity.backward.replay import Backward, Place, sigmoid
from apr_jax.parity.faults.record import UNION, Fault
from apr_jax.parity.replay import NORMS, QKV, Replay, Value, unjoin
from apr_jax.trace.stages import Key

_NORM_INPUTS = (nodes.OUTPUT, nodes.INPUT, "grad.post_attn_residual")
_INPUTS = {"attention": nodes.INPUT, "mlp": "grad.post_attn_residual"}
_BLOCKS = {"attention": "attention", "mlp": "the MLP"}


# --- RoPE ------------------------------------------------------------------------------------------------------------


def _projections(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """Queries and keys, or one of them."""
    yield from ({"of": of} for of in ("q and k", "q", "k"))


def _is_of(at: Place, of: str) -> bool:
    return at.what[0] in of.split(" and ")


def _rope(name: str, wording: str, changes: Mapping[str, Callable[..., Any]], formula: str) -> Fault:
    def only(change: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda right, at, of: change(right) if _is_of(at, of) else right

    changed = {step: only(change) for step, change in changes.items()}
    return Fault(name, wording, ("grad.qkv_bias",), changed, variants=_projections, formula=formula)


def _forwards(turns: Value) -> Value:
    cos, sin = turns
    return np.stack([cos, -sin[::-1]])


# --- Attention -------------------------------------------------------------------------------------------------------


def _unmasked(weights: Value, at: Place, mask: str, of: str) -> Value:
    """exp(s - log sum exp over what is seen), for what a backward kernel takes for seen."""
    back = at.replay
    if at.what not in of.split(" and "):
        return weights
    q, k = (unjoin(back.value(at.layer, f"{name}_post_rope"), back.config).swapaxes(1, 2) for name in "qk")
    forward = back.at(at.layer, "attn_scores")
    raw = q @ k[:, forward.kv_heads()].swapaxes(2, 3) * forward.step("scale", back.config.head_dim**-0.5)
    seen = back.visible(at.layer)
    top = np.where(seen, raw, -np.inf).max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    total = np.where(seen, np.exp(np.minimum(raw - top, 0.0)), 0.0).sum(-1, keepdims=True)
    tokens = back.forward.inputs.attention_mask == 1
    taken = np.ones_like(seen) & (seen.any(-1, keepdims=True))
    if mask == "causal":
        taken = taken & tokens[:, None, None, :]
    elif mask == "padding":
        taken = taken & np.tril(np.ones(seen.shape[-2:], bool))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.asarray(np.where(taken, np.exp(np.minimum(raw - top, 700.0)) / np.where(total > 0, total, 1.0), 0.0))


def _masks(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    of = "scores" if question.kind_of(node) == "grad.attn_scores" else "v"
    padded = not (question.back.forward.inputs.attention_mask == 1).all()
    for mask in ("causal", *(("padding", "causal and padding") if padded else ())):
        yield {"mask": mask, "of": of}


def _scales(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    of = question.kind_of(node).removeprefix("grad.")[0]
    yield from ({"how": how, "of": of} for how in ("missing", "there twice"))


def _grouped(name: str, wording: str, gather: Callable[..., Value], formula: str) -> Fault:
    def change(right: Any, at: Place, of: str) -> Any:
        return gather if at.what in of.split(" and ") else right

    def variants(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
        config = question.back.config
        if config.num_heads > config.num_kv_heads:
            yield {"of": "k" if question.kind_of(node) == "grad.k_post_rope" else "v"}

    kinds = {"k": ("grad.k_post_rope",), "v": ("grad.qkv_bias",)}
    return Fault(
        name,
        wording,
        (*kinds["k"], *kinds["v"]),
        {"group": change},
        variants=variants,
        merge={"of": UNION},
        among=lambda of: kinds[of],
        formula=formula,
    )


# --- Norms -----------------------------------------------------------------------------------------------------------


_NORM_OF = {nodes.OUTPUT: "final_norm", nodes.INPUT: "attn_norm", "grad.post_attn_residual": "ffn_norm"}
"""The norm that a gradient goes back through."""


def _norm_of(question: Any, node: Key) -> str:
    kind = question.kind_of(node)
    if kind != nodes.NORM_WEIGHT:
        return _NORM_OF[kind]
    return next(stage for stage, weight in NORMS.items() if weight == nodes.tensor_of(node)[1])


def _norms(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    yield {"norms": (_norm_of(question, node),)}


def _inputs_of(norms: Sequence[str]) -> tuple[str, ...]:
    return tuple(kind for kind, norm in _NORM_OF.items() if norm in norms)


def _in_norm(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda right, at, norms, **rest: change(right, **rest) if at.what in norms else right


def _epsilons(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    """The values that engines have, and what this gradient asks for."""
    right, norms = question.back.config.rms_norm_eps, (_norm_of(question, node),)
    known = [eps for eps in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3) if eps != right]
    if question.node == node:
        grid = tuple(10.0**power for power in range(-12, -1))
        solved = question.solved(lambda eps: EPS.made(eps=eps, norms=norms), grid)
        known += round_numbers.epsilons(solved, 1e-3 * solved)[:1] if solved is not None else []
    yield from ({"eps": eps, "norms": norms} for eps in dict.fromkeys(known))


EPS = Fault(
    "backward-norm-eps",
    "RMSNorm's eps is {eps:.6g} in the backward pass of {norms}",
    (*_NORM_INPUTS, nodes.NORM_WEIGHT),
    {"norm_eps": _in_norm(lambda right, eps: eps)},
    variants=_epsilons,
    merge={"norms": UNION},
    among=lambda eps, norms: (*_inputs_of(norms), nodes.NORM_WEIGHT),
    formula={
        **dict.fromkeys(_NORM_INPUTS, "r = 1 / √(mean(x²) + {eps:.6g})"),
        nodes.NORM_WEIGHT: "dw = Σ g · x / √(mean(x²) + {eps:.6g})",
    },
)


# --- Residuals and the MLP -------------------------------------------------------------------------------------------


def _dropped(what: str, step: str, block: str) -> Fault:
    name = f"backward-{block}-{'residual' if step == 'along' else 'branch'}-missing"
    wording = {
        "along": f"nothing passes along the residual around {_BLOCKS[block]}",
        "branch": f"nothing passes through {_BLOCKS[block]}, only along the residual",
    }[step]
    change = {step: lambda right, at: np.zeros_like(right) if at.what == block else right}
    return Fault(name, wording, (_INPUTS[block],), change, formula=f"dx = {what}")


def _gelu(x: Value) -> Value:
    return np.asarray(0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi))


def _gelu_tanh(x: Value) -> Value:
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = np.tanh(inner)
    return np.asarray(0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


_DERIVATIVES = {"GELU (erf)": _gelu, "GELU (tanh)": _gelu_tanh, "ReLU": lambda x: (x > 0).astype(x.dtype)}


def _exchanged_results(stage: str, at: Place, what: str) -> str:
    return {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}[stage] if what == "results" else stage


def _exchanges(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    kind = question.kind_of(node)
    yield from ({"what": what} for what in ("factors", "results") if kind in _EXCHANGED[what])


_EXCHANGED = {"factors": ("grad.ffn_silu", "grad.ffn_up"), "results": ("grad.ffn_gate", "grad.ffn_up")}


def _factor(stage: str) -> Callable[..., Value]:
    def change(right: Value, at: Place, what: str) -> Value:
        return at.replay.value(at.layer, stage) if what == "factors" else right

    return change


def _fans(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    names = [f"self_attn.{name}" for name in QKV]
    if question.kind_of(node) == "grad.ffn_norm":
        names = ["mlp.gate_proj", "mlp.up_proj"]
    yield from ({"without": name} for name in names)


def _transposed(weight: Value, at: Place, tensor: str) -> Value:
    return weight.T.reshape(weight.shape) if at.what == tensor else weight


def _multiplied(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    kind = question.kind_of(node).removeprefix("grad.")
    tensors = {
        "ffn_swigl": ("mlp.down_proj.weight",),
        "ffn_norm": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "attention": ("self_attn.o_proj.weight",),
        "attn_norm": tuple(f"self_attn.{name}.weight" for name in QKV),
    }
    yield from ({"tensor": tensor} for tensor in tensors[kind])


# --- All of a layer --------------------------------------------------------------------------------------------------

_OF_LAYERS = (
    nodes.INPUT,
    "grad.ffn_silu",
    "grad.ffn_up",
    "grad.ffn_gate",
    "grad.post_attn_residual",
    "grad.attn_softmax",
    "grad.attn_scores",
    "grad.q_post_rope",
    "grad.k_post_rope",
    "grad.qkv_bias",
    nodes.WEIGHT,
    nodes.NORM_WEIGHT,
)
"""What the values of a layer's forward pass go into."""


def _recomputed(forward: Replay, at: Place, inputs: str) -> Replay:
    back = at.replay
    known = ("recomputed", at.layer, inputs)
    if known not in forward.memo:
        source = nodes.of_input(back.config, at.layer).removeprefix("grad.")
        forward.memo[known] = dataclasses.replace(
            forward, theirs={source: _other_input(back, at.layer, inputs)}, memo={}, composed={}
        )
    replay: Replay = forward.memo[known]
    return replay


def _other_input(back: Backward, layer: int | None, inputs: str) -> Value:
    assert layer is not None
    if inputs == "its own output":
        return back.forward.get(layer, "post_ffn_residual")
    if inputs == "another row's input":
        return np.roll(back.forward.residual(layer), 1, axis=0)
    if inputs == "the embedding":
        return back.forward.get(None, "embedding")
    return back.forward.residual(layer - 1)


def _other_inputs(question: Any, node: Key) -> Iterator[Mapping[str, Any]]:
    layer = nodes.layer_of(node, question.back.config)
    if layer is None:
        return
    yield {"inputs": "its own output"}
    if len(question.back.forward.inputs.input_ids) > 1:
        yield {"inputs": "another row's input"}
    if layer:
        yield {"inputs": "the input of the layer before"}
        if layer > 1:
            yield {"inputs": "the embedding"}


def _zero(value: Value, at: Place, of: str = "") -> Value:
    return np.zeros_like(value) if not of or f"grad.{of}" == at.what else value


_DETACHABLE: tuple[str, ...] = (
    "final_norm",
    "ffn_out",
    "ffn_swigl",
    "ffn_silu",
    "ffn_up",
    "ffn_gate",
    "ffn_norm",
    "attn_out",
)
_DETACHABLE += ("attention", "attn_softmax", "attn_scores", "q_post_rope", "k_post_rope", "qkv_bias", "attn_norm")

FAULTS: Sequence[Fault] = (
    _rope(
        "backward-rope-missing",
        "the gradient of {of} is not rotated back",
        {"turn": lambda turn: dataclasses.replace(turn, none=True)},
        "dx = g",
    ),
    _rope(
        "backward-rope-direction",
        "the gradient of {of} is rotated forwards once more, not back",
        {"turns": _forwards},
        "dx = R(+t · θ) g",
    ),
    _rope(
        "backward-rope-pairs",
        "the gradient of {of} is rotated back in the other pairing of dimensions",
        {"turn": lambda turn: dataclasses.replace(turn, adjacent=not turn.adjacent)},
        "dx = R(−t · θ) g, in pairs (2i, 2i + 1)",
    ),
    Fault(
        "backward-softmax-sum-missing",
        "the softmax's gradient is p · g, without p · Σ p · g",
        ("grad.attn_scores",),
        {"row_sum": lambda right, at: np.zeros_like(right)},
        formula="ds = p · g",
    ),
    Fault(
        "backward-scale-missing",
        "the factor 1/√head_dim of the scores is {how} in the gradient of {of}",
        ("grad.q_post_rope", "grad.k_post_rope"),
        {
            "scale_back": lambda right, at, how, of: (
                right if at.what != of else 1.0 if how == "missing" else right * right
            )
        },
        variants=_scales,
        merge={"of": UNION},
        among=lambda how, of: (f"grad.{of}_post_rope",),
        formula={"grad.q_post_rope": "dq = ds k", "grad.k_post_rope": "dk = Σ dsᵀ q, without 1/√{head_dim}"},
    ),
    Fault(
        "backward-mask-ignored",
        "the {mask} mask is ignored in the gradient of {of}",
        ("grad.attn_scores", "grad.qkv_bias"),
        {"weights": _unmasked},
        variants=_masks,
        merge={"of": UNION},
        among=lambda mask, of: ("grad.attn_scores",) if of == "scores" else ("grad.qkv_bias",),
        chaotic=True,
        near=0.05,
        formula={
            "grad.attn_scores": "ds = {right}, for keys that are masked too",
            "grad.qkv_bias": "dv = {right}, p unmasked",
        },
    ),
    _grouped(
        "kv-gradient-first-head",
        "a KV head's gradient of {of} is that of the first query head of its group, not their sum",
        lambda heads, axis: heads[:, :, 0],
        "dk = that of the first head",
    ),
    _grouped(
        "kv-gradient-last-head",
        "a KV head's gradient of {of} is that of the last query head of its group, not their sum",
        lambda heads, axis: heads[:, :, -1],
        "dk = that of the last head",
    ),
    _grouped(
        "kv-gradient-averaged",
        "a KV head's gradient of {of} is the mean over the query heads of its group, not their sum",
        np.mean,
        "dk = mean over the group",
    ),
    Fault(
        "backward-norm-projection-missing",
        "RMSNorm's gradient lacks the term along x, in {norms}",
        _NORM_INPUTS,
        {"norm_projection": _in_norm(np.zeros_like)},
        variants=_norms,
        merge={"norms": UNION},
        among=_inputs_of,
        formula="dx = r w g (+ residual)",
    ),
    Fault(
        "backward-norm-weight-missing",
        "RMSNorm's gradient is not multiplied by its weight, in {norms}",
        _NORM_INPUTS,
        {"norm_weighted": _in_norm(np.ones_like)},
        variants=_norms,
        merge={"norms": UNION},
        among=_inputs_of,
        formula="{right}, w = 1",
    ),
    EPS,
    *(_dropped("that through the block", "along", block) for block in _INPUTS),
    *(_dropped("that along the residual", "branch", block) for block in _INPUTS),
    Fault(
        "backward-silu-sigmoid-only",
        "the derivative of SiLU is σ(x), without x σ'(x)",
        ("grad.ffn_gate",),
        {"derivative": lambda right, at: sigmoid},
        formula="dgate = g σ(gate)",
    ),
    Fault(
        "backward-activation-gelu",
        "the derivative is that of {of}, not of SiLU",
        ("grad.ffn_gate",),
        {"derivative": lambda right, at, of: _DERIVATIVES[of]},
        variants=lambda question, node: ({"of": of} for of in _DERIVATIVES),
        formula="dgate = g · that of {of}",
    ),
    Fault(
        "backward-gate-up-swapped",
        "gate and up are exchanged in the backward pass: the {what} of the product's gradient",
        ("grad.ffn_silu", "grad.ffn_up", "grad.ffn_gate"),
        {"silu_factor": _factor("ffn_silu"), "up_factor": _factor("ffn_up"), "gate_or_up": _exchanged_results},
        variants=_exchanges,
        formula={
            "grad.ffn_silu": "dsilu = g · SiLU(gate)",
            "grad.ffn_up": "dup = g · up",
            "grad.ffn_gate": "dgate = g · SiLU(gate)",
        },
    ),
    Fault(
        "backward-projection-missing",
        "the gradient through {without} is not added",
        ("grad.ffn_norm", "grad.attn_norm"),
        {"fan_in": lambda part, at, without: np.zeros_like(part) if at.what == f"{without}.weight" else part},
        variants=_fans,
        formula="dx = Σ g W, without {without}",
    ),
    Fault(
        "backward-weight-transposed",
        "the gradient of its input is multiplied with {tensor} transposed",
        ("grad.ffn_swigl", "grad.ffn_norm", "grad.attention", "grad.attn_norm"),
        {"multiplied_back": _transposed},
        variants=_multiplied,
        formula="dx = g Wᵀ, W = {tensor}",
    ),
    Fault(
        "layer-detached",
        "no gradient passes below this layer: its input is detached",
        (nodes.INPUT,),
        {"gradient": lambda value, at: np.zeros_like(value) if at.what == nodes.INPUT else value},
        formula="dx = 0",
    ),
    Fault(
        "stage-detached",
        "no gradient reaches {of}",
        tuple(f"grad.{stage}" for stage in _DETACHABLE),
        {"gradient": _zero},
        variants=lambda question, node: [{"of": question.kind_of(node).removeprefix("grad.")}],
        formula="dx = 0",
    ),
    Fault(
        "checkpoint-recompute",
        "the layer's values were recomputed from {inputs}, not from its input",
        _OF_LAYERS,
        {"stored": _recomputed},
        variants=_other_inputs,
        chaotic=True,
        near=0.05,
        formula=dict.fromkeys(_OF_LAYERS, "{right}, with the values of a forward pass from {inputs}"),
    ),
)
