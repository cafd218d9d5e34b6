"""What each mistake of the fault table does to the errors of the stages, as pictures for docs/faults.md.

    python tests/battery/fault_pictures.py [DIR]

Each mistake is planted in the batteries' NumPy engines, in all layers where it can be, and the dump is compared twice:
with the dump of the right engine, and stage by stage with what the right formulas make of its own inputs. One SVG for
each family of mistakes, a row for each mistake that a battery plants, a column for each stage.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax.parity.faults.table import FAMILIES, picture
from apr_jax.parity.layouts import undo
from apr_jax.parity.localise import Site, localise
from apr_jax.trace.positions import complete
from apr_jax.trace.stages import GRADIENT
from tests import paths
from tests.battery import backward_battery, parity_battery
from tests.battery.backward_engine import Planted as Backward
from tests.battery.faulty_forward import Planted

LEAST = 1e-6
"""Relative errors from here to 1 have a height."""
LABEL, COLUMN, ROW, BAR, HEAD = 215, 12, 30, 24, 165
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
STYLE = """\
text{font:11px sans-serif;fill:#222}.s{font-size:9px}.t{fill:#b8c4d6}.o{fill:#c2331f}.b{fill:#f2f2f2}.l{stroke:#bbb}
@media(prefers-color-scheme:dark){text{fill:#ddd}.t{fill:#55637a}.o{fill:#ff7a5c}.b{fill:#26292e}.l{stroke:#555}}"""


@dataclasses.dataclass(frozen=True)
class Error:
    """The error of one stage, relative to its right values.

    Attributes:
      total: Beside the right engine's dump; None where the shapes differ.
      own: Beside what the right formula makes of the engine's own inputs, where that is more than rounding.
    """

    total: float | None
    own: float | None


def forward_errors(bench: parity_battery.Bench, planted: Planted) -> dict[str, Error]:
    """Returns key -> error of every stage of a forward pass."""
    right, wrong = bench.dump((), "float64"), bench.dump([planted], "float64")
    # What is stored in another order and computed rightly has no red bar.
    laid, _ = undo(bench.exact, bench.inputs, complete(wrong, bench.inputs))
    sites = {site.key: site for site in localise(bench.exact, bench.same, bench.inputs, laid).sites}
    return {key: Error(_relative(value, wrong.get(key)), _own(sites.get(key))) for key, value in right.items()}


def backward_errors(bench: backward_battery.Bench, planted: Backward) -> dict[str, Error]:
    """Returns key -> error of every gradient of a backward pass."""
    right, wrong = bench.dump((), "float64"), bench.dump([planted], "float64")
    sites = {site.key: site for site in bench.diagnose(wrong).sites}
    gradients = {key: value for key, value in right.items() if key.startswith(GRADIENT)}
    return {key: Error(_relative(value, wrong.get(key)), _own(sites.get(key))) for key, value in gradients.items()}


def _relative(right: np.ndarray, wrong: np.ndarray | None) -> float | None:
    if wrong is None or wrong.size != right.size:
        return None
    with np.errstate(all="ignore"):
        share = float(np.linalg.norm(wrong.reshape(right.shape) - right) / np.linalg.norm(right))
    return share if math.isfinite(share) else 1.0


def _own(site: Site | None) -> float | None:
    return site.error / site.norm if site is not None and site.share > 1 and site.norm else None


def rows() -> Iterator[tuple[str, dict[str, Error]]]:
    """Yields the errors of each mistake that a battery plants, once."""
    names = set()
    for name in parity_battery.CONFIGS:
        bench = parity_battery.Bench.of(name)
        for planted in parity_battery.cases(bench):
            if planted.name not in names:
                names.add(planted.name)
                yield planted.name, forward_errors(bench, planted)
    configured = (
        ("rope-unscaled", parity_battery.YARN),
        ("mask-without-window", WINDOW),
    )
    for name, changes in configured:
        yield name, forward_errors(parity_battery.Bench.configured(name, changes), Planted(name))
    for name in backward_battery.CONFIGS:
        plain = backward_battery.Bench.of(name)
        cases = ((plain, planted) for planted in backward_battery.singles(plain))
        adapted = ((plain.adapted(), planted) for planted in backward_battery.adapter_singles())
        for bench, planted in itertools.chain(cases, adapted):
            if planted.name not in names:
                names.add(planted.name)
                yield planted.name, backward_errors(bench, planted)


def drawn(title: str, errors: Mapping[str, Mapping[str, Error]]) -> str:
    """Returns the SVG of one family."""
    keys = _in_order(errors.values())
    width, height = LABEL + COLUMN * len(keys) + 8, HEAD + ROW * len(errors) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{html.escape(title)}: errors of the stages</title><style>{STYLE}</style>',
        *_columns(keys, height),
        *(part for at, name in enumerate(errors) for part in _row(name, errors[name], keys, HEAD + ROW * (at + 1))),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _in_order(rows: Iterable[Mapping[str, Error]]) -> list[str]:
    """All keys of some rows, in order of execution; the parts of an adapter stand where its weight would."""
    rows = sorted(rows, key=len, reverse=True)
    places = {key: place for place, key in enumerate(rows[0])}
    keys = dict.fromkeys(key for row in rows for key in row)
    return sorted(keys, key=lambda key: places[key.partition(".lora_")[0]])


def _columns(keys: Sequence[str], height: int) -> Iterator[str]:
    """Names of the stages, and a band behind every second layer."""
    at = 0
    for layer, group in itertools.groupby(keys, key=_layer):
        stages, left = list(group), LABEL + COLUMN * at
        if layer is not None and layer % 2 == 0:
            yield f'<path class="b" d="M{left} 0h{COLUMN * len(stages)}v{height}h-{COLUMN * len(stages)}z"/>'
        if layer is not None:
            yield f'<text x="{left + 3}" y="12">layer {layer}</text>'
        for number, key in enumerate(stages):
            x = left + COLUMN * number + 9
            yield f'<text class="s" transform="translate({x} {HEAD - 4})rotate(-90)">{html.escape(_short(key))}</text>'
        at += len(stages)


def _layer(key: str) -> int | None:
    found = re.search(r"\.(\d+)\.", key)
    return int(found[1]) if found else None


def _short(key: str) -> str:
    """A key without what stands above it in the picture: its layer, and that it is a gradient."""
    name = re.sub(r"^(grad\.)?(stage\.|model\.)?(layers\.)?(\d+\.)?(mlp\.|self_attn\.)?", "", key)
    return name.removesuffix(".weight")


def _row(name: str, errors: Mapping[str, Error], keys: Sequence[str], bottom: int) -> Iterator[str]:
    yield f'<text x="2" y="{bottom - 6}">{name}</text><path class="l" d="M{LABEL} {bottom}.5h{COLUMN * len(keys)}"/>'
    for kind, values in (
        ("t", [errors[key].total if key in errors else None for key in keys]),
        ("o", [errors[key].own if key in errors else None for key in keys]),
    ):
        bars = "".join(_bars(values, bottom))
        if bars:
            yield f'<path class="{kind}" d="{bars}"/>'


def _bars(values: Iterable[float | None], bottom: int) -> Iterator[str]:
    for number, value in enumerate(values):
        share = 0 if not value else 1 - math.log(min(max(value, LEAST), 1)) / math.log(LEAST)
        if tall := round(BAR * share):
            yield f"M{LABEL + COLUMN * number + 1} {bottom}v-{tall}h{COLUMN - 2}v{tall}z"


def pictures() -> dict[str, str]:
    """Returns file name -> SVG."""
    errors = dict(rows())
    made = {}
    for title, family in FAMILIES.items():
        known = {fault.name: errors[fault.name] for fault in family.FAULTS if fault.name in errors}
        if known:
            made[picture(family)] = drawn(title, known)
    return made


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else paths.ROOT / "docs"
    for name, svg in pictures().items():
        (folder / name).write_text(svg)


if __name__ == "__main__":
    main()
