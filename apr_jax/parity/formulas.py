"""The formulas of the stages for people to read, and of a finding the two side by side: the right one and the mistaken.

What is computed is `replay.FORMULAS`; this is the same in the usual notation. x is what goes into a stage, y what comes
out, t a position, h a head of queries, i and j the positions of a query and a key, d the width of a head, and R(a) the
rotation by an angle a. A fault's own formula stands in its record (`Fault.formula`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.parity.backward import nodes
from apr_jax.parity.faults.record import Fault, Instead, fields, shown
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.findings import Finding

_NORM = "y = w · x / √(mean(x²) + ε), ε = {rms_norm_eps:.6g}"
_ROPE = "(y[i], y[i + d/2]) = R(t · θ^(−2i/d)) (x[i], x[i + d/2]), θ = {rope_theta:.6g}, d = {head_dim}"
RIGHT: Mapping[str, str] = {
    "embedding": "y[t] = E[id[t]]",
    "attn_norm": _NORM,
    "qkv_matmul": "y = x [Wq, Wk, Wv]ᵀ",
    "qkv_bias": "[q, k, v] = x [Wq, Wk, Wv]ᵀ + [bq, bk, bv]",
    "q_post_rope": _ROPE,
    "k_post_rope": _ROPE,
    "attn_scores": "s[h, i, j] = q[h, i] · k[h // {group}, j] / √{head_dim}, for j ≤ i",
    "attn_softmax": "p[i, j] = exp(s[i, j]) / Σ_m exp(s[i, m]), for j, m ≤ i",
    "attention": "y[h, i] = Σ_j p[h, i, j] v[h // {group}, j]",
    "attn_out": "y = x Woᵀ",
    "post_attn_residual": "y = x + attn_out",
    "ffn_norm": _NORM,
    "ffn_gate": "y = x W_gateᵀ",
    "ffn_up": "y = x W_upᵀ",
    "ffn_silu": "y = SiLU(gate) = gate / (1 + exp(−gate))",
    "ffn_swigl": "y = SiLU(gate) · up",
    "ffn_out": "y = x W_downᵀ",
    "post_ffn_residual": "y = x + ffn_out",
    "final_norm": _NORM,
    "logits": "y = x Wᵀ, W the head",
}
"""Stage -> its formula; in braces numbers of the configuration."""


_NORM_BACK = "dx = r (w g − x r² mean(w g x)), r = 1 / √(mean(x²) + {rms_norm_eps:.6g})"
BACKWARD: Mapping[str, str] = {
    "grad.logits": "dz[t] = (softmax(z[t]) − 1[id[t + 1]]) / N, N the tokens that count",
    "grad.final_norm": "dx = dz W, W the head",
    nodes.OUTPUT: _NORM_BACK,
    nodes.INPUT: "dx = g + that through the norm: " + _NORM_BACK.removeprefix("dx = "),
    "grad.ffn_out": "dx = g",
    "grad.ffn_swigl": "dx = g W_down",
    "grad.ffn_silu": "dsilu = g · up",
    "grad.ffn_up": "dup = g · SiLU(gate)",
    "grad.ffn_gate": "dgate = g · σ(gate) (1 + gate (1 − σ(gate)))",
    "grad.ffn_norm": "dx = dgate W_gate + dup W_up",
    "grad.post_attn_residual": "dx = g + that through the norm: " + _NORM_BACK.removeprefix("dx = "),
    "grad.attn_out": "dx = g",
    "grad.attention": "dx = g Wo",
    "grad.attn_softmax": "dp[h, i, j] = g[h, i] · v[h // {group}, j]",
    "grad.attn_scores": "ds = p · (dp − Σ_j p dp), for j ≤ i",
    "grad.q_post_rope": "dq[h, i] = Σ_j ds[h, i, j] k[h // {group}, j] / √{head_dim}",
    "grad.k_post_rope": "dk[j] = Σ_h Σ_i ds[h, i, j] q[h, i] / √{head_dim}, h the {group} heads of the group",
    "grad.qkv_bias": "[dq, dk] = R(−t · θ) g, dv[j] = Σ_h Σ_i p[h, i, j] g[h, i]",
    "grad.qkv_matmul": "dx = g",
    "grad.attn_norm": "dx = dq Wq + dk Wk + dv Wv",
    nodes.WEIGHT: "dW = Σ_t g[t] x[t]ᵀ",
    nodes.LOW_RANK: "dA = s Bᵀ dW, dB = s dW Aᵀ, s = alpha / r",
    nodes.BIAS: "db = Σ_t g[t]",
    nodes.NORM_WEIGHT: "dw = Σ_t g[t] · x[t] / rms(x[t])",
    nodes.HEAD_WEIGHT: "dW = Σ_t dz[t] x[t]ᵀ",
    nodes.EMBEDDING_WEIGHT: "dE[id] = Σ g[t] over all t with id[t] = id",
    nodes.TIED_WEIGHT: "dE = that of the embedding + that of the head",
}
"""Kind of a gradient (`backward.nodes`) -> its formula; g is the gradient of what is computed from x."""


class Pair(NamedTuple):
    """Two formulas to be read side by side.

    Attributes:
      stage: The stage whose formula the right one is; "" if it is none's.
      right: As the checkpoint needs it.
      theirs: As the engine has it.
    """

    stage: str
    right: str
    theirs: str


def pair(finding: Finding, config: Qwen2Config) -> Pair | None:
    """Returns the formulas of a finding; None where it is said what is seen and not how it came about."""
    fault = FAULTS[finding.fault]
    if not fault.formula:
        return None
    known = _numbers(config) | {name: shown(value) for name, value in finding.parameters.items()}
    where = f", in {known['where']} only" if "where" in known else ""
    if isinstance(fault.formula, Instead):
        right, theirs = (text.format(**known) for text in (fault.formula.right, fault.formula.theirs))
        return Pair("", right, theirs + where)
    stage = _made_at(fault, finding.stage)
    right = ({**RIGHT, **BACKWARD})[stage].format(**known)
    theirs = _form(fault, stage, known.keys() | {"right"}).format(**known, right=right)
    return Pair(stage, right, theirs + where)


def _numbers(config: Qwen2Config) -> dict[str, Any]:
    """What formulas may hold of a configuration."""
    names = ("rms_norm_eps", "rope_theta", "head_dim", "num_kv_heads")
    return {name: getattr(config, name) for name in names} | {"group": config.num_heads // config.num_kv_heads}


def _made_at(fault: Fault, seen: str) -> str:
    """The stage at which a fault is made, where it was seen behind a gap: the first that it is made at."""
    assert not callable(fault.stages), fault  # those have both of their formulas: Instead
    if isinstance(fault.formula, Mapping):
        return seen if seen in fault.formula else next(iter(fault.formula))
    return seen if seen in fault.stages else fault.stages[0]


def _form(fault: Fault, stage: str, known: Any) -> str:
    if isinstance(fault.formula, Mapping):
        return fault.formula[stage]
    forms = (fault.formula,) if isinstance(fault.formula, str) else fault.formula
    return next(form for form in forms if fields(form) <= known)
