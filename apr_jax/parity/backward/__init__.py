"""Mistakes of a backward pass: each gradient recomputed from the engine's own values and the gradients behind it."""
