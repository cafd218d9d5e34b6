"""Writes torch_inverse_frequencies.json: what torch gives for transformers' formula, as bits. Needs torch."""

import json
import pathlib

import torch

# head_dims that are multiples of 64 go through one vectorised routine on every x86-64 machine; of the others, those
# listed do not depend on the C library's last digit.
CASES = [(theta, dim) for theta in (1e4, 5e5, 1e6, 1e7, 1.5e5) for dim in (64, 128, 256)]
CASES += [(1e6, 16), (1e6, 8), (1e4, 8), (1e6, 32), (5e5, 22)]


def main() -> None:
    cases = []
    for theta, dim in CASES:
        values = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        cases.append({"theta": theta, "head_dim": dim, "bits": values.view(torch.uint32).tolist()})
    target = pathlib.Path(__file__).with_name("torch_inverse_frequencies.json")
    lines = ",\n".join(json.dumps(case) for case in cases)
    target.write_text(f'{{"torch": "{torch.__version__}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
