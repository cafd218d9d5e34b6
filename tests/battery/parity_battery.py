"""The parity battery: every mistake of the fault table, planted by a NumPy engine, has to be found and named.

    python tests/battery/parity_battery.py [--stacked N] [--seed N] [--only NAME]
    python tests/battery/parity_battery.py --dump DIR      # only writes the dump of docs/bug-hunt.md

A case counts if its effect in float64 is at least ten times the budget of some stage; the others are printed with
the reason, and have to get no wrong name. The single ones are planted once more in engines that declare bfloat16 and
float16, whose budgets are some ten thousand times as wide: a mistake counts there if it is ten budgets at the stage
that makes it, has to be named in the layers where it is, and a mistake that gives the same values there may be named
with it as the alternative. And once more in two engines with fused kernels, which dump few stages: a mistake has to be
named at the first stage that shows it, itself or as an alternative to one that gives the same values there.
Exits 1 if a counted case is not detected, if fewer than 95 % of single ones or 90 % of the stacked and the fused ones
are named exactly, if one behind fused kernels is taken for another ("unknown" is none), or if a clean run or an
uncounted case has a finding that is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.diagnose import Diagnosis, diagnose
from apr_jax.parity.faults.record import OR
from apr_jax.parity.localise import localise
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import complete
from tests import oracle, paths
from tests.battery.faulty_forward import Planted, forward, write_aprt

CONFIGS = ("gqa_tied_bf16", "mha_untied_f32_sharded")
STACKED_BEHIND_FUSED = 8
ROWS, LENGTH, PADDED = 2, 80, 9
NARROW = ("bfloat16", "float16")
FUSED = {
    "fused attention": frozenset(stages.LAYER_STAGES) - {"qkv_matmul", "attn_scores", "attn_softmax", "ffn_silu"},
    "fused blocks": frozenset(
        ("attn_norm", "attention", "attn_out", "post_attn_residual", "ffn_norm", "ffn_out", "post_ffn_residual")
    ),
}
"""Stages of the layers that engines with fused kernels have at hand."""
COUNTS = 10.0
"""Times a budget that an effect has to be."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A checkpoint, a batch, the models to judge with, and the stages of the layers that are dumped."""

    name: str
    weights: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    inputs: Inputs
    exact: LanguageModel
    same: LanguageModel
    shown: frozenset[str] = frozenset(stages.LAYER_STAGES)

    @classmethod
    def of(cls, name: str, dtype: str = "float32") -> Bench:
        return cls.at(paths.checkpoint(name), name, dtype)

    @classmethod
    def at(cls, folder: pathlib.Path, name: str, dtype: str = "float32", length: int = LENGTH) -> Bench:
        exact, same = load_model(folder, "float64", "cpu"), load_model(folder, dtype, "cpu")
        mask = np.ones((ROWS, length), np.int32)
        mask[0, :PADDED] = 0
        ids = seeded(exact.config.vocab_size, ROWS, length).input_ids
        return cls(name, *oracle.load(folder), Inputs.of(ids, mask), exact, same)

    @classmethod
    def configured(cls, name: str, changes: Mapping[str, Any], dtype: str = "float32", length: int = LENGTH) -> Bench:
        """The first checkpoint under another configuration."""
        source = paths.checkpoint(CONFIGS[0])
        with tempfile.TemporaryDirectory() as folder:
            config = json.loads((source / "config.json").read_text()) | changes
            pathlib.Path(folder, "config.json").write_text(json.dumps(config))
            pathlib.Path(folder, "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
            return cls.at(pathlib.Path(folder), name, dtype, length)

    def dump(self, faults: Sequence[Planted], dtype: str | None = None) -> dict[str, np.ndarray]:
        i, dtype = self.inputs, dtype or self.same.dtype
        dump = forward(self.weights, self.config, i.input_ids, i.attention_mask, i.position_ids, faults, dtype)
        return {key: value for key, value in dump.items() if key.count(".") < 2 or key.split(".")[-1] in self.shown}

    @property
    def partial(self) -> bool:
        """Whether some stages are not dumped."""
        return len(self.shown) < len(stages.LAYER_STAGES)

    def diagnose(self, dump: Mapping[str, np.ndarray]) -> Diagnosis:
        return diagnose(self.exact, self.same, self.inputs, dump)


def singles(layers: int, head_dim: int, hidden: int = 64, middle: int = 160) -> Iterator[Planted]:
    """Every fault of the table, in all layers and, where that makes sense, in one."""
    last_pairs = tuple(range(3 * head_dim // 8, head_dim // 2))
    everywhere = [
        ("rope-adjacent-pairs", {}),
        ("rope-theta", {"theta": 1e4}),
        ("rope-theta", {"theta": 5e5}),
        ("rope-position", {"shift": 3}),
        ("rope-position", {"restart": 32}),
        ("rope-not-on-q", {}),
        ("rope-not-on-k", {}),
        ("rope-half-dims", {}),
        ("rope-sign", {}),
        ("rms-norm-eps", {"eps": 1e-5}),
        ("rms-norm-eps", {"eps": 1e-4}),
        ("norm-weight-missing", {}),
        ("norm-weight-plus-one", {}),
        ("norm-mean-subtracted", {}),
        ("norm-weight-before-cast", {}),
        ("rope-not-on-q", {"heads": (1,)}),
        ("rope-not-on-k", {"heads": (1,)}),
        ("rope-not-on-q", {"pairs": last_pairs}),
        ("rope-not-on-k", {"pairs": last_pairs}),
        ("rope-not-on-q", {"positions": tuple(range(32, LENGTH))}),
        ("rope-not-on-k", {"positions": tuple(range(64, LENGTH))}),
        ("rope-part-dims", {"share": 0.75}),
        ("rope-part-dims", {"share": 0.5, "cut": "head"}),
        ("rope-part-dims", {"share": 0.75, "cut": "sliced"}),
        ("rope-scaling", {"rule": "linear", "factor": 4.0}),
        ("rope-scaling", {"rule": "linear", "factor": 2.5}),
        ("rope-scaling", {"rule": "ntk", "factor": 2.0}),
        ("rope-scaling", {"rule": "yarn", "factor": 16.0, "original": 4096}),
        ("rope-scaling", {"rule": "yarn", "factor": 4.0}),
        ("rope-scaling", {"rule": "llama3", "factor": 8.0, "original": 8192}),
        ("rope-precision", {"what": "inv_freq", "dtype": "bfloat16"}),
        ("rope-precision", {"what": "angles", "dtype": "bfloat16", "besides": ("inv_freq", "positions")}),
        ("rope-precision", {"what": "tables", "dtype": "float16"}),
        ("rope-precision", {"what": "tables", "dtype": "bfloat16"}),
        ("rope-precision", {"what": "angles", "dtype": "bfloat16"}),
        ("rope-precision", {"what": "angles", "dtype": "float16"}),
        ("rope-precision", {"what": "inv_freq", "dtype": "float16"}),
        ("norm-part-of-width", {"columns": hidden - 8}),
        ("norm-part-of-width", {"columns": hidden - 8, "divisor": "all"}),
        ("norm-part-of-width", {"columns": hidden // 2, "norms": ["post_attention_layernorm"]}),
        ("norm-before-residual", {}),
        ("residual-twice", {}),
        ("residual-twice", {"blocks": ("mlp",)}),
        ("residual-behind-norm", {}),
        ("residual-behind-norm", {"blocks": ("attention",)}),
        ("sum-cut-short", {"product": "mlp.down_proj.weight", "first": 64, "last": middle - 1}),
        ("sum-cut-short", {"product": "mlp.gate_proj.weight", "first": hidden - 1, "last": hidden - 1}),
        ("sum-cut-short", {"product": "self_attn.k_proj.weight", "first": 8, "last": 15}),
        ("sum-cut-short", {"product": "self_attn.o_proj.weight", "first": hidden - 8, "last": hidden - 1}),
        ("sum-cut-short", {"product": "attn_scores", "first": head_dim - 2, "last": head_dim - 1}),
        ("sum-cut-short", {"product": "attention", "first": 64, "last": LENGTH - 1}),
        ("qkv-bias-missing", {}),
        ("qkv-bias-twice", {}),
        ("q-bias-twice", {}),
        ("k-bias-twice", {}),
        ("v-bias-twice", {}),
        ("q-bias-missing", {}),
        ("k-bias-missing", {}),
        ("v-bias-missing", {}),
        ("bias-after-rope", {}),
        ("mask-not-causal", {}),
        ("mask-off-by-one", {"last": -1}),
        ("mask-off-by-one", {"last": 1}),
        ("mask-window", {"window": 16}),
        ("mask-chunk", {"size": 24}),
        ("softmax-scale", {"scale": 1.0}),
        ("softmax-scale", {"scale": 0.2}),
        ("softmax-soft-cap", {"cap": 50.0}),
        ("softmax-soft-cap", {"cap": 20.0}),
        ("scores-precision", {"dtype": "float16", "steps": "product"}),
        ("scores-precision", {"dtype": "bfloat16"}),
        ("scores-precision", {"dtype": "float8_e5m2"}),
        ("softmax-precision", {"dtype": "float16"}),
        ("softmax-precision", {"dtype": "bfloat16", "steps": "scores"}),
        ("softmax-precision", {"dtype": "float8_e4m3"}),
        ("cache-precision", {"part": "k", "dtype": "float16"}),
        ("cache-precision", {"part": "k", "dtype": "float8_e5m2"}),
        ("cache-precision", {"part": "v", "dtype": "bfloat16"}),
        ("cache-precision", {"part": "v", "dtype": "float8_e4m3"}),
        ("softmax-partial-warp", {}),
        ("kv-heads-interleaved", {}),
        ("v-heads-swapped", {}),
        ("o-proj-transposed", {}),
        ("down-proj-transposed", {}),
        ("attention-residual-missing", {}),
        ("mlp-residual-missing", {}),
        ("gate-up-swapped", {}),
        ("activation-on-up", {}),
        ("activation-gelu", {}),
        ("activation-gelu-tanh", {}),
        ("activation-relu", {}),
        ("weights-relabelled", {"tensor": "mlp.up_proj.weight", "direction": "bf16-as-f16"}),
        ("weights-relabelled", {"tensor": "self_attn.v_proj.weight", "direction": "f16-as-bf16"}),
        ("weights-quantised", {"tensor": "mlp.down_proj.weight", "codec": "int8"}),
        ("weights-quantised", {"tensor": "self_attn.q_proj.weight", "codec": "int4"}),
        ("weights-quantised", {"tensor": "all", "codec": "q4_k"}),
        *(
            ("weights-quantised", {"tensor": "mlp.gate_proj.weight", "codec": codec})
            for codec in (
                "q8_0",
                "q4_0",
                "q4_1",
                "int8 by row",
                "int4 by 64",
                "fp8_e4m3",
                "fp8_e4m3 by row",
                "fp8_e5m2",
            )
        ),
        ("weights-quantised", {"tensor": "all", "codec": "q8_0"}),
        ("weights-permuted", {"tensor": "self_attn.q_proj.weight", "order": "adjacent"}),
        ("weights-permuted", {"tensor": "self_attn.k_proj.bias", "order": "halves"}),
        ("weights-permuted", {"tensor": "self_attn.k_proj.weight", "order": "halves"}),
        ("weights-permuted", {"tensor": "self_attn.q_proj.bias", "order": "adjacent"}),
        ("weights-interleaved", {"tensor": "mlp.up_proj.weight", "block": 32}),
        ("weights-interleaved", {"tensor": "self_attn.q_proj.weight", "block": 32, "order": "halves"}),
        ("weights-interleaved", {"tensor": "mlp.gate_proj.weight", "block": 64, "order": "swapped"}),
        ("weights-interleaved", {"tensor": "mlp.down_proj.weight", "block": 32, "order": "flipped"}),
        ("weights-interleaved", {"tensor": "mlp.down_proj.weight", "block": 32, "order": "swapped", "codec": "q4_0"}),
        ("activations-quantised", {"module": "mlp.down_proj", "codec": "int8 by row"}),
        ("part-scaled", {"stage": "ffn_out", "channels": (17,), "factor": 0.85}),
        ("part-scaled", {"stage": "attention", "heads": (1,), "factor": 1.2}),
        ("part-zeroed", {"stage": "qkv_bias", "channels": (3, 4, 5)}),
        ("part-exchanged", {"stage": "attention", "heads": (0, 1)}),
        ("part-exchanged", {"stage": "ffn_up", "channels": (8, 9)}),
        ("part-exchanged", {"stage": "attn_softmax", "heads": (1, 2)}),
        ("part-scaled", {"stage": "q_post_rope", "heads": (2,), "factor": 0.5}),
        ("part-scaled", {"stage": "post_ffn_residual", "positions": (70,), "factor": 1.5}),
        ("part-zeroed", {"stage": "attn_out", "positions": tuple(range(76, LENGTH))}),
        ("part-zeroed", {"stage": "ffn_out", "channels": (hidden - 1,)}),
        ("part-zeroed", {"stage": "attn_scores", "heads": (3,)}),
        ("stage-scaled", {"stage": "attn_out", "factor": 0.5}),
        ("stage-scaled", {"stage": "k_post_rope", "factor": 1.138629}),
        ("tf32-dots", {"mode": "round"}),
        ("tf32-dots", {"mode": "truncate"}),
        ("bf16-accumulation", {"chunk": 32}),
        ("cache-position", {"shift": 1, "prefill": 40, "side": "write"}),
        ("cache-position", {"shift": -1, "prefill": 40, "side": "read"}),
        ("padding-attended", {}),
    ]
    for name, parameters in everywhere:
        share = parameters.get("share", 0.5)
        if name in ("rope-half-dims", "rope-part-dims") and head_dim * share % 2:
            continue
        yield Planted(name, None, parameters)
        yield Planted(name, (layers - 1,), parameters)
    yield Planted("weights-from-another-layer", (0,), {"tensor": "self_attn.k_proj.weight", "layer": 1})
    yield Planted("weights-from-another-layer", (1,), {"tensor": "mlp.gate_proj.weight", "layer": 0})
    for name, parameters in (
        ("final-norm-missing", {}),
        ("layer-order", {"order": tuple(reversed(range(layers)))}),
        ("layer-skipped", {"layer": 0}),
        ("layer-repeated", {"layer": layers - 1}),
        ("embedding-row-off-by-one", {}),
        ("embedding-transposed", {}),
        ("embedding-transposed", {"buffer": "transposed"}),
        ("stage-scaled", {"stage": "embedding", "factor": hidden**0.5}),
        ("sum-cut-short", {"product": "logits", "first": 32, "last": hidden - 1}),
        ("logits-position", {"shift": -1}),
        ("logits-position", {"shift": 1}),
        ("logits-temperature", {"temperature": 0.7}),
        ("logits-temperature", {"temperature": 2.0}),
        ("logits-soft-cap", {"cap": 30.0}),
        ("head-transposed", {}),
        ("head-missing", {}),
        ("logits-shifted", {"shift": 7}),
        ("logits-shifted", {"shift": -300}),
        ("layout", {"kind": "heads-major"}),
        ("layout", {"kind": "qk-interleaved"}),
        ("layout", {"kind": "transposed"}),
    ):
        yield Planted(name, None, parameters)


GGML_BLOCK = 32


def fits(bench: Bench, planted: Planted) -> bool:
    """Whether an engine can make a mistake here: GGML refuses rows that are no multiple of its blocks, and a block's
    columns are interleaved within it."""
    codec, tensor = planted.parameters.get("codec"), planted.parameters.get("tensor", "")
    block = planted.parameters.get("block", GGML_BLOCK if codec in ("q8_0", "q4_0", "q4_1") else 1)
    meant = (array for name, array in bench.weights.items() if tensor in ("all", name[-len(tensor) :]))
    return all(array.shape[-1] % block == 0 for array in meant if array.ndim == 2)


def cases(bench: Bench) -> Iterator[Planted]:
    """The single mistakes that fit a checkpoint."""
    config = bench.exact.config
    sizes = config.num_layers, config.head_dim, config.hidden_size, config.intermediate_size
    return (planted for planted in singles(*sizes) if fits(bench, planted))


STACKABLE = [
    [Planted("rope-adjacent-pairs"), Planted("rope-half-dims")],
    [Planted("rope-theta", None, {"theta": 1e4}), Planted("rope-theta", None, {"theta": 5e5})],
    [Planted("rope-position", None, {"restart": 32}), Planted("rope-sign")],
    [Planted("rms-norm-eps", None, {"eps": 1e-5}), Planted("rms-norm-eps", None, {"eps": 1e-4})],
    [Planted("norm-weight-plus-one"), Planted("norm-mean-subtracted")],
    [Planted("qkv-bias-missing"), Planted("q-bias-missing"), Planted("v-bias-missing")],
    [Planted("mask-not-causal"), Planted("mask-off-by-one", None, {"last": 1}), Planted("softmax-partial-warp")],
    [Planted("softmax-scale", None, {"scale": 0.2})],
    [Planted("v-heads-swapped")],
    [Planted("o-proj-transposed"), Planted("attention-residual-missing")],
    [Planted("down-proj-transposed"), Planted("mlp-residual-missing")],
    [Planted("gate-up-swapped"), Planted("activation-gelu"), Planted("activation-on-up")],
    [Planted("weights-quantised", None, {"tensor": "self_attn.o_proj.weight", "codec": "int8"})],
    [Planted("embedding-row-off-by-one")],
    [Planted("head-transposed"), Planted("logits-shifted", None, {"shift": 5})],
]
REAL_CASE = (
    Planted("qkv-bias-missing"),
    Planted("rms-norm-eps", None, {"eps": 1e-5}),
    Planted("rope-theta", None, {"theta": 1e4}),
    Planted("rope-adjacent-pairs"),
)


def stacks(count: int, seed: int) -> Iterator[tuple[Planted, ...]]:
    """The real case, then random combinations of two to four mistakes of different kinds."""
    yield REAL_CASE
    generator = np.random.default_rng(seed)
    for _ in range(count - 1):
        families = generator.choice(len(STACKABLE), int(generator.integers(2, 5)), replace=False)
        yield tuple(STACKABLE[family][generator.integers(len(STACKABLE[family]))] for family in sorted(families))


ENGINES_OWN = ("besides", "steps", "original", "module", "buffer", "stage", "blocks", "cut")
"""Parameters of a planted mistake that are no part of what it is called."""


def expected(bench: Bench, planted: Planted) -> tuple[str, Any, dict[str, Any]]:
    """Name, layers and parameters that a finding has to have."""
    parameters = dict(planted.parameters)
    everything = "all" if bench.exact.config.num_layers > 1 else (0,)
    for ignored in ENGINES_OWN:
        parameters.pop(ignored, None)
    if "order" in parameters and planted.name.startswith("weights-"):
        parameters.pop("order")
    outside = ("final-norm", "layer-", "embedding", "head-", "logits")
    layers: Any = planted.layers if planted.layers is not None else everything
    where = planted.parameters.get("stage", planted.parameters.get("product", ""))
    if planted.name.startswith(outside) or where in ("embedding", "final_norm", "logits"):
        layers = ()
    if planted.name == "layout" or parameters.get("tensor") == "all":
        layers = None
        parameters.pop("tensor", None)
    return planted.name, layers, parameters


def matches(bench: Bench, planted: Planted, finding: Any) -> bool:
    name, layers, parameters = expected(bench, planted)
    if bench.same.dtype in NARROW:
        if name not in (finding.fault, *finding.alternatives) or not _where_it_shows(bench, planted, finding.layers):
            return False
        layers = None
    if (
        name != finding.fault
        and not (name in finding.alternatives and bench.partial)
        and bench.same.dtype not in NARROW
    ):
        return False
    if layers is not None and finding.layers != layers:
        return False
    for key, value in parameters.items():
        given = finding.parameters.get(key)
        if isinstance(value, float):
            if not isinstance(given, float) or not math.isclose(given, value, rel_tol=0.01):
                return False
        elif key == "positions" and given is not None:
            if sorted({column for _, column in given}) != sorted(value):
                return False
        elif key == "tensor" and isinstance(given, list):
            if value not in given:
                return False
        elif key == "codec" and isinstance(given, str):
            if value not in given.split(OR):
                return False
        elif given is not None and (list(given) if isinstance(given, tuple) else given) != (
            list(value) if isinstance(value, tuple) else value
        ):
            return False
    return True


def local_effects(bench: Bench, planted: Planted) -> dict[int | None, float]:
    """For each layer, and None for what is outside: how many budgets the mistake is at the stages that make it."""
    wrong = bench.dump([planted], "float64")
    if len(wrong) != len(bench.dump((), "float64")):
        return {None: math.inf}
    largest: dict[int | None, float] = {}
    for site in localise(bench.exact, bench.same, bench.inputs, complete(wrong, bench.inputs)).sites:
        largest[site.layer] = max(largest.get(site.layer, 0.0), site.share)
    return largest


def _where_it_shows(bench: Bench, planted: Planted, layers: Any) -> bool:
    """Whether these are layers that the mistake was planted in, all those among them in which it counts."""
    _, everywhere, _ = expected(bench, planted)
    if everywhere is None or everywhere == ():
        return everywhere is None or layers == ()
    every = range(bench.exact.config.num_layers)
    meant, named = (set(every if where == "all" else where) for where in (everywhere, layers))
    counted = {layer for layer, share in local_effects(bench, planted).items() if share >= COUNTS and layer in meant}
    return counted <= named <= meant


def effect(bench: Bench, faults: Sequence[Planted]) -> float:
    """The largest effect of the mistakes in float64, as a multiple of a stage's budget; in bfloat16, where rounding
    alone grows to several budgets on its way through the layers, where it is made."""
    if bench.same.dtype in NARROW:
        return max(share for fault in faults for share in local_effects(bench, fault).values())
    right, wrong = bench.dump((), "float64"), bench.dump(faults, "float64")
    if set(right) != set(wrong):
        return math.inf
    sites = localise(bench.exact, bench.same, bench.inputs, complete(right, bench.inputs)).sites
    tokens = bench.inputs.attention_mask == 1
    largest = 0.0
    for site in sites:
        difference = wrong[site.key] - right[site.key]
        if site.stage in ("attn_scores", "attn_softmax"):
            difference = np.tril(difference) * tokens[:, None, :, None] * tokens[:, None, None, :]
        else:
            difference = difference[tokens]
        norm = float(np.linalg.norm(difference))
        largest = max(largest, norm / site.budget if site.budget else math.inf * bool(norm))
    return largest


@dataclasses.dataclass
class Tally:
    """What became of the cases."""

    counted: int = 0
    detected: int = 0
    exact: int = 0
    uncounted: int = 0
    wrong_names: int = 0
    mistaken: int = 0


def run_case(bench: Bench, faults: Sequence[Planted], tally: Tally) -> None:
    size = effect(bench, faults) if faults else 0.0
    started = time.perf_counter()
    findings = bench.diagnose(bench.dump(faults)).findings
    seconds = time.perf_counter() - started
    label = " + ".join(f"{f.name}{_shown(f)}" for f in faults) or "clean"
    if size < COUNTS:
        tally.uncounted += 1
        wrong = [finding for finding in findings if not any(matches(bench, fault, finding) for fault in faults)]
        tally.wrong_names += len(wrong)
        verdict = f"not counted: effect {size:.2g} budgets" + (f"; WRONG NAME {wrong[0].sentence}" if wrong else "")
    else:
        tally.counted += 1
        tally.detected += bool(findings)
        found = [any(matches(bench, fault, finding) for finding in findings) for fault in faults]
        extra = [f for f in findings if not any(matches(bench, fault, f) for fault in faults)]
        exact = all(found) and not extra
        tally.exact += exact
        tally.mistaken += any(finding.fault != "unknown" for finding in extra)
        verdict = "exact" if exact else "NOT EXACT: " + "; ".join(f.sentence for f in findings)[:400]
    print(f"{bench.name:24} {bench.same.dtype:8} {label:70} {seconds:5.1f} s  {verdict}", flush=True)


def _shown(fault: Planted) -> str:
    layers = "" if fault.layers is None else f" in {list(fault.layers)}"
    return (f" {dict(fault.parameters)}" if fault.parameters else "") + layers


Case = tuple[Bench, tuple[Planted, ...]]


def single_cases(dtype: str) -> Iterator[Case]:
    """A right engine and every mistake alone, on both checkpoints, in an engine of this dtype."""
    for name in CONFIGS:
        bench = Bench.of(name, dtype)
        yield bench, ()
        for planted in cases(bench):
            yield bench, (planted,)


def stacked_cases(count: int, seed: int) -> Iterator[Case]:
    benches = [Bench.of(name) for name in CONFIGS]
    for faults, bench in zip(stacks(count, seed), itertools.cycle(benches), strict=False):
        halved = any(fault.name == "rope-half-dims" for fault in faults)
        # Half of an odd number of pairs is no number of pairs.
        yield (benches[0] if halved and bench.exact.config.head_dim % 4 else bench), faults


def fused_cases(seed: int) -> Iterator[Case]:
    whole = Bench.of(CONFIGS[0])
    for label, shown in FUSED.items():
        fused = dataclasses.replace(whole, name=label, shown=shown)
        for planted in cases(fused):
            if planted.layers is None:
                yield fused, (planted,)
        for faults in stacks(STACKED_BEHIND_FUSED, seed + 1):
            yield fused, faults


YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LONG = 300
LESS_PRECISE = tuple(
    Planted("rope-precision", None, {"what": what, "dtype": dtype, "besides": besides})
    for what, dtype, besides in (
        ("angles", "bfloat16", ()),
        ("angles", "bfloat16", ("inv_freq", "positions")),
        ("inv_freq", "bfloat16", ()),
        ("angles", "float16", ()),
    )
)


def configured_cases() -> Iterator[Case]:
    """Mistakes that need a configuration, or more positions: rules for RoPE that were asked for, and precision."""
    other = (
        Planted("rope-unscaled"),
        Planted("rope-unscaled", (1,)),
        Planted("rope-scaling", None, {"rule": "linear", "factor": 4.0}),
        Planted("rope-theta", None, {"theta": 1e4}),
    )
    asked = {
        "yarn is asked for": (
            YARN,
            (*other, Planted("rope-scaling", None, {"rule": "yarn", "factor": 8.0, "original": 64})),
        ),
        "llama3 is asked for": (LLAMA3, other),
        "64 positions at most": (
            {"max_position_embeddings": 64},
            tuple(Planted("rope-scaling", None, {"rule": "dynamic", "factor": f, "original": 64}) for f in (2.0, 4.0)),
        ),
    }
    for label, (changes, planted) in asked.items():
        bench = Bench.configured(label, changes)
        yield from ((bench, faults) for faults in ((), *((fault,) for fault in planted)))
    for dtype, length in itertools.product(("float32", "bfloat16", "float16"), (LENGTH, LONG)):
        bench = Bench.configured(f"{length} positions", {}, dtype, length)
        less = LESS_PRECISE if dtype != "float16" else LESS_PRECISE[:3]
        yield from ((bench, faults) for faults in ((), *((fault,) for fault in less)))


GROUPS = {"single": 0.95, **dict.fromkeys(NARROW, 0.95), "stacked": 0.90, "fused": 0.90, "configured": 0.95}
"""Kinds of cases, and the share of each that has to be named exactly."""


def group_cases(group: str, stacked: int, seed: int) -> Iterator[Case]:
    if group == "stacked":
        return stacked_cases(stacked, seed)
    if group == "fused":
        return fused_cases(seed)
    if group == "configured":
        return configured_cases()
    return single_cases("float32" if group == "single" else group)


def write_real_case(folder: str | pathlib.Path) -> None:
    """Writes the dump of the real four-fold case on the first checkpoint, as APRT files."""
    ids = seeded(288, 1, LENGTH).input_ids
    write_aprt(folder, forward(*oracle.load(paths.checkpoint(CONFIGS[0])), ids, faults=REAL_CASE), ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacked", type=int, default=30, help="random combinations, over both checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="default: all")
    parser.add_argument("--only", default="", help="single cases whose name holds this; no stacked ones")
    parser.add_argument("--shard", metavar="I/N", default="1/1", help="every N-th case of each group, from the I-th on")
    parser.add_argument("--dump", metavar="DIR", help="write the four-fold broken dump as APRT files, and nothing else")
    args = parser.parse_args()
    if args.dump:
        write_real_case(args.dump)
        return 0
    tallies = {group: Tally() for group in args.groups if not (args.only and group in ("stacked", "fused"))}
    part, parts = (int(number) for number in args.shard.split("/"))
    for group, tally in tallies.items():
        chosen = (
            (bench, faults)
            for bench, faults in group_cases(group, args.stacked, args.seed)
            if not args.only or (faults and args.only in faults[0].name)
        )
        for bench, faults in itertools.islice(chosen, part - 1, None, parts):
            run_case(bench, faults, tally)
    for group, tally in tallies.items():
        print(
            f"{group}: {tally.counted} counted, {tally.detected} detected, {tally.exact} named exactly (at least"
            f" {GROUPS[group]:.0%} needed); {tally.uncounted} not counted, {tally.wrong_names} wrong names there"
        )
    mistaken = tallies["fused"].mistaken if "fused" in tallies else 0
    print(f"fused: {mistaken} taken for another mistake")
    good = all(
        tally.detected == tally.counted and tally.exact >= GROUPS[group] * tally.counted and not tally.wrong_names
        for group, tally in tallies.items()
    )
    return 0 if good and not mistaken and any(tally.counted for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
