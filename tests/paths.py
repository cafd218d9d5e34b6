"""Where tests find their data; a test run alone puts the repository's root on sys.path and imports this first."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
CHECKPOINTS = sorted(path for path in (DATA / "checkpoints").iterdir() if path.is_dir())
NAMES = [path.name for path in CHECKPOINTS]


def checkpoint(name: str) -> pathlib.Path:
    """Returns the folder of a committed checkpoint."""
    return DATA / "checkpoints" / name


def golden(name: str) -> pathlib.Path:
    """Returns the golden file of a committed checkpoint: HuggingFace in float32."""
    return DATA / "golden" / f"{name}.hf_float32.safetensors"


def fixtures() -> pathlib.Path | None:
    """Returns the folder of genuine files ($APR_FIXTURES, or shared/fixtures beside the checkout), if there is one."""
    folder = pathlib.Path(os.environ.get("APR_FIXTURES", ROOT.parent / "shared" / "fixtures"))
    return folder if (folder / "genuine").is_dir() else None


def cases(names: Iterable[str]) -> list[tuple[str]]:
    """Returns parameters of tests over files that may be absent: then one, whose test is skipped, stands for them."""
    return [(name,) for name in names] or [("none",)]
