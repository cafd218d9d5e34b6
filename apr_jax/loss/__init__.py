"""The loss of a model on text: per token, over windows, and what is wrong with another engine's."""
