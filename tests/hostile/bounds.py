"""Takes one check after the other out of the readers: at least one hostile case has to turn red each time.

    python tests/hostile/bounds.py [--report FILE]

A check is a statement that raises (or softens into a warning) in one of MODULES; where its condition has several parts,
each part is a check as well. The mutated function's code is put in place of the right one, in a child with bounds, and
those cases run that reach the statement: no other case could tell the difference.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import os
import pathlib
import platform
import resource
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.hostile.cases import Case
from tests.hostile.every_case import CASES

ROOT = pathlib.Path(__file__).resolve().parents[2]

MODULES = (
    "apr_jax.converters.formats.apr_format",
    "apr_jax.converters.formats.safetensors_format",
    "apr_jax.converters.formats.gguf_format",
    "apr_jax.converters.formats.prepared_format",
    "apr_jax.converters.formats.strict_json",
    "apr_jax.converters.formats.tensor_names",
    "apr_jax.converters.formats.foreign",
    "apr_jax.converters.formats.dtypes",
    "apr_jax.converters.storage.source",
    "apr_jax.converters.checkpoint.openers",
    "apr_jax.converters.checkpoint.gguf",
    "apr_jax.converters.checkpoint.adapters",
    "apr_jax.converters.checkpoint.checkpoint",
    "apr_jax.engines.bounded",
    "apr_jax.engines.maps",
    "apr_jax.engines.arrays",
    "apr_jax.engines.jsonl",
    "apr_jax.engines.summaries",
    "apr_jax.engines.module_outputs",
    "apr_jax.trace.aprt",
    "apr_jax.trace.inputs",
    "apr_jax.trace.positions",
    "apr_jax.trace.golden",
    "apr_jax.parity.dumps",
)
NO_READERS = frozenset(
    """serialise_prologue serialise_header dumps check_limits f32 _f32_digits _spelling _pieces path_of write by_name
    parse_legacy _said DType.codec refuse_traced parse_positions""".split()
)
"""Functions whose checks no content of a file can meet: writers, and arguments of commands and functions."""
SECONDS, MEMORY_BYTES = 60, 1 << 30
COUNTED = f"""Counted are the checks of what a file says or is: statements that refuse, or turn into a warning, in the
modules below, and each part of a condition. Not counted are those of functions that no content of a file comes to:
writers, which refuse to make what the readers would not take, and arguments of commands and functions. Their own tests
have them. They are
{", ".join(sorted(NO_READERS))}.

"""
LISTED = ROOT / "tests" / "hostile" / "unchecked.txt"
"""Checks that no case can tell, a line each: what it is, a tab, why."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of a reader.

    Attributes:
      module: Where it is.
      function: The outermost function or method around it.
      line: Of the statement.
      what: The statement, or the part of its condition, that is taken out.
      code: The function's code without it.
    """

    module: str
    function: str
    line: int
    what: str
    code: types.CodeType = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """What it is, without a line number, which would change with every edit."""
        return f"{self.module.removeprefix('apr_jax.')}.{self.function}: {self.what}"


# --- finding them


def checks_of(module: str, of_readers: bool = True) -> Iterator[Check]:
    """Yields the checks of a module's readers, or of what is none, each with the code that lacks it."""
    path = inspect.getsourcefile(importlib.import_module(module))
    assert path is not None
    source = pathlib.Path(path).read_text()
    whole = ast.parse(source)
    for number in range(len(list(_mutations(whole)))):
        # A tree of its own: what is taken out of it stays out.
        tree = ast.parse(source)
        statement, what, change = list(_mutations(tree))[number]
        function = _around(whole, statement.lineno)
        if function is None or (function in NO_READERS) is of_readers:
            continue
        change()
        compiled = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        yield Check(module, function, statement.lineno, what, _code(compiled, function.split(".")))


def _mutations(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, Any]]:
    """Yields a statement that refuses, what is to be taken out, and what takes it out."""
    for parent in ast.walk(tree):
        for field in ("body", "orelse", "handlers", "finalbody"):
            block = getattr(parent, field, None)
            for at, statement in enumerate(block if isinstance(block, list) else ()):
                if not _refuses(statement):
                    continue
                yield (
                    statement,
                    _spelt(statement),
                    lambda block=block, at=at: block.__setitem__(at, _nothing(block[at])),
                )
                if isinstance(parent, ast.If) and field == "body":
                    for part, change in _parts(parent, "test", positive=True):
                        yield statement, f"{_spelt(statement)} if {ast.unparse(part)}", change


def _refuses(statement: ast.AST) -> bool:
    if isinstance(statement, ast.Raise):
        return statement.exc is not None
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "soften"


def _nothing(statement: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Pass(), statement)


def _parts(holder: Any, field: str, positive: bool) -> Iterator[tuple[ast.expr, Any]]:
    """Yields the parts of a condition each of which alone makes it true, and what takes the part out."""
    node = getattr(holder, field) if isinstance(field, str) else holder[field]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _parts(node, "operand", not positive)
    elif isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or if positive else ast.And):
        for at, operand in enumerate(node.values):
            yield operand, lambda node=node, at=at: node.values.__setitem__(at, ast.Constant(not positive))
    elif isinstance(node, ast.Compare) and len(node.ops) > 1 and not positive:
        operands = [node.left, *node.comparators]
        for at in range(len(node.ops)):
            link = ast.Compare(operands[at], [node.ops[at]], [operands[at + 1]])
            others = [n for n in range(len(node.ops)) if n != at]
            kept = [ast.Compare(operands[n], [node.ops[n]], [operands[n + 1]]) for n in others]
            yield (
                link,
                lambda kept=kept: setattr(holder, field, ast.BoolOp(ast.And(), kept) if len(kept) > 1 else kept[0]),
            )


def _spelt(statement: ast.stmt) -> str:
    """Returns the message of a statement that refuses, or else its text."""
    texts = [
        node.value for node in ast.walk(statement) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    texts += [ast.unparse(node)[2:-1] for node in ast.walk(statement) if isinstance(node, ast.JoinedStr)]
    return repr(max(texts, key=len)[:70]) if texts else ast.unparse(statement)[:80]


def _around(tree: ast.Module, line: int) -> str | None:
    """Returns the outermost function around a line, "Class.method" for a method."""
    for node in tree.body:
        inner = [(f"{node.name}.", child) for child in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for prefix, child in inner:
            if isinstance(child, ast.FunctionDef) and child.lineno <= line <= (child.end_lineno or line):
                return prefix + child.name
    return None


def _code(code: types.CodeType, names: Sequence[str]) -> types.CodeType:
    for name in names:
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    return code


def _function(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    while not isinstance(found, types.FunctionType):
        found = (
            found.fget
            if isinstance(found, property)
            else found.__wrapped__
            if hasattr(found, "__wrapped__")
            else found.__func__
        )
    # A context manager is a function of contextlib around the one that is meant.
    return inspect.unwrap(found)


# --- trying them


def reached(cases: Sequence[tuple[Case, pathlib.Path]], checks: Sequence[Check]) -> dict[tuple[str, int], list[int]]:
    """Runs all cases; returns which of them come to which statement (module, line)."""
    files = {inspect.getsourcefile(importlib.import_module(check.module)): check.module for check in checks}
    lines = {(check.module, check.line) for check in checks}
    found: dict[tuple[str, int], list[int]] = {}
    seen: set[tuple[str, int]] = set()

    def local(frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            seen.add((files[frame.f_code.co_filename], frame.f_lineno))
        return local

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in files else None

    for number, (case, path) in enumerate(cases):
        seen.clear()
        sys.settrace(trace)
        try:
            fault = case.fault(path)
        finally:
            sys.settrace(None)
        assert fault is None, f"{case.name}: {fault}"
        for place in seen & lines:
            found.setdefault(place, []).append(number)
    return found


def is_noticed(check: Check, cases: Sequence[tuple[Case, pathlib.Path]]) -> bool:
    """Whether one of the cases turns red without the check; a child that dies or does not end has turned red."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(SECONDS)
            with open("/proc/self/statm", "rb") as file:
                held = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _function(check.module, check.function).__code__ = check.code
            os._exit(int(any(case.fault(path) is not None for case, path in cases)))
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def survivors(checks: Sequence[Check], folder: pathlib.Path) -> Iterator[tuple[Check, bool]]:
    """Yields the checks that no case tells, and whether any case comes to them at all."""
    made = []
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir()
        made.append((case, case.make(place)))
    print(f"{len(checks)} checks, {len(made)} cases", file=sys.stderr, flush=True)
    reach = reached(made, checks)
    print(f"cases come to {len(reach)} places", file=sys.stderr, flush=True)
    tried = [(check, reach.get((check.module, check.line), [])) for check in checks]
    share = os.cpu_count() or 1
    children = []
    for first in range(share):
        results = folder / f"{first}.noticed"
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException), results.open("w") as file:
                for check, numbers in tried[first::share]:
                    noticed = bool(numbers) and is_noticed(check, [made[number] for number in numbers])
                    file.write(f"{int(noticed)}\n")
                    file.flush()
            os._exit(0)
        children.append((child, results))
    for first, (child, results) in enumerate(children):
        os.waitpid(child, 0)
        for (check, numbers), noticed in zip(tried[first::share], results.read_text().split(), strict=True):
            if noticed == "0":
                yield check, bool(numbers)


def listed() -> dict[str, str]:
    """Returns the checks that are known to be told by no case, with the reason."""
    lines = [line for line in LISTED.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("\t") for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--report", type=pathlib.Path)
    args = parser.parse_args()
    begun = time.monotonic()
    checks = [check for module in args.modules for check in checks_of(module)]
    assert checks
    with tempfile.TemporaryDirectory() as folder:
        left = list(survivors(checks, pathlib.Path(folder)))
    reasons = listed()
    for check, is_reached in left:
        why = reasons.get(check.name, "NO REASON GIVEN")
        print(
            f"{check.module}:{check.line} {'no case tells' if is_reached else 'no case comes to'} {check.name}\t{why}"
        )
    noticed = len(checks) - len(left)
    per_module = Counter(check.module for check in checks)
    missed = Counter(check.module for check, _ in left)
    lines = [
        f"| {module.removeprefix('apr_jax.')} | {per_module[module]} | {missed[module]} |" for module in per_module
    ]
    lines += [f"| all | {len(checks)} | {len(left)} |"]
    others = sum(1 for module in args.modules for _ in checks_of(module, of_readers=False))
    text = f"# Checks taken out one by one\n\n{COUNTED}{others} checks are not counted.\n\n"
    text += (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {os.cpu_count()} cores, {len(CASES)} cases, "
        f"{time.monotonic() - begun:.0f} s: "
        f"{noticed} of {len(checks)} checks ({noticed / len(checks):.1%}) turn a case red when they are taken out.\n\n"
        "| module | checks | told by no case |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
    text += "".join(f"\n- `{check.name}`: {reasons.get(check.name, 'no reason given')}" for check, _ in left) + "\n"
    print(text)
    if args.report:
        args.report.write_text(text)
    return int(noticed < 0.95 * len(checks) or any(check.name not in reasons for check, _ in left))


if __name__ == "__main__":
    sys.exit(main())
