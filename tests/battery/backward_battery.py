"""The backward battery: every mistake of the backward part of the table, planted by a NumPy engine, has to be named.

    python tests/battery/backward_battery.py [--groups stages parameters stacked consistent clean] [--only NAME]

Each mistake is made in one layer and in all, in a GQA model with a tied head and in an MHA model without: with the
gradients of stages, then with those of parameters alone. Two or three are stacked. Forward mistakes of an engine whose
backward pass follows from them have to be named once, as forward ones. A case counts if the mistake moves a gradient
that is there by at least 1e-4 of it, in float64; the others are printed, and have to get no wrong name. Then right
programs run, in which nothing may be found. Exits 1 if a counted case is not detected, or fewer are exact than `GROUPS`
says, or a right program or an uncounted case has a finding.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax.converters.checkpoint.adapters import LowRank
from apr_jax.load.load_model import load_model
from apr_jax.model.gradients import gradients
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import nested
from apr_jax.parity.backward.diagnose import BackwardDiagnosis, diagnose_backward
from apr_jax.parity.diagnose import diagnose
from apr_jax.parity.replay import Replay
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.stages import GRADIENT, Key
from tests import faults, oracle, paths
from tests.battery.backward_engine import Planted, backward
from tests.battery.parity_battery import Tally

CONFIGS = ("gqa_tied_bf16", "mha_untied_f32_sharded")
ROWS, LENGTH, PADDED, IGNORED = 4, 48, 9, 15
GROUPS = {"stages": 0.97, "parameters": 0.85, "stacked": 0.90}
"""Kinds of cases, and the share of each that has to be named exactly."""
_OTHERS = ("consistent", "clean")
COUNTS = 1e-4


@dataclasses.dataclass(frozen=True)
class Bench:
    """A checkpoint, a batch, and whether gradients of stages are dumped."""

    name: str
    weights: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    inputs: Inputs
    labels: np.ndarray
    exact: LanguageModel
    rounded: Mapping[str, np.ndarray]
    stages: bool = True
    adapter: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, name: str, stages: bool = True, rows: int = ROWS, length: int = LENGTH) -> Bench:
        folder = paths.checkpoint(name)
        exact = load_model(folder, "float64", "cpu")
        ids = np.array(seeded(exact.config.vocab_size, rows, length).input_ids)
        ids[:, length // 2] = ids[:, length // 2 + 3]  # a token that is there twice
        mask = np.ones((rows, length), np.int32)
        mask[0, :PADDED], ids[0, :PADDED] = 0, 0
        labels = np.where(mask == 1, ids, -100)
        labels[1, :IGNORED] = -100
        inputs = Inputs.of(ids, mask)
        rounded = {} if stages else load_model(folder, "float32", "cpu").trace(inputs)
        return cls(name, *oracle.load(folder), inputs, labels, exact, rounded, stages)

    def dump(
        self, faults: Sequence[Planted], dtype: str = "float32", ids: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        i = self.inputs
        ids = i.input_ids if ids is None else ids
        adapter = {name: (part.a, part.b, part.scale) for name, part in self.adapter.items()}
        dump = backward(self.weights, self.config, ids, i.attention_mask, self.labels, faults, dtype, adapter=adapter)
        if adapter:  # of the weights beside it an engine has no gradient
            dump = {key: value for key, value in dump.items() if ".lora_" in key or not Key(key).of_parameter}
        return {
            key: value
            for key, value in dump.items()
            if self.stages or (key.startswith(GRADIENT) and Key(key).of_parameter)
        }

    def diagnose(self, dump: Mapping[str, np.ndarray]) -> BackwardDiagnosis:
        forward = {key: value for key, value in dump.items() if not key.startswith(GRADIENT)}
        gradients = {key: value for key, value in dump.items() if key.startswith(GRADIENT)}
        replay = Replay(self.exact.config, self.parameters, self.inputs, forward)
        return diagnose_backward(replay, (), gradients, self.labels >= 0, "float32", self.rounded, self.adapter)

    @property
    def parameters(self) -> Any:
        """The model's parameters, with the adapter in them."""
        if not self.adapter:
            return self.exact.parameters
        merged = {name: self.weights[name] + p.scale * (p.b.astype(float) @ p.a) for name, p in self.adapter.items()}
        return nested({**self.weights, **merged})

    def adapted(self) -> Bench:
        """The same with a low-rank adapter, of whose matrices alone gradients of parameters are dumped."""
        generator = np.random.default_rng(3)
        parts = {}
        for name in sorted(self.weights):
            if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
                rows, columns = self.weights[name].shape
                a, b = (
                    generator.normal(0, columns**-0.5, size).astype(np.float32) for size in ((4, columns), (rows, 4))
                )
                parts[name] = LowRank(a, b, 2.0)
        return dataclasses.replace(self, name=f"lora {self.name}", adapter=parts)


def singles(bench: Bench) -> Iterator[Planted]:
    """Every mistake, in all layers and, where that makes sense, in one."""
    token = int(bench.inputs.input_ids[2, 5])
    outside: list[tuple[str, dict[str, Any]]] = [
        ("loss-sum", {}),
        ("loss-count", {"count": ROWS * LENGTH}),
        ("loss-count", {"count": ROWS * LENGTH - PADDED}),
        ("loss-count", {"count": 77}),
        ("labels-not-shifted", {}),
        ("labels-shifted-twice", {}),
        ("padding-in-loss", {"what": "all"}),
        ("padding-in-loss", {"what": "ignored"}),
        ("accumulation-averaged", {"rows": 1}),
        ("accumulation-averaged", {"rows": 2}),
        ("gradient-scaled", {"factor": 1024.0}),
        ("gradient-scaled", {"factor": 65536.0}),
        ("gradient-scaled", {"factor": 0.3}),
        ("gradient-scaled", {"factor": 2048.0, "where": "parameters"}),
        ("gradient-scaled", {"factor": 0.25, "where": "parameters"}),
        ("gradient-clipped", {"norm": 1.0}),
        ("gradient-clipped", {"norm": 0.05}),
        ("embedding-gradient-overwritten", {"kept": "last"}),
        ("embedding-gradient-overwritten", {"kept": "first"}),
        ("embedding-gradient-padding", {}),
        ("embedding-row-frozen", {"token": token}),
        ("tied-gradient-head-missing", {}),
        ("tied-gradient-embedding-missing", {}),
        ("tied-gradient-doubled", {}),
        ("gradient-of-another-step", {}),
    ]
    for name, parameters in outside:
        if bench.config.get("tie_word_embeddings") or not name.startswith("tied"):
            yield Planted(name, None, parameters)
    inside: list[tuple[str, dict[str, Any]]] = [
        ("backward-rope-missing", {}),
        ("backward-rope-missing", {"of": "q"}),
        ("backward-rope-missing", {"of": "k"}),
        ("backward-rope-direction", {}),
        ("backward-rope-direction", {"of": "k"}),
        ("backward-rope-pairs", {}),
        ("backward-rope-pairs", {"of": "q"}),
        ("backward-softmax-sum-missing", {}),
        ("backward-scale-missing", {}),
        ("backward-scale-missing", {"how": "twice"}),
        ("backward-scale-missing", {"of": "k"}),
        ("backward-mask-ignored", {}),
        ("backward-mask-ignored", {"of": ("scores",)}),
        ("backward-mask-ignored", {"of": ("v",)}),
        ("kv-gradient-first-head", {}),
        ("kv-gradient-last-head", {}),
        ("kv-gradient-averaged", {}),
        ("kv-gradient-first-head", {"of": "v"}),
        ("kv-gradient-averaged", {"of": "k"}),
        ("backward-norm-projection-missing", {}),
        ("backward-norm-projection-missing", {"norms": ("ffn_norm",)}),
        ("backward-norm-weight-missing", {}),
        ("backward-norm-eps", {"eps": 1e-5}),
        ("backward-norm-eps", {"eps": 1e-3}),
        ("backward-attention-residual-missing", {}),
        ("backward-mlp-residual-missing", {}),
        ("backward-attention-branch-missing", {}),
        ("backward-mlp-branch-missing", {}),
        ("backward-silu-sigmoid-only", {}),
        ("backward-activation-gelu", {}),
        ("backward-activation-gelu", {"form": "tanh"}),
        ("backward-activation-gelu", {"form": "relu"}),
        ("backward-gate-up-swapped", {}),
        ("backward-gate-up-swapped", {"what": "results"}),
        ("backward-projection-missing", {}),
        ("backward-projection-missing", {"without": "mlp.up_proj"}),
        ("backward-weight-transposed", {}),
        ("backward-weight-transposed", {"tensor": "mlp.down_proj"}),
        ("layer-detached", {}),
        ("stage-detached", {}),
        ("stage-detached", {"of": "ffn_up"}),
        ("checkpoint-recompute", {}),
        ("checkpoint-recompute", {"inputs": "row"}),
        ("checkpoint-recompute", {"inputs": "before"}),
        ("weight-gradient-transposed", {}),
        ("weight-gradient-transposed", {"tensor": "self_attn.q_proj.weight"}),
        ("weight-gradient-missing", {}),
        ("weight-gradient-missing", {"tensor": "input_layernorm.weight"}),
        ("bias-gradient-missing", {}),
        ("bias-gradient-missing", {"tensor": "self_attn.v_proj.bias"}),
        ("weight-gradient-averaged", {}),
        ("weight-gradient-averaged", {"tensor": "all"}),
        ("bias-gradient-averaged", {}),
        ("weight-gradient-first-row", {}),
        ("bias-gradient-first-row", {}),
        ("bias-gradient-first-row", {"tensor": "self_attn.v_proj.bias", "kept": "position"}),
        ("norm-weight-gradient-unnormalised", {}),
        ("bf16-gradient-accumulation", {"rows": 1}),
        ("bf16-gradient-accumulation", {"rows": 2}),
        ("gradient-rounded", {}),
        ("gradient-rounded", {"dtype": "float16"}),
        ("gradient-truncated", {}),
        ("stochastic-rounding", {}),
    ]  # fmt: skip
    for name, parameters in inside:
        grouped = bench.config["num_attention_heads"] > bench.config["num_key_value_heads"]
        if not grouped and name.startswith("kv-"):
            continue
        before = parameters.get("inputs") == "before"
        everywhere = None if not before else (1,)
        for layers in dict.fromkeys((everywhere, (1,), *(((0,),) if not before else ()))):
            yield Planted(name, layers, parameters)


def adapter_singles() -> Iterator[Planted]:
    """What can be wrong with a low-rank adapter's gradients."""
    for layers in (None, (1,)):
        yield from (Planted("lora-gradient-missing", layers, {"matrix": matrix}) for matrix in "AB")
        yield from (Planted(name, layers) for name in ("lora-scale-missing", "lora-merged-twice"))
        yield from (Planted(name, layers) for name in ("backward-rope-missing", "backward-silu-sigmoid-only"))


STACKABLE = (
    (("loss-sum", {}), ("labels-not-shifted", {}), ("accumulation-averaged", {"rows": 1})),
    (("backward-rope-missing", {}), ("backward-rope-direction", {}), ("backward-rope-pairs", {})),
    (("backward-softmax-sum-missing", {}), ("backward-mask-ignored", {})),
    (("backward-scale-missing", {}),),
    (("backward-norm-projection-missing", {}), ("backward-norm-eps", {"eps": 1e-3})),
    (("backward-norm-weight-missing", {}),),
    (("backward-attention-residual-missing", {}), ("backward-mlp-residual-missing", {})),
    (("backward-silu-sigmoid-only", {}), ("backward-activation-gelu", {}), ("backward-gate-up-swapped", {})),
    (("weight-gradient-transposed", {}), ("weight-gradient-averaged", {}), ("weight-gradient-missing", {})),
    (("bias-gradient-missing", {}), ("bias-gradient-first-row", {})),
    (("norm-weight-gradient-unnormalised", {}),),
    (("embedding-gradient-overwritten", {}), ("tied-gradient-doubled", {}), ("embedding-row-frozen", {})),
    (("gradient-scaled", {"factor": 4096.0, "where": "parameters"}), ("gradient-clipped", {"norm": 0.5})),
    (("kv-gradient-first-head", {}), ("kv-gradient-averaged", {})),
)  # fmt: skip


def stacks(count: int, seed: int) -> Iterator[tuple[Planted, ...]]:
    """Random combinations of two or three mistakes of different kinds, in one layer or all."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        families = generator.choice(len(STACKABLE), int(generator.integers(2, 4)), replace=False)
        chosen = []
        for family in sorted(families):
            name, parameters = STACKABLE[family][generator.integers(len(STACKABLE[family]))]
            layers = (1,) if family in range(1, 11) and generator.integers(2) else None
            chosen.append(Planted(name, layers, parameters))
        yield tuple(chosen)


OUTSIDE = (
    "loss",
    "labels",
    "padding",
    "accumulation",
    "embedding",
    "tied",
    "gradient-of",
    "gradient-scaled",
    "gradient-clipped",
)
_KEPT = {"row": "the first row", "position": "the first position", "last": "last", "first": "first"}
_INPUTS = {"output": "its own output", "row": "another row's input", "before": "the input of the layer before"}


def matches(bench: Bench, planted: Planted, finding: Any) -> bool:
    """Whether a finding is this mistake, or says that it cannot be told from it; in its layers, with its numbers."""
    if planted.name != finding.fault:
        return not bench.stages and planted.name in finding.alternatives
    values, given = planted.values, finding.parameters
    for name in ("eps", "norm", "factor"):
        if (
            name in values
            and isinstance(values[name], float)
            and not math.isclose(given[name], values[name], rel_tol=0.01)
        ):
            return False
    if planted.name == "loss-count" and given["count"] != values["count"]:
        return False
    for name in ("rows", "token", "how", "without"):
        if (
            values.get(name) is not None
            and name in given
            and given[name] != {"twice": "there twice"}.get(values[name], values[name])
        ):
            return False
    if "kept" in values and "kept" in given and given["kept"] != _KEPT[values["kept"]]:
        return False
    if "inputs" in values and given["inputs"] != _INPUTS[values["inputs"]]:
        return False
    tensor = given.get("tensor")
    named = [tensor] if isinstance(tensor, str) else list(tensor or ())
    if values.get("tensor") not in (None, "all") and named and not any(n.startswith(values["tensor"]) for n in named):
        return False
    return _in_layers(bench, planted, finding)


def _in_layers(bench: Bench, planted: Planted, finding: Any) -> bool:
    if planted.name.startswith(OUTSIDE):
        return True
    layers: Any = planted.layers if planted.layers is not None else "all"
    if planted.name == "layer-detached" and layers == "all":
        layers = (bench.exact.config.num_layers - 1,)  # below it there is no gradient to detach
    return bool(finding.layers == layers)


def effect(bench: Bench, faults: Sequence[Planted]) -> float:
    """The largest change of a gradient that is there, relative to it, in float64."""
    right, wrong = (bench.dump(each, "float64") for each in ((), faults))
    largest = 0.0
    for key in right:
        if key.startswith(GRADIENT):
            norm = float(np.linalg.norm(right[key]))
            largest = max(largest, float(np.linalg.norm(wrong[key] - right[key])) / norm if norm else 0.0)
    return largest


def run_case(bench: Bench, faults: Sequence[Planted], tally: Tally) -> None:
    size = effect(bench, faults)
    started = time.perf_counter()
    findings = bench.diagnose(bench.dump(faults)).findings
    seconds = time.perf_counter() - started
    label = " + ".join(f"{f.name} {dict(f.parameters) or ''} {f.layers or ''}" for f in faults)
    found = [any(matches(bench, fault, finding) for finding in findings) for fault in faults]
    extra = [f for f in findings if not any(matches(bench, fault, f) for fault in faults)]
    if size < COUNTS:
        tally.uncounted += 1
        tally.wrong_names += len(extra)
        verdict = f"not counted: moves {size:.1e}" + (f"; WRONG NAME {extra[0].sentence}" if extra else "")
    else:
        tally.counted += 1
        tally.detected += bool(findings)
        exact = all(found) and not extra
        tally.exact += exact
        verdict = (
            "exact" if exact else "NOT EXACT: " + "; ".join(f.sentence + f" {f.alternatives}" for f in findings)[:600]
        )
    print(
        f"{bench.name[:4]} {'stages' if bench.stages else 'params'} {label:64} {seconds:5.1f} s  {verdict}", flush=True
    )


def cases(group: str, stacked: int, seed: int) -> Iterator[tuple[Bench, tuple[Planted, ...]]]:
    if group == "stacked":
        benches = [Bench.of(name) for name in CONFIGS]
        for faults, bench in zip(stacks(stacked, seed), itertools.cycle(benches), strict=False):
            frozen = {"token": int(bench.inputs.input_ids[2, 5])}
            faults = tuple(
                dataclasses.replace(each, parameters=frozen) if each.name == "embedding-row-frozen" else each
                for each in faults
            )
            tied = any(fault.name.startswith(("tied", "kv-")) for fault in faults)
            yield (benches[0] if tied else bench), faults
        return
    for name in CONFIGS:
        bench = Bench.of(name, group == "stages")
        yield from ((bench, (planted,)) for planted in singles(bench))
        if bench.stages:
            adapted = bench.adapted()
            yield from ((adapted, (planted,)) for planted in adapter_singles())


def consistent_cases(name: str, only: str) -> Iterator[tuple[str, Any, Any, list[str], list[str]]]:
    """Forward mistakes in an engine whose backward pass is theirs: this model with wrong operations, differentiated.

    Yields the mistake's name, and what was found in the forward pass and in the backward pass.
    """
    folder = paths.checkpoint(name)
    exact, same = load_model(folder, "float64", "cpu"), load_model(folder, "float32", "cpu")
    inputs = Inputs.of(seeded(exact.config.vocab_size, 2, 64).input_ids)
    for fault in faults.FAULTS:
        if fault.visible(exact.config) and only in fault.name:
            wrong = fault.plant(same)
            values = {key: np.asarray(value, np.float32) for key, value in wrong.trace(inputs).items()}
            if fault.name == "mask-not-causal":
                # A trace shows no scores of keys that the right mask hides, whatever the softmax sees.
                values = {key: value for key, value in values.items() if not key.endswith("attn_scores")}
            found = {key: np.asarray(value) for key, value in gradients(wrong, inputs, None, True)[1].items()}
            before = diagnose(exact, same, inputs, values)
            back = diagnose_backward(before.replay, before.explained, found, None, "float32")
            yield fault.name, before, back, [f.sentence for f in before.findings], [f.sentence for f in back.findings]


def consistent(only: str) -> bool:
    """Whether forward mistakes are named as such and not again as backward ones; prints a line for each."""
    count = right = 0
    for name in CONFIGS:
        for fault, before, back, forward, again in consistent_cases(name, only):
            good = {f.fault for f in before.findings} == {fault} and not again and len(back.sites) >= 40
            count, right = count + 1, right + good
            left = f", {len(back.unexamined)} not examined" if back.unexamined else ""
            said = "named once" if good else f"NOT SO: {forward} {again}"
            print(f"{name[:4]} consistent {fault:30} {said[:600]} ({len(back.sites)} gradients{left})", flush=True)
    print(f"consistent: {count} forward mistakes with a backward pass of their own, {right} named once")
    return count > 0 and right == count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=(*GROUPS, *_OTHERS), default=[*GROUPS, *_OTHERS])
    parser.add_argument("--only", default="", help="single cases whose name holds this")
    parser.add_argument("--stacked", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tallies = {group: Tally() for group in args.groups if group in GROUPS}
    for group, tally in tallies.items():
        for bench, planted in cases(group, args.stacked, args.seed):
            if args.only in planted[0].name:
                run_case(bench, planted, tally)
    good = True
    for group, tally in tallies.items():
        share = tally.exact / max(1, tally.counted)
        print(
            f"{group}: {tally.counted} counted, {tally.detected} detected, {tally.exact} named exactly ({share:.1%}, at"
            f" least {GROUPS[group]:.0%} needed); {tally.uncounted} not counted, {tally.wrong_names} wrong names there"
        )
        good &= (
            tally.counted > 0 and tally.detected == tally.counted and share >= GROUPS[group] and not tally.wrong_names
        )
    if "consistent" in args.groups:
        good &= consistent(args.only)
    if "clean" in args.groups:
        from tests.battery import backward_clean_runs

        good &= backward_clean_runs.run()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
