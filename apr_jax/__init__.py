"""Qwen2 and Qwen2.5 in JAX, from safetensors or `.apr` files: logits and text, training, saving, comparison.

from apr_jax import load_generator, load_model, save

load_generator("model.apr").generate("Hello")   # text
model = load_model("model.apr")                 # token ids in, logits out
logits = model([[9707, 11, 1879]])
model.module                                    # the Flax module, for jax.jit, jax.grad, optax and the like
save(model, "tuned.apr")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apr_jax import capture as capture
    from apr_jax.converters.checkpoint.openers import open_checkpoint as open_checkpoint
    from apr_jax.converters.checkpoint.qwen2 import Qwen2Config as Qwen2Config
    from apr_jax.generate.generator import Generator as Generator
    from apr_jax.generate.generator import load_generator as load_generator
    from apr_jax.load.load_model import load_model as load_model
    from apr_jax.load.save import save as save
    from apr_jax.model.language_model import LanguageModel as LanguageModel
    from apr_jax.model.qwen2 import OPS as OPS
    from apr_jax.model.qwen2 import Ops as Ops
    from apr_jax.model.qwen2 import Qwen2ForCausalLM as Qwen2ForCausalLM
    from apr_jax.trace.inputs import Inputs as Inputs

# PEP 562: `import apr_jax` costs nothing, jax is imported when something that needs it is asked for.
_HOMES = {
    "capture": "apr_jax",
    "Generator": "apr_jax.generate.generator",
    "load_generator": "apr_jax.generate.generator",
    "Inputs": "apr_jax.trace.inputs",
    "LanguageModel": "apr_jax.model.language_model",
    "load_model": "apr_jax.load.load_model",
    "save": "apr_jax.load.save",
    "OPS": "apr_jax.model.qwen2",
    "Ops": "apr_jax.model.qwen2",
    "Qwen2ForCausalLM": "apr_jax.model.qwen2",
    "open_checkpoint": "apr_jax.converters.checkpoint.openers",
    "Qwen2Config": "apr_jax.converters.checkpoint.qwen2",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # It takes as long to import as a third of a command's start.
        from importlib import metadata

        try:
            return metadata.version("apr-jax")
        except metadata.PackageNotFoundError:
            return "0+unknown"  # a checkout that nobody installed
    if name not in _HOMES:
        raise AttributeError(f"module 'apr_jax' has no attribute '{name}'")
    if _HOMES[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        from apr_jax.converters.errors import not_installed

        if (needed := not_installed(f"apr_jax.{name}", error)) is not None:
            raise needed from None
        raise


def __dir__() -> list[str]:
    return sorted((*_HOMES, "__version__"))
