"""The commands that need no jax. Each module has `parse(argv)` and `main(args)`; `cli.start` runs them."""
