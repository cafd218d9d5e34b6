"""Batches: padding, positions, files, and what is refused."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax import inputs
from apr_jax.inputs import Inputs
from converters.errors import BrokenContainerError, MissingFileError, UsageError


class InputsTest(parameterized.TestCase):
    def test_unequal_rows_are_padded_on_the_right(self):
        batch = Inputs.of([[5, 6, 7], [8]])
        self.assertEqual(batch.attention_mask.tolist(), [[1, 1, 1], [1, 0, 0]])
        self.assertEqual(batch.positions().tolist(), [[0, 1, 2], [0, -1, -1]])
        self.assertEqual((batch.tokens, batch.input_ids.dtype), (4, np.int32))
        self.assertEqual(batch.next_token_pairs().tolist(), [[True, True], [False, False]])

    def test_positions_count_tokens_behind_padding_on_the_left(self):
        batch = Inputs.of([[9, 9, 5, 6]], [[0, 0, 1, 1]])
        self.assertEqual(batch.position_ids.tolist(), [[0, 0, 0, 1]])
        self.assertEqual(batch.positions().tolist(), [[-1, -1, 0, 1]])

    def test_given_positions_are_kept(self):
        self.assertEqual(Inputs.of([[1, 2]], None, [[7, 9]]).positions().tolist(), [[7, 9]])

    @parameterized.parameters(
        ([[1, 2]], [[1]], None),
        ([[1, 2]], [[1, 2]], None),
        ([[1, 2]], [[0, 0]], None),
        ([[1, 2], [3]], [[1, 1], [1, 1]], None),
        ([[1, 2]], None, [[1, 1]]),
        ([[1, 2]], None, [[2, 1]]),
        ([[1, 2]], None, [[-1, 0]]),
        ([[2**31]], None, None),
        ([[1, 2]], None, [[0, 2**30]]),
        (5, None, None),
        ([[1.0]], None, None),
        ([[[1]]], None, None),
        ([], None, None),
    )
    def test_what_makes_no_batch_is_refused(self, ids, mask, positions):
        with self.assertRaises(UsageError):
            Inputs.of(ids, mask, positions)

    def test_seeded_is_the_same_each_time_and_covers_the_vocabulary(self):
        first, second = inputs.seeded(50, 4, 64), inputs.seeded(50, 4, 64)
        np.testing.assert_array_equal(first.input_ids, second.input_ids)
        self.assertLen(set(first.input_ids.ravel().tolist()), 50)

    def test_json_files(self):
        path = pathlib.Path(self.create_tempdir().full_path, "ids.json")
        path.write_text("[[1, 2, 3], [4]]")
        self.assertEqual(inputs.from_json(path).tokens, 4)
        for content in ("[1, 2]", '{"a": 1}', "[[true]]", "[[1.5]]", "[[1], 2]", "[]", "[[]]"):
            path.write_text(content)
            with self.assertRaises(UsageError, msg=content):
                inputs.from_json(path)
        for content in ("[", "[[1],]", "[" * 100_000, ""):
            path.write_text(content)
            with self.assertRaises(BrokenContainerError, msg=content[:9]):
                inputs.from_json(path)
        with self.assertRaises(MissingFileError):
            inputs.from_json(path.with_name("none.json"))


if __name__ == "__main__":
    absltest.main()
