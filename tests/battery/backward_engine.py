"""A backward pass in NumPy that can be wrong in every way of the table's backward part: the battery's other program.

It shares no code with the model or the converters; its forward pass is that of `faulty_forward`. Gradients are written
out by hand, one line for each operation, and held against finite differences and torch's autograd by tests. It computes
in float32 or float64. `FAULTS` says what each name means here.

Letters in shapes: B batch, T query positions, S key positions, N query heads, K key/value heads, G heads of a group,
D head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from scipy.special import erf

from tests.battery import faulty_forward
from tests.oracle import rope

f32, f64 = np.float32, np.float64
OUTER = None
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LINEAR = {
    "self_attn.q_proj": "attn_norm",
    "self_attn.k_proj": "attn_norm",
    "self_attn.v_proj": "attn_norm",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "ffn_norm",
    "mlp.up_proj": "ffn_norm",
    "mlp.down_proj": "ffn_swigl",
}
"""What each linear layer reads."""

FAULTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "loss-sum": ("not divided by the number of tokens", {}),
    "loss-count": ("divided by `count`", {"count": None}),
    "labels-not-shifted": ("position t is held against token t", {}),
    "labels-shifted-twice": ("position t is held against token t + 2", {}),
    "padding-in-loss": ("`what` all: every position but the last; ignored: labels of -100 too", {"what": "all"}),
    "accumulation-averaged": ("the mean of the means of micro-batches of `rows` rows", {"rows": 1}),
    "gradient-scaled": ("the loss times `factor`, `where` loss; or all parameters' gradients, parameters",
                        {"factor": 1024.0, "where": "loss"}),
    "gradient-clipped": ("all parameters' gradients times norm / their norm", {"norm": 1.0}),
    "backward-rope-missing": ("gradients of q and k go back unrotated", {"of": "qk"}),
    "backward-rope-direction": ("rotated by +angle", {"of": "qk"}),
    "backward-rope-pairs": ("rotated back in pairs (2i, 2i + 1)", {"of": "qk"}),
    "backward-softmax-sum-missing": ("ds = p dp", {}),
    "backward-scale-missing": ("no D^-1/2 in dq and dk; `how` twice: two of them", {"how": "missing", "of": "qk"}),
    "backward-mask-ignored": ("p is recomputed from scores that are not masked", {"of": ("scores", "v")}),
    "kv-gradient-first-head": ("that of the group's first head", {"of": "kv"}),
    "kv-gradient-last-head": ("that of its last head", {"of": "kv"}),
    "kv-gradient-averaged": ("the mean over the group", {"of": "kv"}),
    "backward-norm-projection-missing": ("dx = r w g", {"norms": ("attn_norm", "ffn_norm", "final_norm")}),
    "backward-norm-weight-missing": ("w = 1 in dx", {}),
    "backward-norm-eps": ("another eps in r, for dx and dw", {"eps": 1e-3}),
    "backward-attention-residual-missing": ("dx without the stream's gradient", {}),
    "backward-mlp-residual-missing": ("the same around the MLP", {}),
    "backward-attention-branch-missing": ("dx is the stream's gradient", {}),
    "backward-mlp-branch-missing": ("the same around the MLP", {}),
    "backward-silu-sigmoid-only": ("the derivative is sigma(x)", {}),
    "backward-activation-gelu": ("the derivative of GELU (`form` erf or tanh), or relu", {"form": "erf"}),
    "backward-gate-up-swapped": ("`what` factors: dsilu = g silu, dup = g up; results: dgate and dup change places",
                                 {"what": "factors"}),
    "backward-projection-missing": ("the gradient through `without` is not added", {"without": "self_attn.k_proj"}),
    "backward-weight-transposed": ("dx = g W^T, or W^T's buffer read as W", {"tensor": "self_attn.o_proj"}),
    "layer-detached": ("the layer's input gets no gradient", {}),
    "stage-detached": ("`of` gets no gradient", {"of": "attention"}),
    "checkpoint-recompute": ("the layer's values are recomputed: `inputs` output, row or before", {"inputs": "output"}),
    "weight-gradient-transposed": ("dW^T's buffer", {"tensor": "mlp.down_proj.weight"}),
    "weight-gradient-missing": ("0", {"tensor": "self_attn.o_proj.weight"}),
    "bias-gradient-missing": ("0", {"tensor": "self_attn.q_proj.bias"}),
    "weight-gradient-averaged": ("over B * T positions", {"tensor": "mlp.up_proj.weight"}),
    "bias-gradient-averaged": ("over B * T positions", {"tensor": "self_attn.v_proj.bias"}),
    "weight-gradient-first-row": ("row 0 of the batch alone", {"tensor": "mlp.gate_proj.weight"}),
    "bias-gradient-first-row": ("`kept` row: row 0 of the batch alone; position: of the first position alone",
                                {"tensor": "self_attn.q_proj.bias", "kept": "row"}),
    "norm-weight-gradient-unnormalised": ("sum of g x", {}),
    "embedding-gradient-overwritten": ("the `kept` one of a token's gradients", {"kept": "last"}),
    "embedding-gradient-padding": ("the row of token 0, the padding, holds what garbage came along", {}),
    "embedding-row-frozen": ("the row of `token` is 0", {"token": None}),
    "tied-gradient-head-missing": ("the embedding's part alone", {}),
    "tied-gradient-embedding-missing": ("the head's part alone", {}),
    "tied-gradient-doubled": ("2 (both)", {}),
    "bf16-gradient-accumulation": ("over micro-batches of `rows` rows, a running sum in bf16", {"rows": 1}),
    "gradient-rounded": ("parameters' gradients in `dtype`", {"dtype": "bfloat16"}),
    "gradient-truncated": ("cut off to bfloat16", {}),
    "stochastic-rounding": ("to bfloat16, up or down at random", {}),
    "gradient-of-another-step": ("parameters' gradients of another batch", {}),
    "lora-gradient-missing": ("`matrix` A or B has none", {"matrix": "A"}),
    "lora-scale-missing": ("alpha / r is missing in dA and dB", {}),
    "lora-merged-twice": ("the adapter is in W twice where dx is computed", {}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planted:
    """A mistake to make; `layers` None is all of them, and outside the layers where that applies."""

    name: str
    layers: tuple[int, ...] | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := set(self.parameters) - set(FAULTS[self.name][1]):
            raise ValueError(f"{self.name} has no parameter {sorted(unknown)}")

    @property
    def values(self) -> dict[str, Any]:
        return {**FAULTS[self.name][1], **self.parameters}


def backward(
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    input_ids: Any,
    attention_mask: Any = None,
    labels: Any = None,
    faults: Sequence[Planted] = (),
    dtype: str = "float32",
    forward: Mapping[str, np.ndarray] | None = None,
    adapter: Mapping[str, tuple[np.ndarray, np.ndarray, float]] | None = None,
) -> dict[str, np.ndarray]:
    """Runs forward and backward, wrong as asked for.

    Args:
      weights: Name -> array, as `tests.oracle.load` returns them; with an adapter, without it.
      config: config.json's content.
      input_ids: Integers [B, T].
      attention_mask: [B, T], 0 at padding.
      labels: [B, T], -100 where a token does not count; None: all count.
      faults: What to do wrong, all at once.
      dtype: "float64" or "float32".
      forward: A forward pass of this batch that was made before.
      adapter: Name of a weight -> A [r, in], B [out, r] and the scale of a low-rank adapter.

    Returns:
      The forward pass's keys, and "grad." and a stage's key or a parameter's name -> gradient; "grad.NAME.lora_A" and
      "grad.NAME.lora_B" of an adapter.
    """
    with np.errstate(all="ignore"):
        return _Backward(weights, config, input_ids, attention_mask, labels, faults, dtype, forward, adapter).run()


def bf16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, f32).astype(ml_dtypes.bfloat16).astype(f32)


class _Backward:
    def __init__(self, weights, config, input_ids, attention_mask, labels, faults, dtype, forward, adapter):
        self.wide = {"float64": f64, "float32": f32}[dtype]
        self.adapter = adapter or {}
        merged = {
            name: np.asarray(w, f64) + scale * (b.astype(f64) @ a.astype(f64))
            for name, (a, b, scale) in self.adapter.items()
            for w in (weights[name],)
        }
        self.weights = {name: np.asarray(w, self.wide) for name, w in {**weights, **merged}.items()}
        self.config, self.dtype, self.faults = config, dtype, faults
        self.ids = np.asarray(input_ids)
        self.batch, self.length = self.ids.shape
        self.mask = np.ones(self.ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
        self.labels = self.ids if labels is None else np.asarray(labels)
        self.layers = config["num_hidden_layers"]
        self.n_q, self.n_kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.n_q
        self.tied = bool(config.get("tie_word_embeddings"))
        self.engine = faulty_forward._Engine(
            self.weights, config, self.ids, None if attention_mask is None else attention_mask, None, (), dtype
        )
        self.s = dict(self.engine.run() if forward is None else forward)
        positions = np.maximum(np.cumsum(self.mask, 1) - 1, 0)
        frequencies, gain = rope(config, self.dim, int(positions.max()) + 1)
        angles = (positions.astype(f32)[..., None] * frequencies).astype(f64)
        self.cos, self.sin = (
            (f(angles).astype(f32) * f32(gain)).astype(self.wide)[:, :, None] for f in (np.cos, np.sin)
        )
        self.seen = np.tril(np.ones((self.length, self.length), bool)) & self.mask[:, None, None, :]
        self.g: dict[str, np.ndarray] = {}

    # --- Faults --------------------------------------------------------------------------------------------------

    def _all(self, name: str, layer: int | None) -> Iterator[dict[str, Any]]:
        for planted in self.faults:
            if planted.name == name and (planted.layers is None or layer in planted.layers):
                yield planted.values

    def _of(self, name: str, layer: int | None) -> dict[str, Any] | None:
        return next(self._all(name, layer), None)

    def _is(self, name: str, layer: int | None, part: str) -> bool:
        return any(part in values["of"] for values in self._all(name, layer))

    # --- The way back --------------------------------------------------------------------------------------------

    def run(self) -> dict[str, np.ndarray]:
        head = EMBEDDING if self.tied else HEAD
        dz = self._put("logits", self._loss())
        as_head = self._weight_gradient(dz, self.s["stage.final_norm"], head, OUTER)
        g = self._put("stage.final_norm", dz @ self.weights[head])
        g = self._norm(g, self.s[f"stage.{self.layers - 1}.post_ffn_residual"], FINAL_NORM, "final_norm", OUTER)
        for layer in reversed(range(self.layers)):
            self._put(f"stage.{layer}.post_ffn_residual", g)
            g = self._layer(g, layer)
        x = self._put("stage.embedding", g)
        as_embedding = self._summed(lambda part: self._rows(x[part], self.ids[part]), OUTER)
        if self.tied:
            if self._of("tied-gradient-head-missing", OUTER) is not None:
                as_head = 0 * as_head
            if self._of("tied-gradient-embedding-missing", OUTER) is not None:
                as_embedding = 0 * as_embedding
            twice = 2 if self._of("tied-gradient-doubled", OUTER) is not None else 1
            both = twice * (as_embedding + as_head)
            if self._of("bf16-gradient-accumulation", OUTER) is not None:
                h = self.s["stage.final_norm"]
                both = self._summed(
                    lambda part: self._rows(x[part], self.ids[part]) + np.einsum("BTo,BTi->oi", dz[part], h[part]),
                    OUTER,
                )
            self._parameter(EMBEDDING, both, OUTER)
        else:
            self._parameter(HEAD, as_head, OUTER)
            self._parameter(EMBEDDING, as_embedding, OUTER)
        self._of_all()
        return {**self.s, **self.g}

    def _put(self, key: str, value: np.ndarray) -> np.ndarray:
        *_, stage = key.split(".")
        layer = int(key.split(".")[1]) if key.count(".") == 2 else OUTER
        for values in self._all("stage-detached", layer):
            if values["of"] == stage:
                value = 0 * value
        self.g[f"grad.{key}"] = value = np.asarray(value, self.wide)
        return value

    def _loss(self) -> np.ndarray:
        """[B, T, V]"""
        logits = self.s["logits"]
        target = np.concatenate([self.ids[:, 1:], self.ids[:, :1]], 1)
        nothing = np.zeros((self.batch, 1), bool)
        counted = self.mask & (self.labels >= 0)
        weight = np.concatenate([self.mask[:, :-1] & counted[:, 1:], nothing], 1)
        if self._of("labels-not-shifted", OUTER) is not None:
            target, weight = self.ids, counted
        if self._of("labels-shifted-twice", OUTER) is not None:
            target = np.concatenate([self.ids[:, 2:], self.ids[:, :2]], 1)
            weight = np.concatenate([self.mask[:, :-2] & counted[:, 2:], nothing, nothing], 1)
        if more := self._of("padding-in-loss", OUTER):
            every = np.ones((self.batch, self.length - 1), bool)
            every = every if more["what"] == "all" else self.mask[:, :-1] & self.mask[:, 1:]
            weight = np.concatenate([every, nothing], 1)
        count = weight.sum()
        scale = weight / count
        if self._of("loss-sum", OUTER) is not None:
            scale = weight * 1.0
        if other := self._of("loss-count", OUTER):
            scale = weight / other["count"]
        if (few := self._of("accumulation-averaged", OUTER)) is not None:
            parts = [weight[i : i + few["rows"]] for i in range(0, self.batch, few["rows"])]
            scale = np.concatenate([part / part.sum() / len(parts) for part in parts])
        for values in self._all("gradient-scaled", OUTER):
            scale = scale * (values["factor"] if values["where"] == "loss" else 1.0)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = p / p.sum(-1, keepdims=True)
        one = np.zeros_like(p)
        np.put_along_axis(one, target[..., None], 1.0, -1)
        return np.asarray((p - one) * scale[..., None], self.wide)

    def _layer(self, g: np.ndarray, layer: int) -> np.ndarray:
        """From the gradient of a layer's output to that of its input."""
        p, s = f"stage.{layer}.", self._values(layer)
        through = self._put(p + "ffn_out", g)
        dh = self._mlp(through, s, layer)
        normed = self._norm(
            dh, s["post_attn_residual"], f"model.layers.{layer}.post_attention_layernorm.weight", "ffn_norm", layer
        )
        if self._of("backward-mlp-residual-missing", layer) is not None:
            g = 0 * g
        if self._of("backward-mlp-branch-missing", layer) is not None:
            normed = 0 * normed
        g = self._put(p + "post_attn_residual", g + normed)
        dh = self._attention(self._put(p + "attn_out", g), s, layer)
        normed = self._norm(dh, s["input"], f"model.layers.{layer}.input_layernorm.weight", "attn_norm", layer)
        if self._of("backward-attention-residual-missing", layer) is not None:
            g = 0 * g
        if self._of("backward-attention-branch-missing", layer) is not None:
            normed = 0 * normed
        return 0 * g if self._of("layer-detached", layer) is not None else g + normed

    def _values(self, layer: int) -> dict[str, np.ndarray]:
        """The values of a layer that the backward pass has: stored, or recomputed."""
        stages = {key.split(".")[2]: value for key, value in self.s.items() if key.startswith(f"stage.{layer}.")}
        before = lambda k: self.s["stage.embedding" if k == 0 else f"stage.{k - 1}.post_ffn_residual"]  # noqa: E731
        if other := self._of("checkpoint-recompute", layer):
            kind = other["inputs"]
            x = (
                stages["post_ffn_residual"]
                if kind == "output"
                else np.roll(before(layer), 1, 0)
                if kind == "row"
                else before(layer - 1)
            )
            return {**self.engine._layer(x, x, layer), "input": x}
        return {**stages, "input": before(layer)}

    def _norm(self, g: np.ndarray, x: np.ndarray, name: str, stage: str, layer: int | None) -> np.ndarray:
        w = self.weights[name]
        eps = (self._of("backward-norm-eps", layer) or {"eps": self.config["rms_norm_eps"]})["eps"]
        r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.wide(eps))
        plain = self._of("norm-weight-gradient-unnormalised", layer) is not None
        normed = g * (x if plain else x * r)
        self._parameter(name, self._summed(lambda part: normed[part].sum((0, 1)), layer), layer)
        if self._of("backward-norm-weight-missing", layer) is not None:
            w = np.ones_like(w)
        gw = g * w
        missing = self._of("backward-norm-projection-missing", layer)
        if missing is not None and stage in missing["norms"]:
            return r * gw
        return r * gw - x * r**3 * (gw * x).mean(-1, keepdims=True)

    def _linear(self, g: np.ndarray, x: np.ndarray, module: str, layer: int) -> np.ndarray:
        """The gradient of what a linear layer reads; its weight's on the way."""
        name = f"model.layers.{layer}.{module}.weight"
        self._parameter(name, self._weight_gradient(g, x, name, layer), layer)
        w = self.weights[name]
        if name in self.adapter:
            a, b, scale = self.adapter[name]
            if self._of("lora-merged-twice", layer) is not None:
                w = w + np.asarray(scale * (b @ a), self.wide)
        for values in self._all("backward-weight-transposed", layer):
            if values["tensor"] == module:
                w = np.ascontiguousarray(w.T).reshape(w.shape)
        dx = g @ w
        without = [values["without"] for values in self._all("backward-projection-missing", layer)]
        return 0 * dx if module in without else dx

    def _weight_gradient(self, g: np.ndarray, x: np.ndarray, name: str, layer: int | None) -> np.ndarray:
        short = name.removeprefix(f"model.layers.{layer}.")
        if any(values["tensor"] == short for values in self._all("weight-gradient-first-row", layer)):
            return np.einsum("To,Ti->oi", g[0], x[0])
        return self._summed(lambda part: np.einsum("BTo,BTi->oi", g[part], x[part]), layer)

    def _summed(self, made, layer: int | None) -> np.ndarray:
        """A parameter's gradient, over the whole batch or micro-batch by micro-batch."""
        few = self._of("bf16-gradient-accumulation", layer)
        if few is None:
            return made(slice(None))
        total = 0.0
        for first in range(0, self.batch, few["rows"]):
            total = bf16(total + bf16(made(slice(first, first + few["rows"]))))
        return total

    def _mlp(self, g: np.ndarray, s: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
        p = f"stage.{layer}."
        g = self._put(p + "ffn_swigl", self._linear(g, s["ffn_swigl"], "mlp.down_proj", layer))
        swapped = [values["what"] for values in self._all("backward-gate-up-swapped", layer)]
        first, second = s["ffn_up"], s["ffn_silu"]
        if "factors" in swapped:
            first, second = second, first
        dsilu, dup = self._put(p + "ffn_silu", g * first), g * second
        dgate = dsilu * self._derivative(s["ffn_gate"], layer)
        if "results" in swapped:
            dgate, dup = dup, dgate
        dup, dgate = self._put(p + "ffn_up", dup), self._put(p + "ffn_gate", dgate)
        dx = self._linear(dgate, s["ffn_norm"], "mlp.gate_proj", layer)
        return self._put(p + "ffn_norm", dx + self._linear(dup, s["ffn_norm"], "mlp.up_proj", layer))

    def _derivative(self, x: np.ndarray, layer: int) -> np.ndarray:
        sigma = 1 / (1 + np.exp(-x))
        if self._of("backward-silu-sigmoid-only", layer) is not None:
            return sigma
        if other := self._of("backward-activation-gelu", layer):
            if other["form"] == "relu":
                return (x > 0).astype(self.wide)
            if other["form"] == "erf":
                return np.asarray(
                    0.5 * (1 + erf(x / np.sqrt(2))) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi), self.wide
                )
            c = np.sqrt(2 / np.pi)
            t = np.tanh(c * (x + 0.044715 * x**3))
            return np.asarray(0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x), self.wide)
        return sigma + x * sigma * (1 - sigma)

    def _attention(self, g: np.ndarray, s: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
        p, (b, t, d) = f"stage.{layer}.", (self.batch, self.length, self.dim)
        group = self.n_q // self.n_kv
        g = self._put(p + "attention", self._linear(g, s["attention"], "self_attn.o_proj", layer))
        do = g.reshape(b, t, self.n_kv, group, d)
        q = s["q_post_rope"].reshape(b, t, self.n_kv, group, d)
        k = s["k_post_rope"].reshape(b, t, self.n_kv, d)
        v = s["qkv_bias"][..., -self.n_kv * d :].reshape(b, t, self.n_kv, d)
        dp = np.einsum("BTKGD,BSKD->BKGTS", do, v).reshape(b, self.n_q, t, t)
        dp = self._put(p + "attn_softmax", dp)
        shares = {what: np.where(self.seen, s["attn_softmax"], 0) for what in ("scores", "v")}
        if ignored := self._of("backward-mask-ignored", layer):
            raw = (np.einsum("BTKGD,BSKD->BKGTS", q, k) / np.sqrt(d)).reshape(b, self.n_q, t, t).astype(f64)
            top = np.where(self.seen, raw, -np.inf).max(-1, keepdims=True)
            total = np.where(self.seen, np.exp(raw - top), 0).sum(-1, keepdims=True)
            free = np.where(self.mask[:, None, None, :] & (total > 0), np.exp(raw - top) / total, 0)
            shares |= {what: np.asarray(free, self.wide) for what in ignored["of"]}
        ds = shares["scores"] * dp
        if self._of("backward-softmax-sum-missing", layer) is None:
            total = (np.where(self.seen, s["attn_softmax"] * dp, 0)).sum(-1, keepdims=True)
            ds = ds - shares["scores"] * total
        ds = self._put(p + "attn_scores", ds).reshape(b, self.n_kv, group, t, t)
        dq = np.einsum("BKGTS,BSKD->BTKGD", ds, k).reshape(b, t, -1) * self._scale(layer, "q")
        dk = self._grouped(np.einsum("BKGTS,BTKGD->BSKGD", ds, q) * self._scale(layer, "k"), layer, "k")
        dq, dk = self._put(p + "q_post_rope", dq), self._put(p + "k_post_rope", dk)
        weights = shares["v"].reshape(b, self.n_kv, group, t, t)
        dv = self._grouped(np.einsum("BKGTS,BTKGD->BSKGD", weights, do), layer, "v")
        turned = [self._unrotated(x, layer, of) for of, x in (("q", dq), ("k", dk))]
        whole = self._put(p + "qkv_bias", np.concatenate([*turned, dv], -1))
        self._put(p + "qkv_matmul", whole)
        ends = [self.n_q * d, (self.n_q + self.n_kv) * d]
        total = 0.0
        for name, part in zip("qkv", np.split(whole, ends, -1), strict=True):
            bias = f"self_attn.{name}_proj.bias"
            self._parameter(f"model.layers.{layer}.{bias}", self._bias(part, bias, layer), layer)
            total = total + self._linear(part, s["attn_norm"], f"self_attn.{name}_proj", layer)
        return self._put(p + "attn_norm", total)

    def _bias(self, g: np.ndarray, name: str, layer: int) -> np.ndarray:
        for values in self._all("bias-gradient-first-row", layer):
            if values["tensor"] == name:
                return g[0].sum(0) if values["kept"] == "row" else g[:, 0].sum(0)
        return self._summed(lambda part: g[part].sum((0, 1)), layer)

    def _scale(self, layer: int, of: str) -> Any:
        other = self._of("backward-scale-missing", layer)
        if other is None or of not in other["of"]:
            return self.wide(1 / np.sqrt(self.dim))
        return self.wide(1.0 if other["how"] == "missing" else 1 / self.dim)

    def _grouped(self, x: np.ndarray, layer: int, of: str) -> np.ndarray:
        """[B, S, K, G, D] -> [B, S, K D]"""
        if self._is("kv-gradient-first-head", layer, of):
            x = x[:, :, :, 0]
        elif self._is("kv-gradient-last-head", layer, of):
            x = x[:, :, :, -1]
        else:
            x = x.mean(3) if self._is("kv-gradient-averaged", layer, of) else x.sum(3)
        return x.reshape(self.batch, self.length, -1)

    def _unrotated(self, g: np.ndarray, layer: int, of: str) -> np.ndarray:
        if self._is("backward-rope-missing", layer, of):
            return g
        heads = g.reshape(self.batch, self.length, -1, self.dim)
        half, sign = self.dim // 2, 1 if self._is("backward-rope-direction", layer, of) else -1
        low, high = (slice(half), slice(half, None))
        if self._is("backward-rope-pairs", layer, of):
            low, high = slice(0, None, 2), slice(1, None, 2)
        a, b, out = heads[..., low], heads[..., high], np.empty_like(heads)
        out[..., low] = a * self.cos - sign * b * self.sin
        out[..., high] = b * self.cos + sign * a * self.sin
        return out.reshape(g.shape)

    # --- Parameters ----------------------------------------------------------------------------------------------

    def _rows(self, g: np.ndarray, ids: np.ndarray) -> np.ndarray:
        result = np.zeros(self.weights[EMBEDDING].shape, self.wide)
        kept = self._of("embedding-gradient-overwritten", OUTER)
        if kept is None:
            np.add.at(result, ids, g)
        else:
            flat, ids = g.reshape(-1, g.shape[-1]), ids.ravel()
            for at in range(len(ids)) if kept["kept"] == "last" else reversed(range(len(ids))):
                result[ids[at]] = flat[at]
        return result

    def _parameter(self, name: str, value: np.ndarray, layer: int | None) -> None:
        short = name.removeprefix(f"model.layers.{layer}.")
        kind = "bias" if short.endswith("bias") else "weight"

        def hit(fault: str) -> dict[str, Any] | None:
            return next((v for v in self._all(fault, layer) if v["tensor"] in (short, "all")), None)

        if kind == "weight" and hit("weight-gradient-transposed"):
            value = np.ascontiguousarray(value.T).reshape(value.shape)
        if hit(f"{kind}-gradient-missing"):
            value = 0 * value
        if hit(f"{kind}-gradient-averaged"):
            value = value / (self.batch * self.length)
        if name == EMBEDDING:
            if self._of("embedding-gradient-padding", OUTER) is not None:
                value = value.copy()
                value[self.ids[~self.mask][0]] += np.linspace(-1, 1, value.shape[1]) * np.abs(value).max()
            if frozen := self._of("embedding-row-frozen", OUTER):
                value = value.copy()
                value[frozen["token"]] = 0
        if rounded := self._of("gradient-rounded", layer):
            value = np.asarray(value, f32).astype(ml_dtypes.finfo(rounded["dtype"]).dtype).astype(f32)
        if self._of("gradient-truncated", layer) is not None:
            value = (np.ascontiguousarray(value, f32).view(np.uint32) & np.uint32(0xFFFF0000)).view(f32)
        if self._of("stochastic-rounding", layer) is not None:
            noise = np.random.default_rng(len(self.g)).integers(0, 1 << 16, value.shape, dtype=np.uint32)
            bits = np.ascontiguousarray(value, f32).view(np.uint32) + noise
            value = (bits & np.uint32(0xFFFF0000)).view(f32)
        self.g[f"grad.{name}"] = np.asarray(value, self.wide)
        if name in self.adapter:
            a, b, scale = self.adapter[name]
            scale = 1.0 if self._of("lora-scale-missing", layer) is not None else scale
            missing = (self._of("lora-gradient-missing", layer) or {"matrix": ""})["matrix"]
            self.g[f"grad.{name}.lora_A"] = np.asarray(scale * (b.T @ value), self.wide) * (missing != "A")
            self.g[f"grad.{name}.lora_B"] = np.asarray(scale * (value @ a.T), self.wide) * (missing != "B")

    def _of_all(self) -> None:
        """What happens to all parameters' gradients at the end."""
        names = [f"grad.{name}" for name in self.weights if f"grad.{name}" in self.g]
        if self._of("gradient-of-another-step", OUTER) is not None:
            other = np.random.default_rng(7).integers(0, self.weights[EMBEDDING].shape[0], self.ids.shape)
            before = backward(self.weights, self.config, other, self.mask, None, (), self.dtype)
            self.g |= {name: before[name] for name in names}
        for values in self._all("gradient-scaled", OUTER):
            if values["where"] == "parameters":
                self.g |= {name: self.wide(values["factor"]) * self.g[name] for name in names}
        if clipped := self._of("gradient-clipped", OUTER):
            norm = np.sqrt(sum(np.sum(self.g[name].astype(f64) ** 2) for name in names))
            factor = min(1.0, clipped["norm"] / norm)
            self.g |= {name: self.wide(factor) * self.g[name] for name in names}
