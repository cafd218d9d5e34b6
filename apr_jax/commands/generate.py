"""Generate text with a Qwen2 model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apr_jax.commands import meshes, processes
from apr_jax.converters.commands import arguments, cli
from apr_jax.converters.commands.progress import telling
from apr_jax.converters.errors import UsageError, printable

if TYPE_CHECKING:
    from apr_jax.generate.generator import Delta, Generation, Generator, Stream

_MAX_BYTES = 16 << 20
_NO_VARIABLES = ("messages", "tools", "chat_template", "self")
_EPILOG = """\
examples:
  %(prog)s model.apr --prompt "def fib(n):" --greedy               continue a text, printed as it is generated
  %(prog)s model.apr --chat "What is 2+2?" --system "Be brief."    use the checkpoint's chat template
  %(prog)s model.apr --prompt "A" --prompt "Once upon" --json      a batch; one JSON object at the end
  %(prog)s model.apr --prompts prompts.json --device cuda --dtype bf16
  %(prog)s model.apr --chat "Weather in Paris?" --tools tools.json --template-arg enable_thinking=false

Settings come from generation_config.json, with the meaning and the defaults that they have for HuggingFace's
`generate`: a checkpoint that says do_sample is sampled from. Options override it; --temperature, --top-k and --top-p
each turn on sampling. The same seed gives the same text. A text ends at an end token, with the token that completes a
stop string, after --max-new-tokens (256 unless the checkpoint says otherwise), or at max_position_embeddings.

--prompts takes a JSON list of texts and conversations ([{"role": "user", "content": "..."}, ...]), --tools a JSON
list of function schemas. Of several chat templates, "tool_use" is used with tools and "default" otherwise. Text is
tokenized exactly as in transformers.

exit codes: 0 fine, 2 usage, 3 file not found, 4 broken container, 5 refused, 7 I/O failed, 70 internal error,
130 interrupted (what was
generated is printed)
"""


def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of the command, called by this name."""
    parser = arguments.make_parser(program, __doc__ or "", _EPILOG)
    parser.add_argument("model", metavar="MODEL", help=f"{arguments.MODEL}; or what `checkpoint save` wrote")
    prompts = parser.add_argument_group("prompts (one of these)").add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue (repeatable: a batch)")
    prompts.add_argument("--chat", metavar="TEXT", action="append", help="user message (repeatable: a batch)")
    prompts.add_argument("--prompts", metavar="FILE", help="JSON list of texts or conversations: a batch")
    prompts.add_argument(
        "--input-ids", metavar="FILE", help="JSON list of lists of token ids, or a golden file: a batch"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before --chat")
    parser.add_argument("--chat-template", metavar="NAME", help="one of the checkpoint's templates, or a Jinja file")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of functions that the model may call in its answer")
    parser.add_argument(
        "--template-arg",
        metavar="KEY=VALUE",
        action="append",
        help="a variable of the chat template, such as enable_thinking=false (repeatable; JSON, else text)",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="maximum number of new tokens")
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--temperature", metavar="T", type=float, help="divide the logits by T; 0 is greedy")
    parser.add_argument("--top-k", metavar="K", type=int, help="sample from the K most likely tokens; 0: no limit")
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="sample from the most likely tokens that together reach P"
    )
    parser.add_argument(
        "--repetition-penalty", metavar="R", type=float, help="above 1: make tokens that have occurred less likely"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--stop", metavar="TEXT", action="append", help="also stop after this string (repeatable)")
    parser.add_argument(
        "--ignore-generation-config",
        metavar="KEY",
        action="append",
        default=[],
        help="ignore a setting of generation_config.json (repeatable)",
    )
    arguments.add_device(parser)
    processes.add(parser)
    arguments.add_dtype(parser, ("float32", "bfloat16", "float64"), "type of weights and computation")
    arguments.add(parser, "--json")
    arguments.add_opening(parser)
    return arguments.complete(parser)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, program name first."""
    parser = parser_of(argv[0])
    args = parser.parse_args(argv[1:])
    processes.check(parser, args)
    if args.system is not None and not args.chat:
        parser.error("--system belongs to --chat")
    chats = {"--chat-template": args.chat_template, "--tools": args.tools, "--template-arg": args.template_arg}
    if given := [option for option, value in chats.items() if value is not None and not (args.chat or args.prompts)]:
        parser.error(f"{given[0]} belongs to --chat or --prompts")
    if args.greedy and any(value is not None for value in (args.temperature, args.top_k, args.top_p)):
        parser.error("--greedy does not sample: leave --temperature, --top-k and --top-p out")
    return args


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    with processes.joined(args):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from apr_jax.converters.storage import interrupts
    from apr_jax.generate import compilation_cache
    from apr_jax.generate.config import GenerationConfig

    settings = _settings(args)
    GenerationConfig().but(**settings).without(args.ignore_generation_config)
    prompts = _read_prompts(args.prompts) if args.prompts else []
    chat = _chat_settings(args)
    output = _Output(args)
    with interrupts.last_act(output.interrupted):
        compilation_cache.enable()
        from apr_jax.generate.generator import load_generator

        begun = time.perf_counter()
        with cli.open_dense_from(args, args.model) as checkpoint:
            config = GenerationConfig.of(checkpoint).without(args.ignore_generation_config)
            config.but(**settings).checked()
            with cli.warnings_said(), telling("loading the model"):
                placement = meshes.placement(args, args.device)
                generator = load_generator(checkpoint, args.dtype, placement, text=not args.input_ids)
            cli.say_warnings(checkpoint)
        generator.generation_config = config
        for warning in generator.tokenizer.warnings if generator.tokenizer else ():
            cli.warn(warning)
        if args.stop:
            settings["stop_strings"] = (*generator.generation_config.stop_strings, *args.stop)
        stream = generator.stream(_prompts(args, prompts, chat, generator), seed=args.seed, **settings)
        output.begin(generator, stream, time.perf_counter() - begun)
        for delta in stream:
            output.show(delta)
        output.end()
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    draws = any(value is not None for value in (args.temperature, args.top_k, args.top_p))
    return {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": False if args.greedy else True if draws else None,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "stop_strings": args.stop,
    }


def _chat_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what `chat_prompt` takes beside the messages."""
    settings: dict[str, Any] = {}
    for given in args.template_arg or ():
        key, equals, value = given.partition("=")
        if not equals or not key.isidentifier() or key in _NO_VARIABLES:
            raise UsageError(
                "this is not a variable of a chat template",
                code="template-arg",
                found=given,
                expected="KEY=VALUE, such as enable_thinking=false; tools by --tools",
            )
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    if args.tools:
        settings["tools"] = _read_json(args.tools, "tools")
        if not isinstance(settings["tools"], list):
            raise UsageError(
                "not a list of tools",
                code="chat-tools",
                file=args.tools,
                hint='A JSON list of {"type": "function", "function": {"name": ..., "parameters": ...}}',
            )
    if args.chat_template is not None:
        settings["chat_template"] = args.chat_template
    return settings


def _prompts(
    args: argparse.Namespace, items: Sequence[Any], chat: dict[str, Any], generator: Generator
) -> Sequence[str | Sequence[int]]:
    from apr_jax.generate.chat_template import by_name_or_file
    from apr_jax.trace import golden

    if args.input_ids:
        batch = golden.read_inputs(args.input_ids)
        return [row[mask == 1].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    if args.prompt:
        return list(args.prompt)
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        items = [[*system, {"role": "user", "content": text}] for text in args.chat]
    if "chat_template" in chat:
        templates = generator.tokenizer.chat_template if generator.tokenizer else None
        chat["chat_template"] = by_name_or_file(templates, chat["chat_template"])
    with cli.warnings_said():
        return [item if isinstance(item, str) else generator.chat_prompt(item, **chat) for item in items]


def _read_json(path: str, what: str) -> Any:
    from apr_jax.converters.formats import strict_json
    from apr_jax.converters.storage.source import read_whole

    data = read_whole(path, _MAX_BYTES, what)
    return strict_json.loads(data, what=what, max_bytes=_MAX_BYTES, file=path)


def _read_prompts(path: str) -> list[Any]:
    items = _read_json(path, "prompts")
    if not isinstance(items, list) or not items or not all(isinstance(item, str | list) for item in items):
        raise UsageError(
            "not a list of texts or conversations",
            code="prompts",
            file=path,
            hint='A JSON list of texts, or of conversations: [[{"role": "user", "content": "..."}], ...]',
        )
    return items


class _Output:
    """What the user sees: the text of a single prompt as it is made, the rows of a batch as they end."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._escaped = sys.stdout.isatty()
        self._begun = False
        self._line_open = False

    def begin(self, generator: Generator, stream: Stream, load_seconds: float) -> None:
        """Says what will be shown."""
        self._generator, self._stream, self._load_seconds = generator, stream, load_seconds
        self._single = stream.timing.rows == 1
        self._begun = True

    def show(self, delta: Delta) -> None:
        """Prints what a row gained."""
        if self._args.json:
            return
        if self._single:
            self._write(self._text(delta))
        elif delta.finish_reason is not None:
            self._show_row(delta.index, self._stream.results()[delta.index])

    def end(self) -> None:
        """Prints what is said at the end: the time that it took on stderr, or one JSON object."""
        if self._args.json:
            cli.print_json(self._report(interrupted=False))
            return
        self._close_line()
        print(self._rates(), file=sys.stderr)

    def interrupted(self) -> None:
        """Prints what there is so far and was not shown yet."""
        if not self._begun:
            return
        if self._args.json:
            cli.print_json(self._report(interrupted=True))
        elif not self._single:
            for index, row in enumerate(self._stream.results()):
                if row.finish_reason is None:
                    self._show_row(index, row)
        self._close_line()

    def _show_row(self, index: int, row: Generation) -> None:
        self._write(f"[{index}] {self._text(row)}")
        self._close_line()

    def _text(self, made: Delta | Generation) -> str:
        if self._generator.tokenizer is None:
            return "".join(f"{token} " for token in made.token_ids)
        return made.text

    def _write(self, text: str) -> None:
        if not text:
            return
        # A terminal obeys control characters, and the text is whatever the model makes of its prompt.
        shown = "".join(c if c in "\n\t" else printable(c) for c in text) if self._escaped else text
        sys.stdout.write(shown)
        sys.stdout.flush()
        self._line_open = not shown.endswith("\n")

    def _close_line(self) -> None:
        if self._line_open:
            self._write("\n")

    def _rates(self) -> str:
        timing = self._stream.timing
        return (
            f"prompt: {timing.prompt_tokens} tokens in {timing.prefill_seconds:.2f} s"
            f" ({timing.prefill_rate:.1f} tokens/s); new: {timing.new_tokens} tokens,"
            f" {timing.decode_rate:.1f} tokens/s after the first; load {self._load_seconds:.1f} s,"
            f" compile {timing.compile_seconds:.1f} s"
        )

    def _report(self, interrupted: bool) -> dict[str, Any]:
        model, timing = self._generator.model, self._stream.timing
        rows = [
            {
                "index": index,
                "prompt_tokens": len(row.prompt_ids),
                "token_ids": list(row.token_ids),
                "text": row.text,
                "finish_reason": row.finish_reason,
            }
            for index, row in enumerate(self._stream.results())
        ]
        return {
            "model": self._args.model,
            "device": f"{model.device.platform} ({model.device.device_kind})",
            "dtype": model.dtype,
            "seed": self._args.seed,
            "settings": dataclasses.asdict(self._stream.settings),
            "generations": rows,
            "interrupted": interrupted,
            "timing": dataclasses.asdict(timing)
            | {
                "load_seconds": self._load_seconds,
                "prefill_tokens_per_second": timing.prefill_rate,
                "decode_tokens_per_second": timing.decode_rate,
            },
        }
