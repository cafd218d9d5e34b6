"""Nothing is refused without what gets past it: every place that refuses says so, and names options that there are."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import pathlib
import re
from collections.abc import Iterator

from absl.testing import absltest, parameterized

import apr_jax
from apr_jax.converters import errors
from apr_jax.converters.convert import run as conversion
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.generator import Generator

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Where nothing is said beside what was expected: (file, a part of the message) -> why.
NOTHING_MORE = {
    (
        "storage/isolation.py",
        "{self._what} {said[reason]}",
    ): "each caller says what to do",
    ("formats/dtypes.py", "unknown type '{name}'"): "a name in Python, and the message lists all that there are",
    ("formats/apr_format.py", "this file has the magic"): "`soften` names --lenient",
    (
        "formats/apr_format.py",
        "files with the flags",
    ): "`soften` names --lenient, the raise beside it what else helps",
    ("generate/config.py", "**problem"): "`_problem` holds the option",
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A call that makes an error whose class says nothing of what to do."""

    file: str
    line: int
    name: str
    message: str
    says: frozenset[str]


def refusals() -> Iterator[Refusal]:
    silent = {name for name, kind in vars(errors).items() if _is_silent(kind)}
    assert {"RefusedError", "UsageError"} <= silent
    for file, tree in _trees().items():
        for call in ast.walk(tree):
            name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
            if name in silent:
                says = frozenset(k.arg for k in call.keywords if k.arg and not _may_be_none(k.value))
                message = ast.unparse(call.args[0]) if call.args else ast.unparse(call).partition("(")[2]
                yield Refusal(file, call.lineno, name, message, says)


def _is_silent(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, errors.AprJaxError) and kind.usual_hint is None


def _may_be_none(value: ast.expr) -> bool:
    """Whether an expression is None, or may be: such a hint says nothing."""
    if isinstance(value, ast.IfExp):
        return _may_be_none(value.body) or _may_be_none(value.orelse)
    return isinstance(value, ast.Constant) and value.value is None


@functools.cache
def _trees() -> dict[str, ast.Module]:
    """Returns the modules of the project, parsed, by their paths."""
    found = [path for room in ("converters", "apr_jax") for path in sorted((ROOT / room).rglob("*.py"))]
    found = [path for path in found if "apr_jax/converters" not in str(path)]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in found}


def hints() -> Iterator[tuple[str, str]]:
    """Yields (file, text) of every hint that is written down in the code."""
    trees = _trees().items()
    given = [(file, value) for file, tree in trees for value in _given(tree, {"hint", "usual_hint"})]
    names = {ast.unparse(part).rpartition(".")[2] for _, value in given for part in ast.walk(value)}
    given += [(file, value) for file, tree in trees for value in _given(tree, {n for n in names if n.isupper()})]
    for file, value in given:
        for part in ast.walk(value):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield file, part.value


def _given(tree: ast.AST, names: set[str]) -> Iterator[ast.expr]:
    """Yields what arguments, attributes and variables of these names are set to."""
    for node in ast.walk(tree):
        argument = isinstance(node, ast.keyword) and node.arg in names
        if argument or (isinstance(node, ast.Assign) and _called(node.targets[0]) in names):
            yield node.value


def _called(target: ast.expr) -> str:
    return ast.unparse(target).rpartition(".")[2]


@functools.cache
def _commands() -> dict[str, frozenset[str]]:
    """Returns the options of every command, by what its help says."""
    found = {}
    for name in ("convert", "show", "verify", "generate", "golden", "parity", "checkpoint"):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            importlib.import_module(_home(name)).parse([name, *(["save"] if name == "checkpoint" else []), "--help"])
        found[name] = frozenset(re.findall("--[a-z][a-z-]*", said.getvalue()))
        assert len(found[name]) > 3, name
    return found


def _home(command: str) -> str:
    room = "apr_jax.converters.commands" if command in ("convert", "show", "verify") else "apr_jax.commands"
    return f"{room}.{command}"


def _options() -> frozenset[str]:
    return frozenset.union(*_commands().values())


def _arguments() -> set[str]:
    functions = (apr_jax.open_checkpoint, conversion.convert, apr_jax.load_generator, apr_jax.load_model, apr_jax.save)
    functions += (Generator.generate, Generator.chat_prompt)
    settings = {field.name for field in dataclasses.fields(GenerationConfig)}
    return settings.union(*(inspect.signature(function).parameters for function in functions))


class RefusalsTest(parameterized.TestCase):
    def test_every_refusal_says_what_gets_past_it(self):
        found = list(refusals())
        self.assertGreater(len(found), 150)
        silent, met = [], set()
        for refusal in found:
            if "hint" in refusal.says or (refusal.name == "UsageError" and "expected" in refusal.says):
                continue
            known = [key for key in NOTHING_MORE if refusal.file.endswith(key[0]) and key[1] in refusal.message]
            met.update(known)
            if not known:
                silent.append(f"{refusal.file}:{refusal.line}: {refusal.message[:100]}")
        self.assertEqual(silent, [])
        self.assertEqual(met, set(NOTHING_MORE), "an exception that nothing needs any more")

    def test_every_option_of_a_hint_is_one_of_a_command_and_an_argument_in_python(self):
        found = [(file, option, said) for file, text in hints() for option, said in errors.options(text).items()]
        self.assertGreater(len(found), 15)
        known, arguments = _options(), _arguments()
        for file, option, said in found:
            self.assertIn(option, known, file)
            if said is not None:
                self.assertIn(said.partition("=")[0], arguments, file)
        self.assertGreater(len({said for _, _, said in found} - {None}), 8)

    def test_the_commands_that_hints_quote_have_these_options(self):
        quoted = [(file, line) for file, text in hints() for line in re.findall("`([^`]*)`", text)]
        ours = [(file, line) for file, line in quoted if line.split()[0] in _commands()]
        self.assertGreater(len(ours), 10)
        for file, line in ours:
            for option in re.findall("--[a-z][a-z-]*", line):
                self.assertIn(option, _commands()[line.split()[0]], f"{file}: {line}")

    def test_a_command_is_told_of_options_and_python_of_arguments(self):
        hint = "--as-is or --cast GLOB=TYPE; `convert --to apr` is another command"
        error = errors.RefusedError("no", code="x", hint=hint)
        self.assertEqual(error.text(), f"no. {hint}")
        self.assertEqual(str(error), f"no. {hint} (in Python: as_is=True, cast=...)")


if __name__ == "__main__":
    absltest.main()
