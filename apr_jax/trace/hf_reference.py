"""HuggingFace as a second opinion: logits and intermediate values of transformers' own Qwen2, in eager attention.

Nothing of the forward pass is written again here. Values are taken from the genuine modules by hooks, and, where a
stage is no module's output, by wrapping the functions that `modeling_qwen2` itself calls for the time of one run.

torch and transformers are an optional extra (`pip install 'apr-jax[reference]'`); nothing is ever downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args
from unittest import mock

import numpy as np

from apr_jax.converters.errors import MissingFileError, RefusedError, UsageError, pip_install
from apr_jax.trace import stages
from apr_jax.trace.stages import Key

DType = Literal["float32", "bfloat16", "float16", "float64"]


def available() -> bool:
    """Returns whether torch and transformers are installed."""
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def run(
    folder: str | os.PathLike[str],
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    dtype: DType = "float32",
    hidden_states: bool = False,
    trace: bool = False,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Runs HuggingFace's Qwen2ForCausalLM on one batch.

    Args:
      folder: A HuggingFace folder on this machine.
      input_ids: Token ids [B, T].
      attention_mask: [B, T], 0 at padding; None means no padding. Values at padded positions hold no meaning.
      position_ids: [B, T]; None counts the positions that are no padding, as `generate` does.
      dtype: In which to compute. float64 belongs inside `float64_patched`; see there.
      hidden_states: Also return the input of every layer and of the head.
      trace: Also return every stage.
      device: A torch device.

    Returns:
      `logits` [B, T, vocab]; with hidden_states `hidden.{layer}` and `hidden.final_norm`, [B, T, hidden]; with trace
      `stage.embedding`, `stage.{layer}.{name}` and `stage.final_norm` in the shapes of an APRT dump behind the batch
      axis, `attn_scores` being 0 where the key is not visible. All float64 if dtype is, float32 otherwise (bfloat16
      values are widened).

    Raises:
      UsageError: torch or transformers is missing, or the dtype is unknown.
      MissingFileError: There is no such folder.
      RefusedError: The folder's tensors are not exactly those of the model.
    """
    torch = _torch()
    if dtype not in get_args(DType):
        raise UsageError(f"unknown dtype {dtype!r}", code="dtype-unknown", expected=" or ".join(get_args(DType)))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            "torch finds no CUDA device", code="device", found=device, hint="Without device it computes on the CPU"
        )
    ids = np.asarray(input_ids)
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) if position_ids is None else np.asarray(position_ids)
    model = load(folder, dtype, device)
    taken = _Taken()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if hidden_states or trace:
            stack.enter_context(_hidden_states(model, taken))
        if trace:
            stack.enter_context(_trace(model, taken))
        logits = _forward(model, ids, mask, positions)
    values = {name: value for name, value in taken.items() if hidden_states or not Key(name).is_hidden}
    return {stages.LOGITS: _numpy(logits)} | values


def gradients(
    folder: str | os.PathLike[str],
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    position_ids: np.ndarray,
    predicted: np.ndarray,
    dtype: DType = "float32",
    trace: bool = False,
    device: str = "cpu",
) -> tuple[float, dict[str, np.ndarray]]:
    """Runs HuggingFace's Qwen2ForCausalLM forward and backward by torch's autograd.

    Args:
      folder: A HuggingFace folder on this machine.
      input_ids: Token ids [B, T].
      attention_mask: [B, T], 0 at padding.
      position_ids: [B, T].
      predicted: Which positions predict a token that the loss is over, bool [B, T - 1].
      dtype: As for `run`.
      trace: Also return the gradient with respect to every stage.
      device: A torch device.

    Returns:
      The mean cross-entropy in nats, and name -> gradient: of parameters by their names, of stages by their keys.

    Raises:
      UsageError, MissingFileError, RefusedError: As `run`.
    """
    torch = _torch()
    model = load(folder, dtype, device)
    taken = _Taken(keep=True)
    with _trace(model, taken) if trace else contextlib.nullcontext():
        logits = _forward(model, input_ids, attention_mask, position_ids)
    if trace:
        taken.take(stages.LOGITS, logits)
    counted = torch.tensor(predicted, device=device)
    targets = torch.tensor(np.asarray(input_ids, np.int64)[:, 1:], device=device)[counted]
    # In float32 at least, as `ForCausalLMLoss` does.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(wide[:, :-1][counted], targets)
    loss.backward()
    own = {name: _numpy(parameter.grad) for name, parameter in model.named_parameters()}
    return float(loss.item()), own | taken.gradients()


def _forward(model: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> Any:
    import torch

    ids, mask, positions = (
        torch.tensor(np.asarray(array, np.int64), device=model.device) for array in (ids, mask, positions)
    )
    # The mask goes in even where nothing is padded: without it transformers may guess packed sequences.
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


class _Taken(dict[str, np.ndarray]):
    """Stage -> value, and, of a run that is differentiated, the tensors that they were taken of.

    Attributes:
      keep: Whether the tensors are kept.
    """

    def __init__(self, keep: bool = False):
        super().__init__()
        self.keep = keep
        self._tensors: dict[str, list[tuple[Any, Callable[[Any], Any]]]] = {}

    def take(self, key: str, tensor: Any, view: Callable[[Any], Any] = lambda tensor: tensor) -> None:
        """Takes a stage's value out of the tensor that the computation goes on with."""
        self.join(key, [(tensor, view)])

    def join(self, key: str, parts: list[tuple[Any, Callable[[Any], Any]]]) -> None:
        """Takes a stage's value out of several tensors, one behind the other on the last axis."""
        self[key] = np.concatenate([_numpy(view(tensor)) for tensor, view in parts], -1)
        if self.keep:
            for tensor, _ in parts:
                tensor.retain_grad()
            self._tensors[key] = parts

    def gradients(self) -> dict[str, np.ndarray]:
        """Returns stage -> gradient, once the loss went backward; one of a product without a bias is the bias's."""
        found = {
            key: np.concatenate([_numpy(view(tensor.grad)) for tensor, view in parts], -1)
            for key, parts in self._tensors.items()
        }
        biased = {key: Key(key) for key in found if Key(key).stage == "qkv_bias"}
        return found | {Key.of(key.layer, "qkv_matmul"): found[name] for name, key in biased.items()}


def load(folder: str | os.PathLike[str], dtype: DType = "float32", device: str = "cpu") -> Any:
    """Returns transformers' Qwen2ForCausalLM of a folder, in eager attention and evaluation mode.

    transformers fills tensors that a checkpoint lacks with random values and goes on; that is refused here.

    Raises:
      UsageError, MissingFileError, RefusedError: As `run` does.
    """
    torch = _torch()
    path = os.fspath(folder)
    if not os.path.isdir(path):
        # transformers would take the name for a repository on its hub.
        raise MissingFileError("no such folder", code="file-missing", file=path)
    import transformers

    with _quiet(transformers):
        model, report = transformers.Qwen2ForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names and "error_msgs" not in kind}
    if wrong:
        raise RefusedError(
            "transformers did not find exactly the model's tensors",
            code="tensors-mismatch",
            file=path,
            found=wrong,
            hint="`verify MODEL` says what is missing and what has another name",
        )
    return model.to(device).eval()


@contextlib.contextmanager
def float64_patched() -> Iterator[None]:
    """Removes transformers' three casts to float32 for the time of the context: float64 is then float64 throughout.

    They are in RMSNorm, in the softmax and in RoPE. RoPE's angles stay float32, as they are in every dtype; their
    cosine and sine become the correctly rounded float32 values, widened. A run in float64 then equals the float64
    oracle to 1e-12. Without this, float64 is of no use with padding on the left: the softmax's cast turns the mask's
    value into -inf, and the NaN of a padded row reaches every other row of its sequence.
    """
    torch = _torch()
    from transformers.modeling_rope_utils import dynamic_rope_update
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    softmax = torch.nn.functional.softmax

    def norm(self: Any, hidden_states: Any) -> Any:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    @dynamic_rope_update
    def rotary(self: Any, x: Any, position_ids: Any) -> Any:
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1).double()
        return tuple((f(angles).float() * self.attention_scaling).to(x.dtype) for f in (torch.cos, torch.sin))

    def wide_softmax(values: Any, dim: int | None = None, dtype: Any = None, **rest: Any) -> Any:
        return softmax(values, dim=dim, dtype=None if values.dtype == torch.float64 else dtype, **rest)

    with (
        mock.patch.object(qwen2.Qwen2RMSNorm, "forward", norm),
        mock.patch.object(qwen2.Qwen2RotaryEmbedding, "forward", rotary),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield


def _torch() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the HuggingFace reference needs torch and transformers",
            code="reference-missing",
            found=str(error),
            hint=f"{pip_install('reference')} installs them",
        ) from None
    return torch


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor if tensor.dtype.itemsize == 8 else tensor.float()).cpu().numpy().copy()


@contextlib.contextmanager
def _hooks(*hooks: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _output(taken: _Taken, key: str, module: Any) -> Any:
    def take(_module: Any, _args: Any, output: Any) -> None:
        taken.take(key, output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(take)


def _input(taken: _Taken, key: str, module: Any) -> Any:
    def take(_module: Any, args: Any, kwargs: Any) -> None:
        taken.take(key, args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(take, with_kwargs=True)


def _hidden_states(model: Any, taken: _Taken) -> contextlib.AbstractContextManager[None]:
    inputs = [_input(taken, Key.of(index, "hidden"), layer) for index, layer in enumerate(model.model.layers)]
    return _hooks(*inputs, _output(taken, Key.of(None, "hidden"), model.model.norm))


@contextlib.contextmanager
def _trace(model: Any, taken: _Taken) -> Iterator[None]:
    hooks = [_output(taken, stages.EMBEDDING, model.model.embed_tokens)]
    parts: dict[str, Any] = {}
    products: list[Any] = []
    for index, layer in enumerate(model.model.layers):
        for key, module in (
            ("attn_norm", layer.input_layernorm),
            ("attn_out", layer.self_attn.o_proj),
            ("ffn_norm", layer.post_attention_layernorm),
            ("ffn_gate", layer.mlp.gate_proj),
            ("ffn_up", layer.mlp.up_proj),
            ("ffn_silu", layer.mlp.act_fn),
            ("ffn_out", layer.mlp.down_proj),
            ("post_ffn_residual", layer),
        ):
            hooks.append(_output(taken, Key.of(index, key), module))
        for key, module in (
            ("attention", layer.self_attn.o_proj),
            ("post_attn_residual", layer.post_attention_layernorm),
            ("ffn_swigl", layer.mlp.down_proj),
        ):
            hooks.append(_input(taken, Key.of(index, key), module))
        for name in "qkv":
            hooks.extend(_projection(parts, products, taken, index, name, layer.self_attn))
    hooks.append(_output(taken, stages.FINAL_NORM, model.model.norm))
    with _hooks(*hooks), _unbiased(products), _attention_internals(model, taken):
        yield


@contextlib.contextmanager
def _unbiased(products: list[Any]) -> Iterator[None]:
    """Keeps, of the latest product with a bias, what it is without: no module's output. It is taken of the very
    arguments that torch got, by the very function, so that a mistake in either shows here and not at the bias."""
    import torch

    functional = torch.nn.functional
    linear = functional.linear

    def wrapped(x: Any, weight: Any, bias: Any = None) -> Any:
        products[:] = [linear(x, weight)]
        return products[0] if bias is None else linear(x, weight, bias)

    with mock.patch.object(functional, "linear", wrapped):
        yield


def _projection(
    parts: dict[str, Any],
    products: list[Any],
    taken: _Taken,
    layer: int,
    name: str,
    attention: Any,
) -> Iterator[Any]:
    """Hooks one of q_proj, k_proj, v_proj; the last of them joins the three."""
    module = getattr(attention, f"{name}_proj")

    def forget(_module: Any, _args: Any) -> None:
        products.clear()

    def take(_module: Any, _args: Any, output: Any) -> None:
        parts[f"qkv_bias.{name}"] = output
        parts.update({f"qkv_matmul.{name}": product for product in products})
        if name == "v":
            # A projection that never called torch's product has none to show.
            if {f"qkv_matmul.{part}" for part in "qkv"} <= set(parts):
                products_of_all = [_numpy(parts[f"qkv_matmul.{part}"]) for part in "qkv"]
                taken[Key.of(layer, "qkv_matmul")] = np.concatenate(products_of_all, -1)
            taken.join(
                Key.of(layer, "qkv_bias"), [(parts[f"qkv_bias.{part}"], lambda tensor: tensor) for part in "qkv"]
            )
            parts.clear()

    yield module.register_forward_pre_hook(forget)
    yield module.register_forward_hook(take)


@contextlib.contextmanager
def _attention_internals(model: Any, taken: _Taken) -> Iterator[None]:
    """Wraps RoPE, the eager attention and its softmax, which `modeling_qwen2` looks up by name at each call."""
    import torch
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    # Counted in execution: a module's own number says where it stood when the model was built.
    rotations, attentions = iter(range(len(model.model.layers))), iter(range(len(model.model.layers)))
    softmax_inputs: list[Any] = []

    def after(function: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            record(args, result)
            return result

        return wrapped

    def rotated(_args: Any, result: Any) -> None:
        index = next(rotations)
        for name, value in zip("qk", result, strict=True):
            taken.take(Key.of(index, f"{name}_post_rope"), value, lambda heads: heads.transpose(1, 2).flatten(2))

    def attended(args: Any, result: Any) -> None:
        mask, index = args[4], next(attentions)
        if softmax_inputs:
            scores = softmax_inputs.pop()
            # The mask has been added to the scores: plus 0 where the key is visible, a huge negative value elsewhere.
            seen = None if mask is None else mask == 0
            taken.take(Key.of(index, "attn_scores"), scores, functools.partial(_seen, seen))
        taken.take(Key.of(index, "attn_softmax"), result[1])

    functional = torch.nn.functional
    with (
        mock.patch.object(qwen2, "apply_rotary_pos_emb", after(qwen2.apply_rotary_pos_emb, rotated)),
        mock.patch.object(qwen2, "eager_attention_forward", after(qwen2.eager_attention_forward, attended)),
        mock.patch.object(
            functional, "softmax", after(functional.softmax, lambda args, _result: softmax_inputs.append(args[0]))
        ),
    ):
        yield


def _seen(visible: Any, scores: Any) -> Any:
    """Scores, 0 where the mask hides the key."""
    return scores if visible is None else scores.masked_fill(~visible, 0)
