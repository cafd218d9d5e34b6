"""What is fuzzed: a target for each reader of files that somebody else wrote.

A target takes the bytes of one input, lays them into a folder as the file that they are to be, opens that as the
commands do, and goes on to what the commands would do with it. It returns whether the file was accepted; an error of
the family is a refusal. Anything else that it raises is a crash, and so is an accepted file whose content is not what
an independent reader finds in it (`AssertionError`): the safetensors package, NumPy, the standard library's JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import safetensors

from apr_jax.converters.checkpoint.adapters import with_adapter
from apr_jax.converters.checkpoint.checkpoint import Checkpoint
from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.convert import apr_tokenizer
from apr_jax.converters.convert.plan import make_plan
from apr_jax.converters.errors import AprJaxError
from apr_jax.converters.formats import strict_json
from apr_jax.engines import bounded
from apr_jax.generate import chat_template, tokenizer_files
from apr_jax.generate.config import GenerationConfig
from apr_jax.generate.tokenizer import Tokenizer
from apr_jax.parity import dumps
from apr_jax.trace import aprt
from apr_jax.trace.inputs import Inputs, from_json
from tests import paths

Opens = Callable[[bytes, pathlib.Path], None]
_READ_BYTES = 1 << 20
USER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader that is fuzzed.

    Attributes:
      opens: Lays an input into a folder and opens it.
      words: What a mutation may insert whole.
      slow: Whether a process is started for some inputs, so that fewer are tried in the same time.
    """

    opens: Opens
    words: tuple[bytes, ...] = ()
    slow: bool = False


@functools.cache
def config() -> Qwen2Config:
    """The configuration of the model that dumps and adapters are said to be of."""
    return Qwen2Config.from_hf(json.loads((paths.checkpoint("gqa_tied_bf16") / "config.json").read_bytes()))


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Ends what it surrounds at an error of the family, which a caller shows as one line."""
    try:
        yield
    except AprJaxError as error:
        if not error.code or len(str(error)) > 1 << 20:
            raise AssertionError("an error without code, or without end") from error
        json.dumps(error.to_json())


def _used(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
    """Does what show, convert and generate do before they read all tensors."""
    for tensor in list(checkpoint.tensors.values())[:64]:
        if tensor.nbytes <= _READ_BYTES:
            with refusals():
                raw = tensor.raw()
                assert len(raw) == tensor.nbytes
            with refusals():
                assert tensor.read().shape == tensor.shape
    for name in checkpoint.files:
        with refusals():
            checkpoint.files[name]
    for use in (
        checkpoint.model_config,
        lambda: GenerationConfig.of(checkpoint).checked(),
        lambda: make_plan(checkpoint, str(folder / "out.apr"), to="apr"),
        lambda: make_plan(checkpoint, str(folder / "out"), to="safetensors"),
    ):
        with refusals():
            use()


# --- containers


def _apr(data: bytes, folder: pathlib.Path) -> None:
    """Both CRCs are made right if the header's is not, so that what is behind them is reached."""
    path = folder / "x.apr"
    if len(data) >= 64 and data[:3] == b"APR":
        crc = zlib.crc32(data[44:64], zlib.crc32(data[:40]))
        data = data[:40] + struct.pack("<I", crc) + data[44:]
    path.write_bytes(data)
    for lenient, legacy in ((False, False), (True, True)):
        with refusals(), open_checkpoint(path, lenient=lenient, legacy=legacy) as checkpoint:
            if checkpoint.kind == "apr":
                said = as_the_index_says(data)
                held = {name: (tensor.shape, tensor.raw()) for name, tensor in checkpoint.tensors.items()}
                assert held == {name: said[name] for name in held}, "other tensors than the index says"
                assert said.keys() - held.keys() == checkpoint.placeholders.keys()
            _used(checkpoint, folder)


def as_the_index_says(data: bytes) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Reads the tensors of a sound `.apr` by apr-v2-format section 3.3, checking nothing: name -> shape and bytes."""
    count, index_at, data_at = (
        int.from_bytes(data[at : at + width], "little") for at, width in ((8, 4), (24, 8), (32, 8))
    )
    said = {}
    for _ in range(count):
        length = int.from_bytes(data[index_at : index_at + 2], "little")
        name, rank_at = data[index_at + 2 : index_at + 2 + length].decode(), index_at + 3 + length
        *shape, offset, size = struct.unpack_from(f"<{data[rank_at] + 2}Q", data, rank_at + 1)
        said[name] = tuple(shape), data[data_at + offset : data_at + offset + size]
        index_at = rank_at + 1 + 8 * (len(shape) + 2)
    return said


def _safetensors(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    with refusals(), open_checkpoint(path) as checkpoint:
        if checkpoint.kind != "safetensors":
            return
        try:
            theirs = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            raise AssertionError(f"the safetensors package refuses what is accepted here: {error}") from None
        assert theirs.keys() == checkpoint.tensors.keys()
        for name, tensor in checkpoint.tensors.items():
            assert list(tensor.shape) == theirs[name]["shape"], name
            assert tensor.dtype.safetensors == theirs[name]["dtype"], name
            assert tensor.raw() == bytes(theirs[name]["data"]), name
        _used(checkpoint, folder)


def _index(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    for name in ("a", "b"):
        shard = folder / f"{name}.safetensors"
        if not shard.exists():
            header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
            shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with refusals(), open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) <= {"a", "b"}
        _used(checkpoint, folder)


def _gguf(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "x.gguf"
    path.write_bytes(data)
    with refusals(), open_checkpoint(path) as checkpoint:
        _used(checkpoint, folder)


def _prepared(data: bytes, folder: pathlib.Path) -> None:
    place = folder / "parameters" / "model.norm.weight"
    if not place.exists():
        place.mkdir(parents=True)
        layout = {"chunks": [2], "compressor": None, "dtype": "<f4", "fill_value": 0, "filters": None, "order": "C",
                  "shape": [2], "zarr_format": 2, "dimension_separator": "."}  # fmt: skip
        (place / ".zarray").write_text(json.dumps(layout))
        (place / "0").write_bytes(bytes(8))
    (folder / "prepared.json").write_bytes(data)
    with refusals(), open_checkpoint(folder) as checkpoint:
        _used(checkpoint, folder)


# --- texts of a checkpoint


def _json(data: bytes, folder: pathlib.Path) -> None:
    with refusals():
        value = strict_json.loads(data, what="the text", max_bytes=1 << 20)
        assert value == json.loads(data), "another value than Python reads"
        with refusals():
            assert strict_json.loads(strict_json.dumps(value), what="it", max_bytes=1 << 22) == value


def _config(data: bytes, folder: pathlib.Path) -> None:
    header = b"{}      "
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_bytes(data)
    (folder / "generation_config.json").write_bytes(data)
    with refusals(), open_checkpoint(folder) as checkpoint:
        with refusals():
            checkpoint.model_config().tensor_shapes()
        _used(checkpoint, folder)


def _adapter(data: bytes, folder: pathlib.Path) -> None:
    place = folder / "adapter"
    if not place.exists():
        place.mkdir()
        source = paths.checkpoint("gqa_tied_bf16").parent.parent / "adapters" / "lora" / "adapter_model.safetensors"
        (place / source.name).write_bytes(source.read_bytes())
    (place / "adapter_config.json").write_bytes(data)
    with refusals(), open_checkpoint(paths.checkpoint("gqa_tied_bf16")) as base, with_adapter(base, place) as merged:
        for tensor in merged.tensors.values():
            assert tensor.shape
    with refusals(), open_checkpoint(place):
        pass


SECTION = re.compile(rb"^=== ([\w.]+)\n", re.MULTILINE)
"""An input of the tokenizer is several files: "=== tokenizer.json", a line break, its text, and so on."""


def _tokenizer(data: bytes, folder: pathlib.Path) -> None:
    _, *parts = SECTION.split(data)
    files = {name.decode(): text for name, text in zip(parts[::2], parts[1::2], strict=True)}
    model_type = "qwen2" if "qwen2" in files else None
    with refusals():
        found = tokenizer_files.read(files, model_type, "x")
        if found is not None:
            chat_template.of_files(files, found.config)
            ids = Tokenizer(found, None, "x").encode("Hello, wörld")
            Tokenizer(found, None, "x").decode(ids)


def _apr_tokenizer(data: bytes, folder: pathlib.Path) -> None:
    """The metadata of an `.apr`, of which a tokenizer is made."""
    with refusals():
        metadata = strict_json.loads(data, what="the metadata", max_bytes=1 << 20)
        if not isinstance(metadata, dict):
            return
        with refusals():
            files = apr_tokenizer.files_of(metadata, [])
            if found := tokenizer_files.read(files, "qwen2", "x"):
                Tokenizer(found, None, "x").encode("Hello, wörld")
        with refusals():
            Qwen2Config.from_apr(metadata, True, "x", frozenset())


def _template(data: bytes, folder: pathlib.Path) -> None:
    text = data.decode("utf-8", "replace")
    # Its syntax is read here, where the search sees which branches are taken, and once more in the child.
    with contextlib.suppress(Exception):
        chat_template._environment().parse(text)
    with refusals():
        said = chat_template.render(text, USER, True, {"eos_token": "</s>"}, "x")
        for secret in ("object at 0x", "<class '", "<module '", "<function "):
            assert secret not in said or secret in text, f"the sandbox shows {secret!r}"


# --- dumps


def _tokens(folder: pathlib.Path) -> None:
    (folder / "token_ids.json").write_text("[1, 2, 3, 4]")


def _aprt(data: bytes, folder: pathlib.Path) -> None:
    _tokens(folder)
    place = folder / "layer-0"
    place.mkdir(exist_ok=True)
    (place / "attn_norm.bin").write_bytes(data)
    with refusals():
        layer, values = aprt.decode(data, "x")
        assert aprt.encode(layer, values) == data
    with refusals():
        dumps.read(folder, config())


def _dump_map(data: bytes, folder: pathlib.Path) -> None:
    _tokens(folder)
    if not (folder / "a.npy").exists():
        np.save(folder / "a.npy", np.zeros((1, 4, config().hidden_size), np.float32))
        (folder / "b.bin").write_bytes(bytes(4 * 4 * config().hidden_size))
    (folder / "dump.json").write_bytes(data)
    with refusals():
        found = dumps.read(folder, config())
        for name, values in found.values.items():
            assert values.size, name


def _inputs(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "inputs.json"
    path.write_bytes(data)
    with refusals():
        found = from_json(path)
        assert found.input_ids.shape == found.attention_mask.shape == found.position_ids.shape


def _npy(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "a.npy"
    path.write_bytes(data)
    for floats in (True, False):
        with refusals():
            ours = bounded.npy(path, floats=floats)
            theirs = np.load(path, allow_pickle=False)
            assert ours.shape == theirs.shape
            assert ours.tobytes() == theirs.tobytes()


def _archive(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "a.npz"
    path.write_bytes(data)
    with refusals():
        dumps.read(path, config(), Inputs.of([[1, 2, 3, 4]]))


def _lines(data: bytes, folder: pathlib.Path) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(data)
    with refusals():
        dumps.read(path, config())


def _log(data: bytes, folder: pathlib.Path) -> None:
    _tokens(folder)
    path = folder / "a.log"
    path.write_bytes(data)
    with refusals():
        dumps.read(path, config())


_JSON = tuple(b'{ } [ ] , : " null true false -0 1e999 0.5 18446744073709551616 \\u0061 \\ud800 {"a":1}'.split())
_TENSORS = (
    b'"dtype":"F32"',
    b'"shape":[1]',
    b'"data_offsets":[0,4]',
    b'"__metadata__":{}',
    b'"BF16"',
    b'"F4"',
    b'"U8"',
)
_JINJA = tuple(
    b"""{{ }} {% %} {# #} {%- -%} {{- -}} for endfor if elif else endif set endset macro endmacro call endcall filter
    endfilter generation endgeneration break continue in is not and or namespace( range( lipsum( cycler( joiner( dict(
    messages tools raise_exception( strftime_now( |tojson |join |map( |select( |attr( |format( |batch( |slice( |indent(
    |center( |wordwrap( |truncate( |replace( |list |sort |unique |groupby( |sum |string |length loop.index loop.cycle(
    recursive .__class__ ['__class__'] _ * ** % // 10**9 '%s' [0] ~ |urlize |pprint |xmlattr |tojson(indent=9) self
    caller() varargs kwargs .items() .format( .join( .split() |dictsort |escape include import extends block""".split()
)
TARGETS = {
    "apr": Target(_apr, (b"APR\0", b"APR2", b"{}", b'"architecture":"qwen2"', *_JSON)),
    "safetensors": Target(_safetensors, (*_TENSORS, *_JSON)),
    "index": Target(_index, (b'"weight_map"', b'"a.safetensors"', b'"metadata"', b'"total_size"', *_JSON)),
    "gguf": Target(_gguf, (b"GGUF", b"general.architecture", b"general.alignment", b"qwen2")),
    "prepared": Target(_prepared, (b'"parameters"', b'"tensors"', b'"shape"', b'"fused"', *_JSON)),
    "json": Target(_json, _JSON),
    "config": Target(_config, (b'"rope_scaling"', b'"factor"', *_JSON)),
    "adapter": Target(_adapter, (b'"target_modules"', b'"rank_pattern"', b'"r"', *_JSON), slow=True),
    "tokenizer": Target(
        _tokenizer,
        (b"=== tokenizer.json\n", b"=== tokenizer_config.json\n", b'"vocab"', b'"merges"', b'"added_tokens"', *_JSON),
        slow=True,
    ),
    "apr-tokenizer": Target(
        _apr_tokenizer,
        (b'"tokenizer.vocabulary"', b'"tokenizer.merges"', b'"tokenizer.eos_token_id"', *_JSON),
    ),
    "template": Target(_template, _JINJA, slow=True),
    "aprt": Target(_aprt, (b"APRT", b"\xff\xff\xff\xff")),
    "dump-map": Target(_dump_map, (b'"stages"', b'"file"', b'"a.npy"', b'"dtype"', b'"layout"', *_JSON)),
    "inputs": Target(_inputs, (b'"input_ids"', b'"attention_mask"', b'"position_ids"', *_JSON)),
    "npy": Target(_npy, (b"\x93NUMPY", b"'descr'", b"'fortran_order'", b"'shape'", b"'<f4'", b"(1,)", b"'>f8'")),
    "npz": Target(_archive, (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b".npy", b"input_ids")),
    "jsonl": Target(_lines, (b'"tokens"', b'"logits"', b"\n", *_JSON)),
    "log": Target(_log, (b" = (f32) ADD(", b"= {896, 64, 1, 1}", b"sum = -1.5", b"l_out-0", b"nan", b"\n")),
}
