"""Captures one's own PyTorch model and lets parity say what is wrong with it.

    python find_mistake_in_torch.py MODEL                           # the model below is right: nothing is found
    python find_mistake_in_torch.py MODEL --mistake rope|eps|heads  # and so it is told what each of these is

Put your own model in place of `MyQwen2`: `capture.torch` finds its layers, whatever they are called; what it does not
find is one mapping (NAMES below; HuggingFace's and vLLM's names need none). MODEL is a HuggingFace folder, an `.apr` or
a safetensors file.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear, silu

from apr_jax import capture, open_checkpoint
from apr_jax.commands import parity
from apr_jax.trace.inputs import seeded

NAMES = {"q": "query_of", "k": "key_of", "v": "value_of", "o": "mix"}


class Norm(nn.Module):
    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Linear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Layer(nn.Module):
    def __init__(self, take, at, config, mistake):
        super().__init__()
        self.config, self.mistake, eps = config, mistake, 1e-3 if mistake == "eps" else config.rms_norm_eps
        for ours, name in zip(NAMES.values(), "qkvo", strict=True):
            setattr(self, ours, take(f"{at}.self_attn.{name}_proj"))
        self.gate, self.up, self.down = (take(f"{at}.mlp.{name}_proj") for name in ("gate", "up", "down"))
        self.attn_norm = Norm(take(f"{at}.input_layernorm").weight.data, eps)
        self.ffn_norm = Norm(take(f"{at}.post_attention_layernorm").weight.data, eps)

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * self.config.rope_theta ** -(torch.arange(half) / half)
        cos, sin = (f(angles)[None, :, None] for f in (torch.cos, torch.sin))
        if self.mistake == "rope":  # neighbours are rotated in place of halves
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        low, high = x.split(half, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        config, length = self.config, x.shape[1]
        q, k, v = (f(x).unflatten(-1, (-1, config.head_dim)) for f in (self.query_of, self.key_of, self.value_of))
        q, k = self.rope(q), self.rope(k)
        groups = config.num_heads // config.num_kv_heads
        if self.mistake == "heads":  # query head h reads KV head h mod n in place of h // group
            k, v = (part.repeat(1, 1, groups, 1) for part in (k, v))
        else:
            k, v = (part.repeat_interleave(groups, 2) for part in (k, v))
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / config.head_dim**0.5
        hidden = torch.ones(length, length).triu(1).bool()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.mix(torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attn_norm(x))
        normed = self.ffn_norm(x)
        return x + self.down(silu(self.gate(normed)) * self.up(normed))


class MyQwen2(nn.Module):
    """A forward pass in PyTorch, from a checkpoint's tensors; `mistake` plants one of three."""

    def __init__(self, path: str, mistake: str | None):
        super().__init__()
        with open_checkpoint(path) as checkpoint:
            config = self.config = checkpoint.model_config()
            tensors = {name: torch.tensor(each.read().astype(np.float32)) for name, each in checkpoint.tensors.items()}

        def take(name: str) -> Linear:
            return Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

        self.table = nn.Embedding.from_pretrained(tensors["model.embed_tokens.weight"])
        self.blocks = nn.ModuleList(
            Layer(take, f"model.layers.{index}", config, mistake) for index in range(config.num_layers)
        )
        self.norm = Norm(tensors["model.norm.weight"], 1e-3 if mistake == "eps" else config.rms_norm_eps)
        self.head = take("model.embed_tokens" if config.tie_word_embeddings else "lm_head")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mistake", choices=("rope", "eps", "heads"))
    args = parser.parse_args()

    model = MyQwen2(args.model, args.mistake)
    # 64 tokens: one token alone sees neither RoPE nor a mask.
    ids = torch.tensor(seeded(model.config.vocab_size, batch=1).input_ids).long()
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder, "dump")
        with torch.inference_mode(), capture.torch(model, dump, names=NAMES):
            model(ids)
        return parity.main(parity.parse(["parity", args.model, "--right", str(dump)]))


if __name__ == "__main__":
    sys.exit(main())
