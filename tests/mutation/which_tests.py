"""Which tests could notice a change of a module: found in the tree as it is, by imports and by name.

Nearest are the tests that import the module or are called after it (`storage/output.py`, `storage/output_test.py`),
then those that are as near to a module which imports it, and so on.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterable, Iterator, Mapping

SOURCES = ("converters", "apr_jax")
ELSEWHERE = ("reference", "cuda", "mutation")
"""Folders of tests that need HuggingFace or a GPU, or are about mutation itself."""


def modules(root: pathlib.Path, folders: Iterable[str] = SOURCES) -> dict[str, str]:
    """Returns name -> path, relative to `root`, of every module below some folders."""
    found = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            # The folder is imported through the link in apr_jax.
            name = f"apr_jax.{name}" if folder == "converters" else name
            found[name] = path.relative_to(root).as_posix()
    return found


class WhichTests:
    """The tests of each module of a tree."""

    def __init__(self, root: pathlib.Path):
        self._paths = modules(root, (*SOURCES, "tests"))
        self._imports = {name: _imported(root / path, self._paths) for name, path in self._paths.items()}
        self._tests = {name for name, path in self._paths.items() if _is_default_test(path)}
        self._by_stem: dict[str, list[str]] = {}
        for name in self._tests:
            self._by_stem.setdefault(pathlib.PurePath(self._paths[name]).stem, []).append(name)

    def by_distance(self, path: str) -> Iterator[list[str]]:
        """Yields the paths of tests, the nearest first; of those that are equally near the ones that have its name."""
        reached = {name for name, other in self._paths.items() if other == path}
        seen = set(reached)
        while reached:
            named = {test for name in reached for test in self._called_after(name)}
            importing = {name for name, found in self._imports.items() if found & reached}
            found = [*sorted(named - seen), *sorted((importing & self._tests) - named - seen)]
            if found:
                yield [self._paths[test] for test in found]
            reached = (importing | named) - seen
            seen |= reached

    def _called_after(self, module: str) -> Iterator[str]:
        """Yields the tests that have the name of a module, and whose folders are among those of the module."""
        tested = pathlib.PurePath(self._paths[module])
        stem = tested.parent.name if tested.name == "__init__.py" else tested.stem
        for test in self._by_stem.get(f"{stem}_test", ()):
            if set(pathlib.PurePath(self._paths[test]).parts[1:-1]) <= set(tested.parts):
                yield test


def _is_default_test(path: str) -> bool:
    parts = pathlib.PurePath(path).parts
    return parts[0] == "tests" and parts[-1].endswith("_test.py") and parts[1] not in ELSEWHERE


def _imported(path: pathlib.Path, known: Mapping[str, str]) -> set[str]:
    """Returns the modules of the tree that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in known} or {node.module}
    return found & known.keys()
