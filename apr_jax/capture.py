"""Writes what another engine computes as a dump that `apr-jax parity MODEL --right dump/` reads.

    from apr_jax import capture

    with capture.torch(model, "dump/"):      # a PyTorch model: HuggingFace, vLLM or SGLang in eager mode, your own
        model(input_ids)
    with capture.torch(model, "dump/", gradients=True):    # for `parity --backward`
        model(input_ids, labels=input_ids).loss.backward()
    with capture.flax(model, "dump/"):       # a Flax NNX model
        model(input_ids)
    capture.onnx("model.onnx", "dump/", {"input_ids": ids})    # an ONNX model, run by ONNX Runtime
    capture.arrays("dump/", input_ids, values, names)   # arrays of anything else: your own engine

docs/dumps.md shows each of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apr_jax.engines.recorder import Recorder


def torch(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    input_ids: Any = None,
    force: bool = False,
    gradients: bool = False,
) -> contextlib.AbstractContextManager[Recorder]:
    """Watches a PyTorch model inside a `with` block and writes its stages at the end.

    The block holds one call of the model, or several that go on from one another: a prompt and its decoding steps, as
    `generate` makes them. Parts are found by name and shape; every value is written in the dtype that it has.

    Args:
      model: A torch.nn.Module with an embedding, numbered layers and a head, whatever they are called; not compiled.
      folder: Where to write the dump.
      names: Part -> the end of its module's path, for parts that are not found: {"q": "attend.ask"}. Parts are
        embedding, final_norm, head; in a layer attn_norm, q, k, v or qkv, rotary, o, ffn_norm, gate, up or gate_up,
        act, down.
      input_ids: All tokens [B, T], where the block holds decoding steps only and the prompt was run before.
      force: Whether an earlier dump may be replaced.
      gradients: Whether the block calls `loss.backward()` too: gradients of stages and parameters are then written for
        `parity --backward`. Labels are taken from the call of the model, where they are given to it.

    Returns:
      A context manager whose value takes what modules do not show: `with ... as take: take("stage.0.attention", x)`.

    Raises:
      UsageError: No module, unknown names, an existing folder, token ids that do not fit.
      RefusedError: No layers are found in the model, or nothing was captured.
    """
    from apr_jax.engines import torch_modules

    return torch_modules.watch(model, folder, names, input_ids, force, gradients)


def flax(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    input_ids: Any = None,
    force: bool = False,
) -> contextlib.AbstractContextManager[Recorder]:
    """Watches a Flax NNX model inside a `with` block and writes its stages at the end.

    As `torch`; inside the block `jax.jit` is switched off, so that every value is there.

    Args, Raises: As `torch`; `model` is a flax.nnx.Module.
    """
    from apr_jax.engines import flax_modules

    return flax_modules.watch(model, folder, names, input_ids, force)


def onnx(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    inputs: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Runs an ONNX model with ONNX Runtime on the CPU, every node's output shown, and writes its stages.

    Modules are known from what PyTorch's exporters leave in a model: the path of the module that a node comes from,
    beside the node or in its name. onnx and onnxruntime have to be installed.

    Args:
      model: The .onnx file.
      folder: Where to write the dump.
      inputs: The model's inputs by name; "input_ids" and, where it takes them, "attention_mask" and "position_ids".
      names: Stage -> a node output's name, "{layer}" standing for a layer's number, for what the paths do not tell.
      force: Whether an earlier dump may be replaced.

    Raises:
      UsageError: A package is missing, an unknown stage, or an existing folder.
      RefusedError: Nothing was found in it.
    """
    from apr_jax.engines import onnx_modules

    onnx_modules.run(model, folder, inputs, names, force)


def arrays(
    folder: str | os.PathLike[str],
    input_ids: Any,
    values: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    attention_mask: Any = None,
    position_ids: Any = None,
    positions: Any = None,
    force: bool = False,
) -> None:
    """Writes arrays that an engine returned as a dump.

    Args:
      folder: Where to.
      input_ids: Token ids [B, T].
      values: The engine's name -> array [B, T, ...]; what `names` does not map to is left out.
      names: Stage -> the engine's name for it, "{layer}" standing for a layer's number: {"attn_norm":
        "/model/layers.{layer}/input_layernorm/Mul_1_output_0", "logits": "logits"}. None: the values have our keys.
      attention_mask, position_ids: [B, T], as `Inputs.of`.
      positions: Positions of the rows, where the arrays hold some only.
      force: Whether an earlier dump may be replaced.

    Raises:
      UsageError: An unknown stage, or an existing folder.
      RefusedError: No array has one of the names.
    """
    from apr_jax.engines import mapping

    mapping.write(folder, input_ids, values, names, attention_mask, position_ids, positions, force)
