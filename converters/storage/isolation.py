"""Functions that work on what strangers wrote, called in a process of their own, with bounds in time and memory.

A template that loops, a regular expression that backtracks for years, native code that aborts: what cannot be judged by
looking at it ends the child, and here it is an error. One child serves all calls of a module, since starting one takes
a tenth of a second. It counts processor time, so that a busy machine changes no answer, and ends with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO

from apr_jax.converters import errors
from apr_jax.converters.errors import AprJaxError, RefusedError, StorageError

SECONDS = 1.0
"""Processor time for a call, and the same again for each 16 MB that it is given."""
MEMORY_BYTES = 128 << 20
"""Memory for a call beyond what the child has, and eight times the bytes that it is given."""
_BYTES_A_SECOND = 16 << 20
_PATIENCE_SECONDS, _LAST_SECONDS = 120.0, 10.0
_LENGTH_BYTES = 8


class Isolated:
    """The functions of one module, called in a child. Arguments and results are plain JSON values.

    Threads take turns. A process that was forked starts a child of its own.
    """

    def __init__(self, module: str, what: str, *, seconds: float = SECONDS, memory: int = MEMORY_BYTES):
        """Prepares for calls; the child starts with the first one.

        Args:
          module: Its full name.
          what: What the functions work on, for error messages ("the chat template").
          seconds, memory: As `SECONDS` and `MEMORY_BYTES`.
        """
        self._module, self._what, self._seconds, self._memory = module, what, seconds, memory
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def call(self, function: str, *arguments: Any) -> Any:
        """Returns what a function of the module returns.

        Raises:
          AprJaxError: What the function raised.
          RefusedError: Code "not-bounded": it took too long, too much memory, or ended its process.
          StorageError: Code "child-failed": no process can be started.
        """
        with self._lock:
            try:
                status, value = self._ask(json.dumps([function, *arguments]).encode())
            except BaseException:
                # Whatever interrupted the call, half an answer may be on its way.
                self.close()
                raise
        if status == "error":
            raise getattr(errors, value.pop("family"))(value.pop("message"), **value)
        return value

    def close(self) -> None:
        """Ends the child; the next call starts another."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for stream in filter(None, (child.stdin, child.stdout)):
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, request: bytes) -> tuple[str, Any]:
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            _send(child.stdin, request)
            answer = _receive(child.stdout, deadline)
        except BrokenPipeError:
            answer = None
        if answer is None:
            late = time.monotonic() >= deadline
            if not late:
                # It is about to end by itself: how, its status will say.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_LAST_SECONDS)
            self.close()
            raise self._not_bounded("time" if late or child.returncode == -signal.SIGPROF else "died")
        status, value = json.loads(answer)
        if status == "memory":
            self.close()
            raise self._not_bounded("memory")
        return status, value

    def _not_bounded(self, reason: str) -> RefusedError:
        said = {
            "time": "does not end: it was stopped",
            "memory": "takes too much memory: it was stopped",
            "died": "ends the process that works on it",
        }
        return RefusedError(f"{self._what} {said[reason]}", code="not-bounded")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        self.close()
        program = (
            f"import sys; sys.path = {sys.path!r}\n"
            f"from {__name__} import serve\nserve({self._module!r}, {self._seconds!r}, {self._memory!r})"
        )
        try:
            # A session of its own, so that Ctrl-C reaches the parent alone; panics of native code say nothing.
            self._child = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise StorageError(
                f"{self._what} is worked on in a process of its own, and none can be started: {error.strerror}",
                code="child-failed",
            ) from error
        self._owner = os.getpid()
        return self._child


def serve(module: str, seconds: float, memory: int) -> None:
    """Is the child: answers calls until its input ends."""
    functions = importlib.import_module(module)
    # A descriptor that nothing else knows: what native code prints stays out of the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while (request := _receive(sys.stdin.buffer)) is not None:
        _limit(seconds, memory, len(request))
        try:
            function, *arguments = json.loads(request)
            answer = json.dumps(["value", getattr(functions, function)(*arguments)]).encode()
        except MemoryError:
            answer = b'["memory", null]'
        except AprJaxError as error:
            answer = json.dumps(["error", {"family": type(error).__name__, **vars(error)}], default=str).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(answers, answer)


def _limit(seconds: float, memory: int, given: int) -> None:
    """Bounds what this process may use from now on; too much time ends it."""
    signal.setitimer(signal.ITIMER_PROF, seconds * (1 + given / _BYTES_A_SECOND))
    with open("/proc/self/statm", "rb") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + memory + 8 * given, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _send(stream: BinaryIO | Any, message: bytes) -> None:
    stream.write(len(message).to_bytes(_LENGTH_BYTES, "little") + message)
    stream.flush()


def _receive(stream: BinaryIO | Any, deadline: float | None = None) -> bytes | None:
    """Returns a whole message; None if the other side is gone, or the deadline passed."""
    length = _take(stream, _LENGTH_BYTES, deadline)
    return None if length is None else _take(stream, int.from_bytes(length, "little"), deadline)


def _take(stream: BinaryIO | Any, count: int, deadline: float | None) -> bytes | None:
    pieces, fd = [], stream.fileno()
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    while count:
        if deadline is not None and not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        piece = os.read(fd, min(count, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
