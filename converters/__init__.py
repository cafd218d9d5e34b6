"""Bytes in, bytes out: containers, dtype registry, checkpoints and conversion. Never imports jax or flax."""
