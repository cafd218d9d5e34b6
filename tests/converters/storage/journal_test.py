"""A journal: what was noted comes back, what a kill or a power cut has torn does not."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.storage.journal import Journal, Pieces, differing

IDENTITY = {"version": "1", "source": {"a": [1, 2], "b": [3]}}


class JournalTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.create_tempdir().full_path, "journal")

    def open(self) -> Journal:
        journal = Journal(os.open(self.path, os.O_RDWR | os.O_CREAT), str(self.path))
        self.addCleanup(journal.close)
        return journal

    def begun(self, *notes: int) -> Journal:
        journal = self.open()
        journal.begin(IDENTITY)
        for note in notes:
            journal.note(note)
        return journal

    def test_what_was_noted_comes_back(self):
        self.begun(1, 2)
        again = self.open()
        self.assertEqual((again.identity, again.notes), (IDENTITY, [1, 2]))
        again.note(3)
        self.assertEqual(self.open().notes, [1, 2, 3])

    def test_a_line_with_one_bit_changed_is_not_believed(self):
        self.begun(10, 20, 30)
        data = bytearray(self.path.read_bytes())
        at = data.index(b" 20\n") + 1
        data[at] ^= 1  # 30: as good a note as the other
        self.path.write_bytes(data)
        self.assertEqual(self.open().notes, [10, 30])

    @parameterized.parameters(1, 3, 8)
    def test_behind_a_torn_line_a_new_one_begins(self, torn):
        self.begun(10, 20)
        self.path.write_bytes(self.path.read_bytes()[:-torn])
        self.open().note(40)
        self.assertEqual(self.open().notes, [10, 40] if torn > 1 else [10, 20, 40])

    def test_zeros_in_place_of_lines_are_no_lines(self):
        self.begun(10, 20)
        data = self.path.read_bytes()
        self.path.write_bytes(data[:-5] + bytes(5))
        self.assertEqual(self.open().notes, [10])
        self.path.write_bytes(bytes(len(data)))
        self.assertEqual((self.open().identity, self.open().notes), (None, []))

    def test_pieces_are_known_by_file_place_and_length(self):
        journal = self.begun()
        Pieces(journal, "a").note(0, 10, 7, more="x")
        journal = self.open()
        self.assertEqual(Pieces(journal, "a").noted(0, 10)["more"], "x")
        self.assertIsNone(Pieces(journal, "a").noted(0, 11))
        self.assertIsNone(Pieces(journal, "b").noted(0, 10))

    def test_differences_are_named(self):
        self.assertEqual(list(differing(IDENTITY, IDENTITY)), [])
        self.assertEqual(list(differing(IDENTITY, {**IDENTITY, "version": "2"})), ["version"])
        self.assertEqual(list(differing(IDENTITY, {**IDENTITY, "source": {"a": [1, 2], "b": [4]}})), ["source: b"])
        self.assertEqual(list(differing(IDENTITY, {**IDENTITY, "source": {"a": [1, 2]}})), ["source"])
        self.assertEqual(list(differing(IDENTITY, {})), ["version", "source"])


if __name__ == "__main__":
    absltest.main()
