"""Writes the packed forms of one small matrix with the libraries that publish them, and what they decode it to.

    python tests/data/packed/regenerate.py SITE AUTOGPTQ AUTOAWQ GPTQMODEL

SITE: a folder with bitsandbytes 0.50.2, compressed-tensors 0.20.1, torchao 0.18.0, loguru and frozendict (pip install
--target ... --no-deps); AUTOGPTQ: the unpacked wheel auto-gptq 0.7.1; AUTOAWQ: the unpacked archive autoawq 0.2.9;
GPTQMODEL: the unpacked archive gptqmodel 7.7.0, which wants accelerate, datasets, defuser, device-smi, dill, logbar,
pillow, pypcre, threadpoolctl, tokenicer and what they need in SITE. All compute on the CPU. Of AutoGPTQ and AutoAWQ
only the modules that pack are imported, since the rest wants CUDA.

NAME.safetensors holds the parts under the names that the library gives them, and in its metadata the
`quantization_config`; dense.npz holds for each NAME what the library itself decodes, in float32 if it can.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
OUT, IN = 32, 128
DENSE: dict[str, np.ndarray] = {}


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(12)) * 0.05
    values[3, 7], values[9, 100] = 1.5, -2.0
    return values.to(torch.bfloat16).to(dtype)


def write(name: str, parts: dict[str, torch.Tensor], config: dict, dense: torch.Tensor) -> None:
    metadata = {"format": "pt", "quantization_config": json.dumps(config)}
    tensors = {f"layer.{key}": value.detach().contiguous() for key, value in parts.items()}
    save_file(tensors, HERE / f"{name}.safetensors", metadata)
    DENSE[name] = dense.detach().float().numpy()


def from_file(path: pathlib.Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- bitsandbytes


def bitsandbytes_forms() -> None:
    import bitsandbytes

    ops = bitsandbytes.functional
    for name, kind, block, nested, dtype in (
        ("bnb_nf4_64", "nf4", 64, False, torch.float32),
        ("bnb_nf4_64_nested_bf16", "nf4", 64, True, torch.bfloat16),
        ("bnb_nf4_128_f16", "nf4", 128, False, torch.float16),
        ("bnb_fp4_128_nested", "fp4", 128, True, torch.float32),
    ):
        data, state = ops.quantize_4bit(weight(dtype), blocksize=block, quant_type=kind, compress_statistics=nested)
        parts = {"weight": data} | {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        write(name, parts, config, ops.dequantize_4bit(data, state))
    codes, scales, _ = ops.int8_vectorwise_quant(weight(torch.float16))
    parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write("bnb_int8", parts, config, ops.int8_vectorwise_dequant(codes, scales))


# --- compressed-tensors


def compressed_tensors_forms() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for name, layout, arguments in (
        ("ct_int4_group32", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        (
            "ct_int4_asymmetric_group64",
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
        ),
        ("ct_int8_packed_channel", "pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("ct_int3_group32", "pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
        ("ct_int8_channel", "int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("ct_fp8_channel", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("ct_fp8_tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "ct_fp8_block",
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
        ),
    ):
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        values = weight()
        low, high = extremes(values, args)
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": values, "weight_scale": scale.float(), "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(layout)
        parts = compressor.compress(state, scheme)
        dense = compressor.decompress(dict(parts), scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}},
            "ignore": ["lm_head"],
        }
        write(name, {k: v for k, v in parts.items() if v is not None}, config, dense)


def extremes(values: torch.Tensor, args) -> tuple[torch.Tensor, torch.Tensor]:
    strategy = args.strategy
    if strategy == "tensor":
        return values.min().reshape(1), values.max().reshape(1)
    if strategy == "channel":
        return values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    if strategy == "block":
        height, width = args.block_structure
        blocks = values.reshape(OUT // height, height, IN // width, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = values.reshape(OUT, -1, args.group_size)
    return groups.amin(2), groups.amax(2)


# --- torchao


def torchao_forms() -> None:
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    for name, dtype, settings in (
        ("torchao_fp8_row", torch.float32, quantization.Float8WeightOnlyConfig()),
        ("torchao_int8_row_bf16", torch.bfloat16, quantization.Int8WeightOnlyConfig(version=2)),
        ("torchao_int4_group32", torch.float32, intx(quantization, torch.int4, 32)),
        ("torchao_int3_group64_bf16", torch.bfloat16, intx(quantization, torch.int3, 64)),
        (
            "torchao_int4_asymmetric",
            torch.float32,
            intx(quantization, torch.int4, 32, mapping_type=quantization.quant_primitives.MappingType.ASYMMETRIC),
        ),
    ):
        module = torch.nn.ModuleDict({"layer": torch.nn.Linear(IN, OUT, bias=False, dtype=dtype)})
        module["layer"].weight.data = weight(dtype)
        quantization.quantize_(module, settings)
        parts, metadata = flatten_tensor_state_dict(module.state_dict())
        DENSE[name] = module["layer"].weight.dequantize().detach().float().numpy()
        # transformers writes more of the settings; nothing depends on them.
        metadata |= {"format": "pt", "quantization_config": json.dumps({"quant_method": "torchao"})}
        save_file(parts, HERE / f"{name}.safetensors", metadata)


def intx(quantization: types.ModuleType, dtype: torch.dtype, group: int, **settings: object) -> object:
    return quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=quantization.PerGroup(group), **settings)


# --- GPTQ


def gptq_forms(root: pathlib.Path) -> None:
    folder = root / "auto_gptq/nn_modules/qlinear"
    old = from_file(folder / "qlinear_cuda_old.py", "qlinear_cuda_old")
    ordered = from_file(folder / "qlinear_cuda.py", "qlinear_cuda")
    for name, bits, group, act_order, version in (
        ("gptq_int4_group32", 4, 32, False, "gptq"),
        ("gptq_int4_group64_v2", 4, 64, False, "gptq_v2"),
        ("gptq_int4_act_order", 4, 32, True, "gptq"),
        ("gptq_int8_whole_row", 8, -1, False, "gptq"),
        ("gptq_int2_group32", 2, 32, False, "gptq"),
        ("gptq_int3_group64", 3, 64, False, "gptq"),
    ):
        values, size = weight(torch.float16).float(), IN if group == -1 else group
        order = torch.arange(IN) // size
        if act_order:
            order = order[torch.randperm(IN, generator=torch.Generator().manual_seed(5))]
        top = 2**bits - 1
        low = torch.stack([values[:, order == g].amin(1) for g in range(IN // size)], 1).clamp(max=0)
        high = torch.stack([values[:, order == g].amax(1) for g in range(IN // size)], 1).clamp(min=0)
        scales = ((high - low) / top).half().float()
        # A stored zero point less one has to be one at least.
        zeros = torch.round(-low / scales).clamp(1, top)
        kind = ordered if act_order else old
        layer = kind.QuantLinear(bits, group, IN, OUT, False, weight_dtype=torch.float16)
        linear = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float16)
        linear.weight.data = values.half()
        layer.pack(linear, scales.clone(), zeros.clone(), order.to(torch.int32))
        layer.g_idx = order.to(torch.int32)
        parts = {key: getattr(layer, key).clone() for key in ("qweight", "qzeros", "scales", "g_idx")}
        layer.scales = layer.scales.float()
        dense = layer(torch.eye(IN)).T
        if version == "gptq_v2":
            # What GPTQModel's convert_gptq_v1_to_v2_format_module does for 4 bits.
            parts["qzeros"] += 0b00010001000100010001000100010001
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False}
        write(name, parts, config | {"checkpoint_format": version}, dense)


def gptqmodel_forms(root: pathlib.Path) -> None:
    sys.path.insert(0, str(root))
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import FORMAT

    for name, bits, group, symmetric, act_order in (
        ("gptqmodel_int4_act_order", 4, 32, True, True),
        ("gptqmodel_int4_asymmetric_act_order", 4, 64, False, True),
        ("gptqmodel_int8_asymmetric", 8, 32, False, False),
    ):
        values, top = weight(torch.float16).float(), 2**bits - 1
        order = torch.arange(IN) // group
        if act_order:
            order = order[torch.randperm(IN, generator=torch.Generator().manual_seed(5))]
        groups = [values[:, order == g] for g in range(IN // group)]
        low, high = (torch.stack(part, 1) for part in zip(*((g.amin(1), g.amax(1)) for g in groups), strict=True))
        low, high = low.clamp(max=0), high.clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales = ((high - low) / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2) if symmetric else torch.round(-low / scales).clamp(0, top)
        linear = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float16)
        linear.weight.data = values.half()
        layer = TorchLinear(bits, group, symmetric, act_order, IN, OUT, bias=False, format=FORMAT.GPTQ_V2)
        layer.pack_original(linear, scales, zeros, order.to(torch.int32))
        layer.post_init()
        parts = {key: getattr(layer, key).clone() for key in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
        write(name, parts, config | {"checkpoint_format": "gptq_v2"}, layer.dequantize_weight().T)


# --- AWQ


def awq_forms(root: pathlib.Path) -> None:
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for name, group in (("awq_group32", 32), ("awq_group64", 64), ("awq_whole_row", -1)):
        values, size = weight(torch.float16).float(), IN if group == -1 else group
        grouped = values.reshape(OUT, -1, size)
        low, high = grouped.amin(2), grouped.amax(2)
        scales = ((high - low).clamp(min=1e-5) / 15).half().float()
        zeros = (-torch.round(low / scales)).clamp(0, 15)
        linear = torch.nn.Linear(IN, OUT, bias=False, dtype=torch.float32)
        linear.weight.data = (
            (torch.clamp(torch.round(grouped / scales[..., None]) + zeros[..., None], 0, 15) - zeros[..., None])
            .mul(scales[..., None])
            .reshape(OUT, IN)
        )
        layer = WQLinear_GEMM.from_linear(linear, 4, size, False, scales.T.contiguous(), zeros.T.contiguous())
        parts = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
        dense = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, size).T
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        write(name, parts, config | {"modules_to_not_convert": ["lm_head"]}, dense)


if __name__ == "__main__":
    site, autogptq, autoawq, gptqmodel = map(pathlib.Path, sys.argv[1:])
    sys.path[:0] = [str(site)]
    bitsandbytes_forms()
    gptq_forms(autogptq)
    awq_forms(autoawq)
    compressed_tensors_forms()
    torchao_forms()
    gptqmodel_forms(gptqmodel)
    np.savez_compressed(HERE / "dense.npz", **DENSE)
