"""Records what transformers makes of tests/tokenizer_variants.py: `python tests/data/record_tokenizer_variants.py`."""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import tokenizers
import transformers

from tests.tokenizer_variants import CHAT, RECORDED, TEXTS, VARIANTS, Files


def recorded(files: Files) -> dict:
    """What transformers makes of one variant; `tests/generate/tokenizer_test.py` holds ours against it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (pathlib.Path(folder) / name).write_bytes(content)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chat = None
    if theirs.chat_template is not None:
        chat = theirs.apply_chat_template(list(CHAT), add_generation_prompt=True, return_dict=False)
    return {
        "ids": [theirs(text)["input_ids"] for text in TEXTS],
        "plain": [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "shown": [theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) for text in TEXTS],
        "named": theirs.special_tokens_map,
        "chat": chat,
    }


if __name__ == "__main__":
    made = {name: recorded(files()) for name, files in VARIANTS.items()}
    outcomes = list({json.dumps(outcome): outcome for outcome in made.values()}.values())
    content = {
        "made_by": f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
        "variants": {name: outcomes.index(outcome) for name, outcome in made.items()},
        "outcomes": outcomes,
    }
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items())
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
