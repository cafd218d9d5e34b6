"""Flax NNX models watched by wrapping the `__call__` of their modules' classes, eagerly: NNX has no hooks.

Inside the context `jax.jit` is off, so that every value is an array and none a tracer. Modules that are read and never
called show nothing: the token ids are then those that the model was given, and a layer that takes a `tap`, as ours do,
tells its stages itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from apr_jax.converters.errors import UsageError
from apr_jax.engines.functions import rotations, watched
from apr_jax.engines.recorder import Recorder, recording
from apr_jax.engines.roles import Part, Role, assign


@contextlib.contextmanager
def watch(
    model: Any,
    folder: str | os.PathLike[str],
    names: Mapping[str, str] | None,
    input_ids: Any,
    force: bool,
) -> Iterator[Recorder]:
    """See `apr_jax.capture.flax`."""
    import jax
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise UsageError(
            "not a flax.nnx.Module",
            code="capture-model",
            found=type(model).__name__,
            hint="Give the nnx.Module itself; capture.torch watches torch's modules, capture.arrays takes arrays",
        )
    modules = dict(_modules(model, nnx))
    parts = [_part(name, module, nnx) for name, module in modules.items() if name]
    roles = assign(parts, names)
    known = _Known(model, roles, nnx)
    attention = [modules[name] for name, role in roles.items() if role.part in ("attention", "layer")]
    with recording(folder, input_ids, force) as recorder, contextlib.ExitStack() as stack:
        recorder.expect(parts, roles)
        stack.enter_context(jax.disable_jit())
        stack.enter_context(watched(rotations(attention), lambda _, result: recorder.rotated(_arrays(result))))
        stack.enter_context(_functions(jax, nnx, recorder))
        for kind in filter(_is_called, {type(modules[name]) for name in roles} | {type(model)}):
            wrapped = _wrapped(kind.__call__, known, recorder)
            stack.enter_context(mock.patch.object(kind, "__call__", wrapped))
        yield recorder


class _Known:
    """What each module object is. `nnx.jit` computes with copies of a model, looked up when one is called."""

    def __init__(self, model: Any, roles: Mapping[str, Role], nnx: Any):
        self._kind, self._by_path, self._nnx = type(model), roles, nnx
        self._roles: dict[int, tuple[Any, Role | None]] = {}  # with it, so that its id stays
        self._add(model)

    def _add(self, model: Any) -> None:
        for path, module in _modules(model, self._nnx):
            if path in self._by_path or not path:
                self._roles[id(module)] = (module, self._by_path.get(path))

    def role(self, module: Any) -> tuple[bool, Role | None]:
        """Returns whether a module is watched, and as what: None is the model itself."""
        if id(module) not in self._roles and type(module) is self._kind:
            self._add(module)
        found = self._roles.get(id(module))
        return (False, None) if found is None else (True, found[1])


def _modules(model: Any, nnx: Any) -> Iterator[tuple[str, Any]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield ".".join(map(str, path)), node


def _part(name: str, module: Any, nnx: Any) -> Part:
    kind = type(module).__name__.lower()
    found = {key: value.shape for key, value in vars(module).items() if isinstance(value, nnx.Param)}
    # NNX has kernels [in, out]; weights, where somebody writes them as HuggingFace does, are [out, in].
    if len(shape := found.get("kernel", ())) == 2:
        return Part(name, "linear", (shape[1], shape[0]))
    if len(shape := found.get("embedding", ())) == 2:
        return Part(name, "embedding", tuple(shape))
    shape = found.get("weight", found.get("scale", ()))
    if len(shape) == 1:
        return Part(name, "norm", tuple(shape))
    if len(shape) == 2:
        return Part(name, "embedding" if "embed" in kind else "linear", tuple(shape))
    # nnx.LinearGeneral and Einsum have kernels of more axes: [in, heads, width] or [heads, width, out].
    return Part(name, "linear" if "linear" in kind or "einsum" in kind else "norm" if "norm" in kind else "other")


def _is_called(kind: type) -> bool:
    """Whether a class has a `__call__` for its objects; `kind.__call__` finds the one that makes them, too."""
    return any("__call__" in vars(base) for base in kind.__mro__)


def _wrapped(call: Callable[..., Any], known: _Known, recorder: Recorder) -> Callable[..., Any]:
    @functools.wraps(call)
    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        watched_for, role = known.role(self)
        if not watched_for:
            return call(self, *args, **kwargs)
        if role is None:
            given = _named(call, self, args, kwargs)
            mask, positions = given.pop("attention_mask", None), given.pop("positions", given.pop("position_ids", None))
            ids = next(filter(_are_ids, given.values()), None)
            recorder.begin(*(None if each is None else np.asarray(each) for each in (mask, positions, ids)))
            output = call(self, *args, **kwargs)
            if recorder.call.ids is not None and (shown := _arrays(getattr(output, "logits", output))):
                recorder.returned(shown[0])
        elif role.part == "layer":
            recorder.enter(role.layer, _arrays((args, kwargs)))
            if "tap" in inspect.signature(call).parameters:
                kwargs = {"tap": recorder.told, **kwargs}
            output = call(self, *args, **kwargs)
            recorder.leave(_arrays(output))
        else:
            output = call(self, *args, **kwargs)
            recorder.observe(role, _arrays((args, kwargs)), _arrays(output))
        return output

    return watching


def _named(call: Callable[..., Any], self: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        return dict(inspect.signature(call).bind_partial(self, *args, **kwargs).arguments)
    except (TypeError, ValueError):
        return dict(kwargs)


def _are_ids(value: Any) -> bool:
    """Whether an argument of a model is token ids [B, T]."""
    array = np.asarray(value) if isinstance(value, list) or hasattr(value, "dtype") else np.zeros(0)
    return array.ndim == 2 and np.issubdtype(array.dtype, np.integer)


def _arrays(value: Any) -> list[np.ndarray]:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return [np.asarray(value)] if value.ndim else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [array for each in value for array in _arrays(each)] if isinstance(value, tuple | list) else []


@contextlib.contextmanager
def _functions(jax: Any, nnx: Any, recorder: Recorder) -> Iterator[None]:
    """Sees softmax and activations that are looked up in jax.nn or flax.nnx when they are called."""

    def softmax(args: tuple[Any, ...], result: Any) -> None:
        if recorder.calls and recorder.call.standing is not None:
            recorder.softmax(np.asarray(args[0]), np.asarray(result))

    def activated(args: tuple[Any, ...], result: Any) -> None:
        if recorder.calls and recorder.call.standing is not None:
            recorder.activated(np.asarray(args[0]), np.asarray(result))

    with (
        watched([(jax.nn, "softmax"), (nnx, "softmax")], softmax),
        watched([(jax.nn, "silu"), (nnx, "silu"), (jax.nn, "swish"), (nnx, "swish")], activated),
    ):
        yield
