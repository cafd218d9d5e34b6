"""`python -m apr_jax COMMAND ...`: the same as `apr-jax COMMAND ...`."""

from apr_jax.commands.entry import run

if __name__ == "__main__":
    run()
