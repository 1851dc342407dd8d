"""Sources, structure and weights of models; the only package that knows transformers' classes."""
