"""The benchmark behind `apr-jax bench`: our model, HuggingFace and `apr` on the same cases, in one run, beside what the
machine's memory and arithmetic allow.
"""
