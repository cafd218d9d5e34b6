"""ONNX models run by ONNX Runtime, every node's output shown: which module made it is told by what the exporter noted.

PyTorch's exporter writes the path of the module that a node comes from beside it (`pkg.torch.onnx.name_scopes`,
["", "model", "model.layers.0", "model.layers.0.mlp.down_proj", "linear_6"]); the older one and those that follow it put
it into the node's name, "/model/layers.0/mlp/down_proj/MatMul". The last node of a module makes its output.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax.converters.errors import UsageError
from apr_jax.engines.mapping import renamed
from apr_jax.engines.recorder import Recorder, recording
from apr_jax.engines.roles import Role, assign, named
from apr_jax.trace import stages

_SCOPES = "pkg.torch.onnx.name_scopes"
_MOST_TEXT = 1 << 16


def run(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    inputs: Mapping[str, Any],
    names: Mapping[str, str] | None,
    force: bool,
) -> None:
    """See `apr_jax.capture.onnx`."""
    given = {name: np.asarray(value) for name, value in inputs.items()}
    with recording(folder, None, force) as recorder:
        nodes, outputs, values = _run(model, given)
        recorder.begin(given.get("attention_mask"), given.get("position_ids"))
        recorder.call.ids = given.get("input_ids")
        _replay(recorder, nodes, {**given, **values})
        for key, value in renamed(values, names or {}).items():
            recorder(key, value)
        logits = values[outputs[0]]
        if stages.LOGITS not in recorder.call.values and logits.ndim == 3:
            recorder(stages.LOGITS, logits)


def _run(
    path: str | os.PathLike[str], given: Mapping[str, np.ndarray]
) -> tuple[list[Any], list[str], dict[str, np.ndarray]]:
    """Runs a model; returns its nodes, the names of its outputs, and what each node made, by name."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed", code="onnx", hint="pip install onnx onnxruntime") from None
    model = onnx.load(os.fspath(path))
    outputs = [output.name for output in model.graph.output]
    made = [name for node in model.graph.node for name in node.output if name and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    options = onnxruntime.SessionOptions()
    # Fused nodes have other outputs, and folded ones none.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [*outputs, *made]
    values = dict(zip(wanted, session.run(wanted, dict(given)), strict=True))
    return list(model.graph.node), outputs, {name: value for name, value in values.items() if hasattr(value, "dtype")}


def _replay(recorder: Recorder, nodes: Sequence[Any], values: Mapping[str, np.ndarray]) -> None:
    """Tells a recorder of the modules as they end, and of rotations and softmax between."""
    last: dict[str, int] = {}
    entering: dict[str, list[str]] = {}
    makers = {name: node for node in nodes for name in node.output}
    for index, node in enumerate(nodes):
        for path in _paths(node):
            inside = entering.setdefault(path, [])
            inside += [n for n in node.input if n in values and path not in _paths(makers.get(n)) and n not in inside]
            if _is_value(values, node):
                last[path] = index
    roles = assign([named(path) for path in last])
    for index, node in enumerate(nodes):
        if not _is_value(values, node):
            continue
        made = values[node.output[0]]
        if node.op_type == "Softmax":
            recorder.softmax(values[node.input[0]], made)
        elif node.op_type == "Add" and made.ndim == 4 and _turns(node, makers):
            recorder.rotated([made])
        # From the innermost module outwards: a layer ends last.
        for path in reversed(_paths(node)):
            if last[path] == index and path in roles:
                taken = [values[name] for name in entering[path]]
                _observe(recorder, roles[path], taken, made)


def _observe(recorder: Recorder, role: Role, taken: Sequence[np.ndarray], made: np.ndarray) -> None:
    if role.part == "layer":
        recorder.leave([made], layer=role.layer)
    else:
        wanted = [each for each in taken if role.part == "embedding" or each.dtype.kind == "f"]
        recorder.observe(role, wanted, [made])


def _is_value(values: Mapping[str, np.ndarray], node: Any) -> bool:
    made = values.get(node.output[0]) if node.output else None
    return made is not None and made.dtype.kind == "f" and made.ndim > 1


def _turns(node: Any, makers: Mapping[str, Any]) -> bool:
    """Whether a sum is x cos + y sin."""
    return all(getattr(makers.get(name), "op_type", "") == "Mul" for name in node.input)


def _paths(node: Any) -> list[str]:
    """The modules that a node is within, from the outermost on."""
    return list(_within(node))


def _within(node: Any) -> Iterator[str]:
    if node is None:
        return
    noted = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    if noted:
        try:
            yield from (name for name in ast.literal_eval(noted[:_MOST_TEXT])[:-1] if isinstance(name, str) and name)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return
    else:
        parts = [part for part in node.name.split("/") if part][:-1]
        yield from (".".join(parts[: count + 1]) for count in range(len(parts)))
