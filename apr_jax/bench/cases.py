"""The cases of the benchmark, prompts and decode steps; the least work each takes, and the least time on a machine.

Letters: B batch, T tokens of a prompt, S tokens in the cache.
"""

from __future__ import annotations

import dataclasses
import re

from apr_jax.converters.checkpoint.qwen2 import Qwen2Config
from apr_jax.converters.errors import UsageError

PREFILL, DECODE = "prefill", "decode"
_FORM = re.compile(r"(prefill|decode)-([1-9][0-9]*)x([1-9][0-9]*)")


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """One measurement.

    Attributes:
      kind: "prefill": prompts go through the model, logits of their last tokens come out. "decode": one step makes a
        token for every row.
      batch: B.
      length: T of a prefill; S before the first step of a decode.
    """

    kind: str
    batch: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads "prefill-8x2048" or "decode-32x128"; raises UsageError for anything else."""
        found = _FORM.fullmatch(text)
        if not found:
            raise UsageError(
                "no such case", code="case", found=text, expected="prefill-BxT or decode-BxS, as decode-1x128"
            )
        return cls(found[1], int(found[2]), int(found[3]))

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.kind}-{self.batch}x{self.length}"

    @property
    def title(self) -> str:
        """As a table shows it."""
        if self.kind == PREFILL:
            return f"prefill {self.batch} x {self.length}"
        return f"decode, batch {self.batch}, context {self.length}"


ALL = tuple(
    Case.parse(name)
    for name in """prefill-1x128 prefill-1x2048 prefill-8x2048 decode-1x128 decode-8x128 decode-32x128 decode-1x2048
    decode-8x2048 decode-32x2048""".split()
)
CPU = tuple(Case.parse(name) for name in "prefill-1x128 prefill-1x512 decode-1x128 decode-4x128 decode-1x2048".split())


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a case takes: arithmetic, and bytes to and from memory, each weight read once."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the machine reached in the same run.

    Attributes:
      flops: Of a large product of matrices in the model's dtype, a second.
      bytes: Of a large copy (read and written) or a large sum (read), whichever is faster, a second.
    """

    flops: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Returns the least time of `work`, in seconds."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def bound(self, work: Work) -> str:
        """Returns what sets it: "arithmetic" or "memory"."""
        return "arithmetic" if work.flops / self.flops >= work.bytes / self.bytes else "memory"


def work(config: Qwen2Config, case: Case, itemsize: int, stored: float | None = None) -> Work:
    """Returns the least work of one call (prefill) or of one step (decode).

    Activations are left out: they can stay on the chip. Attention is causal, and a decode step reads S keys and values.

    Args:
      config: The model.
      case: What is measured.
      itemsize: Bytes of a parameter and of a cached number.
      stored: Bytes of a number of a matrix, where they are fewer.
    """
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    keys_and_values = config.hidden_size * 2 * kv
    rest = config.hidden_size * (2 * heads + 3 * config.intermediate_size)
    head = config.vocab_size * config.hidden_size
    weights = config.num_layers * (keys_and_values + rest) + head
    cached = case.length * 2 * kv * config.num_layers
    # One token of a row goes through everything and attends to all; a prompt's others end with the last layer's keys.
    products, pairs = weights, case.length * config.num_layers
    if case.kind == PREFILL:
        others, layers = case.length - 1, config.num_layers - 1
        products += others * (layers * rest + config.num_layers * keys_and_values)
        pairs += layers * case.length * others // 2
    flops = 2.0 * case.batch * (products + pairs * 2 * heads)
    return Work(flops, (stored or itemsize) * weights + float(itemsize) * case.batch * cached)
