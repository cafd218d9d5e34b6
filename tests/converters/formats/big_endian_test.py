"""Both containers on a machine of the other byte order, and beyond 4 GiB.

Here the byte order is changed wherever Python code can see it: a child says that it is big-endian (`sys.byteorder`),
and `struct` packs big-endian unless it is told. NumPy is not loaded by such conversions, and no dtype without a byte
order is in the readers (the second test). What is read and written has to be the same to the byte: containers are
little-endian by definition, whoever reads them.

By hand, on 2026-11-30, with Debian's qemu-user-static 7.2 and its python3.11 and python3-numpy for s390x (`apt-get
download` with `APT::Architecture "s390x"`, `dpkg -x`, `qemu-s390x-static -L ROOT ROOT/usr/bin/python3.11`; ml_dtypes
0.5.3 by g++-s390x-linux-gnu): apr_format_test.py passed whole; of safetensors_format_test.py 234 passed, and three that
hold something against the safetensors package did not, which was a stand-in there; five checkpoints as .apr and back,
and four with --cast f32, f16 and bf16, had the bytes that x86-64 writes. Before, casts from bf16 were wrong there.
Of casts, dtypes, eras and openers 208 tests passed there later the same day, and quantised tensors cast to floats have
the bytes that they should, which they had not. 20 did not: 13 hold our little-endian bytes against arrays in the
machine's own order or read bf16, which has no array type there, 4 ask the safetensors package itself, and 3 start
Python, which the emulator does not do.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import types
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint import packed_forms
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import RefusedError
from apr_jax.converters.formats import apr_format, dtypes, packed_codecs, safetensors_format
from tests import paths

READERS = ("converters/formats", "converters/storage", "converters/checkpoint", "converters/convert")
# What pads or aligns by itself is native, and so is a type without a sign.
NATIVE = re.compile(r"""(struct\.\w+|Struct|unpack_from)\(f?["'](?![<>!])|sys\.byteorder""")

PROGRAM = """
import ctypes, hashlib, json, os, struct, sys
sys.byteorder = "big"
_names = ("pack", "unpack", "pack_into", "unpack_from", "calcsize", "iter_unpack")
_real = {name: getattr(struct, name) for name in _names}
def signed(form):
    form = form.decode() if isinstance(form, bytes) else form
    return form if form[:1] in "<>!" and form else ">" + form.lstrip("=@")
for name, function in _real.items():
    setattr(struct, name, lambda form, *rest, _function=function, **more: _function(signed(form), *rest, **more))
_Struct = struct.Struct
struct.Struct = lambda form: _Struct(signed(form))
sys.path = %(path)r
from apr_jax.converters.convert.run import convert
source, apr, back, single = sys.argv[1:]
convert(source, apr, to="apr")
convert(apr, back, to="safetensors")
convert(apr, single, to="safetensors")
found = {}
for path in (apr, single, *(os.path.join(back, name) for name in sorted(os.listdir(back)))):
    found[os.path.basename(path)] = hashlib.sha256(open(path, "rb").read()).hexdigest()
print(json.dumps(found))
"""


class OtherByteOrderTest(parameterized.TestCase):
    @parameterized.parameters("gqa_tied_bf16", "mixed_dtypes")
    def test_conversions_write_the_same_bytes(self, name):
        found = []
        for program in (
            PROGRAM % {"path": sys.path},
            "import sys\n" + PROGRAM[PROGRAM.index("sys.path =") :] % {"path": sys.path},
        ):
            folder = pathlib.Path(self.create_tempdir().full_path)
            out = [str(folder / end) for end in ("x.apr", "back", "x.safetensors")]
            program = "import hashlib, json, os, struct, sys\n" + program
            done = subprocess.run(
                [sys.executable, "-c", program, str(paths.checkpoint(name)), *out],
                capture_output=True,
                text=True,
                check=False,
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            found.append(json.loads(done.stdout))
        self.assertEqual(*found)
        self.assertGreater(len(found[0]), 3)

    def test_no_reader_unpacks_or_views_in_native_order(self):
        files = [file for room in READERS for file in sorted((paths.ROOT / room).glob("*.py"))]
        self.assertGreater(len(files), 30)
        for file in files:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                self.assertNotRegex(line, NATIVE, f"{file.name}:{number}")
                # NumPy's short names without a sign are native; one byte has no order.
                self.assertNotRegex(line, r"""(frombuffer|dtype)\([^()]*["'][iuf][248]["']""", f"{file.name}:{number}")
                # Bytes are words or floats of an order that is named; elsewhere a computed value is seen as another.
                if file.name in ("packed_forms.py", "decoded.py", "packed_codecs.py"):
                    self.assertNotRegex(
                        line, r"\.view\(np\.(u?int|float|complex)(16|32|64|128)\)", f"{file.name}:{number}"
                    )
                # from_bytes has to be told; Python 3.11's default is big.
                if "from_bytes(" in line or "to_bytes(" in line:
                    self.assertRegex(line, '"(little|big)"|byteorder', f"{file.name}:{number}")

    def test_the_search_for_native_order_finds_it(self):
        for line in (
            'struct.unpack("I", data)',
            "struct.unpack('=Q', data)",
            "_H = struct.Struct('QQ')",
            "sys.byteorder",
        ):
            self.assertRegex(line, NATIVE)
        for line in ('struct.unpack("<I", data)', 'struct.Struct("<Q").unpack_from', 'struct.pack(f"<H{n}s", x)'):
            self.assertNotRegex(line, NATIVE)


class _Swapped:
    """A type of NumPy's as a big-endian machine has it: an array of it has its bytes the other way round."""

    def __init__(self, kind):
        self.dtype = np.dtype(kind).newbyteorder(">")
        self._kind = kind

    def __call__(self, value):
        return self._kind(value)


class _SwappedNumpy(types.ModuleType):
    """NumPy whose words are big-endian, as far as an array is made or seen by naming their type.

    Floats stay as they are: sums are told their type by `dtype=`, which takes no byte order.
    """

    def __getattr__(self, name):
        return _Swapped(getattr(np, name)) if name in ("uint16", "uint32", "int16", "int32") else getattr(np, name)


class PackedFormsTest(parameterized.TestCase):
    @parameterized.parameters(sorted(path.stem for path in (paths.DATA / "packed").glob("*.safetensors")))
    def test_what_libraries_packed_is_the_same_where_numpy_is_big_endian(self, name):
        folder = pathlib.Path(self.create_tempdir().full_path)
        (folder / "model.safetensors").write_bytes((paths.DATA / "packed" / f"{name}.safetensors").read_bytes())
        with open_checkpoint(folder) as raw:
            config = {"quantization_config": json.loads(raw.metadata["quantization_config"])}
        (folder / "config.json").write_text(json.dumps(config))
        found = []
        for module in (np, _SwappedNumpy("numpy")):
            with (
                mock.patch.dict(sys.modules, {"numpy": module}),
                mock.patch.object(packed_codecs, "np", module),
                open_checkpoint(folder) as raw,
            ):
                (tensor,) = packed_forms.dense_view(raw).tensors.values()
                cut = bytearray(334)
                tensor.readinto_at(3, cut)
                found.append((tensor.raw(), bytes(cut)))
        self.assertTrue(found[0] == found[1], "other values")


class ArrayTypesTest(absltest.TestCase):
    def test_bf16_has_no_array_type_where_words_are_big_endian(self):
        # ml_dtypes' types have the machine's order and no other.
        with mock.patch.object(dtypes, "_is_little_endian", return_value=False):
            with self.assertRaisesRegex(RefusedError, "big-endian"):
                _ = dtypes.by_name("bf16").numpy
            self.assertEqual(dtypes.by_name("f8_e4m3").numpy.itemsize, 1)
            self.assertEqual(dtypes.by_name("f32").numpy, np.dtype("<f4"))


class BeyondFourGibibytesTest(absltest.TestCase):
    """Offsets beyond 2^32: what lies there is read, in files of holes, and headers say it."""

    LARGE = (1 << 32) + (1 << 20)

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def test_safetensors(self):
        path = self.folder / "x.safetensors"
        entries = {
            "a": {"dtype": "U8", "shape": [self.LARGE], "data_offsets": [0, self.LARGE]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [self.LARGE, self.LARGE + 8]},
        }
        header = json.dumps(entries).encode()
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + self.LARGE)
            file.seek(0, os.SEEK_END)
            file.write(b"\1\2\3\4\5\6\7\x08")
        with open_checkpoint(path) as checkpoint:
            self.assertEqual(checkpoint.tensors["a"].nbytes, self.LARGE)
            self.assertEqual(checkpoint.tensors["b"].raw(), b"\1\2\3\4\5\6\7\x08")
            self.assertEqual(checkpoint.tensors["a"].raw(slice(self.LARGE - 3, self.LARGE)), bytes(3))

    def test_apr(self):
        from tests.fuzz.seeds import apr
        from tests.hostile.cases import index_entry

        path = self.folder / "x.apr"
        small = apr(b"{}", [("a", 7, (4,), bytes(4)), ("b", 0, (2,), bytes(8))])
        index = index_entry(b"a", 0, (self.LARGE // 4,), 0, self.LARGE) + index_entry(b"b", 0, (2,), self.LARGE, 8)
        prologue = small[:128] + index.ljust(64, b"\0")
        with path.open("wb") as file:
            file.write(prologue)
            file.truncate(192 + self.LARGE)
            file.seek(0, os.SEEK_END)
            file.write(b"\1\2\3\4\5\6\7\x08".ljust(64, b"\0") + bytes(4))
        with open_checkpoint(path) as checkpoint:
            self.assertEqual(checkpoint.tensors["a"].nbytes, self.LARGE)
            self.assertEqual(checkpoint.tensors["b"].raw(), b"\1\2\3\4\5\6\7\x08")

    def test_headers_of_both_are_written_with_such_offsets_and_read_again(self):
        f32 = dtypes.by_name("f32")
        tensors = [("a", f32, (self.LARGE // 4,)), ("b", f32, (2,)), ("c", f32, (self.LARGE // 4,))]
        total = 2 * self.LARGE + 8
        text = safetensors_format.serialise_header(tensors)
        header = safetensors_format.parse_header(text[8:], len(text) + total)
        self.assertEqual([entry.begin for entry in header.entries], [0, self.LARGE, self.LARGE + 8])
        entries = apr_format.lay_out([(name, dtype, shape, dtype.nbytes(shape)) for name, dtype, shape in tensors])
        prologue = apr_format.serialise_prologue({}, entries)
        parsed = apr_format.parse_prologue(prologue, len(prologue) + 2 * self.LARGE + 64 + 4)
        self.assertEqual([entry.offset for entry in parsed.entries], [0, self.LARGE, self.LARGE + 64])


if __name__ == "__main__":
    absltest.main()
