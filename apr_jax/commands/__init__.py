"""The commands that run models, and `entry`, the console script `apr-jax`."""
