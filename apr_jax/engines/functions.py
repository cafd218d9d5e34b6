"""Functions that an engine calls by name, watched for the time of a context: rotations, softmax, activations."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

_ROTATION = re.compile(r"rotary|rope", re.IGNORECASE)

Watcher = Callable[[tuple[Any, ...], Any], None]
"""Is told the arguments and the result of a call."""


@contextlib.contextmanager
def watched(owners: Iterable[tuple[Any, str]], watcher: Watcher) -> Iterator[None]:
    """Tells `watcher` of every call of these functions, each an attribute of a module or a class."""
    with contextlib.ExitStack() as stack:
        for owner, name in owners:
            found = inspect.getattr_static(owner, name)
            kind = type(found) if isinstance(found, staticmethod | classmethod) else None
            wrapped = _after(found.__func__ if kind else found, watcher)
            stack.enter_context(mock.patch.object(owner, name, kind(wrapped) if kind else wrapped))
        yield


def _after(function: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        watcher(args, result)
        return result

    return wrapped


def rotations(modules: Iterable[Any]) -> list[tuple[Any, str]]:
    """Returns the functions and methods that rotate, by their names, of the classes of `modules` and of their files."""
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for kind in {type(module) for module in modules}:
        owners = [kind, *([sys.modules[kind.__module__]] if kind.__module__ in sys.modules else [])]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                plain = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                if _ROTATION.search(name) and inspect.isfunction(plain):
                    found[id(owner), name] = (owner, name)
    return list(found.values())
