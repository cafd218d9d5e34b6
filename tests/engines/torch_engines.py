"""PyTorch engines with other names and other cuts than HuggingFace's; `mistake` plants one of MISTAKES."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import linear, silu

MISTAKES = {
    "pairs": "rope-adjacent-pairs",
    "eps": "rms-norm-eps",
    "heads": "kv-heads-interleaved",
    "mask": "mask-off-by-one",
    "scale": "softmax-scale",
}


class Scale(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Look(nn.Module):
    """Attention whose projections have names of their own."""

    def __init__(self, c, mistake: str | None):
        super().__init__()
        self.c, self.mistake = c, mistake
        self.ask = nn.Linear(c.hidden_size, c.num_heads * c.head_dim)
        self.offer = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.tell = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim)
        self.give = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        half = self.c.head_dim // 2
        angles = torch.arange(x.shape[1])[:, None] * self.c.rope_theta ** -(torch.arange(half) / half)
        cos, sin = (f(angles)[None, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
        if self.mistake == "pairs":
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        low, high = x.split(half, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length, groups = x.shape[1], self.c.num_heads // self.c.num_kv_heads
        q, k, v = (part(x).unflatten(-1, (-1, self.c.head_dim)) for part in (self.ask, self.offer, self.tell))
        q, k = self.rope(q), self.rope(k)
        if self.mistake == "heads":
            k, v = (part.repeat(1, 1, groups, 1) for part in (k, v))
        else:
            k, v = (part.repeat_interleave(groups, 2) for part in (k, v))
        scores = torch.einsum("btnh,bsnh->bnts", q, k)
        scores = scores if self.mistake == "scale" else scores / self.c.head_dim**0.5
        hidden = torch.ones(length, length).triu(0 if self.mistake == "mask" else 1).bool()
        hidden[0, 0] = False
        weights = scores.masked_fill(hidden, -torch.inf).float().softmax(-1).to(x.dtype)
        return self.give(torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2))


class Think(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.w3 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c, mistake):
        super().__init__()
        eps = 1e-3 if mistake == "eps" else c.rms_norm_eps
        self.scale_a, self.look = Scale(c.hidden_size, eps), Look(c, mistake)
        self.scale_b, self.think = Scale(c.hidden_size, eps), Think(c)

    def forward(self, x):
        x = x + self.look(self.scale_a(x))
        return x + self.think(self.scale_b(x))


class Custom(nn.Module):
    """A model whose modules are called as its author liked; the head is the embedding once more."""

    NAMES: ClassVar = {"q": "ask", "k": "offer", "v": "tell", "o": "give"}

    def __init__(self, c, mistake: str | None = None):
        super().__init__()
        self.table = nn.Embedding(c.vocab_size, c.hidden_size)
        self.tower = nn.ModuleList(Block(c, mistake) for _ in range(c.num_layers))
        self.last = Scale(c.hidden_size, 1e-3 if mistake == "eps" else c.rms_norm_eps)

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.tower:
            x = block(x)
        return linear(self.last(x), self.table.weight)


# --- As vLLM and SGLang cut it: fused projections, norms that add, one flat row of tokens --------------------------


class AddNorm(Scale):
    def forward(self, x, residual=None):
        if residual is None:
            return super().forward(x)
        residual.add_(x)  # in place, as the kernels do
        return super().forward(residual), residual


class Projection(nn.Linear):
    """Returns its output and a bias that it did not add, as vLLM's parallel layers do."""

    def forward(self, x):
        return super().forward(x), None


class Rotary(nn.Module):
    def __init__(self, c, mistake):
        super().__init__()
        self.c, self.mistake = c, mistake

    def forward(self, positions, q, k):
        half = self.c.head_dim // 2
        angles = positions[:, None] * self.c.rope_theta ** -(torch.arange(half) / half)
        cos, sin = (f(angles)[:, None] for f in (torch.cos, torch.sin))

        def turn(x):
            x = x.unflatten(-1, (-1, self.c.head_dim))
            if self.mistake == "pairs":
                even, odd = x[..., 0::2], x[..., 1::2]
                return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(1)
            low, high = x.split(half, -1)
            return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).flatten(1)

        return turn(q), turn(k)


class FlatAttention(nn.Module):
    def __init__(self, c, rotary, mistake):
        super().__init__()
        self.c, self.mistake = c, mistake
        self.sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        self.qkv_proj = Projection(c.hidden_size, sum(self.sizes))
        self.o_proj = Projection(self.sizes[0], c.hidden_size, bias=False)
        self.rotary_emb = rotary

    def forward(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, -1)
        q, k = self.rotary_emb(positions, q, k)
        q, k, v = (x.unflatten(-1, (-1, self.c.head_dim)).transpose(0, 1) for x in (q, k, v))
        groups = self.c.num_heads // self.c.num_kv_heads
        if self.mistake == "heads":
            k, v = (part.repeat(groups, 1, 1) for part in (k, v))
        else:
            k, v = (part.repeat_interleave(groups, 0) for part in (k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        scale = 1.0 if self.mistake == "scale" else None
        mask = torch.ones(len(positions), len(positions)).tril(-1 if self.mistake == "mask" else 0).bool()
        mask[0, 0] = True
        values = attend(q, k, v, attn_mask=mask, scale=scale)
        return self.o_proj(values.transpose(0, 1).flatten(1))[0]


class SiluAndMul(nn.Module):
    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return silu(gate) * up


class FusedMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = Projection(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = Projection(c.intermediate_size, c.hidden_size, bias=False)
        self.act_fn = SiluAndMul()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class FlatLayer(nn.Module):
    def __init__(self, c, rotary, mistake):
        super().__init__()
        eps = 1e-3 if mistake == "eps" else c.rms_norm_eps
        self.self_attn, self.mlp = FlatAttention(c, rotary, mistake), FusedMLP(c)
        self.input_layernorm, self.post_attention_layernorm = AddNorm(c.hidden_size, eps), AddNorm(c.hidden_size, eps)

    def forward(self, positions, hidden_states, residual):
        if residual is None:
            residual, hidden_states = hidden_states.clone(), self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class FlatModel(nn.Module):
    def __init__(self, c, mistake):
        super().__init__()
        rotary = Rotary(c, mistake)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(FlatLayer(c, rotary, mistake) for _ in range(c.num_layers))
        self.norm = AddNorm(c.hidden_size, 1e-3 if mistake == "eps" else c.rms_norm_eps)

    def forward(self, input_ids, positions):
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]


class Flat(nn.Module):
    """vLLM's Qwen2ForCausalLM in eager mode, as far as its modules go; logits are no part of its call."""

    def __init__(self, c, mistake: str | None = None):
        super().__init__()
        self.model = FlatModel(c, mistake)

    def forward(self, input_ids, positions):
        return self.model(input_ids, positions)


# --- Weights ---------------------------------------------------------------------------------------------------------

_CUSTOM = (
    ("model.embed_tokens", "table"),
    ("model.layers", "tower"),
    ("model.norm", "last"),
    ("self_attn", "look"),
    ("q_proj", "ask"),
    ("k_proj", "offer"),
    ("v_proj", "tell"),
    ("o_proj", "give"),
    ("input_layernorm", "scale_a"),
    ("post_attention_layernorm", "scale_b"),
    ("mlp", "think"),
    ("gate_proj", "w1"),
    ("down_proj", "w2"),
    ("up_proj", "w3"),
)


def custom_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """HuggingFace's tensors under the names of `Custom`."""
    made = {}
    for name, tensor in tensors.items():
        for theirs, ours in _CUSTOM:
            name = name.replace(theirs, ours)
        made[name] = tensor
    return {name: tensor for name, tensor in made.items() if not name.startswith("lm_head")}


def flat_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """HuggingFace's tensors with fused projections."""
    made = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            made[name.replace("q_proj", "qkv_proj")] = torch.cat(
                [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            )
        elif "gate_proj" in name:
            made[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [tensor, tensors[name.replace("gate_proj", "up_proj")]]
            )
        elif not any(part in name for part in ("k_proj", "v_proj", "up_proj", "lm_head")):
            made[name] = tensor
    return made
