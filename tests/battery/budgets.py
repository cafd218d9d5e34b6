"""Do the budgets of `apr_jax.parity.localise` bite, and do they transfer: one set of constants, many models.

    python tests/battery/budgets.py [--seeds N] [--widths N ...]

For each width, length, weight scale and seed a model is drawn and other right programs run it: the NumPy engine in
float32, bfloat16 and float16, and HuggingFace where torch is there. Every stage of theirs has to be within its budget.
Then each stage is disturbed by noise of three times its budget (L2), over the whole stage and in one position of three
times that position's budget, and has to be flagged. One table row for each class of stages and dtype; exits 1 if a
clean stage is beyond its budget, a disturbance is not flagged, or HuggingFace could not be run.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ml_dtypes
import numpy as np
import safetensors.numpy

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.load.load_model import load_model
from apr_jax.model.language_model import LanguageModel
from apr_jax.parity.localise import CLASS_OF, FACTORS, Site, judge, localise
from apr_jax.testing.sample import Sample, draw, side_files
from apr_jax.trace import hf_reference
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import compared_positions, complete
from tests import oracle
from tests.battery.faulty_forward import forward

WIDTHS = {64: (160, 4, 2), 256: (688, 8, 2), 896: (2432, 14, 2)}
"""Hidden size -> intermediate size, heads, KV heads."""
LENGTHS = (40, 160)
SCALES = (0.5, 3.0)
"""Factors on every matrix, drawn with the statistics of Qwen2.5; biases and norms stay."""
DTYPES = ("float32", "bfloat16", "float16")
SEEDS = 20
HUGGINGFACE_SEEDS = 3
DISTURBANCE = 3.0
"""Times the budget."""
_VOCABULARY = 288
_STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclasses.dataclass
class Tally:
    """What was seen of one class of stages in one dtype.

    Attributes:
      stages: Number of stages judged on a clean dump.
      share: Largest share of a budget that a clean stage took.
      beyond: Clean stages beyond their budget, in words.
      disturbed: Number of disturbances.
      missed: Those not flagged, in words.
      relative: Budget over norm of each stage: how small a mistake is seen.
    """

    stages: int = 0
    share: float = 0.0
    beyond: list[str] = dataclasses.field(default_factory=list)
    disturbed: int = 0
    missed: list[str] = dataclasses.field(default_factory=list)
    relative: list[float] = dataclasses.field(default_factory=list)


def write_checkpoint(folder: pathlib.Path, width: int, scale: float, seed: int) -> None:
    """Writes a model of two layers: Qwen2.5's statistics, matrices times `scale`, all values rounded to bfloat16."""
    ffn, heads, kv_heads = WIDTHS[width]
    config = Qwen2Config(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    sample = Sample("budgets", config)
    tensors = {}
    for name in config.tensor_shapes():
        values = np.concatenate(list(draw(sample, name, seed)))
        values = values if values.ndim == 1 else values * np.float32(scale)
        tensors[name] = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(side_files(sample, "small")["config.json"])


def batch(length: int, seed: int) -> Inputs:
    """Two rows of tokens, an eighth of the first one padding on the left."""
    ids = seeded(_VOCABULARY, 2, length, seed).input_ids
    mask = np.ones_like(ids)
    mask[0, : length // 8] = 0
    return Inputs.of(ids, mask)


def right_dumps(
    folder: pathlib.Path, inputs: Inputs, dtype: str, huggingface: bool
) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """Yields what other right programs compute."""
    arguments = (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
    yield "NumPy", forward(*oracle.load(folder), *arguments, (), dtype)
    if huggingface:
        yield "HuggingFace", hf_reference.run(folder, *arguments, dtype=dtype, trace=True)


def disturbances(
    site: Site, theirs: np.ndarray, inputs: Inputs, dtype: str, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the stage with noise of three times its budget, everywhere and in one position, rounded to the dtype."""
    compared = compared_positions(site.key, inputs, theirs.shape)
    compared = np.broadcast_to(compared if compared.ndim == theirs.ndim else compared[..., None], theirs.shape)
    noise = np.where(compared, generator.standard_normal(theirs.shape), 0.0)
    rows = np.argwhere(compared.any(-1) & (site.row_budgets > 0))
    row = tuple(rows[generator.integers(len(rows))])
    narrow = np.zeros_like(noise)
    narrow[row] = noise[row] * (DISTURBANCE * site.row_budgets[row] / np.linalg.norm(noise[row]))
    wide = noise * (DISTURBANCE * site.budget / np.linalg.norm(noise))
    for where, added in (("everywhere", wide), (f"at {[int(i) for i in row]}", narrow)):
        disturbed = (theirs + added).astype(np.float32)
        yield where, disturbed.astype(_STORED[dtype]).astype(np.float32)


def examine(
    label: str,
    models: tuple[LanguageModel, LanguageModel],
    inputs: Inputs,
    dump: Mapping[str, np.ndarray],
    tallies: Mapping[tuple[str, str], Tally],
    generator: np.random.Generator,
) -> None:
    """Judges every stage of a clean dump, and each stage disturbed."""
    exact, same = models
    located = localise(exact, same, inputs, complete(dump, inputs))
    own = same.trace(inputs, force={key: value for key, value in dump.items() if key != "logits"})
    for site in located.sites:
        tally = tallies[CLASS_OF[site.stage], same.dtype]
        tally.stages += 1
        tally.share = max(tally.share, site.share)
        if site.wrong:
            tally.beyond.append(f"{label} {site.key}: {site.share:.2f} of its budget")
        if not site.budget:
            continue
        tally.relative.append(site.budget / site.norm)
        for where, disturbed in disturbances(site, dump[site.key], inputs, same.dtype, generator):
            tally.disturbed += 1
            judged = judge(site.key, disturbed, located.reference[site.key], own[site.key], inputs, same.dtype)
            if not judged.wrong:
                tally.missed.append(f"{label} {site.key} {where}: {judged.share:.2f} of its budget")


def sweep(widths: Sequence[int], seeds: int) -> dict[tuple[str, str], Tally]:
    """Examines every width, length, weight scale and seed; returns (class, dtype) -> what was seen."""
    tallies: dict[tuple[str, str], Tally] = collections.defaultdict(Tally)
    for width, scale in itertools.product(widths, SCALES):
        started = time.perf_counter()
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            with tempfile.TemporaryDirectory() as scratch:
                folder = pathlib.Path(scratch)
                write_checkpoint(folder, width, scale, seed)
                exact = load_model(folder, "float64", "cpu")
                huggingface = seed < HUGGINGFACE_SEEDS and hf_reference.available()
                for dtype in DTYPES:
                    same = load_model(folder, dtype, "cpu")
                    for length in LENGTHS:
                        inputs = batch(length, seed)
                        for side, dump in right_dumps(folder, inputs, dtype, huggingface):
                            label = f"width {width}, length {length}, scale {scale}, seed {seed}, {side} {dtype},"
                            examine(label, (exact, same), inputs, dump, tallies, generator)
        print(f"width {width}, scale {scale}: {seeds} seeds, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return tallies


def report(tallies: Mapping[tuple[str, str], Tally]) -> bool:
    """Prints the table; returns whether every budget held and bit."""
    print(
        "class      | dtype    | k | clean stages | worst share | disturbed | flagged | budget / norm: median, largest"
    )
    for (name, dtype), tally in sorted(tallies.items(), key=lambda item: (list(FACTORS).index(item[0][0]), item[0][1])):
        relative = f"{np.median(tally.relative):.1e} {max(tally.relative):.1e}" if tally.relative else "exact"
        print(
            f"{name:10} | {dtype:8} | {FACTORS[name]:.0f} | {tally.stages:12} | {tally.share:11.2f} |"
            f" {tally.disturbed:9} | {tally.disturbed - len(tally.missed):7} | {relative}"
        )
    wrong = [line for tally in tallies.values() for line in (*tally.beyond, *tally.missed)]
    for line in wrong[:40]:
        print(f"WRONG: {line}")
    return bool(tallies) and not wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--widths", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    args = parser.parse_args(argv)
    good = report(sweep(args.widths, args.seeds))
    if not hf_reference.available():
        print("NOT RUN: HuggingFace (no torch)")
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
