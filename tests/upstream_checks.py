"""Upstream's checks S1 to S27 as one table: its bound, ours, what was measured, and whether it holds.

    python tests/upstream_checks.py [--report FILE]

Each row examines one thing (`Row.right`) that it is given, so that a test can give it another one that breaks what the
row is about (`Row.planted`), which has to turn it red. Rows of published weights run where `$QWEN2_DIR` names a folder
of Qwen2.5-Coder-0.5B; elsewhere their logic runs on data with the same statistics, and the table says so. Rows that
need a trainer are not applicable. Exits 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.convert.plan import CastRule, make_plan
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError
from apr_jax.converters.formats import casts
from apr_jax.converters.inspect import checks
from apr_jax.converters.verify.comparison import compare
from apr_jax.load.load_model import load_model
from apr_jax.model import language_model, qwen2
from apr_jax.testing.sample import SAMPLES
from apr_jax.trace import compare as traces
from apr_jax.trace import stages
from apr_jax.trace.compare import relative_l2
from apr_jax.trace.inputs import Inputs
from tests import oracle, paths
from tests.battery.faulty_forward import Planted, forward

TIED, UNTIED = paths.checkpoint("gqa_tied_bf16"), paths.checkpoint("odd_sizes")
F32 = paths.checkpoint("mha_untied_f32_sharded")
QWEN2 = os.environ.get("QWEN2_DIR", "")
HALF = SAMPLES["qwen2_0.5b"].config


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a row saw.

    Attributes:
      text: The figures.
      holds: Whether our bound holds.
    """

    text: str
    holds: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One of upstream's checks.

    Attributes:
      name: S1 to S27.
      test: What upstream calls it.
      kind: "container", "forward", "real weights" or "not applicable".
      bound: Upstream's.
      ours: Ours, at least as strict; of what is not applicable, why.
      check: Measures a subject.
      right: Makes the subject: our code, or published weights.
      planted: Makes one that breaks what the row is about.
    """

    name: str
    test: str
    kind: str
    bound: str
    ours: str
    check: Callable[[Any], Measured] | None = None
    right: Callable[[], Any] | None = None
    planted: Callable[[], Any] | None = None


def all_of(**seen: bool) -> Measured:
    """A row of several yes-or-no questions."""
    failed = [name.replace("_", " ") for name, holds in seen.items() if not holds]
    return Measured(f"not: {', '.join(failed)}" if failed else f"all {len(seen)} hold", not failed)


def error_of(function: Callable[[], Any]) -> str:
    """The text of the error that something is refused with; "" where it is not."""
    try:
        function()
    except AprJaxError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def scratch():
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


def variant(folder: pathlib.Path, name: str, change: Callable[[dict[str, Any]], None], **config: Any) -> pathlib.Path:
    """Writes UNTIED in float32 with changed tensors and configuration; returns its folder."""
    place = folder / name
    shutil.copytree(UNTIED, place)
    tensors = {key: value.astype(np.float32) for key, value in oracle.load(UNTIED)[0].items()}
    change(tensors)
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, place / "model.safetensors"
    )
    content = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(content))
    return place


def nothing(tensors: dict[str, Any]) -> None:
    """Leaves the tensors as they are."""


# --- Real weights ----------------------------------------------------------------------------------------------------


def like_published() -> dict[str, np.ndarray]:
    """An embedding and a norm with the statistics that upstream reports of the published weights."""
    random = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": random.normal(0.00014, 0.0152, (4096, 64)),
        "model.norm.weight": random.normal(7.46, 0.84, 4096),
    }


def published() -> dict[str, np.ndarray]:
    with open_checkpoint(QWEN2) as checkpoint:
        return {name: checkpoint.tensors[name].read().astype(np.float64) for name in like_published()}


def relabelled() -> dict[str, np.ndarray]:
    """The same bytes, bf16 read as f16."""
    bits = {name: value.astype(ml_dtypes.bfloat16) for name, value in like_published().items()}
    return {name: value.view(np.float16).astype(np.float64) for name, value in bits.items()}


def s1(weights: Mapping[str, np.ndarray]) -> Measured:
    embedding, norm = weights.values()
    mean, std = float(embedding.mean()), float(embedding.std())
    holds = abs(mean) < 0.01 and 0.01 <= std <= 0.1 and 1 < norm.mean() < 20 and norm.std() < 10
    return Measured(
        f"embedding mean {mean:.5f}, std {std:.4f}; norm mean {norm.mean():.2f}, std {norm.std():.2f}", holds
    )


RECORDED = {"min": -15.03, "max": 11.72, "mean": -3.33, "std": 2.65}


def like_recorded(argmax: int = 9370) -> tuple[int, np.ndarray]:
    """Logits with the statistics that upstream recorded for the token 100."""
    logits = np.random.default_rng(1).normal(size=HALF.vocab_size)
    logits = np.clip((logits - logits.mean()) / logits.std(), -4.2, 5.0) * RECORDED["std"] + RECORDED["mean"]
    logits[argmax], logits[7] = RECORDED["max"], RECORDED["min"]
    return len(HALF.tensor_shapes()), logits


def published_logits() -> tuple[int, np.ndarray]:
    model = load_model(QWEN2, "float32", "cpu")
    return len(jax.tree.leaves(model.parameters)), np.asarray(model([[100]]))[0, 0].astype(np.float64)


def s2(subject: tuple[int, np.ndarray]) -> Measured:
    count, logits = subject
    found = {"min": logits.min(), "max": logits.max(), "mean": logits.mean(), "std": logits.std()}
    z, argmax = (found["max"] - found["mean"]) / found["std"], int(logits.argmax())
    near = all(abs(found[name] - value) < 0.05 for name, value in RECORDED.items())
    holds = count == 290 and bool(np.isfinite(logits).all()) and near and z > 5 and argmax == 9370
    said = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    return Measured(f"{count} parameters; {said}; z {z:.2f}; argmax {argmax}", holds)


_TEXT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n"


def published_loss() -> float:
    from apr_jax.generate.tokenizer import Tokenizer

    with open_checkpoint(QWEN2) as checkpoint:
        inputs = Inputs.of([Tokenizer.of(checkpoint).encode(_TEXT)])
    return traces.loss_nats(np.asarray(load_model(QWEN2, "float32", "cpu").logits(inputs)), inputs)


def confident_loss(sharpness: float) -> float:
    """The loss of logits that favour the right token by so much, over Qwen's vocabulary."""
    ids = np.random.default_rng(2).integers(0, HALF.vocab_size, (1, 8))
    logits = np.zeros((1, 8, HALF.vocab_size), np.float32)
    np.put_along_axis(logits[:, :-1], ids[:, 1:, None], sharpness, axis=-1)
    return traces.loss_nats(logits, Inputs.of(ids))


def s27(loss: float) -> Measured:
    return Measured(f"{loss:.2f} nats = {loss / math.log(2):.2f} bits", loss < 6.0)


# --- Loading and configuration ---------------------------------------------------------------------------------------


def lenient_load(folder: Any) -> Any:
    """Takes whatever comes: the mistake."""
    try:
        return load_model(folder, device="cpu")
    except AprJaxError:
        return load_model(UNTIED, device="cpu")


def s3(load: Callable[[Any], Any]) -> Measured:
    norm = "model.layers.1.input_layernorm.weight"
    with scratch() as folder:
        fine = variant(folder, "fine", nothing)
        short = variant(folder, "short", lambda t: t.update({norm: t[norm][:-1]}))
        missing = variant(folder, "missing", lambda t: t.pop(norm))
        count = len(jax.tree.leaves(load(fine).parameters))
        of_short, of_missing = (error_of(lambda place=place: load(place)) for place in (short, missing))
        tied = len(jax.tree.leaves(load(_with_tied_head(folder)).parameters))
    return all_of(
        every_parameter=count == len(oracle.load(UNTIED)[0]),
        a_tied_head_beside_is_left=tied == len(oracle.load(TIED)[0]),
        wrong_length_names_tensor_and_length=norm in of_short and "65" in of_short,
        missing_names_the_tensor=norm in of_missing,
    )


def _with_tied_head(folder: pathlib.Path) -> pathlib.Path:
    convert(str(TIED), str(folder / "with-head"), to="safetensors", tied_head="copy")
    return folder / "with-head"


def s4(opened: Callable[[Any], Any]) -> Measured:
    missing = error_of(lambda: opened("/no/such/model.safetensors"))
    with opened(UNTIED) as checkpoint:
        signature = {name: (tensor.dtype.name, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    shapes = {name: value.shape for name, value in oracle.load(UNTIED)[0].items()}
    return all_of(
        a_missing_file_is_named="/no/such/model.safetensors" in missing,
        names_types_and_shapes=signature == {name: ("bf16", shape) for name, shape in shapes.items()},
    )


def silent_open(path: Any) -> Any:
    """Opens something else where nothing is: the mistake."""
    return open_checkpoint(path if os.path.exists(path) else UNTIED)


def s5(read: Callable[[Mapping[str, Any]], Qwen2Config]) -> Measured:
    content = json.loads((UNTIED / "config.json").read_text())
    half = content | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    }  # fmt: skip
    found = read(half)
    copied = {
        "vocab_size": found.vocab_size, "hidden_size": found.hidden_size, "intermediate_size": found.intermediate_size,
        "num_hidden_layers": found.num_layers, "num_attention_heads": found.num_heads,
        "num_key_value_heads": found.num_kv_heads, "head_dim": found.head_dim, "rope_theta": found.rope_theta,
        "rms_norm_eps": found.rms_norm_eps, "tie_word_embeddings": found.tie_word_embeddings,
        "max_position_embeddings": found.max_position_embeddings,
    }  # fmt: skip
    return all_of(
        every_field_is_copied=all(half[name] == value for name, value in copied.items()),
        gqa_ratio_is_7=found.num_heads / found.num_kv_heads == 7,
        no_number_is_refused_by_name="hidden_size" in error_of(lambda: read(half | {"hidden_size": "x"})),
        another_is_another=read(content) != found,
    )


def read_config(content: Mapping[str, Any]) -> Qwen2Config:
    return Qwen2Config.from_hf(dict(content))


def as_mha(content: Mapping[str, Any]) -> Qwen2Config:
    """Forgets that keys and values have fewer heads: the mistake."""
    found = read_config(content)
    return dataclasses.replace(found, num_kv_heads=found.num_heads)


class Loads:
    """Loads models, and counts what goes to a device."""

    def __init__(self, load: Callable[[Any], Any]):
        self._load, self.placed = load, 0

    def refused(self, folder: Any) -> str:
        """The refusal of a folder; counts arrays that were put on a device before it."""
        put = jax.device_put

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.placed += 1
            return put(*args, **kwargs)

        jax.device_put = counted
        try:
            return error_of(lambda: self._load(folder))
        finally:
            jax.device_put = put


def s6(load: Callable[[Any], Any]) -> Measured:
    with scratch() as folder:
        encoder = variant(folder, "encoder", nothing, model_type="roberta", architectures=["RobertaModel"])
        # Not one tensor can be read: what refuses this read config.json first.
        (encoder / "model.safetensors").write_bytes(safetensors.numpy.save({"x": np.zeros(1, np.float32)}))
        alone = folder / "alone"
        alone.mkdir()
        shutil.copy(UNTIED / "model.safetensors", alone)
        loads = Loads(load)
        said, unpaired = loads.refused(encoder), loads.refused(alone)
        decoder = load(UNTIED)
    return all_of(
        decoder_accepted=decoder.config.num_layers == 2,
        encoder_refused_by_its_name="roberta" in said,
        decoder_only_is_said="qwen2" in said,
        before_any_tensor=loads.placed == 0,
        weights_without_configuration_refused="config.json" in unpaired,
    )


def any_family(folder: Any) -> Any:
    """Loads whatever it is told to be: the mistake."""
    with scratch() as place:
        copy = pathlib.Path(shutil.copytree(UNTIED, place / "copy"))
        return load_model(copy, device="cpu") if folder else None


def s11(load: Callable[[Any], Any]) -> Measured:
    with scratch() as folder:
        encoder = variant(folder, "encoder", nothing, model_type="bert", architectures=["BertModel"])
        alone = folder / "alone"
        alone.mkdir()
        shutil.copy(UNTIED / "model.safetensors", alone)
        loads = Loads(load)
        said = [loads.refused(place) for place in (encoder, alone)]
    return all_of(both_refused=all(said), each_by_name="bert" in said[0], no_device_was_used=loads.placed == 0)


def s7(family: Callable[[Sequence[str]], str | None]) -> Measured:
    layer = "model.layers.0.self_attn."
    with scratch() as folder:
        stamped = variant(folder, "stamped", nothing, model_type="llama")
        with open_checkpoint(stamped) as checkpoint:
            said = [check.sentence for check in checks.inspect(checkpoint) if check.name == "architecture"]
    return all_of(
        q_norm_is_qwen3=family([layer + "q_norm.weight", layer + "q_proj.bias"]) == "qwen3",
        bias_is_qwen2=family([layer + "q_proj.bias"]) == "qwen2",
        fused_is_qwen2=family([layer + "qkv_proj.weight"]) == "qwen2",
        else_llama=family([layer + "q_proj.weight"]) == "llama",
        gguf_names_are_skipped=family(["blk.0.attn_q.weight"]) is None,
        mismatch_names_both=len(said) == 1 and "llama" in said[0] and "qwen2" in said[0],
    )


# --- Forward passes --------------------------------------------------------------------------------------------------


def lcg_batch(vocabulary: int) -> np.ndarray:
    """4 sequences of 16 tokens from a linear congruential generator (Numerical Recipes' constants)."""
    state, ids = 42, []
    for _ in range(64):
        state = (1664525 * state + 1013904223) % 2**32
        ids.append(state % vocabulary)
    return np.array(ids).reshape(4, 16)


def our_loss(ids: np.ndarray) -> float:
    inputs = Inputs.of(ids)
    return traces.loss_nats(np.asarray(model(UNTIED).logits(inputs)), inputs)


@functools.cache
def model(folder: pathlib.Path) -> Any:
    return load_model(folder, "float32", "cpu")


def s9(loss: Callable[[np.ndarray], float]) -> Measured:
    weights, config = oracle.load(UNTIED)
    ids, uniform = lcg_batch(config["vocab_size"]), math.log(config["vocab_size"])
    found, right = loss(ids), oracle.loss_nats(oracle.forward(weights, config, ids)[0], ids)
    holds = math.isfinite(found) and 0.5 <= found <= 1.5 * uniform and abs(found - right) < 1e-5
    return Measured(f"{found:.4f} nats (uniform {uniform:.4f}), off by {abs(found - right):.1e}", holds)


def s12(norm: Callable[[Any, Any, float], Any]) -> Measured:
    x = 0.02 * np.sin(0.013 * np.arange(4 * 896)).reshape(4, 896)
    gamma = 1 + 0.1 * np.cos(0.005 * np.arange(896))
    right = gamma * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
    found = np.asarray(norm(jnp.asarray(x, jnp.float32), jnp.asarray(gamma, jnp.float32), 1e-6), np.float64)
    off = float(np.abs(found - right).max())
    return Measured(f"max abs {off:.1e}", off < 1e-5)


@jax.jit
def fused_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum and its norm in one program, as a layer has them."""
    total = x + residual
    return total, qwen2.rms_norm(total, weight, 1e-6)


def sloppy_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps the sum in bfloat16 on the way out: the mistake."""
    total, normed = fused_norm(x, residual, weight)
    return total.astype(jnp.bfloat16).astype(jnp.float32), normed


def s13(fused: Callable[..., Any]) -> Measured:
    random, begun = np.random.default_rng(4), time.perf_counter()
    x, residual = random.standard_normal((2, 4, 1536)).astype(np.float32)
    weight = (1 + 0.1 * random.standard_normal(1536)).astype(np.float32)
    total, normed = (np.asarray(value) for value in fused(x, residual, weight))
    seconds = time.perf_counter() - begun
    wide = (x + residual).astype(np.float64)
    right = weight * wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + 1e-6)
    same, off = bool((total == x + residual).all()), float(np.abs(normed - right).max())
    written = bool(np.abs(normed).min(axis=0).any() and (np.abs(normed).max(axis=-1) > 0).all())
    text = f"sum {'bit for bit' if same else 'off'}, norm max abs {off:.1e}, {seconds:.1f} s"
    return Measured(text, same and written and off < 1e-5 and seconds < 120)


def turned(theta: float) -> np.ndarray:
    """q of 2 heads of 64 at 4 positions, rotated by the tables that models get, from the cache that they share."""
    config = dataclasses.replace(HALF, num_heads=2, num_kv_heads=2, head_dim=64, rope_theta=theta)
    device = jax.devices("cpu")[0]
    cos, sin = (table[None, :4] for table in language_model._rotary_tables(config, 64, 4, device))
    return np.asarray(jax.jit(qwen2.rope)(jnp.asarray(_queries()), cos, sin), np.float64)


def _queries() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((1, 4, 2, 64)).astype(np.float32)


def theta_forgotten() -> Callable[[float], np.ndarray]:
    """A cache without theta in its key: the mistake."""
    kept: list[np.ndarray] = []

    def rotate(theta: float) -> np.ndarray:
        if not kept:
            kept.append(turned(theta))
        return kept[0]

    return rotate


def s14(rotate: Callable[[float], np.ndarray]) -> Measured:
    found, off = [], 0.0
    for theta in (1e4, 1e6, 1e4):
        angles = np.arange(4)[:, None] * oracle.inv_freq(theta, 64).astype(np.float64)
        cos, sin = (f(angles)[None, :, None] for f in (np.cos, np.sin))
        low, high = np.split(_queries().astype(np.float64), 2, axis=-1)
        right = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        found.append(rotate(theta))
        off = max(off, float(np.abs(found[-1] - right).max()))
    apart = float(np.abs(found[0] - found[1]).max())
    return Measured(f"{apart:.2f} apart; each within {off:.1e} of NumPy", apart > 1e-3 and off < 1e-5)


def our_logits(ids: np.ndarray) -> np.ndarray:
    return np.asarray(model(TIED)(ids))


def faulty_logits(name: str) -> Callable[[np.ndarray], np.ndarray]:
    weights, config = oracle.load(TIED)
    return lambda ids: forward(weights, config, ids, faults=[Planted(name)])[stages.LOGITS]


def s15(logits: Callable[[np.ndarray], np.ndarray]) -> Measured:
    weights, config = oracle.load(TIED)
    ids = np.random.default_rng(6).integers(0, config["vocab_size"], (1, 80))
    right = oracle.forward(weights, config, ids)[0]
    ours = relative_l2(np.asarray(logits(ids)), right)
    mutants = {
        name: relative_l2(faulty_logits(name)(ids), right) for name in ("rope-adjacent-pairs", "qkv-bias-missing")
    }
    said = ", ".join(f"{name} {value:.2f}" for name, value in mutants.items())
    # A bound that both mutations break, and no rounding.
    return Measured(f"relative L2 {ours:.1e}; {said}", ours < 1e-5 and min(mutants.values()) > 0.1)


def our_trace(ids: np.ndarray) -> Mapping[str, np.ndarray]:
    return model(TIED).trace(Inputs.of(ids))


def drifting_trace(ids: np.ndarray) -> Mapping[str, np.ndarray]:
    """The second layer gets another input than the first one's output: the mistake."""
    trace = dict(our_trace(ids))
    key = stages.Key.of(0, "post_ffn_residual")
    return trace | {str(key): trace[key] * 1.001}


def s16(trace: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> Measured:
    weights, config = oracle.load(TIED)
    ids = np.random.default_rng(7).integers(0, config["vocab_size"], (1, 80))
    ours, (_, right) = trace(ids), oracle.forward(weights, config, ids)
    keys = [stages.EMBEDDING, *(stages.Key.of(layer, "post_ffn_residual") for layer in range(2))]
    off = [relative_l2(np.asarray(ours[key]), right[key.removeprefix("stage.")]) for key in keys]
    # The first block alone, given what the pipeline gave it, is the pipeline's first block.
    alone = model(TIED).trace(Inputs.of(ids), [keys[1]], force={str(keys[0]): np.asarray(ours[keys[0]])})
    same = bool((np.asarray(alone[keys[1]]) == np.asarray(ours[keys[1]])).all())
    said = ", ".join(f"{value:.1e}" for value in off)
    return Measured(f"relative L2 {said}; block 0 alone {'equal' if same else 'differs'}", max(off) < 1e-5 and same)


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()


def jitted_anew(ids: np.ndarray) -> np.ndarray:
    """A program of its own for every call: the mistake."""
    return np.asarray(jax.jit(lambda x: x + len(COMPILATIONS.__dict__))(ids))


def s18(call: Callable[[np.ndarray], Any]) -> Measured:
    ids = np.random.default_rng(8).integers(0, 280, (1, 16))
    call(ids)
    before = COMPILATIONS.count
    for shift in range(1, 5):
        call((ids + shift) % 280)
    return Measured(f"{COMPILATIONS.count - before} in 4 calls", COMPILATIONS.count == before)


# --- Conversion ------------------------------------------------------------------------------------------------------


def s20(change: Callable[..., Any]) -> Measured:
    with scratch() as folder:
        change(str(F32), str(folder / "a.apr"), to="apr")
        change(str(folder / "a.apr"), str(folder / "hf"), to="safetensors")
        change(str(folder / "hf"), str(folder / "b.apr"), to="apr")
        with open_checkpoint(folder / "a.apr") as a, open_checkpoint(folder / "b.apr") as b:
            count = len(a.tensors)
            same = sum(
                name in b.tensors
                and (tensor.dtype, tensor.shape) == (b.tensors[name].dtype, b.tensors[name].shape)
                and b"".join(tensor.stream()) == b"".join(b.tensors[name].stream())
                for name, tensor in a.tensors.items()
            )
            names = a.tensors.keys() == b.tensors.keys()
    return Measured(f"{same} of {count} tensors bit for bit", names and same == count > 10)


def last_bit_lost(source: str, output: str, *, to: str) -> None:
    """The last byte of what is converted is another one: the mistake."""
    convert(source, output, to=to)
    if to == "safetensors":
        path = sorted(pathlib.Path(output).glob("*.safetensors"))[-1]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def gate(a: Any, b: Any) -> list[str]:
    """The tensors that verify calls unequal."""
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        return [tensor.name for tensor in compare(one, other, diagnose=False).unequal]


def first_ten(a: Any, b: Any) -> list[str]:
    """Looks at ten tensors: the mistake."""
    with open_checkpoint(a) as one:
        looked_at = list(one.tensors)[:10]
    return [name for name in gate(a, b) if name in looked_at]


def s21(named: Callable[[Any, Any], list[str]]) -> Measured:
    weights = {name: value.astype(np.float32) for name, value in oracle.load(F32)[0].items()}
    matrices = [name for name in sorted(weights) if weights[name].ndim == 2]
    right = 0
    with scratch() as folder:
        a, b = folder / "a.safetensors", folder / "b.safetensors"
        safetensors.numpy.save_file(weights, a)
        for name in matrices:
            wrong = np.ascontiguousarray(weights[name].T).reshape(weights[name].shape)
            safetensors.numpy.save_file({**weights, name: wrong}, b)
            right += named(a, b) == [name]
    beyond = sum(sorted(weights).index(name) > 10 for name in matrices)
    return Measured(
        f"{right} of {len(matrices)} named exactly, {beyond} beyond index 10", right == len(matrices) > 0 < beyond
    )


def s22(change: Callable[..., Any]) -> Measured:
    with scratch() as folder:
        change(str(UNTIED), str(folder / "bare.safetensors"), to="safetensors")
        (folder / "elsewhere").mkdir()
        bare = shutil.move(folder / "bare.safetensors", folder / "elsewhere")
        change(bare, str(folder / "again.apr"), to="apr")
        again = gate(UNTIED, folder / "again.apr")
        strange = variant(folder, "strange", lambda t: t.update({"model.layers.0.odd.weight": np.zeros(3, np.float32)}))
        other = variant(folder, "other", nothing, model_type="gpt2", architectures=["GPT2LMHeadModel"])
        unmapped = error_of(lambda: change(str(strange), str(folder / "s.apr"), to="apr"))
        warned = " ".join(make_plan_of(other, folder / "o.apr"))
        family = error_of(lambda: load_model(other, device="cpu"))
    return all_of(
        a_bare_export_comes_back=again == [],
        unmapped_tensors_are_refused_by_name="model.layers.0.odd.weight" in unmapped,
        another_family_is_warned_of_by_name="gpt2" in warned,
        and_refused_by_name_where_it_is_computed="gpt2" in family,
    )


def make_plan_of(source: pathlib.Path, output: pathlib.Path) -> Sequence[str]:
    """What a conversion warns of."""
    with open_checkpoint(source) as checkpoint:
        return make_plan(checkpoint, str(output), to="apr").warnings


def s23(cast: Callable[[bytes, str, str], bytes]) -> Measured:
    def bits(values: Sequence[int], kind: str, source: str, target: str) -> list[int]:
        return np.frombuffer(cast(np.array(values, kind).tobytes(), source, target), "<u2").tolist()

    def halves(*values: float) -> list[int]:
        return bits(np.array(values, "<f4").view("<u4").tolist(), "<u4", "f32", "f16")

    nan = bits([0x7F800001], "<u4", "f32", "bf16")[0]
    random = np.random.default_rng(9).integers(0, 2**32, 20000, dtype=np.uint64).astype("<u4")
    random = random[np.isfinite(random.view("<f4"))]
    brain = np.array(bits(random.tolist(), "<u4", "f32", "bf16"), "<u2")
    small = random.view("<f4")[np.abs(random.view("<f4")) < 65504]
    return all_of(
        up=bits([0x3F81C000], "<u4", "f32", "bf16") == [0x3F82],
        tie_to_even=bits([0x3F808000, 0x3F818000], "<u4", "f32", "bf16") == [0x3F80, 0x3F82],
        nan_stays=(nan & 0x7F80) == 0x7F80 and (nan & 0x7F) != 0,
        half=halves(255.99) == [0x5C00] and halves(65520.0) == [0x7C00],
        bf16_grid=bool((brain == random.view("<f4").astype(ml_dtypes.bfloat16).view("<u2")).all()),
        f16_grid=halves(*small.tolist()) == small.astype("<f2").view("<u2").tolist(),
    )


def our_cast(data: bytes, source: str, target: str) -> bytes:
    return bytes(casts.cast(data, source, target)[0])


def truncating_cast(data: bytes, source: str, target: str) -> bytes:
    """Cuts bits off in place of rounding: the mistake."""
    if target == "bf16":
        return (np.frombuffer(data, "<u4") >> 16).astype("<u2").tobytes()
    return our_cast(data, source, target)


def inspected(folder: Any) -> str:
    """What the checks find wrong."""
    with open_checkpoint(folder) as checkpoint:
        return " ".join(check.sentence for check in checks.inspect(checkpoint) if check.passed is False)


def s24(look: Callable[[Any], str]) -> Measured:
    embedding, matrix = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"

    def zeros(share: float, name: str) -> Callable[[dict[str, Any]], None]:
        def change(tensors: dict[str, Any]) -> None:
            flat = tensors[name].reshape(-1)
            flat[np.random.default_rng(0).permutation(flat.size)[: int(share * flat.size)]] = 0

        return change

    def fill(name: str, value: float, rows: slice) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors[name].__setitem__(rows, value)

    rows = SAMPLES["odd_sizes"].config.vocab_size
    damages = {
        "embedding zeros": zeros(0.55, embedding),
        "weight zeros": zeros(0.85, matrix),
        "nan": fill(matrix, np.nan, slice(0, 1)),
        "inf": fill(matrix, np.inf, slice(0, 1)),
        "norm": fill(matrix, 1e-9, slice(None)),
        "dead rows": fill(matrix, 0.0, slice(0, 30)),
        "spot row": fill(embedding, 0.0, slice(rows // 2, rows // 2 + 1)),
        "head shape": lambda t: t.update({"lm_head.weight": np.ascontiguousarray(t["lm_head.weight"].T)}),
    }
    with scratch() as folder:
        seen = {"a_right_one_passes": look(variant(folder, "fine", nothing)) == ""}
        for name, damage in damages.items():
            seen[name.replace(" ", "_")] = look(variant(folder, name.replace(" ", "-"), damage)) != ""
    return all_of(**seen)


def s25(judged: Callable[[Any, Any], tuple[int, str]]) -> Measured:
    with scratch() as folder:
        for name in ("a", "b"):
            safetensors.numpy.save_file({f"{name}.weight": np.ones((2, 2), np.float32)}, folder / f"{name}.safetensors")
        code, said = judged(folder / "a.safetensors", folder / "b.safetensors")
    return all_of(no_success=code != 0, names_of_both_sides="a.weight" in said and "b.weight" in said)


def verified(a: Any, b: Any) -> tuple[int, str]:
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        found = compare(one, other)
    return found.exit_code, " ".join(found.notes)


def s26(change: Callable[..., Any]) -> Measured:
    found = {}
    with scratch() as folder:
        for form, settings in (
            ("bf16", {}),
            ("f16", {"cast": [CastRule.parse("f16")]}),
            ("int8", {"cast": [CastRule.parse("int8")]}),
        ):
            change(str(TIED), str(folder / f"{form}.apr"), to="apr", tied_head="copy", **settings)
            with open_checkpoint(folder / f"{form}.apr") as made:
                head, embedding = made.tensors.get("lm_head.weight"), made.tensors["model.embed_tokens.weight"]
                same = head is not None and head.shape == embedding.shape and head.dtype == embedding.dtype
                found[form] = same and b"".join(head.stream()) == b"".join(embedding.stream())
    return all_of(**found)


def headless(source: str, output: str, *, to: str, tied_head: str, **settings: Any) -> None:
    """Leaves the head out: the mistake."""
    del tied_head
    convert(source, output, to=to, tied_head="absent", **settings)


# --- The table -------------------------------------------------------------------------------------------------------

_TRAINER = "needs a trainer, which is out of scope"


def _fixed(value: Any) -> Callable[[], Any]:
    return lambda: value


def _cpu(folder: Any) -> Any:
    return load_model(folder, device="cpu")


ROWS = (
    Row(
        "S1",
        "falsify_h4_init_stats_qwen_embed_norm_sensible",
        "real weights",
        "embed |mean| < 0.05, std in [0.005, 0.5]; norm mean in (0.01, 100), std < 100",
        "|mean| < 0.01, std in [0.01, 0.1]; norm mean in (1, 20), std < 10",
        s1,
        published if QWEN2 else like_published,
        relabelled,
    ),
    Row(
        "S2",
        "falsify_h4_cpu_forward_qwen_logits_sensible",
        "real weights",
        "290 parameters; token 100: no NaN, no Inf, std > 0.01, z > 1.5, argmax < 151936",
        "290; finite; min, max, mean, std within 0.05 of those recorded; z > 5; argmax 9370",
        s2,
        published_logits if QWEN2 else like_recorded,
        lambda: like_recorded(9371),
    ),
    Row(
        "S3",
        "populate (4)",
        "forward",
        "count equals parameters; tied head ignored; wrong length and missing tensor named",
        "the same",
        s3,
        _fixed(_cpu),
        _fixed(lenient_load),
    ),
    Row(
        "S4",
        "loader (2)",
        "container",
        "missing file names its path; name -> (f32, shape)",
        "the same, with the file's own types",
        s4,
        _fixed(open_checkpoint),
        _fixed(silent_open),
    ),
    Row(
        "S5",
        "arch config (4)",
        "forward",
        "every field copied; ratio 14/2 = 7; no configuration gives Llama-370M",
        "the same; what is no number is refused by name, weights without a configuration in S6",
        s5,
        _fixed(read_config),
        _fixed(as_mha),
    ),
    Row(
        "S6",
        "family gate (4)",
        "forward",
        "decoder accepted, encoder refused by its names before tensors are loaded, unpaired refused",
        "the same",
        s6,
        _fixed(_cpu),
        _fixed(any_family),
    ),
    Row(
        "S7",
        "INV-INIT-ARCH-MATCH-001 (9)",
        "forward",
        "q_norm qwen3; q_proj.bias or qkv_proj qwen2; else llama; mismatch names both; GGUF skipped",
        "the same; `apr stamp` is upstream's",
        s7,
        _fixed(checks._family_of_names),
        lambda: lambda names: "llama",
    ),
    Row("S8", "RealValFn / StepFn", "not applicable", "empty hold-out NaN, exhausted data panic", _TRAINER),
    Row(
        "S9",
        "falsify_eval_batch_h1_sanity_bound",
        "forward",
        "4 x 16 tokens of an LCG: loss in [0.5, 1.5 ln V]",
        "that, and within 1e-5 of NumPy's",
        s9,
        _fixed(our_loss),
        lambda: lambda ids: 1.0,
    ),
    Row("S10", "falsify_eval_batch_h1_train_pollution", "not applicable", "drop < 0.95 after a step", _TRAINER),
    Row(
        "S11",
        "build_shared_cuda_trainer_with_init_rejects_*",
        "forward",
        "unpaired and encoder refused before the GPU is used",
        "the same for loading; the trainer's half is not applicable",
        s11,
        _fixed(_cpu),
        _fixed(any_family),
    ),
    Row(
        "S12",
        "falsify_cuda_rmsnorm_eps_parity_qwen_1e_minus_6",
        "forward",
        "max abs < 1e-4",
        "< 1e-5",
        s12,
        _fixed(qwen2.rms_norm),
        lambda: lambda x, w, eps: qwen2.rms_norm(x, w, 1e-5),
    ),
    Row(
        "S13",
        "falsify_cuda_fused_rmsnorm_distinct_residual_out_no_deadlock",
        "forward",
        "sum bit for bit; norm < 1e-4; < 120 s",
        "sum bit for bit; norm < 1e-5; < 120 s",
        s13,
        _fixed(fused_norm),
        _fixed(sloppy_norm),
    ),
    Row(
        "S14",
        "falsify_cuda_rope_theta_cache_key_distinct_thetas_yield_distinct_outputs",
        "forward",
        "max abs between thetas > 1e-3",
        "that, and each within 1e-5 of NumPy's",
        s14,
        _fixed(turned),
        theta_forgotten,
    ),
    Row(
        "S15",
        "falsify_cuda_nf4_train_loss_parity_001 (logits)",
        "forward",
        "relative L2 of full logits < 0.10",
        "< 1e-5; adjacent RoPE and missing biases > 0.10",
        s15,
        _fixed(our_logits),
        lambda: faulty_logits("rope-adjacent-pairs"),
    ),
    Row(
        "S16",
        "parity_probe_layer_bisect",
        "forward",
        "prints relative L2 of layer inputs; block 0 alone and in the pipeline",
        "each < 1e-5 against NumPy; block 0 equal",
        s16,
        _fixed(our_trace),
        _fixed(drifting_trace),
    ),
    Row(
        "S17",
        "..._003_device_layout_is_the_transpose",
        "not applicable",
        "LoRA A and B on the device are transposes",
        _TRAINER,
    ),
    Row(
        "S18",
        "falsify_cuda_prewarm_covers_runtime_no_jit_001",
        "forward",
        "0 compilations after warm-up",
        "0",
        s18,
        lambda: model(TIED),
        _fixed(jitted_anew),
    ),
    Row("S19", "cuda_trainer_gpu_falsify.rs", "not applicable", "twin trainers identical", _TRAINER),
    Row(
        "S20",
        "falsify_qfr_001_safetensors_roundtrip_is_bit_identical",
        "container",
        "names, dtype, shape, bytes of > 10 tensors",
        "the same",
        s20,
        _fixed(convert),
        _fixed(last_bit_lost),
    ),
    Row(
        "S21",
        "falsify_qfr_002_one_transposed_tensor_turns_the_gate_red",
        "container",
        "each 2-D F32 transposed in turn: that one named",
        "the same",
        s21,
        _fixed(gate),
        _fixed(first_ten),
    ),
    Row(
        "S22",
        "QFR-003..005",
        "container",
        "bare export re-imports alone; unmapped tensors and other families refused",
        "unmapped tensors refused by name; another family, whose bytes are not computed with, is converted with a "
        "warning that names it, and refused by name where it is loaded",
        s22,
        _fixed(convert),
        lambda: functools.partial(convert, as_is=True),
    ),
    Row(
        "S23",
        "BF16-ROUND, F16 RNE",
        "container",
        "listed bit patterns; IEEE grid",
        "the same, 20,000 random patterns",
        s23,
        _fixed(our_cast),
        _fixed(truncating_cast),
    ),
    Row(
        "S24",
        "tensor-layout FALSIFY-001..006",
        "container",
        "zeros < 50 % and 80 %, no NaN, Inf, L2 > 1e-6, dead rows < 25 %, spot rows, head [V, D]",
        "the same; each turned red by damage",
        s24,
        _fixed(inspected),
        lambda: lambda folder: "",
    ),
    Row(
        "S25",
        "COMPARE-HF-001..003",
        "container",
        "zero tensors compared fails, with a hint",
        "the same, names of both sides",
        s25,
        _fixed(verified),
        lambda: lambda a, b: (0, ""),
    ),
    Row(
        "S26",
        "CONVERT-TIED-LMHEAD-001/002",
        "container",
        "lm_head.weight written with the embedding's shape on all quant paths",
        "shape, type and bytes, in bf16, f16 and int8",
        s26,
        _fixed(convert),
        _fixed(headless),
    ),
    Row(
        "S27",
        "init-finetune 003",
        "real weights",
        "step-0 loss <= 8.35; init_loss < 6.0",
        "< 6.0",
        s27,
        published_loss if QWEN2 else lambda: confident_loss(12.0),
        lambda: confident_loss(0.0),
    ),
)


def measure(row: Row) -> Measured | None:
    """Measures a row; None where it is not applicable."""
    return None if row.check is None else row.check(row.right())


def table(measured: Mapping[str, Measured | None]) -> str:
    """The table in Markdown."""
    lines = ["| | kind | upstream's check | its bound | ours | measured | holds |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        found = measured[row.name]
        text, holds = ("", "not applicable") if found is None else (found.text, "yes" if found.holds else "**no**")
        if row.kind == "real weights" and not QWEN2:
            text = f"on data with the published statistics: {text}"
        cells = (row.name, row.kind, row.test, row.bound, row.ours, text, holds)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=pathlib.Path, help="write the table there as well")
    args = parser.parse_args()
    with contextlib.redirect_stderr(io.StringIO()):
        measured = {row.name: measure(row) for row in ROWS}
    made = table(measured)
    failed = [name for name, found in measured.items() if found is not None and not found.holds]
    print(made)
    if args.report:
        weights = "with published weights" if QWEN2 else "without published weights (`$QWEN2_DIR` names none)"
        versions = f"jax {jax.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}"
        head = (
            "# Upstream's checks S1 to S27\n\nMade by `make upstream-checks` on a CPU, "
            f"{time.strftime('%Y-%m-%d')}, {versions}, {weights}.\nFor each row that is measured "
            "`tests/upstream_checks_test.py` plants a violation, which turns it red.\n\n"
        )
        args.report.write_text(head + made + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
