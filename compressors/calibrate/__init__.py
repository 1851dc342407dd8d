"""Tokens in, statistics per linear layer out: streamed, additive, resumable."""
