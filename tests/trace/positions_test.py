"""Dumps of some positions: which columns they stand for, and what stands in for the rest."""

import dataclasses
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import BrokenContainerError, MissingFileError, UsageError
from apr_jax.load.load_model import load_model
from apr_jax.model import qwen2
from apr_jax.parity.localise import localise
from apr_jax.testing import sample
from apr_jax.trace import stages
from apr_jax.trace.inputs import Inputs, seeded
from apr_jax.trace.positions import (
    compared_positions,
    complete,
    dumped_tokens,
    find_columns,
    gather_positions,
    last_columns,
    parse_positions,
    position_axis,
    scatter_positions,
    shown_positions,
    visible,
)
from tests import oracle, paths
from tests.battery.faulty_forward import forward

PADDED = Inputs.of([[9, 9, 1, 2, 3], [4, 5, 6, 7, 8]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


class PositionsTest(parameterized.TestCase):
    @parameterized.parameters(("7", [7]), ("64-66", [64, 65, 66]), ("0,64-66,70", [0, 64, 65, 66, 70]), ("3-3", [3]))
    def test_lists_name_both_ends(self, text, expected):
        self.assertEqual(parse_positions(text), expected)

    def test_files_hold_one_list_or_one_for_each_row(self):
        path = pathlib.Path(self.create_tempdir().full_path, "positions.json")
        for content, expected in (("[1, 2]", [1, 2]), ("[[0, 1], [3, 4]]", [[0, 1], [3, 4]])):
            path.write_text(content)
            self.assertEqual(parse_positions(str(path)), expected)
        for content, kind in (
            ("[", BrokenContainerError),
            ("[]", UsageError),
            ("5", UsageError),
            ("[1.5]", UsageError),
            ("[[1], 2]", UsageError),
            ("[[]]", UsageError),
            ("[true]", UsageError),
        ):
            path.write_text(content)
            with self.assertRaises(kind, msg=content):
                parse_positions(str(path))
        for text in ("64..71", "a", str(path.parent)):
            with self.assertRaises(MissingFileError, msg=text):
                parse_positions(text)
        with self.assertRaises(UsageError):
            parse_positions("8-7")

    def test_positions_are_found_behind_padding(self):
        np.testing.assert_array_equal(find_columns([1, 2], PADDED), [[3, 4], [1, 2]])
        np.testing.assert_array_equal(find_columns([[0], [4]], PADDED), [[2], [4]])
        np.testing.assert_array_equal(last_columns(PADDED), [[4], [4]])
        self.assertEqual(shown_positions(PADDED, np.array([[2, 3], [1, 4]])), "0-1, 4")

    @parameterized.parameters(
        ([3], "in row 0, rising"),
        ([1, 1], "in row 0, rising"),
        ([[0, 1], [4, 4]], "in row 1, rising"),
        ([2, 1], "in row 0, rising"),
        ([-1], "in row 0, rising"),
        ([[0], [0, 1]], "fit the batch"),
        ([[0]], "fit the batch"),
    )
    def test_positions_that_a_row_lacks_or_that_do_not_rise_are_refused(self, positions, said):
        with self.assertRaisesRegex(UsageError, said):
            find_columns(positions, PADDED)


class CountedTest(parameterized.TestCase):
    def test_a_query_sees_tokens_up_to_itself_as_in_programs(self):
        queries = np.array([[0, 4], [-1, 2]])
        keys = np.array([[0, 1, -1, 4, 9], [-1, 0, 1, 2, -1]])
        expected = [[[1, 0, 0, 0, 0], [1, 1, 0, 1, 0]], [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]]
        np.testing.assert_array_equal(visible(queries, keys), np.array(expected, bool))
        np.testing.assert_array_equal(visible(queries, keys), qwen2.visible(queries, keys))

    @parameterized.parameters(
        ("stage.0.ffn_up", (2, 5, 6)), ("stage.0.attn_scores", (2, 3, 5, 5)), ("logits", (2, 5, 9))
    )
    def test_of_a_partial_dump_its_rows_of_the_whole_count(self, key, shape):
        whole = compared_positions(key, PADDED, shape)
        self.assertEqual(whole.shape, shape if "scores" in key else shape[:2])
        columns = np.array([[0, 3], [2, 4]])
        rows = list(shape)
        rows[position_axis(key)] = 2
        counted = compared_positions(key, PADDED, tuple(rows), columns)
        np.testing.assert_array_equal(counted, gather_positions(key, whole, columns))
        self.assertTrue(counted.any())
        self.assertFalse(counted.all())

    def test_dumped_tokens_are_no_padding(self):
        columns = np.array([[0, 3], [2, 4]])
        found = dumped_tokens(PADDED, columns)
        tokens = PADDED.attention_mask == 1
        self.assertEqual(np.argwhere(found).tolist(), [[r, c] for r in (0, 1) for c in columns[r] if tokens[r, c]])
        np.testing.assert_array_equal(dumped_tokens(PADDED, None), tokens)


class ValuesTest(parameterized.TestCase):
    @parameterized.parameters("stage.0.ffn_up", "stage.0.attn_scores")
    def test_what_is_scattered_is_gathered_again_and_nothing_else_moves(self, key):
        shape = (2, 3, 5, 5) if "scores" in key else (2, 5, 6)
        whole = np.random.default_rng(0).normal(size=shape)
        columns = np.array([[3, 4], [0, 2]])
        values = gather_positions(key, whole, columns)
        self.assertEqual(values.shape[position_axis(key)], 2)
        np.testing.assert_array_equal(scatter_positions(key, whole, values, columns), whole)
        put = scatter_positions(key, np.zeros(shape), values, columns)
        expected = np.where(np.isin(put, 0), 0, whole)
        np.testing.assert_array_equal(put, expected)
        self.assertEqual(np.count_nonzero(put), values.size)

    def test_logits_of_the_last_token_need_no_trace_of_ours(self):
        def never():
            raise AssertionError("nothing was missing that a stage depends on")

        logits = np.ones((2, 1, 7), np.float32)
        dumped = complete({stages.LOGITS: logits}, PADDED, None, never)
        self.assertEqual(dumped.values[stages.LOGITS].shape, (2, 5, 7))
        self.assertEqual(dumped.values[stages.LOGITS].sum(), 14)
        np.testing.assert_array_equal(dumped.columns[stages.LOGITS], [[4], [4]])
        self.assertFalse(dumped.partial)

    def test_a_dump_of_some_rows_lies_over_any_trace(self):
        key, columns = "stage.0.ffn_up", np.array([[3, 4], [0, 2]])
        rows = np.full((2, 2, 6), 7.0, np.float32)
        traces = [{key: np.full((2, 5, 6), value)} for value in (1.0, 2.0)]
        dumped = complete({key: rows}, PADDED, columns, lambda: traces[0])
        self.assertTrue(dumped.partial)
        for trace, value in ((dumped, 1), (dumped.over(traces[1]), 2)):
            np.testing.assert_array_equal(trace.rows()[key], rows)
            self.assertEqual(np.unique(trace.values[key], return_counts=True)[1].tolist(), [36, 24])
            self.assertEqual(trace.values[key].min(), value)


class LocaliseTest(absltest.TestCase):
    """Rows of our own decoding steps: right ones are, a disturbed one is not, and what is missing is not judged."""

    def test_only_the_rows_that_were_dumped_are_judged(self):
        folder = paths.checkpoint("gqa_tied_bf16")
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        mask = np.ones((2, 40), np.int32)
        mask[0, :5] = 0
        inputs = Inputs.of(np.random.default_rng(0).integers(0, 288, (2, 40)), mask)
        columns = find_columns([30, 31, 34], inputs)
        trace = same.trace(inputs)
        dump = {key: gather_positions(key, value, columns) for key, value in trace.items()}
        located = localise(exact, same, inputs, complete(dump, inputs, columns, lambda: exact.trace(inputs)))
        self.assertEqual([site.key for site in located.sites if site.wrong], [])
        widths = {site.key: site.elements for site in located.sites}
        self.assertEqual(widths["stage.1.ffn_norm"], 2 * 3 * 64)
        self.assertEqual(widths["stage.1.attn_scores"], 4 * (31 + 32 + 35) * 2)
        dump["stage.1.attn_scores"][1, 2, 2, 30] += 0.1
        located = localise(exact, same, inputs, complete(dump, inputs, columns, lambda: exact.trace(inputs)))
        self.assertEqual(
            [site.key for site in located.sites if site.wrong], ["stage.1.attn_scores", "stage.1.attn_softmax"]
        )
        np.testing.assert_array_equal(
            located.theirs["stage.0.k_post_rope"][0, columns[0]], trace["stage.0.k_post_rope"][0, columns[0]]
        )

    def test_a_cache_that_was_not_dumped_has_its_own_rounding(self):
        # Keys and values of four layers' rounding: were the budget that of one stage alone, these would be wrong.
        sized = sample.SAMPLES["gqa_tied_bf16"]
        deep = dataclasses.replace(sized, config=dataclasses.replace(sized.config, num_layers=4))
        folder = pathlib.Path(self.create_tempdir().full_path, "deep")
        with mock.patch.dict(sample.SAMPLES, {"deep": deep}):
            sample.write_sample("deep", str(folder))
        inputs = seeded(288, 1, 40)
        columns = find_columns([36, 37, 38, 39], inputs)
        values = forward(*oracle.load(folder), inputs.input_ids)
        dump = {key: gather_positions(key, value, columns) for key, value in values.items()}
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        located = localise(exact, same, inputs, complete(dump, inputs, columns, lambda: exact.trace(inputs)))
        self.assertEqual([(site.key, site.share) for site in located.sites if site.share > 0.5], [])

    def test_our_own_decoding_steps_are_right(self):
        folder = paths.checkpoint("gqa_tied_bf16")
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        inputs = Inputs.of(np.random.default_rng(1).integers(0, 288, (2, 40)))
        cache, logits = same.empty_cache(2, 64), []
        for begin, end in ((0, 36), *((at, at + 1) for at in range(36, 40))):
            part = Inputs.of(inputs.input_ids[:, begin:end], None, inputs.position_ids[:, begin:end])
            made, cache = same.step(part, cache)
            logits.append(np.asarray(made))
        columns = find_columns([36, 37, 38, 39], inputs)
        dump = {
            f"stage.{layer}.k_post_rope": np.asarray(cache.layers[layer].keys)[:, 36:40].reshape(2, 4, -1)
            for layer in range(2)
        }
        dump[stages.LOGITS] = np.concatenate(logits[1:], axis=1)
        located = localise(exact, same, inputs, complete(dump, inputs, columns, lambda: exact.trace(inputs)))
        self.assertEqual([(site.key, site.wrong) for site in located.sites], [(key, False) for key in dump])
        dump["stage.1.k_post_rope"] = np.roll(dump["stage.1.k_post_rope"], 1, axis=1)
        located = localise(exact, same, inputs, complete(dump, inputs, columns, lambda: exact.trace(inputs)))
        self.assertEqual([site.key for site in located.sites if site.wrong], ["stage.1.k_post_rope", stages.LOGITS])


if __name__ == "__main__":
    absltest.main()
