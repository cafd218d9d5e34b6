"""PyTorch models watched by hooks on their modules: HuggingFace's, vLLM's and SGLang's eager ones, one's own.

torch is imported when a model is there to be watched, never before.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.engines.functions import rotations, watched
from apr_jax.engines.recorder import Recorder, as_numpy, recording
from apr_jax.engines.roles import Part, Role, assign
from apr_jax.engines.torch_gradients import Gradients

_MASKS, _POSITIONS = ("attention_mask",), ("position_ids", "positions")


@contextlib.contextmanager
def watch(
    model: Any,
    folder: str | os.PathLike[str],
    names: Mapping[str, str] | None,
    input_ids: Any,
    force: bool,
    gradients: bool = False,
) -> Iterator[Recorder]:
    """See `apr_jax.capture.torch`."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            "not a torch.nn.Module",
            code="capture-model",
            found=type(model).__name__,
            hint="Where there are no modules to watch, write the stages with capture.arrays (docs/dumps.md).",
        )
    modules = dict(model.named_modules())
    parts = [_part(name, module) for name, module in modules.items() if name]
    roles = assign(parts, names)
    with recording(folder, input_ids, force) as recorder:
        recorder.expect(parts, roles)
        wanted = Gradients(model, roles, recorder) if gradients else None
        hooks = [*_root_hooks(model, recorder, wanted)]
        for name, role in roles.items():
            hooks += _hooks(modules[name], role, recorder, wanted)
        attention = [modules[name] for name, role in roles.items() if role.part in ("attention", "layer")]
        try:
            rotating = watched(rotations(attention), lambda _, result: _rotated(recorder, wanted, result))
            with rotating, _functions(torch, recorder, wanted):
                yield recorder
            if wanted is not None:
                recorder.gradients = _some(wanted.collected())
        finally:
            for hook in hooks:
                hook.remove()


def _part(name: str, module: Any) -> Part:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    kind = type(module).__name__.lower()
    if weight is None or weight.ndim not in (1, 2):
        # Quantised layers keep their weights under other names, norms without weights none.
        norm = "norm" in kind
        linear = "linear" in kind
        return Part(name, "norm" if norm else "linear" if linear else "other")
    if weight.ndim == 1:
        return Part(name, "norm", tuple(weight.shape))
    return Part(name, "embedding" if "embedding" in kind else "linear", tuple(weight.shape))


def _some(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not gradients:
        raise RefusedError(
            "no gradient was captured",
            code="nothing-captured",
            hint="Call loss.backward() inside the context, and not under torch.no_grad() or inference_mode().",
        )
    return gradients


def _rotated(recorder: Recorder, wanted: Gradients | None, result: Any) -> None:
    if wanted is None or wanted.watching:
        recorder.rotated(_arrays(result))
    if wanted is not None:
        wanted.rotated(_tensors(result))


def _hooks(module: Any, role: Role, recorder: Recorder, wanted: Gradients | None) -> Iterator[Any]:
    taken: list[list[np.ndarray]] = []

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        if wanted is not None and not wanted.watching:
            return
        if role.part == "layer":
            recorder.enter(role.layer)
            if recorder.call.positions is None:
                # Where the caller gave none, the model makes them: HuggingFace's counts padding too.
                recorder.call.positions = _first(_named(_module, args, kwargs), _POSITIONS)
        else:
            taken.append(_copies((args, kwargs)) if role.part in _LOOKED_AT else [])

    def after(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if wanted is not None:
            if not wanted.watching:
                return
            wanted.observe(role, _tensors((args, kwargs)), _tensors(output))
        if role.part == "layer":
            recorder.leave(_arrays(output))
        else:
            recorder.observe(role, taken.pop() if taken else [], _arrays(output))

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, with_kwargs=True)


_LOOKED_AT = (
    "embedding",
    "attn_norm",
    "q",
    "k",
    "v",
    "qkv",
    "o",
    "ffn_norm",
    "gate",
    "up",
    "gate_up",
    "act",
    "down",
    "final_norm",
)


def _root_hooks(model: Any, recorder: Recorder, wanted: Gradients | None) -> Iterator[Any]:
    def before(_module: Any, args: Any, kwargs: Any) -> None:
        if wanted is not None:
            wanted.watching = True
        given = _named(model, args, kwargs)
        mask, positions = (_first(given, names) for names in (_MASKS, _POSITIONS))
        recorder.begin(mask if mask is not None and mask.ndim == 2 else None, positions)
        labels = _first(given, ("labels",))
        recorder.labels = labels if labels is not None and labels.ndim == 2 else recorder.labels

    def after(_module: Any, _args: Any, output: Any) -> None:
        if wanted is not None:
            # What is called from here on recomputes layers for the backward pass.
            wanted.watching = False
        logits = getattr(output, "logits", output)
        if recorder.calls and recorder.call.ids is not None and hasattr(logits, "detach"):
            recorder.returned(as_numpy(logits))

    yield model.register_forward_pre_hook(before, with_kwargs=True)
    yield model.register_forward_hook(after)


def _named(model: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
    except (TypeError, ValueError):
        return dict(kwargs)


def _first(given: Mapping[str, Any], names: tuple[str, ...]) -> np.ndarray | None:
    return next((as_numpy(given[name]) for name in names if hasattr(given.get(name), "detach")), None)


def _arrays(value: Any) -> list[np.ndarray]:
    """All tensors of a value, in order, as arrays; an object such as a cache holds none."""
    if hasattr(value, "detach"):
        return [as_numpy(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [array for each in value for array in _arrays(each)] if isinstance(value, tuple | list) else []


def _tensors(value: Any) -> list[Any]:
    """All tensors of a value, in order."""
    if hasattr(value, "detach"):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, tuple | list) else []


def _copies(value: Any) -> list[np.ndarray]:
    """The same, kept as they are now: kernels add in place."""
    return [np.array(array) for array in _arrays(value)]


@contextlib.contextmanager
def _functions(torch: Any, recorder: Recorder, wanted: Gradients | None) -> Iterator[None]:
    """Sees softmax and activations that are called as functions, under whatever name they were imported."""
    functional = torch.nn.functional
    softmaxes = {functional.softmax, torch.softmax, torch.Tensor.softmax}
    activations = {functional.silu}

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            result = function(*args, **(kwargs or {}))
            if wanted is not None and not wanted.watching:
                return result
            if function in softmaxes and recorder.calls and recorder.call.standing is not None:
                recorder.softmax(as_numpy(args[0]), as_numpy(result))
                if wanted is not None:
                    wanted.softmax(result)
            elif function in activations and recorder.calls and recorder.call.standing is not None:
                recorder.activated(as_numpy(args[0]), as_numpy(result))
            return result

    with Watching():
        yield
