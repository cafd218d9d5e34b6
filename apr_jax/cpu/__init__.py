"""Products with weights that stay as narrow as they are stored, compiled by numba for the processor at hand."""
