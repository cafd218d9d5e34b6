"""The genuine `apr` as a contestant: `apr bench FILE --fast`, a few tokens after a short prompt, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

_ITERATIONS, _TOKENS = 3, 16


def program() -> str | None:
    """Returns what $APR_BIN names."""
    return os.environ.get("APR_BIN") or None


def run(path: str) -> dict[str, Any]:
    """Measures `apr` on an .apr file.

    Returns:
      A row as those of `measure.run`; `milliseconds` of a token, the fastest iteration.
    """
    executable = program()
    assert executable is not None
    command = [executable, "bench", path, "--fast", "--json", "--warmup", "1"]
    command += ["--iterations", str(_ITERATIONS), "--max-tokens", str(_TOKENS)]
    # It exits 5 where it finds itself slow.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        return {"contestant": "apr", "error": (done.stderr or done.stdout).strip()[-300:]}
    tokens = report["total_tokens"] / report["iterations"]
    taken = [milliseconds / tokens for milliseconds in report["samples_ms"]]
    return {
        "contestant": f"apr {report['provenance']['reported_version']}",
        "milliseconds": min(taken),
        "fastest": min(taken),
        "slowest": max(taken),
        "calls": report["total_tokens"],
        "tokens_per_second": 1e3 / min(taken),
    }
