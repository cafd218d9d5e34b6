"""Commands as several processes on this machine, two simulated devices each: results, errors, deaths, timeouts."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from apr_jax.trace import golden
from tests import paths, tool

TINY = paths.checkpoint("gqa_tied_bf16")
GOLDEN = paths.golden("gqa_tied_bf16")
MESH = "data=2,model=4"
FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
# As tools/NAME.py does it, with less patience.
HASTY = """
import sys
from apr_jax.commands import processes
from apr_jax.converters.commands import cli
processes._WAIT_SECONDS = 2.0
cli.start("apr_jax.commands." + sys.argv[1], sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Processes(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.coordinator = f"127.0.0.1:{free_port()}"

    def start(self, command, *args, program=None, within=(), **environment):
        """Starts one process, `within` going before its command; what it prints goes to files of its number."""
        number = len(list(self.folder.glob("out*")))
        out, err = (open(self.folder / f"{kind}{number}", "w") for kind in ("out", "err"))  # noqa: SIM115
        script = [str(paths.ROOT / "tools" / f"{command}.py")] if program is None else ["-c", program, command]
        settings = {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(paths.ROOT), **environment}
        with out, err:
            started = subprocess.Popen(
                [*within, sys.executable, *script, *map(str, args)],
                env={**os.environ, **settings},
                stdout=out,
                stderr=err,
            )
        self.addCleanup(started.kill)
        return started

    def start_all(self, command, *args, count=4, own=lambda number: ()):
        found = ("--mesh", MESH, "--coordinator", self.coordinator, "--num-processes", count)
        return [self.start(command, *args, *own(number), *found, "--process-id", number) for number in range(count)]

    def ended(self, started, timeout=300):
        """Exit codes, and what each printed on stdout and on stderr."""
        codes = [one.wait(timeout) for one in started]
        # What stands on stderr is written by a reader that may be a moment behind.
        time.sleep(0.5)
        texts = [
            [(self.folder / f"{kind}{number}").read_text() for kind in ("out", "err")] for number in range(len(codes))
        ]
        return codes, texts

    def run_all(self, command, *args, **settings):
        """Runs a command as four processes; only the first may say anything. Returns its stdout."""
        codes, texts = self.ended(self.start_all(command, *args, **settings))
        self.assertEqual(codes, [0] * len(codes), texts)
        self.assertEqual(texts[1:], [["", ""]] * (len(codes) - 1))
        self.assertNotIn("Traceback", texts[0][1])
        return texts[0][0]


@pytest.mark.slow
class SameResultTest(_Processes):
    def test_golden_of_four_processes_is_that_of_one(self):
        several, same, alone = (self.folder / f"{name}.safetensors" for name in ("several", "same", "alone"))
        given = (TINY, "--trace", "--gradients", "--hidden-states")
        self.run_all("golden", *given, "-o", several)
        eight = FLAGS.replace("count=2", "count=8")
        codes, _ = self.ended([self.start("golden", *given, "-o", same, "--mesh", MESH, XLA_FLAGS=eight)])
        self.assertEqual((codes, tool.run("golden", *given, "-o", alone).returncode), ([0], 0))
        found, on_one_mesh, expected = map(golden.read, (several, same, alone))
        self.assertEqual(found.values.keys(), expected.values.keys())
        self.assertGreater(len(expected.values), 100)
        for key, value in on_one_mesh.values.items():
            error = np.linalg.norm(found.values[key] - value) / np.linalg.norm(value)
            self.assertLess(error, 1e-5 if key.startswith("grad.") else 1e-6, key)
        for key, value in expected.values.items():
            error = np.linalg.norm(found.values[key] - value) / np.linalg.norm(value)
            # Of gradients, that of a k bias is what is left of a sum that cancels.
            bar = 1e-6 if key == "logits" else 1e-4 if key.endswith("k_proj.bias") else 1e-5
            self.assertLess(error, bar, key)

    def test_golden_check_against_huggingface(self):
        report = json.loads(self.run_all("golden", TINY, "--check", GOLDEN, "--json"))
        self.assertTrue(report["within"])
        self.assertGreater(report["elements"], 50_000)

    def test_loss_and_generate(self):
        text = self.folder / "text"
        text.write_text("So long, and thanks for all the fish. " * 20)
        losses = self.folder / "losses.safetensors"
        given = ("--text", text, "--window", 32, "--batch", 2, "--json")
        found = json.loads(self.run_all("loss", TINY, *given, "--per-token", losses))
        expected = json.loads(tool.run("loss", TINY, *given).stdout)
        self.assertAlmostEqual(found["loss_nats"], expected["loss_nats"], delta=1e-6 * expected["loss_nats"])
        self.assertTrue(losses.exists())
        for name in self.folder.glob("???[0-9]"):
            name.unlink()
        self.coordinator = f"127.0.0.1:{free_port()}"
        given = ("--prompt", "def f", "--prompt", "ab", "--greedy", "--max-new-tokens", 80, "--json")
        found = json.loads(self.run_all("generate", TINY, *given))
        expected = json.loads(tool.run("generate", TINY, *given).stdout)
        self.assertEqual(found["generations"], expected["generations"])

    def test_parity_names_a_mistake(self):
        from tests.battery import parity_battery

        parity_battery.write_real_case(self.folder / "wrong")
        started = self.start_all("parity", TINY, "--right", self.folder / "wrong")
        codes, texts = self.ended(started)
        self.assertEqual(codes, [1] * 4, texts)
        self.assertEqual(texts[1:], [["", ""]] * 3)
        alone = tool.run("parity", TINY, "--right", self.folder / "wrong").stdout
        named = [[line for line in text.splitlines() if line.startswith("  - ")] for text in (texts[0][0], alone)]
        self.assertLen(named[1], 4)
        self.assertEqual(*named)

    def test_two_processes_in_a_job_of_slurm(self):
        """The cluster is asked: `--coordinator auto`."""
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        started = [
            self.start(
                "golden", TINY, "--check", GOLDEN, "--mesh", "model=4", "--coordinator", "auto", **job,
                SLURM_PROCID=str(number), SLURM_LOCALID=str(number), SLURM_STEP_NUM_TASKS="2",
            )
            for number in range(2)
        ]  # fmt: skip
        codes, texts = self.ended(started)
        self.assertEqual(codes, [0, 0], texts)
        self.assertIn("agree", texts[0][0])
        self.assertEqual(texts[1], ["", ""])


@pytest.mark.slow
class NamespacesTest(_Processes):
    def ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def test_two_processes_with_a_network_between_them(self):
        """Each has an interface and a loopback of its own, as on two hosts."""
        spaces = [f"apr{os.getpid()}-{number}" for number in range(2)]
        try:
            for space in spaces:
                self.ip("netns", "add", space)
                self.addCleanup(self.ip, "netns", "del", space)
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f"no network namespaces: {error}")
        self.ip("link", "add", "ends0", "netns", spaces[0], "type", "veth", "peer", "name", "ends1", "netns", spaces[1])
        started = []
        for number, space in enumerate(spaces):
            address = f"10.77.0.{number + 1}"
            self.ip("-n", space, "addr", "add", f"{address}/24", "dev", f"ends{number}")
            for device in ("lo", f"ends{number}"):
                self.ip("-n", space, "link", "set", device, "up")
            # Gloo listens where the host's own name leads.
            hosts = self.folder / f"hosts{number}"
            hosts.write_text(f"{address} {socket.gethostname()}\n")
            inside = ["ip", "netns", "exec", space, "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts)]
            found = ("--coordinator", "10.77.0.1:9300", "--num-processes", 2, "--process-id", number)
            started.append(
                self.start("golden", TINY, "--check", GOLDEN, "--mesh", "data=2,model=2", *found, within=inside)
            )
        codes, texts = self.ended(started)
        self.assertEqual(codes, [0, 0], texts)
        self.assertIn("agree", texts[0][0])
        self.assertEqual(texts[1], ["", ""])


@pytest.mark.slow
class EndsTest(_Processes):
    @parameterized.parameters(2, 0)
    def test_a_process_that_is_killed_ends_the_others_by_name(self, killed):
        (self.folder / "ids.json").write_text("[[1, 2, 3]]")
        endless = ("--greedy", "--max-new-tokens", 4000, "--ignore-generation-config", "eos_token_id")
        started = self.start_all("generate", TINY, "--input-ids", self.folder / "ids.json", *endless)
        begun = time.monotonic()
        while not (self.folder / "out0").stat().st_size and time.monotonic() < begun + 200:
            time.sleep(0.2)
        self.assertIsNone(started[0].poll())
        started[killed].send_signal(signal.SIGKILL)
        moment = time.monotonic()
        codes, texts = self.ended(started)
        self.assertLess(time.monotonic() - moment, 60)
        self.assertEqual(codes[killed], -signal.SIGKILL)
        for number, (code, (_, err)) in enumerate(zip(codes, texts, strict=True)):
            if number != killed:
                self.assertNotEqual(code, 0)
                # Nothing else: no stack, and not that a token more was made.
                self.assertRegex(err, rf"^error: process {killed} [^\n]*\n$")

    def test_an_error_of_one_process_ends_all_with_one_message(self):
        def model(number):
            return [TINY if number != 2 else self.folder / "nothing"]

        started = self.start_all("golden", "--check", GOLDEN, own=model)
        codes, texts = self.ended(started)
        self.assertEqual(codes, [3] * 4)
        self.assertEqual([err for _, err in texts[1:]], [""] * 3)
        self.assertRegex(texts[0][1], r"^error: process 2 of 4: .*nothing: no such file.*\n$")

    def test_an_error_in_writing_ends_all(self):
        taken = self.folder / "taken.safetensors"
        taken.write_text("not to be replaced")
        codes, texts = self.ended(self.start_all("golden", TINY, "-o", taken))
        self.assertEqual(codes, [2] * 4)
        self.assertEqual([err for _, err in texts[1:]], [""] * 3)
        self.assertEqual(texts[0][1].count("--force"), 1)
        self.assertEqual(taken.read_text(), "not to be replaced")


class StartTest(_Processes):
    def hasty(self, *more):
        given = ("--check", GOLDEN, "--mesh", MESH, *more)
        codes, ((out, err),) = self.ended([self.start("golden", TINY, *given, program=HASTY)], 60)
        self.assertEqual(out, "")
        self.assertNotIn("Traceback", err)
        return codes[0], err

    def test_a_coordinator_that_cannot_be_reached(self):
        code, err = self.hasty("--coordinator", self.coordinator, "--process-id", 1, "--num-processes", 4)
        self.assertEqual(code, 7)
        self.assertRegex(err, rf"^error: the coordinator {self.coordinator} cannot be reached: .* for 2 s.*firewall")

    @pytest.mark.slow
    def test_processes_that_never_come(self):
        code, err = self.hasty("--coordinator", self.coordinator, "--process-id", 0, "--num-processes", 4)
        self.assertEqual(code, 7)
        self.assertRegex(err, r"^error: not all processes came within 2 s \(expected 4 at 127")

    @pytest.mark.slow
    def test_a_host_that_there_is_not(self):
        code, err = self.hasty("--coordinator", "nohost.invalid:1", "--process-id", 1, "--num-processes", 4)
        self.assertEqual(code, 7)
        self.assertIn("nohost.invalid:1 cannot be reached", err)

    @pytest.mark.slow
    def test_no_cluster_says_who_this_is(self):
        code, err = self.hasty("--coordinator", "auto")
        self.assertEqual(code, 2)
        self.assertIn("--process-id I", err)

    @parameterized.parameters(
        ("--coordinator nowhere", "HOST:PORT"),
        ("--process-id 1 --num-processes 2", "belong to --coordinator"),
        ("--coordinator a:1 --process-id 1", "go together"),
        ("--coordinator a:1 --process-id 2 --num-processes 2", "expected 0 to 1"),
        ("--coordinator auto --process-id 0 --num-processes 2", "leave --process-id"),
        ("--coordinator a:1", "needs --mesh"),
        ("--mesh model=2,model=4", "at most once"),
        ("--mesh model=0", "no mesh"),
        ("--mesh modl=2", "did you mean model?"),
        ("--mesh model=2 --reference hf", "what JAX computes"),
    )
    def test_options_that_do_not_go_together(self, given, said):
        words = given.split()
        if "--coordinator" in words and said != "needs --mesh":
            words += ["--mesh", MESH]
        done = tool.run("golden", TINY, "--check", GOLDEN, *words)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn(said, done.stderr)


if __name__ == "__main__":
    absltest.main()
