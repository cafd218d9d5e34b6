"""What an optimizer makes of parameters in some steps: by optax, and what is wrong with another engine's."""
