"""How long a command takes to start, whatever else the machine is doing."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Sequence


def cpu_seconds(command: Sequence[object], runs: int = 5) -> float:
    """Returns the least processor time, user and system, of some runs of a command: on an idle machine its duration."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(runs):
        before = spent()
        subprocess.run([str(part) for part in command], capture_output=True, check=True)
        times.append(spent() - before)
    return min(times)
