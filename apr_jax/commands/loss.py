"""Compute the loss of a Qwen2 model on text, in nats and bits, or name what is wrong with another engine's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.commands import meshes, processes
from apr_jax.converters.commands import arguments, cli, tables
from apr_jax.converters.commands.progress import bar_of, telling
from apr_jax.converters.errors import UsageError, counted

if TYPE_CHECKING:
    from apr_jax.converters.checkpoint.checkpoint import Checkpoint
    from apr_jax.generate.tokenizer import Tokenizer
    from apr_jax.loss.checking import Run, Verdict
    from apr_jax.loss.documents import Document
    from apr_jax.loss.summary import Corpus, Loss

_LONGEST_WINDOW = 2048
_EPILOG = """\
examples:
  %(prog)s model.apr --text book.txt code.py                    mean loss of each file and overall, and of uniform
  %(prog)s hf_folder --jsonl chats.jsonl                        conversations: only the assistant's tokens count
  %(prog)s model.apr --input-ids ids.json --json                rows of token ids
  %(prog)s model.apr --text book.txt --window 1024 --stride 512 --device cuda --dtype bfloat16
  %(prog)s model.apr --text book.txt --per-token losses.safetensors
  %(prog)s model.apr --text book.txt --check theirs.safetensors  another engine's losses: what is wrong with them?

Text is cut into windows as in transformers' perplexity guide: a window begins every --stride tokens, and each token
is scored in the first window that contains it. Each file, line and row is a document of its own. Lines of .jsonl are
{"text": ...}, {"messages": [...]} (what the chat template marks by {%% generation %%} counts) or {"input_ids": [...],
"labels": [...]} (-100 does not count). --check reads "losses" (of each token) and "loss" (their mean).

exit codes: 0 fine, 1 the other engine's losses differ, 2 usage, 3 file not found, 4 broken file, 5 refused, 7 I/O
failed, 70 internal error,
130 interrupted
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help=arguments.MODEL)
    texts = parser.add_argument_group("texts (one of these)").add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 text files, a document each")
    texts.add_argument("--jsonl", metavar="FILE", help="one JSON document per line, as below")
    texts.add_argument("--input-ids", metavar="FILE", help="JSON list of lists of token ids, or a golden file")
    parser.add_argument("--chat-template", metavar="NAME", help="one of the checkpoint's templates, or a Jinja file")
    parser.add_argument(
        "--window",
        metavar="N",
        type=int,
        help=f"tokens that the model sees at once (default: max_position_embeddings, at most {_LONGEST_WINDOW})",
    )
    parser.add_argument(
        "--stride", metavar="N", type=int, help="tokens from one window to the next (default: half a window)"
    )
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="windows computed at once (default: 1)")
    arguments.add_device(parser)
    processes.add(parser)
    arguments.add_dtype(parser, ("float32", "bfloat16", "float16", "float64"), "type of weights and computation")
    parser.add_argument("--per-token", metavar="OUT", help="write the loss of each token as safetensors")
    parser.add_argument("--check", metavar="FILE", help="another engine's losses, as safetensors, to compare with")
    arguments.add(parser, "--json", "--force")
    arguments.add_opening(parser)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    processes.check(parser, args)
    for name in ("window", "stride", "batch"):
        least = 2 if name == "window" else 1
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} is {value}; it has to be at least {least}")
    if args.stride and args.window and args.stride > args.window:
        parser.error(f"--stride {args.stride} is longer than --window {args.window}: tokens between would be left out")
    if args.chat_template is not None and args.jsonl is None:
        parser.error("--chat-template belongs to conversations: --jsonl FILE")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    with processes.joined(args):
        return _main(args)


def _main(args: argparse.Namespace) -> int:
    from apr_jax.converters.checkpoint.hub import located
    from apr_jax.converters.storage.output import check_target
    from apr_jax.generate import compilation_cache
    from apr_jax.generate.tokenizer import Tokenizer
    from apr_jax.loss import checking, summary
    from apr_jax.trace.inputs import paths_of

    compilation_cache.enable()
    args.model = located(args.model)
    with cli.open_dense_from(args, args.model) as checkpoint:
        others = filter(None, (args.jsonl, args.check, args.chat_template))
        sources = [*checkpoint.paths, *(args.text or ()), *others, *paths_of(args.input_ids)]
        if args.per_token is not None:
            check_target(args.per_token, force=args.force, sources=sources)
        cli.say_warnings(checkpoint)
        with cli.warnings_said():
            tokenizer = Tokenizer.of(checkpoint) if args.text is not None else Tokenizer.if_usable(checkpoint)
            documents = _documents(args, tokenizer)
        for warning in () if tokenizer is None else tokenizer.warnings:
            cli.warn(warning)
        run = _run(args, checkpoint, documents)
    vocab_size = run.model.config.vocab_size
    loss = summary.Loss.of(documents, run.scores)
    corpus = summary.Corpus.of(documents, vocab_size, None if tokenizer is None else tokenizer.unknown_token)
    said = summary.oddities(loss, corpus, vocab_size)
    for warning in said:
        cli.warn(warning)
    if args.per_token is not None and processes.is_first():
        _write(args, run, sources)
    verdict = None if args.check is None else checking.check(run, args.check)
    if args.json:
        cli.print_json(_as_json(args, run, loss, corpus, said, verdict))
    else:
        _print(run, loss, corpus, vocab_size)
        if verdict is not None:
            _print_verdict(verdict)
    return 0 if verdict is None or verdict.within else cli.EXIT_DIFFERS


def _documents(args: argparse.Namespace, tokenizer: Tokenizer | None) -> list[Document]:
    from apr_jax.generate.chat_template import by_name_or_file
    from apr_jax.loss import documents

    if args.input_ids is not None:
        found = documents.of_token_ids(args.input_ids)
    elif args.jsonl is not None:
        template = args.chat_template
        if template is not None:
            template = by_name_or_file(tokenizer.chat_template if tokenizer else None, template)
        found = documents.of_lines(args.jsonl, tokenizer, template)
    else:
        found = documents.of_texts(args.text, tokenizer)
    if not any(document.counted.any() for document in found):
        raise UsageError(
            "there is nothing to compute a loss over",
            code="nothing-scored",
            found=f"{len(found)} documents, {sum(len(document.ids) for document in found)} tokens",
            expected="a document of two tokens or more, of which one that is not the first counts",
        )
    return found


def _run(args: argparse.Namespace, checkpoint: Checkpoint, documents: Sequence[Document]) -> Run:
    from apr_jax.kernels.fastest_ops import load_fastest
    from apr_jax.loss import checking, scoring
    from apr_jax.loss.documents import windows

    config = checkpoint.model_config()
    length = args.window or min(config.max_position_embeddings, _LONGEST_WINDOW)
    stride = args.stride or max(1, length // 2)
    for document in documents:
        if document.ids.size and (worst := int(document.ids.max())) >= config.vocab_size:
            raise UsageError(
                "a token id is beyond the vocabulary",
                code="input-ids",
                file=document.source,
                found=worst,
                expected=f"below {config.vocab_size}",
            )
    with telling("loading the model"):
        model = load_fastest(checkpoint, args.dtype, meshes.placement(args, args.device))
    cut = list(windows(documents, length, stride))
    with bar_of(sum(window.end - window.start for window in cut), in_bytes=False) as progress:
        scores = scoring.score(model, documents, cut, args.batch, progress=progress)
    return checking.Run(model, documents, cut, args.batch, scores)


def _write(args: argparse.Namespace, run: Run, sources: Sequence[str]) -> None:
    """Writes `losses` (NaN where none was computed), `input_ids`, `counted` and `document` [N], and `loss` [1]."""
    import numpy as np

    from apr_jax.loss import summary
    from apr_jax.trace import golden

    lengths = [len(document.ids) for document in run.documents]
    losses = np.concatenate([scores.loss for scores in run.scores])
    arrays = {
        "losses": losses,
        "input_ids": np.concatenate([document.ids for document in run.documents]),
        "counted": np.concatenate([document.counted for document in run.documents]).astype(np.int32),
        "document": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "loss": np.array([summary.Loss.of(run.documents, run.scores).nats], np.float64),
    }
    metadata = {"format": "apr_jax losses 1", "unit": "nats", "dtype": run.model.dtype}
    golden.write_arrays(args.per_token, arrays, metadata, args.force, sources, cli.say)


def _as_json(
    args: argparse.Namespace,
    run: Run,
    loss: Loss,
    corpus: Corpus,
    said: Sequence[str],
    verdict: Verdict | None,
) -> dict[str, Any]:
    import dataclasses
    import math

    uniform = math.log(run.model.config.vocab_size)
    return {
        **loss.to_json(),
        "uniform_nats": uniform,
        "uniform_bits": uniform / math.log(2),
        "documents": [{"source": source, **part.to_json()} for source, part in _by_source(run)],
        "corpus": dataclasses.asdict(corpus),
        "windows": len(run.windows),
        "per_token": args.per_token,
        "warnings": list(said),
        "check": None if verdict is None else verdict.to_json(),
    }


def _by_source(run: Run) -> list[tuple[str, Loss]]:
    """Returns the loss over the documents of each file, in the order of the files."""
    from apr_jax.loss.summary import Loss

    numbers: dict[str, list[int]] = {}
    for number, document in enumerate(run.documents):
        numbers.setdefault(document.source, []).append(number)
    return [
        (source, Loss.of([run.documents[n] for n in own], [run.scores[n] for n in own]))
        for source, own in numbers.items()
    ]


def _print(run: Run, loss: Loss, corpus: Corpus, vocab_size: int) -> None:
    import math

    sources = _by_source(run)
    rows = [_row(source, part) for source, part in sources]
    if len(sources) > 1:
        rows.append(_row("all", loss))
    uniform = math.log(vocab_size)
    rows.append(("uniform", "", f"{uniform:.4f}", f"{uniform / math.log(2):.4f}", f"{vocab_size}", ""))
    columns = ("text", "tokens", "nats/token", "bits/token", "perplexity", "bits/byte")
    tables.print_table(columns, rows, right=range(1, len(columns)))
    unknown = "" if corpus.unknown is None else f", {corpus.unknown:.2%} unknown"
    print(
        f"{counted(len(run.documents), 'document')} in {counted(len(run.windows), 'window')}; "
        f"{counted(corpus.distinct, 'different token')}"
        f" ({corpus.never_seen:.2%} of the vocabulary never seen){unknown}"
    )


def _row(name: str, loss: Loss) -> tuple[str, ...]:
    values = loss.to_json()
    per_byte = "" if values["bits_per_byte"] is None else f"{values['bits_per_byte']:.4f}"
    perplexity = f"{values['perplexity']:.6g}"
    return name, str(loss.scored), f"{loss.nats:.4f}", f"{values['loss_bits']:.4f}", perplexity, per_byte


def _print_verdict(verdict: Verdict) -> None:
    if verdict.error is not None:
        where = "" if verdict.worst is None else f"; most in document {verdict.worst[0]}, token {verdict.worst[1]}"
        print(f"losses of {verdict.tokens} tokens: relative L2 {verdict.error:.2e}{where}")
    if verdict.mean is not None:
        print(f"mean: theirs {verdict.mean:.6f}, ours {verdict.ours:.6f} nats")
    for mistake in verdict.mistakes:
        also = f" (or {', '.join(mistake.alternatives)})" if mistake.alternatives else ""
        cli.show(f"{mistake.name}{also}: {mistake.says} (reproduced to {mistake.error:.1e})")
    if verdict.within:
        print("agree")
