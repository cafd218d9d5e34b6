"""The schemas of --json: every command has one, it describes what is printed, and refuses anything else.

tests/tool.py holds every JSON output of the whole suite against them; here are the outputs that show all they describe.
"""

import dataclasses
import importlib
import json
import pathlib
import sys
import typing
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jsonschema
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from apr_jax import schemas
from apr_jax.commands.entry import COMMANDS
from apr_jax.cpu import products
from apr_jax.trace.inputs import seeded
from tests import json_outputs, oracle, paths, tool
from tests.battery.faulty_forward import Planted, forward, write_aprt

PAGE = paths.ROOT / "docs" / "json.md"
SAMPLE = paths.checkpoint("gqa_tied_bf16")
SHARDED = paths.checkpoint("mha_untied_f32_sharded")
_OF_OTHER_TYPES = (None, {}, "?", -7.5, [[]], True)
_MOST = 4  # items of a list that are looked at
# What no output of these tests has, by the end of its place in the schema, and why.
NEVER = {
    "error": {"/log": "tests/commands/internal_errors_test.py"},
    "bench": {"/failed/": "a peer that fails", "/left_out": "tests/bench/bench_test.py"},
}
# Keys that may be absent and are there in every output of these tests.
PRESENT = frozenset(("relative_l2_to_huggingface", "ceilings"))
# What may have any value: an attribute of a configuration.
ANYTHING = {f"/comparison/metadata_differences/{side}" for side in "ab"}


# --- The schemas themselves


def _inner(schema: typing.Any, place: str = "") -> Iterator[tuple[str, dict]]:
    """Every schema within a schema, each with its place."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for group in ("properties", "$defs"):
        for name, inner in schema.get(group, {}).items():
            yield from _inner(inner, f"{place}/{name}")
    for group in ("oneOf", "anyOf"):
        for inner in schema.get(group, ()):
            yield from _inner(inner, place)
    for group in ("items", "additionalProperties"):
        yield from _inner(schema.get(group), place)


class SchemaTest(parameterized.TestCase):
    def test_every_command_has_one_and_there_are_no_others(self):
        self.assertCountEqual(schemas.names(), [*COMMANDS, schemas.ERROR])
        with self.assertRaisesRegex(KeyError, "there are bench, checkpoint"):
            schemas.load("serve")

    @parameterized.parameters(*COMMANDS, schemas.ERROR)
    def test_it_is_valid_closed_and_described(self, name):
        schema = schemas.load(name)
        jsonschema.Draft202012Validator.check_schema(schema)
        objects = 0
        for place, inner in _inner(schema):
            for key, described in inner.get("properties", {}).items():
                self.assertRegex(described.get("description", ""), r"^\S.{3,}\.$", f"{place}/{key}")
                if not {"type", "enum", "const", "anyOf", "oneOf", "$ref"} & set(described):
                    self.assertIn(f"{place}/{key}", ANYTHING)
            if "properties" in inner:
                objects += 1
                self.assertIs(inner["additionalProperties"], False, place)
                self.assertLessEqual(set(inner["required"]), set(inner["properties"]), place)
            if "enum" in inner:
                self.assertLen(set(inner["enum"]), len(inner["enum"]), place)
        self.assertGreater(objects, 0)

    @parameterized.parameters(*COMMANDS)
    def test_each_answer_has_a_title_and_the_last_alternative_is_the_error(self, name):
        *answers, error = schemas.load(name)["oneOf"]
        self.assertEqual(error, {"$ref": schemas.load(schemas.ERROR)["$id"]})
        self.assertNotEmpty(answers)
        for answer in answers:
            self.assertStartsWith(_resolved(schemas.load(name), answer)["title"], name)

    @parameterized.parameters(
        ("verify", "comparison/properties/verdict", "apr_jax.converters.verify.tensor_pairs", "VERDICTS"),
        ("parity", "values/properties/standing", "apr_jax.parity.localise", "STANDINGS"),
        ("golden", "settings/properties/decayed", "apr_jax.optimizer.settings", "DECAYED"),
        ("convert", "plan/properties/to", "apr_jax.converters.commands.convert", "FORMATS"),
    )
    def test_an_enum_is_the_codes(self, name, place, module, constant):
        found = schemas.load(name)["$defs"]
        for part in place.split("/"):
            found = found[part]
        self.assertEqual(found["enum"], list(getattr(importlib.import_module(module), constant)))


# --- The page


def page() -> str:
    """docs/json.md."""
    lines = [_INTRODUCTION]
    for name in (*COMMANDS, schemas.ERROR):
        root = schemas.load(name)
        answers = [_resolved(root, answer) for answer in root.get("oneOf", [root])[: -1 if "oneOf" in root else None]]
        lines += [f"## {name}", "", *([root["description"], ""] if len(answers) > 1 else [])]
        for answer in answers:
            lines += [
                f"### `{answer['title']}`",
                "",
                answer["description"],
                "",
                "| key | value | meaning |",
                "|---|---|---|",
            ]
            fields = answer.get("properties") or {"*": answer["additionalProperties"]}
            lines += [_row(root, key, field, key in answer.get("required", "*")) for key, field in fields.items()]
            lines.append("")
    return "\n".join(lines)


_INTRODUCTION = """\
# What `--json` prints

Every command takes `--json` and then prints one JSON value on stdout; warnings and progress go to stderr. The package
holds a JSON Schema (2020-12) for each command; the package `jsonschema` checks by it:

<!-- prepared: model.apr -->
```python
import json, subprocess, sys
import jsonschema
from apr_jax import schemas

command = [sys.executable, "-m", "apr_jax", "verify", "model.apr", "--json"]
done = subprocess.run(command, capture_output=True, text=True)
jsonschema.validate(json.loads(done.stdout), schemas.load("verify"))
```

A schema has one alternative for each kind of answer, and the error object as the last: what a command prints in place
of an answer has the one key `error`, and no answer has that key. Keys that are not described do not occur, but for maps
whose keys are names (of tensors, files, stages) and for parameters of findings.

JSON has no NaN and no infinities. Parity, and the statistics of `show`, have `null` in their place; everything else
spells them as strings: `"nan"`, `"inf"`, `"-inf"`. Sizes and offsets are in bytes, times in seconds unless a name says
`milliseconds`, losses in nats or bits as their names say. Layers, rows, columns and positions count from 0.

Below are the keys at the top of each answer, with the keys of objects within; a "?" marks a key that may be absent. The
schemas describe every one of them. This page is made from them: `python tests/commands/schemas_test.py --write`.
"""


def _row(root: dict, key: str, field: dict, required: bool) -> str:
    kind, inner = _kind(root, field)
    keys = f" Keys: {', '.join(f'`{name}`' for name in inner)}." if inner else ""
    cells = (f"`{key}`" + ("" if required else " ?"), kind, _resolved(root, field).get("description", "") + keys)
    if "$ref" in field and "description" in field:
        cells = (*cells[:2], field["description"] + keys)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(root: dict, field: dict) -> tuple[str, list[str]]:
    """The type of a value in words, and the keys of the objects in it."""
    field = _resolved(root, field)
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"]), []
    for branches in ("anyOf", "oneOf"):
        if branches in field:
            kinds = [_kind(root, branch) for branch in field[branches]]
            every = dict.fromkeys(key for _, keys in kinds for key in keys)
            return " or ".join(dict.fromkeys(kind for kind, _ in kinds)), list(every)
    if "const" in field:
        return f"`{json.dumps(field['const'])}`", []
    types = field.get("type", "any")
    types = types if isinstance(types, list) else [types]
    items, rest = field.get("items"), field.get("additionalProperties")
    if "array" in types and items:
        kind, keys = _kind(root, items)
        return " or ".join(["array of " + kind if name == "array" else name for name in types]), keys
    if "object" in types and isinstance(rest, dict):
        kind, keys = _kind(root, rest)
        return " or ".join(["map to " + kind if name == "object" else name for name in types]), keys
    return " or ".join(types), list(field.get("properties", ()))


class PageTest(absltest.TestCase):
    def test_the_page_is_what_the_schemas_say(self):
        self.assertEqual(PAGE.read_text(), page(), "python tests/commands/schemas_test.py --write")


# --- Outputs


def _resolved(root: dict, schema: dict) -> dict:
    """What a schema refers to, where it does."""
    reference = schema.get("$ref")
    if reference is None:
        return schema
    return root["$defs"][reference.rpartition("/" if "/" in reference else ":")[2]]


@dataclasses.dataclass
class Bites:
    """Looks whether a schema refuses outputs that were changed, each of its places once."""

    name: str

    def __post_init__(self) -> None:
        self.validator = json_outputs.validator(self.name)
        self.root = self.validator.schema
        self.seen: set[int] = set()
        self.always: dict[str, set[str]] = {}  # what an object is -> keys that may be absent and never were

    def places(self, schema: dict, value: typing.Any, path: tuple = ()) -> Iterator[tuple[tuple, dict, typing.Any]]:
        """Every described value of an output with its path and its schema; of alternatives the one that it is."""
        self.seen.add(id(schema))
        schema = _resolved(self.root, schema)
        for branches in ("oneOf", "anyOf"):
            for branch in schema.get(branches, ()):
                if self.validator.evolve(schema=branch).is_valid(value):
                    yield from self.places(branch, value, path)
                    return
        yield path, schema, value
        if isinstance(value, dict) and "properties" in schema:
            optional = set(schema["properties"]) - set(schema["required"])
            where = schema["description"]
            self.always[where] = self.always.get(where, optional) & set(value)
        rest = schema.get("additionalProperties")
        if isinstance(value, dict):
            for key, item in value.items():
                inner = schema.get("properties", {}).get(key, rest)
                if isinstance(inner, dict):
                    yield from self.places(inner, item, (*path, key))
        elif isinstance(value, list) and "items" in schema:
            for index, item in enumerate(value):
                yield from self.places(schema["items"], item, (*path, index))

    def let_through(self, output: typing.Any) -> tuple[list[str], int]:
        """Changes an output in every way; returns the changes that were not refused, and how many were tried."""
        wrong, tried, done = [], 0, set(self.seen)
        for _ in self.places(self.root, output):
            pass
        output = _shortened(output)
        for path, schema, value in list(self.places(self.root, output)):
            if id(schema) in done:
                continue
            done.add(id(schema))
            changes = {}
            if isinstance(value, dict) and "properties" in schema:
                changes |= {f"without {key}": _without(value, key) for key in schema["required"]}
                changes["with an unknown key"] = value | {"not described": 1}
            tried += len(changes)
            wrong += [f"{path}: {said}" for said, to in changes.items() if self.takes(output, path, to)]
            if set(schema) > {"description"}:
                tried += 1
                if all(self.takes(output, path, other) for other in _OF_OTHER_TYPES):
                    wrong.append(f"{path}: any type")
        return wrong, tried

    def takes(self, output: typing.Any, path: tuple, value: typing.Any) -> bool:
        """Whether an output with another value at a place is as described."""
        return self.validator.is_valid(_replaced(output, path, value))

    def unseen(self) -> list[str]:
        """Places of properties that no output had so far."""
        found = []
        for place, inner in _inner(self.root):
            for key, schema in inner.get("properties", {}).items():
                if id(schema) not in self.seen:
                    found.append(f"{place}/{key}")
        return found


def _shortened(value: typing.Any) -> typing.Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return [_shortened(item) for item in value[:_MOST]] if isinstance(value, list) else value


def _without(value: dict, key: str) -> dict:
    return {name: item for name, item in value.items() if name != key}


def _replaced(output: typing.Any, path: tuple, value: typing.Any) -> typing.Any:
    if not path:
        return value
    copy = dict(output) if isinstance(output, dict) else list(output)
    copy[path[0]] = _replaced(output[path[0]], path[1:], value)
    return copy


def _error_free(name: str) -> list[str]:
    """Places in the schema of a command that are the error object's, which has tests of its own."""
    return [f"/{schemas.ERROR}/"] if name != schemas.ERROR else []


class OutputsTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def described(self, name, *outputs, elsewhere=()):
        """Every output is valid and no changed one is; together they have every property but those `elsewhere`."""
        bites, tried = Bites(name), 0
        for output in outputs:
            self.assertIsNone(json_outputs.wrong(name, output))
            wrong, changes = bites.let_through(output)
            self.assertEqual(wrong, [])
            tried += changes
        self.assertGreater(tried, 10)
        if name != schemas.ERROR:
            bites.always.pop(schemas.load(schemas.ERROR)["properties"]["error"]["description"], None)
        self.assertEqual({where: keys for where, keys in bites.always.items() if keys - PRESENT}, {})
        unseen, apart = bites.unseen(), [*NEVER.get(name, ()), *elsewhere]
        self.assertEqual([part for part in apart if not any(part in place for place in unseen)], [], "they do occur")
        apart += _error_free(name)
        self.assertEqual([place for place in unseen if not any(part in place for part in apart)], [])

    def output(self, name, *args, code=0):
        # Within this call the output is held against its schema.
        done = tool.ran(self, name.replace("-", "_"), *args, "--json", code=code, cwd=self.folder)
        return json.loads(done.stdout)

    def lone(self, file, **tensors):
        """Writes a file without configuration."""
        path = self.folder / f"{file}.safetensors"
        safetensors.numpy.save_file(tensors, path)
        return path

    def copied(self, name, **changes):
        """A copy of the sample, of which JSON files have other values: file without its ending -> changes."""
        folder = self.folder / name
        folder.mkdir()
        for path in SAMPLE.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for file, values in changes.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    def test_errors(self):
        cut = self.folder / "cut.safetensors"
        cut.write_bytes((SAMPLE / "model.safetensors").read_bytes()[:-1])
        half = self.folder / "half.apr"
        tool.ran(self, "convert", SAMPLE, half)
        data = bytearray(half.read_bytes())
        data[0] ^= 1
        half.write_bytes(data)
        wide = self.lone("wide", w=np.full(4, 1e30, np.float32))
        self.described(
            "error",
            self.output("convert", "nowhere", "x.apr", code=3),
            self.output("convert", SAMPLE, "x.gguf", code=2),
            self.output("convert", SAMPLE, code=2),
            self.output("convert", wide, "x.apr", "--as-is", "--cast", "f16", code=5),
            self.output("show", cut, code=4),
            self.output("show", half, code=4),
        )

    def test_convert(self):
        wide = self.lone("wide", w=np.array([1e30, 1e-30, 1], np.float32))
        quantised = self.output("convert", SAMPLE, "q.apr", "--cast", "q8")
        self.assertNotEmpty(quantised["outcome"]["quantised"])
        sharded = self.output("convert", SHARDED, "shards", "--max-shard-size", "100KB")
        self.assertGreater(len(sharded["plan"]["files"]), 1)
        part = self.output("convert", SAMPLE, "part", "--leave-out", "*.bias", "--as-is")
        self.assertNotEmpty(part["plan"]["dropped"])
        damaged = self.output("convert", wide, "w.safetensors", "--cast", "f16", "--as-is", "--allow-overflow")
        self.assertEqual(damaged["outcome"]["damage"], {"w": {"overflowed": 1, "vanished": 1}})
        self.described(
            "convert",
            self.output("convert", SAMPLE, "a.apr", "--dry-run"),
            *(quantised, sharded, part, damaged),
            self.output("convert", "nowhere", "x.apr", code=3),
        )

    def test_show(self):
        tool.ran(self, "convert", SAMPLE, "a.apr", "--cast", "q4k", cwd=self.folder)
        odd = self.output("show", self.lone("odd", w=np.array([np.nan, np.inf], np.float32)), "--stats")
        self.assertIsNone(odd["tensors"][0]["statistics"]["mean"])
        self.described(
            "show",
            self.output("show", "a.apr", "--stats"),
            self.output("show", SHARDED, "--tensors", "*norm*"),
            self.output("show", paths.DATA / "apr" / "tiny_f32_tied-int8.apr"),
            odd,
        )

    def test_verify(self):
        tool.ran(self, "convert", SAMPLE, "q.apr", "--cast", "q8", cwd=self.folder)
        other = self.copied("other", config={"rope_theta": 5e5}, generation_config={"temperature": 0.5})
        tool.ran(self, "convert", SAMPLE, "prefixed", "--rename", "=base.", "--as-is", cwd=self.folder)
        w = np.arange(64, dtype=np.float32).reshape(8, 8)
        far = self.output("verify", self.lone("w", w=w), self.lone("b", w=w * np.float32(np.nan)), code=1)
        self.assertEqual(far["tensors"][0]["relative_l2"], "inf")
        differs = self.output("verify", SAMPLE, other, code=1)
        self.assertNotEmpty(differs["metadata_differences"])
        renamed = self.output("verify", SAMPLE, "prefixed", code=1)
        self.assertTrue(renamed["names"]["hides_tensors"])
        self.described(
            "verify",
            self.output("verify", SAMPLE, SAMPLE),
            self.output("verify", SAMPLE, "q.apr", code=1),
            *(differs, renamed, far),
            self.output("verify", SAMPLE),
            self.output("verify", "w.safetensors", self.lone("c", w=w.reshape(4, 16)), code=1),
            self.output("verify", "b.safetensors", code=1),
        )

    def test_make_sample(self):
        listed, written = self.output("make-sample", "--list"), self.output("make-sample", "odd_sizes", "-o", "out")
        self.assertIn("config.json", written["files"])
        self.described("make-sample", listed, written, self.output("make-sample", "odd_sizes", code=2))

    def test_checkpoint(self):
        self.described(
            "checkpoint",
            self.output("checkpoint", "save", SAMPLE, "prepared", "--dtype", "bf16", "--fused"),
            self.output("checkpoint", "restore", "prepared"),
            self.output("checkpoint", "restore", "prepared", "-o", "restored.apr"),
            self.output("checkpoint", "show", "prepared"),
            self.output("checkpoint", "restore", "nowhere", code=3),
        )
        # What is not safetensors and not .apr is described, too.
        self.assertIsNone(json_outputs.wrong("show", self.output("show", "prepared")))
        self.assertIsNone(json_outputs.wrong("convert", self.output("convert", "prepared", "again.apr")))

    def test_bench(self):
        results = [json.loads(path.read_text()) for path in sorted((paths.ROOT / "tests/bench/results").glob("*.json"))]
        self.assertGreaterEqual(len(results), 3)
        # Of eight simulated devices: tests/mesh holds what bench prints there against the schema. And of a CPU.
        spread = {
            "engine": products.engine(),
            "mesh": {
                "data": 1,
                "model": 8,
                "parts": {"kv_heads": 4, "heads": 4, "ffn": 8, "vocabulary": 8},
                "parameter_bytes_per_device": 2,
                "parameter_bytes": 9,
                "operations": "XLA's own",
            },
        }
        self.described("bench", *results, results[0] | spread)

    def test_generate(self):
        made = self.output("generate", SAMPLE, "--prompt", "Hi", "--max-new-tokens", 3, "--greedy")
        self.assertNotEmpty(made["generations"][0]["token_ids"])
        self.described("generate", made, self.output("generate", "nowhere", "--prompt", "Hi", code=3))

    def test_loss(self):
        (self.folder / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n")
        (self.folder / "none.txt").write_text("")
        whole = self.output("loss", SAMPLE, "--text", "a.txt", "none.txt", "--per-token", "l.safetensors")
        self.assertEqual(whole["documents"][1]["loss_nats"], "nan")
        self.assertNotEmpty(whole["warnings"])
        losses = safetensors.numpy.load_file(self.folder / "l.safetensors")["losses"][1:]
        bits, mean = self.lone("bits", losses=losses / np.float32(np.log(2))), losses.mean(dtype=np.float64)
        wrong = self.output("loss", SAMPLE, "--text", "a.txt", "--check", bits, code=1)
        self.assertNotEmpty(wrong["check"]["mistakes"])
        alone = self.lone("mean", loss=np.array([mean]))
        self.described("loss", whole, wrong, self.output("loss", SAMPLE, "--text", "a.txt", "--check", alone))

    def test_golden(self):
        written = self.output("golden", SAMPLE, "-o", "g.safetensors")
        arrays = safetensors.numpy.load_file(self.folder / "g.safetensors")
        with safetensors.safe_open(self.folder / "g.safetensors", "numpy") as file:
            metadata = file.metadata()
        arrays["logits"][0, 3] = np.nan
        safetensors.numpy.save_file(arrays, self.folder / "nan.safetensors", metadata)
        wrong = self.output("golden", SAMPLE, "--check", "nan.safetensors", code=1)
        self.assertEqual((wrong["within"], wrong["tensors"][0]["relative_l2"]), (False, "nan"))
        self.described(
            "golden",
            *(written, wrong),
            self.output("golden", SAMPLE, "--check", "g.safetensors"),
            self.output("golden", SAMPLE, "--export-inputs", "inputs"),
            elsewhere=("/optimizer_", "/settings/", "/mistake/"),
        )

    @pytest.mark.slow
    def test_golden_after_steps_of_an_optimizer(self):
        asked = ("--optimizer", "adamw", "--lr", "1e-3", "--steps", 2)
        written = self.output("golden", SHARDED, *asked, "-o", "after.safetensors")
        right = self.output("golden", SHARDED, *asked, "--check", "after.safetensors")
        wrong = self.output("golden", SHARDED, *asked, "--decay", "matrices", "--check", "after.safetensors", code=1)
        self.assertNotEmpty(wrong["mistakes"])
        others = ("/written/", "/inputs/", "/check/", "/loss/", "/agreement/")
        self.described("golden", written, right, wrong, elsewhere=others)
        arrays = safetensors.numpy.load_file(self.folder / "after.safetensors")
        arrays["model.norm.weight"][:] = np.nan
        path = self.lone("nan", **arrays)
        found = self.output("golden", SHARDED, *asked, "--check", path, code=1)
        self.assertEqual((found["step_error"], found["mistakes"][0]["name"]), ("inf", "not-finite"))

    @pytest.mark.slow
    def test_parity(self):
        ids, model = seeded(288, 1, 64).input_ids, oracle.load(SAMPLE)
        right, wrong = forward(*model, ids), forward(*model, ids, faults=[Planted("rope-theta", None, {"theta": 1e4})])
        for name, values in (("right", right), ("wrong", wrong)):
            write_aprt(self.folder / name, values, ids)
        numbers = {
            key: {"min": float(value.min()), "max": float(value.max()), "mean": float(value.mean())}
            for key, value in wrong.items()
        }
        (self.folder / "numbers").mkdir()
        content = {"input_ids": ids.tolist(), "stages": numbers}
        (self.folder / "numbers" / "dump.json").write_text(json.dumps(content))
        broken = {key: np.full_like(value, np.nan) if "stage.0.qkv" in key else value for key, value in right.items()}
        write_aprt(self.folder / "broken", broken, ids)
        few = self.output("parity", SAMPLE, "--right", "numbers", code=1)
        self.assertNotEmpty(few["first"])
        named = self.output("parity", SAMPLE, "--right", "wrong", code=1)
        self.assertEqual([finding["fault"] for finding in named["findings"]], ["rope-theta"])
        unjudged = self.output("parity", SAMPLE, "--right", "broken", code=1)
        self.assertIn("not judged", {stage["standing"] for stage in unjudged["stages"]})
        tool.ran(self, "golden", SAMPLE, "-o", "back.safetensors", "--gradients", cwd=self.folder)
        back = self.output("parity", SAMPLE, "--right", "back.safetensors", "--backward")
        self.assertTrue(any(stage["key"].startswith("grad.") for stage in back["stages"]))
        self.described("parity", self.output("parity", SAMPLE, "--right", "right"), named, unjudged, few, back)


class CheckTest(parameterized.TestCase):
    """What tests/tool.py asks of every output of the suite."""

    ERROR = '{"error": {"code": "usage", "message": "What."}}'
    ANSWER = '{"verdict": "passed", "checks": [%s]}'
    CHECK = '{"name": "crc", "passed": true, "sentence": "", "tensors": [], "note": false, "severity": "ok"}'

    def test_answers_and_errors_pass_and_so_does_what_is_no_json(self):
        json_outputs.check("verify", ["a", "--json"], 0, self.ANSWER % self.CHECK)
        json_outputs.check("verify", ["a", "--json"], 2, self.ERROR)
        json_outputs.check("verify", ["a", "--json"], 130, "")
        json_outputs.check("verify", ["--help", "--json"], 0, "usage: verify")
        json_outputs.check("verify", ["a"], 0, "passed")

    @parameterized.parameters(
        (0, "passed", "no JSON"),
        (0, "", "no JSON"),
        (0, ANSWER % CHECK + "\n{}", "no JSON"),
        (0, '{"verdict": NaN}', "NaN is no JSON"),
        (0, ERROR, "with the exit code of an answer"),
        (5, ANSWER % CHECK, "'error' is a required property"),
        (70, "", "no JSON"),
        (0, ANSWER % "", r"\[\] should be non-empty"),
        (1, ANSWER[:-1] % CHECK + ', "x": 1}', r"\$: .*'x' was unexpected"),
        (1, ANSWER % CHECK.replace("crc", 'crc", "x": "'), r"checks\[0\].*'x' was unexpected"),
    )
    def test_anything_else_fails_and_says_where(self, code, printed, said):
        with self.assertRaisesRegex(AssertionError, said):
            json_outputs.check("verify", ["a", "--json"], code, printed)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        absltest.main()
