"""Traces, the intermediate values of a forward pass: keys, shapes, inputs, files of them, how far apart two are."""
