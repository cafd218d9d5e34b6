"""Two checkpoints side by side: whether they are the same model, and what happened where they are not."""
