"""A few threads for the length of a block, none of which is at work any more behind it, Ctrl-C or not.

An interrupt reaches the main thread alone, wherever it is. `Thread.join` then takes a thread for ended that is not
(CPython 3.11), and so does whatever joins, as the pool of `concurrent.futures` does: a file would be closed, or its
memory used again, while a helper still writes. And `Thread.start` waits for the thread on a lock that an interrupt can
leave held, so that the thread never begins and the process never ends. Here nothing is joined, and threads are started
without waiting for them: the main thread looks, now and then.
"""

from __future__ import annotations

import _thread
import collections
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# How often it is looked: often at first, since most waits are short.
_SHORTEST_LOOK, _LONGEST_LOOK = 2e-5, 1e-3


class Workers:
    """Threads that do what they are given, in this order. The first error of any of them ends all.

        with Workers(4) as workers:
            sizes = list(workers.map(os.path.getsize, paths))

    However the block ends, what has begun is awaited behind it and what has not is dropped; so wait for the results
    that are wanted within it. What the threads are to import has to be imported before: an import that an interrupt
    breaks off in one thread can leave another one waiting for it forever.

    Attributes:
      stopped: Whether the block has ended, or a task has failed; for tasks that take long to look at.
      error: What the first task to fail raised.
    """

    def __init__(self, threads: int):
        """Takes how many threads there may be; they begin when there is something to do, and end when nothing is."""
        self.stopped = False
        self.error: BaseException | None = None
        self._most = threads
        self._begun = 0
        self._working = 0
        self._tasks: collections.deque[Task[Any]] = collections.deque()
        self._lock = threading.Lock()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stopped = True
        try:
            self._wait()
        except BaseException:
            # The interrupt came only now.
            self._wait()
            raise

    def start(self, function: Callable[..., T], *arguments: Any) -> Task[T]:
        """Lets a thread call `function(*arguments)`."""
        task = Task(self, function, arguments)
        with self._lock:
            self._tasks.append(task)
            more = self._begun < self._most
            self._begun += more
        if more:
            _thread.start_new_thread(self._work, ())
        return task

    def map(self, function: Callable[..., T], items: Iterable[Any]) -> Iterator[T]:
        """Lets the threads call `function(item)` for all items; the results come in the order of the items."""
        tasks = collections.deque(self.start(function, item) for item in items)
        # A result that was taken is not kept.
        return (tasks.popleft().result() for _ in range(len(tasks)))

    def _wait(self) -> None:
        """Returns when no thread is at work; one that has not begun by then finds nothing to do."""
        _look_until(lambda: not self._working)

    def _work(self) -> None:
        with self._lock:
            self._working += 1
        while (task := self._next()) is not None:
            try:
                task.run()
            except BaseException as error:
                self.error = self.error or error
                self.stopped = True

    def _next(self) -> Task[Any] | None:
        with self._lock:
            if self._tasks and not self.stopped:
                return self._tasks.popleft()
            self._begun -= 1
            self._working -= 1
            return None


class Task(Generic[T]):
    """A call that a thread makes, or has made."""

    def __init__(self, workers: Workers, function: Callable[..., T], arguments: tuple[Any, ...]):
        self._workers, self._function, self._arguments = workers, function, arguments
        self._results: list[T] = []

    def run(self) -> None:
        """Makes the call; for the thread."""
        self._results.append(self._function(*self._arguments))

    def is_done(self) -> bool:
        """Whether the result is there."""
        return bool(self._results)

    def result(self) -> T:
        """Waits for the result and returns it.

        Raises:
          BaseException: Whatever the first of all tasks to fail raised, this one or another.
        """
        _look_until(lambda: self.is_done() or self._workers.stopped)
        if self._workers.error is not None:
            # Also where this one came to its end, perhaps early because of that.
            raise self._workers.error
        if not self.is_done():
            raise RuntimeError("the block has ended")
        return self._results[0]


def at_once(work: Callable[[Workers], None], threads: int) -> None:
    """Lets so many threads call `work(workers)` each and waits for all: they take their work from a common place."""
    with Workers(threads) as workers:
        for task in [workers.start(work, workers) for _ in range(threads)]:
            task.result()


def _look_until(true: Callable[[], bool]) -> None:
    pause = _SHORTEST_LOOK
    while not true():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_LOOK)
