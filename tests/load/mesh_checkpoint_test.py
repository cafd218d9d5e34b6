"""Checkpoints that several devices have written: restored on any mesh bit for bit, by Orbax alone, and as the source.

Eight devices are simulated, in processes of their own: JAX decides at its start how many there are.
"""

import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import pytest
import safetensors
from absl.testing import absltest, parameterized

from apr_jax.commands import checkpoint as command
from apr_jax.converters.convert import restoring
from apr_jax.converters.convert.run import convert
from apr_jax.converters.errors import AprJaxError, BrokenContainerError, StorageError
from apr_jax.converters.formats import prepared_format
from apr_jax.converters.formats.chunked import ChunkedFile
from tests import paths, tool

SOURCE = paths.checkpoint("gqa_tied_bf16")
MESHES = ("data=2,model=2", "model=4", "model=8", "data=8", "data=2,model=4")
# Saves checkpoints on meshes and restores each on all of them; prints what differs from the model loaded from its
# source.
_PROGRAM = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.commands.arguments import _mesh
from apr_jax.load import prepared
from apr_jax.load.load_model import find_mesh, load_model
from apr_jax.model.parameters import named
folder, (names, saved_on, meshes) = pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
same, differing, threads = 0, [], 0
for name, dtype in names:
    source = pathlib.Path(sys.argv[1], "tests/data/checkpoints", name)
    expected = {path: np.asarray(array) for path, array in named(load_model(source, dtype, "cpu").parameters).items()}
    for number, shape in enumerate(saved_on):
        place = str(folder / f"{name}-{number}")
        mesh = find_mesh(_mesh(shape), "cpu")
        if number % 2:
            # As training does: what is saved is donated meanwhile.
            model = load_model(source, dtype, mesh)
            saving = prepared.begin(model, place)
            jax.tree.map(lambda array: array.delete(), model.parameters)
            threads += not saving.is_done()
            saving.wait()
        else:
            with open_checkpoint(source) as checkpoint:
                prepared.save(checkpoint, place, dtype=dtype, device=mesh)
        for mesh in [None, *meshes]:
            device = "cpu" if mesh is None else find_mesh(_mesh(mesh), "cpu")
            prepared.check(place, device)
            found = named(load_model(place, dtype, device).parameters)
            assert found.keys() == expected.keys()
            for path, array in found.items():
                host = np.asarray(array)
                if host.dtype == expected[path].dtype and host.tobytes() == expected[path].tobytes():
                    same += 1
                else:
                    differing.append([name, shape, mesh, path])
print(json.dumps({"same": same, "differing": differing, "threads": threads}))
"""


def environment(devices: int = 8) -> dict[str, str]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    return {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | flags


def ran(*arguments: object, devices: int = 8) -> str:
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(devices), cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def restored(folder: pathlib.Path, names, saved_on, meshes) -> dict:
    given = json.dumps([names, saved_on, meshes])
    return json.loads(ran("-c", _PROGRAM, paths.ROOT, folder, given).splitlines()[-1])


def tensor_hashes(folder: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """As the safetensors package finds them."""
    return {
        name: (value["dtype"], tuple(value["shape"]), hashlib.sha256(bytes(value["data"])).hexdigest())
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in safetensors.deserialize(file.read_bytes())
    }


class MeshTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.scratch = pathlib.Path(absltest.TEST_TMPDIR.value, "mesh_checkpoint")
        shutil.rmtree(cls.scratch, ignore_errors=True)
        cls.scratch.mkdir(parents=True)
        cls.found = restored(cls.scratch, [("gqa_tied_bf16", "bfloat16")], ["model=4"] * 2, ["data=2,model=2"])
        cls.saved = cls.scratch / "gqa_tied_bf16-0"

    def copy(self) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(self.saved, pathlib.Path(self.create_tempdir().full_path, "prepared")))

    def test_saved_on_four_it_is_bit_equal_on_two_by_two_and_on_one_device(self):
        # Once from its source, and once beside a training that goes on.
        self.assertEqual(self.found, {"same": 2 * 2 * 26, "differing": [], "threads": 1})
        for number in range(2):
            down = self.saved.parent / f"gqa_tied_bf16-{number}" / "parameters" / "model.layers.1.mlp.down_proj.weight"
            self.assertEqual(sorted(file.name for file in down.iterdir()), [".zarray", "0.0", "0.1", "0.2", "0.3"])

    def test_what_every_device_holds_is_one_file(self):
        for number in range(2):
            norm = self.saved.parent / f"gqa_tied_bf16-{number}" / "parameters" / "model.norm.weight"
            self.assertEqual(sorted(file.name for file in norm.iterdir()), [".zarray", "0"])

    def test_a_program_that_has_only_orbax_restores_it(self):
        text = ran(paths.ROOT / "examples" / "restore_with_orbax.py", self.saved, devices=2)
        found = {line.split()[-1]: line.split()[0] for line in text.splitlines()}
        # Bfloat16 was saved as bfloat16: the very bytes of the source, as the safetensors package finds them.
        tensors = safetensors.deserialize((SOURCE / "model.safetensors").read_bytes())
        self.assertEqual(found, {name: f"{zlib.crc32(fields['data']):08x}" for name, fields in tensors})
        self.assertIn("bfloat16 [288, 64] on 2 devices model.embed_tokens.weight", text)
        self.assertNotIn("apr_jax", (paths.ROOT / "examples" / "restore_with_orbax.py").read_text().split('"""')[2])

    @parameterized.parameters("m.apr", "hf", "m.safetensors")
    def test_what_is_restored_to_files_is_what_converting_the_source_gives(self, name):
        folder = pathlib.Path(self.create_tempdir().full_path)
        source = pathlib.Path(shutil.copytree(SOURCE, folder / "prepared_from" / "prepared"))
        saved = pathlib.Path(shutil.copytree(self.saved, folder / "prepared"))
        restoring.restore(str(saved), str(folder / name))
        convert(source, folder / "expected" if name == "hf" else folder / f"expected-{name}",
                to="apr" if name == "m.apr" else "safetensors")  # fmt: skip
        expected = folder / "expected" if name == "hf" else folder / f"expected-{name}"
        for file in expected.iterdir() if name == "hf" else [expected]:
            found = folder / name / file.name if name == "hf" else folder / name
            self.assertEqual(found.read_bytes(), file.read_bytes(), file.name)

    def test_show_says_what_is_in_it(self):
        text = tool.ran(self, "checkpoint", "show", self.saved).stdout
        self.assertIn("210,048 bytes, bfloat16, not fused, from 4 devices", text)
        self.assertRegex(text, r"model\.layers\.1\.mlp\.down_proj\.weight +64x160 +20480 +bf16 ")
        self.assertIn("`checkpoint save` writes one", tool.ran(self, "checkpoint", "show", SOURCE, code=2).stderr)

    def test_a_part_that_was_changed_lost_or_cut_is_named(self):
        folder = self.copy()
        part = folder / "parameters" / "model.layers.1.mlp.down_proj.weight" / "0.2"
        data = part.read_bytes()
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        for restore in (
            lambda: restoring.restore(str(folder), str(folder.parent / "m.apr")),
            lambda: command.main(command.parse(["checkpoint", "restore", str(folder), "--device", "cpu"])),
        ):
            with self.assertRaises(BrokenContainerError) as caught:
                restore()
            self.assertEqual(caught.exception.code, "prepared-hash")
            self.assertEqual(caught.exception.tensor, "model.layers.1.mlp.down_proj.weight")
        self.assertFalse((folder.parent / "m.apr").exists())
        for content in (data[:-1], None):
            part.unlink() if content is None else part.write_bytes(content)
            with self.assertRaises(AprJaxError) as caught:
                restoring.restore(str(folder), str(folder.parent / "m.apr"))
            self.assertEqual(caught.exception.code, "file-missing" if content is None else "prepared-size")
            self.assertEqual(caught.exception.file, str(part))


class ChunkedFileTest(parameterized.TestCase):
    @parameterized.parameters(
        ((6, 8), (6, 2)), ((6, 8), (3, 8)), ((6, 8), (2, 4)), ((6, 8), (1, 1)), ((12,), (3,)), ((4, 6, 5), (2, 3, 5))
    )
    def test_every_range_is_that_of_the_whole(self, shape, chunks):
        import numpy as np

        folder = pathlib.Path(self.create_tempdir().full_path)
        values = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
        for place in np.ndindex(*(whole // part for whole, part in zip(shape, chunks, strict=True))):
            part = values[tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, chunks, strict=True))]
            (folder / ".".join(map(str, place))).write_bytes(part.tobytes())
        data = values.tobytes()
        source = ChunkedFile(str(folder), shape, chunks, 2)
        self.assertEqual(source.size, len(data))
        for begin in range(len(data)):
            for end in {*range(begin, len(data) + 1, 7), len(data)}:
                self.assertEqual(source.read_at(begin, end - begin), data[begin:end], (begin, end))
        with self.assertRaises(StorageError):
            source.read_at(1, len(data))
        source.check_unchanged()
        first = folder / ".".join("0" for _ in shape)
        os.utime(first, ns=(0, 0))
        for look in (source.check_unchanged, lambda: source.read_at(0, 1)):
            with self.assertRaises(StorageError) as caught:
                look()
            self.assertEqual(caught.exception.code, "source-changed")


class TypesTest(parameterized.TestCase):
    @parameterized.parameters(
        ("gqa_tied_bf16", "float32"), ("mixed_dtypes", "float32"), ("mqa_f16", "float64"), ("odd_sizes", "float32")
    )
    def test_what_was_widened_comes_back_in_the_types_of_the_source(self, name, dtype):
        folder = pathlib.Path(self.create_tempdir().full_path)
        source = paths.checkpoint(name)
        tool.ran(self, "checkpoint", "save", source, folder / "prepared", "--dtype", dtype)
        said = tool.ran(self, "checkpoint", "restore", folder / "prepared", "-o", folder / "hf").stdout
        self.assertIn("tensors as in the source", said)
        self.assertEqual(tensor_hashes(folder / "hf"), tensor_hashes(source))
        for file in source.iterdir():
            if not re.search(r"safetensors", file.name):
                self.assertEqual((folder / "hf" / file.name).read_bytes(), file.read_bytes(), file.name)

    def test_what_was_narrowed_stays_so_and_that_is_said(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        source = paths.checkpoint("mha_untied_f32_sharded")
        tool.ran(self, "checkpoint", "save", source, folder / "prepared", "--dtype", "bfloat16", "--fused")
        said = tool.ran(self, "checkpoint", "restore", folder / "prepared", "-o", folder / "m.apr").stdout
        self.assertRegex(said, r"(\d+) of \1 tensors in the type that they were saved in, not the source's")

    def test_what_an_older_version_has_saved_comes_back_as_it_was_saved(self):
        folder = pathlib.Path(self.create_tempdir().full_path)
        tool.ran(self, "checkpoint", "save", SOURCE, folder / "prepared", "--dtype", "bfloat16", "--fused")
        path = folder / "prepared" / "prepared.json"
        description = json.loads(path.read_text())
        del description["types"]
        path.write_text(json.dumps(description))
        tool.ran(self, "checkpoint", "restore", folder / "prepared", "-o", folder / "hf")
        self.assertEqual(tensor_hashes(folder / "hf"), tensor_hashes(SOURCE))
        self.assertEqual(prepared_format.describe(str(folder / "prepared")).types, {})


@pytest.mark.slow
class EveryMeshTest(absltest.TestCase):
    def test_saved_on_any_mesh_and_restored_on_any_other(self):
        names = [("gqa_tied_bf16", "float32"), ("gqa_untied_bf16", "bfloat16"), ("odd_sizes", "bfloat16"),
                 ("mixed_dtypes", "float64")]  # fmt: skip
        folder = pathlib.Path(self.create_tempdir().full_path)
        found = restored(folder, names, MESHES, MESHES)
        self.assertEqual(found["differing"], [])
        self.assertGreater(found["same"], len(names) * len(MESHES) * (len(MESHES) + 1) * 20)
        for saved in folder.iterdir():
            ran(paths.ROOT / "examples" / "restore_with_orbax.py", saved, devices=3)


# Saves as a user does, but with a disk that takes its time, so that a kill comes between any two of its calls.
_SLOW = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
fsync = os.fsync
def slow(fd):
    time.sleep(50e-3)
    fsync(fd)
os.fsync = slow
from apr_jax.load import prepared
being_written = prepared._being_written
def said(*arguments):
    print("begins", flush=True)
    return being_written(*arguments)
prepared._being_written = said
from apr_jax.converters.commands import cli
cli.start("apr_jax.commands.checkpoint", ["checkpoint", *sys.argv[2:]])
"""


@pytest.mark.slow
class KillTest(absltest.TestCase):
    def start(self, dtype: str) -> subprocess.Popen[bytes]:
        arguments = ("save", SOURCE, self.folder, "--mesh", "model=4", "--force", "--dtype", dtype)
        words = [sys.executable, "-W", "ignore", "-c", _SLOW, paths.ROOT, *arguments]
        return subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(4)
        )

    def test_a_save_that_is_killed_at_ten_moments_leaves_a_checkpoint_that_can_be_restored(self):
        self.folder = pathlib.Path(self.create_tempdir().full_path, "prepared")
        _, errors = self.start("float32").communicate()
        self.assertTrue(self.folder.is_dir(), errors)
        process = self.start("float32")
        process.stdout.readline()
        begun = time.monotonic()
        process.communicate()
        seconds, chance, left = time.monotonic() - begun, random.Random(18), 0
        stood = "float32"
        for moment in range(10):
            wanted = "bfloat16" if stood == "float32" else "float32"
            process = self.start(wanted)
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.9 * seconds))
            process.kill()
            process.communicate()
            found = prepared_format.describe(str(self.folder)).dtype
            self.assertIn(found, (stood, wanted), moment)
            left += any(".apr-jax-tmp." in name for name in os.listdir(self.folder.parent))
            stood = found
            # By our reader with the hashes that were saved, and by Orbax in a program of its own.
            restoring.restore(str(self.folder), str(self.folder.parent / "m.apr"), force=True)
            ran(paths.ROOT / "examples" / "restore_with_orbax.py", self.folder, devices=1)
        print(f"10 kills in {seconds:.2f} s: {left} left a temporary")
        self.assertGreater(left, 4, "the kills did not hit the writing")
        _, errors = self.start("bfloat16").communicate()
        self.assertEqual(sorted(os.listdir(self.folder.parent)), ["m.apr", "prepared"], errors)


if __name__ == "__main__":
    absltest.main()
