"""Parameters after some steps of AdamW, by optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apr_jax.model.gradients import gradients
from apr_jax.model.language_model import LanguageModel
from apr_jax.model.parameters import named, nested
from apr_jax.model.sharding import to_host
from apr_jax.optimizer.settings import Settings, decay_of, kind_of
from apr_jax.trace.inputs import Inputs
from apr_jax.trace.stages import GRADIENT

Arrays = Mapping[str, Any]


def gradients_at(
    model: LanguageModel, inputs: Inputs, counted: np.ndarray | None
) -> Callable[[Arrays], tuple[float, dict[str, Any]]]:
    """Returns a function: parameters by name -> the batch's loss and the gradient of each, in the model's dtype.

    Args:
      model: Whose configuration, dtype, device and operations are used.
      inputs: The batch.
      counted: Which tokens the loss is over, bool [B, T]; None is all.
    """
    names = list(named(model.parameters))

    def at(parameters: Arrays) -> tuple[float, dict[str, Any]]:
        with model.scope():
            arrays = {name: jnp.asarray(parameters[name], model.dtype) for name in names}
        moved = LanguageModel(model.config, nested(arrays), model.device, model.ops, model.layer_ops)
        loss, found = gradients(moved, inputs, counted)
        return loss, {name: found[GRADIENT + name] for name in names}

    return at


def by_optax(
    model: LanguageModel, inputs: Inputs, settings: Settings, counted: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Runs `optax.adamw` from a model's parameters, the same batch at every step.

    Args:
      model: Where it starts; it is not changed. Parameters, moments and steps are in its dtype.
      inputs: The batch.
      settings: Of AdamW; as many steps as it has rates.
      counted: Which tokens the loss is over, bool [B, T]; None is all.

    Returns:
      The parameters after the last step by name, and the loss before each step.
    """
    losses: list[float] = []
    at = gradients_at(model, inputs, counted)
    with model.scope():
        rates = jnp.asarray(settings.rates, model.dtype)
        optimizer = _optimizer(settings, lambda count: rates[count])
        parameters = named(model.parameters)
        state = optimizer.init(parameters)
        for _ in settings.rates:
            loss, found = at(parameters)
            losses.append(loss)
            found = {name: jnp.asarray(value, model.dtype) for name, value in found.items()}
            updates, state = optimizer.update(found, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
    return {name: to_host(value) for name, value in parameters.items()}, losses


def _optimizer(settings: Settings, rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    decays = decay_of(settings)
    steps = [
        optax.adamw(
            rate,
            *settings.betas,
            settings.eps,
            weight_decay=settings.weight_decay,
            mask=lambda tree: {name: decays[kind_of(name)] > 0 for name in tree},
        )
    ]
    if settings.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    return optax.chain(*steps)
