"""Batches: padding, positions, files, and what is refused."""

import json
import pathlib
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.errors import BrokenContainerError, MissingFileError, UsageError
from apr_jax.trace import inputs
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.positions import next_token_pairs


class InputsTest(parameterized.TestCase):
    def test_unequal_rows_are_padded_on_the_right(self):
        batch = Inputs.of([[5, 6, 7], [8]])
        self.assertEqual(batch.attention_mask.tolist(), [[1, 1, 1], [1, 0, 0]])
        self.assertEqual(batch.positions().tolist(), [[0, 1, 2], [0, -1, -1]])
        self.assertEqual((batch.tokens, batch.input_ids.dtype), (4, np.int32))
        self.assertEqual(next_token_pairs(batch).tolist(), [[True, True], [False, False]])

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


class PlainTest(absltest.TestCase):
    """What programs that read nothing else get, and give back beside their dump."""

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        self.plain = self.folder / "inputs"
        self.batch = Inputs.of([[9, 9, 5, 6], [1, 2, 3, 4]], [[0, 0, 1, 1], [1, 1, 1, 1]])
        inputs.write_plain(self.plain, self.batch)

    def assert_same(self, found, expected):
        for name in ("input_ids", "attention_mask", "position_ids"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)

    def test_the_bytes_are_little_endian_integers_in_c_order(self):
        self.assertEqual((self.plain / "input_ids.2x4.i32").read_bytes(), struct.pack("<8i", 9, 9, 5, 6, 1, 2, 3, 4))
        self.assertEqual((self.plain / "position_ids.2x4.i64").read_bytes(), struct.pack("<8q", 0, 0, 0, 1, 0, 1, 2, 3))
        content = json.loads((self.plain / "inputs.json").read_text())
        self.assertEqual((content["shape"], content["attention_mask"]), ([2, 4], [[0, 0, 1, 1], [1, 1, 1, 1]]))
        self.assertLen(list(self.plain.iterdir()), 7)

    def test_each_form_is_read_back_alone(self):
        self.assert_same(inputs.beside(self.plain), self.batch)
        for removed in ("inputs.json", "*.i64"):
            for path in self.plain.glob(removed):
                path.unlink()
            self.assert_same(inputs.beside(self.plain), self.batch)
        (self.plain / "attention_mask.2x4.i32").unlink()
        (self.plain / "position_ids.2x4.i32").unlink()
        self.assert_same(inputs.beside(self.plain), Inputs.of(self.batch.input_ids))

    def test_what_is_broken_is_named(self):
        raw = self.plain / "input_ids.2x4.i64"
        (self.plain / "inputs.json").unlink()
        raw.write_bytes(raw.read_bytes()[:-1])
        with self.assertRaisesRegex(BrokenContainerError, "input_ids.2x4.i64.*63 bytes"):
            inputs.beside(self.plain)
        for path in self.plain.glob("input_ids*"):
            path.unlink()
        with self.assertRaisesRegex(MissingFileError, "--input-ids"):
            inputs.beside(self.plain)
        for content in ("[]", "{}", '{"input_ids": 5}', '{"input_ids": [[1.5]]}', '{"input_ids": [["a"]]}'):
            (self.plain / "inputs.json").write_text(content)
            with self.assertRaises((BrokenContainerError, UsageError), msg=content):
                inputs.beside(self.plain)

    def test_an_export_is_replaced_on_request_and_nothing_else_is(self):
        with self.assertRaises(UsageError):
            inputs.write_plain(self.plain, self.batch)
        inputs.write_plain(self.plain, Inputs.of([[7]]), force=True)
        self.assertEqual(inputs.beside(self.plain).input_ids.tolist(), [[7]])
        (self.plain / "notes.txt").write_text("mine")
        with self.assertRaises(UsageError):
            inputs.write_plain(self.plain, self.batch, force=True)


if __name__ == "__main__":
    absltest.main()
