"""Small mistakes that somebody could make in a source file: the same text with one operator, number or call changed.

What nobody could see is left out by construction: docstrings, annotations, texts and what is only said in errors,
decorators (`frozen`, sizes of caches), flags of dataclass fields, `strict` of zip, assertions, imports, `__all__`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: (r"<", ("<=", ">=")),
    ast.LtE: (r"<=", ("<", ">")),
    ast.Gt: (r">", (">=", "<=")),
    ast.GtE: (r">=", (">", "<")),
    ast.Eq: (r"==", ("!=",)),
    ast.NotEq: (r"!=", ("==",)),
    ast.Is: (r"\bis\b", ("is not",)),
    ast.IsNot: (r"\bis\s+not\b", ("is",)),
    ast.In: (r"\bin\b", ("not in",)),
    ast.NotIn: (r"\bnot\s+in\b", ("in",)),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: (r"-", "+"),
    ast.Mult: (r"\*", "/"),
    ast.Div: (r"/", "*"),
    ast.FloorDiv: (r"//", "*"),
    ast.Mod: (r"%", "//"),
    ast.LShift: (r"<<", ">>"),
    ast.RShift: (r">>", "<<"),
    ast.BitAnd: (r"&", "|"),
    ast.BitOr: (r"\|", "&"),
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SAID = ("found", "expected", "hint", "help", "metavar", "description", "epilog", "note", "strict")
"""Keywords whose values are texts, or what texts are made of; `strict` of zip only tells of mistakes elsewhere."""


@dataclasses.dataclass(frozen=True, order=True)
class Mutant:
    """One change of a file.

    Attributes:
      path: The file, relative to the repository.
      begin, end: Which of its bytes are replaced.
      before, after: The text there, and what takes its place.
      line: Where that is, from 1.
    """

    path: str
    begin: int
    end: int
    before: str
    after: str
    line: int

    def apply(self, source: bytes) -> bytes:
        """Returns the changed file."""
        return source[: self.begin] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) or "nothing" for text in (self.before, self.after))
        return f"{self.path}:{self.line}: {before[:90]} -> {after[:90]}"


def mutants(path: str, source: bytes) -> list[Mutant]:
    """Returns every mutant of a file, in the order of the text."""
    return sorted(set(_Finder(path, source).changes(ast.parse(source))))


class _Finder:
    def __init__(self, path: str, source: bytes):
        self._path, self._source = path, source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def changes(self, node: ast.AST) -> Iterator[Mutant]:
        """Yields the mutants of a node and of all that is in it."""
        yield from self._own(node)
        for child in _children(node):
            yield from self.changes(child)

    def _own(self, node: ast.AST) -> Iterator[Mutant]:
        match node:
            case ast.Compare(left, ops, comparators):
                for before, op, behind in zip([left, *comparators], ops, comparators):  # noqa: B905
                    pattern, others = _COMPARISONS[type(op)]
                    yield from (self._between(before, behind, pattern, other) for other in others)
            case ast.BoolOp(op, values):
                pattern, other = (r"\band\b", "or") if isinstance(op, ast.And) else (r"\bor\b", "and")
                yield from (self._between(*pair, pattern, other) for pair in zip(values, values[1:]))  # noqa: B905, RUF007
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC and not (_is_text(left) or _is_text(right)):
                yield self._between(left, right, *_ARITHMETIC[type(op)])
            case ast.AugAssign(target, op, value) if type(op) in _ARITHMETIC and not _is_text(value):
                yield self._between(target, value, *_ARITHMETIC[type(op)])
            case ast.Constant(value) if isinstance(value, int | float):
                yield from (self._replaced(node, other) for other in _other_numbers(value))
            case ast.UnaryOp(ast.Not(), operand):
                yield self._replaced(node, self._text(operand))
            case ast.If(test) | ast.While(test) | ast.IfExp(test) if not _is_for_others(test):
                yield self._replaced(test, f"not ({self._text(test)})")
            case ast.comprehension(ifs=conditions):
                yield from (self._replaced(test, f"not ({self._text(test)})") for test in conditions)
            case ast.Expr(ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
                yield self._replaced(node, "pass")
            case ast.Return(ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
                yield self._replaced(value, "None")
            case ast.Call(ast.Name(name)) if name in _CALLS:
                yield self._replaced(node.func, _CALLS[name])
            case ast.Slice(lower, upper):
                yield from (self._replaced(bound, f"({self._text(bound)}) + 1") for bound in (lower, upper) if bound)

    def _between(self, before: ast.AST, behind: ast.AST, pattern: str, other: str) -> Mutant:
        """Replaces the operator between two operands."""
        begin, end = self._span(before)[1], self._span(behind)[0]
        gap = self._source[begin:end].decode()
        where = re.search(pattern, gap)
        assert where is not None, (self._path, gap)
        low, high = (begin + len(gap[:index].encode()) for index in where.span())
        line = before.end_lineno + gap[: where.start()].count("\n")
        shown = slice(self._span(before)[0], self._span(behind)[1])
        mutant = Mutant(self._path, low, high, where.group(), other, line)
        # Shown with its operands, replaced all the same.
        whole = self._source[shown.start : low].decode() + other + self._source[high : shown.stop].decode()
        return dataclasses.replace(
            mutant, begin=shown.start, end=shown.stop, before=self._source[shown].decode(), after=whole
        )

    def _replaced(self, node: ast.AST, after: str) -> Mutant:
        return Mutant(self._path, *self._span(node), self._text(node), after, node.lineno)

    def _text(self, node: ast.AST) -> str:
        begin, end = self._span(node)
        return self._source[begin:end].decode()

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._lines[node.lineno - 1] + node.col_offset, self._lines[node.end_lineno - 1] + node.end_col_offset


def _other_numbers(value: float) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (str(not value),)
    if isinstance(value, int):
        return (str(value + 1), str(value - 1))
    return (repr(3 * value), repr(value / 3)) if value else ("1.0",)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the parts of a node in which a change could be seen."""
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return
        case ast.FunctionDef(name="__repr__" | "__str__"):
            return
        case ast.FunctionDef() | ast.Lambda():
            yield from (default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None)
            yield from node.body if isinstance(node.body, list) else [node.body]
        case ast.ClassDef():
            yield from node.body
        case ast.AnnAssign(value=value):
            yield from [value] if value is not None else []
        case ast.Assign(targets=[ast.Name("__all__")]):
            return
        case ast.If(test) if _is_for_others(test):
            yield from node.orelse
        case ast.Raise():
            return
        case ast.Call(func) if _says(func):
            return
        case ast.Call():
            yield from [node.func, *node.args]
            yield from (keyword.value for keyword in node.keywords if keyword.arg not in _SAID)
        case _:
            yield from ast.iter_child_nodes(node)


def _is_for_others(test: ast.expr) -> bool:
    """Whether a condition is that of type checkers, or of a file that is run by itself."""
    return "TYPE_CHECKING" in ast.unparse(test) or "__name__" in ast.unparse(test)


def _says(function: ast.expr) -> bool:
    """Whether a function makes an error, or the field of a dataclass."""
    name = ast.unparse(function).rpartition(".")[2]
    return name.endswith("Error") or name in ("broken", "field", "TypeVar")
