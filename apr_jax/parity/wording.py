"""One line for a finding, as an engineer wants to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXTS = {
    "rope-adjacent-pairs": "yours equals adjacent-pair RoPE (2i, 2i+1); the checkpoint needs split halves (i, i + d/2)",
    "rope-theta": "the RoPE base is {theta:.6g}",
    "rope-not-on-q": "q is not rotated",
    "rope-not-on-k": "k is not rotated",
    "rope-half-dims": "only the first half of each head is rotated, as if head_dim were half",
    "rope-sign": "the RoPE angles are negated",
    "norm-weight-missing": "the norm's weight is missing",
    "norm-weight-plus-one": "the norm multiplies by 1 + weight",
    "norm-mean-subtracted": "the norm subtracts the mean (LayerNorm)",
    "final-norm-missing": "the final norm is missing",
    "qkv-bias-missing": "the q, k and v biases are missing",
    "q-bias-missing": "the q bias is missing",
    "k-bias-missing": "the k bias is missing",
    "v-bias-missing": "the v bias is missing",
    "bias-after-rope": "the q and k biases are added after RoPE",
    "mask-not-causal": "the attention mask is not causal: all keys are seen",
    "mask-off-by-one": "the last visible key is i {last:+d}, not i",
    "mask-window": "only the last {window} keys are seen",
    "padding-attended": "padded keys are seen",
    "softmax-scale": "the softmax scale is {scale:.6g}, not 1/sqrt(head_dim)",
    "softmax-partial-warp": "the softmax sums over the first 32 keys of every 64 only",
    "kv-heads-interleaved": "query head h reads KV head h mod n_kv; it needs h // group",
    "v-heads-swapped": "the heads of v are in reverse order",
    "o-proj-transposed": "o_proj is used transposed",
    "down-proj-transposed": "down_proj is used transposed",
    "attention-residual-missing": "the residual around attention is missing",
    "mlp-residual-missing": "the residual around the MLP is missing",
    "gate-up-swapped": "gate_proj and up_proj are swapped",
    "activation-on-up": "the activation is applied to up, not to gate",
    "activation-gelu": "the activation is GELU (erf), not SiLU",
    "activation-gelu-tanh": "the activation is GELU (tanh), not SiLU",
    "activation-relu": "the activation is ReLU, not SiLU",
    "layer-order": "layers are executed in the order {order}",
    "layer-skipped": "layer {layer} is skipped",
    "layer-repeated": "layer {layer} is executed twice",
    "embedding-row-off-by-one": "the embedding reads row id + 1",
    "head-transposed": "the head is used transposed",
    "head-missing": "the logits are all zero: the head is missing",
    "logits-shifted": "the flat logits buffer is rolled by {shift} elements",
    "weights-relabelled": "{tensor}: its bytes are read under another dtype ({direction})",
    "weights-from-another-layer": "{tensor} is layer {layer}'s",
    "weights-quantised": "{tensor} {verb} quantised ({codec})",
    "cache-position": "decoding steps {side} the cache at position {shift:+d}",
    "layout": "not a mistake, undone: the dump is {kind} there",
    "activations-quantised": "activations are rounded to {codec} before the products, as `apr` does beside Q4_K",
    "tf32-dots": "dot inputs are TF32 ({mode}), float32 was declared",
    "bf16-accumulation": "partial sums are kept in bf16 (every {chunk} terms)",
    "non-finite": "values are not finite",
    "constant": "all values are {value:.6g}",
    "positions-permuted": "the values of {moved} positions are right ones of other positions",
    "unknown": "wrong, and no known mistake explains it",
}


def sentence(
    fault: str,
    layers: tuple[int, ...] | str,
    stage: str,
    parameters: Mapping[str, Any],
    before: float | None,
    after: float | None,
    note: str = "",
) -> str:
    """Says where, what, and how well that fits."""
    text = _text(fault, parameters)
    if layers == "all":
        text = f"all layers, {stage}: {text}"
    elif layers:
        plural = "layer" if len(layers) == 1 else "layers"
        text = f"{plural} {', '.join(map(str, layers))}, {stage}: {text}"
    elif stage:
        text = f"{stage}: {text}"
    if note:
        text += f": {note}"
    if before is not None and after is not None:
        text += f" (off by {before:.1e} from the right values, by {after:.0e} from these)"
    elif before is not None:
        text += f" (off by {before:.1e})"
    return text


def _text(fault: str, parameters: Mapping[str, Any]) -> str:
    if fault == "rms-norm-eps":
        norms = parameters.get("norms", [])
        which = f" in {', '.join(norms)}" if norms else ""
        return f"rms_norm eps is {parameters['eps']:.6g}{which}"
    if fault == "rope-position":
        if "restart" in parameters:
            return f"positions restart every {parameters['restart']}"
        return f"positions are shifted by {parameters['shift']:+d}"
    tensors = parameters.get("tensor")
    if isinstance(tensors, tuple | list):
        shown = ", ".join(tensors) if len(tensors) < 3 else f"{len(tensors)} kinds of tensors ({tensors[0]}, ...)"
        parameters = {**parameters, "tensor": shown}
    verb = "are" if isinstance(tensors, tuple | list) and len(tensors) > 1 else "is"
    return _TEXTS[fault].format(**parameters, verb=verb)
