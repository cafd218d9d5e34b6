"""What a forward pass shows: stages, inputs, positions, and how two of them compare."""
