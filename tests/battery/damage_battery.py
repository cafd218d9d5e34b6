"""The planted-damage battery: damages a checkpoint in every way that `verify` knows, and looks whether it says which.

    python tests/battery/damage_battery.py [-v] [WORDS]     # prints the table; exit 1 if the bar is missed

-v lists what was named otherwise; with WORDS, only variants that have one of them in their name are planted, alone.

Every variant is planted in several tensors and element types, alone and together with another one in another tensor.
Detected: the tensor is in a finding. Named exactly: one finding for it, with the right cause, tensors and parameters,
and no alternative but those that cannot be told apart. Undamaged pairs in all type pairings must give nothing but
exact casts. The damage is done by the NumPy code of this file, which shares nothing with the search for causes.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from apr_jax.converters.checkpoint.openers import open_checkpoint  # noqa: E402
from apr_jax.converters.verify.comparison import compare  # noqa: E402
from tests.battery import quantisers  # noqa: E402

BASE = ROOT / "tests" / "data" / "checkpoints" / "gqa_tied_bf16"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
EXACT_SHARE = 0.97
NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
NAMES = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f64"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it."""

    code: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, NUMPY[self.code]).reshape(self.shape)

    @property
    def f32(self) -> np.ndarray:
        return self.array.astype("<f4")

    @property
    def bits(self) -> np.ndarray:
        return np.frombuffer(self.data, f"<u{NUMPY[self.code].itemsize}").reshape(self.shape)


Tensors = dict[str, Stored]


def stored(values: np.ndarray, code: str | None = None) -> Stored:
    """Rounds values to a type (to nearest even) and packs them."""
    code = code or next(code for code, dtype in NUMPY.items() if dtype == values.dtype)
    with np.errstate(all="ignore"):
        values = np.ascontiguousarray(values.astype(NUMPY[code]))
    return Stored(code, values.shape, values.tobytes())


def from_bits(bits: np.ndarray, code: str) -> Stored:
    bits = np.ascontiguousarray(bits)
    return Stored(code, bits.shape, bits.tobytes())


def write(folder: pathlib.Path, tensors: Mapping[str, Stored], tail: bytes = b"") -> None:
    """Writes a HuggingFace folder; data in the order of names, back to back."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.data)
        file.write(tail)
    (folder / "config.json").write_bytes((BASE / "config.json").read_bytes())


def read(folder: pathlib.Path) -> Tensors:
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return tensors


def base(code: str) -> Tensors:
    """Returns the sample checkpoint in a type; other types than its own get digits of their own behind its values."""
    tensors = read(BASE)
    if code == "BF16":
        return tensors
    random = np.random.default_rng(7)
    out = {}
    for name, tensor in sorted(tensors.items()):
        noise = 1 + random.uniform(-1, 1, tensor.shape) / 300
        out[name] = stored((tensor.f32 * noise).astype("<f4"), code)
    return out


_WIDE = {"mlp.gate_proj": (192, 512), "self_attn.q_proj": (160, 768), "mlp.down_proj": (128, 1024)}


def wide_random(code: str) -> Tensors:
    """Returns matrices that are wide enough for any size of group, of normal values."""
    random = np.random.default_rng(11)
    return {f"{_L0}{name}.weight": stored(random.normal(0, 0.02, shape), code) for name, shape in _WIDE.items()}


def wide_trained(code: str) -> Tensors:
    """Returns such matrices with what training makes: heavy tails, channels of their own size, outliers, a dead row."""
    random = np.random.default_rng(13)
    out = {}
    for name, (rows, columns) in _WIDE.items():
        values = 0.02 * random.standard_t(4, (rows, columns))
        values *= np.exp(random.normal(0, 0.4, (rows, 1))) * np.exp(random.normal(0, 0.3, (1, columns)))
        values += 0.02 * random.normal(0, 1, (rows, 4)) @ random.normal(0, 1, (4, columns))
        values[:, random.choice(columns, 3, replace=False)] *= 8
        values[7] = 0
        out[f"{_L0}{name}.weight"] = stored(values, code)
    return out


def wide_on_grid(code: str) -> Tensors:
    """Returns the trained ones as a file in int4 with minima in groups of 64 leaves them."""
    return {
        name: stored(quantisers.grouped(tensor.f32, 64, quantisers.real_zero(4)), code)
        for name, tensor in wide_trained(code).items()
    }


def fused(code: str) -> Tensors:
    """Returns the sample checkpoint with q, k and v in one tensor."""
    tensors = base(code)
    for name in [name for name in tensors if "q_proj" in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{role}_proj")) for role in "qkv"]
        tensors[name.replace("q_proj", "qkv_proj")] = stored(np.concatenate([part.array for part in parts]))
    return tensors


# --- damages


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was planted: the changed tensors, and what is to be said about them."""

    changed: Tensors
    cause: str
    parameters: dict[str, Any] | Callable[[dict[str, Any]], bool]
    alternatives: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of damage.

    Attributes:
      name: For the table.
      plant: (all tensors, the name of the one to damage) -> the damage; may change a partner too.
      tensors: Where it is planted, one after the other.
      codes: In which element types of the original.
      start: The undamaged checkpoint.
      quick: Whether the default suite plants it.
    """

    name: str
    plant: Callable[[Tensors, str], Damage]
    tensors: tuple[str, ...]
    codes: tuple[str, ...]
    start: Callable[[str], Tensors] = base
    quick: bool = True


_L0, _L1 = "model.layers.0.", "model.layers.1."
EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
GATE, UP, DOWN = (_L0 + f"mlp.{role}_proj.weight" for role in ("gate", "up", "down"))
Q, K, V, O = (_L1 + f"self_attn.{role}_proj.weight" for role in "qkvo")  # noqa: E741
QB, KB, VB = (_L0 + f"self_attn.{role}_proj.bias" for role in "qkv")
NORM, POST_NORM = _L0 + "input_layernorm.weight", _L1 + "post_attention_layernorm.weight"

MATRICES = (EMBEDDING, GATE, O)
MIXED = (EMBEDDING, DOWN, QB, NORM)
ALL_CODES = ("BF16", "F32", "F16")
HALVES = ("BF16", "F16")
OTHER_HALF = {"BF16": "F16", "F16": "BF16"}


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _one(name: str, tensor: Stored, cause: str, parameters: Any, *alternatives: str) -> Damage:
    return Damage({name: tensor}, cause, parameters, frozenset(alternatives))


# relabelled


def relabelled(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    new = OTHER_HALF[old.code]
    parameters = {"from": NAMES[old.code], "to": NAMES[new], "values_converted": False}
    return _one(name, Stored(new, old.shape, old.data), "relabelled-dtype", parameters)


def relabelled_width(new: str) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        columns = len(old.data) // NUMPY[new].itemsize * old.shape[-1] // int(np.prod(old.shape))
        parameters = {"from": NAMES[old.code], "to": NAMES[new], "values_converted": False}
        return _one(name, Stored(new, (*old.shape[:-1], columns), old.data), "relabelled-dtype", parameters)

    return plant


def misread(kept_type: bool) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        wrong = OTHER_HALF[old.code]
        values = np.frombuffer(old.data, NUMPY[wrong]).reshape(old.shape).astype("<f4")
        target = old.code if kept_type else "F32"
        stored_as = {"values_converted": True, "stored": NAMES[target]}
        parameters = {"from": NAMES[old.code], "to": NAMES[wrong]} | stored_as
        if not stored(values, target).f32.any():
            # All of them became too small for their type.
            return _one(name, stored(values, target), "zeroed", {"elements": "all"}, "relabelled-dtype")
        return _one(name, stored(values, target), "relabelled-dtype", parameters)

    return plant


def misread_as_two(wrong: str) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        values = np.frombuffer(old.data, NUMPY[wrong]).reshape(*old.shape[:-1], -1).astype("<f4")
        parameters = {"from": "f32", "to": NAMES[wrong], "values_converted": True, "stored": "f32"}
        return _one(name, stored(values, "F32"), "relabelled-dtype", parameters)

    return plant


# casts


def cut_to_bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype("<f4").view("<u4") & np.uint32(0xFFFF0000)).view("<f4")


def rounded(*codes: str) -> Callable[[Tensors, str], Damage]:
    """Through these types, one after the other, to nearest even."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        values = old.array
        for code in codes:
            with np.errstate(all="ignore"):
                values = values.astype(NUMPY[code])
        parameters = {"from": NAMES[old.code], "to": NAMES[codes[-1]], "rounding": "nearest-even"}
        if len(codes) > 1:
            parameters["through"] = NAMES[codes[0]]
        return _one(name, stored(values), "rounded-cast", parameters)

    return plant


def through_other_half(tensors: Tensors, name: str) -> Damage:
    code = tensors[name].code
    return rounded(OTHER_HALF[code], code)(tensors, name)


def truncated_cast(target: str, *, back: bool = False) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        values = tensors[name].f32
        if target == "BF16":
            cut = cut_to_bf16(values)
        else:
            cut = values.astype("<f2")
            cut = np.where(np.abs(cut.astype("<f4")) > np.abs(values), np.nextafter(cut, np.float16(0)), cut)
        final = "F32" if back else target
        parameters = {"from": "f32", "to": NAMES[final], "rounding": "truncated"}
        if back:
            parameters["through"] = NAMES[target]
        return _one(name, stored(cut, final), "rounded-cast", parameters)

    return plant


def byte_swapped(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    width = NUMPY[old.code].itemsize
    data = np.frombuffer(old.data, "u1").reshape(-1, width)[:, ::-1].tobytes()
    return _one(name, Stored(old.code, old.shape, data), "byte-swapped", {"element_bytes": width})


# transposes and permutations


def transposed(kept: bool) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        data = np.ascontiguousarray(old.bits.T).tobytes()
        shape = old.shape if kept else old.shape[::-1]
        square = old.shape[0] == old.shape[1]
        parameters = {"data": "transposed", "shape": "kept" if kept or square else "swapped"}
        return _one(name, Stored(old.code, shape, data), "transposed", parameters)

    return plant


def shape_swapped(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    parameters = {"data": "unchanged", "shape": "swapped"}
    return _one(name, Stored(old.code, old.shape[::-1], old.data), "transposed", parameters)


def permuted(axis: int, label: str, order: Callable[[int], np.ndarray]) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        bits = np.take(old.bits, order(old.shape[axis]), axis)
        cause = "columns-permuted" if axis else "rows-permuted"
        parameters = {"permutation": label.format(half=old.shape[axis] // 2)}
        return _one(name, from_bits(bits, old.code), cause, parameters)

    return plant


def shuffled(axis: int) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        order = _random(name).permutation(old.shape[axis])
        bits = np.take(old.bits, order, axis)
        first = ", ".join(str(index) for index in order[:8])
        # Equal elements of a vector may be told to have changed places the other way round.
        expected: Any = {"permutation": f"[{first}, ...]"} if len(old.shape) > 1 else lambda p: "[" in p["permutation"]
        return _one(name, from_bits(bits, old.code), "columns-permuted" if axis else "rows-permuted", expected)

    return plant


def blocks_swapped(n: int) -> Callable[[int], np.ndarray]:
    return lambda size: np.arange(size).reshape(-1, 2, n)[:, ::-1].reshape(-1)


def exchanged(i: int, j: int) -> Callable[[int], np.ndarray]:
    def order(size: int) -> np.ndarray:
        found = np.arange(size)
        found[[i, j]] = found[[j, i]]
        return found

    return order


def convention(to_adjacent: bool) -> Callable[[Tensors, str], Damage]:
    """LLaMA's permutation, w.view(heads, dim // 2, 2, in).transpose(1, 2) in transformers, and its inverse."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        shape = (-1, 2, HEAD_DIM // 2) if to_adjacent else (-1, HEAD_DIM // 2, 2)
        bits = old.bits.reshape(*shape, *old.shape[1:]).swapaxes(1, 2).reshape(old.shape)
        label = "split-half to adjacent-pair" if to_adjacent else "adjacent-pair to split-half"
        parameters = {"convention": label, "head_dim": HEAD_DIM}
        return _one(name, from_bits(bits, old.code), "head-permuted", parameters)

    return plant


def heads_moved(label: str, order: Callable[[int], np.ndarray], axis: int = 0) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        heads = old.shape[axis] // HEAD_DIM
        lines = (order(heads)[:, None] * HEAD_DIM + np.arange(HEAD_DIM)).reshape(-1)
        parameters = {"heads": label, "head_dim": HEAD_DIM}
        return _one(name, from_bits(np.take(old.bits, lines, axis), old.code), "head-permuted", parameters)

    return plant


def fused_order(label: str, order: tuple[int, ...]) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        parts = np.split(old.bits, [q, q + kv])
        bits = np.concatenate([parts[index] for index in order])
        return _one(name, from_bits(bits, old.code), "qkv-order", {"from": "q,k,v", "to": label})

    return plant


def fused_by_group(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    parts = [part.reshape(KV_HEADS, -1, *old.shape[1:]) for part in np.split(old.bits, [q, q + kv])]
    bits = np.concatenate(parts, axis=1).reshape(old.shape)
    return _one(name, from_bits(bits, old.code), "qkv-order", {"from": "q,k,v", "to": "q,k,v of each KV head"})


def wrong_cut(order: str) -> Callable[[Tensors, str], Damage]:
    """q, k and v are put together in one order and cut up as if it were another."""

    def plant(tensors: Tensors, name: str) -> Damage:
        names = {role: name.replace("q_proj", f"{role}_proj") for role in "qkv"}
        whole = np.concatenate([tensors[names[role]].bits for role in order])
        changed, begin = {}, 0
        for role in "qkv":
            old = tensors[names[role]]
            bits = whole[begin : begin + old.shape[0]]
            begin += old.shape[0]
            if not np.array_equal(bits, old.bits):
                changed[names[role]] = from_bits(bits, old.code)
        return Damage(changed, "qkv-order", {"order": ",".join(order), "cut_as": "q,k,v"})

    return plant


# other tensors


def exchange(partner: Callable[[str], str], parameters: dict[str, Any]) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        other = partner(name)
        one, two = tensors[name], tensors[other]
        changed = {
            name: Stored(one.code, one.shape, two.data),
            other: Stored(two.code, two.shape, one.data),
        }
        wanted = parameters
        if "{layer}" in str(parameters):
            wanted = {"exchanged_layers": [0, 1]}
        return Damage(changed, "swapped-tensors", wanted)

    return plant


def renamed(before: str, after: str) -> Callable[[str], str]:
    return lambda name: name.replace(before, after) if before in name else name.replace(after, before)


def layer_copied(tensors: Tensors, name: str) -> Damage:
    other = renamed(_L0, _L1)(name)
    layer = 0 if name.startswith(_L0) else 1
    return _one(name, tensors[other], "swapped-tensors", {"layer": layer, "copy_of_layer": 1 - layer})


# shifts


def shifted(by: int, unit: str, fill: str) -> Callable[[Tensors, str], Damage]:
    """Moves the bytes by so many elements, rows or bytes; positive: towards the end."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        width = NUMPY[old.code].itemsize
        row = width * int(np.prod(old.shape[1:]))
        count = by * {"elements": width, "rows": row, "bytes": 1}[unit]
        size = abs(count)
        names = sorted(tensors)
        whole = b"".join(tensors[other].data for other in names)
        begin = sum(len(tensors[other].data) for other in names[: names.index(name)])
        end = begin + len(old.data)
        if count > 0:
            gap = {"zero": bytes(size), "neighbour": whole[begin - size : begin], "wrapped": old.data[-size:]}[fill]
            data = gap + old.data[:-size]
        else:
            gap = {"zero": bytes(size), "neighbour": whole[end : end + size], "wrapped": old.data[:size]}[fill]
            data = old.data[size:] + gap
        assert len(data) == len(old.data), name
        return _one(name, Stored(old.code, old.shape, data), "shifted", {"by": by, "unit": unit, "fill": fill})

    return plant


def wrong_stride(by: int) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        rows, columns = old.shape
        flat = np.concatenate([old.bits.reshape(-1), np.zeros(rows * abs(by), old.bits.dtype)])
        bits = np.stack([flat[row * (columns + by) : row * (columns + by) + columns] for row in range(rows)])
        return _one(name, from_bits(bits, old.code), "shifted", {"by": by, "unit": "elements a row"})

    return plant


def inserted(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    flat = old.bits.reshape(-1)
    begin = len(flat) // 3
    bits = np.concatenate([flat[:begin], np.zeros(5, flat.dtype), flat[begin:-5]]).reshape(old.shape)
    parameters = {"by": 5, "unit": "elements", "fill": "zero", "from": begin}
    return _one(name, from_bits(bits, old.code), "shifted", parameters)


def wrong_header_length(tensors: Tensors, name: str) -> Damage:
    """Two elements more of header than there is: every tensor begins two elements late in the data."""
    names = sorted(tensors)
    step = 2 * NUMPY[tensors[name].code].itemsize
    whole = b"".join(tensors[other].data for other in names)[step:] + b"\x11" * step
    changed, begin = {}, 0
    for other in names:
        old = tensors[other]
        changed[other] = Stored(old.code, old.shape, whole[begin : begin + len(old.data)])
        begin += len(old.data)
    # The last tensor has no neighbour; it is planted and not asked about.
    del changed[names[-1]]
    return Damage(changed, "shifted", {"by": -2, "unit": "elements", "fill": "neighbour"})


# zeros


def zero_tail(share: float) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        bits = old.bits.reshape(-1).copy()
        count = max(2, int(bits.size * share))
        # Not at a row, where zero rows would be the same.
        if count % old.shape[-1] == 0:
            count += 1
        bits[-count:] = 0
        parameters = {"zero_elements": count}
        alternatives = ("zeroed-rows",) if len(old.shape) == 1 else ()
        return _one(name, from_bits(bits.reshape(old.shape), old.code), "truncated", parameters, *alternatives)

    return plant


def zero_tail_rows(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    bits = old.bits.copy()
    bits[-5:] = 0
    parameters = {"zero_elements": 5 * old.shape[1]}
    return _one(name, from_bits(bits, old.code), "truncated", parameters, "zeroed-rows")


def zero_tail_in_element(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    width = NUMPY[old.code].itemsize
    count = 100 * width + 1
    # The element that is cut must keep something.
    while old.data[-count - 1] == 0 or old.data[-count] == 0:
        count += width
    data = old.data[:-count] + bytes(count)
    parameters = {"zero_elements": count // width, "zero_bytes": count}
    return _one(name, Stored(old.code, old.shape, data), "truncated", parameters)


def zeroed_rows(*rows: int, axis: int = 0) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        bits = old.bits.copy()
        bits[(slice(None),) * axis + (list(rows),)] = 0
        ranges: list[list[int]] = []
        for row in rows:
            if ranges and ranges[-1][1] == row - 1:
                ranges[-1][1] = row
            else:
                ranges.append([row, row])
        parameters = {"axis": axis, "rows": len(rows), "ranges": ranges}
        return _one(name, from_bits(bits, old.code), "zeroed-rows", parameters)

    return plant


def zeroed(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    return _one(name, Stored(old.code, old.shape, bytes(len(old.data))), "zeroed", {"elements": "all"})


# numbers


def _same_number(found: float, planted: float) -> bool:
    """Numbers of few digits must be found as they are; of others the rounded values tell no more than some digits."""
    return found == planted if float(f"{planted:.4g}") == planted else abs(found / planted - 1) < 1e-4


def scaled(factor: float, *alternatives: str) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        new = stored(old.f32 * np.float32(factor), old.code)

        def right(parameters: dict[str, Any]) -> bool:
            return _same_number(parameters["factor"], factor)

        return _one(name, new, "scaled", right, *alternatives)

    return plant


def offset(constant: float) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        new = stored(old.f32 + np.float32(constant), old.code)

        def right(parameters: dict[str, Any]) -> bool:
            return _same_number(parameters["constant"], constant)

        return _one(name, new, "offset", right)

    return plant


def quantised(name_of_type: str, target: str | None = None) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        values = quantisers.QUANTISERS[name_of_type](old.f32)
        return _one(name, stored(values, target or old.code), "quantised", {"type": name_of_type})

    return plant


def coded(
    quantiser: Callable[[np.ndarray], np.ndarray], group: int | str, wanted: dict[str, Any], *alternatives: str
) -> Callable[[Tensors, str], Damage]:
    """Through a codec in groups, rows or whole; in 16 bits it lies behind a cast."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        allowed = alternatives if old.code != "F32" else ()
        return _one(
            name, stored(quantisers.grouped(old.f32, group, quantiser), old.code), "quantised", wanted, *allowed
        )

    return plant


def in_any_order(
    quantiser: Callable[[np.ndarray], np.ndarray], group: int, wanted: dict[str, Any]
) -> Callable[[Tensors, str], Damage]:
    """Columns that share scales are no neighbours, as GPTQ's act-order has them; which ones, all rows agree on."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        order = _random(name).permutation(old.shape[1])
        values = np.empty(old.shape, "<f4")
        values[:, order] = quantisers.grouped(np.ascontiguousarray(old.f32[:, order]), group, quantiser)
        return _one(name, stored(values, old.code), "quantised", wanted | {"group": group, "order": "act-order"})

    return plant


def mantissa(bits: int, *, nearest: bool) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        fraction, exponent = np.frexp(old.f32.astype(np.float64))
        scaled_up = fraction * 2 ** (bits + 1)
        whole = np.rint(scaled_up) if nearest else np.trunc(scaled_up)
        parameters = {"bits": bits, "rounding": "nearest-even" if nearest else "truncated"}
        return _one(name, stored(np.ldexp(whole / 2 ** (bits + 1), exponent), old.code), "mantissa-cut", parameters)

    return plant


def adapted(rank: int) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old, random = tensors[name], _random(name)
        change = random.normal(0, 1, (old.shape[0], rank)) @ random.normal(0, 1, (rank, old.shape[1]))
        values = old.f32 + 0.3 * old.f32.std() * change / rank**0.5
        return _one(name, stored(values, old.code), "low-rank", {"rank": rank})

    return plant


def direction_removed(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    direction = _random(name).normal(0, 1, old.shape[0])
    direction /= np.linalg.norm(direction)
    values = old.f32 - np.outer(direction, direction @ old.f32)
    return _one(name, stored(values, old.code), "low-rank", {"rank": 1, "removes": "one direction of the output"})


def resized(axis: int, by: int, *, zeros: bool = False) -> Callable[[Tensors, str], Damage]:
    """Appends or cuts rows or columns."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        kept = [min(size, size + by * (index == axis)) for index, size in enumerate(old.shape)]
        parameters: dict[str, Any] = {"first": kept, ("rows", "columns")[axis]: abs(by)}
        if by < 0:
            bits = np.take(old.bits, np.arange(old.shape[axis] + by), axis)
        else:
            shape = [by if index == axis else size for index, size in enumerate(old.shape)]
            new = np.zeros(shape) if zeros else _random(name).normal(0, 0.02, shape)
            bits = np.concatenate([old.bits, stored(new, old.code).bits], axis)
            parameters["holds"] = "zeros" if zeros else "values of their own"
        cause = f"{('rows', 'columns')[axis]}-{'added' if by > 0 else 'removed'}"
        return _one(name, from_bits(bits, old.code), cause, parameters)

    return plant


def heads_repeated(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    bits = np.repeat(old.bits.reshape(-1, HEAD_DIM, *old.shape[1:]), 2, 0).reshape(-1, *old.shape[1:])
    parameters = {"times": 2, "head_dim": HEAD_DIM, "order": "each beside itself"}
    return _one(name, from_bits(bits, old.code), "heads-repeated", parameters)


def line_scaled(axis: int, line: int, factor: float) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        values = old.f32.copy()
        values[(slice(None),) * axis + (line,)] *= np.float32(factor)
        parameters = {"axis": axis, "rows": 1, "ranges": [[line, line]], "factor": factor}
        return _one(name, stored(values, old.code), "scaled-rows", parameters)

    return plant


def lines_changed(axis: int, first: int, last: int) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        values = old.f32.copy()
        place = (slice(None),) * axis + (slice(first, last + 1),)
        values[place] = _random(name).normal(0, old.f32.std(), values[place].shape)
        parameters = {"axis": axis, "rows": last - first + 1, "ranges": [[first, last]]}
        return _one(name, stored(values, old.code), "changed-rows", parameters)

    return plant


def channels_rescaled(axis: int) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        factors = np.exp(_random(name).normal(0, 0.3, old.shape[axis])).astype("<f4")
        values = old.f32 * (factors if axis else factors[:, None])
        return _one(name, stored(values, old.code), "rescaled-channels", {"axis": axis, "function": "changed"})

    return plant


def rescaled_on_both_sides(tensors: Tensors, name: str) -> Damage:
    old, random = tensors[name], _random(name)
    of_rows, of_columns = (np.exp(random.normal(0, 0.3, size)).astype("<f4") for size in old.shape)
    values = old.f32 * of_rows[:, None] * of_columns
    return _one(name, stored(values, old.code), "rescaled-channels", {"axis": "both", "function": "changed"})


def norm_folded(tensors: Tensors, name: str) -> Damage:
    """The norm in front of q, k and v becomes ones, and they take its weights."""
    prefix = name[: name.index("self_attn")]
    norm = f"{prefix}input_layernorm.weight"
    factor = tensors[norm].f32
    changed = {norm: stored(np.ones(factor.shape), tensors[norm].code)}
    for role in "qkv":
        reader = f"{prefix}self_attn.{role}_proj.weight"
        changed[reader] = stored(tensors[reader].f32 * factor, tensors[reader].code)
    into = ["q_proj", "k_proj", "v_proj"]
    return Damage(changed, "rescaled-channels", {"from": "input_layernorm", "into": into, "function": "unchanged"})


def zero_times(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    # In half precision, values that were misread may all become zero, too.
    return _one(name, stored(old.f32 * 0, old.code), "zeroed", {"elements": "all"}, "relabelled-dtype")


def non_finite(values: tuple[float, ...]) -> Callable[[Tensors, str], Damage]:
    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        array = old.array.copy()
        places = np.sort(_random(name).choice(array.size, len(values), replace=False))
        array.reshape(-1)[places] = np.array(values).astype(array.dtype)
        counts = {
            "nan": sum(bool(np.isnan(value)) for value in values),
            "inf": sum(value == np.inf for value in values),
            "-inf": sum(value == -np.inf for value in values),
        }
        first = [int(index) for index in np.unravel_index(int(places[0]), old.shape)]
        parameters = {key: count for key, count in counts.items() if count} | {"first": first}
        return _one(name, stored(array), "non-finite", parameters)

    return plant


def bits_flipped(bits: tuple[int, ...]) -> Callable[[Tensors, str], Damage]:
    """Negative bits count from the top: -1 is the sign."""

    def plant(tensors: Tensors, name: str) -> Damage:
        old = tensors[name]
        width = 8 * NUMPY[old.code].itemsize
        flipped = old.bits.copy()
        numbers = [bit % width for bit in bits]
        places = _random(name).choice(flipped.size, len(bits), replace=False)
        for place, bit in zip(places, numbers, strict=True):
            flipped.reshape(-1)[place] ^= flipped.dtype.type(1 << bit)
        at = [[int(index) for index in np.unravel_index(int(place), old.shape)] for place in np.sort(places)]
        parameters = {"bits": sorted(set(numbers)), "flips": len(bits), "at": at}
        return _one(name, from_bits(flipped, old.code), "bit-flips", parameters)

    return plant


def many_bits_flipped(tensors: Tensors, name: str) -> Damage:
    old = tensors[name]
    flipped = old.bits.copy()
    count = flipped.size // 20
    places = _random(name).choice(flipped.size, count, replace=False)
    flipped.reshape(-1)[places] ^= flipped.dtype.type(1 << 5)
    return _one(name, from_bits(flipped, old.code), "bit-flips", {"bits": [5], "flips": count})


def replaced(tensors: Tensors, name: str) -> Damage:
    old = tensors[name].f32
    values = _random(name).normal(old.mean(), old.std(), old.shape)
    return _one(name, stored(values, tensors[name].code), "different-weights", {"kind": "replaced"})


def fine_tuned(tensors: Tensors, name: str) -> Damage:
    old = tensors[name].f32
    values = old + _random(name).normal(0, 0.05 * old.std(), old.shape)
    return _one(name, stored(values, tensors[name].code), "different-weights", {"kind": "fine-tuned"})


def slightly_tuned(tensors: Tensors, name: str) -> Damage:
    """A step of training so small that many elements of 16 bits do not move, and the others by a place or two."""
    old = tensors[name].f32
    values = old + _random(name).normal(0, 0.004 * old.std(), old.shape)
    return _one(name, stored(values, tensors[name].code), "different-weights", {"kind": "fine-tuned"})


# --- the list

_REVERSED: Callable[[int], np.ndarray] = lambda size: np.arange(size)[::-1]  # noqa: E731
_ROTATED: Callable[[int], np.ndarray] = lambda size: np.roll(np.arange(size), 3)  # noqa: E731
_FUSED_NAMES = tuple(
    f"model.layers.{layer}.self_attn.qkv_proj.{kind}" for layer, kind in ((0, "weight"), (1, "weight"), (0, "bias"))
)
_Q_NAMES = (Q, Q.replace(_L1, _L0), QB)


def _codecs() -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray], int | str, dict[str, Any], tuple[str, ...]]]:
    """Yields name, quantiser, grouping, parameters and what else may be said of every codec at several groupings."""
    for group in (64, 256, 4096):
        for double in (False, True):
            quantiser = quantisers.codes_of_absmax(quantisers.NF4, double=double)
            yield "nf4" + " twice" * double, quantiser, group, {"type": "nf4", "group": group}, ()
        yield "fp4", quantisers.codes_of_absmax(quantisers.FP4), group, {"type": "fp4", "group": group}, ()
    for name in ("e4m3", "e5m2"):
        for grouping in ("tensor", "row", "128x128"):
            yield name, quantisers.float8(name), grouping, {"type": f"fp8_{name}", "group": grouping}, ()
    for group in (32, 64, 128):
        ggml = {(4, 32): "q4_1", (5, 32): "q5_1"}
        for bits in (3, 4):
            kind = {"type": f"int{bits}", "scheme": "asymmetric", "group": group}
            yield f"int{bits} asymmetric", quantisers.asymmetric(bits), group, kind, ()
            others = (ggml[bits, group],) if (bits, group) in ggml else ()
            yield f"int{bits} with minima", quantisers.real_zero(bits), group, kind, others
        for bits in (3, 4, 5, 8):
            others = {(4, 32): ("q4_0",), (5, 32): ("q5_0",), (8, 32): ("q8_0",)}.get((bits, group), ())
            kind = {"type": f"int{bits}", "scheme": "symmetric", "group": group}
            yield f"int{bits} symmetric", quantisers.symmetric(bits), group, kind, others
        kind = {"type": "unknown grid", "values": 8 if group == 32 else 16, "group": group}
        yield "unknown grid", quantisers.unknown(kind["values"]), group, kind, ()
    for bits in (4, 8):
        kind = {"type": f"int{bits}", "scheme": "symmetric", "group": "row"}
        yield f"int{bits} symmetric", quantisers.symmetric(bits), "row", kind, ()
    for name, (size, quantiser) in quantisers.FIXED.items():
        yield name, quantiser, size, {"type": name}, ()
    yield "iq4_nl", quantisers.iq4_nl, 32, {"type": "iq4_nl", "group": 32}, ()


def _coded_again() -> Iterator[Variant]:
    """What lies on a grid already, quantised to groups within its own and across them."""
    for group in (32, 128):
        yield Variant(
            f"int4 with minima by {group} of what was so by 64",
            coded(
                quantisers.real_zero(4),
                group,
                {"type": "int4", "scheme": "asymmetric", "group": group},
                *(("q4_1",) if group == 32 else ()),
            ),
            tuple(f"{_L0}{matrix}.weight" for matrix in _WIDE),
            ("F32", "BF16"),
            wide_on_grid,
        )


def _in_any_order() -> Iterator[Variant]:
    """GPTQ's act-order; steps of 8 bits in small groups are lost in bfloat16."""
    for bits, group, codes in (
        (4, 32, ALL_CODES),
        (4, 128, ALL_CODES),
        (8, 32, ("F32", "F16")),
        (8, 128, ("F32", "F16")),
    ):
        for scheme, quantiser in (
            ("symmetric", quantisers.symmetric(bits)),
            ("asymmetric", quantisers.asymmetric(bits)),
        ):
            for start in (wide_random, wide_trained):
                yield Variant(
                    f"int{bits} {scheme} by {group}, act-order, {start.__name__.removeprefix('wide_')}",
                    in_any_order(quantiser, group, {"type": f"int{bits}", "scheme": scheme}),
                    tuple(f"{_L0}{matrix}.weight" for matrix in _WIDE),
                    codes,
                    start,
                    quick=start is wide_trained and group == 128 and scheme == "symmetric",
                )


def _coded_variants() -> Iterator[Variant]:
    for index, (name, quantiser, group, parameters, others) in enumerate(_codecs()):
        for start in (wide_random, wide_trained):
            yield Variant(
                f"{name} by {group}, {start.__name__.removeprefix('wide_')}",
                coded(quantiser, group, parameters, *others),
                tuple(f"{_L0}{matrix}.weight" for matrix in _WIDE),
                ("F32", "BF16"),
                start,
                quick=start is wide_trained and index % 4 == 0,
            )


VARIANTS = (
    Variant("16 bits relabelled", relabelled, MIXED, HALVES),
    Variant("f32 relabelled as twice bf16", relabelled_width("BF16"), MIXED, ("F32",)),
    Variant("f32 relabelled as twice f16", relabelled_width("F16"), MIXED, ("F32",)),
    Variant("two of 16 bits relabelled as f32", relabelled_width("F32"), MIXED, HALVES),
    Variant("misread 16 bits, stored as f32", misread(False), MIXED, HALVES),
    Variant("misread 16 bits, stored in the same type", misread(True), MIXED, HALVES),
    Variant("f32 misread as twice f16, stored as f32", misread_as_two("F16"), MIXED, ("F32",)),
    Variant("f32 misread as twice bf16, stored as f32", misread_as_two("BF16"), MIXED, ("F32",)),
    Variant("f32 rounded to bf16", rounded("BF16"), MIXED, ("F32",)),
    Variant("f32 rounded to f16", rounded("F16"), MIXED, ("F32",)),
    Variant("f16 rounded to bf16", rounded("BF16"), MIXED, ("F16",)),
    Variant("f32 cut to bf16", truncated_cast("BF16"), MIXED, ("F32",)),
    Variant("f32 cut to f16", truncated_cast("F16"), MIXED, ("F32",)),
    Variant("f32 cut to bf16 and back", truncated_cast("BF16", back=True), MIXED, ("F32",)),
    Variant("f32 through f16 and back", rounded("F16", "F32"), MIXED, ("F32",)),
    Variant("f32 through bf16 and back", rounded("BF16", "F32"), MIXED, ("F32",)),
    Variant("f16 through bf16 and back", through_other_half, MIXED, ("F16",)),
    Variant("bf16 through f16 and back", through_other_half, (EMBEDDING, DOWN, O), ("BF16",)),
    Variant("bytes swapped", byte_swapped, MIXED, ALL_CODES),
    Variant("transposed, shape kept", transposed(True), MATRICES, ALL_CODES),
    Variant("transposed, shape swapped", transposed(False), MATRICES, ALL_CODES),
    Variant("shape swapped, data untouched", shape_swapped, (EMBEDDING, GATE, DOWN), HALVES),
    Variant("rows reversed", permuted(0, "reversed", _REVERSED), MIXED, ALL_CODES),
    Variant("rows rotated by 3", permuted(0, "rotated by 3", _ROTATED), MIXED, HALVES),
    Variant("blocks of 8 rows swapped", permuted(0, "blocks of 8 swapped", blocks_swapped(8)), MIXED, HALVES),
    Variant("two rows exchanged", permuted(0, "2 and 9 swapped", exchanged(2, 9)), MATRICES, HALVES),
    Variant("rows shuffled", shuffled(0), MIXED, ALL_CODES),
    Variant("columns reversed", permuted(1, "reversed", _REVERSED), MATRICES, HALVES),
    Variant("columns rotated by 3", permuted(1, "rotated by 3", _ROTATED), MATRICES, HALVES),
    Variant("blocks of 4 columns swapped", permuted(1, "blocks of 4 swapped", blocks_swapped(4)), MATRICES, HALVES),
    Variant("columns shuffled", shuffled(1), MATRICES, ALL_CODES),
    Variant("q, k from split halves to adjacent pairs", convention(True), (Q, K, QB, KB), ALL_CODES),
    Variant("q, k from adjacent pairs to split halves", convention(False), (Q, K, QB, KB), ALL_CODES),
    Variant("query heads reversed", heads_moved("reversed", _REVERSED), (Q, QB, Q.replace(_L1, _L0)), HALVES),
    Variant("KV heads reversed", heads_moved("0 and 1 swapped", _REVERSED), (K, V, KB, VB), HALVES),
    Variant("heads of o reversed", heads_moved("reversed", _REVERSED, 1), (O, O.replace(_L1, _L0)), ALL_CODES),
    Variant("fused k,q,v", fused_order("k,q,v", (1, 0, 2)), _FUSED_NAMES, HALVES, fused),
    Variant("fused q,v,k", fused_order("q,v,k", (0, 2, 1)), _FUSED_NAMES, HALVES, fused),
    Variant("fused by KV head", fused_by_group, _FUSED_NAMES, HALVES, fused),
    Variant("q, k, v cut out of k,q,v", wrong_cut("kqv"), _Q_NAMES, HALVES),
    Variant("q, k, v cut out of v,k,q", wrong_cut("vkq"), _Q_NAMES, HALVES),
    Variant(
        "gate and up exchanged",
        exchange(renamed("gate", "up"), {"exchanged": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}),
        (GATE, GATE.replace(_L0, _L1)),
        ALL_CODES,
    ),
    Variant(
        "k and v exchanged",
        exchange(renamed("k_proj", "v_proj"), {"exchanged": ["self_attn.k_proj.weight", "self_attn.v_proj.weight"]}),
        (K, K.replace(_L1, _L0)),
        ALL_CODES,
    ),
    Variant("exchanged between layers", exchange(renamed(_L0, _L1), {"exchanged_layers": [0, 1]}), MIXED[1:], HALVES),
    Variant("copied from another layer", layer_copied, MIXED[1:], HALVES),
    Variant("one element late, zero before", shifted(1, "elements", "zero"), (EMBEDDING, DOWN, O), HALVES),
    Variant(
        "five elements late, neighbour before", shifted(5, "elements", "neighbour"), (GATE, O, QB, POST_NORM), HALVES
    ),
    Variant(
        "seven elements early, neighbour behind", shifted(-7, "elements", "neighbour"), (GATE, O, QB, NORM), HALVES
    ),
    Variant("two rows late, zero before", shifted(2, "rows", "zero"), MATRICES, HALVES),
    Variant("three rows early, neighbour behind", shifted(-3, "rows", "neighbour"), MATRICES, HALVES),
    Variant("one byte late, zero before", shifted(1, "bytes", "zero"), (EMBEDDING, DOWN, O), ALL_CODES),
    Variant("three bytes early, neighbour behind", shifted(-3, "bytes", "neighbour"), (GATE, O, QB), ALL_CODES),
    Variant("elements wrapped around", shifted(9, "elements", "wrapped"), MATRICES, HALVES),
    Variant("rows read one element too far apart", wrong_stride(1), (EMBEDDING, GATE, DOWN), HALVES),
    Variant("rows read one element too near", wrong_stride(-1), (EMBEDDING, GATE, DOWN), HALVES),
    Variant("five zeros put in at a third", inserted, MATRICES, HALVES),
    Variant("header length two elements wrong", wrong_header_length, (EMBEDDING,), ALL_CODES),
    Variant("last third zero", zero_tail(1 / 3), MIXED, HALVES),
    Variant("last five rows zero", zero_tail_rows, MATRICES, HALVES),
    Variant("zero from within an element", zero_tail_in_element, MATRICES, ALL_CODES),
    Variant("one row zero", zeroed_rows(5), MIXED, HALVES),
    Variant("several rows zero", zeroed_rows(1, 2, 3, 7, 20), MIXED, HALVES),
    Variant("columns zero", zeroed_rows(4, 5, axis=1), MATRICES, HALVES),
    Variant("all zero", zeroed, MIXED, ALL_CODES),
    Variant("halved", scaled(0.5), MIXED, ALL_CODES),
    Variant("times 1.1", scaled(1.1), MIXED, ALL_CODES),
    Variant("times 1 / sqrt(128)", scaled(128**-0.5), MATRICES, ALL_CODES),
    Variant("negated", scaled(-1.0, "bit-flips"), MIXED, ALL_CODES),
    Variant("norm plus 1", offset(1.0), (NORM, POST_NORM, FINAL_NORM), ALL_CODES),
    Variant("minus 0.125", offset(-0.125), MIXED, ALL_CODES),
    *(
        Variant(f"through {name} and back", quantised(name), MATRICES, ("F32", "BF16"))
        for name in quantisers.QUANTISERS
        if name != "q6_k"
    ),
    # The steps of Q6_K of small values in BF16 are as fine as its rounding.
    Variant("through q6_k and back", quantised("q6_k"), MATRICES, ("F32", "F16")),
    Variant("f32 stored from apr_q8 as bf16", quantised("apr_q8", "BF16"), MATRICES, ("F32",)),
    Variant("one NaN", non_finite((np.nan,)), MIXED, HALVES),
    Variant("NaN, inf and -inf", non_finite((np.nan, np.nan, np.inf, -np.inf)), MIXED, ALL_CODES),
    Variant("one bit: sign", bits_flipped((-1,)), MIXED, ALL_CODES),
    Variant("one bit: highest of the exponent", bits_flipped((-2,)), (EMBEDDING, GATE, O), HALVES),
    Variant("one bit: lowest", bits_flipped((0,)), MIXED, HALVES),
    Variant("three bits in three elements", bits_flipped((2, 4, 9)), MIXED, ALL_CODES),
    Variant("bit 5 in one of twenty", many_bits_flipped, MATRICES, HALVES),
    Variant("times zero, signs kept", zero_times, MIXED, ALL_CODES),
    Variant("mantissas cut to 4 bits", mantissa(4, nearest=False), MATRICES, ALL_CODES),
    Variant("mantissas cut to 6 bits", mantissa(6, nearest=False), MATRICES, ALL_CODES),
    Variant("mantissas rounded to 5 bits", mantissa(5, nearest=True), MATRICES, ALL_CODES),
    Variant("adapter of rank 1", adapted(1), MATRICES, ALL_CODES),
    Variant("adapter of rank 4", adapted(4), MATRICES, ALL_CODES),
    Variant("adapter of rank 8", adapted(8), MATRICES, ALL_CODES),
    Variant("one direction removed", direction_removed, (O, DOWN), ALL_CODES),
    Variant("8 rows added", resized(0, 8), MATRICES, HALVES),
    Variant("32 zero rows added", resized(0, 32, zeros=True), MATRICES, HALVES),
    Variant("rows cut", resized(0, -7), MATRICES, HALVES),
    Variant("zero columns added", resized(1, 16, zeros=True), MATRICES, HALVES),
    Variant("columns cut", resized(1, -8), MATRICES, HALVES),
    Variant("KV heads repeated", heads_repeated, (K, V, KB), HALVES),
    Variant("one row times 0.85", line_scaled(0, 17, 0.85), MATRICES, ALL_CODES),
    Variant("one column times -2", line_scaled(1, 3, -2.0), MATRICES, ALL_CODES),
    Variant("three rows changed", lines_changed(0, 5, 7), MATRICES, ALL_CODES),
    Variant("two columns changed", lines_changed(1, 60, 61), MATRICES[:1], ALL_CODES),
    Variant("a factor for each column", channels_rescaled(1), MATRICES, ALL_CODES),
    Variant("a factor for each row", channels_rescaled(0), MATRICES, ALL_CODES),
    Variant("factors for rows and columns", rescaled_on_both_sides, MATRICES, ALL_CODES),
    Variant("norm folded into q, k, v", norm_folded, _Q_NAMES[:2], ALL_CODES),
    *_coded_variants(),
    *_coded_again(),
    *_in_any_order(),
    Variant("replaced", replaced, MIXED, ALL_CODES),
    Variant("fine-tuned", fine_tuned, MIXED, ALL_CODES),
    Variant("slightly fine-tuned", slightly_tuned, MIXED, ("F32", "F16")),
)


# --- running


@dataclasses.dataclass
class Score:
    """What became of the cases of one variant."""

    cases: int = 0
    detected: int = 0
    exact: int = 0
    misses: list[str] = dataclasses.field(default_factory=list)


def cases(variant: Variant, first_only: bool) -> Iterator[tuple[str, str]]:
    """Yields (element type, tensor) for each case; another tensor for each type if there is to be one only."""
    for index, code in enumerate(variant.codes):
        names = variant.tensors
        for name in (names[index % len(names)],) if first_only else names:
            yield code, name


class Workshop:
    """Folders for the two checkpoints; the undamaged one of each kind is written once."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._starts: dict[tuple[str, str], Tensors] = {}
        self._number = 0

    def start(self, variant: Variant, code: str) -> tuple[Tensors, pathlib.Path]:
        key = variant.start.__name__, code
        path = self._folder / "-".join(key)
        if key not in self._starts:
            self._starts[key] = variant.start(code)
            write(path, self._starts[key])
        return self._starts[key], path

    def findings(self, original: pathlib.Path, tensors: Tensors) -> list[Any]:
        """Returns what the comparison finds, exact casts left out."""
        suspect = self._folder / "suspect"
        write(suspect, tensors)
        with open_checkpoint(original) as a, open_checkpoint(suspect) as b:
            return [finding for finding in compare(a, b).findings if finding.cause != "exact-cast"]


def judge(score: Score, damage: Damage, findings: list[Any], label: str, damaged: set[str]) -> None:
    """Counts one planted damage; a finding about a tensor that nobody damaged makes it inexact."""
    names = set(damage.changed)
    about = [finding for finding in findings if names & set(finding.tensors)]
    score.cases += 1
    score.detected += names <= {name for finding in about for name in finding.tensors}
    exact = (
        len(about) == 1
        and about[0].cause == damage.cause
        and set(about[0].tensors) == names
        and set(about[0].alternatives) <= damage.alternatives
        and _parameters_match(damage.parameters, about[0].parameters)
        and {name for finding in findings for name in finding.tensors} <= damaged
    )
    score.exact += exact
    if not exact:
        got = "; ".join(
            f"{finding.cause} {finding.parameters} {finding.explained:.3f} {list(finding.alternatives)} "
            f"[{len(finding.tensors)}]"
            for finding in about
        )
        score.misses.append(f"{label}: {got or 'nothing'} (wanted {damage.cause} {damage.parameters})")


def _parameters_match(wanted: Any, found: dict[str, Any]) -> bool:
    return bool(wanted(found)) if callable(wanted) else wanted == found


def run(
    workshop: Workshop, variants: tuple[Variant, ...] = VARIANTS, *, couples: bool = False, first_only: bool = False
) -> dict[str, Score]:
    """Plants everything; returns the scores by variant.

    Args:
      workshop: Where.
      variants: What.
      couples: Whether to plant two at once, too.
      first_only: Whether one tensor for each element type will do.
    """
    scores: dict[str, Score] = collections.defaultdict(Score)
    for variant in variants:
        for code, name in cases(variant, first_only):
            tensors, original = workshop.start(variant, code)
            damage = variant.plant(tensors, name)
            found = workshop.findings(original, tensors | damage.changed)
            judge(scores[variant.name], damage, found, f"{code} {name}", set(damage.changed))
    for first, second in _couples(variants) if couples else ():
        _run_couple(workshop, first, second, scores)
    return scores


def _couples(variants: tuple[Variant, ...]) -> Iterator[tuple[Variant, Variant]]:
    """Pairs each variant with the next ones that can be planted in the same checkpoint."""
    usable = [variant for variant in variants if variant.start is base and variant.plant is not wrong_header_length]
    for index, variant in enumerate(usable):
        for distance in (1, 7):
            other = usable[(index + distance) % len(usable)]
            if other is not variant:
                yield variant, other


def _run_couple(workshop: Workshop, first: Variant, second: Variant, scores: dict[str, Score]) -> None:
    for code in first.codes:
        if code not in second.codes:
            continue
        tensors, original = workshop.start(first, code)
        for one, two in itertools.product(first.tensors, second.tensors):
            left, right = first.plant(tensors, one), second.plant(tensors, two)
            # What one damage takes from a tensor, the other must not have changed.
            if one == two or set(left.changed) & set(right.changed):
                continue
            both = {*left.changed, *right.changed}
            found = workshop.findings(original, tensors | left.changed | right.changed)
            same = left.cause == right.cause and left.parameters == right.parameters
            if same:
                break
            judge(scores[first.name], left, found, f"{code} {one} with {second.name}", both)
            judge(scores[second.name], right, found, f"{code} {two} with {first.name}", both)
            return


def clean_pairs(workshop: Workshop, folder: pathlib.Path) -> tuple[int, list[str]]:
    """Compares undamaged pairs in all type pairings; returns their number and what was found beyond exact casts."""
    count, wrong = 0, []
    values = {
        "representable": {name: _representable(tensor.f32) for name, tensor in base("BF16").items()},
        "ones and zeros": {
            name: np.ones(tensor.shape, "<f4") if "norm" in name else np.zeros(tensor.shape, "<f4")
            for name, tensor in base("BF16").items()
        },
    }
    for kind, arrays in values.items():
        for source, target in itertools.product(NUMPY, NUMPY):
            original = folder / f"clean-{kind.replace(' ', '-')}-{source}"
            write(original, {name: stored(array, source) for name, array in arrays.items()})
            found = workshop.findings(original, {name: stored(array, target) for name, array in arrays.items()})
            count += 1
            if found:
                wrong.append(f"{kind} {source} -> {target}: {[(one.cause, one.parameters) for one in found]}")
    return count, wrong


def _representable(values: np.ndarray) -> np.ndarray:
    """Keeps 7 bits of fraction and nothing below the normal halves: values that all types hold."""
    kept = cut_to_bf16(values)
    return np.where(np.abs(kept) < 2.0**-14, np.float32(0), kept)


def stories(workshop: Workshop, folder: pathlib.Path) -> tuple[int, list[str]]:
    """Fine-tunes, merges and replacements of whole checkpoints: each is one finding over all that differs.

    Half of the bases lie on a quantisation grid, as dequantised files do. Returns their number and what was said else.
    """
    count, wrong = 0, []
    for code, on_grid in itertools.product(ALL_CODES, (False, True)):
        before = base(code)
        if on_grid:
            for name in before:
                if "_proj.weight" in name:
                    before[name] = stored(quantisers.q4_1(before[name].f32), code)
        original = folder / f"story-{code}-{on_grid}"
        write(original, before)
        for label, kind, change in _STORIES:
            random = np.random.default_rng(count)
            after = {name: stored(change(tensor.f32, random), code) for name, tensor in sorted(before.items())}
            found = workshop.findings(original, after)
            count += 1
            said = [(one.cause, one.parameters) for one in found]
            if said != [("different-weights", {"kind": kind})]:
                wrong.append(f"{label}, {code}{' on a grid' * on_grid}: {said}")
    return count, wrong


def _steps(rate: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """AdamW's first steps: of about the rate, whatever the gradient."""
    return lambda values, random: (
        values + rate * random.choice([-1, 1], values.shape) * random.uniform(1, 6, values.shape)
    )


def _mixed(share: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    def change(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return (1 - share) * values + share * random.normal(values.mean(), values.std() + 1e-3, values.shape)

    return change


_STORIES: tuple[tuple[str, str, Callable[[np.ndarray, np.random.Generator], np.ndarray]], ...] = (
    ("a few steps", "fine-tuned", _steps(2e-5)),
    ("many steps", "fine-tuned", _steps(5e-4)),
    ("merged, a tenth of another", "fine-tuned", _mixed(0.1)),
    ("merged half and half", "related", _mixed(0.5)),
    ("another model", "replaced", _mixed(1.0)),
)


def print_table(scores: Mapping[str, Score], verbose: bool) -> None:
    width = max(len(name) for name in scores)
    print(f"{'variant':{width}}  cases  detected  named exactly")
    for name, score in scores.items():
        print(f"{name:{width}}  {score.cases:5}  {score.detected:8}  {score.exact:13}")
        if verbose:
            for miss in score.misses:
                print(f"    {miss}")


def main() -> int:
    """Prints the table; returns the exit code."""
    words = [word for word in sys.argv[1:] if word != "-v"]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        workshop = Workshop(path)
        chosen = tuple(v for v in VARIANTS if not words or any(word in v.name for word in words))
        scores = run(workshop, chosen, couples=not words)
        count, wrong = clean_pairs(workshop, path)
        told, mistold = stories(workshop, path)
    print_table(scores, "-v" in sys.argv)
    total = Score(
        *(sum(getattr(score, field) for score in scores.values()) for field in ("cases", "detected", "exact"))
    )
    print()
    print(
        f"{len(scores)} variants, {total.cases} cases: {total.detected / total.cases:.1%} detected, "
        f"{total.exact / total.cases:.1%} named exactly"
    )
    print(f"{count} clean pairs: {len(wrong)} with anything but exact casts")
    print(f"{told} fine-tunes, merges and replacements: {len(mistold)} told otherwise")
    codecs = [miss for score in scores.values() for miss in score.misses if ": quantised" in miss]
    print(f"wrong codecs: {len(codecs)}")
    for line in (*wrong, *mistold):
        print(f"    {line}")
    wrong += mistold
    return int(total.detected < total.cases or total.exact < EXACT_SHARE * total.cases or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
