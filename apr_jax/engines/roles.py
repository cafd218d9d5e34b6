"""Which module of another engine's tree plays which part of a Qwen2 or Llama model: told by shapes and by names.

Engines agree on the parts and not on their names: `model.layers.0.self_attn.q_proj`, `transformer.h.0.attn.c_q`,
`blocks.0.attention.wq`. What differs little is which words are used, and shapes say the rest: only the embedding has
the vocabulary in front, only `down` takes the wide side in. What no rule finds, a mapping of part -> name says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from apr_jax.converters.errors import RefusedError, UsageError

Kind = Literal["linear", "norm", "embedding", "other"]

OUTER = ("embedding", "final_norm", "head")
"""Parts of a model outside of its layers."""
INNER = ("attn_norm", "q", "k", "v", "qkv", "rotary", "core", "o", "ffn_norm", "gate", "up", "gate_up", "act", "down")
"""Parts of a layer; `qkv` and `gate_up` are fused projections."""
OUTPUTS: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "o": "attn_out",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "act": "ffn_silu",
    "down": "ffn_out",
    "layer": "post_ffn_residual",
    "qkv": "qkv_bias",
    "embedding": "embedding",
    "final_norm": "final_norm",
    "head": "logits",
}
"""Part -> the stage that it computes, where that is one."""
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Part:
    """One module of a tree.

    Attributes:
      name: Its dotted path.
      kind: What its weight looks like.
      shape: [out, in] of a projection, [rows, width] of an embedding, [width] of a norm; () of anything else.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...] = ()


def named(name: str) -> Part:
    """Returns a module of which the name alone is known."""
    last = name.rpartition(".")[2].lower()
    kinds: tuple[tuple[str, Kind], ...] = (
        ("rotary", "other"),
        ("norm", "norm"),
        ("ln_", "norm"),
        ("proj", "linear"),
        ("embed", "embedding"),
        ("wte", "embedding"),
    )
    return Part(name, next((kind for word, kind in kinds if word in last), "other"))


@dataclasses.dataclass(frozen=True)
class Role:
    """What a module is.

    Attributes:
      part: One of OUTER, INNER, "layer" or "attention" (what holds the projections of attention).
      layer: The layer that it stands in, in the order of the tree; None outside.
    """

    part: str
    layer: int | None = None


def assign(parts: Sequence[Part], names: Mapping[str, str] | None = None) -> dict[str, Role]:
    """Finds what each module of a tree is.

    Args:
      parts: All modules, in the order of the tree.
      names: Part -> the end of its path, for what the rules cannot tell: {"q": "attend.ask", "head": "unembed"}.

    Returns:
      Path -> role. Parts that the tree does not show as modules are not in it.

    Raises:
      UsageError: `names` has an unknown part, or names nothing.
      RefusedError: No layers can be seen in the tree.
    """
    names = dict(names or {})
    if unknown := sorted(set(names) - {*OUTER, *INNER}):
        raise UsageError("no such part", code="capture-names", found=unknown, expected=", ".join((*OUTER, *INNER)))
    stem, layers = _layers(parts, set(names.values()))
    roles: dict[str, Role] = {}
    width = _width(parts, layers)
    for index, number in enumerate(layers):
        prefix = f"{stem}{number}"
        inside = [part for part in parts if part.name.startswith(prefix + ".")]
        found = _inner(inside, prefix, width, names)
        roles[prefix] = Role("layer", index)
        roles |= {name: Role(part, index) for part, name in found.items()}
        if "o" in found and (holder := found["o"].rpartition(".")[0]) != prefix:
            roles[holder] = Role("attention", index)
    outside = [part for part in parts if not re.match(re.escape(stem) + r"\d+(\.|$)", part.name)]
    roles |= {name: Role(part) for part, name in _outer(outside, width, names).items()}
    found_parts = {role.part for role in roles.values()}
    if lost := sorted(set(names) - found_parts):
        raise UsageError(
            "a name that was given fits no module",
            code="capture-names",
            found=", ".join(f"{part}: {names[part]}" for part in lost),
            expected="the end of a module's path, such as "
            + ", ".join(part.name.removeprefix(f"{stem}{layers[0]}.") for part in parts if part.shape)[:300],
        )
    return roles


def _layers(parts: Sequence[Part], named: set[str]) -> tuple[str, list[int]]:
    """Returns what stands before the number of a layer, and the numbers in the order of the tree."""
    groups: dict[str, dict[int, int]] = {}
    for part in parts:
        for match in re.finditer(r"(?<=\d)(?=\.)", part.name):
            head = part.name[: match.end()]
            number = re.search(r"\d+$", head)
            if number is None:
                continue
            group = groups.setdefault(head[: number.start()], {})
            group[int(number[0])] = group.get(int(number[0]), 0) + (part.kind in ("linear", "norm"))
    # The outermost list that holds whole layers: experts and heads, within them, are smaller.
    whole = {
        stem: numbers for stem, numbers in groups.items() if min(numbers.values()) >= 4 or (named and len(numbers) > 1)
    }
    if not whole:
        raise RefusedError(
            "no layers can be seen in this model",
            code="capture-layers",
            found=", ".join(part.name for part in parts[:_SHOWN]) or "no modules",
            expected="numbered modules with at least four projections and norms each: layers.0, h.0, block_0",
            hint="Write the stages yourself with capture.arrays (docs/dumps.md).",
        )
    stem = max(whole, key=lambda each: (sum(whole[each].values()), -len(each)))
    return stem, list(whole[stem])


def _width(parts: Sequence[Part], layers: Sequence[int]) -> int:
    """The width of the residual stream: what most projections and norms have on one side."""
    sizes: dict[int, int] = {}
    for part in parts:
        for size in {part.shape[0] if part.kind == "norm" else part.shape[-1]} if part.shape else ():
            sizes[size] = sizes.get(size, 0) + 1
    del layers
    return max(sizes, key=lambda size: sizes[size]) if sizes else 0


def _words(name: str) -> set[str]:
    """The words of a path's last component: "c_q" -> {c, q}, "inputLayerNorm1" -> {input, layer, norm, 1}."""
    last = name.rpartition(".")[2]
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", last)}


_PROJECTIONS: Mapping[str, tuple[set[str], ...]] = {
    "qkv": ({"qkv"}, {"wqkv"}, {"query", "key", "value"}, {"c", "attn"}, {"q", "k", "v"}),
    "gate_up": ({"gate", "up"}, {"w", "13"}, {"gateup"}, {"wi", "fused"}),
    "q": ({"q"}, {"query"}, {"wq"}, {"queries"}),
    "k": ({"k"}, {"key"}, {"wk"}, {"keys"}),
    "v": ({"v"}, {"value"}, {"wv"}, {"values"}),
    "gate": ({"gate"}, {"w", "1"}, {"wi", "0"}, {"gating"}),
    "up": ({"up"}, {"w", "3"}, {"wi", "1"}),
    "down": ({"down"}, {"w", "2"}, {"wdown"}),
    "o": ({"o"}, {"out"}, {"wo"}, {"output"}, {"dense"}),
}
_ATTENTION, _FEED_FORWARD = {"attn", "attention", "attend"}, {"mlp", "ffn", "ff", "feed", "moe"}


def _inner(inside: Sequence[Part], prefix: str, width: int, names: Mapping[str, str]) -> dict[str, str]:
    """Returns part -> path of one layer's modules."""
    found = {
        part: path.name
        for part, end in names.items()
        for path in inside
        if part in INNER and f".{path.name}".endswith(f".{end}")
    }
    for path in inside:
        if path.name in found.values():
            continue
        part = _projection(path, width) if path.kind == "linear" else _small(path, prefix)
        if part is not None:
            found.setdefault(part, path.name)
    rest = [
        path for path in inside if path.kind == "norm" and path.name not in found.values() and _is_stream(path, width)
    ]
    for path in [*rest]:
        part = _norm(path)
        if part is not None and part not in found:
            found[part] = path.name
            rest.remove(path)
    # Two norms whose names say nothing stand in the order in which they are used.
    missing = [part for part in ("attn_norm", "ffn_norm") if part not in found]
    if len(missing) == len(rest):
        found |= {part: path.name for part, path in zip(missing, rest, strict=True)}
    return found


def _is_stream(path: Part, width: int) -> bool:
    return path.shape in ((width,), ()) and not _words(path.name) & {"q", "k"}


def _projection(path: Part, width: int) -> str | None:
    words = _words(path.name)
    for part, spellings in _PROJECTIONS.items():
        if any(spelling <= words for spelling in spellings):
            # "out_proj" of an MLP is its down projection.
            return "down" if part == "o" and _within(path) == "mlp" else part
    if words <= {"c", "proj", "projection", "linear", "fc", "to"} and words & {"proj", "projection"}:
        return {"mlp": "down", "attention": "o"}.get(_within(path))
    if _within(path) == "mlp" and len(path.shape) == 2 and path.shape[1] != width and path.shape[0] == width:
        return "down"
    return None


def _within(path: Part) -> str:
    above: set[str] = set().union(*(_words(name) for name in path.name.split(".")[:-1]), set())
    if above & _FEED_FORWARD:
        return "mlp"
    return "attention" if above & _ATTENTION else ""


def _norm(path: Part) -> str | None:
    words = _words(path.name)
    if words & {"post", "ffn", "ffw", "mlp", "ff", "2", "feed"}:
        return "ffn_norm"
    return "attn_norm" if words & {"input", "pre", "attn", "attention", "1"} else None


def _small(path: Part, prefix: str) -> str | None:
    """Parts without weights: rotations, what attends, activations."""
    words = _words(path.name)
    if path.name.rpartition(".")[0] != prefix and words <= {*_ATTENTION, "core"} and _within(path) == "attention":
        return "core"  # what attends, without projections: vLLM's and SGLang's `self_attn.attn`
    if words & {"rotary", "rope"}:
        return "rotary"
    return "act" if words & {"act", "activation", "silu", "swiglu"} and path.kind == "other" else None


def _outer(outside: Sequence[Part], width: int, names: Mapping[str, str]) -> dict[str, str]:
    """Returns part -> path of the modules around the layers."""
    found = {
        part: path.name
        for part, end in names.items()
        for path in outside
        if part in OUTER and f".{path.name}".endswith(f".{end}")
    }

    def first(part: str, paths: Iterable[Part]) -> None:
        for path in paths:
            if path.name not in found.values():
                found.setdefault(part, path.name)

    tables = [
        path for path in outside if path.kind == "embedding" and not _words(path.name) & {"wpe", "position", "pos"}
    ]
    heads = [
        path for path in outside if _words(path.name) & {"head", "unembed", "output", "logits"} and path.kind != "norm"
    ]
    first("embedding", [path for path in tables if path not in heads])
    first("head", [path for path in heads if "logits" in _words(path.name)] or heads)
    first("head", [path for path in outside if path.kind == "linear" and path.shape[1:] == (width,)])
    first("final_norm", [path for path in outside if path.kind == "norm" and _is_stream(path, width)])
    return found
