"""Fine-tunes a Qwen2 model on a text with optax, and saves it.

    python finetune.py MODEL TEXT -o tuned.apr

MODEL is an `.apr` file, a HuggingFace folder or a safetensors file that comes with its tokenizer, TEXT a file. What is
saved opens in transformers (give -o a folder) and in `apr` (give -o FILE.apr).
"""

import argparse
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from apr_jax import Inputs, load_model, open_checkpoint, save
from apr_jax.generate.generator import Generator
from apr_jax.generate.tokenizer import Tokenizer


def batches(ids: list[int], rows: int, length: int, steps: int) -> np.ndarray:
    """Cuts random pieces out of the text: token ids [steps, rows, length]."""
    begins = np.random.default_rng(0).integers(0, len(ids) - length + 1, (steps, rows))
    return np.asarray(ids)[begins[..., None] + np.arange(length)]


def loss_of(module: nnx.Module, ids: np.ndarray) -> jnp.ndarray:
    logits = module(ids)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@nnx.jit
def train_step(module: nnx.Module, optimizer: nnx.Optimizer, ids: np.ndarray) -> jnp.ndarray:
    loss, gradients = nnx.value_and_grad(loss_of)(module, ids)
    optimizer.update(module, gradients)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()

    # Not `load_generator`, which on a CPU keeps matrices as they are stored: parameters are to be trained in float32.
    with open_checkpoint(args.model) as checkpoint:
        model, tokenizer = load_model(checkpoint), Tokenizer.of(checkpoint)
    ids = tokenizer.encode(args.text.read_text())
    Inputs.of([ids]).check_vocabulary(model.config.vocab_size)
    length = min(args.length, len(ids))

    # The module holds the very arrays that the model computes with: nothing has to be put back afterwards.
    optimizer = nnx.Optimizer(model.module, optax.adamw(args.learning_rate), wrt=nnx.Param)
    for step, batch in enumerate(batches(ids, 4, length, args.steps)):
        loss = train_step(model.module, optimizer, batch)
        print(f"step {step}: loss {float(loss):.6f}")

    print(Generator(model, tokenizer).generate(args.text.read_text()[:20], max_new_tokens=16)[0].text)
    save(model, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
