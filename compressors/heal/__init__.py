"""Training of the numbers that a compressed model stores in floating point."""
