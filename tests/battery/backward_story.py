"""The backward passes that followed the four-fold case, one after the other, as dumps: docs/backward.md runs on them.

    python tests/battery/backward_story.py DIR

writes a right backward pass, one that ends at RoPE, one with a loss scale left in, and one whose loss is a mean over
the wrong tokens: as DIR/{right,rope,scale,means}.safetensors with the gradients of all stages, and once more as
NAME-parameters.safetensors with those of parameters alone, which is what most programs have.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from safetensors.numpy import save_file

from apr_jax.trace.stages import GRADIENT, Key
from tests import oracle, paths
from tests.battery.backward_engine import Planted, backward

SAMPLE = "gqa_tied_bf16"
ROWS, LENGTH, PADDED, PROMPT = 2, 48, 9, 15
ROPE = [Planted("stage-detached", None, {"of": stage}) for stage in ("q_post_rope", "k_post_rope")]
STORY = {
    "right": [],
    "rope": ROPE,
    "scale": [Planted("gradient-scaled", None, {"factor": 65536.0})],
    "means": [Planted("padding-in-loss", None, {"what": "ignored"})],
}


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = oracle.load(paths.checkpoint(SAMPLE))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (ROWS, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, LENGTH - PADDED :] = 0
    # Of the second row the prompt does not count.
    labels = np.where(mask == 1, ids, -100).astype(np.int32)
    labels[1, :PROMPT] = -100
    for name, faults in STORY.items():
        dump = backward(weights, config, ids, mask, labels, faults)
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        values = {key: np.ascontiguousarray(value, np.float32) for key, value in dump.items()}
        save_file({**given, **values}, folder / f"{name}.safetensors")
        own = {key: v for key, v in values.items() if key.startswith(GRADIENT) and Key(key).of_parameter}
        save_file({**given, **own}, folder / f"{name}-parameters.safetensors")


if __name__ == "__main__":
    main()
