"""From one container to another: planned first, then streamed."""
