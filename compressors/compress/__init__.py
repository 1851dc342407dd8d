"""Compress weights layer by layer: solve, quantize and store one weight group at a time."""
