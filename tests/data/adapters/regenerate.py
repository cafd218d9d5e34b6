"""Writes PEFT adapters of tests/data/checkpoints/gqa_tied_bf16, and the logits that PEFT itself computes with them.

    python tests/data/adapters/regenerate.py SITE

SITE: a folder with peft 0.21.2 and accelerate (pip install --target ... --no-deps). Logits, of the last four positions,
are of the model in float32 with the adapter beside it, not merged.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
BASE = HERE.parent / "checkpoints" / "gqa_tied_bf16"

ADAPTERS = {
    "lora": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rslora_patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["o_proj", "down_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "dora_bias": {"r": 2, "lora_alpha": 8, "use_dora": True, "bias": "all", "target_modules": ["k_proj", "up_proj"]},
    "embedding_head": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "gate_proj"]},
    "whole_modules": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["norm", "lm_head"],
    },
    "lora_bias": {"r": 2, "lora_alpha": 4, "lora_bias": True, "target_modules": ["q_proj"]},
}


def main() -> None:
    import peft
    import torch
    import transformers

    ids = np.random.default_rng(4).integers(0, 280, (2, 24))
    logits = {"input_ids": ids}
    for name, settings in ADAPTERS.items():
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.requires_grad:
                    spread = 0.05 if "lora_" in key and "magnitude" not in key else 0.02
                    value += torch.randn(value.shape) * spread * (1 if "lora_" in key else value.abs().mean() * 5)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        model.eval()
        with torch.no_grad():
            logits[name] = model(torch.tensor(ids)).logits[:, -4:].numpy()
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "gqa_tied_bf16"
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    np.savez_compressed(HERE / "logits.npz", **logits)


if __name__ == "__main__":
    sys.path[:0] = [sys.argv[1]]
    main()
