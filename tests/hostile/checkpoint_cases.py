"""Checkpoints of other forms, and texts beside tensors, that are not what they should be.

GGUF files, prepared checkpoints, adapters, configurations, tokenizers.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

from apr_jax.converters.checkpoint.adapters import with_adapter
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.convert import restoring
from apr_jax.converters.convert.plan import make_plan
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.tokenizer import Tokenizer
from tests import paths
from tests.hostile.cases import Case, Make, apr, checkpoint, entry, raw, st, truncated

CASES: list[Case] = []
MODEL = paths.checkpoint("gqa_tied_bf16")


def case(name: str, make: Make, *codes: str, opens: Callable[[pathlib.Path], Any] = checkpoint) -> None:
    """Adds a case that is refused."""
    CASES.append(Case(name, make, codes, opens))


def accepted(name: str, make: Make, opens: Callable[[pathlib.Path], Any] = checkpoint) -> None:
    """Adds a case that is accepted."""
    CASES.append(Case(name, make, None, opens))


# --- GGUF


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ONE = text(b"x") + struct.pack("<IQIQ", 1, 2, 0, 0)


def gguf(
    pairs: bytes = b"",
    tensors: bytes = ONE,
    *,
    counts: tuple[int, int] = (1, 0),
    version: int = 3,
    magic: bytes = b"GGUF",
    data: bytes = bytes(32),
    padded: bool = True,
) -> Make:
    """A GGUF file; `counts` are those of tensors and pairs."""
    head = magic + struct.pack("<IQQ", version, *counts) + pairs + tensors
    return raw(head + (bytes(-len(head) % 32) if padded else b"") + data, "x.gguf")


accepted("GGUF: a tensor", gguf())
accepted("GGUF: no tensors", gguf(tensors=b"", counts=(0, 0), data=b""))
accepted("GGUF: the last tensor is not padded", gguf(data=bytes(8)))
for length in (4, 7, 8, 23):
    case(f"GGUF: {length} bytes", raw((b"GGUF" + struct.pack("<IQQ", 3, 0, 0))[:length], "x.gguf"), "file-truncated")
for version in (0, 1, 4, 2**31):
    case(f"GGUF: version {version}", gguf(version=version), "gguf-version")
case("GGUF: big-endian", gguf(version=3 << 24), "gguf-version")
for counts in ((2**64 - 1, 0), (100, 0), (1, 2**64 - 1), (1, 100), (2**63, 2**63)):
    case(f"GGUF: counts {counts}", gguf(counts=counts), "gguf-count")
case("GGUF: a key twice", gguf(pair(b"a", 0, b"\0") * 2, counts=(1, 2)), "gguf-metadata")
case("GGUF: a key that is not UTF-8", gguf(pair(b"\xff", 0, b"\0"), counts=(1, 1)), "gguf-string")
case("GGUF: a key beyond the file", gguf(struct.pack("<Q", 2**60), counts=(1, 1)), "gguf-count")
case("GGUF: a key of 70,000 bytes", gguf(pair(b"k" * 70_000, 0, b"\0"), counts=(1, 1)), "gguf-count")
for kind in (13, 99, 2**32 - 1):
    case(f"GGUF: a value of type {kind}", gguf(pair(b"a", kind, b"\0"), counts=(1, 1)), "gguf-metadata")
    case(
        f"GGUF: values of type {kind}", gguf(pair(b"a", 9, struct.pack("<IQ", kind, 1)), counts=(1, 1)), "gguf-metadata"
    )
case("GGUF: a truth value of 2", gguf(pair(b"a", 7, b"\2"), counts=(1, 1)), "gguf-metadata")
case("GGUF: truth values of 2", gguf(pair(b"a", 9, struct.pack("<IQB", 7, 1, 2)), counts=(1, 1)), "gguf-metadata")
case("GGUF: a string beyond the file", gguf(pair(b"a", 8, struct.pack("<Q", 2**63)), counts=(1, 1)), "gguf-count")
case("GGUF: a string that is not UTF-8", gguf(pair(b"a", 8, text(b"\xc0\xaf")), counts=(1, 1)), "gguf-string")
case(
    "GGUF: strings that are not UTF-8",
    gguf(pair(b"a", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"\xff")), counts=(1, 1)),
    "gguf-string",
)
for kind in (0, 8, 9, 10):
    case(
        f"GGUF: 2^60 values of type {kind}",
        gguf(pair(b"a", 9, struct.pack("<IQ", kind, 2**60)), counts=(1, 1)),
        "gguf-count",
    )
case(
    "GGUF: arrays of arrays of arrays",
    gguf(pair(b"a", 9, struct.pack("<IQ", 9, 1) * 9 + struct.pack("<IQ", 0, 0)), counts=(1, 1)),
    "gguf-metadata",
)
for rank in (0, 5, 2**32 - 1):
    case(f"GGUF: {rank} dimensions", gguf(tensors=text(b"x") + struct.pack("<I", rank) + bytes(60)), "gguf-shape")
for kind in (4, 99, 2**32 - 1):
    case(
        f"GGUF: a tensor of type {kind}",
        gguf(tensors=text(b"x") + struct.pack("<IQIQ", 1, 2, kind, 0)),
        "dtype-unknown",
    )
case("GGUF: a dimension of 2^63", gguf(tensors=text(b"x") + struct.pack("<IQIQ", 1, 2**63, 0, 0)), "shape-dimension")
case("GGUF: 2^32 x 2^32", gguf(tensors=text(b"x") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)), "shape-overflow")
case("GGUF: a row that is no whole block", gguf(tensors=text(b"x") + struct.pack("<IQIQ", 1, 33, 8, 0)), "shape-blocks")
case("GGUF: data beyond the file", gguf(tensors=text(b"x") + struct.pack("<IQIQ", 1, 1000, 0, 0)), "file-truncated")
case("GGUF: a hole", gguf(tensors=text(b"x") + struct.pack("<IQIQ", 1, 2, 0, 32), data=bytes(64)), "gguf-offset")
case("GGUF: overlap", gguf(tensors=ONE + text(b"y") + struct.pack("<IQIQ", 1, 2, 0, 0), counts=(2, 0)), "gguf-offset")
case(
    "GGUF: a name twice",
    gguf(tensors=ONE + text(b"x") + struct.pack("<IQIQ", 1, 2, 0, 32), counts=(2, 0), data=bytes(64)),
    "gguf-tensors",
)
case("GGUF: an empty name", gguf(tensors=text(b"") + struct.pack("<IQIQ", 1, 2, 0, 0)), "name-empty")
case("GGUF: a name with ESC", gguf(tensors=text(b"\x1b[2J") + struct.pack("<IQIQ", 1, 2, 0, 0)), "name-characters")
case("GGUF: a name of 2000 bytes", gguf(tensors=text(b"n" * 2000) + struct.pack("<IQIQ", 1, 2, 0, 0)), "gguf-count")
case("GGUF: bytes behind", gguf(data=bytes(200)), "trailing-bytes")
for kind, value in (
    (4, struct.pack("<I", 0)),
    (4, struct.pack("<I", 12)),
    (4, struct.pack("<I", 2**31)),
    (5, struct.pack("<i", -32)),
    (8, text(b"32")),
    (6, struct.pack("<f", 32.0)),
):
    case(f"GGUF: alignment {value!r}", gguf(pair(b"general.alignment", kind, value), counts=(1, 1)), "gguf-metadata")
SPLIT = pair(b"split.count", 2, struct.pack("<H", 2)) + pair(b"split.no", 2, b"\0\0")
case("GGUF: a part whose name does not say so", gguf(SPLIT, counts=(1, 2)), "one-of-several")


def renamed(make: Make, name: str) -> Make:
    def made(folder: pathlib.Path) -> pathlib.Path:
        return make(folder).rename(folder / name)

    return made


case("GGUF: a part is missing", renamed(gguf(SPLIT, counts=(1, 2)), "x-00001-of-00002.gguf"), "shard-missing")
case("GGUF: another number of parts", renamed(gguf(SPLIT, counts=(1, 2)), "x-00001-of-00003.gguf"), "one-of-several")


def twice(folder: pathlib.Path) -> pathlib.Path:
    for number in (1, 2):
        renamed(gguf(SPLIT, counts=(1, 2)), f"x-0000{number}-of-00002.gguf")(folder)
    return folder / "x-00001-of-00002.gguf"


case("GGUF: a tensor in two parts", twice, "tensor-in-two-shards")

# --- prepared checkpoints

PARAMETER = {"shape": [2], "crc32": f"{zlib.crc32(bytes(8)):08x}", "tensors": {"model.norm.weight": [2]}}
DESCRIBED = {
    "format": "apr_jax.prepared/2",
    "dtype": "float32",
    "fused": False,
    "devices": 1,
    "source": {},
    "versions": {},
    "metadata": None,
    "parameters": {"model.norm.weight": PARAMETER},
}
LAYOUT = {
    "chunks": [2],
    "compressor": None,
    "dtype": "<f4",
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": [2],
    "zarr_format": 2,
    "dimension_separator": ".",
}


def prepared(description: Any = None, layout: Any = None, values: bytes | None = bytes(8), **changed: Any) -> Make:
    """A prepared checkpoint of one parameter; what is no bytes is written as JSON."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        place = folder / "parameters" / "model.norm.weight"
        place.mkdir(parents=True)
        for path, content in (
            (folder / "prepared.json", {**DESCRIBED, **changed} if description is None else description),
            (place / ".zarray", LAYOUT if layout is None else layout),
        ):
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        if values is not None:
            (place / "0").write_bytes(values)
        return folder

    return make


def parameter(**changed: Any) -> Make:
    return prepared(parameters={"model.norm.weight": {**PARAMETER, **changed}})


def restored(path: pathlib.Path) -> None:
    """Restores a prepared checkpoint to a file."""
    with tempfile.TemporaryDirectory() as folder:
        restoring.restore(str(path), f"{folder}/x.safetensors")


accepted("prepared: as it should be", prepared())
accepted("prepared: restored", prepared(), restored)
case("prepared: other values than were saved", prepared(values=b"\0\0\0\0\0\0\0\1"), "prepared-hash", opens=restored)
case("prepared: restored from nothing", lambda folder: folder / "no", "file-missing", opens=restored)
case("prepared: restored from an empty folder", lambda folder: folder, "not-prepared", opens=restored)
for content in (b"", b"{", b"[]", b"5", b"{}", b'{"format":5}'):
    case(
        f"prepared: {content.decode() or 'empty'}",
        prepared(content),
        "json-syntax" if len(content) < 2 and content != b"5" else "prepared-content",
    )
case("prepared: another version", prepared(format="apr_jax.prepared/9"), "prepared-format")
accepted("prepared: of two devices", prepared(devices=2))
for changed in (
    {"dtype": "int8"},
    {"dtype": []},
    {"fused": 1},
    {"devices": True},
    {"devices": "1"},
    {"devices": 0},
    {"types": 5},
    {"types": {"model.norm.weight": 5}},
    {"source": 5},
    {"versions": [1]},
    {"metadata": {"a": 5}},
    {"metadata": 5},
    {"parameters": []},
    {"parameters": {"a": 5}},
    {"parameters": {"a": {}}},
):
    case(f"prepared: {changed}", prepared(**changed), "prepared-content")
for changed in (
    {"shape": []},
    {"shape": [0]},
    {"shape": [3]},
    {"shape": 5},
    {"tensors": []},
    {"tensors": {}},
    {"tensors": {"a": []}},
    {"tensors": {"a": [2, 2]}},
    {"tensors": {"a": ["2"]}},
):
    case(f"prepared: a parameter with {changed}", parameter(**changed), "prepared-content")
for changed in ({"shape": [-2]}, {"shape": [2**63]}, {"shape": [1.0]}, {"shape": ["2"]}):
    case(f"prepared: a parameter with {changed}", parameter(**changed), "shape-dimension")
for name in ("../x", "/abs", "a/b", "", ".", "x\0", "CON"):
    case(f"prepared: a parameter {name!r}", prepared(parameters={name: PARAMETER}), "prepared-content")
case("prepared: a tensor in two parameters", prepared(parameters={"a": PARAMETER, "b": PARAMETER}), "prepared-content")
case("prepared: no values", prepared(values=None), "file-missing")
for size in (0, 7, 9):
    case(f"prepared: {size} bytes of values", prepared(values=bytes(size)), "prepared-size")
for content in (b"[]", b"5"):
    case(f"prepared: layout {content.decode()}", prepared(layout=content), "prepared-parameter")
for changed in ({"shape": [3]}, {"dtype": "<f8"}):
    case(f"prepared: layout with {changed}", prepared(layout={**LAYOUT, **changed}), "prepared-parameter")
for chunks in (None, 5, [], [0], [-1], [3], [True], [1.0], ["1"], [1, 1]):
    case(f"prepared: layout with chunks {chunks}", prepared(layout={**LAYOUT, "chunks": chunks}), "prepared-chunks")
for changed in ({"compressor": {"id": "zlib"}}, {"order": "F"}, {"filters": []}):
    case(f"prepared: layout with {changed}", prepared(layout={**LAYOUT, **changed}), "prepared-chunks")
case("prepared: the file of all values for a half", prepared(layout={**LAYOUT, "chunks": [1]}), "prepared-size")
case("prepared: a half without its file", prepared(layout={**LAYOUT, "chunks": [1]}, values=bytes(4)), "file-missing")


def orbax(folder: pathlib.Path) -> pathlib.Path:
    (folder / "_METADATA").write_text("{}")
    return folder


case("prepared: Orbax's alone", orbax, "foreign-orbax")

# --- adapters


def adapter(path: pathlib.Path) -> None:
    """Adds an adapter to a model."""
    with open_checkpoint(MODEL) as base:
        with_adapter(base, path)


def lora(config: Any = None, *, tensors: bool = True, **changed: Any) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        source = paths.DATA / "adapters" / "lora"
        if tensors:
            shutil.copy(source / "adapter_model.safetensors", folder)
        content = {**json.loads((source / "adapter_config.json").read_bytes()), **changed} if config is None else config
        if config is not False:
            (folder / "adapter_config.json").write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
        return folder

    return make


accepted("adapter: as it should be", lora(), adapter)
case("adapter: no configuration", lora(False), "adapter-missing", opens=adapter)
case("adapter: no tensors", lora(tensors=False), "adapter-missing", opens=adapter)
for content, code in (
    (b"", "json-syntax"),
    (b"[]", "config-type"),
    (b"5", "config-type"),
    (b"[" * 10**5, "json-depth"),
    (b'{"r":1,"r":2}', "json-duplicate"),
):
    case(f"adapter: {content[:20].decode() or 'empty'}", lora(content), code, opens=adapter)
for changed in ({"peft_type": "IA3"}, {"use_qalora": True}, {"layer_replication": [[0, 1]]}, {"peft_type": 5}):
    case(f"adapter: {changed}", lora(**changed), "adapter-unsupported", opens=adapter)
for changed in ({"r": "8"}, {"r": 0}, {"r": -1}, {"r": None}, {"lora_alpha": "x"}, {"lora_alpha": None}, {"r": [1]}):
    case(f"adapter: {changed}", lora(**changed), "adapter-unsupported", opens=adapter)

# --- configurations


def config(path: pathlib.Path) -> None:
    """Asks for the model's configuration."""
    with open_checkpoint(path) as opened:
        opened.model_config()


def settings(path: pathlib.Path) -> None:
    """Asks for the settings of generation."""
    with open_checkpoint(path) as opened:
        GenerationConfig.of(opened).checked()


def planned(path: pathlib.Path) -> None:
    """Plans a conversion."""
    with open_checkpoint(path) as opened:
        make_plan(opened, str(path) + ".out.apr", to="apr")


def beside(**files: Any) -> Make:
    """A folder of no tensors with side files; what is no bytes is written as JSON."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )
        return folder

    return make


PLAIN = json.loads((MODEL / "config.json").read_bytes())
accepted("config.json: as it should be", beside(config__json=PLAIN), config)
TEXTS = (
    (b"", "json-syntax"),
    (b"{", "json-syntax"),
    (b"[]", "config-type"),
    (b"5", "config-type"),
    (b"null", "config-type"),
    (b"[" * 10**5, "json-depth"),
    (b'{"a":NaN}', "json-number"),
    (b'{"a":' + b"1" * 10**5 + b"}", "json-number"),
    (b'{"a":1,"a":1}', "json-duplicate"),
    (b"\xef\xbb\xbf{}", "json-utf8"),
    (b"\xff", "json-utf8"),
    (b'{"a":"\\ud800"}', "json-surrogate"),
    (b'{"a":[' + b"0.5," * 3_000_000 + b"0]}", "json-count"),
    # One letter makes a text four times as wide as it is in the file.
    ('{"a":"😀'.encode() + b"a" * 12_000_000 + b'"}', "json-count"),
)
for content, code in TEXTS:
    case(f"config.json: {content[:20].decode('latin-1') or 'empty'}", beside(config__json=content), code, opens=config)
    case(
        f"generation_config.json: {content[:20].decode('latin-1') or 'empty'}",
        beside(generation_config__json=content, config__json=PLAIN),
        code,
        opens=settings,
    )
for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "rms_norm_eps"):
    for value in ("896", -1, 0, [], 1e309 if key == "rms_norm_eps" else 1.5, True):
        if value != 1e309:
            case(f"107 {key} {value!r}", beside(config__json={**PLAIN, key: value}), "config-unsupported", opens=config)
for scaling in (
    5,
    "yarn",
    {"rope_type": "x"},
    {"rope_type": "yarn", "factor": "4"},
    {"rope_type": []},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "linear", "factor": -1},
):
    case(
        f"107 rope_scaling {scaling}",
        beside(config__json={**PLAIN, "rope_scaling": scaling}),
        "config-unsupported",
        opens=config,
    )
for key, value in (
    ("temperature", "x"),
    ("temperature", -1),
    ("top_k", -1),
    ("eos_token_id", "x"),
    ("repetition_penalty", 0),
):
    case(
        f"107 {key} {value!r}",
        beside(generation_config__json={key: value, "do_sample": True}, config__json=PLAIN),
        "generation-config",
        opens=settings,
    )
for value in ("896", -1, 10**9, None, 1.5):
    text_of = json.dumps({"architecture": "qwen2", "hidden_size": value, "num_layers": 1}).encode()
    case(f"107 hidden_size {value!r} in an .apr", apr(text_of), "config-unsupported", opens=config)

# --- what a container carries

for name in ("../x", "/x", "a/b", "CON", "x.safetensors", "", ".", ".hidden", "x\0"):
    case(f"source file {name!r}", apr(json.dumps({"source_files": {name: "x"}}).encode()), "source-files")
for value in (
    [],
    5,
    "x",
    {"a": 5},
    {"a": None},
    {"a": {}},
    {"a": {"base64": 5}},
    {"a": {"base64": "!"}},
    {"a": {"base64": "A"}},
    {"a": {"base64": "", "b": 1}},
    {"a": ["base64"]},
):
    case(f"source files {value}", apr(json.dumps({"source_files": value}).encode()), "source-files")

# --- tokenizers


def tokenizer(path: pathlib.Path) -> None:
    """Makes the tokenizer and encodes a text."""
    with open_checkpoint(path) as opened:
        made = Tokenizer.of(opened)
        assert made is not None
        made.encode("abc")


LETTERS = {letter: number for number, letter in enumerate("abcdef")}
WHOLE = {"model": {"type": "BPE", "vocab": {**LETTERS, "ab": 6}, "merges": ["a b"]}, "added_tokens": []}
STRANGE = {"decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}


def tokens(strange: bool = False, model: Any = None, **changed: Any) -> Make:
    whole: dict[str, Any] = {**WHOLE, **(STRANGE if strange else {}), **changed}
    if model is not None:
        whole["model"] = {**WHOLE["model"], **model} if isinstance(model, dict) else model
    given = (
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["x", "y"]}}
        if strange
        else {"tokenizer_class": "Qwen2Tokenizer"}
    )
    return beside(tokenizer__json=whole, tokenizer_config__json=given)


accepted("tokenizer: as it should be", tokens(), tokenizer)
accepted("tokenizer: of another class", tokens(True), tokenizer)
for content, code in TEXTS:
    if code not in ("config-type", "json-count"):
        case(
            f"tokenizer.json: {content[:20].decode('latin-1') or 'empty'}",
            beside(tokenizer__json=content, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"}),
            code,
            opens=tokenizer,
        )
for content in (b"[]", b"5", b"null"):
    case(
        f"tokenizer.json: {content.decode()}",
        beside(tokenizer__json=content, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"}),
        "tokenizer-broken",
        opens=tokenizer,
    )
for model in (5, [], "x", {"type": "Unigram"}, {"vocab": []}, {"vocab": None}):
    case(f"tokenizer: model {model}", tokens(model=model), "tokenizer-kind", opens=tokenizer)
for model in (
    {"vocab": {"a": "x"}},
    {"vocab": {"a": -1}},
    {"vocab": {"a": 2**40}},
    {"merges": 5},
    {"merges": [5]},
    {"merges": ["a"]},
    {"merges": ["a z"]},
    {"merges": [["a"]]},
    {"merges": [["a", 5]]},
):
    case(f"tokenizer: model {model}", tokens(model=model), "tokenizer-broken", opens=tokenizer)
for name, changed in {
    "a prefix of subwords": {"model": {"continuing_subword_prefix": "abcdefgh"}},
    "a pattern without end": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(.*a){25}b"}, "content": ""},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    },
    "padding of 2^31": {
        "padding": {
            "strategy": {"Fixed": 2**31},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
        "decoder": None,
    },
    "no decoder": {"decoder": None},
    "an unknown decoder": {"decoder": {"type": "x"}},
}.items():
    kind = "tokenizer-kind" if changed.get("decoder", 0) is None else "tokenizer-broken"
    case(f"tokenizer: {name}", tokens(True, **changed), kind, opens=tokenizer)
for single in (
    [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    [{"Sequence": {"id": "B", "type_id": 0}}],
    [{"SpecialToken": {"id": "x", "type_id": 0}}],
    [5],
    [{}],
    [{"a": 1, "b": 2}],
    [{"Sequence": {"id": "A", "type_id": 0}}] * 100,
):
    processor = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    case(
        f"tokenizer: post-processor {str(single)[:40]}",
        tokens(post_processor=processor),
        "tokenizer-broken",
        opens=tokenizer,
    )
for value in (5, [5], {"a": 1}, [["a"]]):
    text_of = json.dumps({"tokenizer.vocabulary": value}).encode()
    case(f"tokenizer.vocabulary {value}", apr(text_of), "tokenizer-broken", opens=tokenizer)
for value in (5, [5], ["a"], [["a"]]):
    text_of = json.dumps({"tokenizer.vocabulary": ["a", "b"], "tokenizer.merges": value}).encode()
    case(f"tokenizer.merges {value}", apr(text_of), "tokenizer-broken", opens=tokenizer)

# --- what taking out the checks one by one has shown to be missing

case("GGUF: no values of type 99", gguf(pair(b"a", 9, struct.pack("<IQ", 99, 0)), counts=(1, 1)), "gguf-metadata")
MANY = pair(b"split.count", 2, struct.pack("<H", 60_000)) + pair(b"split.no", 2, b"\0\0")
case("GGUF: one of 60,000 parts", renamed(gguf(MANY, counts=(1, 2)), "x-00001-of-60000.gguf"), "one-of-several")
case("prepared: a parameter of nothing", parameter(shape=[0], tensors={"a": [0]}), "prepared-content")
case("prepared: a description of 65 MB", truncated(prepared(), "prepared.json", 65 << 20), "prepared-size")
case("config.json of 17 MB", truncated(beside(config__json=PLAIN), "config.json", 17 << 20), "json-size", opens=config)
case("no configuration", raw((2).to_bytes(8, "little") + b"{}"), "config-missing", opens=config)


def pickled(folder: pathlib.Path) -> pathlib.Path:
    lora(tensors=False)(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    return folder


def elsewhere(folder: pathlib.Path) -> pathlib.Path:
    path = lora()(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b".layers.0.", b".layers.7."))
    return folder


case("adapter: a pickle", pickled, "adapter")
case("adapter: layers that the model lacks", elsewhere, "adapter-tensors", opens=adapter)
case("adapter: asked for its configuration", lora(), "adapter", opens=config)


def disguised(folder: pathlib.Path) -> pathlib.Path:
    st({"x.lora_A.weight": entry()}, bytes(4))(folder).rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(PLAIN))
    return folder


case("adapter: as a model, with the model's configuration", disguised, "adapter", opens=config)
