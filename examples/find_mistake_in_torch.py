"""Captures the stages of one's own PyTorch model and lets parity say what is wrong with it.

    python find_mistake_in_torch.py MODEL                           # the model below is right: nothing is found
    python find_mistake_in_torch.py MODEL --mistake rope|eps|heads  # and so it is told what each of these is

Put your own model in place of `MyQwen2` and call `capture` where it has a stage's value: `apr_jax.trace.stages` has
their names, `docs/dumps.md` says what each one is; the more, the sharper the answer. MODEL is a HuggingFace folder, an
`.apr` or a safetensors file.
"""

import argparse
import sys

import numpy as np
import torch
from torch.nn.functional import linear, silu

from apr_jax import load_model, open_checkpoint
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace.inputs import seeded


class MyQwen2:
    """A forward pass in PyTorch, from a checkpoint's tensors; `mistake` plants one of three."""

    def __init__(self, path: str, mistake: str | None):
        with open_checkpoint(path) as checkpoint:
            self.config = checkpoint.model_config()
            self.weights = {
                name: torch.tensor(tensor.read().astype(np.float32)) for name, tensor in checkpoint.tensors.items()
            }
        self.mistake = mistake
        self.captured: dict[str, np.ndarray] = {}

    def capture(self, key: str, value: torch.Tensor) -> torch.Tensor:
        self.captured[key] = value.numpy()
        return value

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = 1e-3 if self.mistake == "eps" else self.config.rms_norm_eps
        return self.weights[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * self.config.rope_theta ** -(torch.arange(half) / half)
        cos, sin = (f(angles)[None, :, None] for f in (torch.cos, torch.sin))
        if self.mistake == "rope":  # neighbours are rotated in place of halves
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        low, high = x.split(half, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        config, length, stage = self.config, x.shape[1], f"stage.{layer}"
        at = f"model.layers.{layer}.self_attn"
        q, k, v = (self.linear(x, f"{at}.{name}_proj").unflatten(-1, (-1, config.head_dim)) for name in "qkv")
        self.capture(f"{stage}.qkv_bias", torch.cat([part.flatten(2) for part in (q, k, v)], -1))
        q = self.capture(f"{stage}.q_post_rope", self.rope(q).flatten(2)).unflatten(-1, (-1, config.head_dim))
        k = self.capture(f"{stage}.k_post_rope", self.rope(k).flatten(2)).unflatten(-1, (-1, config.head_dim))
        groups = config.num_heads // config.num_kv_heads
        if self.mistake == "heads":  # query head h reads KV head h mod n in place of h // group
            k, v = (part.repeat(1, 1, groups, 1) for part in (k, v))
        else:
            k, v = (part.repeat_interleave(groups, 2) for part in (k, v))
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / config.head_dim**0.5
        hidden = torch.ones(length, length).triu(1).bool()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        values = torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2)
        self.capture(f"{stage}.attention", values)
        return self.capture(f"{stage}.attn_out", self.linear(values, f"{at}.o_proj"))

    @torch.inference_mode()
    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        x = self.capture("stage.embedding", self.weights["model.embed_tokens.weight"][torch.tensor(ids).long()])
        for layer in range(self.config.num_layers):
            at, stage = f"model.layers.{layer}", f"stage.{layer}"
            normed = self.capture(f"{stage}.attn_norm", self.norm(x, f"{at}.input_layernorm"))
            x = self.capture(f"{stage}.post_attn_residual", x + self.attention(normed, layer))
            normed = self.capture(f"{stage}.ffn_norm", self.norm(x, f"{at}.post_attention_layernorm"))
            gated = silu(self.linear(normed, f"{at}.mlp.gate_proj")) * self.linear(normed, f"{at}.mlp.up_proj")
            self.capture(f"{stage}.ffn_swigl", gated)
            x = self.capture(f"{stage}.post_ffn_residual", x + self.linear(gated, f"{at}.mlp.down_proj"))
        x = self.capture("stage.final_norm", self.norm(x, "model.norm"))
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.capture("logits", linear(x, self.weights[f"{head}.weight"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mistake", choices=("rope", "eps", "heads"))
    args = parser.parse_args()

    mine = MyQwen2(args.model, args.mistake)
    inputs = seeded(mine.config.vocab_size, batch=1)  # 64 tokens: one token alone sees neither RoPE nor a mask
    mine(inputs.input_ids)

    exact, same = load_model(args.model, "float64", "cpu"), load_model(args.model, "float32", "cpu")
    findings = diagnose(exact, same, inputs, mine.captured).findings
    for finding in findings:
        print(finding.sentence)
    print(f"mistakes found: {len(findings)}, in {len(mine.captured)} stages")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
