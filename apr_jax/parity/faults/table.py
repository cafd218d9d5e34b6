"""The table of faults, by name, and as a page of the docs: `python -m apr_jax.parity.faults.table`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from apr_jax.parity.faults import (
    attention,
    gradients,
    losses,
    mlp,
    norms,
    outside,
    parameter_gradients,
    parts,
    products,
    rope,
    seen,
    sums,
    weights,
)
from apr_jax.parity.faults.record import Fault

_BACKWARD = {
    "Backward: the loss": losses,
    "Backward: gradients of stages": gradients,
    "Backward: gradients of parameters": parameter_gradients,
}
_FAMILIES = {
    "Rotary positions": rope,
    "Norms": norms,
    "Weights and biases": weights,
    "Attention": attention,
    "MLP and residuals": mlp,
    "Embedding, logits, layers, layout": outside,
    "Precision of products": products,
    "Terms of products": sums,
    "Parts of a stage": parts,
    "What is only seen": seen,
    **_BACKWARD,
}

_HEAD = """\
Made by `make fault-list` from the table that `tools/parity.py` works from. What stands in braces is found, not given.
A mistake is named at the stage that makes it or, where that was not dumped, at the first dumped stage behind it. Those
of a backward pass are named with `--backward`, from gradients: "grad." and a stage, "grad.input" for a layer's input,
"grad.output" for the last layer's output, and those of parameters by kind.\
"""

FAULTS: Mapping[str, Fault] = {fault.name: fault for family in _FAMILIES.values() for fault in family.FAULTS}
BACKWARD: Mapping[str, Fault] = {fault.name: fault for family in _BACKWARD.values() for fault in family.FAULTS}
"""Those of a backward pass alone."""


def listing() -> str:
    """Returns the table in Markdown: what `parity` names, at which stages, and in which words."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "# The mistakes that parity names\n"
    yield _HEAD
    for title, family in _FAMILIES.items():
        yield f"\n## {title}\n"
        yield "| name | stages | what is said |\n|---|---|---|"
        for fault in family.FAULTS:
            where = "those of the tensor" if callable(fault.stages) else ", ".join(fault.stages)
            where = "every product" if fault.multiplies else where
            yield f"| `{fault.name}` | {where} | {'; or: '.join(fault.wordings)} |"


if __name__ == "__main__":
    print(listing())
