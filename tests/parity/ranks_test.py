"""Dumps of tensor-parallel ranks: right ones are put together, and what ranks do wrong is named, alone and stacked.

The ranks are cut out of the NumPy engine's run here, by a plan of their own (Megatron's: columns of q, k, v, gate, up
and head; rows of o and down; the vocabulary's rows; positions under sequence parallelism), not as `ranks` merges them.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.parity import ranks
from apr_jax.trace.stages import Key
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench

pytestmark = pytest.mark.slow

GQA, MHA, MQA = "gqa_tied_bf16", "mha_untied_f32_sharded", "mqa_f16"
ALIKE = ("attn_norm", "ffn_norm", "final_norm", "post_attn_residual", "post_ffn_residual", "attn_out", "ffn_out")
Blocks = list[np.ndarray]
Change = Callable[[int, str, np.ndarray], np.ndarray]


@functools.cache
def bench(name: str) -> Bench:
    return Bench.of(name)


def cut(dump: dict[str, np.ndarray], config: dict, count: int, sequence: bool = False) -> dict[str, Blocks]:
    """What each rank holds of every stage."""
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads

    def of_heads(value: np.ndarray, first: int, number: int, rank: int) -> np.ndarray:
        """A rank's heads of one projection; where there are fewer than ranks, several ranks hold each."""
        mine = range(rank * number // count, max((rank + 1) * number // count, rank * number // count + 1))
        return np.concatenate([value[..., (first + h) * width : (first + h + 1) * width] for h in mine], -1)

    def share(stage: str, value: np.ndarray, rank: int) -> np.ndarray:
        if stage in ("attn_scores", "attn_softmax"):
            return value[:, rank * heads // count : (rank + 1) * heads // count]
        if stage in ("qkv_matmul", "qkv_bias"):
            firsts = ((0, heads), (heads, kv), (heads + kv, kv))
            return np.concatenate([of_heads(value, *which, rank) for which in firsts], -1)
        if stage in ("q_post_rope", "attention"):
            return of_heads(value, 0, heads, rank)
        if stage == "k_post_rope":
            return of_heads(value, 0, kv, rank)
        if stage in ("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "logits"):
            size = value.shape[-1] // count
            return value[..., rank * size : (rank + 1) * size]
        if sequence:
            size = value.shape[1] // count
            return value[:, rank * size : (rank + 1) * size]
        return value

    return {key: [share(Key(key).stage, value, rank) for rank in range(count)] for key, value in dump.items()}


def partial_sums(held: dict[str, Blocks], weights: dict[str, np.ndarray], stage: str, layers: range) -> None:
    """Puts what each rank gives to a sum in the place of the sum: its columns of o_proj or down_proj. The last one's is
    what the others leave, so that the sum is the engine's to the last bit or two."""
    source, tensor = {"attn_out": ("attention", "self_attn.o_proj"), "ffn_out": ("ffn_swigl", "mlp.down_proj")}[stage]
    for layer in layers:
        blocks, columns = held[f"stage.{layer}.{source}"], 0
        weight = weights[f"model.layers.{layer}.{tensor}.weight"].astype(np.float64)
        left = held[f"stage.{layer}.{stage}"][0]
        for rank, block in enumerate(blocks[:-1]):
            part = (block @ weight[:, columns : columns + block.shape[-1]].T).astype(np.float32)
            held[f"stage.{layer}.{stage}"][rank], left = part, left - part
            columns += block.shape[-1]
        held[f"stage.{layer}.{stage}"][-1] = left


class RanksTestCase(parameterized.TestCase):
    def held(self, name: str, count: int, *faults: Planted, sequence: bool = False) -> dict[str, Blocks]:
        return cut(bench(name).dump(faults), bench(name).config, count, sequence)

    def findings(self, name: str, held: dict[str, Blocks]) -> list:
        this = bench(name)
        sorted_out = {
            key: ranks.sort_out(
                key, [block.ravel() for block in blocks], this.exact.config, this.inputs, None, pathlib.Path()
            )
            for key, blocks in held.items()
        }
        values, found = ranks.judge(this.exact, this.inputs, sorted_out, None)
        rest = this.diagnose(values).findings
        return [*found, *(ranks.attributed(finding, sorted_out, this.exact.config) for finding in rest)]

    def named(self, name: str, held: dict[str, Blocks]) -> list[str]:
        return [finding.fault for finding in self.findings(name, held)]


class RightRanksTest(RanksTestCase):
    @parameterized.parameters((GQA, 4, False), (MHA, 2, True), (MQA, 4, False))
    def test_parts_are_put_together_and_nothing_is_found(self, name, count, sequence):
        held = self.held(name, count, sequence=sequence)
        self.assertEqual(self.named(name, held), [])
        this, whole = bench(name), bench(name).dump(())
        for key, blocks in held.items():
            flat = [block.ravel() for block in blocks]
            parts = ranks.sort_out(key, flat, this.exact.config, this.inputs, None, pathlib.Path())
            np.testing.assert_array_equal(ranks.merged(key, parts, this.exact.config), whole[key], key)

    def test_sums_that_were_dumped_before_they_were_made_are_made(self):
        held, count = self.held(GQA, 2), 2
        for stage in ("attn_out", "ffn_out"):
            partial_sums(held, bench(GQA).weights, stage, range(2))
        ids, vocabulary = bench(GQA).inputs.input_ids, bench(GQA).config["vocab_size"]
        for rank, block in enumerate(held["stage.embedding"]):
            mine = (ids * count // vocabulary == rank)[..., None]
            held["stage.embedding"][rank] = np.where(mine, block, 0).astype(np.float32)
        self.assertEqual(self.named(GQA, held), [])


ORDINARY = {
    "rope-adjacent-pairs": Planted("rope-adjacent-pairs"),
    "rms-norm-eps": Planted("rms-norm-eps", None, {"eps": 1e-4}),
    "embedding-row-off-by-one": Planted("embedding-row-off-by-one"),
    "gate-up-swapped": Planted("gate-up-swapped"),
}


class WrongRanksTest(RanksTestCase):
    @parameterized.parameters((GQA, (1, 0), False), (MHA, (2, 0, 3, 1), True), (MQA, (0, 2, 1, 3), False))
    def test_ranks_in_another_order(self, name, order, sequence):
        held = self.held(name, len(order), sequence=sequence)
        moved = {key: [blocks[place] for place in order] for key, blocks in held.items()}
        (finding,) = self.findings(name, moved)
        self.assertEqual(finding.fault, "rank-order")
        self.assertEqual(finding.parameters["order"], ", ".join(str(order.index(rank)) for rank in range(len(order))))

    @parameterized.parameters(
        (GQA, "embedding-row-off-by-one", (2, 0, 3, 1)), (MHA, "gate-up-swapped", (1, 0)), (GQA, "rms-norm-eps", (1, 0))
    )
    def test_ranks_in_another_order_beside_another_mistake(self, name, ordinary, order):
        held = self.held(name, len(order), ORDINARY[ordinary])
        moved = {key: [blocks[place] for place in order] for key, blocks in held.items()}
        self.assertEqual(self.named(name, moved), ["rank-order", ordinary])

    def without_all_reduce(self, name: str, count: int, stage: str, layer: int, *faults: Planted, dumped: bool):
        """Ranks that go on with their own part of a sum: residual stream and all behind it are each rank's own."""
        held = self.held(name, count, *faults)
        partial_sums(held, bench(name).weights, stage, range(layer, layer + 1))
        parts, reader = held[f"stage.{layer}.{stage}"], f"stage.{layer}.post_{stage.removesuffix('_out')}_residual"
        total, keys = np.sum(parts, axis=0), list(held)
        for rank in range(count):
            held[reader][rank] = held[reader][rank] - total + parts[rank]
        generator = np.random.default_rng(0)
        for key in keys[keys.index(reader) + 1 :]:
            held[key] = [block * generator.normal(1, 0.5, block.shape).astype(np.float32) for block in held[key]]
        if not dumped:
            del held[f"stage.{layer}.{stage}"]
        return held

    @parameterized.parameters(
        (GQA, 2, "attn_out", 0, True), (MHA, 4, "ffn_out", 1, True), (MHA, 2, "attn_out", 1, False)
    )
    def test_a_missing_all_reduce(self, name, count, stage, layer, dumped):
        (finding,) = self.findings(name, self.without_all_reduce(name, count, stage, layer, dumped=dumped))
        self.assertEqual((finding.fault, finding.layers, finding.stage), ("all-reduce-missing", (layer,), stage))
        self.assertEqual(finding.parameters["ranks"], count)

    @parameterized.parameters("rope-adjacent-pairs", "embedding-row-off-by-one")
    def test_a_missing_all_reduce_beside_another_mistake(self, ordinary):
        held = self.without_all_reduce(GQA, 2, "attn_out", 1, ORDINARY[ordinary], dumped=True)
        self.assertEqual(self.named(GQA, held), ["all-reduce-missing", ordinary])

    @parameterized.parameters(
        (GQA, 2, ["qkv-bias-twice"]), (MHA, 4, ["qkv-bias-twice"]), (MQA, 2, ["ranks-apart", "q-bias-twice"])
    )
    def test_a_bias_that_one_rank_adds_twice(self, name, count, expected):
        """Of the KV head that both ranks of MQA hold, the first one's is judged, and that it is not the other's."""
        right = self.held(name, count)
        held, wrong = right, self.held(name, count, Planted("qkv-bias-twice"))
        held["stage.0.qkv_bias"][1] = wrong["stage.0.qkv_bias"][1]
        # What follows is the wrong rank's own: it is computed from its biases.
        for key in [key for key in held if key.startswith("stage.0.")][3:]:
            del held[key]
        held = {key: blocks for key, blocks in held.items() if not key.startswith("stage.1.") and key.count(".") == 2}
        found = self.findings(name, held)
        self.assertEqual([finding.fault for finding in found], expected)
        self.assertEqual(found[-1].parameters["rank"], 1)
        self.assertIn("rank 1 holds", found[-1].sentence)

    @parameterized.parameters(["norm-weight-plus-one"])
    def test_one_rank_whose_norm_is_another(self, mistake):
        alone = Planted(mistake, (0,), {"norms": ["post_attention_layernorm"]})
        held, wrong = self.held(GQA, 2), self.held(GQA, 2, alone)
        held["stage.0.ffn_norm"][1] = wrong["stage.0.ffn_norm"][1]
        found = self.findings(GQA, held)
        self.assertEqual([finding.fault for finding in found], ["ranks-apart", mistake])
        self.assertEqual((found[0].layers, found[0].stage, found[0].parameters["ranks"]), ((0,), "ffn_norm", (1,)))

    def test_kv_heads_that_ranks_share_and_that_are_not_alike(self):
        held = self.held(MQA, 2)
        block = held["stage.1.qkv_bias"][1].copy()
        block[..., -1] += 0.5
        held["stage.1.qkv_bias"][1] = block
        found = self.findings(MQA, held)
        self.assertEqual([finding.fault for finding in found], ["ranks-apart"])
        self.assertEqual(found[0].parameters["ranks"], (1,))


if __name__ == "__main__":
    absltest.main()
