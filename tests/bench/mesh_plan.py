"""What a model takes on a mesh: memory of a device, communication of a token, and the least time of a token.

    python tests/bench/mesh_plan.py [--link GB/s] [--network GB/s] [--latency US] [--memory TB/s] [--products TFLOP/s]

Where weights lie is asked of `apr_jax.model.sharding`, the table that runs. A step reads the weights once; each layer
sums [rows, hidden] over the devices of `model` twice, and the embedding once more. A ring sends 2 (M - 1) / M of that
from each device (Patarasuk and Yuan 2009). The time is that of memory or arithmetic, whichever is longer, and then of
the sums, since a layer waits for them.

Products and memory are those measured on one H200 (docs/speed.md). Link and network are NVLink's and InfiniBand's by
their makers, the latency is NCCL's usual one for a small sum: none of the three has been measured here.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
_MOST_DEVICES = 16
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_MOST_DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

from apr_jax.bench import report  # noqa: E402
from apr_jax.bench.cases import Case, work  # noqa: E402
from apr_jax.converters.checkpoint.qwen2 import Qwen2Config  # noqa: E402
from apr_jax.load.load_model import find_mesh  # noqa: E402
from apr_jax.model.sharding import Layout  # noqa: E402
from apr_jax.testing.sample import SAMPLES  # noqa: E402

MODELS = {
    "7B": SAMPLES["qwen2_7b"].config,
    # Qwen2.5-72B.
    "72B": Qwen2Config(152064, 8192, 29568, 80, 64, 8, 128, 1e6, 1e-6, False, 32768),
}
_BYTES = 2  # bfloat16
_DEVICES_OF_A_HOST = 8
PLANS = (
    ("7B", 1, 1, 1, 2048),
    ("7B", 1, 2, 1, 2048),
    ("7B", 1, 2, 32, 2048),
    ("7B", 1, 8, 1, 2048),
    ("72B", 1, 2, 1, 2048),
    ("72B", 1, 4, 1, 2048),
    ("72B", 1, 8, 1, 2048),
    ("72B", 1, 8, 32, 8192),
    ("72B", 1, 16, 1, 2048),
    ("72B", 2, 8, 64, 8192),
)
"""Model, devices of `data` and of `model`, rows of a batch, tokens in the cache."""


def parameter_bytes(layout: Layout) -> int:
    """Returns the bytes of the weights of one device."""
    shapes = layout.config.tensor_shapes()
    return sum(_BYTES * math.prod(layout.sharding(name).shard_shape(shape)) for name, shape in shapes.items())


def bytes_read(layout: Layout) -> int:
    """Returns the bytes of weights that a step reads on one device: all but an embedding that is not the head."""
    table = 0 if layout.config.tie_word_embeddings else layout.config.vocab_size // layout.parts["vocabulary"]
    return parameter_bytes(layout) - _BYTES * table * layout.config.hidden_size


def cache_bytes(layout: Layout, rows: int, slots: int) -> int:
    """Returns the bytes of keys and values of one device."""
    config = layout.config
    shape = (rows, slots, config.num_kv_heads, config.head_dim)
    place = layout.of_value(shape, "batch", None, "kv_heads", None)
    return 2 * config.num_layers * _BYTES * math.prod(place.shard_shape(shape))


def sums(layout: Layout, rows: int) -> tuple[int, float]:
    """Returns how many sums over `model` a step makes, and the bytes that each device sends for all of them."""
    data, model = layout.shape
    if model == 1:
        return 0, 0.0
    count = 2 * layout.config.num_layers + 1
    return count, count * 2 * (model - 1) / model * (rows // data) * layout.config.hidden_size * _BYTES


def rows(rates: argparse.Namespace) -> Iterator[list[str]]:
    """Yields the table, titles first."""
    yield ["model", "mesh", "rows", "cache", "weights GB", "cache GB", "KB sent", "compute ms", "sums ms", "ms a step",
           "tokens/s"]  # fmt: skip
    for name, data, model, batch, slots in PLANS:
        layout = Layout.of(MODELS[name], _mesh(data, model))
        weights, cache = parameter_bytes(layout), cache_bytes(layout, batch, slots)
        count, sent = sums(layout, batch)
        arithmetic = work(layout.config, Case("decode", batch, slots), _BYTES).flops / (data * model)
        compute = max((bytes_read(layout) + cache) / (rates.memory * 1e12), arithmetic / (rates.products * 1e12))
        link = rates.link if model <= _DEVICES_OF_A_HOST else rates.network
        waiting = count * rates.latency * 1e-6 + sent / (link * 1e9)
        yield [
            name,
            f"data={data},model={model}",
            str(batch),
            str(slots),
            f"{weights / 1e9:.2f}",
            f"{cache / 1e9:.2f}",
            f"{sent / 1e3:.0f}",
            f"{compute * 1e3:.2f}",
            f"{waiting * 1e3:.2f}",
            f"{(compute + waiting) * 1e3:.2f}",
            f"{batch / (compute + waiting):.0f}",
        ]


def _mesh(data: int, model: int) -> jax.sharding.Mesh:
    found = find_mesh({"data": data, "model": model}, "cpu")
    return jax.make_mesh((1,), ("model",), devices=jax.devices()[:1]) if isinstance(found, str) else found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--products", type=float, default=786.0, help="TFLOP/s of a large product in bfloat16")
    parser.add_argument("--memory", type=float, default=4.24, help="TB/s of a GPU's memory")
    parser.add_argument("--link", type=float, default=450.0, help="GB/s each way between GPUs of a host")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s each way between GPUs of different hosts")
    parser.add_argument("--latency", type=float, default=15.0, help="microseconds of the smallest sum")
    print(report.text(list(rows(parser.parse_args()))))


if __name__ == "__main__":
    main()
