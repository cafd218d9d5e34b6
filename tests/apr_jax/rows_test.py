"""Dumps of some positions: which columns they stand for, and what stands in for the rest."""

import dataclasses
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax import rows, sample, stages
from apr_jax.inputs import Inputs, seeded
from apr_jax.localise import localise
from apr_jax.model import load_model
from converters.errors import BrokenContainerError, MissingFileError, UsageError
from tests import oracle, paths
from tests.battery.faulty_forward import forward

PADDED = Inputs.of([[9, 9, 1, 2, 3], [4, 5, 6, 7, 8]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


class PositionsTest(parameterized.TestCase):
    @parameterized.parameters(("7", [7]), ("64-66", [64, 65, 66]), ("0,64-66,70", [0, 64, 65, 66, 70]), ("3-3", [3]))
    def test_lists_name_both_ends(self, text, expected):
        self.assertEqual(rows.parse(text), expected)

    def test_files_hold_one_list_or_one_for_each_row(self):
        path = pathlib.Path(self.create_tempdir().full_path, "positions.json")
        for content, expected in (("[1, 2]", [1, 2]), ("[[0, 1], [3, 4]]", [[0, 1], [3, 4]])):
            path.write_text(content)
            self.assertEqual(rows.parse(str(path)), expected)
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
                rows.parse(str(path))
        for text in ("64..71", "a", str(path.parent)):
            with self.assertRaises(MissingFileError, msg=text):
                rows.parse(text)
        with self.assertRaises(UsageError):
            rows.parse("8-7")

    def test_positions_are_found_behind_padding(self):
        np.testing.assert_array_equal(rows.find_columns([1, 2], PADDED), [[3, 4], [1, 2]])
        np.testing.assert_array_equal(rows.find_columns([[0], [4]], PADDED), [[2], [4]])
        np.testing.assert_array_equal(rows.last_columns(PADDED), [[4], [4]])
        self.assertEqual(rows.shown(PADDED, np.array([[2, 3], [1, 4]])), "0-1, 4")

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
            rows.find_columns(positions, PADDED)


class ValuesTest(parameterized.TestCase):
    @parameterized.parameters("stage.0.ffn_up", "stage.0.attn_scores")
    def test_what_is_scattered_is_gathered_again_and_nothing_else_moves(self, key):
        shape = (2, 3, 5, 5) if "scores" in key else (2, 5, 6)
        whole = np.random.default_rng(0).normal(size=shape)
        columns = np.array([[3, 4], [0, 2]])
        values = rows.gather(key, whole, columns)
        self.assertEqual(values.shape[rows.axis_of(key)], 2)
        np.testing.assert_array_equal(rows.scatter(key, whole, values, columns), whole)
        put = rows.scatter(key, np.zeros(shape), values, columns)
        expected = np.where(np.isin(put, 0), 0, whole)
        np.testing.assert_array_equal(put, expected)
        self.assertEqual(np.count_nonzero(put), values.size)

    def test_logits_of_the_last_token_need_no_trace_of_ours(self):
        def never():
            raise AssertionError("nothing was missing that a stage depends on")

        logits = np.ones((2, 1, 7), np.float32)
        whole, missing = rows.complete({stages.LOGITS: logits}, PADDED, None, never)
        self.assertEqual(whole[stages.LOGITS].shape, (2, 5, 7))
        self.assertEqual(whole[stages.LOGITS].sum(), 14)
        np.testing.assert_array_equal(missing[stages.LOGITS], [[4], [4]])


class LocaliseTest(absltest.TestCase):
    """Rows of our own decoding steps: right ones are, a disturbed one is not, and what is missing is not judged."""

    def test_only_the_rows_that_were_dumped_are_judged(self):
        folder = paths.checkpoint("gqa_tied_bf16")
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        mask = np.ones((2, 40), np.int32)
        mask[0, :5] = 0
        inputs = Inputs.of(np.random.default_rng(0).integers(0, 288, (2, 40)), mask)
        columns = rows.find_columns([30, 31, 34], inputs)
        trace = same.trace(inputs)
        dump = {key: rows.gather(key, value, columns) for key, value in trace.items()}
        located = localise(exact, same, inputs, dump, columns)
        self.assertEqual([site.key for site in located.sites if site.wrong], [])
        widths = {site.key: site.elements for site in located.sites}
        self.assertEqual(widths["stage.1.ffn_norm"], 2 * 3 * 64)
        self.assertEqual(widths["stage.1.attn_scores"], 4 * (31 + 32 + 35) * 2)
        dump["stage.1.attn_scores"][1, 2, 2, 30] += 0.1
        located = localise(exact, same, inputs, dump, columns)
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
        columns = rows.find_columns([36, 37, 38, 39], inputs)
        values = forward(*oracle.load(folder), inputs.input_ids)
        dump = {key: rows.gather(key, value, columns) for key, value in values.items()}
        exact, same = (load_model(folder, dtype, "cpu") for dtype in ("float64", "float32"))
        located = localise(exact, same, inputs, dump, columns)
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
        columns = rows.find_columns([36, 37, 38, 39], inputs)
        dump = {
            f"stage.{layer}.k_post_rope": np.asarray(cache.layers[layer].keys)[:, 36:40].reshape(2, 4, -1)
            for layer in range(2)
        }
        dump[stages.LOGITS] = np.concatenate(logits[1:], axis=1)
        located = localise(exact, same, inputs, dump, columns)
        self.assertEqual([(site.key, site.wrong) for site in located.sites], [(key, False) for key in dump])
        dump["stage.1.k_post_rope"] = np.roll(dump["stage.1.k_post_rope"], 1, axis=1)
        located = localise(exact, same, inputs, dump, columns)
        self.assertEqual([site.key for site in located.sites if site.wrong], ["stage.1.k_post_rope", stages.LOGITS])


if __name__ == "__main__":
    absltest.main()
