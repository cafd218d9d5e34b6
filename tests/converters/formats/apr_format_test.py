"""The `.apr` container against genuine files, bytes made by hand, and everything that a reader must not believe."""

import hashlib
import pathlib
import struct
import zlib

from absl.testing import absltest, parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError
from apr_jax.converters.formats import apr_format, dtypes, strict_json

DATA = pathlib.Path(__file__).resolve().parents[3] / "tests" / "data" / "apr"
GENUINE = sorted(path.name for path in DATA.glob("*.apr") if not path.name.startswith(("not_v2", "golden_v1")))
NORM = "model.norm.weight"


def pad(data):
    return data + bytes(-len(data) % 64)


def entry(name, id, shape, offset, size):
    name = name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass")
    return (
        struct.pack("<H", len(name)) + name + struct.pack(f"<BB{len(shape)}QQQ", id, len(shape), *shape, offset, size)
    )


def container(index=b"", data=b"", metadata=b"{}", count=0, footer=True, index_padding=None, **header):
    """A file by hand: each field of the header can be overridden, its checksum is right all the same."""
    body = pad(metadata)
    index_section = pad(index) if index_padding is None else index + index_padding
    fields = {
        "magic": b"APR\0",
        "major": 2,
        "minor": 0,
        "flags": 0x0400,
        "count": count,
        "metadata_offset": 64,
        "metadata_size": len(metadata),
        "index_offset": 64 + len(body),
        "data_offset": 64 + len(body) + len(index_section),
        "reserved": bytes(20),
    } | header
    *front, reserved = fields.values()
    first = struct.pack("<4sBBHIQIQQ", *front)
    file = first + struct.pack("<I", zlib.crc32(first + reserved)) + reserved + body + index_section + data
    return file + struct.pack("<I", zlib.crc32(file)) if footer else file


def two_tensors(**changes):
    """a: F32 [2, 3] at 0, b: BF16 [5] at 64."""
    index = entry("a", 0, (2, 3), 0, 24) + entry("b", 30, (5,), 64, 10)
    return container(**({"index": index, "data": pad(bytes(24)) + pad(bytes(10)), "count": 2} | changes))


def parse(file, size=None, lenient=False):
    size = len(file) if size is None else size
    header = apr_format.parse_header(file[:64], size, file="x.apr", lenient=lenient)
    return apr_format.parse_prologue(file[: header.data_offset], size, file="x.apr", lenient=lenient)


def one(id=0, shape=(2, 3), offset=0, size=24, name="a", **changes):
    return container(**({"index": entry(name, id, shape, offset, size), "data": pad(bytes(24)), "count": 1} | changes))


class GenuineFilesTest(parameterized.TestCase):
    def test_there_are_genuine_files(self):
        self.assertLen(GENUINE, 5)

    @parameterized.parameters(GENUINE)
    def test_prologue_is_written_back_byte_for_byte(self, name):
        file = (DATA / name).read_bytes()
        prologue = parse(file)
        written = apr_format.serialise_prologue(prologue.metadata, prologue.entries, flags=prologue.header.flags)
        self.assertEqual(written, file[: prologue.header.data_offset])
        self.assertNotEmpty(prologue.entries)
        self.assertEmpty(prologue.warnings)

    @parameterized.parameters(GENUINE)
    def test_layout_and_footer_are_those_of_the_file(self, name):
        file = (DATA / name).read_bytes()
        prologue = parse(file)
        in_data = [e.name for e in sorted(prologue.entries, key=lambda e: (e.offset, e.size))]
        tensors = [(e.name, e.dtype, e.shape, e.size) for e in prologue.entries]
        self.assertEqual(apr_format.lay_out(reversed(tensors), in_data), list(prologue.entries))
        self.assertTrue(prologue.has_footer)
        self.assertEqual(prologue.data_end, len(file) - 4)
        self.assertEqual(apr_format.footer(zlib.crc32(file[:-4])), file[-4:])

    @parameterized.parameters(
        ("golden_v1.apr", "version 1 (APRN)"),
        ("not_v2_aprn_v1_mnist_784x2.apr", "version 1 (APRN)"),
        ("not_v2_tsp_att48-aco.apr", "aprender-tsp"),
        ("not_v2_tsp_berlin52-aco.apr", "aprender-tsp"),
        ("not_v2_tsp_eil51-aco.apr", "aprender-tsp"),
    )
    def test_files_of_other_formats_are_refused_by_name(self, name, words):
        file = (DATA / name).read_bytes()
        for lenient in (False, True):
            with self.assertRaises(BrokenContainerError) as caught:
                parse(file, lenient=lenient)
            self.assertEqual(caught.exception.code, "foreign-format")
            self.assertIn(words, str(caught.exception))

    def test_the_worked_example_of_the_format_description_is_made_to_the_byte(self):
        metadata = {
            "model_type": "qwen2",
            "license": None,
            "data_source": None,
            "data_license": None,
            "total_size": 0,
            "param_count": 9,
            "architecture": "qwen2",
            "hidden_size": 3,
            "rope_theta": strict_json.f32(1e6),
            "rms_norm_eps": strict_json.f32(1e-6),
        }
        embedding = bytes.fromhex("803f00c0003f4040000080be")
        norm = struct.pack("<3f", 1, 0.5, 2)
        tensors = [
            (NORM, dtypes.by_name("f32"), (3,), 12),
            ("model.embed_tokens.weight", dtypes.by_name("bf16"), (2, 3), 12),
        ]
        file = apr_format.serialise_prologue(metadata, apr_format.lay_out(tensors)) + pad(embedding) + pad(norm)
        file += apr_format.footer(zlib.crc32(file))
        self.assertLen(file, 580)
        self.assertEqual(
            hashlib.sha256(file).hexdigest(), "fa0e0cd01bd6a32546aa708262bfc187a33f97d3ba0075bb918555c81a93b655"
        )

    def test_golden_contents_are_those_described(self):
        file = (DATA / "golden_v2_skip_none.apr").read_bytes()
        prologue = parse(file)
        self.assertEqual(
            [(e.name, e.dtype.name, e.shape, e.size) for e in prologue.entries],
            [("bias", "f32", (1,), 4), ("weights", "f32", (8,), 32)],
        )
        start = prologue.header.data_offset + prologue.entries[1].offset
        self.assertEqual(struct.unpack("<8f", file[start : start + 32]), (1, 2, 0.5, -0.5, 4, -2, 0.25, 8))
        self.assertEqual(prologue.metadata["created_at"], "1700000000")
        self.assertIsNone(prologue.metadata["license"])


class AcceptedTest(parameterized.TestCase):
    def test_the_file_made_by_hand_is_fine(self):
        prologue = parse(two_tensors())
        self.assertEqual(
            [(e.name, e.dtype.name, e.shape, e.offset, e.size) for e in prologue.entries],
            [("a", "f32", (2, 3), 0, 24), ("b", "bf16", (5,), 64, 10)],
        )
        self.assertEmpty(prologue.warnings)

    def test_no_tensors_and_empty_metadata(self):
        prologue = parse(container())
        self.assertEqual((prologue.entries, prologue.metadata, prologue.has_footer), ((), {}, True))

    def test_a_head_without_data_is_a_placeholder_and_shares_its_offset(self):
        index = entry("lm_head.weight", 0, (5, 2), 0, 0) + entry("model.embed_tokens.weight", 30, (5, 2), 0, 20)
        prologue = parse(container(index, pad(bytes(20)), count=2))
        self.assertEqual([e.is_placeholder for e in prologue.entries], [True, False])
        written = apr_format.serialise_prologue(prologue.metadata, prologue.entries)
        self.assertEqual(written, container(index, pad(bytes(20)), count=2)[: len(written)])

    def test_data_may_stand_in_another_order_than_the_index(self):
        index = entry("a", 0, (2, 3), 64, 24) + entry("b", 30, (5,), 0, 10)
        self.assertEqual(parse(two_tensors(index=index)).data_end, 64 * 6)

    def test_tensors_without_elements_and_scalars(self):
        index = entry("a", 0, (0, 3), 0, 0) + entry("b", 0, (), 0, 4) + entry("c", 1, (7, 0), 64, 0)
        self.assertLen(parse(container(index, pad(bytes(4)), count=3)).entries, 3)

    def test_an_empty_tensor_overlaps_nothing_wherever_it_stands(self):
        for offset in (0, 64, 128, 192):
            index = entry("a", 7, (100,), 0, 100) + entry("e", 0, (0,), offset, 0) + entry("z", 7, (9,), 128, 9)
            self.assertLen(parse(container(index, bytes(192), count=3)).entries, 3)

    @parameterized.parameters(144, 2 * 144)
    def test_both_sizes_of_row_padded_k_quants(self, size):
        file = container(entry("a", 12, (2, 64), 0, size), pad(bytes(size)), count=1)
        self.assertEqual(parse(file).entries[0].dtype.name, "q4_k")

    def test_newer_minor_version_and_missing_row_major_flag_are_warnings(self):
        self.assertIn("version 2.7", parse(two_tensors(minor=7)).warnings[0])
        self.assertIn("ROW_MAJOR", parse(two_tensors(flags=0)).warnings[0])
        self.assertIn("QUANTIZED", parse(two_tensors(flags=0x0420)).warnings[0])

    def test_names_that_differ_in_normalisation_are_a_warning(self):
        index = entry("e\u0301", 0, (1,), 0, 4) + entry("\u00e9", 0, (1,), 64, 4)
        self.assertIn("normalisation", parse(container(index, bytes(128), count=2)).warnings[0])


class RefusedTest(parameterized.TestCase):
    def assert_refused(self, file, code, lenient=False, size=None):
        with self.assertRaises(AprJaxError) as caught:
            parse(file, size, lenient)
        self.assertEqual(caught.exception.code, code, str(caught.exception))
        self.assertEqual(caught.exception.file, "x.apr")
        self.assertIn(caught.exception.exit_code, (4, 5))
        return caught.exception

    def test_every_bit_of_the_header_is_guarded(self):
        file = two_tensors()
        for bit in range(64 * 8):
            broken = bytearray(file)
            broken[bit // 8] ^= 1 << bit % 8
            with self.assertRaises(BrokenContainerError) as caught:
                parse(bytes(broken), lenient=True)
            self.assertIn(caught.exception.code, ("header-crc", "magic", "foreign-format"))

    def test_a_file_cut_anywhere_but_before_its_footer_is_refused(self):
        file = two_tensors()
        for size in (*range(len(file) - 4), *range(len(file) - 3, len(file))):
            with self.assertRaises(AprJaxError, msg=size):
                parse(file[:size])

    def test_data_cut_short_are_refused_even_when_lenient(self):
        file = two_tensors()
        end = len(file) - 4 - 64 + 10
        for size in range(end - 74, end):
            self.assert_refused(file[:size], "file-truncated", lenient=True)
        self.assertLen(parse(file[:end], lenient=True).entries, 2)

    def test_an_index_cut_anywhere_is_refused(self):
        index = entry("a", 0, (2, 3), 0, 24) + entry("b", 30, (5,), 64, 10)
        for length in range(len(index)):
            file = container(index[:length], bytes(128), count=2, index_padding=b"")
            with self.assertRaises(BrokenContainerError) as caught:
                parse(file, lenient=True)
            self.assertIn(caught.exception.code, ("index-truncated", "tensor-count"))

    @parameterized.parameters(
        (b"APR3", "magic"),
        (b"XXXX", "magic"),
        (b"APR1", "foreign-format"),
        (b"APRN", "foreign-format"),
        (b"GGUF", "foreign-format"),
        (b"\0RPA", "foreign-format"),
    )
    def test_magic(self, magic, code):
        self.assert_refused(two_tensors(magic=magic), code, lenient=True)

    @parameterized.parameters(1, 3, 255)
    def test_major_version(self, major):
        self.assert_refused(two_tensors(major=major), "version", lenient=True)

    @parameterized.parameters(0x0001, 0x0002, 0x0003, 0x0004, 0x0800, 0x0801)
    def test_data_that_are_not_plain_are_refused_by_name(self, flags):
        error = self.assert_refused(two_tensors(flags=0x0400 | flags), "flags", lenient=True)
        self.assertEqual(error.exit_code, 5)
        for bit, name in apr_format.FLAG_NAMES.items():
            self.assertEqual(name in error.message, bool(flags & bit), name)

    @parameterized.named_parameters(
        ("below_header", {"metadata_offset": 0}, "section-bounds"),
        ("inside_header", {"metadata_offset": 63}, "section-bounds"),
        ("after_a_hole", {"metadata_offset": 128}, "section-bounds"),
        ("beyond_file", {"metadata_offset": 1 << 20}, "section-bounds"),
        ("end_of_u64", {"metadata_offset": 2**64 - 1}, "section-bounds"),
        ("empty_metadata", {"metadata_size": 0}, "metadata-size"),
        ("metadata_into_index", {"metadata_size": 65}, "section-bounds"),
        ("metadata_too_large", {"metadata_size": (64 << 20) + 1}, "metadata-size"),
        ("huge_metadata", {"metadata_size": 2**32 - 1}, "metadata-size"),
        ("index_in_header", {"index_offset": 32}, "section-bounds"),
        ("index_in_metadata", {"index_offset": 64}, "section-bounds"),
        ("index_beyond_file", {"index_offset": 10**6}, "section-bounds"),
        ("index_end_of_u64", {"index_offset": 2**64 - 1}, "section-bounds"),
        ("data_before_index", {"data_offset": 64}, "section-bounds"),
        ("data_beyond_file", {"data_offset": 1 << 30}, "section-bounds"),
        ("data_end_of_u64", {"data_offset": 2**64 - 64}, "section-bounds"),
        ("count_too_large", {"count": 2**32 - 1}, "tensor-count"),
        ("count_larger_than_room", {"count": 7}, "tensor-count"),
        ("count_too_large_by_one", {"count": 3}, "name-length"),
        ("count_too_small", {"count": 1}, "padding"),
        ("count_zero", {"count": 0}, "section-bounds"),
    )
    def test_sections(self, changes, code):
        self.assert_refused(two_tensors(**changes), code, lenient=True)

    def test_a_count_is_refused_where_not_even_the_shortest_entries_have_room(self):
        # Of a name of one character and a shape of no dimension: 21 bytes, nine of which fit 192.
        for count, code in ((9, "name-length"), (10, "tensor-count")):
            self.assert_refused(container(index=bytes(192), count=count), code, lenient=True)

    def test_a_tiny_file_with_hostile_offsets(self):
        # PR #2105 of aprender: header, `{}`, and an index somewhere else.
        for offset in (10**6, 2**64 - 1, 66):
            for count in (1, 2**32 - 1):
                file = container(index_offset=offset, data_offset=offset, count=count, footer=False)[:66]
                with self.assertRaises(BrokenContainerError):
                    parse(file, lenient=True)

    @parameterized.named_parameters(
        ("behind_metadata", {"metadata": b"{" + b" " * 62 + b"}" + bytes(64), "metadata_size": 64}, "section-bounds"),
        ("behind_the_index", {"index_padding": bytes(64)}, "padding"),
        ("before_the_first_tensor", {"index": entry("a" * 28, 0, (2, 3), 64, 24), "data": bytes(128)}, "data-hole"),
    )
    def test_64_zero_bytes_where_no_padding_is_needed_are_a_hole(self, changes, code):
        # Metadata and index of 64 bytes: what follows them needs no padding.
        file = {"metadata": b"{" + b" " * 62 + b"}", "index": entry("a" * 28, 0, (2, 3), 0, 24), "count": 1}
        file |= {"data": pad(bytes(24))}
        self.assertLen(parse(container(**file)).entries, 1)
        self.assert_refused(container(**(file | changes)), code, lenient=True)

    def test_hidden_bytes_between_sections(self):
        file = bytearray(two_tensors())
        for position in (66, 127, len(pad(file[: 128 + 75])) - 1):
            broken = bytes(file[:position]) + b"x" + bytes(file[position + 1 :])
            error = self.assert_refused(broken, "padding", lenient=True)
            self.assertEqual(error.offset, position)

    @parameterized.named_parameters(
        ("list", b"[]", "metadata-type"),
        ("null", b"null", "metadata-type"),
        ("no_json", b"{a}", "json-syntax"),
        ("duplicate", b'{"a":1,"a":2}', "json-duplicate"),
        ("nan", b'{"rope_theta":NaN}', "json-number"),
        ("deep", b'{"a":' * 70 + b"0" + b"}" * 70, "json-depth"),
        ("not_utf8", b'{"a":"\xff"}', "json-utf8"),
        ("two", b"{}{}", "json-syntax"),
        ("spaces_after", b"{}  ", "metadata-type"),
        ("nul_after", b"{}\0", "metadata-type"),
        ("space_before", b" {}", "metadata-type"),
    )
    def test_metadata(self, metadata, code):
        self.assert_refused(two_tensors(metadata=metadata), code, lenient=True)

    @parameterized.named_parameters(
        ("no_name", {"name": ""}, "name-length"),
        ("long_name", {"name": "a" * 257}, "name-length"),
        ("not_utf8", {"name": b"\xff\xfe"}, "name-utf8"),
        ("surrogate", {"name": "\ud800"}, "name-utf8"),
        ("control", {"name": "a\x1b[2J"}, "name-characters"),
        ("newline", {"name": "a\nb"}, "name-characters"),
        ("bidi", {"name": "a\u202eb"}, "name-characters"),
        ("nine_dimensions", {"shape": (1,) * 8 + (6,)}, "shape-rank"),
        ("255_dimensions", {"shape": (1,) * 255}, "section-bounds"),
        ("scalar_of_six", {"shape": ()}, "size-mismatch"),
        ("overflow", {"shape": (2**32, 2**32)}, "shape-overflow"),
        ("overflow_to_4", {"shape": (4194305, 4194305, 211106198978564), "size": 16}, "shape-overflow"),
        ("huge_dimension", {"shape": (2**63,), "size": 0}, "shape-dimension"),
        ("too_small", {"size": 20}, "size-mismatch"),
        ("too_large", {"size": 28}, "size-mismatch"),
        ("empty", {"size": 0}, "size-mismatch"),
        ("unknown_type", {"id": 99}, "dtype-unknown"),
        ("old_bf16", {"id": 2, "size": 12}, "dtype-legacy"),
        ("int8_as_q5_0", {"id": 6, "shape": (32,), "size": 22}, "dtype-legacy"),
        ("wrong_table", {"id": 3}, "size-mismatch"),
        ("beyond_file", {"offset": 1 << 20}, "file-truncated"),
        ("offset_wraps", {"offset": 2**64 - 64}, "file-truncated"),
        ("empty_beyond_file", {"shape": (0,), "size": 0, "offset": 1 << 20}, "file-truncated"),
        ("hole", {"offset": 64, "data": bytes(128)}, "data-hole"),
    )
    def test_entries(self, changes, code):
        self.assert_refused(one(**changes), code, lenient=True)

    def test_entry_errors_name_the_tensor_and_the_byte(self):
        error = self.assert_refused(one(size=20), "size-mismatch")
        self.assertEqual((error.tensor, error.offset, error.found), ("a", 128, 20))
        self.assertIn("24 bytes for f32", error.expected)

    def test_a_broken_entry_further_on_does_not_hide_that_this_one_has_an_old_id(self):
        index = entry("a", 2, (6,), 0, 12) + entry("b", 0, (2**32, 2**32), 64, 4)
        error = self.assert_refused(container(index, bytes(128), count=2), "dtype-legacy", lenient=True)
        self.assertIn("fit no writer known", error.hint)

    def test_duplicate_names(self):
        index = entry("a", 0, (2, 3), 0, 24) + entry("a", 30, (5,), 64, 10)
        self.assert_refused(two_tensors(index=index), "name-duplicate", lenient=True)

    def test_duplicate_names_apart(self):
        index = entry("a", 0, (1,), 0, 4) + entry("b", 0, (1,), 64, 4) + entry("a", 0, (1,), 128, 4)
        self.assert_refused(container(index, bytes(192), count=3), "name-duplicate", lenient=True)

    @parameterized.parameters(0, 4, 23)
    def test_overlaps_are_found_in_either_order(self, offset):
        for first, second in ((0, offset), (offset, 0)):
            index = entry("a", 7, (24,), first, 24) + entry("b", 7, (24,), second, 24)
            self.assert_refused(container(index, bytes(64), count=2), "data-overlap", lenient=True)

    def test_an_empty_head_elsewhere_is_no_placeholder(self):
        index = entry("model.embed_tokens.weight", 30, (5, 2), 0, 0)
        self.assert_refused(container(index, count=1), "size-mismatch", lenient=True)


class LenientTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("old_magic", {"magic": b"APR2"}, "magic-old", "2026-01-18"),
        ("reserved", {"reserved": bytes(19) + b"\1"}, "header-reserved", "reserved"),
        ("unknown_flag", {"flags": 0x1400}, "flags", "0x1000"),
        ("sharded", {"flags": 0x0410}, "flags", "SHARDED"),
        ("signed", {"flags": 0x0408}, "flags", "SIGNED"),
        (
            "unsorted",
            {"index": entry("b", 0, (2, 3), 0, 24) + entry("a", 30, (5,), 64, 10)},
            "unsorted",
            "sorted",
        ),
        (
            "unaligned_data",
            {"index": entry("a", 0, (2, 3), 0, 24) + entry("b", 30, (5,), 24, 10), "data": bytes(64)},
            "unaligned",
            "aligned",
        ),
        ("unaligned_sections", {"index_padding": b""}, "unaligned", "aligned"),
    )
    def test_is_an_error_by_default_and_a_warning_when_lenient(self, changes, code, words):
        file = two_tensors(**changes)
        with self.assertRaises(AprJaxError) as caught:
            parse(file)
        self.assertEqual(caught.exception.code, code)
        self.assertIn("--lenient", caught.exception.hint)
        prologue = parse(file, lenient=True)
        self.assertLen(prologue.entries, 2)
        self.assertIn(words, " ".join(prologue.warnings))

    def test_a_missing_footer_is_a_warning_where_the_padded_data_end_and_an_error_before(self):
        file = two_tensors(footer=False)
        prologue = parse(file)
        self.assertEqual((prologue.has_footer, len(prologue.entries)), (False, 2))
        self.assertIn("no footer", " ".join(prologue.warnings))
        for cut in (1, 3, 16):
            with self.assertRaises(BrokenContainerError) as caught:
                parse(file[:-cut])
            self.assertEqual(caught.exception.code, "footer-missing")
            self.assertIn("--lenient", caught.exception.hint)
        with self.assertRaises(BrokenContainerError):
            parse(two_tensors()[:-2])

    def test_bytes_after_the_footer(self):
        file = two_tensors() + b"PK\3\4"
        with self.assertRaises(BrokenContainerError) as caught:
            parse(file)
        self.assertEqual((caught.exception.code, caught.exception.offset), ("trailing-bytes", len(file) - 4))
        self.assertIn("footer", parse(file, lenient=True).warnings[0])

    def test_utf16_order_is_not_byte_order(self):
        # U+FF5E is before U+1F600 in UTF-8 and after it in UTF-16.
        index = entry("\uff5e", 0, (1,), 0, 4) + entry("\U0001f600", 0, (1,), 64, 4)
        self.assertLen(parse(container(index, bytes(128), count=2)).entries, 2)
        laid_out = apr_format.lay_out([(name, dtypes.by_name("f32"), (1,), 4) for name in ("\U0001f600", "\uff5e")])
        self.assertEqual([(e.name, e.offset) for e in laid_out], [("\uff5e", 0), ("\U0001f600", 64)])
        index = entry("\U0001f600", 0, (1,), 0, 4) + entry("\uff5e", 0, (1,), 64, 4)
        with self.assertRaises(BrokenContainerError):
            parse(container(index, bytes(128), count=2))


class WritingTest(parameterized.TestCase):
    def test_nothing_is_written_that_the_reader_refuses(self):
        deep: list = []
        for _ in range(63):
            deep = [deep]
        for metadata, code in (
            ({"strings": ["a"] * 4_000_000}, "json-count"),
            ({"arrays": [[]] * 1_000_000}, "json-count"),
            ({"deep": deep}, "json-depth"),
        ):
            with self.assertRaises(RefusedError) as caught:
                apr_format.serialise_prologue(metadata, [])
            self.assertEqual((caught.exception.code, caught.exception.exit_code), (code, 5))
        apr_format.serialise_prologue({"deep": deep[0]}, [])

    def test_all_offenders_are_named_at_once(self):
        f32 = dtypes.by_name("f32")
        with self.assertRaises(RefusedError) as caught:
            apr_format.lay_out(
                [
                    ("u32 tensor", dtypes.by_name("u32"), (2,), 8),
                    ("n" * 257, f32, (1,), 4),
                    ("nine", f32, (1,) * 9, 4),
                    ("wrong size", f32, (3,), 4),
                    ("twice", f32, (1,), 4),
                    ("twice", f32, (1,), 4),
                    ("fine", f32, (1,), 4),
                ]
            )
        message = str(caught.exception)
        self.assertIn("5 in all", message)
        for words in (
            "no id for u32",
            "nnn: a tensor's name is too long",
            "9 dimensions",
            "wrong size: 4",
            "twice: occurs",
        ):
            self.assertIn(words, message)
        self.assertNotIn("fine", message)

    def test_name_of_256_bytes_is_kept_whole(self):
        name = "é" * 128
        entries = apr_format.lay_out([(name, dtypes.by_name("f32"), (1,), 4)])
        file = apr_format.serialise_prologue({}, entries) + bytes(64)
        self.assertEqual(parse(file + apr_format.footer(zlib.crc32(file))).entries[0].name, name)

    def test_metadata_may_be_given_as_text(self):
        text = b'{"a":"\\u00e9"}'
        self.assertEqual(apr_format.serialise_prologue(text, [])[64 : 64 + len(text)], text)

    def test_metadata_over_the_limit_is_refused(self):
        for text in (b"", b"{" + b" " * apr_format.MAX_METADATA_BYTES + b"}"):
            with self.assertRaises(RefusedError):
                apr_format.serialise_prologue(text, [])

    @settings(max_examples=150, derandomize=True, deadline=None)
    @given(st.data())
    def test_what_is_laid_out_and_written_is_what_is_read(self, data):
        kinds = [dtype for dtype in dtypes.TYPES.values() if dtype.apr_id is not None]
        names = data.draw(
            st.lists(
                st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp")), min_size=1, max_size=12),
                unique=True,
                max_size=6,
            )
        )
        tensors = []
        for name in names:
            dtype = data.draw(st.sampled_from(kinds))
            shape = tuple(data.draw(st.lists(st.integers(0, 300), max_size=3)))
            tensors.append((name, dtype, shape, data.draw(st.sampled_from(dtype.sizes(shape)))))
        order = data.draw(st.permutations(names))
        metadata = data.draw(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3))
        entries = apr_format.lay_out(tensors, order)
        prologue = apr_format.serialise_prologue(metadata, entries)
        total = sum(len(pad(bytes(size))) for _, _, _, size in tensors)
        file = prologue + bytes(total)
        parsed = parse(file + apr_format.footer(zlib.crc32(file)))
        self.assertEqual(parsed.entries, tuple(entries))
        self.assertEqual(parsed.metadata, metadata)
        self.assertEqual([e.name.encode() for e in parsed.entries], sorted(name.encode() for name in names))
        self.assertEqual({(e.name, e.dtype, e.shape, e.size) for e in parsed.entries}, set(tensors))


if __name__ == "__main__":
    absltest.main()
