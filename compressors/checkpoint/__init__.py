"""Writing compressed checkpoints, and teaching transformers to read them."""
