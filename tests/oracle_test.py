"""The float64 oracle against properties that can be checked by hand, and against the dumps of the genuine `apr`."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import numpy as np
from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import oracle  # noqa: E402

CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir())
FIXTURES = pathlib.Path(os.environ.get("APR_FIXTURES", ROOT.parent / "shared" / "fixtures")) / "genuine"
# `apr import` 0.72.3 writes a placeholder for the tied head of these two and then reads zeros from it.
ZERO_HEADS = {"tiny_bf16_tied", "k256_bf16_tied"}


def _inputs(config: dict, batch: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(7).integers(0, config["vocab_size"], (batch, length))


def _relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _heads(config: dict) -> tuple[int, int, int]:
    n_q, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    return n_q, n_kv, config.get("head_dim") or config["hidden_size"] // n_q


class OracleTest(parameterized.TestCase):
    @parameterized.parameters(*NAMES)
    def test_a_token_changes_its_own_and_later_positions_only(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        ids = _inputs(config)
        other = ids.copy()
        other[:, 20] = (other[:, 20] + 1) % config["vocab_size"]
        before, _ = oracle.forward(weights, config, ids)
        after, _ = oracle.forward(weights, config, other)
        np.testing.assert_allclose(after[:, :20], before[:, :20], rtol=0, atol=1e-13)
        self.assertTrue((abs(after[:, 20:] - before[:, 20:]).max((0, 2)) > 1e-6).all())

    @parameterized.parameters(*NAMES)
    def test_rope_is_a_complex_rotation_of_the_two_halves(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        ids = _inputs(config)
        _, stages = oracle.forward(weights, config, ids)
        n_q, n_kv, dim = _heads(config)
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        angles = np.arange(ids.shape[1])[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
        turns = np.exp(1j * angles)[None, :, None]
        q = stages["0.qkv_bias"][..., : n_q * dim].reshape(2, -1, n_q, dim)
        k = stages["0.qkv_bias"][..., n_q * dim : (n_q + n_kv) * dim].reshape(2, -1, n_kv, dim)
        for value, found in ((q, stages["0.q_post_rope"]), (k, stages["0.k_post_rope"])):
            turned = (value[..., : dim // 2] + 1j * value[..., dim // 2 :]) * turns
            expected = np.concatenate([turned.real, turned.imag], -1)
            self.assertLess(_relative_l2(found.reshape(expected.shape), expected), 1e-6)
            np.testing.assert_array_equal(found[:, 0], value[:, 0].reshape(2, -1))  # position 0: the identity

    @parameterized.parameters(*NAMES)
    def test_query_head_h_reads_key_and_value_head_h_over_group(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        n_q, n_kv, dim = _heads(config)
        ids = _inputs(config)
        _, before = oracle.forward(weights, config, ids)
        q = before["0.q_post_rope"].reshape(2, -1, n_q, dim)
        k = before["0.k_post_rope"].reshape(2, -1, n_kv, dim)
        for head in range(n_q):
            scores = q[:, :, head] @ k[:, :, head * n_kv // n_q].swapaxes(1, 2) / np.sqrt(dim)
            np.testing.assert_allclose(before["0.attn_scores"][:, head], np.tril(scores), rtol=1e-12, atol=1e-12)
        silenced = dict(weights)
        rows = slice((n_kv - 1) * dim, n_kv * dim)
        for suffix in ("weight", "bias"):
            key = f"model.layers.0.self_attn.v_proj.{suffix}"
            silenced[key] = weights[key].copy()
            silenced[key][rows] = 0.0
        _, after = oracle.forward(silenced, config, ids)
        first_silent = n_q - n_q // n_kv
        found = after["0.attention"].reshape(2, -1, n_q, dim)
        self.assertTrue((found[:, :, first_silent:] == 0).all())
        np.testing.assert_array_equal(
            found[:, :, :first_silent], before["0.attention"].reshape(found.shape)[:, :, :first_silent]
        )

    @parameterized.parameters(*NAMES)
    def test_the_head_is_the_embedding_where_tied_and_its_own_matrix_elsewhere(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        logits, stages = oracle.forward(weights, config, _inputs(config))
        head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
        np.testing.assert_array_equal(logits, stages["final_norm"] @ head.T)
        self.assertEqual("lm_head.weight" in weights, not config["tie_word_embeddings"])

    @parameterized.product(name=NAMES, side=("left", "right"))
    def test_padding_on_either_side_changes_nothing_at_real_positions(self, name: str, side: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        ids = _inputs(config, batch=1, length=30)
        expected, _ = oracle.forward(weights, config, ids)
        pad = np.full((1, 9), 5)
        parts = [(pad, np.zeros_like(pad)), (ids, np.ones_like(ids))]
        if side == "right":
            parts.reverse()
        padded, mask = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
        logits, stages = oracle.forward(weights, config, padded, mask)
        np.testing.assert_allclose(logits[mask == 1], expected[0], rtol=0, atol=1e-12)
        self.assertTrue(np.isfinite(logits).all())
        real = stages["1.attn_softmax"][0][:, mask[0] == 1]
        self.assertTrue((real[..., mask[0] == 0] == 0).all())

    @parameterized.parameters(*NAMES)
    def test_rope_is_relative_so_shifted_positions_give_the_same_logits(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        ids = _inputs(config)
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        expected, _ = oracle.forward(weights, config, ids)
        same, _ = oracle.forward(weights, config, ids, position_ids=positions)
        np.testing.assert_array_equal(same, expected)
        shifted, _ = oracle.forward(weights, config, ids, position_ids=positions + 100)
        self.assertLess(_relative_l2(shifted, expected), 1e-4)  # the angles are float32
        stretched, _ = oracle.forward(weights, config, ids, position_ids=positions * 2)
        self.assertGreater(_relative_l2(stretched, expected), 1e-2)

    @parameterized.parameters(*NAMES)
    def test_probabilities_sum_to_one_over_visible_keys(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        _, stages = oracle.forward(weights, config, _inputs(config))
        for layer in range(config["num_hidden_layers"]):
            np.testing.assert_allclose(stages[f"{layer}.attn_softmax"].sum(-1), 1.0, rtol=1e-14)
            hidden = np.triu(np.ones((40, 40), bool), 1)
            self.assertTrue((stages[f"{layer}.attn_softmax"][..., hidden] == 0).all())
            self.assertTrue((stages[f"{layer}.attn_scores"][..., hidden] == 0).all())

    @parameterized.parameters(*NAMES)
    def test_the_sample_checkpoints_have_sane_logits_and_use_every_part(self, name: str) -> None:
        weights, config = oracle.load(CHECKPOINTS / name)
        ids = _inputs(config)
        logits, stages = oracle.forward(weights, config, ids)
        uniform = np.log(config["vocab_size"])
        self.assertBetween(oracle.loss_nats(logits, ids), 0.8 * uniform, 1.2 * uniform)
        self.assertBetween(logits.std(), 0.3, 3.0)
        for layer in range(config["num_hidden_layers"]):
            shares = stages[f"{layer}.attn_softmax"][:, :, 20:]
            self.assertBetween(float((shares.max(-1)).mean()), 0.1, 0.9)  # neither uniform nor one-hot
            for part in ("attn_out", "ffn_out"):
                share = np.linalg.norm(stages[f"{layer}.{part}"]) / np.linalg.norm(stages[f"{layer}.post_ffn_residual"])
                self.assertGreater(share, 0.1)

    def test_loss_counts_pairs_of_real_tokens_only(self) -> None:
        ids, mask = np.array([[0, 1, 2, 3]]), np.array([[0, 1, 1, 1]])
        logits = np.zeros((1, 4, 8))
        self.assertAlmostEqual(oracle.loss_nats(logits, ids), np.log(8), places=14)
        logits[0, 0, 1] = 50.0  # predicts from a padded position: must not count
        logits[0, 1, 2] = 50.0
        self.assertAlmostEqual(oracle.loss_nats(logits, ids, mask), np.log(8) / 2, places=12)


class InverseFrequencyTest(parameterized.TestCase):
    def test_pinned_bits_where_torch_is_not_correctly_rounded(self) -> None:
        # Qwen2.5-1.5B and 7B: theta 1e6, head_dim 128. Element 37 is one unit off the nearest float32, as torch has it.
        found = oracle.inv_freq(1e6, 128)
        nearest = np.float32(1) / (1e6 ** (np.arange(0, 128, 2) / 128)).astype(np.float32)
        self.assertEqual(np.flatnonzero(found != nearest).tolist(), [37])
        self.assertEqual(hex(found.view(np.int32)[37]), "0x39b229fb")
        np.testing.assert_array_equal(oracle.inv_freq(1e6, 64).view(np.int32)[[1, 31]], [0x3F263DE0, 0x35CEAF79])


@absltest.skipUnless(FIXTURES.is_dir(), f"no genuine dumps at {FIXTURES}; set APR_FIXTURES")
class GenuineDumpTest(absltest.TestCase):
    def test_every_stage_of_every_dump_of_the_genuine_apr_agrees(self) -> None:
        dumps = sorted(FIXTURES.glob("*/traces/plain"))
        self.assertLen(dumps, 6)
        zero_heads, worst, compared = set(), 0.0, 0
        for dump in dumps:
            name = dump.parts[-3]
            weights, config = oracle.load(dump.parents[1] / "hf")
            ids = json.loads((dump / "token_ids.json").read_text())
            logits, stages = oracle.forward(weights, config, [ids])
            for key, expected in {**stages, "lm_head": logits[:, -1]}.items():
                if key == "embedding":
                    path = dump / "layer-0" / "embedding.bin"
                elif "." in key:
                    path = dump / "layer-{}".format(key.split(".")[0]) / f"{key.split('.')[1]}.bin"
                else:
                    path = dump / f"{key}.bin"
                found = self._read(path, key).reshape(expected.shape)
                if key.endswith("attn_scores"):
                    found = np.tril(found)
                if key == "lm_head" and not found.any():
                    zero_heads.add(name)
                    continue
                error = _relative_l2(found, expected)
                self.assertLess(error, 1e-5, f"{name} {key}")
                worst, compared = max(worst, error), compared + 1
        self.assertEqual(zero_heads, ZERO_HEADS)
        print(f"{compared} stages of the genuine apr compared, worst relative L2 {worst:.1e}")
        self.assertEqual(compared, 5 * (2 * 17 + 3) + (17 + 3) - len(ZERO_HEADS))

    def _read(self, path: pathlib.Path, key: str) -> np.ndarray:
        raw = path.read_bytes()
        self.assertEqual(raw[:4], b"APRT", key)
        count = int.from_bytes(raw[8:12], "little")
        self.assertLen(raw, 12 + 4 * count)
        return np.frombuffer(raw, "<f4", offset=12).astype(np.float64)


if __name__ == "__main__":
    absltest.main()
