"""Measure how fast models read a prompt and generate, and the memory they take."""
