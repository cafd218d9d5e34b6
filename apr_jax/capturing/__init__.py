"""What watches another engine's forward pass: which module plays which part, and what is written down of each call."""
