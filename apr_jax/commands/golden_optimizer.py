"""golden --optimizer: write the parameters after some steps of AdamW, or name what is wrong with another engine's."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from apr_jax.commands import meshes, processes
from apr_jax.converters.commands import cli
from apr_jax.converters.commands.progress import telling

if TYPE_CHECKING:
    import numpy as np

    from apr_jax.optimizer.checking import Verdict
    from apr_jax.optimizer.settings import Settings
    from apr_jax.trace.inputs import Inputs

OPTIONS = ("lr", "steps", "betas", "eps", "weight_decay", "decay", "clip_norm")
FORMAT = "apr_jax steps 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the optimizer; all but --optimizer are None where they are not given."""
    group = parser.add_argument_group("optimizer steps, all on the same batch")
    group.add_argument(
        "--optimizer",
        choices=("adamw",),
        help="write the parameters after some steps, or --check those of another engine: a checkpoint of any form",
    )
    group.add_argument(
        "--lr", metavar="RATE[,RATE...]", type=_numbers, help="learning rate, or one for each step (default: 1e-3)"
    )
    group.add_argument("--steps", metavar="N", type=int, help="number of steps (default: one for each rate)")
    group.add_argument(
        "--betas", metavar="B1,B2", type=_numbers, help="decay rates of the two moments (default: 0.9,0.999)"
    )
    group.add_argument(
        "--eps", metavar="EPS", type=float, help="added to the root of the second moment (default: 1e-8)"
    )
    group.add_argument(
        "--weight-decay", metavar="DECAY", type=float, help="decoupled weight decay (default: 0.01, as in torch)"
    )
    group.add_argument(
        "--decay",
        choices=("all", "matrices"),
        help="parameters that decay: all, or all but norms and biases (default: all)",
    )
    group.add_argument(
        "--clip-norm", metavar="NORM", type=float, help="clip the gradient to this global norm (default: no clipping)"
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a usage error where options do not go together."""
    given = [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(args, name) is not None]
    if args.optimizer is None:
        if given:
            parser.error(f"{', '.join(given)}: add --optimizer adamw")
        return
    if args.export_inputs or args.trace or args.hidden_states or args.gradients or args.reference == "hf":
        parser.error(
            "--optimizer writes or checks parameters: leave --export-inputs, --trace, --hidden-states, --gradients and "
            "--reference hf out"
        )
    if args.check and args.dtype == "bfloat16":
        parser.error(
            "--optimizer --check judges steps in float32 or float64: in bfloat16 most of a step is rounded off"
        )
    if args.betas is not None and len(args.betas) != 2:
        parser.error(f"--betas takes two numbers: {len(args.betas)} are given")
    rates = args.lr or (1e-3,)
    steps = args.steps or len(rates)
    if steps < 1 or (len(rates) > 1 and len(rates) != steps):
        parser.error(f"--steps is {steps}, and --lr gives {len(rates)} rates: give one, or one for each step")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def settings_of(args: argparse.Namespace) -> Settings:
    """Returns what was asked for.

    Raises:
      UsageError: A number is out of its range.
    """
    from apr_jax.optimizer.settings import Settings

    rates = args.lr or (1e-3,)
    names = {
        "betas": "betas",
        "eps": "eps",
        "weight_decay": "weight_decay",
        "decay": "decayed",
        "clip_norm": "clip_norm",
    }
    given = {field: getattr(args, name) for name, field in names.items() if getattr(args, name) is not None}
    return Settings(rates if len(rates) > 1 else rates * (args.steps or 1), **given)


def make(args: argparse.Namespace, inputs: Inputs, labels: np.ndarray | None) -> int:
    """Writes the parameters after the steps; returns the exit code."""
    from apr_jax.converters.storage.output import check_target
    from apr_jax.load.load_model import load_model
    from apr_jax.optimizer.reference import by_optax
    from apr_jax.trace import golden
    from apr_jax.trace.inputs import paths_of

    settings = settings_of(args)
    with cli.open_dense_from(args, args.model) as checkpoint:
        sources = [*checkpoint.paths, *paths_of(args.input_ids)]
        check_target(args.output, force=args.force, sources=sources)
        cli.say_warnings(checkpoint)
        with telling("computing the steps"):
            model = load_model(checkpoint, args.dtype, meshes.placement(args, args.device))
            after, losses = by_optax(model, inputs, settings, _counted(labels))
        device = f"{model.device.platform} ({model.device.device_kind})"
        metadata = golden.provenance(checkpoint, model.config, "jax", args.dtype, device, "optax.adamw")
    metadata |= {"format": FORMAT, "settings": json.dumps(settings.to_json()), "losses_nats": json.dumps(losses)}
    if not processes.is_first():
        return 0
    golden.write_arrays(args.output, golden.stored(after), metadata, args.force, sources, cli.say)
    if args.json:
        cli.print_json(
            {"output": args.output, "tensors": len(after), "losses_nats": losses, "settings": settings.to_json()}
        )
    else:
        cli.show(f"{args.output}: {len(after)} parameters after {_steps(settings)} of AdamW")
        for step, loss in enumerate(losses):
            print(f"loss before step {step + 1}: {loss:.6f} nats")
    return 0


def check(args: argparse.Namespace, inputs: Inputs, labels: np.ndarray | None) -> int:
    """Compares another engine's parameters after the steps; returns the exit code."""
    from apr_jax.load.load_model import load_model
    from apr_jax.optimizer import checking

    settings = settings_of(args)
    with cli.open_dense_from(args, args.model) as checkpoint, cli.open_from(args, args.check) as theirs:
        cli.say_warnings(checkpoint)
        with telling("computing the steps"):
            placement = meshes.placement(args, args.device)
            exact, engine = (load_model(checkpoint, dtype, placement) for dtype in ("float64", args.dtype))
            verdict = checking.check(exact, engine, inputs, settings, theirs, _counted(labels))
    if args.json:
        cli.print_json(verdict.to_json() | {"settings": settings.to_json()})
    else:
        _print(verdict, settings)
    return 0 if verdict.within else cli.EXIT_DIFFERS


def _counted(labels: np.ndarray | None) -> Any:
    from apr_jax.trace import golden

    return None if labels is None else labels != golden.IGNORED


def _steps(settings: Settings) -> str:
    count = len(settings.rates)
    return f"{count} step{'' if count == 1 else 's'}"


def _print(verdict: Verdict, settings: Settings) -> None:
    print(
        f"{verdict.parameters} parameters, {verdict.elements} elements after {_steps(settings)} of AdamW: theirs "
        f"differ from ours by {verdict.right.error:.1e} of the step"
    )
    for mistake in verdict.mistakes:
        cli.show(f"{mistake.name}: {mistake.says}")
    if verdict.mistakes and verdict.explained is not verdict.right:
        print(f"with that, theirs are reproduced to {verdict.explained.error:.1e} of the step")
    for others in verdict.alternatives:
        cli.show(f"or {' and '.join(f'{each.name}: {each.says}' for each in others)}")
    if verdict.within:
        print("agree: no parameter is off by more than rounding is")
    else:
        print(f"farthest off: {verdict.right.where}")
