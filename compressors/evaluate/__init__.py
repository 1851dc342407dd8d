"""Perplexity, benchmark tasks, comparison with the dense model and baselines, quality gates."""
