"""Checks the names of tensors: which ones a container may hold, and which only look different."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from apr_jax.converters.errors import BrokenContainerError, RefusedError

# Control characters and the marks that reverse the direction of text: on a terminal they show something else than is
# there.
_DECEPTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def check(name: str, *, max_bytes: int) -> None:
    """Checks a tensor's name.

    Raises:
      BrokenContainerError: Codes "name-empty", "name-characters".
      RefusedError: Code "name-too-long": names are never shortened.
    """
    if not name:
        raise BrokenContainerError("a tensor has an empty name", code="name-empty")
    length = len(name.encode("utf-8", "surrogatepass"))
    if length > max_bytes:
        raise RefusedError(
            "a tensor's name is too long",
            code="name-too-long",
            tensor=name[:300],
            found=f"{length} bytes of UTF-8",
            expected=f"at most {max_bytes}",
            hint="`convert --rename FROM=TO` gives it another",
        )
    if _DECEPTIVE.search(name):
        raise BrokenContainerError(
            "a tensor's name has control or bidirectional characters", code="name-characters", tensor=name[:300]
        )


def alike(names: Iterable[str]) -> Iterator[str]:
    """Yields a warning for each pair of names that differ only in how Unicode composes them (NFC)."""
    listed = list(names)
    if all(map(str.isascii, listed)):
        return
    # A large table, needed for almost no file.
    import unicodedata

    seen: dict[str, str] = {}
    for name in listed:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other is not name:
            yield f"tensors {other!a} and {name!a} differ only in Unicode normalisation"
