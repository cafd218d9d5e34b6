"""Qwen2 in Flax NNX, and the jit-compiled programs that run it."""
