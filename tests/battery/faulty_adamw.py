"""AdamW in NumPy, as an engine in float32 runs it, that can be wrong in every way that is known.

It shares nothing with the code under test: parameters are a dict, each formula is spelt out, and all of it is rounded
to float32. Gradients come from outside, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

F = np.float32
Arrays = dict[str, np.ndarray]

# Mistake -> the names that may be given it, where they are not its own: two that nothing tells apart by these steps.
MISTAKES: dict[str, dict[str, Any]] = {
    "adamw-bias-correction": {},
    "adamw-bias-correction first": {},
    "adamw-bias-correction second": {},
    "adamw-step-off-by-one": {},
    "adamw-step-off-by-one behind": {},
    "adamw-betas-swapped": {},
    "adamw-beta first": {"is": 0.95},
    "adamw-beta second": {"is": 0.95},
    "adamw-moment-undamped": {},
    "adamw-state-lost": {},
    "adamw-eps-in-root": {},
    "adamw-eps-before-correction": {},
    "adamw-eps": {"eps": 1e-5},
    "adamw-root-missing": {},
    "adamw-momentum-only": {},
    "adamw-lr": {"factor": 0.1},
    "adamw-lr uphill": {"factor": -1.0},
    "adamw-schedule-off-by-one": {},
    "adamw-schedule-off-by-one behind": {},
    "adamw-steps": {},
    "adamw-decay-in-moment": {},
    "adamw-decay-on-norms": {},
    "adamw-decay-on-norms nothing": {},
    "adamw-decay-unscaled": {},
    "adamw-weight-decay": {"decay": 0.3},
    "adamw-weight-decay sign": {"decay": -0.1},
    "adamw-gradient-scaled": {"factor": 1e-3},
    "adamw-gradient-clipped": {"most": 1e-3},
    "adamw-gradient-clipped value": {},
    "adamw-gradient-accumulated": {},
    "adamw-gradient-stale": {},
    "adamw-not-moved": {},
    "adamw-weights-rounded": {},
}


def is_vector(name: str) -> bool:
    return name.endswith((".bias", "norm.weight"))


def run(
    start: Mapping[str, np.ndarray],
    gradients: Callable[[Arrays], Arrays],
    rates: list[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.1,
    vectors_decay: bool = False,
    mistake: str = "",
) -> Arrays:
    """Returns the parameters after a step at each rate, float32.

    Args:
      start: The parameters before, float32.
      gradients: Parameters -> gradients, float32.
      rates: The learning rate of each step.
      betas, eps, decay: Of AdamW.
      vectors_decay: Whether norms and biases decay too.
      mistake: One of `MISTAKES`; "" is right.
    """
    p = {name: np.array(value, F) for name, value in start.items()}
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    total = {name: np.zeros_like(value) for name, value in p.items()}
    before: Arrays | None = None
    kind, _, way = mistake.partition(" ")
    beta1, beta2 = betas[::-1] if kind == "adamw-betas-swapped" else betas
    if kind == "adamw-beta":
        beta1, beta2 = (0.95, beta2) if way == "first" else (beta1, 0.95)
    if kind == "adamw-eps":
        eps = 1e-5
    if kind == "adamw-weight-decay":
        decay = -decay if way == "sign" else 3 * decay
    if kind == "adamw-lr":
        rates = [rate * (-1.0 if way == "uphill" else 0.1) for rate in rates]
    if kind == "adamw-schedule-off-by-one":
        rates = [0.0, *rates[:-1]] if way else [*rates[1:], rates[-1]]
    if kind == "adamw-steps":
        rates = rates[:-1]
    for t, rate in enumerate(rates, 1):
        raw = gradients(p)
        g = {name: np.array(value, F) for name, value in raw.items()}
        if kind == "adamw-gradient-accumulated":
            total = {name: total[name] + g[name] for name in g}
            g = total
        if kind == "adamw-gradient-stale":
            g, before = (before or g), g
        if kind == "adamw-gradient-scaled":
            g = {name: value * F(1e-3) for name, value in g.items()}
        if kind == "adamw-gradient-clipped":
            norm = np.sqrt(sum(np.sum(value.astype(float) ** 2) for value in g.values()))
            if way:
                g = {name: np.clip(value, -F(1e-4), F(1e-4)) for name, value in g.items()}
            else:
                # Far below the norm, so that eps is not small beside what is left.
                g = {name: value * F(min(1.0, 1e-3 / norm)) for name, value in g.items()}
        for name in p:
            if kind == "adamw-not-moved" and name == "model.layers.1.mlp.up_proj.weight":
                continue
            x, d = p[name], g[name]
            shrinks = decay if vectors_decay or not is_vector(name) else 0.0
            if kind == "adamw-decay-on-norms":
                shrinks = 0.0 if way else decay
            if kind == "adamw-decay-in-moment":
                d = d + F(shrinks) * x
            if kind == "adamw-state-lost":
                m[name], v[name] = np.zeros_like(x), np.zeros_like(x)
            into = F(1.0) if kind == "adamw-moment-undamped" else F(1 - beta1)
            m[name] = F(beta1) * m[name] + into * d
            v[name] = F(beta2) * v[name] + F(1 - beta2) * d * d
            count = 1 if kind == "adamw-state-lost" else t
            if kind == "adamw-step-off-by-one":
                count = max(t - 1, 1) if way else t + 1
            c1, c2 = F(1 - beta1**count), F(1 - beta2**count)
            if kind == "adamw-bias-correction":
                c1 = F(1) if way in ("", "first") else c1
                c2 = F(1) if way in ("", "second") else c2
            if kind == "adamw-eps-in-root":
                step = m[name] / c1 / np.sqrt(v[name] / c2 + F(eps))
            elif kind == "adamw-eps-before-correction":
                step = m[name] / c1 * np.sqrt(c2) / (np.sqrt(v[name]) + F(eps))
            elif kind == "adamw-root-missing":
                step = m[name] / c1 / (v[name] / c2 + F(eps))
            elif kind == "adamw-momentum-only":
                step = m[name] / c1
            else:
                step = m[name] / c1 / (np.sqrt(v[name] / c2) + F(eps))
            if kind == "adamw-decay-unscaled":
                x = x * F(1 - shrinks)
            elif kind != "adamw-decay-in-moment":
                x = x * F(1 - rate * shrinks)
            p[name] = x - F(rate) * step
            if kind == "adamw-weights-rounded":
                p[name] = p[name].astype(ml_dtypes.bfloat16).astype(F)
    return p
