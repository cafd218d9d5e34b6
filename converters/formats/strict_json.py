"""JSON as container headers need it: nothing is guessed, nothing is lost, and a hostile text costs little.

Reading refuses what `json` lets through: duplicate keys, NaN and Infinity, byte-order marks, unpaired surrogates,
numbers of absurd length, nesting beyond a limit. Everything has a price: what the letters and objects of a text will
take in memory is added up in one pass over its bytes, piece by piece, and a text beyond the budget is refused before
anything is made of it. Then the C scanner of the standard library reads, so that 20 MB of tokenizer take a fraction of
a second.

Numbers keep their spelling (`SpeltFloat`): an object that `apr` wrote is written back byte for byte, `0.000001`
included, where Python alone would print `1e-06`. Format: apr-v2-format section 3.2.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from apr_jax.converters.errors import BrokenContainerError, RefusedError
from apr_jax.converters.storage.crc import Bytes

# Longest spelling of a number that is believed; a float64 needs 24 characters, an unsigned 64-bit integer 20.
_MAX_NUMBER_CHARACTERS = 100
_MAX_DEPTH = 64
# What CPython takes for each beside its letters, in bytes: an object or array, a key with its place in a table and what
# the scanner keeps of it meanwhile, the same where the key has been there before, a string, a number or literal, and
# what a float adds that remembers its spelling; it takes time as well, as much as if it had 224 bytes.
_CONTAINER, _KEY, _KEY_AGAIN, _STRING, _SCALAR, _FLOAT = 96, 136, 90, 64, 32, 224
# What a string takes beyond that if it is not of ASCII alone, and, in time, if it is among some with escapes.
_NOT_ASCII, _ESCAPED = 24, 64
_SHORT = 64
_PIECE_BYTES = 1 << 18
# The C scanner recurses; below this many levels it is far from the interpreter's own limit.
_SAFE_DEPTH = 200

_KEYS = re.compile(rb'"([^"]*)"[ \t\r\n]*:')
# Levels that are taken off brackets by replacing before the rest is counted, and what each bracket does to the level.
_ROUNDS = 4
_STEPS = [{ord("["): 1, ord("]"): -1}.get(byte, 0) for byte in range(256)]

_NOT_STRUCTURAL = bytes(set(range(256)) - set(b'"[]{},:.eE'))
_BRACES_AS_BRACKETS, _NOT_BRACKETS = bytes.maketrans(b"{}", b"[]"), b",:.eE"
_DIGITS_AS_ZEROS = bytes(ord("0") if byte in b"0123456789" else byte for byte in range(256))
# Half of what is believed: wherever a text is cut into pieces, one of the two halves shows it.
_LONG_NUMBER = b"0" * (_MAX_NUMBER_CHARACTERS // 2)
# Bytes of UTF-8: those that no letter begins with, and those that begin one beyond U+FFFF; then how an escaped one
# begins, and some that are not beyond.
_CONTINUING, _BEYOND_FFFF = bytes(range(0x80, 0xC0)), (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4")
_ESCAPED_BEYOND_FFFF = (b"\\ud", b"\\uD")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_new_float = float.__new__
_encode_string = json.JSONEncoder(ensure_ascii=False).encode
_encode_plain = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Budget(NamedTuple):
    """What a text and its values may take in memory, in bytes: a base, and so many for each byte of the text."""

    base: int
    per_byte: float

    def of(self, text: Bytes) -> int:
        """Returns the budget of one text in bytes."""
        return self.base + int(self.per_byte * len(text))


PLAIN = Budget(32 << 20, 1.0)
"""What it lets through is read within 100 ms and 20 ms for each MB, by a slow processor too (tests/hostile/JSON.md)."""
TOKENIZER = Budget(48 << 20, 6.0)
"""Merges are pairs of short texts: a tokenizer of 260,000 tokens has 33 MB."""
METADATA = Budget(48 << 20, 2.0)
"""Those of `.apr` hold a vocabulary beside the files of a tokenizer."""


class SpeltFloat(float):
    """A float that remembers how it was written, so that it can be written back the same way."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, value: float, text: str | None = None) -> SpeltFloat:
        number = float.__new__(cls, value)
        number.text = _decimal_text(float.__repr__(number), 16, -5) if text is None else text
        return number


def f32(value: float) -> SpeltFloat:
    """Returns the float32 nearest to `value`, spelt as `apr` spells its f32 fields.

    Shortest digits that give the same float32 back; plain decimals for 1e-6 <= |value| < 1e13.

    Raises:
      RefusedError: Code "json-number", if it is not finite as a float32.
    """
    nearest = _as_f32(value)
    if not math.isfinite(nearest):
        raise RefusedError(
            "not a finite float32",
            code="json-number",
            found=value,
            hint="Put a number in its place that float32 can hold",
        )
    return SpeltFloat(nearest, _decimal_text(_f32_digits(nearest), 13, -6))


def loads(
    data: Bytes,
    *,
    what: str,
    max_bytes: int,
    max_depth: int = _MAX_DEPTH,
    budget: Budget = PLAIN,
    wide: bool = False,
    file: str | None = None,
    offset: int = 0,
) -> Any:
    """Parses one JSON document.

    Args:
      data: UTF-8 text; JSON whitespace may surround the document.
      what: What the text is, for error messages ("the metadata").
      max_bytes: Longest text accepted.
      max_depth: Deepest nesting accepted; `[]` has depth 1.
      budget: What the decoded text and its values may take in memory.
      wide: Whether letters cost no more than the bytes that they have here: for what holds whole tokenizers, which may
        have any letter. Python takes four bytes for each letter of a text that has one beyond U+FFFF.
      file: The file it comes from, for error messages.
      offset: Where it begins in that file, for error messages.

    Returns:
      The value. Floats are `SpeltFloat`.

    Raises:
      BrokenContainerError: Codes "json-size", "json-utf8", "json-depth", "json-count", "json-duplicate", "json-number",
        "json-surrogate", "json-syntax".
    """
    reader = _Reader(what, file, offset)
    if len(data) > max_bytes:
        raise reader.error("is too large", "json-size", found=f"{len(data)} bytes", expected=f"at most {max_bytes}")
    if bytes(data[:3]) == b"\xef\xbb\xbf":
        raise reader.error("begins with a byte-order mark", "json-utf8")
    letters = _WideLetters() if wide else _Letters()
    census = _Census(reader, budget.of(data), max_depth, letters)
    too_deep = census.take(data)
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise reader.error(
            "is not UTF-8", "json-utf8", at=error.start, found=f"byte {data[error.start]:#04x}"
        ) from None
    value = reader.parse(text, plain_integers=not census.odd_integers)
    if too_deep:
        raise reader.error("is nested too deeply", "json-depth", expected=f"at most {max_depth} levels")
    if _SURROGATE_ESCAPE.search(data):
        _refuse_surrogates(value, reader)
    return value


def check_limits(data: Bytes, *, what: str, budget: Budget) -> None:
    """Checks text that is about to be written against the limits that `loads` has for it when it comes back.

    Args:
      data: What `dumps` returned.
      what, budget: As `loads`, which will be told that the letters are wide.

    Raises:
      RefusedError: Codes "json-depth", "json-count".
    """
    reader = _Reader(what, None, 0)
    try:
        if _Census(reader, budget.of(data), _MAX_DEPTH, _WideLetters()).take(data):
            raise reader.error("is nested too deeply", "json-depth", expected=f"at most {_MAX_DEPTH} levels")
    except BrokenContainerError as error:
        raise RefusedError(
            error.message,
            code=error.code,
            found=error.found,
            expected=error.expected,
            hint="Leave out what makes it so large: no reader would take it",
        ) from None


def dumps(value: Any) -> bytes:
    """Serialises compactly, as `apr` does: no spaces, keys in their order, raw UTF-8, floats by their spelling.

    Raises:
      RefusedError: Code "json-number" for NaN and infinities, "json-surrogate" for text that is not Unicode,
        "json-type" for what JSON cannot express.
    """
    try:
        return b"".join(piece.encode() for piece in _pieces(value))
    except UnicodeEncodeError as error:
        raise RefusedError(
            "text with an unpaired surrogate cannot be written",
            code="json-surrogate",
            hint="Replace it: text.encode('utf-8', 'replace').decode()",
        ) from error


class _Reader:
    """Parses one text, with errors that say where."""

    def __init__(self, what: str, file: str | None, offset: int):
        self._what = what
        self._file = file
        self._offset = offset

    def error(
        self, message: str, code: str, *, at: int = 0, found: Any = None, expected: Any = None
    ) -> BrokenContainerError:
        return BrokenContainerError(
            f"{self._what} {message}",
            code=code,
            file=self._file,
            offset=self._offset + at,
            found=found,
            expected=expected,
        )

    def parse(self, text: str, *, plain_integers: bool) -> Any:
        decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_float=self._float,
            # None is what the scanner does fastest.
            parse_int=None if plain_integers else self._int,
            parse_constant=self._constant,
        )
        try:
            with _no_collection():
                return decoder.decode(text)
        except json.JSONDecodeError as error:
            at = sum(
                len(text[i : min(i + _PIECE_BYTES, error.pos)].encode()) for i in range(0, error.pos, _PIECE_BYTES)
            )
            raise self.error(f"is not valid JSON: {error.msg}", "json-syntax", at=at) from None
        except RecursionError:
            raise self.error("is nested too deeply", "json-depth") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise self.error("has the same key twice in one object", "json-duplicate", found=repr(twice)[:300])
        return value

    def _float(self, text: str) -> SpeltFloat:
        # Not by the constructor: this is called hundreds of thousands of times.
        number = _new_float(SpeltFloat, text if len(text) <= _MAX_NUMBER_CHARACTERS else "inf")
        if math.isinf(number):
            raise self.error("has a number out of range", "json-number", found=text[:40])
        number.text = text
        return number

    def _int(self, text: str) -> int | SpeltFloat:
        if len(text) > _MAX_NUMBER_CHARACTERS:
            raise self.error("has a number out of range", "json-number", found=text[:40] + "...")
        return SpeltFloat(-0.0, text) if text == "-0" else int(text)

    def _constant(self, text: str) -> Any:
        raise self.error("has a number that JSON does not know", "json-number", found=text)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Lets no garbage be looked for: nothing that is parsed has cycles, and looking takes as long as parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Census:
    """Counts what stands outside strings, in pieces, before anything is built.

    Exact for valid JSON, where backslashes stand in strings only; any other text fails in the parser at its first
    fault, and has been counted rightly up to there.

    Attributes:
      odd_integers: Whether there may be integers that are too long, or a -0: they are looked at one by one.
    """

    def __init__(self, reader: _Reader, budget: int, max_depth: int, letters: _Letters):
        self.odd_integers = False
        self._reader, self._budget, self._max_depth = reader, budget, max_depth
        self._quotes = self._commas = self._keys = self._again = self._floats = self._containers = 0
        self._letters = letters
        self._brackets: list[bytes] = []

    def take(self, data: Bytes) -> bool:
        """Returns whether the nesting exceeds what is accepted.

        Raises:
          BrokenContainerError: Code "json-count": the objects would take too much memory; "json-depth" where the
            nesting exceeds what the parser can do.
        """
        at = 0
        while at < len(data):
            piece = bytes(data[at : at + _PIECE_BYTES])
            if at + len(piece) < len(data):
                piece = _without_escape_at_end(piece)
            at += len(piece)
            self._look_at_integers(piece, bytes(data[at : at + 1]))
            self._add(piece)
        return self._is_deep()

    def _look_at_integers(self, piece: bytes, following: bytes) -> None:
        if not self.odd_integers:
            self.odd_integers = b"-0" in piece + following or _LONG_NUMBER in piece.translate(_DIGITS_AS_ZEROS)

    def _add(self, piece: bytes) -> None:
        # A -0 is kept as a float, too; those within strings do no harm.
        self._floats += piece.count(b"-0")
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"_").replace(b'\\"', b"_")
        self._letters.add(piece, within=self._quotes % 2 == 1)
        parts = piece.translate(None, _NOT_STRUCTURAL).split(b'"')
        outside = b"".join(parts[self._quotes % 2 :: 2])
        self._quotes += len(parts) - 1
        self._commas += outside.count(b",")
        if b":" in outside:
            keys = _KEYS.findall(piece)
            self._again += len(keys) - len(set(keys))
            self._keys += outside.count(b":")
        # Those with a point or an exponent; true and false have the letter as well.
        self._floats += outside.count(b".") + outside.count(b"e") + outside.count(b"E")
        brackets = outside.translate(_BRACES_AS_BRACKETS, _NOT_BRACKETS)
        self._containers += brackets.count(b"[")
        self._brackets.append(brackets)
        strings = self._quotes // 2
        # Every value but the first one of a container, and every member, has a comma before it.
        scalars = max(0, self._commas + 1 - (strings - self._keys))
        price = self._containers * _CONTAINER + self._keys * _KEY + strings * _STRING
        price -= self._again * (_KEY + _STRING - _KEY_AGAIN)
        price += scalars * _SCALAR + min(self._floats, scalars) * _FLOAT + self._letters.price()
        if price > self._budget:
            self._is_deep()
            raise self._reader.error(
                "has more objects, texts and numbers than such a file needs",
                "json-count",
                found=f"{self._containers} objects and arrays, {strings} texts, {scalars} numbers up to there, "
                f"{self._letters}",
                expected=f"what fits into {self._budget >> 20} MB",
            )

    def _is_deep(self) -> bool:
        brackets = b"".join(self._brackets)
        # Most of them are closed at once; each round takes one level from all that is nested.
        rounds = 0
        while rounds < _ROUNDS and len(fewer := brackets.replace(b"[]", b"")) < len(brackets):
            brackets, rounds = fewer, rounds + 1
        if brackets.count(b"]") > brackets.count(b"["):
            # The parser comes to where it is broken, and how many these are has no price.
            return False
        depth = rounds + max(itertools.accumulate(map(_STEPS.__getitem__, brackets)), default=0)
        if depth > max(_SAFE_DEPTH, self._max_depth):
            expected = f"at most {self._max_depth} levels"
            raise self._reader.error("is nested too deeply", "json-depth", expected=expected)
        return depth > self._max_depth


def _without_escape_at_end(piece: bytes) -> bytes:
    """Returns what no cut behind it parts an escape in two: without an escape that begins in the last six bytes."""
    _, backslash, rest = piece[-6:].rpartition(b"\\")
    before = piece[: len(piece) - len(rest)]
    odd = (len(before) - len(before.rstrip(b"\\"))) % 2
    return before[:-1] if backslash and odd else piece


class _Letters:
    """Adds up what the letters of a text take: once as a whole, and once in the values that are made of it.

    Python keeps all letters of a text as wide as the widest: 1, 2 or 4 bytes.
    """

    def __init__(self) -> None:
        self._count, self._width, self._values = 0, 1, 0
        # The text that goes on in the next piece, and what making one takes for a moment, at most.
        self._open_count, self._open_width, self._moment = 0, 1, 0

    def __str__(self) -> str:
        return f"{self._count} letters of {self._width} bytes"

    def price(self) -> int:
        # While the whole is made wider there are two of it.
        whole = self._count * (self._width if self._width == 1 else self._width + 1)
        return whole + self._values + self._moment

    def add(self, piece: bytes, *, within: bool) -> None:
        """Adds a piece without escaped quotes; `within`: whether it begins in the middle of a text."""
        if not within:
            self._open_count, self._open_width = 0, 1
        if piece.isascii() and b"\\u" not in piece and self._open_width == 1:
            self._count += len(piece)
            self._values += len(piece)
            # Where there is no quote this is 0, and the text goes on.
            last = piece.rfind(b'"') + 1
            self._open_count = len(piece) - last + (0 if last else self._open_count)
            self._moment = max(self._moment, self._open_count // 4)
        else:
            self._count += _count(piece)
            self._width = max(self._width, _width(piece))
            self._values += _decoded_count(piece)
            parts = piece.split(b'"')
            texts = parts[not within :: 2]
            if within:
                self._go_on(texts.pop(0))
            self._widen(texts)
            if len(parts) > 1:
                self._open_count, self._open_width = _decoded_count(parts[-1]), _decoded_width(parts[-1])

    def _go_on(self, text: bytes) -> None:
        """Adds the next part of a text that has begun; it may make wider what there was of it."""
        count, width = _decoded_count(text), max(self._open_width, _decoded_width(text))
        self._values += self._open_count * (width - self._open_width) + count * (width - 1)
        # A text with escapes is given a quarter more room than it needs; while it is made wider there are two of it.
        narrow = self._open_count * self._open_width if width > self._open_width else 0
        self._moment = max(self._moment, (self._open_count + count) * width // 4 + narrow)
        self._open_count, self._open_width = self._open_count + count, width

    def _widen(self, texts: list[bytes]) -> None:
        """Adds what texts take beyond one byte for each letter."""
        joined = b"".join(texts)
        if b"\\u" not in joined:
            wide = [text for text in texts if not text.isascii()]
        elif joined.isascii():
            wide = [text for text in texts if b"\\u" in text]
        else:
            wide = [text for text in texts if b"\\u" in text or not text.isascii()]
        joined = b"".join(wide)
        self._values += (_ESCAPED if b"\\u" in joined else _NOT_ASCII) * len(wide) + _decoded_count(joined)
        marks = [mark for mark in (*_BEYOND_FFFF, *_ESCAPED_BEYOND_FFFF) if mark in joined]
        if marks and len(joined) > _SHORT * len(wide):
            joined = b"".join([text for text in wide if any(mark in text for mark in marks)])
        # Of short ones all count as four bytes wide where one is: what they take is mostly the string itself.
        self._values += 2 * _decoded_count(joined) if marks else 0


class _WideLetters(_Letters):
    """The same where a letter costs what it takes in the file, however wide it makes others."""

    def add(self, piece: bytes, *, within: bool) -> None:
        self._count += len(piece)
        self._values += len(piece)


def _count(text: bytes) -> int:
    return len(text) if text.isascii() else len(text.translate(None, _CONTINUING))


def _decoded_count(text: bytes) -> int:
    return _count(text) - 5 * text.count(b"\\u")


def _width(text: bytes) -> int:
    """Returns how many bytes Python takes for a letter of a text, at most: Latin-1 is not told from what is beyond."""
    if text.isascii():
        return 1
    return 4 if any(first in text for first in _BEYOND_FFFF) else 2


def _decoded_width(text: bytes) -> int:
    if b"\\u" not in text:
        return _width(text)
    return 4 if any(mark in text for mark in _ESCAPED_BEYOND_FFFF) else max(2, _width(text))


def _refuse_surrogates(value: Any, reader: _Reader) -> None:
    """Refuses strings that no UTF-8 can hold; called only for texts that spell a surrogate at all."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise reader.error("has an unpaired surrogate", "json-surrogate", found=ascii(value)[:300]) from None
    elif isinstance(value, dict):
        for key, member in value.items():
            _refuse_surrogates(key, reader)
            _refuse_surrogates(member, reader)
    elif isinstance(value, list):
        for member in value:
            _refuse_surrogates(member, reader)


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, float):
        yield _spelling(value)
    elif isinstance(value, Mapping):
        separator = "{"
        for key, member in value.items():
            if not isinstance(key, str):
                raise RefusedError(
                    "a key of a JSON object has to be text", code="json-type", found=repr(key), hint="Write str(key)"
                )
            yield f"{separator}{_encode_string(key)}:"
            yield from _pieces(member)
            separator = ","
        yield "}" if separator == "," else "{}"
    elif isinstance(value, list | tuple):
        # Long lists of one kind (vocabulary, merges) go through the C encoder whole.
        if all(type(member) in (str, int, bool) for member in value):
            yield _encode_plain(value)
            return
        separator = "["
        for member in value:
            yield separator
            yield from _pieces(member)
            separator = ","
        yield "]"
    elif value is None or isinstance(value, str | int):
        yield _encode_plain(value)
    else:
        raise RefusedError(
            "JSON cannot express this",
            code="json-type",
            found=type(value).__name__,
            hint="Make it of numbers, text, lists and dictionaries",
        )


def _spelling(value: float) -> str:
    if not math.isfinite(value):
        raise RefusedError(
            "JSON has no such number", code="json-number", found=value, hint="Put a finite number in its place, or null"
        )
    return value.text if isinstance(value, SpeltFloat) else SpeltFloat(value).text


def _as_f32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _f32_digits(value: float) -> str:
    """Returns the shortest decimal digits that give the float32 `value` back."""
    if value == 0:
        return repr(value)
    for digits in range(1, 10):
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        integer = int(mantissa.replace(".", ""))
        # At powers of two the float32 below is closer than the one above: the nearest decimal of this length may miss
        # the narrow side while its neighbour hits the wide one.
        for step in (0, 1, -1):
            candidate = f"{integer + step}e{int(exponent) - digits + 1}"
            if _as_f32(float(candidate)) == value:
                return candidate
    raise AssertionError("nine digits are enough for any float32")


def _decimal_text(digits: str, above: int, below: int) -> str:
    """Lays digits out as serde_json does: plain for 10**below <= |value| < 10**above, else d.ddde+x."""
    mantissa, _, exponent_text = digits.lower().partition("e")
    sign, mantissa = ("-", mantissa[1:]) if mantissa.startswith("-") else ("", mantissa)
    whole, _, fraction = mantissa.partition(".")
    significant = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent_text or 0) - (len(whole + fraction) - len(significant))
    significant = significant.rstrip("0")
    if not significant:
        return sign + "0.0"
    exponent = point - 1
    if below <= exponent < above:
        if point <= 0:
            return f"{sign}0.{'0' * -point}{significant}"
        if point >= len(significant):
            return f"{sign}{significant.ljust(point, '0')}.0"
        return f"{sign}{significant[:point]}.{significant[point:]}"
    tail = f".{significant[1:]}" if len(significant) > 1 else ""
    return f"{sign}{significant[0]}{tail}e{'+' if exponent > 0 else ''}{exponent}"
