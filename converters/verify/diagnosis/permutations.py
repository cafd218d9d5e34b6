"""Finds transposed matrices, and rows, columns or attention heads that stand in another order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from apr_jax.converters.checkpoint.tensor import Tensor
from apr_jax.converters.verify.diagnosis import orders
from apr_jax.converters.verify.diagnosis.causes import Found
from apr_jax.converters.verify.diagnosis.context import Context, projection
from apr_jax.converters.verify.diagnosis.pair import ACCEPTED, Bits, Pair, Predict, Select

_PROBED_LINES = 24
_HASHED_ROWS = 512
_COLUMNS_AT_ONCE = 32


def transposed(pair: Pair) -> Iterator[Found]:
    """The transpose stored, under the original's shape or its own."""
    shape = tuple(size for size in pair.a.shape if size != 1)
    if len(shape) != 2:
        return
    rows, columns = shape
    matrix = pair.x.reshape(rows, columns)

    def predict(select: Select) -> Bits:
        if isinstance(select, slice):
            return matrix[:, select.start // rows : select.stop // rows].T.reshape(-1)
        return matrix[select % rows, select // rows]

    # So many columns at once that whole cache lines are used.
    if pair.plausible(predict) and (explained := pair.explained(predict, rows * _COLUMNS_AT_ONCE)):
        kept = pair.b.shape == pair.a.shape
        parameters = {"data": "transposed", "shape": "kept" if kept else "swapped"}
        evidence = f"the bytes are those of the transpose, the shape is {'the same' if kept else 'swapped too'}"
        yield Found("transposed", parameters, explained, evidence)


def permuted(pair: Pair, context: Context) -> Iterator[Found]:
    """Rows or columns in another order; in attention projections perhaps whole heads, or the two RoPE conventions."""
    if pair.a.shape != pair.b.shape:
        return
    rows, columns = pair.shape
    for axis in (0, 1):
        if (columns if axis else rows) < 2 or (axis and len(pair.b.shape) < 2):
            continue
        x, y = pair.x.reshape(rows, columns), pair.y.reshape(rows, columns)
        if not _lines_found(pair, x, y, axis):
            continue
        before, after = _labels(x, y, axis)
        found = _heads(pair, context, axis, before, after) or _plain(pair, axis, before, after)
        if found is not None:
            yield found
            # One explanation is enough: in a vector rows are elements, in a symmetric matrix rows are columns.
            return


def _lines_found(pair: Pair, x: Bits, y: Bits, axis: int) -> bool:
    """Whether some lines of the suspect that differ begin like lines of the original; cheap, for most tensors fail."""
    rows, columns = x.shape
    lines = np.unique(pair.sample // columns if axis == 0 else pair.sample % columns)
    lines = lines[:: max(1, len(lines) // _PROBED_LINES)]
    across = rows if axis else columns
    picked = np.unique(np.linspace(0, across - 1, 4).astype(int))
    keys_x, keys_y = np.zeros((2, columns if axis else rows), np.uint64)
    for place in picked:
        one, two = (x[place], y[place]) if axis else (x[:, place], y[:, place])
        keys_x = keys_x * np.uint64(0x9E3779B97F4A7C15) + one
        keys_y = keys_y * np.uint64(0x9E3779B97F4A7C15) + two
    # `np.isin` hashes all keys, which takes ten times as long as sorting them.
    keys_x.sort()
    found = keys_x[np.minimum(np.searchsorted(keys_x, keys_y[lines]), len(keys_x) - 1)]
    return bool(np.count_nonzero(found == keys_y[lines]) >= 0.9 * len(lines))


def _labels(x: Bits, y: Bits, axis: int) -> tuple[np.ndarray, np.ndarray]:
    if x.shape[1 - axis] == 1:
        return orders.labels(x.reshape(-1), y.reshape(-1))
    if axis and len(x) > 2 * _HASHED_ROWS:
        # Some rows tell columns apart, unless columns are alike in them.
        step = len(x) // _HASHED_ROWS
        before, after = orders.labels(orders.line_hashes(x[::step], 1), orders.line_hashes(y[::step], 1))
        if len(np.unique(before)) == len(before):
            return before, after
    return orders.labels(orders.line_hashes(x, axis), orders.line_hashes(y, axis))


def _moved(pair: Pair, axis: int, order: np.ndarray) -> Predict:
    rows, columns = pair.shape
    x = pair.x.reshape(rows, columns)

    def predict(select: Select) -> Bits:
        # Only ever asked for whole rows.
        assert isinstance(select, slice)
        part = slice(select.start // columns, select.stop // columns)
        return (np.take(x[part], order, axis=1, mode="clip") if axis else x[order[part]]).reshape(-1)

    return predict


def _verified(
    pair: Pair, cause: str, axis: int, parameters: dict[str, object], order: np.ndarray, evidence: str
) -> Found | None:
    explained = pair.explained(_moved(pair, axis, order), pair.shape[1])
    return Found(cause, parameters, explained, evidence) if explained else None


def _plain(pair: Pair, axis: int, before: np.ndarray, after: np.ndarray) -> Found | None:
    named = orders.recognise(before, after)
    if named is None:
        return None
    name, order = named
    kind = "columns" if axis else "rows"
    moved = int(np.count_nonzero(order != np.arange(len(order))))
    evidence = f"{moved} of {len(order)} {kind} are in another place: {name}"
    return _verified(pair, f"{kind}-permuted", axis, {"permutation": name}, order, evidence)


# --- heads


def _heads(pair: Pair, context: Context, axis: int, before: np.ndarray, after: np.ndarray) -> Found | None:
    role = projection(pair.b.name)
    if role is None or (role == "o") != (axis == 1) or role == "qkv":
        return None
    if role in ("q", "k"):
        for heads, dim in context.head_sizes(pair.b.name, len(before)):
            found = _convention(pair, heads, dim, before, after)
            if found is not None:
                return found
    for heads, dim in context.head_sizes(pair.b.name, len(before)):
        # Without a configuration any even division would do, and small ones explain every permutation.
        if heads > 1 and (dim > 2) and (context.heads(pair.b.name) in (None, (heads, dim))):
            found = _head_order(pair, axis, heads, dim, before, after)
            if found is not None:
                return found
    return None


def _convention(pair: Pair, heads: int, dim: int, before: np.ndarray, after: np.ndarray) -> Found | None:
    for name, order in (
        ("split-half to adjacent-pair", orders.adjacent_from_halves(dim)),
        ("adjacent-pair to split-half", orders.halves_from_adjacent(dim)),
    ):
        if dim < 4:
            continue
        full = orders.within_blocks(order)(np.arange(len(before)))
        if np.array_equal(before[full], after):
            parameters: dict[str, object] = {"convention": name, "head_dim": dim}
            evidence = (
                f"the rows inside each of {heads} heads of {dim} went from {name.replace(' to ', ' to the ')} order"
            )
            return _verified(pair, "head-permuted", 0, parameters, full, evidence)
    return None


def _head_order(pair: Pair, axis: int, heads: int, dim: int, before: np.ndarray, after: np.ndarray) -> Found | None:
    blocks = [line_labels.reshape(heads, dim).astype(np.uint64) for line_labels in (before, after)]
    one, two = orders.labels(*(orders.line_hashes(block, 0) for block in blocks))
    if np.array_equal(one, two):
        return None
    named = orders.recognise(one, two)
    if named is None:
        return None
    name, order = named
    full = (order[:, None] * dim + np.arange(dim)).reshape(-1)
    evidence = f"the {heads} heads of {dim} are in another order: {name}"
    parameters: dict[str, object] = {"heads": name, "head_dim": dim}
    return _verified(pair, "head-permuted", axis, parameters, full, evidence)


# --- fused and split q, k, v


def qkv_order(pair: Pair, context: Context) -> Iterator[Found]:
    """A fused projection in another layout, or q, k, v cut out of a fused one at the wrong places."""
    role = projection(pair.b.name)
    if role == "qkv" and pair.a.shape == pair.b.shape:
        yield from _fused_order(pair, context)
    elif role in ("q", "k", "v"):
        yield from _wrong_cut(pair, context)


def layouts(context: Context, rows: int) -> list[tuple[str, np.ndarray]]:
    """Returns the ways to lay q, k and v out in one matrix: name, and for each row which row of q|k|v it is."""
    if context.config is None:
        # Three equal parts are all that can be guessed.
        if rows % 3:
            return []
        sizes, heads, kv_heads = (rows // 3,) * 3, 1, 1
    else:
        heads, kv_heads = context.config.num_heads, context.config.num_kv_heads
        q, kv = heads * context.config.head_dim, kv_heads * context.config.head_dim
        if q + 2 * kv != rows:
            return []
        sizes = (q, kv, kv)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    parts = {name: np.arange(starts[i], starts[i + 1]) for i, name in enumerate("qkv")}
    found = [
        (",".join(order), np.concatenate([parts[name] for name in order])) for order in itertools.permutations("qkv")
    ]
    if kv_heads > 1:
        grouped = [parts[name].reshape(kv_heads, -1) for name in "qkv"]
        found.append(("q,k,v of each KV head", np.concatenate(grouped, axis=1).reshape(-1)))
    return found


def _fused_order(pair: Pair, context: Context) -> Iterator[Found]:
    rows, columns = pair.shape
    known = layouts(context, rows)
    x, y = pair.x.reshape(rows, columns), pair.y.reshape(rows, columns)
    if not known or not _lines_found(pair, x, y, 0):
        return
    before, after = _labels(x, y, 0)
    for (from_name, from_rows), (to_name, to_rows) in itertools.product(known, known):
        if from_name == to_name:
            continue
        where = np.empty(rows, np.int64)
        where[from_rows] = np.arange(rows)
        order = where[to_rows]
        if np.array_equal(before[order], after):
            parameters: dict[str, object] = {"from": from_name, "to": to_name}
            evidence = f"the fused rows are laid out as {to_name} in place of {from_name}"
            found = _verified(pair, "qkv-order", 0, parameters, order, evidence)
            if found is not None:
                yield found
                return


def _wrong_cut(pair: Pair, context: Context) -> Iterator[Found]:
    """q, k and v were put together in one order and cut up in another, or at other places."""
    role, columns = projection(pair.b.name), pair.shape[1]
    originals = context.siblings(pair.b.name, context.a)
    if role is None or len(originals) < 3 or pair.suspect.decoded or pair.a.dtype != pair.b.dtype:
        return
    bits = _matrices(originals, pair, columns, context)
    y = pair.y.reshape(-1, columns)
    if bits is None or not len(y) or not _rows_among(y, bits):
        return
    suspects = _matrices(context.siblings(pair.b.name, context.b), pair, columns, context) or {role: y}
    best = max(_cuts(bits, suspects, role), key=lambda cut: cut[0], default=None)
    if best is not None:
        _, fused, cut = best
        parameters: dict[str, object] = {"order": fused, "cut_as": cut}
        evidence = f"{role} is what {fused} put together gives when it is cut up as {cut}"
        yield Found("qkv-order", parameters, 1.0, evidence)
        return
    for order in itertools.permutations("qkv"):
        whole = np.concatenate([bits[name] for name in order])
        starts = {name: sum(len(bits[other]) for other in order[: order.index(name)]) for name in order}
        for begin in _starts(whole, y):
            # A whole sibling is an exchange of tensors, not a wrong cut.
            if any(starts[name] == begin and len(bits[name]) == len(y) for name in order):
                continue
            explained = float(np.mean(whole[begin : begin + len(y)] == y))
            if explained >= ACCEPTED:
                parameters = {"order": ",".join(order), "rows": {role: [int(begin), int(begin + len(y))]}}
                evidence = f"these are rows {begin} to {begin + len(y) - 1} of {','.join(order)} put together"
                yield Found("qkv-order", parameters, explained, evidence)
                return


def _cuts(bits: dict[str, Bits], suspects: dict[str, Bits], role: str) -> Iterator[tuple[int, str, str]]:
    """Yields (how many of q, k, v it explains, order, order of cutting) for what explains one role."""
    for order in itertools.permutations("qkv"):
        whole = np.concatenate([bits[name] for name in order])
        for cut in itertools.permutations("qkv"):
            if order == cut:
                continue
            stops = list(itertools.accumulate(len(bits[name]) for name in cut))
            parts = {name: whole[stop - len(bits[name]) : stop] for name, stop in zip(cut, stops, strict=True)}
            explained = {name for name, part in parts.items() if _equal(part, suspects.get(name))}
            if role not in explained:
                continue
            changed = [name for name in "qkv" if not _equal(parts[name], bits[name])]
            whole_ones = [one for one in changed if any(_equal(parts[one], bits[two]) for two in "qkv")]
            # A whole one is a copy of a tensor, two in each other's place are exchanged, three that went round are not.
            if role in whole_ones and (len(explained) < 3 or len(changed) < 3):
                continue
            yield len(explained) * 2 + (cut == ("q", "k", "v")), ",".join(order), ",".join(cut)


def _equal(left: Bits, right: Bits | None) -> bool:
    return (
        right is not None
        and left.shape == right.shape
        and bool((left[0] == right[0]).all())
        and bool((left == right).all())
    )


def _matrices(tensors: Mapping[str, Tensor], pair: Pair, columns: int, context: Context) -> dict[str, Bits] | None:
    """Returns the bits of tensors as rows of one length, if they have the type and the row length of the pair."""
    if any(tensor.dtype != pair.a.dtype or not tensor.nbytes for tensor in tensors.values()):
        return None
    bits = {name: context.load(tensor).bits for name, tensor in tensors.items()}
    if any(one.size % columns for one in bits.values()):
        return None
    return {name: one.reshape(-1, columns) for name, one in bits.items()}


def _rows_among(y: Bits, bits: dict[str, Bits]) -> bool:
    """Whether the first and the last row are found in any of some matrices."""
    return all(any(_has_row(one, row) for one in bits.values()) for row in (y[0], y[-1]))


def _has_row(matrix: Bits, row: Bits) -> bool:
    candidates = matrix[(matrix[:, 0] == row[0]) & (matrix[:, -1] == row[-1])]
    return bool((candidates == row).all(axis=1).any())


def _starts(whole: Bits, y: Bits) -> np.ndarray:
    """Returns the rows of `whole` from which on some rows of `y` are found."""
    last = len(whole) - len(y)
    candidates = np.arange(max(0, last + 1))
    for row in np.unique(np.linspace(0, len(y) - 1, 4).astype(int)):
        candidates = candidates[(whole[candidates + row] == y[row]).all(axis=1)]
    return candidates
