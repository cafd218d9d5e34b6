"""The unknown battery: mistakes that no record of the fault table names, as people who write kernels make them.

    python tests/battery/unknown_battery.py [--workers N] [--shard I/N] [--sample SHARE] [--json FILE]
    python tests/battery/unknown_battery.py --table FILE [FILE ...]

Each changes the values of one stage of one layer in the NumPy engine, which goes on with them; the dump is whole. It
has to be detected, to be said to be unknown (or merely seen) at this stage and layer and at no other, and in the right
heads, channels, positions and keys. Where a factor, a linear map or the right values of other places is all that was
done, that has to be said. A mistake that some record does name after all (`Unknown.named`) counts if it is named so.

Exits 1 if a mistake is not detected, if fewer than 95 % are described right, or if more than 2 % have a wrong name.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

if __name__ == "__main__":  # workers beside each other: one thread for each
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.findings import Finding
from tests.battery import faulty_forward
from tests.battery.parity_battery import CONFIGS, PADDED, Bench

NEEDED, WRONG_NAMES = 0.95, 0.02
Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A mistake.

    Attributes:
      name: What was done.
      stage: Where; the layer is `layer`.
      change: Right values [B, T, C] or [B, N, T, S] -> wrong ones.
      layer: The layer; None outside the layers.
      heads: Which heads are wrong, where it is not all of them; of the stages of q, k and v those of `part`.
      channels: The same of channels,
      positions: of columns, and
      keys: of the keys of a pair.
      part: "q", "k" or "v".
      said: What has to be said of the values.
      named: Names of the table that it may be given.
    """

    name: str
    stage: str
    change: Change
    layer: int | None = 1
    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    part: str = ""
    said: str = ""
    named: tuple[str, ...] = ()


# --- Ways to be wrong ------------------------------------------------------------------------------------------------


def _noise(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _places(chosen: Sequence[int] | slice, count: int) -> np.ndarray:
    return np.arange(count)[chosen if isinstance(chosen, slice) else list(chosen)]


def _only(
    change: Change, channels: Sequence[int] | slice = slice(None), positions: Sequence[int] | slice = slice(None)
) -> Change:
    """The change, of some channels and positions of [B, T, C]."""

    def changed(x: np.ndarray) -> np.ndarray:
        out, made = x.copy(), change(x)
        rows, columns = _places(positions, x.shape[1]), _places(channels, x.shape[2])
        out[:, rows[:, None], columns] = made[:, rows[:, None], columns]
        return out

    return changed


def _pairs(
    change: Change,
    heads: Sequence[int] | slice = slice(None),
    queries: Sequence[int] | slice = slice(None),
    keys: Sequence[int] | slice = slice(None),
) -> Change:
    """The change, of some heads, queries and keys of [B, N, T, S]."""

    def changed(x: np.ndarray) -> np.ndarray:
        out, made = x.copy(), change(x)
        chosen = np.ix_(*map(_places, (heads, queries, keys), x.shape[1:]))
        out[:, *chosen] = made[:, *chosen]
        return out

    return changed


def _noisy(share: float, seed: int = 0) -> Change:
    return lambda x: x * (1 + share * _noise(x.shape, seed))


def _garbage(x: np.ndarray) -> np.ndarray:
    """What an uninitialised buffer may hold."""
    return 3 * np.abs(x).mean() * _noise(x.shape, 7)


def _power(exponent: float) -> Change:
    return lambda x: np.sign(x) * np.abs(x) ** exponent


def _rolled(steps: int, axis: int) -> Change:
    return lambda x: np.roll(x, steps, axis)


def _steps(step: float) -> Change:
    """Rounded to whole steps, not by any codec."""
    return lambda x: np.rint(x / (step * np.abs(x).max())) * step * np.abs(x).max()


def _cut(share: float) -> Change:
    """A cast that saturates at a share of the largest value."""
    return lambda x: np.clip(x, -share * np.abs(x).max(), share * np.abs(x).max())


def _wrapped(share: float) -> Change:
    """A cast that wraps around there."""

    def change(x: np.ndarray) -> np.ndarray:
        bound = share * np.abs(x).max()
        return (x + bound) % (2 * bound) - bound

    return change


def _mixed(rank: int, size: float) -> Change:
    """A linear map that was left on: the identity and a matrix of low rank."""

    def change(x: np.ndarray) -> np.ndarray:
        width = x.shape[-1]
        down, up = _noise((width, rank), 3), _noise((rank, width), 4)
        return x + size * (x @ down @ up) / width

    return change


def _permuted_lanes(width: int, head: int) -> Change:
    """Channels of a head in an order that no layout has."""

    def change(x: np.ndarray) -> np.ndarray:
        out, start = x.copy(), head * width
        order = (np.arange(width) * 5 + 3) % width
        out[..., start : start + width] = x[..., start + order]
        return out

    return change


def _lanes_rolled(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.roll(x[..., :8], 3, -1), x[..., 8:]], -1)


def _held(every: int) -> Change:
    """Each value of a group of positions is that of the first."""
    return lambda x: x[:, np.arange(x.shape[1]) // every * every]


# gqa_tied_bf16: hidden 64, 4 heads of 16, 2 KV heads, 160 in the MLP, 288 tokens. 80 columns, 9 of row 0 are padding.
_LATE = tuple(range(64, 80))


def _unknowns() -> list[Unknown]:
    """All of them."""
    some = (5, 6, 7, 40)
    h1 = tuple(range(16, 32))
    return [
        Unknown("noise on some channels", "ffn_out", _only(_noisy(0.2), some), channels=some),
        Unknown("noise on some channels", "attn_norm", _only(_noisy(0.01), (0, 63)), channels=(0, 63)),
        Unknown("noise on one channel", "ffn_up", _only(_noisy(0.5), (77,)), channels=(77,)),
        Unknown("noise everywhere", "ffn_gate", _noisy(0.05)),
        Unknown("noise everywhere", "logits", _noisy(0.02), layer=None),
        Unknown("noise on a KV head", "k_post_rope", _only(_noisy(0.3), slice(0, 16)), heads=(0,)),
        Unknown("noise on a query head", "q_post_rope", _only(_noisy(0.3), slice(48, 64)), heads=(3,)),
        Unknown("noise on a head of v", "qkv_bias", _only(_noisy(0.3), slice(112, 128)), heads=(1,), part="v"),
        Unknown("uninitialised tail rows", "ffn_out", _only(_garbage, positions=_LATE), positions=_LATE),
        Unknown("uninitialised tail rows", "attention", _only(_garbage, positions=_LATE[-3:]), positions=_LATE[-3:]),
        Unknown(
            "uninitialised tail channels", "ffn_gate", _only(_garbage, slice(144, 160)), channels=tuple(range(144, 160))
        ),
        Unknown(
            "an uninitialised tile",
            "attn_out",
            _only(_garbage, slice(32, 48), slice(32, 48)),
            channels=tuple(range(32, 48)),
            positions=tuple(range(32, 48)),
        ),
        Unknown(
            "one uninitialised position", "embedding", _only(_garbage, positions=(41,)), layer=None, positions=(41,)
        ),
        Unknown("uninitialised scores of a head", "attn_scores", _pairs(_garbage, (2,)), heads=(2,)),
        Unknown(
            "zero tail rows",
            "ffn_swigl",
            _only(np.zeros_like, positions=_LATE),
            positions=_LATE,
            named=("part-zeroed",),
        ),
        Unknown(
            "a key block is zero",
            "attn_scores",
            _pairs(np.zeros_like, keys=slice(32, 48)),
            keys=tuple(range(32, 48)),
            said="zero",
        ),
        Unknown(
            "a key block of a head is zero",
            "attn_scores",
            _pairs(np.zeros_like, (1,), keys=slice(16, 32)),
            heads=(1,),
            keys=tuple(range(16, 32)),
            said="zero",
        ),
        Unknown(
            "shares of a key block are lost",
            "attn_softmax",
            _pairs(np.zeros_like, keys=slice(16, 24)),
            keys=tuple(range(16, 24)),
            said="zero",
        ),
        Unknown(
            "a key block is added twice",
            "attn_softmax",
            _pairs(lambda x: 2 * x, keys=slice(16, 32)),
            keys=tuple(range(16, 32)),
            said="2 times",
        ),
        Unknown("noise on a key", "attn_scores", _pairs(_noisy(0.3), keys=(20,)), keys=(20,)),
        Unknown(
            "queries of one block see wrong scores",
            "attn_scores",
            _pairs(_noisy(0.3), queries=slice(48, 64)),
            positions=tuple(range(48, 64)),
        ),
        Unknown("a saturating cast", "ffn_up", _cut(0.3), said="beyond"),
        Unknown("a saturating cast", "qkv_bias", _cut(0.4), said="beyond"),
        Unknown("a cast that wraps around", "ffn_out", _wrapped(0.5), said="beyond"),
        Unknown(
            "large values are halved",
            "ffn_gate",
            lambda x: np.where(np.abs(x) > 0.4 * np.abs(x).max(), x / 2, x),
            said="beyond",
        ),
        Unknown("a clamp from above", "ffn_swigl", lambda x: np.minimum(x, 0.2 * x.max()), said="above"),
        Unknown("a clamp of one head", "attention", _only(_cut(0.2), slice(16, 32)), heads=(1,)),
        Unknown("tanh on gate", "ffn_gate", np.tanh),
        Unknown("tanh on logits", "logits", lambda x: 5 * np.tanh(x / 5), layer=None, named=("logits-soft-cap",)),
        Unknown("a nonlinear distortion", "ffn_out", _power(1.05)),
        Unknown("a nonlinear distortion", "attn_norm", lambda x: x + 0.05 * x * x),
        Unknown("a distortion of shares", "attn_softmax", lambda x: 0.98 * x**1.1),
        Unknown("rounding to coarse steps", "attn_out", _steps(0.02)),
        Unknown(
            "rounding of one tile to coarse steps",
            "ffn_out",
            _only(_steps(0.05), slice(0, 16), slice(0, 16)),
            channels=tuple(range(16)),
            positions=tuple(range(16)),
        ),
        Unknown("rounding of some channels", "final_norm", _only(_steps(0.01), (3, 9)), layer=None, channels=(3, 9)),
        Unknown(
            "lanes of a head permuted", "q_post_rope", _permuted_lanes(16, 2), heads=(2,), named=("part-exchanged",)
        ),
        Unknown("lanes of a head permuted", "attention", _permuted_lanes(16, 0), heads=(0,), named=("part-exchanged",)),
        Unknown(
            "lanes of half a head rolled",
            "k_post_rope",
            _only(_lanes_rolled, slice(0, 8)),
            channels=tuple(range(8)),
            heads=None,
        ),
        Unknown("channels rolled by one", "ffn_norm", _rolled(1, -1), said="other channels"),
        Unknown(
            "channels of a block reversed",
            "ffn_out",
            lambda x: np.concatenate([x[..., :32][..., ::-1], x[..., 32:]], -1),
            channels=tuple(range(32)),
            named=("part-exchanged",),
            said="other channels",
        ),
        Unknown(
            "a block of positions is written twice",
            "ffn_out",
            lambda x: np.concatenate([x[:, :48], x[:, 32:48], x[:, 64:]], 1),
            positions=tuple(range(48, 64)),
            said="16 before",
            named=("positions-permuted",),
        ),
        Unknown(
            "a stale residual of one position",
            "post_attn_residual",
            lambda x: np.concatenate([x[:, :50], x[:, 49:50], x[:, 51:]], 1),
            positions=(50,),
            said="1 before",
            named=("positions-permuted",),
        ),
        Unknown(
            "stale values of the position before",
            "ffn_up",
            _only(_rolled(1, 1), positions=slice(33, 40)),
            positions=tuple(range(33, 40)),
            said="1 before",
            named=("positions-permuted",),
        ),
        Unknown(
            "stale values of a head",
            "attention",
            _only(_rolled(2, 1), slice(32, 48), slice(20, 80)),
            heads=(2,),
            positions=tuple(range(20, 80)),
            said="2 before",
        ),
        Unknown(
            "two rows of a warp share a value",
            "qkv_bias",
            _only(_held(2), positions=slice(10, 80)),
            positions=tuple(range(11, 80, 2)),
            said="1 before",
            named=("positions-permuted",),
        ),
        Unknown(
            "a gain on some channels",
            "ffn_out",
            _only(lambda x: 1.07 * x, (1, 2, 3)),
            channels=(1, 2, 3),
            said="1.07 times",
            named=("part-scaled",),
        ),
        Unknown("a gain", "attn_out", lambda x: 0.9 * x, said="0.9 times", named=("stage-scaled",)),
        Unknown("a gain", "logits", lambda x: x / 0.7, layer=None, said="1.42857 times", named=("logits-temperature",)),
        Unknown(
            "a gain of its own for each channel",
            "attn_norm",
            lambda x: x * (1 + 0.1 * _noise(x.shape[-1:], 5)),
            said="gain of its own",
        ),
        Unknown(
            "a gain of its own for each channel",
            "ffn_out",
            lambda x: x * (1 + 0.2 * _noise(x.shape[-1:], 6)),
            said="gain of its own",
        ),
        Unknown(
            "a gain that grows with the position",
            "attention",
            lambda x: x * (1.01 + np.arange(x.shape[1])[:, None] / 100),
            positions=None,
        ),
        Unknown("a low-rank perturbation", "attn_out", _mixed(2, 0.5), said="rank 2"),
        Unknown("a low-rank perturbation", "ffn_out", _mixed(1, 1.0), said="rank 1"),
        Unknown("an adapter left on behind a norm", "ffn_norm", _mixed(4, 0.3), said="rank 4"),
        Unknown(
            "a head is added to the next",
            "attention",
            lambda x: np.concatenate([x[..., :16], x[..., 16:32] + x[..., :16], x[..., 32:]], -1),
            heads=(1,),
            said="linear map",
        ),
        Unknown(
            "neighbours leak into each other", "attention", lambda x: x + 0.1 * np.roll(x, 1, -1), said="linear map"
        ),
        Unknown("a constant is added", "ffn_out", lambda x: x + 0.05, said="the right value and 0.05"),
        Unknown(
            "a constant is added to some channels",
            "post_ffn_residual",
            _only(lambda x: x + 0.3, (10, 11)),
            channels=(10, 11),
            said="the right value and 0.3",
        ),
        Unknown(
            "a constant on one lane of every head",
            "qkv_bias",
            _only(lambda x: x + 0.5, slice(7, 128, 16)),
            channels=tuple(range(7, 128, 16)),
            said="the right value and 0.5",
        ),
        Unknown(
            "the sign of some channels",
            "ffn_up",
            _only(np.negative, (0, 80, 159)),
            channels=(0, 80, 159),
            said="-1 times",
            named=("part-scaled",),
        ),
        Unknown("absolute values", "ffn_swigl", np.abs),
        Unknown(
            "a race loses a part of some rows",
            "ffn_out",
            _only(_noisy(0.4, 2), positions=slice(3, 80, 16)),
            positions=tuple(range(3, 80, 16)),
        ),
        Unknown(
            "a bit flips in one value",
            "post_ffn_residual",
            _only(lambda x: x * 16, (30,), (44,)),
            channels=(30,),
            positions=(44,),
            said="16 times",
            named=("part-scaled",),
        ),
        Unknown(
            "every 32nd position is doubled",
            "attn_out",
            _only(lambda x: 2 * x, positions=(31, 63)),
            positions=(31, 63),
            said="2 times",
            named=("part-scaled",),
        ),
        Unknown(
            "some positions are scaled",
            "qkv_bias",
            _only(lambda x: 0.5 * x, positions=(60, 61)),
            positions=(60, 61),
            said="0.5 times",
            named=("part-scaled",),
        ),
        Unknown("half a head is noise", "q_post_rope", _only(_noisy(0.5), h1[:6]), channels=h1[:6]),
    ]


UNKNOWNS = _unknowns()


class _Engine(faulty_forward._Engine):
    """The engine with one of `UNKNOWNS`."""

    def __init__(self, bench: Bench, unknown: Unknown, dtype: str):
        inputs = bench.inputs
        super().__init__(
            bench.weights, bench.config, inputs.input_ids, inputs.attention_mask, inputs.position_ids, (), dtype
        )
        self.unknown = unknown

    def _parts(self, stage: str, value: np.ndarray, layer: int | None) -> np.ndarray:
        value = super()._parts(stage, value, layer)
        if (stage, layer) != (self.unknown.stage, self.unknown.layer):
            return value
        wrong = self.rounded(self.unknown.change(value.astype(np.float64)))
        if stage in faulty_forward.ATTENTION_STAGES:
            return np.where(self._visible(0)[:, None], wrong, value)
        return wrong


_bench = functools.lru_cache(maxsize=None)(Bench.of)


def run_case(number: int) -> dict[str, Any]:
    """Plants one of `UNKNOWNS`; returns what became of it."""
    unknown, bench = UNKNOWNS[number], _bench(CONFIGS[0])
    with np.errstate(all="ignore"):
        dump = _Engine(bench, unknown, "float32").run()
    started, processor = time.perf_counter(), time.process_time()
    findings = bench.diagnose(dump).findings
    described, why = judged(unknown, findings)
    return {
        "name": unknown.name,
        "stage": unknown.stage if unknown.layer is None else f"{unknown.layer}.{unknown.stage}",
        "detected": bool(findings),
        "described": described,
        "why": why,
        "wrong": [f.fault for f in findings if not FAULTS[f.fault].unexplained and f.fault not in unknown.named],
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "findings": [finding.sentence for finding in findings],
    }


def judged(unknown: Unknown, findings: Sequence[Finding]) -> tuple[bool, str]:
    """Whether the findings say what was done, and what they say otherwise."""
    if len(findings) != 1:
        return False, f"{len(findings)} findings"
    (finding,) = findings
    if not (FAULTS[finding.fault].unexplained or finding.fault in unknown.named):
        return False, f"named {finding.fault}"
    layers = () if unknown.layer is None else (unknown.layer,)
    if (finding.stage, finding.layers) != (unknown.stage, layers):
        return False, f"said to be at {finding.stage} of {finding.layers}"
    if finding.fault in unknown.named:
        return True, ""
    for kind in ("heads", "channels", "keys"):
        said = finding.parameters.get(kind)
        if (None if said is None else tuple(said)) != getattr(unknown, kind):
            return False, f"{kind}: {said}, not {getattr(unknown, kind)}"
    if finding.parameters.get("part", "") != unknown.part:
        return False, f"part: {finding.parameters.get('part')}"
    wrong = _said_positions(unknown)
    said = finding.parameters.get("positions")
    if (None if said is None else set(said)) != wrong:
        return False, f"positions: {str(said)[:80]}"
    return (True, "") if unknown.said in finding.sentence else (False, f"does not say {unknown.said!r}")


def _said_positions(unknown: Unknown) -> set[tuple[int, int]] | None:
    """The positions as they are said: tokens that are no padding."""
    if unknown.positions is None:
        return None
    return {(row, column) for row in (0, 1) for column in unknown.positions if row or column >= PADDED}


def table(results: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """Returns the table, and whether it is as good as it has to be."""
    detected, described = (sum(r[name] for r in results) for name in ("detected", "described"))
    wrong, seconds = sum(bool(r["wrong"]) for r in results), [r["processor_seconds"] for r in results]
    lines = [
        f"{len(results)} mistakes outside the table: {detected} detected, {described} described right"
        f" ({described / max(1, len(results)):.1%}, at least {NEEDED:.0%} needed), {wrong} with a wrong name",
        f"processor time of a case: median {np.median(seconds or [0]):.1f} s, largest {max(seconds, default=0):.0f} s",
    ]
    for r in results:
        if not r["described"]:
            lines.append(f"  NOT RIGHT {r['name']} ({r['stage']}, {r['seconds']} s): {r['why']}")
            lines += [f"    {sentence[:400]}" for sentence in r["findings"][:2]]
    good = detected == len(results) and described >= NEEDED * len(results) and wrong <= WRONG_NAMES * len(results)
    return "\n".join(lines), good and bool(results)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard", default="1/1", help="I/N: every Nth case, from the Ith on")
    parser.add_argument("--json", metavar="FILE", help="write all results")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="only the table of these results")
    args = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    if args.table:
        results = [result for file in args.table for result in json.loads(pathlib.Path(file).read_text())]
    else:
        index, count = map(int, args.shard.split("/"))
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
            for result in pool.map(run_case, range(len(UNKNOWNS))[index - 1 :: count]):
                results.append(result)
                verdict = "right" if result["described"] else f"NOT RIGHT: {result['why']}"
                print(f"{result['seconds']:6.1f} s {result['name']} ({result['stage']}): {verdict}", flush=True)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    text, good = table(results)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
