"""A command as one of several processes, on one host or many: how they find each other, who speaks, and how they end.

All is `jax.distributed`'s. What it does not do, and a user needs, is done here through the store of keys that its
coordinator keeps: the error of one process is what the first one prints, and ends all; and a process that was killed is
named by the others before the heartbeats of JAX end them with a message of its own.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from apr_jax.converters.commands import arguments, cli, terminal
from apr_jax.converters.errors import AprJaxError, StorageError, UsageError
from apr_jax.converters.storage.interrupts import EXIT_INTERRUPTED

AUTO = "auto"
_WAIT_SECONDS = 60.0  # for the coordinator and the other processes, at the start
_LOOK_SECONDS = 1.0
_SILENT_SECONDS = 20.0  # then a process is taken for dead
_HEARTBEAT_SECONDS = 60  # JAX's own, if nobody is left here to look
_LEAVE_SECONDS = 600.0  # for the others, once a process is done: the first one may have much to write
_KEYS = "apr_jax/"
# Reads what libraries print on stderr while the command runs. Where the coordinator dies, JAX ends the process from a
# thread of C++ at once, with a page of text: this says what it means, in the words that are its first argument.
_TRANSLATOR = """
import re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
# Gloo says who is connected to whom, in pieces that get mixed up.
chatter = re.compile("Gloo. Rank|peer ranks|Polled an error from coordination service|^[ :0-9]*$")
for line in sys.stdin:
    if chatter.search(line):
        continue
    if line.startswith("F") and "JAX distributed service detected fatal errors" in line:
        sys.stderr.write(sys.argv[1] + "\\n" if "Failed to send RPC" in line else line)
        break
    sys.stderr.write(line)
    sys.stderr.flush()
for line in sys.stdin:
    pass
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh, and the options by which several processes find each other."""
    arguments.add(parser, "--mesh")
    group = parser.add_argument_group("several processes (docs/meshes.md)")
    arguments.add(group, *arguments.OF_PROCESSES)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options of processes that do not go together."""
    numbers = (args.process_id, args.num_processes)
    if args.coordinator is None and numbers != (None, None):
        parser.error("--process-id and --num-processes belong to --coordinator HOST:PORT")
    if args.coordinator is not None and args.mesh is None:
        parser.error("--coordinator needs --mesh data=D,model=M, over the devices of all processes")
    if (numbers[0] is None) != (numbers[1] is None):
        parser.error("--process-id and --num-processes go together")
    if args.coordinator == AUTO and numbers != (None, None):
        parser.error("--coordinator auto asks the cluster: leave --process-id and --num-processes out")
    if numbers[0] is not None and not 0 <= numbers[0] < numbers[1]:
        parser.error(f"--process-id is {numbers[0]}, expected 0 to {numbers[1] - 1}")


_first = True


def is_first() -> bool:
    """Whether this process is the one that writes: the only one, or the first of several."""
    return _first


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Makes the block run on the devices of all processes that --coordinator brings together; else does nothing.

    Only the first process writes to stdout and stderr in it, and only it is to write files (`is_first`). However one of
    the processes ends in the block, all do.

    Raises:
      UsageError: The coordinator's address is none, or no cluster says which process this is.
      StorageError: Code "coordinator": it cannot be reached; or "processes": not all came.
    """
    if args.coordinator is None:
        yield
        return
    global _first
    _initialize(args)
    others = _Others()
    _first = others.own == 0
    if not _first:
        terminal.manner.quiet = True
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        yield
        others.leave()
    except BaseException as error:
        others.fail(error)
        raise


def _initialize(args: argparse.Namespace) -> None:
    """Joins the others."""
    import jax

    # What C++ prints on the way ("[Gloo] Rank 1 is connected ...") is no result.
    shown = os.dup(1)
    sys.stdout = open(shown, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    _translate(args)
    os.dup2(2, 1)
    given: dict[str, Any] = {}
    if args.coordinator != AUTO:
        given["coordinator_address"] = args.coordinator
        _reach(args)
    if args.process_id is not None:
        given |= {"num_processes": args.num_processes, "process_id": args.process_id}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for a notice in advance, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX aborts the process where it waits in vain.
    late = threading.Timer(_WAIT_SECONDS, _too_late, (sys.stderr, args))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=int(2 * _WAIT_SECONDS) + 1,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"the processes cannot be brought together: {str(error).splitlines()[0]}",
            code="processes",
            hint="Without SLURM or Open MPI around it, each process needs --coordinator HOST:PORT, --process-id I and "
            "--num-processes N",
        ) from None
    finally:
        late.cancel()


def _translate(args: argparse.Namespace) -> None:
    """Lets what is written to descriptor 2 go through the translator; `sys.stderr` stays where it was."""
    where = "" if args.coordinator == AUTO else f" ({args.coordinator})"
    said = f"error: process 0{where}, which coordinates the others, is gone or out of reach; this process ends, too"
    shown = os.dup(2)
    command = [sys.executable, "-S", "-c", _TRANSLATOR, said]
    # In a session of its own: it lives until this process has said all, and no signal to the group ends it before.
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, stderr=2, text=True, start_new_session=True)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    sys.stderr = open(shown, "w", 1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)  # noqa: SIM115


def _reach(args: argparse.Namespace) -> None:
    """Waits until the coordinator listens; the first process is it, and so may be one that asks the cluster."""
    host, _, port = args.coordinator.rpartition(":")
    if not args.process_id:
        return
    ends, said = time.monotonic() + _WAIT_SECONDS, "no answer"
    while time.monotonic() < ends:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, ends - time.monotonic())):
                return
        except socket.gaierror as error:
            raise _unreachable(args, error.strerror or str(error)) from None
        except OSError as error:
            said = error.strerror or str(error)
            time.sleep(0.2)
    raise _unreachable(args, f"{said}, for {_WAIT_SECONDS:g} s")


def _unreachable(args: argparse.Namespace, said: str) -> StorageError:
    return StorageError(
        f"the coordinator {args.coordinator} cannot be reached: {said}",
        code="coordinator",
        hint="It is the process with --process-id 0: has it been started, and does a firewall let its port through?",
    )


def _too_late(stderr: TextIO, args: argparse.Namespace) -> None:
    error = StorageError(
        f"not all processes came within {_WAIT_SECONDS:g} s",
        code="processes",
        expected=f"{args.num_processes or 'all'} at {args.coordinator}",
        hint="Each needs the same --coordinator and --num-processes, and its own --process-id",
    )
    sys.stderr = stderr
    _end(cli.report(error, as_json=False))


class _Others:
    """Looks after the other processes, in a thread of its own, and lets them know how this one does.

    Attributes:
      own: Which process this is.
    """

    def __init__(self) -> None:
        import jax
        from jax._src import distributed

        self._stderr = sys.stderr
        self.own, self._count = jax.process_index(), jax.process_count()
        # The store of the coordinator has no public name; Orbax uses it as well.
        store: Any = distributed.global_state.client
        self._store = store
        self._store.key_value_set(f"{_KEYS}who/{self.own}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._ended = threading.Event()
        self._ending = threading.Lock()
        threading.Thread(target=self._look, daemon=True).start()

    def leave(self) -> None:
        """Waits until all are done, since none can go on without the store of the first; looking goes on meanwhile."""
        sys.stdout.flush()
        self._store.wait_at_barrier(f"{_KEYS}done", int(_LEAVE_SECONDS * 1000))
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        """Tells the others, who end; returns in the process that is to print the error, with all others gone."""
        if not isinstance(error, AprJaxError | KeyboardInterrupt | MemoryError | OSError):
            # A collective fails where another process died or failed; who that was is about to be known.
            time.sleep(_SILENT_SECONDS + 5 * _LOOK_SECONDS if _is_of_xla(error) else 0)
        code, text = _said(error)
        with self._ending, contextlib.suppress(Exception):
            self._store.key_value_set(f"{_KEYS}error", json.dumps([self.own, code, text]))
        if self.own and isinstance(error, AprJaxError | KeyboardInterrupt):
            _end(code)
        self._ended.set()
        time.sleep(2.5 * _LOOK_SECONDS)
        # JAX would wait for the others at the end of the process.
        atexit.register(_end, code)
        # What is not foreseen is told where it happened.
        sys.stderr = self._stderr

    def _look(self) -> None:
        heard: dict[str, tuple[str, float]] = {}
        number = 0
        while not self._ended.wait(_LOOK_SECONDS):
            number += 1
            try:
                self._store.key_value_set(f"{_KEYS}alive/{self.own}", str(number), allow_overwrite=True)
                found = dict(self._store.key_value_dir_get(_KEYS))
            except Exception:
                # Of the coordinator JAX itself says that it is gone, and ends the process.
                continue
            now = time.monotonic()
            for other in map(str, range(self._count)):
                beat = found.get(f"{_KEYS}alive/{other}", "")
                if heard.get(other, ("", 0.0))[0] != beat or other not in heard:
                    heard[other] = beat, now
                if now - heard[other][1] > _SILENT_SECONDS:
                    self._lost(other, found.get(f"{_KEYS}who/{other}", "unknown host"))
            if f"{_KEYS}error" in found:
                self._told(*json.loads(found[f"{_KEYS}error"]))

    def _lost(self, other: str, who: str) -> None:
        with self._ending:
            error = StorageError(
                f"process {other} of {self._count} ({who}) has not been heard of for {_SILENT_SECONDS:g} s",
                code="process-lost",
                hint="It was killed, or its host or network went down; all processes end, to be started again together",
            )
            self._print(error.text())
            # The first one is the coordinator: without it JAX would end the others with messages of its own.
            time.sleep(0 if self.own else 2.5 * _LOOK_SECONDS)
            _end(error.exit_code)

    def _told(self, other: int, code: int, text: str) -> None:
        if other == self.own:
            return
        with self._ending:
            if self._ended.is_set():
                return
            if not self.own:
                self._print(f"process {other} of {self._count}: {text}")
                time.sleep(2.5 * _LOOK_SECONDS)
            _end(code)

    def _print(self, text: str) -> None:
        sys.stderr = self._stderr
        cli.say_error(text)


def _said(error: BaseException) -> tuple[int, str]:
    if isinstance(error, AprJaxError):
        return error.exit_code, error.text()
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    return cli.EXIT_INTERNAL, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _is_of_xla(error: BaseException) -> bool:
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError)


def _end(code: int) -> NoReturn:
    """Ends the process at once: another thread may be waiting for a process that is gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
