"""Which stages of another forward pass are wrong, and which mistake was made there."""
