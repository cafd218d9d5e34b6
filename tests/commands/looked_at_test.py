"""What a command is given beside the model is looked at before it is read: huge, endless and irregular files."""

import os
import pathlib
import resource
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.errors import AprJaxError, BrokenContainerError, RefusedError, UsageError
from apr_jax.trace import aprt, golden, inputs
from apr_jax.trace.positions import parse_positions
from tests import paths, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")
HUGE = 1 << 30


def sparse(path: pathlib.Path, begin: bytes = b"") -> pathlib.Path:
    """A file of 1 GiB that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(HUGE)
    return path


class LookedAtTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        with open_checkpoint(SAMPLE) as checkpoint:
            self.config = checkpoint.model_config()

    def refused(self, read, *args, code: str, kind: type[AprJaxError] = BrokenContainerError) -> None:
        """Checks that reading fails within 100 ms and 50 MB."""
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with self.assertRaises(kind) as caught:
            read(*args)
        self.assertEqual(caught.exception.code, code)
        self.assertIsNotNone(caught.exception.file)
        self.assertLess(time.monotonic() - begun, 1)
        self.assertLess(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 50 << 10)

    @parameterized.parameters("token_ids.json", "inputs.json")
    def test_sparse_files_beside_a_dump(self, name):
        sparse(self.folder / name)
        self.refused(inputs.beside, self.folder, code="file-size")

    def test_sparse_raw_inputs(self):
        sparse(self.folder / "input_ids.1x64.i32")
        self.refused(inputs.beside, self.folder, code="inputs-size")
        (self.folder / "input_ids.1x64.i32").unlink()
        sparse(self.folder / f"input_ids.1x{HUGE // 4}.i32")
        self.refused(inputs.beside, self.folder, code="inputs-size")

    @parameterized.parameters(
        (b"", BrokenContainerError, "aprt-magic"),
        (b"APRT" + bytes(4) + (7).to_bytes(4, "little"), BrokenContainerError, "aprt-length"),
        (b"APRT" + bytes(4) + ((HUGE - 12) // 4).to_bytes(4, "little"), RefusedError, "dump-size"),
    )
    def test_sparse_stages(self, begin, kind, code):
        sparse(self.folder / "layer-0" / "attn_norm.bin", begin)
        batch = inputs.seeded(288, 1, 8)
        self.refused(aprt.read, self.folder, self.config, batch, code=code, kind=kind)

    def test_sparse_lists(self):
        path = os.fspath(sparse(self.folder / "x.json"))
        for read in (golden.read_inputs, parse_positions):
            self.refused(read, path, code="file-size")

    @parameterized.parameters("fifo", "/dev/zero", "/dev/stdin")
    def test_what_is_no_regular_file(self, path):
        if path == "fifo":
            path = self.folder / path
            os.mkfifo(path)
        for read in (golden.read_inputs, parse_positions):
            self.refused(read, os.fspath(path), code="not-a-regular-file", kind=RefusedError)

    @parameterized.parameters(
        "0-99999999999", "99999999999", "0-1" + "0" * 4999, "9" * 5000, "0-1048575,0-1048575,0-1048575",
        ",".join(["0-1048575"] * 1000), "5-1048576",
    )  # fmt: skip
    def test_positions_beyond_any_model(self, text):
        with self.assertRaisesRegex(UsageError, "out of range"):
            parse_positions(text)

    @parameterized.parameters(
        ("generate", "--prompts", 5), ("generate", "--input-ids", 5), ("golden", "--input-ids", 5)
    )
    def test_a_command_does_not_wait_for_a_fifo(self, command, option, code):
        os.mkfifo(self.folder / "fifo")
        arguments = [
            SAMPLE,
            option,
            self.folder / "fifo",
            *(["-o", self.folder / "out"] if command == "golden" else []),
        ]

        def waited(*_):
            raise AssertionError("the command waits for somebody to write into the FIFO")

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, waited))
        self.addCleanup(signal.alarm, 0)
        signal.alarm(20)
        self.assertIn("FIFO", tool.ran(self, command, *arguments, code=code).stderr)


if __name__ == "__main__":
    absltest.main()
