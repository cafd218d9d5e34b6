"""The table of faults, by name, and as a page of the docs: `python -m apr_jax.parity.faults.table`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType

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
FAMILIES: Mapping[str, ModuleType] = {
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
`apr-jax parity` works from this table; `make fault-list` turns it into this page. What stands in braces is found, not
given. A mistake is named at the stage that makes it or, where that was not dumped, at the first dumped stage behind it.
Those of a backward pass are named with `--backward`, from gradients: "grad." and a stage, "grad.input" for a layer's
input, "grad.output" for the last layer's output, and those of parameters by kind.

The pictures show what each mistake does to the errors of the stages, in a model of two layers. Pale bars compare the
engine's values with those of a right engine: everything behind a mistake is off. Red bars compare each stage with what
the right formula makes of the engine's own inputs, and stand only where that is more than rounding: at the mistake. The
height is the relative error on a logarithmic scale, from 1e-6 to 1.\
"""

FAULTS: Mapping[str, Fault] = {fault.name: fault for family in FAMILIES.values() for fault in family.FAULTS}
BACKWARD: Mapping[str, Fault] = {fault.name: fault for family in _BACKWARD.values() for fault in family.FAULTS}
"""Those of a backward pass alone."""


def listing() -> str:
    """Returns the table in Markdown: what `parity` names, at which stages, and in which words."""
    return "\n".join(_lines())


def picture(family: ModuleType) -> str:
    """Returns the file in docs/ that shows what a family's mistakes do; tests/battery/fault_pictures.py draws it."""
    return f"faults-{family.__name__.rpartition('.')[2].replace('_', '-')}.svg"


def _lines() -> Iterator[str]:
    yield "# The mistakes that parity names\n"
    yield _HEAD
    for title, family in FAMILIES.items():
        yield f"\n## {title}\n"
        yield "| name | stages | what is said |\n|---|---|---|"
        for fault in family.FAULTS:
            where = "those of the tensor" if callable(fault.stages) else ", ".join(fault.stages)
            where = "every product" if fault.multiplies else where
            yield f"| `{fault.name}` | {where} | {'; or: '.join(fault.wordings)} |"
        if family is not seen:
            yield f"\n![errors of the stages with each of these mistakes]({picture(family)})"


if __name__ == "__main__":
    print(listing())
