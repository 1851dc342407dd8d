"""Evaluation of models that are larger than memory: one decoder layer at a time."""
