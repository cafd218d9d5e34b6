"""One `Checkpoint` for every kind of file or folder, and what a Qwen2 checkpoint holds."""
