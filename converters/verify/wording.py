"""Puts into words what became of a tensor: half a line for each cause, with its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Parameters = Mapping[str, Any]

_ROUNDINGS = {
    "nearest-even": "to nearest, ties to even",
    "half-away": "to nearest, ties away from zero",
    "truncated": "by cutting bits off",
}
_FILLS = {
    "zero": "zeros",
    "unchanged": "what stood there before",
    "wrapped": "what fell off at the other end",
    "neighbour": "what lies beside the tensor in the file",
    "edge repeated": "the outermost element, repeated",
    "other": "something else",
}


def cause_in_words(cause: str, parameters: Parameters) -> str:
    """Returns what happened, as the second half of a sentence whose subject are tensors."""
    words = _WORDS.get(cause)
    try:
        return words(parameters) if words else _plainly(cause, parameters)
    except (KeyError, TypeError):
        # A cause with other parameters than those known here is still worth its line.
        return _plainly(cause, parameters)


def _plainly(cause: str, parameters: Parameters) -> str:
    listed = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f"{cause} ({listed})" if listed else cause


def _exact_cast(p: Parameters) -> str:
    if p["from"] == p["to"]:
        return f"other {p['from']} bytes with the same values"
    return f"cast from {p['from']} to {p['to']}, every value exactly: no difference"


def _relabelled(p: Parameters) -> str:
    if not p["values_converted"]:
        return f"{p['from']} bytes tagged {p['to']}: the bytes are the original's, the dtype is wrong"
    return f"{p['from']} bytes were read as {p['to']}, and the wrong values stored as {p['stored']}"


def _rounded_cast(p: Parameters) -> str:
    through = f" through {p['through']}" if "through" in p else ""
    return f"rounded from {p['from']}{through} to {p['to']}, {_ROUNDINGS.get(p['rounding'], p['rounding'])}"


def _transposed(p: Parameters) -> str:
    if p["data"] == "unchanged":
        return "the bytes are the original's, under another shape"
    return f"transposed, {'under the original shape' if p['shape'] == 'kept' else 'shape and data'}"


def _head_permuted(p: Parameters) -> str:
    if "convention" in p:
        return f"rows of each head of {p['head_dim']} went from {p['convention']} order (the other RoPE convention)"
    return f"heads of {p['head_dim']} are in another order: {p['heads']}"


def _qkv_order(p: Parameters) -> str:
    if "cut_as" in p:
        return f"q, k and v were put together as {p['order']} and cut up as {p['cut_as']}"
    if "order" in p:
        ((role, (begin, end)),) = p["rows"].items()
        return f"cut out of a fused q, k, v ({p['order']}) at the wrong place: {role} holds rows {begin} to {end - 1}"
    if p["from"] == "separate":
        return f"q, k and v were fused, laid out as {p['to']}"
    if p["to"] == "separate":
        return f"a fused q, k, v ({p['from']}) was split"
    return f"fused q, k, v are laid out as {p['to']} in place of {p['from']}"


def _swapped(p: Parameters) -> str:
    if "exchanged" in p:
        return f"{' and '.join(p['exchanged'])} are exchanged"
    if "exchanged_layers" in p:
        return f"layers {' and '.join(map(str, p['exchanged_layers']))} are exchanged"
    if "copy_of_layer" in p:
        return f"a copy of layer {p['copy_of_layer']} in place of layer {p['layer']}"
    return f"a copy of {p['copy_of']}" + (f" in place of {p['in_place_of']}" if "in_place_of" in p else "")


def _shifted(p: Parameters) -> str:
    if "rows_filled_up_to_multiples_of" in p:
        width = p["rows_filled_up_to_multiples_of"]
        return f"rows padded with zeros to multiples of {width} (as in Q4_K) were read as if they were not padded"
    by, unit = p["by"], p["unit"]
    if unit == "elements a row":
        return f"rows were read with a stride that is {abs(by)} too {'long' if by > 0 else 'short'}"
    amount = f"{abs(by)} {unit[:-1] if abs(by) == 1 and unit.endswith('s') else unit}"
    text = f"everything stands {amount} {'later' if by > 0 else 'earlier'} than in the original"
    if "from" in p:
        text += f", from element {p['from']} on"
    return text + (f"; the gap holds {_FILLS.get(p['fill'], p['fill'])}" if "fill" in p else "")


def _truncated(p: Parameters) -> str:
    count = p["zero_elements"]
    what = f"the last {count} elements" if count != 1 else "the last element"
    if "zero_bytes" in p:
        what = f"the last {p['zero_bytes']} bytes"
    return f"cut off: {what} are zero" if count != 1 or "zero_bytes" in p else f"cut off: {what} is zero"


def _zeroed(p: Parameters) -> str:
    return "all zero" if p["elements"] == "all" else f"{p['elements']} elements are zero, the others are right"


def _lines(p: Parameters) -> tuple[str, str]:
    """Returns which rows or columns are meant: "3 rows", and their numbers."""
    kind = "column" if p["axis"] else "row"
    runs = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in p["ranges"])
    more = ", ..." if sum(last - first + 1 for first, last in p["ranges"]) < p["rows"] else ""
    return f"{p['rows']} {kind}{'' if p['rows'] == 1 else 's'}", f"{runs}{more}"


def _zeroed_rows(p: Parameters) -> str:
    which, numbers = _lines(p)
    return f"{which} zero ({numbers})"


def _scaled_rows(p: Parameters) -> str:
    which, numbers = _lines(p)
    return f"{which} multiplied by {p['factor']:.9g} ({numbers}), the others are equal"


def _changed_rows(p: Parameters) -> str:
    which, numbers = _lines(p)
    return f"{which} changed ({numbers}), the others are equal"


def _resized(p: Parameters) -> str:
    first = p.get("first")
    changes = []
    for name in ("rows", "columns"):
        if name in p:
            changes.append(f"{p[name]} {name if p[name] != 1 else name[:-1]}")
    text = " and ".join(changes)
    if first is None:
        return f"{text} left out, the others are equal and in order"
    first = first if isinstance(first, list) else [first]
    common = f"the first {' x '.join(map(str, first))}"
    if "relative_l2" in p:
        return f"{common} near the original (relative L2 {p['relative_l2']:.3g}), {text} "
    return f"{common} equal, {text} "


def _added(p: Parameters) -> str:
    return f"{_resized(p)}added, which hold {p['holds']}" if "holds" in p else f"{_resized(p)}added"


def _removed(p: Parameters) -> str:
    return f"{_resized(p)}removed" if "first" in p else _resized(p)


def _rescaled(p: Parameters) -> str:
    moves = p.get("moves", [p] if "from" in p else [])
    if moves:
        listed = ", and ".join(f"from {move['from']} into {', '.join(move['into'])}" for move in moves)
        return f"factors of channels moved {listed}: the function is the same, but for rounding"
    lines = {0: "each row", 1: "each column", "both": "each row and each column"}[p["axis"]]
    text = f"{lines} multiplied by a factor of its own"
    return text + ("; no other tensor makes up for it" if p.get("function") == "changed" else "")


def _low_rank(p: Parameters) -> str:
    if "removes" in p:
        return f"a change of rank {p['rank']}, which takes {p['removes']} away (as abliteration does)"
    return f"a change of rank {p['rank']}, as merging an adapter (LoRA) makes it"


def _mantissa_cut(p: Parameters) -> str:
    how = "cut" if p["rounding"] == "truncated" else f"rounded ({_ROUNDINGS[p['rounding']]})"
    return f"mantissa {how} to {p['bits']} bits"


_GROUPS = {
    "tensor": "with one scale for the tensor",
    "row": "with a scale for each row",
    "column": "with a scale for each column",
    "128x128": "with a scale for each block of 128 x 128",
}
# What types of other programs are, in general terms.
_TYPES = {
    "apr_q8": "int8 with one scale for the tensor",
    "apr_q4": "int4 in groups of 32",
    "q4_0": "int4 in groups of 32",
    "q4_1": "int4 with minima in groups of 32",
    "q8_0": "int8 in groups of 32",
    "fp8_e4m3": "8 bits, 3 of them fraction",
    "fp8_e5m2": "8 bits, 2 of them fraction",
    "nf4": "bitsandbytes' NormalFloat",
    "fp4": "bitsandbytes'",
}


def _quantised(p: Parameters) -> str:
    group = p.get("group")
    blocks = f"with a scale for each block of {str(group).replace('x', ' x ')}"
    grouped = _GROUPS.get(str(group), blocks if "x" in str(group) else f"in groups of {group}")
    if p["type"] == "unknown grid":
        return f"quantised to a grid of no known type: at most {p['values']} values {_each(group)}"
    text = f"quantised to {p['type']}"
    if "form" in p:
        text = f"quantised by {p['form']} to {p['type']}"
    elif p["type"] in _TYPES and "padding" not in p:
        text += f" ({_TYPES[p['type']]})"
    if "scheme" in p:
        text += f" {p['scheme']}"
    if group is not None:
        text += f", {grouped}"
    if "order" in p:
        text += " columns, which are no neighbours (act-order)"
    if "padding" in p:
        text += ", and the values that pad each row to whole blocks were read as values: every row but the first is off"
    return text + (f", rounded {_ROUNDINGS.get(p['rounding'], p['rounding'])}" if "rounding" in p else "")


def _each(group: Any) -> str:
    return {"tensor": "in the tensor", "row": "in each row"}.get(group, f"in each group of {group} along the row")


def _non_finite(p: Parameters) -> str:
    names = (("nan", "NaN"), ("inf", "inf"), ("-inf", "-inf"))
    counts = [f"{p[key]} {name}" for key, name in names if p.get(key)]
    return f"{' and '.join(counts)} where the original has numbers, first at {p['first']}"


def _bit_flips(p: Parameters) -> str:
    bits = ", ".join(map(str, p["bits"]))
    count = "one element" if p["flips"] == 1 else f"each of {p['flips']} elements"
    at = f", at {', '.join(map(str, p['at']))}" if p.get("at") else ""
    return f"bit {bits} flipped in {count}{at}"


def _different_weights(p: Parameters) -> str:
    return {
        "fine-tuned": "different weights, near the original: fine-tuned, or otherwise trained on",
        "replaced": "different weights, without relation to the original",
        "related": "different weights, loosely related to the original",
        "other shape": "different weights, of another shape",
        "from zero": "different weights: the original is all zero, these were trained or set",
    }.get(p.get("kind", ""), "different weights: no known damage explains them")


_WORDS: dict[str, Callable[[Parameters], str]] = {
    "exact-cast": _exact_cast,
    "merged-adapter": lambda p: f"the adapter (rank {p['rank']}) added to A, rounded to {p['type']}: no difference",
    "relabelled-dtype": _relabelled,
    "rounded-cast": _rounded_cast,
    "byte-swapped": lambda p: f"the {p['element_bytes']} bytes of every element are in the other order (big-endian)",
    "transposed": _transposed,
    "rows-permuted": lambda p: f"rows in another order: {p['permutation']}",
    "columns-permuted": lambda p: f"columns in another order: {p['permutation']}",
    "head-permuted": _head_permuted,
    "qkv-order": _qkv_order,
    "swapped-tensors": _swapped,
    "shifted": _shifted,
    "truncated": _truncated,
    "zeroed-rows": _zeroed_rows,
    "zeroed": _zeroed,
    "rows-added": _added,
    "columns-added": _added,
    "rows-removed": _removed,
    "columns-removed": _removed,
    "heads-repeated": lambda p: f"every head of {p['head_dim']} repeated {p['times']} times, {p['order']}",
    "mantissa-cut": _mantissa_cut,
    "zero-signs": lambda p: f"{p['elements']} zeros have the other sign; every value is the same",
    "scaled-rows": _scaled_rows,
    "changed-rows": _changed_rows,
    "rescaled-channels": _rescaled,
    "low-rank": _low_rank,
    "scaled": lambda p: f"multiplied by {p['factor']:.9g}",
    "offset": lambda p: f"{p['constant']:+.9g} added to every element",
    "quantised": _quantised,
    "non-finite": _non_finite,
    "bit-flips": _bit_flips,
    "different-weights": _different_weights,
}
