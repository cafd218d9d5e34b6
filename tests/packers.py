"""Packs the matrices of a checkpoint as published forms do, by plain NumPy formulas that share nothing with the code
under test, and says what the packed ones stand for. The formulas are held against the libraries' own files in
tests/converters/checkpoint/packed_forms_test.py.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import ml_dtypes
import numpy as np

# Parts by the end of their name, and the dense matrix that they stand for.
Packed = tuple[dict[str, np.ndarray], np.ndarray]
Packer = Callable[[np.ndarray], Packed]

_CODES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "int8": "I8", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32
)  # fmt: skip
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs each row densely into int32, bit by bit."""
    rows, count = codes.shape
    stream = (codes.astype(np.int64)[:, :, None] >> np.arange(bits) & 1).reshape(rows, -1)
    stream = np.pad(stream, ((0, 0), (0, -count * bits % 32))).reshape(rows, -1, 32)
    return (stream << np.arange(32)).sum(2).astype(np.uint32).view(np.int32)


def _affine(
    w: np.ndarray, bits: int, order: np.ndarray, scale_type: np.dtype, *, symmetric: bool = False
) -> tuple[np.ndarray, ...]:
    """Codes, zero points and scales of groups of columns."""
    top, groups = (1 << bits) - 1, int(order.max()) + 1
    low = np.stack([np.minimum(w[:, order == g].min(1), 0) for g in range(groups)], 1)
    high = np.stack([np.maximum(w[:, order == g].max(1), 0) for g in range(groups)], 1)
    if symmetric:
        low, high = -np.maximum(-low, high), np.maximum(-low, high)
    scale = np.maximum((high - low) / top, 1e-4).astype(scale_type)
    step = scale.astype(np.float32)
    zero = np.full(step.shape, 1 << bits - 1) if symmetric else np.clip(np.rint(-low / step), 1, top)
    codes = np.clip(np.rint(w / step[:, order]) + zero[:, order], 0, top)
    return codes, zero, scale, ((codes - zero[:, order]) * step[:, order]).astype(np.float32)


def _order(columns: int, group: int, shuffled: bool) -> np.ndarray:
    order = np.arange(columns) // (group if group > 0 else columns)
    return np.random.default_rng(7).permutation(order) if shuffled else order


def gptq(bits: int = 4, group: int = 32, *, shuffled: bool = False, v2: bool = False, index: bool = True,
         symmetric: bool = False, scale_type: object = np.float16) -> Packer:  # fmt: skip
    """`symmetric`: every zero point is the middle code, as GPTQModel has it unless it is told otherwise."""

    def pack(w: np.ndarray) -> Packed:
        order = _order(w.shape[1], group, shuffled)
        codes, zero, scale, dense = _affine(w, bits, order, np.dtype(scale_type), symmetric=symmetric)
        parts = {
            "qweight": np.ascontiguousarray(words(codes, bits).T),
            "qzeros": words((zero - (not v2)).T, bits),
            "scales": np.ascontiguousarray(scale.T),
        }
        if index:
            parts["g_idx"] = order.astype(np.int32)
        return parts, dense

    return pack


def awq(group: int = 32, scale_type: object = np.float16) -> Packer:
    def interleaved(codes: np.ndarray) -> np.ndarray:
        eights = codes.astype(np.int64).reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return (eights << 4 * np.arange(8)).sum(2).astype(np.uint32).view(np.int32)

    def pack(w: np.ndarray) -> Packed:
        codes, zero, scale, dense = _affine(w, 4, _order(w.shape[1], group, False), np.dtype(scale_type))
        qweight, qzeros = interleaved(codes.T), interleaved(zero.T)
        return {"qweight": qweight, "qzeros": qzeros, "scales": np.ascontiguousarray(scale.T)}, dense

    return pack


def scaled(kind: object, block: tuple[int, int] | None = None, *, name: str = "weight_scale", flat: bool = False,
           scale_type: object = np.float32) -> Packer:  # fmt: skip
    """8 bits beside a scale: of the tensor (`block` None), or of blocks; a height of 1 and a width of 0 are rows."""

    def pack(w: np.ndarray) -> Packed:
        rows, columns = w.shape
        height, width = block or (rows, columns)
        width = width or columns
        padded = np.pad(w, ((0, -rows % height), (0, -columns % width)))
        blocks = padded.reshape(padded.shape[0] // height, height, -1, width)
        target = np.dtype(kind)
        top = 127.0 if target == np.int8 else float(ml_dtypes.finfo(target).max)
        scale = (np.abs(blocks).max((1, 3)) / top + 1e-8).astype(scale_type)
        step = scale.astype(np.float32)[:, None, :, None]
        codes = np.clip(blocks / step, -top, top)
        codes = np.rint(codes).astype(np.int8) if target == np.int8 else codes.astype(target)
        dense = (codes.astype(np.float32) * step).reshape(padded.shape)[:rows, :columns]
        codes = np.ascontiguousarray(codes.reshape(padded.shape)[:rows, :columns])
        stored = scale.reshape(()) if block is None else scale.reshape(-1) if flat else scale
        return {"weight": codes, name: stored}, dense

    return pack


def bnb4(kind: str = "nf4", block: int = 64, *, nested: bool = False, dtype: str = "float32") -> Packer:
    table = NF4 if kind == "nf4" else np.concatenate([E2M1 / 6, -E2M1 / 6]).astype(np.float32)

    def pack(w: np.ndarray) -> Packed:
        flat = np.pad(w.reshape(-1), (0, -w.size % block)).reshape(-1, block)
        absmax = np.abs(flat).max(1).astype(np.float32)
        extra, state = {}, {}
        if nested:
            code = (np.arange(256, dtype=np.float32) - 128) / 128
            offset = float(absmax.mean())
            centred = np.pad(absmax - offset, (0, -absmax.size % 256)).reshape(-1, 256)
            largest = np.abs(centred).max(1).astype(np.float32) + np.float32(1e-9)
            q = np.abs(centred[..., None] / largest[:, None, None] - code).argmin(2).astype(np.uint8)
            decoded = (code[q] * largest[:, None]).reshape(-1)[: absmax.size]
            absmax = (decoded + np.float32(offset)).astype(np.float32)
            extra = {"weight.nested_absmax": largest, "weight.nested_quant_map": code}
            extra["weight.absmax"] = q.reshape(-1)[: absmax.size]
            state = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = np.abs(flat[..., None] / absmax[:, None, None] - table).argmin(2).reshape(-1)[: w.size]
        data = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]
        padded = np.pad(codes, (0, -codes.size % block)).reshape(-1, block)
        dense = (table[padded] * absmax[:, None]).reshape(-1)[: w.size].reshape(w.shape)
        dense = dense.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).astype(np.float32)
        state |= {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(w.shape)}
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        parts = {"weight": data, "weight.absmax": absmax, "weight.quant_map": table}
        return parts | extra | {f"weight.quant_state.bitsandbytes__{kind}": text}, dense

    return pack


def bnb8() -> Packer:
    def pack(w: np.ndarray) -> Packed:
        largest = np.abs(w).max(1).astype(np.float32)
        codes = np.rint(w * 127 / largest[:, None]).astype(np.int8)
        parts = {"weight": codes, "SCB": largest, "weight_format": np.array(0, np.uint8)}
        return parts, codes * largest[:, None] / np.float32(127)

    return pack


def ct(bits: int = 4, group: int = 32, *, symmetric: bool = True, shuffled: bool = False,
       scale_type: object = np.float32) -> Packer:  # fmt: skip
    def pack(w: np.ndarray) -> Packed:
        order, half = _order(w.shape[1], group, shuffled), 1 << bits - 1
        if symmetric:
            groups = int(order.max()) + 1
            scale = np.stack([np.abs(w[:, order == g]).max(1) for g in range(groups)], 1) / (half - 0.5)
            scale = np.maximum(scale, 1e-6).astype(scale_type)
            step = scale.astype(np.float32)[:, order]
            q = np.clip(np.rint(w / step), -half, half - 1)
            codes, dense, zero = q + half, (q * step).astype(np.float32), None
        else:
            codes, zero, scale, dense = _affine(w, bits, order, np.dtype(scale_type))
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": np.array(w.shape, np.int64),
        }
        if zero is not None:
            parts["weight_zero_point"] = np.ascontiguousarray(words(zero.T, bits).T)
        if shuffled:
            parts["weight_g_idx"] = order.astype(np.int32)
        return parts, dense

    return pack


def torchao(bits: int = 4, group: int = 32, scale_type: object = np.float32) -> Packer:
    """Codes as they are, each in 8 bits, zero points beside their scales."""

    def pack(w: np.ndarray) -> Packed:
        codes, zero, scale, dense = _affine(w, bits, _order(w.shape[1], group, False), np.dtype(scale_type))
        half = 1 << bits - 1
        parts = {
            "_weight_qdata": (codes - half).astype(np.int8),
            "_weight_scale": scale,
            "_weight_zero_point": (zero - half).astype(np.int8),
        }
        return parts, dense

    return pack


def nvfp4(group: int = 16) -> Packer:
    def pack(w: np.ndarray) -> Packed:
        grouped = w.reshape(len(w), -1, group)
        whole = np.float32(448 * 6 / np.abs(w).max())
        scale = (np.abs(grouped).max(2) / 6 * whole).astype(ml_dtypes.float8_e4m3fn)
        step = (scale.astype(np.float32) / whole)[..., None]
        values = np.concatenate([E2M1, -E2M1])
        codes = np.abs(grouped[..., None] / step[..., None] - values).argmin(3).reshape(w.shape)
        dense = (values[codes].reshape(grouped.shape) * step).reshape(w.shape)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole.reshape(1)}, dense

    return pack


def mxfp4(group: int = 32) -> Packer:
    """Scales that are powers of two, their exponents in bytes, and none for the tensor."""

    def pack(w: np.ndarray) -> Packed:
        grouped = w.reshape(len(w), -1, group)
        exponent = np.ceil(np.log2(np.abs(grouped).max(2) / 6)).astype(np.int32)
        step = np.ldexp(np.float32(1), exponent)[..., None]
        values = np.concatenate([E2M1, -E2M1])
        codes = np.abs(grouped[..., None] / step[..., None] - values).argmin(3).reshape(w.shape)
        dense = (values[codes].reshape(grouped.shape) * step).reshape(w.shape)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        return {"weight_packed": packed, "weight_scale": (exponent + 127).astype(np.uint8)}, dense

    return pack


def whole_bytes(group: int = 32) -> Packer:
    """int8 as it is, the groups of its columns in act-order."""

    def pack(w: np.ndarray) -> Packed:
        order = _order(w.shape[1], group, True)
        groups = int(order.max()) + 1
        scale = (np.stack([np.abs(w[:, order == g]).max(1) for g in range(groups)], 1) / 127).astype(np.float32)
        codes = np.rint(w / scale[:, order]).astype(np.int8)
        parts = {"weight": codes, "weight_scale": scale, "weight_g_idx": order.astype(np.int32)}
        return parts, (codes * scale[:, order]).astype(np.float32)

    return pack


def without(packer: Packer, part: str) -> Packer:
    """Leaves out a part that nothing needs."""

    def pack(w: np.ndarray) -> Packed:
        parts, dense = packer(w)
        return {name: values for name, values in parts.items() if name != part}, dense

    return pack


# --- checkpoints


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads one safetensors file of plain types as NumPy arrays."""
    types = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in _CODES.items()}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {
            "dtype": _CODES[values.dtype.name], "shape": list(values.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for v in tensors.values()))


def pack_checkpoint(
    base: pathlib.Path, folder: pathlib.Path, packer: Packer, config: dict, ignored: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Writes `base` with its projections packed, but for those whose names hold one of `ignored`.

    Returns:
      The dense tensors that it stands for, float32 where they were packed.
    """
    shutil.copytree(base, folder)
    folder.chmod(0o755)
    tensors, dense = {}, {}
    for name, values in read(base / "model.safetensors").items():
        stem = name.removesuffix("weight")
        if not name.endswith("_proj.weight") or any(part in name for part in ignored):
            tensors[name] = dense[name] = values
            continue
        parts, dense[name] = packer(values.astype(np.float32))
        tensors |= {stem + part: held for part, held in parts.items()}
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors", tensors)
    settings = json.loads((base / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return dense


def dense_checkpoint(base: pathlib.Path, folder: pathlib.Path, dense: dict[str, np.ndarray]) -> None:
    """Writes `base` with these tensors."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    write(folder / "model.safetensors", dense)


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def _ct_weights(**weights: object) -> dict:
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


# Name -> packer and `quantization_config`: the members of each form.
MEMBERS: dict[str, tuple[Packer, dict]] = {
    "gptq_int4_32": (gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq_int4_16_v2": (
        gptq(4, 16, v2=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
    ),
    "gptq_int4_act_order": (
        gptq(shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    ),
    "gptq_int4_act_order_symmetric": (
        gptq(group=64, shuffled=True, symmetric=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True},
    ),
    "gptq_int8_whole_row_bf16": (
        gptq(8, -1, scale_type=ml_dtypes.bfloat16),
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
    ),
    "gptq_int3": (gptq(3, 32), {"quant_method": "gptq", "bits": 3, "group_size": 32}),
    "gptq_int2_no_index": (gptq(2, 16, index=False), {"quant_method": "gptq", "bits": 2, "group_size": 16}),
    "auto_round": (
        gptq(4, 32, index=False),
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
    ),
    "awq_32": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "awq_16_bf16": (
        awq(16, ml_dtypes.bfloat16),
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"},
    ),
    "awq_whole_row": (awq(-1), {"quant_method": "awq", "bits": 4, "group_size": -1}),
    "fp8_block_128": (
        scaled(ml_dtypes.float8_e4m3fn, (128, 128), name="weight_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "fp8_block_unsaid": (scaled(ml_dtypes.float8_e4m3fn, (128, 128), name="weight_scale_inv"), {"quant_method": "fp8"}),
    "fp8_block_32_16": (
        scaled(ml_dtypes.float8_e4m3fn, (32, 16), name="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [32, 16]},
    ),
    "fp8_tensor": (scaled(ml_dtypes.float8_e4m3fn), {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8_row": (scaled(ml_dtypes.float8_e4m3fn, (1, 0)), {"quant_method": "fbgemm_fp8"}),
    "fp8_e5m2_row_flat": (
        scaled(ml_dtypes.float8_e5m2, (1, 0), flat=True, scale_type=ml_dtypes.bfloat16),
        {"quant_method": "fp8"},
    ),
    "bnb_nf4_64": (bnb4(), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb_nf4_128_nested_bf16": (
        bnb4("nf4", 128, nested=True, dtype="bfloat16"),
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    ),
    "bnb_fp4_256_f16": (bnb4("fp4", 256, dtype="float16"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb_nf4_4096": (bnb4("nf4", 4096), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb_int8_by_rows": (without(bnb8(), "weight_format"), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bnb_int8": (bnb8(), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "ct_int4_32": (ct(), _ct_weights(num_bits=4, strategy="group", group_size=32)),
    "ct_int4_asymmetric_16": (
        ct(4, 16, symmetric=False),
        _ct_weights(num_bits=4, strategy="group", group_size=16, symmetric=False),
    ),
    "ct_int4_act_order_bf16": (
        ct(shuffled=True, scale_type=ml_dtypes.bfloat16),
        _ct_weights(num_bits=4, strategy="group", group_size=32, actorder="group"),
    ),
    "ct_int8_packed_row": (ct(8, -1), _ct_weights(num_bits=8, strategy="channel")),
    "ct_int8_row": (scaled(np.int8, (1, 0)), CT | {"format": "int-quantized"}),
    "ct_fp8_tensor": (scaled(ml_dtypes.float8_e4m3fn), CT | {"format": "float-quantized"}),
    "torchao_int4_32": (torchao(), {"quant_method": "torchao", "quant_type_name": "int4_weight_only"}),
    "torchao_int8_row_bf16": (torchao(8, -1, ml_dtypes.bfloat16), {"quant_method": "torchao"}),
    "ct_int8_act_order": (whole_bytes(), _ct_weights(num_bits=8, strategy="group", group_size=32, actorder="group")),
    "ct_fp8_block_as_words": (
        scaled(ml_dtypes.float8_e4m3fn, (32, 16)),
        _ct_weights(num_bits=8, type="float", strategy="block", block_structure="32x16"),
    ),
    "ct_mxfp4": (mxfp4(), CT | {"format": "mxfp4-pack-quantized"}),
    "ct_nvfp4": (nvfp4(), CT | {"format": "nvfp4-pack-quantized"}),
}
