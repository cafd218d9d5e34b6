"""Calls into a child: what comes back, and what ends it: time, memory, an abort, its parent."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.errors import RefusedError, StorageError, UsageError
from apr_jax.converters.storage import isolation
from apr_jax.converters.storage.isolation import Isolated

# Called by name in the child, which imports this file.
HERE = "tests.converters.storage.isolation_test"


def doubled(values: list[int]) -> list[int]:
    print("noise on stdout")
    return [2 * value for value in values]


def process() -> int:
    return os.getpid()


def refuses() -> None:
    raise UsageError("no", code="some-code", file="f", offset=3, found={"a": 1}, hint="Else")


def spins() -> None:
    while True:
        pass


def fills() -> None:
    bytes(1 << 40)


def aborts() -> None:
    os.abort()


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves() -> None:
    os._exit(0)


def sleeps() -> None:
    time.sleep(60)


def fails() -> None:
    raise SystemError("inner")


class IsolationTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.child = Isolated(HERE, "the thing")
        self.addCleanup(self.child.close)

    def test_values_come_back_from_one_child_and_not_this_process(self):
        self.assertEqual(self.child.call("doubled", [1, 2]), [2, 4])
        first = self.child.call("process")
        self.assertNotEqual(first, os.getpid())
        self.assertEqual(self.child.call("process"), first)
        self.child.close()
        self.assertNotEqual(self.child.call("process"), first)

    def test_errors_of_the_family_come_back_whole(self):
        with self.assertRaises(UsageError) as caught:
            self.child.call("refuses")
        error = caught.exception
        self.assertEqual(error.to_json(), {"code": "some-code", "message": "no", "file": "f", "offset": 3,
                                           "found": {"a": 1}, "hint": "Else"})  # fmt: skip
        self.assertEqual(self.child.call("doubled", [3]), [6])

    @parameterized.parameters(
        ("spins", "does not end"), ("fills", "too much memory"), ("aborts", "ends the process"),
        ("is_killed", "ends the process"), ("leaves", "ends the process"), ("fails", "ends the process"),
    )  # fmt: skip
    def test_what_ends_the_child_is_an_error_here(self, function, message):
        child = Isolated(HERE, "the thing", seconds=0.2)
        with self.assertRaisesRegex(RefusedError, f"the thing .*{message}"):
            child.call(function)
        self.assertEqual(child.call("doubled", [1]), [2], "another child serves the next call")
        child.close()

    def test_a_child_that_ends_before_it_is_written_to_is_an_error_here(self):
        process, send = self.child.call("process"), isolation._send

        def killed_first(stream, message):
            os.kill(process, signal.SIGKILL)
            os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
            send(stream, message)

        with (
            mock.patch.object(isolation, "_send", killed_first),
            self.assertRaisesRegex(RefusedError, "the thing ends the process"),
        ):
            self.child.call("process")
        self.assertEqual(self.child.call("doubled", [1]), [2])

    def test_a_child_that_does_nothing_is_not_waited_for_without_end(self):
        with (
            mock.patch.object(isolation, "_PATIENCE_SECONDS", 0.2),
            mock.patch.object(isolation, "_LAST_SECONDS", 0.0),
            self.assertRaisesRegex(RefusedError, "the thing does not end"),
        ):
            self.child.call("sleeps")
        self.assertEqual(self.child.call("doubled", [1]), [2])

    def test_where_no_process_can_be_started_that_is_said(self):
        with mock.patch.object(sys, "executable", "/nowhere/python"), self.assertRaises(StorageError) as caught:
            self.child.call("process")
        self.assertEqual(caught.exception.code, "child-failed")
        self.assertIn("No such file or directory", caught.exception.message)

    def test_a_child_answers_until_its_input_ends(self):
        requests = [["doubled", [4]], ["fills"], ["refuses"]]
        given = b"".join(
            len(text).to_bytes(8, "little") + text for text in (json.dumps(request).encode() for request in requests)
        )
        program = f"import sys; sys.path = {sys.path!r}\n" + (
            f"from apr_jax.converters.storage.isolation import serve\nserve({HERE!r}, 10.0, {1 << 27})"
        )
        done = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, check=True)
        answers, rest = [], done.stdout
        while rest:
            length = int.from_bytes(rest[:8], "little")
            answers.append(json.loads(rest[8 : 8 + length]))
            rest = rest[8 + length :]
        self.assertEqual([status for status, _ in answers], ["value", "memory", "error"])
        self.assertEqual(answers[0][1], [8])
        self.assertEqual((answers[2][1]["family"], answers[2][1]["code"]), ("UsageError", "some-code"))

    def test_a_child_ends_with_its_parent(self):
        program = (
            f"import sys; sys.path = {sys.path!r}\nfrom apr_jax.converters.storage.isolation import Isolated\n"
            f"print(Isolated({HERE!r}, 'x').call('process'), flush=True)\nimport os; os.kill(os.getpid(), 9)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        child = int(done.stdout)
        for _ in range(100):
            if not pathlib.Path(f"/proc/{child}").exists() or "Z" in pathlib.Path(f"/proc/{child}/stat").read_text():
                break
            time.sleep(0.05)
        else:
            self.fail("the child is still there")


if __name__ == "__main__":
    absltest.main()
