"""Dumps of other engines, token ids and golden files that are not what they should be."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import in_file
from apr_jax.engines import bounded
from apr_jax.parity import dumps
from apr_jax.trace import golden, inputs, positions
from tests import paths
from tests.hostile.cases import Case, Make, raw, truncated

CASES: list[Case] = []
TOKENS = [1, 2, 3, 4]


@functools.cache
def config() -> Qwen2Config:
    """Of the model that the dumps are said to be of."""
    return Qwen2Config.from_hf(json.loads((paths.checkpoint("gqa_tied_bf16") / "config.json").read_bytes()))


WIDTH = json.loads((paths.checkpoint("gqa_tied_bf16") / "config.json").read_bytes())["hidden_size"]
COUNT = len(TOKENS) * WIDTH


def dump(path: pathlib.Path) -> None:
    """Reads a dump."""
    dumps.read(path, config())


def case(name: str, make: Make, *codes: str, opens: Callable[[pathlib.Path], Any] = dump) -> None:
    """Adds a case that is refused."""
    CASES.append(Case(name, make, codes, opens))


def accepted(name: str, make: Make, opens: Callable[[pathlib.Path], Any] = dump) -> None:
    """Adds a case that is accepted."""
    CASES.append(Case(name, make, None, opens))


_NO_FILE = object()


def folder_of(files: dict[str, Any], tokens: Any = TOKENS) -> Make:
    """A folder of files, and token_ids.json; what is no bytes is written as JSON."""

    def make(folder: pathlib.Path) -> pathlib.Path:
        for name, content in {**({} if tokens is _NO_FILE else {"token_ids.json": tokens}), **files}.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return folder

    return make


# --- APRT


def aprt(count: int = COUNT, layer: int = 0, magic: bytes = b"APRT", body: bytes | None = None) -> bytes:
    return magic + struct.pack("<II", layer, count) + (bytes(4 * count) if body is None else body)


def stage(data: bytes, tokens: Any = TOKENS) -> Make:
    return folder_of({"layer-0/attn_norm.bin": data}, tokens)


accepted("APRT: a stage", stage(aprt()))
case("APRT: empty", stage(b""), "aprt-magic")
case("APRT: another magic", stage(aprt(magic=b"APRS")), "aprt-magic")
for length in (1, 3, 4, 11):
    case(f"APRT: {length} bytes", stage(aprt()[:length]), "aprt-magic" if length < 4 else "aprt-length")
case("APRT: 2^32 - 1 elements", stage(aprt(2**32 - 1, body=bytes(4))), "aprt-length")
case("APRT: cut short", stage(aprt()[:-1]), "aprt-length")
case("APRT: a byte more", stage(aprt() + b"\0"), "aprt-length")
case("APRT: elements that do not fit", stage(aprt(COUNT + 1)), "dump-size")
case("APRT: another layer", stage(aprt(layer=1)), "aprt-layer")
case("APRT: no stage of the model", folder_of({"layer-77/attn_norm.bin": aprt(layer=77)}), "aprt-empty")
case("APRT: no tokens", stage(aprt(), _NO_FILE), "token-ids-missing")

# --- raw values and maps


def backward(path: pathlib.Path) -> None:
    """Reads a dump for its gradients."""
    dumps.read(path, config(), backward=True)


def mapped(entry: Any, files: dict[str, bytes] | None = None, **more: Any) -> Make:
    """A folder with a dump.json of one stage."""
    return folder_of({"dump.json": {"stages": {"stage.0.attn_norm": entry}, **more}, **(files or {})})


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


WHOLE = np.zeros((1, len(TOKENS), WIDTH), np.float32)
FLAT = {"a.bin": WHOLE.tobytes()}
accepted("map: raw values", mapped({"file": "a.bin"}, FLAT))
accepted("map: an array", mapped({"file": "a.npy"}, {"a.npy": npy(WHOLE)}))
accepted("map: numbers", mapped({"min": -1, "max": 2.5}))
NORM = "grad.model.norm.weight"


def gradient(array: Any, **more: Any) -> Make:
    """A folder with a dump.json of one gradient."""
    return folder_of({"dump.json": {"stages": {NORM: {"file": "g.npy"}}, **more}, "g.npy": npy(array)})


accepted("map: a gradient", gradient(np.zeros(WIDTH, np.float32), labels=[[-100, *TOKENS[1:]]]), backward)
case("map: a gradient alone, forward", gradient(np.zeros(WIDTH, np.float32)), "nothing-compared")
case("map: a stage alone, backward", mapped({"file": "a.bin"}, FLAT), "nothing-compared", opens=backward)
case("map: a gradient of other axes", gradient(np.zeros((WIDTH, 1), np.float32)), "dump-shape", opens=backward)
case("map: a gradient of integers", gradient(np.zeros(WIDTH, np.int32)), "dump-dtype", opens=backward)
case(
    "map: a gradient larger than its parameter", gradient(np.zeros(2 * WIDTH, np.float32)), "dump-shape", opens=backward
)
for labels, code in (
    (5, "dump-map"),
    (TOKENS, "dump-map"),
    ([["a"]], "dump-map"),
    ([[1], [2, 3]], "dump-map"),
    ([[2**64] * len(TOKENS)], "dump-map"),
    ([TOKENS[1:]], "dump-labels"),
    ([[*TOKENS[1:], -100]], "dump-labels"),
):
    made = gradient(np.zeros(WIDTH, np.float32), labels=labels)
    case(f"map: labels {labels}", made, code, opens=backward)
for text in (
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'{"stages":[]}',
    b'{"stages":{"a":5}}',
    b'{"stages":{"a":{"file":5}}}',
    b"{}",
):
    case(
        f"map: {text.decode() or 'empty'}",
        folder_of({"dump.json": text}),
        "json-syntax" if text in (b"", b"{") else "dump-map",
    )
case("map: no stage", folder_of({"dump.json": {"stages": {}}}), "nothing-compared")
case(
    "map: a stage twice",
    folder_of({"dump.json": b'{"stages":{"logits":{"min":1},"logits":{"min":1}}}'}),
    "json-duplicate",
)
case("map: deep", folder_of({"dump.json": b"[" * 10**5}), "json-depth")
case("map: 20 MB of numbers", folder_of({"dump.json": b'{"stages":[' + b"0.5," * 5_000_000 + b"0]}"}), "json-count")
case(
    "map: a stage that no model has",
    folder_of({"dump.json": {"stages": {"stage.0.nothing": {"min": 1}}}}),
    "dump-stage",
)
case(
    "map: a layer that this model lacks",
    folder_of({"dump.json": {"stages": {"stage.99.attn_norm": {"min": 1}}}}),
    "dump-stage",
)
for name in ("", "/abs.npy", "../x.npy", "a/../../x.npy", "..\\x.npy", "C:x.npy", "x\0.npy", "\\\\server\\x.npy"):
    case(f"map: file {name!r}", mapped({"file": name}), "file-name")
case("map: a file that is not there", mapped({"file": "x.npy"}), "file-missing")
case("map: a folder as file", mapped({"file": "d"}, {"d/x": b""}), "dump-file")
for dtype in ({}, [1], 5, None, "float8", "O"):
    case(f"map: dtype {dtype}", mapped({"file": "a.bin", "dtype": dtype}, FLAT), "dtype")
    if dtype is not None:
        case(f"map: dtype of all {dtype}", mapped({"file": "a.bin"}, FLAT, dtype=dtype), "dtype")
case("map: half an element", mapped({"file": "a.bin"}, {"a.bin": bytes(4 * COUNT - 1)}), "dump-size")
case("map: more elements than fit", mapped({"file": "a.bin"}, {"a.bin": bytes(4 * COUNT + 400)}), "dump-size")
case("map: fewer elements", mapped({"file": "a.bin"}, {"a.bin": bytes(8)}), "dump-size")
for layout in ("x", "bt", "bbtd", "btdd", 5, [1], "btds"):
    case(f"map: layout {layout}", mapped({"file": "a.bin", "layout": layout}, FLAT), "dump-layout")
for numbers in ({}, {"min": "1"}, {"min": None}, {"min": 1e300}, {"min": [1]}):
    case(f"map: numbers {numbers}", mapped(numbers), "dump-map")
for given in ([], {}, "x", [[]], [1.5], [True], [["a"]], [[1], 2], None):
    case(f"map: positions {given}", mapped({"file": "a.bin"}, FLAT, positions=given), "positions")
for given in ([9], [-1], [2, 1], [1, 1], [[1], [2]], [2**70]):
    case(f"map: positions {given} of four tokens", mapped({"file": "a.bin"}, FLAT, positions=given), "positions")
IDS = ([], {}, [[]], [1], [[1.5]], [["a"]], [[1], []], [[-1]], [[2**31]], [[2**70]], [[[1]]], None, "abc")
for ids in IDS:
    case(f"map: input_ids {ids}", mapped({"file": "a.bin"}, FLAT, input_ids=ids), "input-ids")
for name, given in (
    ("attention_mask", [[1, 1]]),
    ("attention_mask", [[1, 1, 1, 2]]),
    ("attention_mask", [[0, 0, 0, 0]]),
    ("attention_mask", [[1, 1, 1, 0.5]]),
    ("position_ids", [[3, 2, 1, 0]]),
    ("position_ids", [[-1, 0, 1, 2]]),
    ("position_ids", [[0, 1, 2, 2**21]]),
    ("position_ids", [[0, 1]]),
):
    more = {"input_ids": [TOKENS], name: given}
    case(f"map: {name} {given}", mapped({"file": "a.bin"}, FLAT, **more), name.replace("_", "-"))
case(
    "map: a mask over what is no token",
    mapped({"file": "a.bin"}, FLAT, input_ids=[[1, 2], [3]], attention_mask=[[1, 1], [1, 1]]),
    "attention-mask",
)
case(
    "map: a row of 200,000 tokens and 2,000 short ones",
    mapped({"file": "a.bin"}, FLAT, input_ids=[[1]] * 2000 + [[1] * 200_000]),
    "input-ids",
)
case(
    "map: msprobe's without numbers",
    folder_of({"dump.json": {"data": {"Module.norm.X.forward.0": {"output": 5}}}}),
    "capture-layers",
)
case("no dump", folder_of({"x.txt": b"x"}), "dump-empty")

# --- .npy


def array(
    header: bytes, body: bytes = b"", magic: bytes = b"\x93NUMPY", version: bytes = b"\x01\0", length: int | None = None
) -> Make:
    """A map whose stage is a `.npy` file of this header."""
    size = len(header) if length is None else length
    width = 4 if version[0] >= 2 else 2
    return mapped({"file": "a.npy"}, {"a.npy": magic + version + size.to_bytes(width, "little") + header + body})


def header(descr: Any = "<f4", order: Any = False, shape: Any = (COUNT,), **more: Any) -> bytes:
    return repr({"descr": descr, "fortran_order": order, "shape": shape} | more).encode() + b"\n"


BODY = WHOLE.tobytes()
accepted("npy: as it should be", array(header(), BODY))
accepted("npy: of version 2, big-endian, in Fortran's order", array(header(">f4", True), BODY, version=b"\x02\0"))
case("npy: empty", mapped({"file": "a.npy"}, {"a.npy": b""}), "npy")
case("npy: another magic", array(header(), BODY, magic=b"\x93NUMPX"), "npy")
case("npy: 9 bytes", mapped({"file": "a.npy"}, {"a.npy": b"\x93NUMPY\x01\0\x05"}), "npy")
case("npy: 11 bytes of version 2", mapped({"file": "a.npy"}, {"a.npy": b"\x93NUMPY\x02\0\x01\0\0"}), "npy")
case("npy: a header beyond the file", array(header(), length=60_000), "npy")
case("npy: a header of 4 GB", array(header(), version=b"\x02\0", length=2**32 - 1), "npy")
case(
    "npy: a header of 70,000 bytes",
    raw(b"\x93NUMPY\x02\0" + struct.pack("<I", 70_000) + header()[:-1].ljust(69_999) + b"\n" + BODY, "a.npy"),
    "npy",
    opens=bounded.npy,
)
for text in (
    b"((",
    b"{1: 2, 'descr': 3}",
    b"5",
    b"None",
    b"(" * 9000,
    b"{}",
    b"{'descr'}",
    b"x",
    b"\0",
    b"1" * 9000,
    b"-" * 9000 + b"1",
):
    case(f"npy: header {text[:20].decode()!r}", array(text, BODY), "npy")
for descr in (None, 5, [("a", "<f4")], "<f3", "no", "", "<f4" * 9000):
    case(f"npy: descr {str(descr)[:20]!r}", array(header(descr), BODY), "npy")
for descr in ("|O", "<U4", "|S4", "<M8[s]", "<m8[s]", "<c8", "|V4", "<f4,<f4", "<i4", "<f16", "|b1"):
    case(f"npy: no floats, {descr}", array(header(descr), BODY), "dump-dtype")
for shape in (5, [COUNT], (-1,), (1.5,), (True,), (2**63,), (1,) * 33 + (COUNT,), ("a",)):
    case(f"npy: shape {str(shape)[:30]}", array(header(shape=shape), BODY), "npy")
for shape in ((2**32, 2**32), (COUNT + 1,), (0,), ()):
    case(f"npy: another shape {shape}", array(header(shape=shape), BODY), "npy")
for version in (b"\0\0", b"\x02\x01", b"\x04\0"):
    case(f"npy: of version {version[0]}.{version[1]}", array(header(), BODY, version=version), "npy")
case("npy: an order that is a number", array(header(order=0), BODY), "npy")
case("npy: a key more", array(header(more=1), BODY), "npy")
case("npy: larger than the stage", array(header(shape=(COUNT * 64,)), BODY * 64), "dump-size")
case("npy: fewer than the stage", array(header(shape=(1,)), bytes(4)), "dump-size")

# --- .npz, .jsonl, logs, ranks


def archive(members: dict[str, bytes], name: str = "x.npz", packed: bool = False) -> Make:
    def make(folder: pathlib.Path) -> pathlib.Path:
        path = folder / name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
            for member, content in members.items():
                file.writestr(member, content)
        return path

    return make


IDS_NPY = npy(np.array([TOKENS]))
STATES = np.zeros((config().num_layers + 1, 1, len(TOKENS), WIDTH), np.float32)
accepted("npz: hidden states", archive({"input_ids.npy": IDS_NPY, "hidden_states.npy": npy(STATES)}))
case("npz: empty", raw(b"", "x.npz"), "npz")
case("npz: cut", raw(b"PK\x03\x04" + bytes(60), "x.npz"), "npz")
case("npz: no stage", archive({"a.npy": npy(WHOLE)}), "nothing-compared")
case("npz: a bomb", archive({"input_ids.npy": IDS_NPY, "logits.npy": bytes(64 << 20)}, packed=True), "dump-size")
case("npz: a layer less", archive({"input_ids.npy": IDS_NPY, "hidden_states.npy": npy(STATES[1:])}), "dump-shape")
case("npz: a scalar", archive({"input_ids.npy": IDS_NPY, "hidden_states.npy": npy(np.float32(1))}), "dump-shape")
case(
    "npz: integers as a stage",
    archive({"input_ids.npy": IDS_NPY, "hidden.0.npy": npy(WHOLE.astype(np.int32))}),
    "dump-dtype",
)


def crowded(members: int, comment: bytes = b"", wide: bool = False) -> Make:
    """An archive of empty members; `wide` says how many in the form for 64 bits."""
    local = b"PK\3\4" + bytes(26)
    entry = struct.Struct("<4s24xHHH12x8s")
    directory = b"".join(entry.pack(b"PK\1\2", 8, 0, 0, b"%04x.npy" % (n % 65536)) for n in range(members))
    size, at = len(directory), len(local)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, members, members, size, at)
    end64 += struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1)
    short = (0xFFFFFFFF, 0xFFFFFFFF) if wide else (size, at)
    count = min(members, 0xFFFF)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, *short, len(comment)) + comment
    return raw(local + directory + (end64 if wide else b"") + end, "x.npz")


case("npz: of no stage, by hand", crowded(3), "nothing-compared")
case("npz: of no stage, by hand, in 64 bits", crowded(3, wide=True), "nothing-compared")
case("npz: 100,001 arrays", crowded(100_001), "dump-files")
case("npz: 100,001 arrays before a comment", crowded(100_001, b"x" * 60_000), "dump-files")
case("npz: 100,001 arrays in 64 bits", crowded(100_001, wide=True), "dump-files")
LOGITS = [[0.0] * config().vocab_size] * 2
accepted("jsonl: a prompt", raw(json.dumps({"tokens": [1, 2], "logits": LOGITS}).encode(), "x.jsonl"))
case("jsonl: empty", raw(b"\n", "x.jsonl"), "nothing-compared")
for line in (
    b"{",
    b"[]",
    b"5",
    b'{"tokens":[]}',
    b'{"tokens":[1]}',
    b'{"tokens":["a"],"logits":[]}',
    b'{"tokens":5,"logits":[]}',
    b'{"logits":[]}',
    b'{"tokens":[1.5],"logits":[]}',
):
    case(f"jsonl: {line.decode()}", raw(line, "x.jsonl"), "json-syntax" if line == b"{" else "jsonl")
for logits in ([], [[1.0]], [[1.0], [1.0, 2.0]], "x", {"a": 1}, [["a"]], 5, None):
    case(
        f"jsonl: logits {logits}",
        raw(json.dumps({"tokens": [1, 2], "logits": logits}).encode(), "x.jsonl"),
        "dump-size",
    )
case("log: no tensor", folder_of({"x": b""}), "dump-empty")

# --- token ids, positions, golden files


def tokens(path: pathlib.Path) -> None:
    """Reads what --input-ids names."""
    golden.read_inputs(path)


def places(path: pathlib.Path) -> None:
    """Reads what --positions names."""
    positions.parse_positions(str(path))


def golden_file(path: pathlib.Path) -> None:
    """Reads a golden file."""
    golden.read(path)


accepted("ids: rows", raw(b"[[1,2],[3]]", "ids.json"), tokens)
for ids in IDS:
    case(f"ids: {ids}", raw(json.dumps(ids).encode(), "ids.json"), "input-ids", opens=tokens)
case("ids: a folder that holds none", folder_of({}, _NO_FILE), "token-ids-missing", opens=tokens)
case("ids: a folder that is not there", lambda folder: folder / "x.safetensors", "file-missing", opens=tokens)
for ids in ([], {}, [1.5], [True], ["a"], [[1]], None):
    case(f"token_ids.json: {ids}", stage(aprt(), ids), "token-ids")
case(
    "token_ids.json: not JSON",
    folder_of({"layer-0/attn_norm.bin": aprt(), "token_ids.json": b"["}, _NO_FILE),
    "json-syntax",
)
for content in ([], {}, {"input_ids": 5}, {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1]]}):
    code = "token-ids" if not content else "attention-mask" if "attention_mask" in content else "input-ids"
    case(f"inputs.json: {content}", folder_of({"inputs.json": content}, _NO_FILE), code, opens=tokens)
for name, size in (("input_ids.1x4.i32", 15), ("input_ids.1x4.i64", 16), ("input_ids.99999x99999.i32", 16)):
    case(f"raw ids: {size} bytes as {name}", folder_of({name: bytes(size)}, _NO_FILE), "inputs-size", opens=tokens)
accepted("raw ids: as they should be", folder_of({"input_ids.1x4.i32": bytes(16)}, _NO_FILE), tokens)
accepted("positions: a list", raw(b"[1,2]", "p.json"), places)
for given in ([], {}, [1.5], [[]], [["a"]], None):
    case(f"positions: {given}", raw(json.dumps(given).encode(), "p.json"), "positions", opens=places)
case("positions: a folder", folder_of({}), "positions", opens=places)


def tensors(**arrays: np.ndarray) -> Make:
    """A safetensors file of these arrays."""
    import safetensors.numpy

    return raw(safetensors.numpy.save(arrays))


accepted("golden: as it should be", tensors(input_ids=np.array([TOKENS], np.int32), logits=WHOLE), golden_file)
case("golden: no ids", tensors(logits=WHOLE), "golden-inputs", opens=golden_file)
case("golden: no values", tensors(input_ids=np.array([TOKENS], np.int32)), "nothing-compared", opens=golden_file)
case("golden: ids of another type", tensors(input_ids=WHOLE[0], logits=WHOLE), "input-ids", opens=golden_file)
case(
    "golden: ids of three axes",
    tensors(input_ids=np.zeros((1, 2, 3), np.int32), logits=WHOLE),
    "input-ids",
    opens=golden_file,
)
integers = {NORM: np.zeros(WIDTH, np.int32)}
case(
    "golden: a gradient of integers",
    tensors(input_ids=np.array([TOKENS], np.int32), **integers),
    "dump-shape",
    opens=backward,
)
case("golden: a shape that does not fit", tensors(input_ids=np.array([TOKENS], np.int32), logits=WHOLE), "dump-size")
case(
    "golden: a shape of the right size",
    tensors(**{"input_ids": np.array([TOKENS], np.int32), "stage.0.attn_norm": WHOLE.reshape(1, WIDTH, len(TOKENS))}),
    "dump-shape",
)
case(
    "golden: a stage that no model has",
    tensors(**{"input_ids": np.array([TOKENS], np.int32), "stage.0.x": WHOLE}),
    "nothing-compared",
)

# --- what taking out the checks one by one has shown to be missing

case("map: 2 GB of holes as a stage", truncated(mapped({"file": "a.bin"}, FLAT), "a.bin", 2 << 30), "dump-size")
case("map: layout bd", mapped({"file": "a.bin", "layout": "bd"}, FLAT), "dump-layout")
case(
    "map: attention_mask of -1",
    mapped({"file": "a.bin"}, FLAT, input_ids=[TOKENS], attention_mask=[[1, 1, 1, -1]]),
    "attention-mask",
)
TWO_ROWS = {
    "dump.json": {"stages": {"logits": {"file": "a.bin"}}, "input_ids": [[1, 2], [3, 4]], "positions": [[0], [0, 1]]},
    **FLAT,
}
case("map: positions of unequal rows", folder_of(TWO_ROWS), "positions")
case("log: a tensor of no forward pass", raw(b"zzz-0 = (f32) ADD(a) = {1}\nsum = 1\n", "x.log"), "nothing-compared")
case("ids: 17 MB of holes", truncated(raw(b"[[1]]", "ids.json"), "ids.json", 17 << 20), "file-size", opens=tokens)
case(
    "raw ids: 32 MB",
    truncated(folder_of({"input_ids.1x8388608.i32": b""}, _NO_FILE), "input_ids.1x8388608.i32", 32 << 20),
    "inputs-size",
    opens=tokens,
)
case("positions: no such file", lambda folder: folder / "p.json", "positions", opens=places)
case("ranks: none of them a dump", folder_of({"rank0/x": b"", "rank1/x": b""}), "dump-ranks")
case("ranks: APRT", folder_of({"rank0/final_norm.bin": aprt(), "rank1/final_norm.bin": aprt()}), "dump-ranks")
ONE_STAGE = {
    f"rank{n}/dump.json": {"stages": {f"stage.{n}.attn_norm": {"file": "a.bin"}}, "input_ids": [TOKENS]} for n in (0, 1)
}
case(
    "ranks: no stage in common",
    folder_of({**ONE_STAGE, "rank0/a.bin": FLAT["a.bin"], "rank1/a.bin": FLAT["a.bin"]}),
    "nothing-compared",
)


def beside_tokens(make: Make) -> Make:
    """What it makes, and token_ids.json."""

    def made(folder: pathlib.Path) -> pathlib.Path:
        (folder / "token_ids.json").write_text(json.dumps(TOKENS))
        return make(folder)

    return made


def rounds(**changed: Any) -> Make:
    """One request of TensorRT-Edge-LLM, of one round; None takes an array out."""
    cache = np.zeros((1, 2, config().num_kv_heads, 4, config().head_dim), np.float32)
    whole = {
        "logits": np.zeros((1, config().vocab_size), np.float32),
        "context_lengths": np.array([4], np.int32),
        "layer_0.kv": cache,
    }
    given = {
        name: array
        for name, array in {**whole, **{n.replace("__", "."): a for n, a in changed.items()}}.items()
        if array is not None
    }

    return beside_tokens(tensors(**{f"round_0.{name}": array for name, array in given.items()}))


accepted("rounds: as they should be", rounds())
case("rounds: no lengths", rounds(context_lengths=None), "dump-rounds")
case("rounds: unequal lengths", rounds(context_lengths=np.array([4, 3], np.int32)), "dump-rounds")
for shape in (
    (1, 2, 4),
    (1, 3, config().num_kv_heads, 4, config().head_dim),
    (1, 2, config().num_kv_heads, 3, config().head_dim),
):
    case(f"rounds: a cache of shape {shape}", rounds(layer_0__kv=np.zeros(shape, np.float32)), "dump-shape")


def given_inputs(path: pathlib.Path) -> None:
    """Reads a dump to which --input-ids names other tokens."""
    dumps.read(path, config(), inputs.Inputs.of([[9, 9, 9, 9]]))


def of_this_vocabulary(path: pathlib.Path) -> None:
    """Reads what --input-ids names, for a model."""
    with in_file(path):
        golden.read_inputs(path).check_vocabulary(config().vocab_size)


def few_files(path: pathlib.Path) -> None:
    """Reads a dump where three files are too many."""
    with mock.patch.object(bounded, "_MAX_FILES", 3):
        dump(path)


def with_torch(load: Callable[..., Any] | None) -> Callable[[pathlib.Path], None]:
    """Reads a dump with a stand-in for torch, which need not be there; None is no torch."""

    def opens(path: pathlib.Path) -> None:
        stand_in = None if load is None else types.SimpleNamespace(load=load)
        with mock.patch.dict(sys.modules, {"torch": stand_in}):
            dump(path)

    return opens


def unreadable(*args: Any, **settings: Any) -> None:
    raise RuntimeError("Invalid magic number; corrupt file?")


case(
    "APRT: 5 files where 3 are too many",
    folder_of({f"{n}.bin": aprt() for n in range(5)}),
    "dump-files",
    opens=few_files,
)
case("map: a name of 300 bytes", mapped({"file": "n" * 300 + ".npy"}), "read")
case("npy: the magic alone", mapped({"file": "a.npy"}, {"a.npy": b"\x93NUMPY"}), "npy")
case(
    "npy: a header that ends behind the file",
    array(header(shape=(0,)), length=len(header(shape=(0,))) + 9),
    "npy",
)
for shape in ((float(COUNT),), (-1, -COUNT)):
    case(f"npy: shape {shape}", array(header(shape=shape), BODY), "npy")
for content in (5, "input_ids"):
    case(f"inputs.json: {content}", folder_of({"inputs.json": content}, _NO_FILE), "token-ids", opens=tokens)
case("token_ids.json: 5", stage(aprt(), 5), "token-ids")
case("ids: [[1, True]]", raw(b"[[1,true]]", "ids.json"), "input-ids", opens=tokens)
case("ids: beyond the vocabulary", raw(b"[[1,288]]", "ids.json"), "input-ids", opens=of_this_vocabulary)
case("ids: beside nothing", lambda folder: folder / "x", "file-missing", opens=inputs.beside)
for name in ("attention_mask", "position_ids"):
    more = {"input_ids": [TOKENS], name: [[1], [1, 1]]}
    case(f"map: {name} of unequal rows", mapped({"file": "a.bin"}, FLAT, **more), "token-ids")
    more = {"input_ids": [TOKENS], name: [[0, 1, 2, 2**32 + 3]] if name == "position_ids" else [[1, 1, 1, 2**32 + 1]]}
    case(f"map: {name} beyond 32 bits", mapped({"file": "a.bin"}, FLAT, **more), name.replace("_", "-"))
IDS_ARRAY = np.array([TOKENS], np.int32)
SAME = np.array([[5, 5, 5, 5]], np.int32)
accepted("golden: labels", tensors(input_ids=IDS_ARRAY, labels=IDS_ARRAY, logits=WHOLE), golden_file)
case(
    "golden: other labels", tensors(input_ids=IDS_ARRAY, labels=SAME, logits=WHOLE), "golden-labels", opens=golden_file
)
case(
    "golden: fewer labels",
    tensors(input_ids=SAME, labels=SAME[:, :1], logits=WHOLE),
    "golden-labels",
    opens=golden_file,
)
case(
    "golden: of other tokens",
    tensors(**{"input_ids": IDS_ARRAY, "stage.0.attn_norm": WHOLE}),
    "input-ids",
    opens=given_inputs,
)


def hollow(folder: pathlib.Path) -> pathlib.Path:
    """A golden file one stage of which is 2 GB of holes."""
    entries = {
        "input_ids": {"dtype": "I32", "shape": [1, 4], "data_offsets": [0, 16]},
        "stage.0.attn_norm": {"dtype": "F32", "shape": [1 << 29], "data_offsets": [16, 16 + (1 << 31)]},
    }
    text = json.dumps(entries).encode()
    path = raw(len(text).to_bytes(8, "little") + text + IDS_ARRAY.tobytes())(folder)
    with path.open("ab") as file:
        file.truncate(8 + len(text) + 16 + (1 << 31))
    return path


case("golden: 2 GB of holes as a stage", hollow, "dump-size")


def of_odd_vocabulary(path: pathlib.Path) -> None:
    """Reads a dump of a model whose vocabulary is no whole number of heads."""
    dumps.read(path, dataclasses.replace(config(), vocab_size=289))


ODD = {"stages": {"logits": {"file": "a.bin", "layout": "bthd"}}, "input_ids": [TOKENS]}
case(
    "map: logits in heads",
    folder_of({"dump.json": ODD, "a.bin": bytes(4 * 4 * 289)}),
    "dump-layout",
    opens=of_odd_vocabulary,
)
for name, lengths in (("prompts", ([4, 3], [4, 4])), ("ends", ([4, 4], [5, 4]))):
    two = {
        "round_0.context_lengths": np.array(lengths[0], np.int32),
        "round_1.context_lengths": np.array(lengths[1], np.int32),
        "round_0.generated_token_ids": np.array([1, 1], np.int32),
    }
    case(f"rounds: {name} of unequal length", beside_tokens(tensors(**two)), "dump-rounds")
MODULES = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
MODULES += ["input_layernorm", "post_attention_layernorm"]
case(
    "msprobe: no tokens",
    folder_of({f"d/Module.model.layers.0.{name}.X.forward.0.output.0.npy": b"" for name in MODULES}),
    "token-ids-missing",
)
case("SGLang: of two ranks", folder_of({"a/Pass00000.pt": b"", "b/Pass00000.pt": b""}), "dump-ranks")
PASS = folder_of({"a/Pass00000.pt": b"x"})
case("SGLang: no torch", PASS, "torch", opens=with_torch(None))
case("SGLang: no file of torch's", PASS, "torch-file", opens=with_torch(unreadable))
case("SGLang: a list", PASS, "torch-file", opens=with_torch(lambda path, **settings: []))
