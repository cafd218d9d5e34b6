"""The commands that run models (golden, parity, generate and others), and `entry`, the console script `apr-jax`."""
