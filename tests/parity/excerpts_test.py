"""Long sequences by excerpts: what begins at a position is named, and so is the position, without whole scores."""

import functools
import json
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax import open_checkpoint
from apr_jax.load.load_model import load_model
from apr_jax.parity import excerpts
from apr_jax.parity.diagnose import diagnose
from apr_jax.trace.inputs import Excerpt, seeded
from tests import paths
from tests.bench import long_engine
from tests.bench.parity_long_bench import named

pytestmark = pytest.mark.slow

MODEL, LENGTH, BEGINS = paths.checkpoint("gqa_tied_bf16"), 300, 200
load = functools.lru_cache(load_model)


@functools.cache
def engine():
    with open_checkpoint(MODEL) as checkpoint:
        weights = {name: tensor.read().astype(np.float32) for name, tensor in checkpoint.tensors.items()}
    return weights, json.loads((pathlib.Path(MODEL) / "config.json").read_text())


class ExcerptsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        # So that what is short is taken for long: scores of 300 positions, excerpts of 100.
        self.enter_context(mock.patch.object(excerpts, "_MOST_BYTES", 1 << 20))
        self.enter_context(mock.patch.dict(excerpts._EXCERPT_BYTES, cpu=100 * 8 * 4 * LENGTH))
        self.enter_context(mock.patch.dict(excerpts._STEPS, cpu=1))
        self.inputs = seeded(283, 1, LENGTH)
        self.exact, self.same = (load(MODEL, dtype, "cpu") for dtype in ("float64", "float32"))

    def dump(self, mistake, step=32, **where):
        columns = long_engine.sampled(LENGTH, step)
        return long_engine.dump(*engine(), self.inputs.input_ids, mistake, BEGINS, columns, **where), columns[None]

    def diagnosed(self, values, columns):
        found = diagnose(self.exact, self.same, self.inputs, values, columns)
        return found, {site.key: site.first[1] for site in found.localisation.sites if site.wrong}

    @parameterized.parameters("restart", "window", "chunk", "stale", None)
    def test_what_begins_at_a_position_is_named_and_so_is_the_position(self, mistake):
        found, firsts = self.diagnosed(*self.dump(mistake))
        self.assertEqual(sum(site.elements > 0 for site in found.localisation.sites), 33)
        if mistake is None:
            self.assertEqual((found.findings, firsts), ((), {}))
            return
        self.assertTrue(named(found.findings, mistake, BEGINS), found.findings)
        self.assertEqual(min(firsts.values()), BEGINS)
        # Behind the whole stages that show it, so do none of the others before.
        self.assertEqual(
            {firsts[key] for key in firsts if key.endswith(("k_post_rope", "post_ffn_residual"))}, {BEGINS}
        )

    def test_whole_and_sampled_stages_are_judged_where_they_were_dumped(self):
        values, columns = self.dump(None)
        found, _ = self.diagnosed(values, columns)
        elements = {site.key: site.elements for site in found.localisation.sites}
        self.assertEqual(elements["stage.1.post_ffn_residual"], LENGTH * 64)
        self.assertEqual(elements["stage.1.attn_norm"], columns.size * 64)

    def test_one_wrong_value_between_the_sampled_positions_is_seen(self):
        values, columns = self.dump(None)
        values["stage.0.post_ffn_residual"] = values["stage.0.post_ffn_residual"].copy()
        values["stage.0.post_ffn_residual"][0, 211, 5] += 1.0
        _, firsts = self.diagnosed(values, columns)
        # What was dumped behind it was computed without it: at its position, and in attention at the next sampled one.
        behind = {"stage.1.k_post_rope": 211, "stage.1.post_ffn_residual": 211, "stage.1.attention": 224}
        self.assertEqual(firsts, {"stage.0.post_ffn_residual": 211, **behind})

    def test_what_reads_keys_that_nobody_knows_is_not_judged(self):
        """Rows of some positions alone: products and norms are judged, attention is not, and nothing is found in it."""
        values, columns = self.dump(None)
        rows = {key: value if value.shape[1] != LENGTH else value[:, columns[0]] for key, value in values.items()}
        found, firsts = self.diagnosed(rows, columns)
        stages = {site.key for site in found.localisation.sites}
        self.assertEqual((found.findings, firsts), ((), {}))
        self.assertContainsSubset({"stage.1.attn_norm", "stage.1.ffn_out", "stage.1.q_post_rope"}, stages)
        self.assertNotIn("stage.1.attention", stages)

    def test_an_excerpt_is_computed_as_the_whole_is(self):
        whole = self.exact.trace(self.inputs)
        columns = np.array([3, 77, 150, 299])
        excerpt = Excerpt.taken(self.inputs, columns)
        cached = [(whole[f"stage.{n}.k_post_rope"], whole[f"stage.{n}.qkv_bias"][..., -32:]) for n in range(2)]
        context = lambda layer: tuple(each.reshape(1, LENGTH, 2, 16) for each in cached[layer])  # noqa: E731
        for key, value in self.exact.trace(excerpt, context=context).items():
            axis = 2 if value.ndim == 4 else 1
            np.testing.assert_allclose(value, whole[key].take(columns, axis), rtol=1e-9, atol=1e-9, err_msg=key)


if __name__ == "__main__":
    absltest.main()
