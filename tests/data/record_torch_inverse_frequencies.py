"""Writes torch_inverse_frequencies.json: what torch gives for transformers' formulas, as bits. Needs both."""

import json
import pathlib

import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

# head_dims that are multiples of 64 go through one vectorised routine on every x86-64 machine; of the others, those
# listed do not depend on the C library's last digit.
CASES = [(theta, dim) for theta in (1e4, 5e5, 1e6, 1e7, 1.5e5) for dim in (64, 128, 256)]
CASES += [(1e6, 16), (1e6, 8), (1e4, 8), (1e6, 32), (5e5, 22)]

# The rules of transformers, at head_dim 64, and lengths on either side of where they turn.
_SIZES = {
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
}
_LONG = {"short_factor": [1 + i / 64 for i in range(32)], "long_factor": [1.5 + i * i / 8 for i in range(32)]}
RULES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "longrope", "original_max_position_embeddings": 8192, **_LONG},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192},
    {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
]
LENGTHS = (1, 8192, 8193, 32768, 32769, 100_000)


def rules() -> list[dict]:
    recorded = []
    for rule in RULES:
        config = _SIZES | {"rope_scaling": rule}
        case = {"config": config, "bits": {}}
        for length in LENGTHS:
            embedding = Qwen2RotaryEmbedding(Qwen2Config(**json.loads(json.dumps(config))))
            embedding(torch.zeros(1), torch.tensor([[length - 1]]))
            case["bits"][str(length)] = embedding.inv_freq.view(torch.uint32).tolist()
            case["attention_factor"] = embedding.attention_scaling
        recorded.append(case)
    return recorded


def main() -> None:
    cases = []
    for theta, dim in CASES:
        values = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        cases.append({"theta": theta, "head_dim": dim, "bits": values.view(torch.uint32).tolist()})
    ruled = ",\n".join(json.dumps(case) for case in rules())
    target = pathlib.Path(__file__).with_name("torch_inverse_frequencies.json")
    lines = ",\n".join(json.dumps(case) for case in cases)
    target.write_text(f'{{"torch": "{torch.__version__}", "cases": [\n{lines}\n], "rules": [\n{ruled}\n]}}\n')


if __name__ == "__main__":
    main()
