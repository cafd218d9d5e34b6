"""The rooms of the code, what each may import, and whether it keeps to that.

    python tests/rooms.py

prints every room with its modules, its lines and the rooms that it imports, and ends with 1 if an import goes up or
sideways. Imports are read from the source, those within functions and under TYPE_CHECKING included: one that is hidden
there is an arrow all the same.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import graphlib
import pathlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = "apr_jax"
FILES = "apr_jax.converters"
# What reads and writes files never waits for what runs models.
HEAVY = {"jax", "jaxlib", "flax", "orbax", "optax", "torch", "transformers"}


def _floors(package: str, *floors: str | Sequence[str]) -> dict[str, set[str]]:
    """Returns room -> the rooms of all floors below it; rooms of one floor know nothing of each other."""
    below: set[str] = set()
    table = {}
    for floor in floors:
        rooms = [f"{package}.{name}" for name in ((floor,) if isinstance(floor, str) else floor)]
        table |= {room: set(below) for room in rooms}
        below |= set(rooms)
    return table


# The lowest floor first. A single module beside the rooms is a room of its own.
_CONVERTERS = _floors(
    FILES,
    "errors",
    "workers",
    "storage",
    "formats",
    "checkpoint",
    ("convert", "inspect"),
    "verify",
    "commands",
)
_APR_JAX = _floors(
    MODEL,
    ("trace", "schemas"),
    ("model", "engines"),
    ("load", "cpu", "cuda", "parity", "capture"),
    "kernels",
    ("generate", "testing"),
    ("bench", "loss", "optimizer"),
    "commands",
    "__main__",
)
# What looks for mistakes and what writes text never meet.
_APR_JAX[f"{MODEL}.generate"] -= {f"{MODEL}.parity"}
# What knows other engines needs no model of ours; reading and judging their dumps is parity's.
for _room in _APR_JAX:
    if _room not in {f"{MODEL}.{name}" for name in ("parity", "capture", "commands")}:
        _APR_JAX[_room] -= {f"{MODEL}.engines"}
# The commands of both packages are the only ones that may know of the other commands.
_LIBRARY = set(_CONVERTERS) - {f"{FILES}.commands"}
MAY_IMPORT = (
    _CONVERTERS
    | {room: below | _LIBRARY for room, below in _APR_JAX.items()}
    | {f"{MODEL}.commands": _APR_JAX[f"{MODEL}.commands"] | set(_CONVERTERS)}
    | {f"{MODEL}.__main__": {f"{MODEL}.commands"}}
    # The package's own names, looked up when they are asked for.
    | {FILES: set(), MODEL: _LIBRARY | set(_APR_JAX) - {f"{MODEL}.{name}" for name in ("testing", "bench", "commands")}}
)


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of one of the packages.

    Attributes:
      name: Its dotted name, "apr_jax.converters.formats.dtypes".
      path: Where it is, relative to the repository.
      text: Its source.
    """

    name: str
    path: str
    text: str

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def lines(self) -> int:
        return self.text.count("\n")


@dataclasses.dataclass(frozen=True)
class Import:
    """One import of one name.

    Attributes:
      path, line: Where it stands.
      targets: What may be meant: "from a.b import c" names a.b, and a.b.c where that is a module.
    """

    path: str
    line: int
    targets: tuple[str, ...]


def room_of(name: str) -> str:
    """Returns the room of a module: the part of its name behind the package; the package's name for its own names."""
    package = FILES if name == FILES or name.startswith(FILES + ".") else MODEL
    rest = name[len(package) + 1 :].split(".")[0]
    return f"{package}.{rest}" if rest else package


def modules(root: pathlib.Path = ROOT) -> list[Module]:
    """Reads all modules of both packages; `converters` lies beside apr_jax, and in it as a link."""
    found = []
    for folder, package in ((root / "converters", FILES), (root / "apr_jax", MODEL)):
        for path in sorted(folder.rglob("*.py")):
            if package == MODEL and path.is_relative_to(folder / "converters"):
                continue
            parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found.append(Module(".".join((package, *parts)), str(path.relative_to(root)), path.read_text()))
    return found


@functools.cache
def imports(text: str, path: str, name: str | None = None) -> tuple[Import, ...]:
    """Returns all imports of a source; `name` is that of the module, None outside of the packages."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append(Import(path, node.lineno, (alias.name,)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and name is not None:
                package = name.split(".") if path.endswith("__init__.py") else name.split(".")[:-1]
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, (base,))))
            for alias in node.names:
                found.append(Import(path, node.lineno, (base, f"{base}.{alias.name}")))
    return tuple(found)


def target(found: Import, known: Collection[str]) -> str | None:
    """Returns the module of ours that an import leads to, or None; `known` are the names of all modules."""
    named = [name for name in found.targets if name.split(".")[0] == MODEL]
    return next((name for name in reversed(named) if name in known), named[0] if named else None)


def module_arrows(all_modules: Sequence[Module]) -> dict[str, set[str]]:
    """Returns module -> the other modules that it imports."""
    known = {module.name for module in all_modules}
    table: dict[str, set[str]] = {name: set() for name in known}
    for module in all_modules:
        for found in imports(module.text, module.path, module.name):
            name = target(found, known)
            if name is not None and name != module.name:
                table[module.name].add(name)
    return table


def arrows(all_modules: Sequence[Module]) -> dict[str, set[str]]:
    """Returns room -> the other rooms that it imports."""
    table: dict[str, set[str]] = {module.room: set() for module in all_modules}
    for name, others in module_arrows(all_modules).items():
        table[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    return table


def violations(all_modules: Sequence[Module]) -> list[str]:
    """Returns one line for each import that goes up or sideways, and for each module that has no room."""
    known = {module.name for module in all_modules}
    problems = []
    for module in all_modules:
        if module.room not in MAY_IMPORT:
            problems.append(f"{module.path}: {module.name} is in no room; tests/rooms.py lists them")
            continue
        if module.path.endswith("__init__.py") and module.room != MODEL and len(ast.parse(module.text).body) > 1:
            problems.append(f"{module.path}: a room's __init__ says what the room is, and holds nothing else")
        for found in imports(module.text, module.path, module.name):
            place = f"{found.path}:{found.line}"
            name = target(found, known)
            if name is not None and room_of(name) not in MAY_IMPORT[module.room] | {module.room}:
                problems.append(f"{place}: {module.room} imports {room_of(name)}")
            if module.name.startswith(FILES) and found.targets[0].split(".")[0] in HEAVY:
                problems.append(f"{place}: {module.room} imports {found.targets[0]}")
    for what, table in (("rooms", arrows(all_modules)), ("modules", module_arrows(all_modules))):
        around = circle(table)
        if around:
            problems.append(f"a circle of {what}: {' <- '.join(around)}")
    # "from x import a, b" is two imports of one line.
    return list(dict.fromkeys(problems))


def outside(text: str, path: str) -> list[str]:
    """Returns what is wrong with an import of any file of the repository: `converters` has one name only."""
    return [
        f"{found.path}:{found.line}: {found.targets[0]} is apr_jax.{found.targets[0]}"
        for found in imports(text, path)
        if found.targets[0].split(".")[0] == "converters"
    ]


def circle(table: Mapping[str, Iterable[str]]) -> list[str]:
    """Returns names that import each other all around, the first one last again; nothing if there are none."""
    try:
        graphlib.TopologicalSorter(table).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def tree(all_modules: Sequence[Module]) -> Iterator[str]:
    """Yields the lines of the tree: rooms from the lowest floor up, with modules, lines and arrows."""
    table = arrows(all_modules)
    for package, title in ((FILES, "converters"), (MODEL, "apr_jax")):
        inside = [module for module in all_modules if (package == FILES) == module.name.startswith(FILES)]
        yield f"{title}: {len(inside)} modules, {sum(module.lines for module in inside)} lines"
        order = [room for room in MAY_IMPORT if room in table]
        for room in [*order, *sorted(set(table) - set(order))]:
            held = [module for module in inside if module.room == room]
            if held and room != package:
                names = sorted(other.removeprefix(f"{package}.").removeprefix(f"{MODEL}.") for other in table[room])
                lines = sum(module.lines for module in held)
                to = f"  -> {', '.join(names)}" if names else ""
                yield f"  {room.removeprefix(f'{package}.'):<11}{len(held):>3} modules {lines:>6} lines{to}"


def main() -> int:
    """Prints the tree and what is wrong with it; returns 1 if anything is."""
    found = modules()
    print("\n".join(tree(found)))
    problems = violations(found)
    print("\n".join(problems) if problems else "every import goes down", file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
