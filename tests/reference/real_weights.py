"""Everything that the project does, once, on trained weights: `make real-weights`.

    python tests/reference/real_weights.py WORK [--only PART ...] [--report FILE]

WORK is a folder for 2 GB of downloads and checkpoints, which a later run uses again. Prints a table of what was asked
for and what came out, with the versions it came from; exits 1 if a line does not hold, or if nothing was looked at.
`apr` is taken from $APR_BIN; without it its lines say that they were left out, and that is a failure too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import inspect
import io
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers

from apr_jax.commands import parity
from apr_jax.converters.commands import convert, verify
from apr_jax.generate.generator import load_generator
from apr_jax.load.load_model import load_model
from apr_jax.trace import hf_reference, tolerances
from apr_jax.trace.compare import loss_nats, relative_l2
from apr_jax.trace.inputs import Inputs
from tests import oracle
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench, Tally, run_case, singles
from tests.reference import smollm2

ENGLISH = """The river begins in the hills as a thin stream that a child could step across. For the first few miles it
runs over stones between farms and small woods, and the people who live there know it mostly as a sound at night.
Further down, two other streams join it, and it becomes wide enough for boats. A town grew at this place because the
water turned its mills, and later because a railway bridge was built there. Today the mills are flats and offices. The
fishermen are still there every morning, and in a dry summer you can see the old stepping stones, which were laid long
before anybody thought of a bridge. When the rain comes back in October the stones disappear, the water turns brown, and
the river carries branches and leaves down to the sea, as it has always done.
"""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
    "The three most important inventions of the nineteenth century are",
    "import json\n\ndef read(path):\n    ",
    "Q: What is 17 + 25?\nA:",
    "Dear Sir or Madam,",
)
CHATS = ("What is gravity?", "Write a haiku about rain.", "How do I sort a list in Python?")
NEW_TOKENS = 200
PLANTED_LAYERS = 4
LENGTH = 80


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    what: str
    bar: str
    seen: str
    holds: bool


class Work:
    """The folder with the downloads and what is made of them."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    @functools.cached_property
    def source(self) -> pathlib.Path:
        return smollm2.download(self.folder)

    def checkpoint(self, name: str, *args: Any, **settings: Any) -> pathlib.Path:
        """Returns the HuggingFace folder of this name; makes it, if it is not there, as `smollm2.write` is told."""
        path = self.folder / name
        if not path.exists():
            smollm2.write(self.source, path, *args, **settings)
        return path

    @property
    def float32(self) -> pathlib.Path:
        return self.checkpoint("float32", "float32")

    @property
    def bfloat16(self) -> pathlib.Path:
        return self.checkpoint("bfloat16", "bfloat16")

    @property
    def biased(self) -> pathlib.Path:
        return self.checkpoint("biased", "float32", bias=100.0)

    def converted(self, name: str, source: pathlib.Path, *args: Any) -> pathlib.Path:
        path = self.folder / name
        ran(convert, source, "-o", path, "--force", *args)
        return path


def ran(command: Any, *args: Any, code: int | None = 0) -> str:
    """Runs a command in this process; returns what it prints on stdout. `code` is what it has to end with."""
    out, argv = io.StringIO(), [command.__name__, *map(str, args)]
    with contextlib.redirect_stdout(out):
        ended = command.main(command.parse(argv))
    if code is not None and ended != code:
        raise RuntimeError(f"{' '.join(argv)} ended with {ended}, not {code}:\n{out.getvalue()}")
    return out.getvalue()


def apr(*args: Any) -> str:
    """Runs the genuine `apr`; returns stdout and stderr."""
    done = subprocess.run([os.environ["APR_BIN"], *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"apr {args}: {done.stderr or done.stdout}")
    return done.stdout


@functools.lru_cache(maxsize=2)
def theirs(folder: pathlib.Path, dtype: str) -> Any:
    return hf_reference.load(folder, dtype)


@functools.lru_cache
def words(folder: pathlib.Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def texts(folder: pathlib.Path) -> dict[str, Inputs]:
    """Natural English, and Python out of the standard library."""
    both = {"English": ENGLISH, "Python": inspect.getsource(textwrap)[:4000]}
    return {name: Inputs.of(np.array([words(folder)(text)["input_ids"]])) for name, text in both.items()}


# --- Conversion ------------------------------------------------------------------------------------------------------


def conversion(work: Work) -> Iterator[Line]:
    for dtype in ("float32", "bfloat16"):
        folder = getattr(work, dtype)
        file = work.converted(f"{dtype}.apr", folder, "--to", "apr")
        back = work.converted(f"{dtype}.back", file, "--to", "safetensors")
        names = sorted(path.name for path in folder.iterdir())
        same = [name for name in names if (folder / name).read_bytes() == (back / name).read_bytes()]
        yield Line(f"{dtype}: .apr and back", "every file", f"{len(same)} of {len(names)} files", same == names != [])
        imported = work.folder / f"{dtype}.imported.apr"
        apr("import", folder, "-o", imported)
        report = json.loads(ran(verify, imported, file, "--json"))
        yield Line(
            f"{dtype}: `apr import` against ours", "identical", report["verdict"], report["verdict"] == "identical"
        )


def quantisation(work: Work) -> Iterator[Line]:
    for codec, kind in (("apr_q8", "int8"), ("apr_q4", "int4"), ("q4_k", "q4k")):
        quantised = work.folder / f"{kind}.apr"
        if not quantised.exists():
            apr("import", work.float32, "-o", quantised, "--quantize", kind)
        yield named_quantised(f"`apr import --quantize {kind}`", work.float32, quantised, codec)
    # Noise of a tenth of a step hides the grid of the GGUF, so that A is what it was quantised from.
    yield named_quantised("the GGUF that the weights came from", jittered(work), work.float32, "q4_1")


def jittered(work: Work) -> pathlib.Path:
    """The checkpoint with every matrix moved within the steps of its grid, as what was quantised may have been."""
    path = work.folder / "jittered"
    if not path.exists():
        from safetensors.torch import load_file, save_file

        path.mkdir()
        random = torch.Generator().manual_seed(5)
        tensors = load_file(work.float32 / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and "embed" not in name:
                blocks = tensor.reshape(-1, 32)
                low, high = blocks.min(1, keepdim=True).values, blocks.max(1, keepdim=True).values
                # The ends of a block stay, since they make its grid.
                inside = (blocks > low) & (blocks < high)
                noise = (torch.rand(blocks.shape, generator=random) - 0.5) * 0.9 * (high - low) / 15
                tensors[name] = (blocks + noise * inside).reshape(tensor.shape)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        for side in work.float32.glob("*.json"):
            (path / side.name).write_bytes(side.read_bytes())
    return path


def named_quantised(what: str, original: pathlib.Path, quantised: pathlib.Path, codec: str) -> Line:
    report = json.loads(ran(verify, original, quantised, "--json", code=None))
    named = [finding for finding in report["findings"] if finding["cause"] == "quantised"]
    codecs = sorted({finding["parameters"]["type"] for finding in named})
    others = sorted({finding["cause"] for finding in report["findings"]} - {"quantised"})
    seen = f"quantised to {', '.join(codecs)}" + (f"; also {', '.join(others)}" if others else "")
    return Line(f"verify: {what}", codec, seen, codecs == [codec] and not others)


# --- Values ----------------------------------------------------------------------------------------------------------


def logits(work: Work) -> Iterator[Line]:
    for folder in (work.float32, work.biased):
        model, narrow = load_model(folder), load_model(folder, "bfloat16")
        uniform = math.log(model.config.vocab_size)
        for name, inputs in texts(folder).items():
            what = f"{folder.name}, {name}, {inputs.input_ids.shape[1]} tokens"
            with torch.inference_mode():
                right, coarse = (
                    theirs(folder, dtype)(torch.tensor(inputs.input_ids.astype(np.int64))).logits.float().numpy()
                    for dtype in ("float32", "bfloat16")
                )
            ours = np.asarray(model.logits(inputs))
            error = relative_l2(ours, right)
            yield Line(
                f"logits, {what}, float32", f"{tolerances.FLOAT32:.0e}", f"{error:.1e}", error <= tolerances.FLOAT32
            )
            own = relative_l2(np.asarray(narrow.logits(inputs), np.float32), right)
            bar = relative_l2(coarse, right)
            yield Line(f"logits, {what}, bfloat16", f"1.1 x {bar:.2e} (HuggingFace's)", f"{own:.2e}", own <= bar * 1.1)
            losses = loss_nats(ours, inputs), loss_nats(right, inputs)
            gap = abs(losses[0] - losses[1])
            low = losses[0] < 0.6 * uniform
            yield Line(
                f"loss, {what}",
                f"{losses[1]:.4f} to 1e-4, uniform {uniform:.2f}",
                f"{losses[0]:.4f}, off by {gap:.0e}",
                gap <= 1e-4 and (low or folder == work.biased),
            )


def text(work: Work) -> Iterator[Line]:
    folder = work.float32
    generator, model, tokenizer = load_generator(folder), theirs(folder, "float32"), words(folder)
    messages = [[{"role": "user", "content": chat}] for chat in CHATS]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    chats = [list(tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"]) for m in messages]
    equal = sum(generator.chat_prompt(m) == ids for m, ids in zip(messages, chats, strict=True))
    yield Line("chats as token ids", "transformers'", f"{equal} of {len(chats)}", equal == len(chats))
    same, length = 0, []
    for prompt in (*prompts, *chats):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            made = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)[0, ids.shape[1] :]
        (ours,) = generator.generate([prompt], do_sample=False, max_new_tokens=NEW_TOKENS)
        same += list(ours.token_ids) == made.tolist()
        length.append(len(made))
    count = len(prompts) + len(chats)
    yield Line(
        f"greedy text of {min(length)} to {max(length)} tokens",
        "transformers' tokens",
        f"{same} of {count} prompts",
        same == count,
    )


def apr_run(work: Work) -> Iterator[Line]:
    """`apr run` reads some texts as other tokens (blanks at their ends): that is its own, and said."""
    file = work.converted("float32.apr", work.float32, "--to", "apr")
    generator, tokenizer = load_generator(file), words(work.float32)
    settings = ["--temperature", "0", "--repeat-penalty", "1.0", "--offline", "--no-gpu", "--json"]
    read = alike = equal = tokens = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        read += list(generator.tokenizer.encode(prompt)) == ids
        run = json.loads(apr("run", file, "-p", prompt, "-n", "40", *settings))
        alike += run["prompt_tokens"] == len(ids)
        if run["prompt_tokens"] == len(ids):
            (ours,) = generator.generate(prompt, do_sample=False, max_new_tokens=40)
            equal += list(ours.token_ids)[: len(run["tokens"])] == run["tokens"] != []
            tokens += len(run["tokens"])
    count = len(PROMPTS)
    yield Line("prompts as token ids, ours", "transformers'", f"{read} of {count}", read == count)
    yield Line(
        "`apr run` on our .apr, up to 40 tokens",
        f"the same tokens for at least {count - 1} prompts",
        f"{equal} of {alike} prompts that it reads as so many tokens, {tokens} tokens; {count - alike} read otherwise",
        equal == alike >= count - 1,
    )


# --- Parity ----------------------------------------------------------------------------------------------------------


def clean(work: Work) -> Iterator[Line]:
    ids = work.folder / "ids.json"
    ids.write_text(json.dumps([texts(work.float32)["English"].input_ids[0, :LENGTH].tolist()]))
    for folder in (work.float32, work.biased):
        for dtype in ("float32", "bfloat16"):
            begun = time.perf_counter()
            report = json.loads(
                ran(parity, folder, "--right", "hf", "--dtype", dtype, "--input-ids", ids, "--json", code=None)
            )
            seconds = time.perf_counter() - begun
            found = [finding["sentence"] for finding in report["findings"]]
            yield Line(
                f"parity, {folder.name}, HuggingFace in {dtype}",
                "no finding",
                f"{'; '.join(found) or 'none'} ({seconds:.0f} s)",
                not found,
            )


FOUR = (
    Planted("qkv-bias-missing"),
    Planted("rms-norm-eps", None, {"eps": 1e-6}),
    Planted("rope-theta", None, {"theta": 1e4}),
    Planted("rope-adjacent-pairs"),
)
"""The four-fold case; this checkpoint's eps is 1e-5."""


def planted(work: Work) -> Iterator[Line]:
    folder = work.checkpoint(f"biased-{PLANTED_LAYERS}-layers", "float32", layers=PLANTED_LAYERS, bias=100.0)
    exact, same = load_model(folder, "float64", "cpu"), load_model(folder, "float32", "cpu")
    ids = texts(folder)["English"].input_ids[:, : 2 * LENGTH].reshape(2, LENGTH)
    mask = np.ones(ids.shape, np.int32)
    mask[0, :9] = 0
    bench = Bench(folder.name, *oracle.load(folder), Inputs.of(ids, mask), exact, same)
    tally = Tally()
    run_case(bench, (), tally)
    run_case(bench, FOUR, tally)
    for case in singles(PLANTED_LAYERS, exact.config.head_dim):
        if case.layers is None:
            run_case(bench, (case,), tally)
    yield Line(
        f"planted mistakes, biased, {PLANTED_LAYERS} layers, 2 x {LENGTH} tokens",
        "every one named, nothing else",
        f"{tally.counted} counted: {tally.detected} detected, {tally.exact} named exactly, {tally.mistaken} others"
        f" named; {tally.uncounted} not counted, {tally.wrong_names} wrong names there",
        tally.counted == tally.exact > 0 and not tally.wrong_names,
    )


PARTS: dict[str, Callable[[Work], Iterator[Line]]] = {
    part.__name__: part for part in (conversion, logits, text, apr_run, clean, quantisation, planted)
}


def section(name: str, lines: list[Line]) -> str:
    """Returns the lines of a part as Markdown, with the day, the machine and the versions."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch", "transformers", "gguf")
    )
    rows = [f"| {line.what} | {line.bar} | {line.seen} | {'yes' if line.holds else '**no**'} |" for line in lines]
    return "\n".join(
        [
            f"## {name}",
            "",
            f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}.",
            "",
            "| what | bar | seen | holds |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def write_report(path: pathlib.Path, sections: Mapping[str, str]) -> None:
    """Writes the sections of the parts that were run; those of the others stay as they are."""
    before = path.read_text().split("\n## ")[1:] if path.exists() else []
    kept = {text.split("\n", 1)[0]: "## " + text for text in before}
    kept = {name: text.rstrip("\n") + "\n" for name, text in (kept | sections).items()}
    path.write_text("\n".join(["# Trained weights: `make real-weights`\n", *(kept[n] for n in PARTS if n in kept)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--report", type=pathlib.Path, help="write the tables there as well")
    args = parser.parse_args()
    work, good, sections = Work(args.work), True, {}
    for name in args.only:
        lines: list[Line] = []
        try:
            for line in PARTS[name](work):
                lines.append(line)
                verdict = "ok  " if line.holds else "FAIL"
                print(f"{verdict} {line.what}: {line.seen} (asked for: {line.bar})", flush=True)
        except (RuntimeError, KeyError) as error:
            lines.append(Line(name, "to run", f"{type(error).__name__}: {str(error)[:300]}", False))
            print(f"FAIL {name}: {error}", flush=True)
        sections[name] = section(name, lines)
        good &= bool(lines) and all(line.holds for line in lines)
        if args.report:
            write_report(args.report, sections)
    print("\n".join(sections.values()))
    return 0 if good and sections else 1


if __name__ == "__main__":
    sys.exit(main())
