"""Seeded checkpoints for tests and benchmarks."""
