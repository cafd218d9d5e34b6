"""The mistakes that parity knows, one record each: what is computed wrongly, how it is found, and how it is said."""
